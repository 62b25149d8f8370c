"""The tables and sentences in which a result is told on a terminal."""

from collections.abc import Sequence

from rich.table import Table

from se_compress.artifacts import (
    Check,
    Comparison,
    CurvePoint,
    DomainReport,
    ExpertProfile,
    ValidationReport,
    unlimited,
)
from se_compress.reporting.limits import missed
from se_compress.request import Outcome, VariantsOutcome
from se_compress.running.preflight import in_units


def super_experts_table(profile: ExpertProfile, name: str) -> Table:
    title = f"{name or profile.model}: super experts"
    table = Table(title=title, title_justify="left")
    for column in ("expert", "peak", "rise removed", "sinks left", "KL"):
        table.add_column(column, justify="right")
    table.add_column("confirmed")
    words = {True: "yes", False: "no", None: "not asked"}
    for one in profile.super_experts:
        seen = ("-", "-", "-")
        if gone := one.zeroed:
            shares = f"{gone.rise_removed:.1%}", f"{gone.sink_mass:.1%}"
            seen = (*shares, _number(gone.kl_divergence))
        table.add_row(
            str(one.id),
            f"{one.peak:,.0f}",
            *seen,
            words[one.confirmed],
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    table = Table(title="variants", title_justify="left")
    table.add_column("variant")
    for name in ("size", "bits", "KL divergence", "perplexity"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_row(
        "source", in_units(comparison.size_bytes), "16", "", _number(comparison.perplexity)
    )
    for variant in comparison.variants:
        one = variant.checkpoint
        table.add_row(
            one.name,
            in_units(one.size_bytes),
            f"{one.bits_per_weight:.2f}",
            _number(one.distance),
            _number(one.perplexity_result),
            "passed" if one.published else "REJECTED",
        )
    return table


def what_to_ship(comparison: Comparison) -> str:
    if comparison.recommended:
        return f"ship {comparison.recommended}{by_which_limits(comparison)}"
    if comparison.published:
        return "nothing to ship, what passed has experts set to zero"
    return "nothing to ship, no variant passed its gates"


def by_which_limits(comparison: Comparison) -> str:
    """What passed by looser limits only than others, if anything did."""
    everything = [variant.checkpoint for variant in comparison.variants]
    loose = [one.name for one in everything if one.published and missed(one, everything)]
    if not loose:
        return ""
    if comparison.recommended in loose:
        return " (which passed by looser limits than a result at least as good)"
    return f" ({', '.join(loose)} passed by looser limits only)"


def curve_table(points: Sequence[CurvePoint]) -> Table:
    """What other budgets would buy, the cheapest first."""
    table = Table(title="other budgets, protection as it is", title_justify="left")
    table.add_column("widths")
    for name in ("size", "bits per expert weight", "predicted loss"):
        table.add_column(name, justify="right")
    for point in points:
        widths = ", ".join(map(str, point.widths))
        label = f"{widths} mixed" if len(point.widths) > 1 else f"{widths} for all"
        bits = f"{point.bits_per_weight:.3f}"
        table.add_row(label, in_units(point.size_bytes), bits, _number(point.predicted_loss))
    return table


def gates_table(validation: ValidationReport) -> Table:
    table = Table(title="gates", title_justify="left")
    for name, justify in (("gate", "left"), ("value", "right"), ("limit", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("verdict")
    for check in validation.checks:
        table.add_row(check.name, _number(check.value), _number(check.limit), _verdict(check))
    return table


def domains_table(validation: ValidationReport) -> Table:
    """The domains side by side, the tail beside the mean."""
    table = Table(title="domains", title_justify="left")
    table.add_column("domain")
    for name in ("KL", "median", "99 %", "same top token", "perplexity"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for one in validation.domains:
        table.add_row(
            one.name,
            _number(one.distance),
            _number(one.tail.median),
            _number(one.tail.p99),
            f"{one.tail.agreement:.1%}",
            f"{one.perplexity_source:.4g} -> {one.perplexity_result:.4g}",
            _passed(one),
        )
    return table


def _passed(domain: DomainReport) -> str:
    failed = [check.name for check in domain.checks if check.passed is False]
    return f"FAILED: {', '.join(failed)}" if failed else "passed"


def _verdict(check: Check) -> str:
    if unlimited(check):
        return "no limit"
    word = {True: "passed", False: "FAILED", None: "not run"}[check.passed]
    return word if check.passed or not check.detail else f"{word}: {check.detail}"


def result_line(outcome: Outcome) -> str:
    validation, plan = outcome.validation, outcome.plan
    measured = f"{validation.perplexity_source:.2f} -> {validation.perplexity_result:.2f}"
    return (
        f"{outcome.directory}: {'passed' if outcome.published else 'REJECTED'}, "
        f"{in_units(validation.source_size_bytes)} -> {in_units(validation.size_bytes)}, "
        f"{plan.bits_per_weight:.2f} bits per expert weight, "
        f"perplexity {measured if validation.tokens else 'not measured'}"
    )


def why_rejected(outcome: Outcome) -> str:
    failed = failed_gates(outcome.validation)
    return f"nothing was published; {failed}; report in {outcome.directory}/se_compress"


def failed_gates(validation: ValidationReport) -> str:
    return "; ".join(
        f"{check.name} is {_number(check.value)}, limit {_number(check.limit)}"
        + (f" ({check.detail})" if check.detail else "")
        for check in validation.checks
        if check.passed is False
    )


def why_variants_rejected(outcome: VariantsOutcome) -> str:
    report = f"see {outcome.directory}/comparison.html"
    if not outcome.comparison.published:
        return (
            f"nothing was published; all {len(outcome.outcomes)} variants were rejected; {report}"
        )
    failed = [
        f"variant {name} was rejected: {failed_gates(outcome.outcomes[name].validation)}"
        for name in outcome.comparison.required
        if not outcome.outcomes[name].published
    ]
    return f"{'; '.join(failed)}; require names it, the others are published; {report}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
