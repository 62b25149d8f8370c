"""The page and the model card that say what was done and whether it may be trusted.

Nothing is measured here. The template lays the page out and formats plain numbers; this module
chooses the words, the rows and the charts. A chart is Plotly's own JSON without colours: the page
takes them from its style sheet, so that they follow the reader's light or dark scheme.
"""

import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import yaml
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from se_compress.artifacts import (
    Ablation,
    Check,
    CompressionPlan,
    Continuation,
    ExpertDecision,
    ExpertId,
    ExpertProfile,
    ExpertRecord,
    LayerComparison,
    SuperExpert,
    ValidationReport,
)
from se_compress.recipe import Recipe

Figure = dict[str, Any]
State = Literal["passed", "failed", "not-run"]

SOURCE_BITS = 16
LISTED_EXPERTS = 60
TABLE_ROWS = 20
SIZE_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
WORDS: Mapping[State, tuple[str, str]] = {
    "passed": ("✓", "Passed"),
    "failed": ("✕", "Failed"),
    "not-run": ("○", "Not run"),
}
ROLE_OF_OUTLIER = {
    "cancels": "cancels: takes an existing massive activation out of the stream again",
    "layer forms no massive activation": "its layer forms no massive activation",
    "model has none": "the model has no massive activation at all",
}


class Wording(NamedTuple):
    """How a check is put to a reader. `bound` says on which side of the limit the good values lie."""

    title: str
    meaning: str
    bound: str = ""
    share: bool = False


WORDINGS: Mapping[str, Wording] = {
    "perplexity_increase": Wording(
        "Perplexity increase",
        "How much worse the result predicts held-out text than the source.",
        "at most",
        True,
    ),
    "kl_divergence": Wording(
        "KL divergence to the source",
        "How far the predicted next-token probabilities moved, in nats per token; 0 is identical.",
        "at most",
    ),
    "massive_activation_ratio": Wording(
        "Massive activation kept",
        "What is left of the huge value that the super experts put into the stream.",
        "at least",
        True,
    ),
    "sink_decay": Wording(
        "Attention sink lost",
        "Share of the attention to the first token that went elsewhere.",
        "at most",
        True,
    ),
    "router_agreement": Wording(
        "Router agreement",
        "Share of the experts chosen by the source that the result chooses too.",
        "at least",
        True,
    ),
    "repetition": Wording(
        "Repetition",
        "How repetitive the result's continuations are beside those of the source.",
        "at most",
    ),
    "tensors_accounted": Wording(
        "Tensors accounted for", "Every tensor of the source has a place in the result."
    ),
    "reload": Wording("Reload", "The target engine opens the written files and agrees with them."),
}


@dataclass(frozen=True)
class Gate:
    """One check in words. `value` and `limit` stay as they are for machines that read the page."""

    name: str
    title: str
    meaning: str
    bound: str
    value: float | None
    value_text: str
    limit: float | None
    limit_text: str
    state: State
    detail: str

    @property
    def symbol(self) -> str:
        return WORDS[self.state][0]

    @property
    def word(self) -> str:
        return WORDS[self.state][1]


@dataclass(frozen=True)
class Verdict:
    state: State
    symbol: str
    word: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Cells are text already. `left_out` says what the table does not show, if anything."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left_out: str = ""


@dataclass(frozen=True)
class Chart:
    """`summary` is what a reader who cannot see the chart needs to know of it."""

    key: str
    title: str
    summary: str
    figure: Figure
    table: Table | None = None


# --------------------------------------------------------------------------------------- the page


def render_report(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> str:
    """The report as one HTML file that needs nothing beside it: style, data and Plotly are inside."""
    gates = describe_gates(validation)
    charts = {chart.key: chart for chart in _charts(profile, plan, validation)}
    return _environment().get_template("report.html.j2").render(
        recipe=recipe,
        profile=profile,
        plan=plan,
        validation=validation,
        subtitle=f"Written for {plan.target}; method {plan.method}; to {recipe.output}",
        verdict=judge(gates, profile, plan, validation),
        gates=gates,
        sizes=_sizes(validation),
        super_experts=_super_experts(recipe, profile, plan),
        charts=charts,
        figures={key: chart.figure for key, chart in charts.items()},
        errors=_errors(recipe, profile, validation),
        decisions=_decisions(plan),
        samples=[_sample(continuation) for continuation in validation.continuations],
        facts=_facts(recipe, profile, plan, validation),
        recipe_yaml=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
        plotly_js=Markup(get_plotlyjs()),
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("se_compress", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "percent": percent, "size": size}
    return environment


# ------------------------------------------------------------------------------ numbers for people


def number(value: float | None, apart_from: float | None = None) -> str:
    """Three significant digits, thousands grouped; more digits where two different numbers would
    otherwise look the same, as a value just beyond its limit."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    text = _rounded(value, 3)
    for digits in range(4, 17):
        if apart_from is None or value == apart_from or text != _rounded(apart_from, digits - 1):
            break
        text = _rounded(value, digits)
    return text


def _rounded(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return str(value)
    if round(abs(value), max(0, digits - 4)) >= 1000:
        return f"{value:,.{max(0, digits - 3)}f}"
    return f"{value:.{digits}g}"


def percent(value: float | None, apart_from: float | None = 1.0) -> str:
    """A share as a percentage; "100 %" is kept for what is exactly all of it."""
    if value is None or not math.isfinite(value):
        return number(value)
    return number(100 * value, None if apart_from is None else 100 * apart_from) + " %"


def size(value: float) -> str:
    """Bytes in decimal units, as disks and download pages count."""
    for unit, factor in SIZE_UNITS:
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{value:.0f} B"


def _count(amount: int, thing: str) -> str:
    return f"{amount:,} {thing}" if amount == 1 else f"{amount:,} {thing}s"


def _listed(identities: Iterable[ExpertId]) -> str:
    names = [str(identity) for identity in sorted(identities)]
    more = len(names) - LISTED_EXPERTS
    return ", ".join(names[:LISTED_EXPERTS]) + (f" and {more:,} more" if more > 0 else "")


# ------------------------------------------------------------------------------------ the verdict


def describe_gates(validation: ValidationReport) -> tuple[Gate, ...]:
    """Every check in words; a name that only `not_run` knows gets a line too."""
    known = {check.name for check in validation.checks}
    missing = [Check(name, None, None, None) for name in validation.not_run if name not in known]
    return tuple(_gate(check) for check in (*validation.checks, *missing))


def _gate(check: Check) -> Gate:
    wording = WORDINGS.get(check.name, Wording(check.name.replace("_", " ").capitalize(), ""))
    text = percent if wording.share else number
    states: dict[bool | None, State] = {True: "passed", False: "failed", None: "not-run"}
    return Gate(
        name=check.name,
        title=wording.title,
        meaning=wording.meaning,
        bound=wording.bound,
        value=check.value,
        value_text=text(check.value, check.limit),
        limit=check.limit,
        limit_text=text(check.limit, None),
        state=states[check.passed],
        detail=check.detail,
    )


def judge(
    gates: Sequence[Gate],
    profile: ExpertProfile,
    plan: CompressionPlan,
    validation: ValidationReport,
) -> Verdict:
    """Failed if anything failed, passed only if something passed; otherwise nothing is proven."""
    by_state = {state: [g.title for g in gates if g.state == state] for state in WORDS}
    failed, not_run = by_state["failed"], by_state["not-run"]
    all_checks = _count(len(gates), "check")
    state: State = "passed"
    if failed or not validation.passed:
        state = "failed"
        first = f"{len(failed)} of {all_checks} failed: {', '.join(failed)}."
        first += " This checkpoint was not published."
    elif not by_state["passed"]:
        state, first = (
            "not-run",
            "No check could be run, so nothing is known about this checkpoint.",
        )
    elif not_run:
        first = f"{len(by_state['passed'])} of {all_checks} passed and none failed."
    else:
        first = f"All {all_checks} passed."
    symbol, word = WORDS[state]
    sentences = [first, *([f"Not run: {', '.join(not_run)}."] if not_run else [])]
    sentences.append(_fate_of_super_experts(profile, plan))
    return Verdict(state, symbol, "Not proven" if state == "not-run" else word, tuple(sentences))


def _fate_of_super_experts(profile: ExpertProfile, plan: CompressionPlan) -> str:
    if not profile.super_experts:
        return "The model has no super expert to protect."
    fates = [f"{one.id} {_fate(plan.by_id.get(one.id))}" for one in profile.super_experts]
    return f"{_count(len(fates), 'super expert')}: {', '.join(fates)}."


def _fate(decision: ExpertDecision | None) -> str:
    if decision is None:
        return "has no line in the plan"
    if decision.action in ("prune", "merge"):
        return {"prune": "was pruned", "merge": "was merged"}[decision.action]
    if decision.bits == SOURCE_BITS:
        return "keeps the source's precision"
    return f"has {decision.bits} bits"


def _sizes(validation: ValidationReport) -> list[tuple[str, int, int]]:
    return [
        ("Whole checkpoint", validation.source_size_bytes, validation.size_bytes),
        ("Expert weights alone", validation.source_expert_bytes, validation.expert_bytes),
    ]


# ----------------------------------------------------------------------------------- super experts


def _super_experts(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan
) -> dict[str, object]:
    return {
        "sentences": _story(recipe, profile),
        "found": _found_table(profile, plan),
        "zeroed": _zeroed_table(profile.super_experts),
        "outliers": Table(
            "Outlier experts",
            ("Expert", "Peak", "Channel", "Position", "Why it is no super expert"),
            tuple(
                (str(o.id), number(o.peak), str(o.channel), str(o.position),
                 ROLE_OF_OUTLIER.get(o.reason, o.reason))
                for o in profile.outliers
            ),
        ),
    }  # fmt: skip


def _story(recipe: Recipe, profile: ExpertProfile) -> list[str]:
    settings = recipe.super_experts
    criterion = (
        f"An expert is a candidate (arXiv:2507.23279) if its largest output exceeds both percentile "
        f"{number(settings.percentile)} of all experts ({number(profile.percentile_value)}) and "
        f"{percent(settings.fraction_of_max)} of the largest ({number(profile.fraction_value)}), "
        f"in a layer that forms massive activations."
    )
    if not profile.super_experts:
        return [_why_none(profile), criterion]
    head = f"Found {_count(len(profile.super_experts), 'super expert')}: "
    told = [_effect(one) for one in profile.super_experts[:3]]
    return [head + _listed(one.id for one in profile.super_experts) + ".", *told, criterion]


def _why_none(profile: ExpertProfile) -> str:
    if profile.massive:
        return (
            "No super expert was found: the model has massive activations, but no expert of a layer "
            f"that forms them exceeds {number(profile.threshold)}."
        )
    largest = max((layer.peak for layer in profile.layers), default=None)
    return (
        "This model has no super expert, because it has no massive activation: the largest |h| after "
        f"any layer is {number(largest)}. A massive activation exceeds 100 and is at least 1,000 "
        "times the median."
    )


def _effect(one: SuperExpert) -> str:
    text = f"Expert {one.id} writes {number(one.peak)} to channel {one.channel} at position "
    text += f"{one.position}. "
    if one.zeroed is None:
        return text + "It was not confirmed by zeroing, as the recipe did not ask for it."
    text += f"With its output set to zero, {_left(one.zeroed)}"
    if one.control is not None:
        control = ExpertId(one.control.layer, one.control.expert)
        text += f"; with the control {control} zeroed instead, {_left(one.control)}"
    return text + ("." if one.confirmed else ". That does not confirm it as a super expert.")


def _left(ablation: Ablation) -> str:
    return (
        f"{percent(ablation.massive_activation)} of the massive activation and "
        f"{percent(ablation.sink_mass)} of the attention sink remain"
    )


def _found_table(profile: ExpertProfile, plan: CompressionPlan) -> Table:
    confirmed = {True: "yes", False: "no", None: "not asked"}
    rows = tuple(
        (str(one.id), number(one.peak), f"{number(one.peak / profile.threshold)} ×"
         if profile.threshold else "–", str(one.channel), str(one.position), str(one.token_id),
         confirmed[one.confirmed], _fate(plan.by_id.get(one.id)))
        for one in profile.super_experts
    )  # fmt: skip
    head = ("Expert", "Peak", "Over threshold", "Channel", "Position", "Token id",
            "Confirmed by zeroing", "In the result it")  # fmt: skip
    return Table("Super experts: (layer, expert), counted from 0", head, rows)


def _zeroed_table(found: Sequence[SuperExpert]) -> Table:
    rows = []
    for one in found:
        for what, ablation in (("super expert", one.zeroed), ("control", one.control)):
            if ablation is not None:
                identity = ExpertId(ablation.layer, ablation.expert)
                rows.append((f"{identity}, {what}", percent(ablation.rise_removed),
                             percent(ablation.massive_activation), percent(ablation.sink_mass),
                             number(ablation.kl_divergence)))  # fmt: skip
    head = ("Zeroed expert", "Layer's rise that vanished", "Massive activation left",
            "Sink mass left", "KL to the source (nats)")  # fmt: skip
    return Table("What happens when the output of one expert is set to zero", head, tuple(rows))


# ------------------------------------------------------------------------- errors and the ordinary


def _errors(
    recipe: Recipe, profile: ExpertProfile, validation: ValidationReport
) -> dict[str, object]:
    records = [record for layer in validation.records for record in layer.experts]
    rare = [record for record in records if record.shrinkage > 0]
    rare.sort(key=lambda record: (-record.shrinkage, record.id))
    worst = sorted(records, key=lambda r: (-max(r.error_gate_up, r.error_down), r.id))
    return {
        "worst": _record_table("Relative output error of the quantised experts", worst),
        "rare": _record_table("Experts with too few calibration tokens", rare),
        "remarks": _remarks(recipe, profile, records, rare) if records else _unrouted(profile),
    }


def _record_table(caption: str, records: Sequence[ExpertRecord]) -> Table:
    rows = tuple(
        (str(r.id), str(r.bits), f"{r.tokens:,}", percent(r.error_gate_up), percent(r.error_down),
         percent(r.shrinkage), number(r.damping))
        for r in records[:TABLE_ROWS]
    )  # fmt: skip
    head = ("Expert", "Bits", "Tokens", "Error, gate and up", "Error, down",
            "Borrowed from the layer", "Damping")  # fmt: skip
    more = len(records) - len(rows)
    left_out = f"{_count(more, 'expert')} further down the list; all are in validation.json."
    return Table(caption, head, rows, left_out if more else "")


def _remarks(
    recipe: Recipe,
    profile: ExpertProfile,
    records: Sequence[ExpertRecord],
    rare: Sequence[ExpertRecord],
) -> list[str]:
    remarks = []
    for reason, times in Counter(r.fallback for r in records if r.fallback).most_common():
        names = _listed(r.id for r in records if r.fallback == reason)
        remarks.append(f"Fallback for {_count(times, 'expert')} ({reason}): {names}.")
    if not remarks:
        remarks.append("No expert needed a fallback.")
    damped = [r.id for r in records if r.damping > recipe.quantization.damping * 1.001]
    if damped:
        asked = number(recipe.quantization.damping)
        remarks.append(
            f"More damping than the recipe's {asked} for {_count(len(damped), 'expert')}: "
            f"{_listed(damped)}."
        )
    remarks.append(
        f"Too few calibration tokens for {_count(len(rare), 'expert')}: each borrows a share of its "
        "layer's statistics, as the table below shows."
        if rare else "Every expert saw enough calibration tokens for statistics of its own."
    )  # fmt: skip
    return remarks + _unrouted(profile)


def _unrouted(profile: ExpertProfile) -> list[str]:
    missed = [stats.id for stats in profile.experts if stats.tokens == 0]
    if not missed:
        return ["Every expert was used during calibration."]
    return [f"Never used during calibration, {_count(len(missed), 'expert')}: {_listed(missed)}."]


def _decisions(plan: CompressionPlan) -> Table:
    kinds = Counter((d.action, _width(d.bits), d.reason) for d in plan.experts)
    rows = tuple(
        (f"{times:,}", action, bits, reason)
        for (action, bits, reason), times in kinds.most_common()
    )
    caption = "What the plan decided, and why"
    return Table(caption, ("Experts", "Action", "Bits", "Reason"), rows)


def _width(bits: int | None) -> str:
    if bits is None:
        return "none"
    return f"{bits} (as in the source)" if bits == SOURCE_BITS else str(bits)


def _sample(continuation: Continuation) -> dict[str, str]:
    same = os.path.commonprefix([continuation.source, continuation.result])
    if same not in (continuation.source, continuation.result):
        same = same[: same.rfind(" ") + 1]
    identical = continuation.source == continuation.result
    return {
        "prompt": continuation.prompt,
        "same": same,
        "source": continuation.source[len(same) :],
        "result": continuation.result[len(same) :],
        "remark": "Both continuations are identical." if identical
        else f"The continuations agree for {_count(len(same.split()), 'word')}.",
    }  # fmt: skip


def _facts(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> list[tuple[str, str]]:
    symmetry = "symmetric" if plan.symmetric else "asymmetric"
    group = "one scale per row" if plan.group_size == -1 else f"groups of {plan.group_size}"
    versions = ", ".join(f"{name} {version}" for name, version in validation.versions.items())
    return [
        ("Source", f"{recipe.model} (digest {profile.source_digest})"),
        ("Target engine", plan.target),
        ("Quantisation", f"{plan.method}, {group}, {symmetry}"),
        ("Other weights", f"{_width(plan.other_bits)} bits"),
        ("Calibration", f"{profile.samples:,} sequences of {profile.sequence_length:,} tokens "
                        f"(digest {profile.tokens_digest})"),
        ("Profile", f"digest {profile.digest}; the plan was made from {plan.profile_digest}"),
        ("Versions", versions or "not recorded"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- the charts


def _charts(
    profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> list[Chart]:
    charts = [_peak_chart(profile), _bits_chart(profile, plan)]
    if validation.layers:
        layers = validation.layers
        charts += [_stream_chart(profile, layers), _sink_chart(profile, layers)]
        charts += [_head_chart(layers, "source"), _head_chart(layers, "result")]
        charts.append(_hidden_chart(profile, layers))
        if any(layer.router_agreement is not None for layer in layers):
            charts.append(_router_chart(profile, validation))
    return charts


def _peak_chart(profile: ExpertProfile) -> Chart:
    ranked = sorted(profile.experts, key=lambda stats: (-stats.peak, stats.id))
    peaks = {stats.id: stats.peak for stats in profile.experts}
    decades = [_log10(peak) for peak in peaks.values()]
    ticks = range(math.floor(min(filter(None, decades), default=0)),
                  math.ceil(max(filter(None, decades), default=1)) + 1)  # fmt: skip
    figure = _expert_heat(
        {identity: _log10(peak) for identity, peak in peaks.items()},
        hover="peak %{customdata:,.4~r}",
        shown={identity: _short(peak) for identity, peak in peaks.items()},
        marked=[one.id for one in profile.super_experts],
    )
    figure["layout"]["meta"] = {"scale": ["scale-low", "scale-mid", "scale-high"]}
    figure["layout"]["coloraxis"] |= {
        "colorbar": _colorbar("peak", list(ticks), [f"{10.0**tick:,g}" for tick in ticks])
    }
    summary = (
        f"The largest output of any expert is {number(ranked[0].peak)} by {ranked[0].id}; half "
    )
    summary += f"of all experts stay below {number(statistics.median(peaks.values()))}. "
    summary += f"Threshold of the criterion: {number(profile.threshold)}."
    if profile.super_experts:
        summary += " Circles mark the super experts."
    rows = tuple(
        (str(s.id), number(s.peak), number(s.weighted_peak), str(s.channel), str(s.position),
         f"{s.tokens:,}")
        for s in ranked[:TABLE_ROWS]
    )  # fmt: skip
    head = ("Expert", "Peak", "After routing weight", "Channel", "Position", "Tokens")
    table = Table(f"The {len(rows)} largest", head, rows, "All are in profile.json.")
    title = "Largest output of every expert, before its routing weight"
    return Chart("peaks", title, summary, figure, table)


def _bits_chart(profile: ExpertProfile, plan: CompressionPlan) -> Chart:
    widths = sorted({decision.bits or 0 for decision in plan.experts})
    names = {width: "pruned" if width == 0 else f"{width}" for width in widths}
    figure = _expert_heat(
        {d.id: float(widths.index(d.bits or 0)) for d in plan.experts},
        hover="%{customdata}",
        shown={d.id: f"{d.action}, {_width(d.bits)}" for d in plan.experts},
        marked=[one.id for one in profile.super_experts],
    )
    figure["layout"]["meta"] = {"steps": [f"bits-{names[width]}" for width in widths]}
    figure["layout"]["coloraxis"] |= {
        "cmin": -0.5,
        "cmax": len(widths) - 0.5,
        "colorbar": _colorbar("bits", list(range(len(widths))), list(names.values())),
    }
    counts = Counter(decision.bits or 0 for decision in plan.experts)
    told = [
        f"{_count(counts[width], 'expert')} {'pruned' if width == 0 else f'at {_width(width)}'}"
        for width in widths
    ]
    summary = f"{'; '.join(told)}. On average {number(plan.bits_per_weight)} bits per weight."
    rows = tuple(
        (str(layer), *(f"{row[width]:,}" for width in widths))
        for layer, row in _counts_by_layer(plan).items()
    )
    head = ("Layer", *("Pruned" if width == 0 else f"{width} bits" for width in widths))
    table = Table("Experts of each width, by layer", head, rows)
    return Chart("bits", "Bits per layer and expert", summary, figure, table)


def _counts_by_layer(plan: CompressionPlan) -> dict[int, Counter[int]]:
    counts: dict[int, Counter[int]] = {}
    for decision in sorted(plan.experts, key=lambda d: d.id):
        counts.setdefault(decision.layer, Counter())[decision.bits or 0] += 1
    return counts


def _stream_chart(profile: ExpertProfile, layers: Sequence[LayerComparison]) -> Chart:
    roles = _layer_roles(profile)
    figure = _lines(profile, layers, "largest |h|", {
        "source": [_short(layer.peak_source) for layer in layers],
        "result": [_short(layer.peak_result) for layer in layers],
    })  # fmt: skip
    figure["layout"]["yaxis"] |= {"type": "log", "exponentformat": "none", "dtick": 1}
    top = max(layers, key=lambda layer: layer.peak_source)
    kept = _share(top.peak_result, top.peak_source)
    summary = (
        f"In the source it is largest after layer {top.layer}, {number(top.peak_source)}; the "
    )
    summary += f"result has {percent(kept)} of that there."
    for role in ("forms", "cancels"):
        here = [str(layer) for layer, found in roles.items() if role in found]
        if here:
            summary += f" Layers where the source {role} massive activations: {', '.join(here)}."
    rows = tuple(
        (str(one.layer), roles.get(one.layer, ""), number(one.peak_source), number(one.peak_result),
         percent(_share(one.peak_result, one.peak_source)))
        for one in layers
    )  # fmt: skip
    head = ("Layer", "Massive activation", "Source", "Result", "Result / source")
    table = Table("Largest |h| after each layer", head, rows)
    return Chart("stream", "Largest value in the residual stream", summary, figure, table)


def _layer_roles(profile: ExpertProfile) -> dict[int, str]:
    names = {(True, False): "forms", (False, True): "cancels", (True, True): "forms and cancels"}
    return {one.layer: names.get((one.forming, one.cancelling), "") for one in profile.layers}


def _sink_chart(profile: ExpertProfile, layers: Sequence[LayerComparison]) -> Chart:
    figure = _lines(profile, layers, "attention to position 0", {
        "source": [_short(layer.sink_mass_source) for layer in layers],
        "result": [_short(layer.sink_mass_result) for layer in layers],
    })  # fmt: skip
    figure["layout"]["yaxis"] |= {"range": [0, 1], "tickformat": ".0%"}
    before = statistics.fmean(layer.sink_mass_source for layer in layers)
    after = statistics.fmean(layer.sink_mass_result for layer in layers)
    lost = max(layers, key=lambda layer: layer.sink_mass_source - layer.sink_mass_result)
    summary = (
        f"Mean over all heads and layers: {percent(before)} in the source, {percent(after)} in the "
        f"result. The largest drop is in layer {lost.layer}, from {percent(lost.sink_mass_source)} "
        f"to {percent(lost.sink_mass_result)}. Queries from position 8 on count."
    )
    rows = tuple(
        (str(one.layer), percent(one.sink_mass_source), percent(one.sink_mass_result))
        for one in layers
    )
    table = Table("Attention to position 0, mean over heads", ("Layer", "Source", "Result"), rows)
    return Chart("sinks", "Attention sink per layer", summary, figure, table)


def _head_chart(layers: Sequence[LayerComparison], side: Literal["source", "result"]) -> Chart:
    rows = [getattr(layer, f"sink_heads_{side}") for layer in layers]
    cells = [[_short(value) for value in row] for row in rows]
    trace = {
        "type": "heatmap",
        "y": [layer.layer for layer in layers],
        "z": cells,
        "coloraxis": "coloraxis",
        "hovertemplate": "layer %{y}, head %{x}<br>%{z:.1%}<extra></extra>",
    }
    layout = _layout(_heat_height(len(layers)))
    layout["meta"] = {"scale": ["scale-low", "scale-mid", "scale-high"]}
    layout["xaxis"] |= {"title": {"text": "head"}, "showgrid": False}
    layout["yaxis"] |= {"title": {"text": "layer"}, "showgrid": False, "autorange": "reversed"}
    bar = _colorbar("attention to position 0", [0, 0.5, 1], ["0 %", "50 %", "100 %"])
    layout["coloraxis"] = {"cmin": 0, "cmax": 1, "colorbar": bar}
    strong = sum(value > 0.3 for row in rows for value in row)
    total = sum(len(row) for row in rows)
    summary = f"{strong:,} of {total:,} heads pay more than 30 % of their attention to position 0."
    title = f"Attention sink per head, {side}"
    return Chart(f"heads-{side}", title, summary, {"data": [trace], "layout": layout})


def _hidden_chart(profile: ExpertProfile, layers: Sequence[LayerComparison]) -> Chart:
    figure = _lines(profile, layers, "relative distance", {
        "result": [_short(layer.hidden_error) for layer in layers],
    })  # fmt: skip
    figure["layout"]["yaxis"] |= {"rangemode": "tozero", "tickformat": "~%"}
    worst = max(layers, key=lambda layer: layer.hidden_error)
    summary = (
        f"How far the result's hidden states lie from the source's. Largest after layer "
        f"{worst.layer}, {percent(worst.hidden_error)}; {percent(layers[-1].hidden_error)} after the "
        f"last."
    )
    rows = tuple((str(one.layer), percent(one.hidden_error)) for one in layers)
    table = Table("Relative distance of the hidden states", ("Layer", "Error"), rows)
    return Chart("hidden", "Hidden-state error per layer", summary, figure, table)


def _router_chart(profile: ExpertProfile, validation: ValidationReport) -> Chart:
    layers = [one for one in validation.layers if one.router_agreement is not None]
    shares = [one.router_agreement or 0.0 for one in layers]
    figure = _lines(profile, layers, "same experts chosen", {"result": [_short(s) for s in shares]})
    figure["layout"]["yaxis"] |= {"range": [0, 1.02], "tickformat": ".0%"}
    worst = min(range(len(layers)), key=lambda i: shares[i])
    summary = (
        f"Share of the experts chosen per token by both models. Mean "
        f"{percent(statistics.fmean(shares))}, least in layer {layers[worst].layer}, "
        f"{percent(shares[worst])}."
    )
    rows = tuple((str(one.layer), percent(one.router_agreement)) for one in layers)
    table = Table("Experts chosen by both models", ("Layer", "Agreement"), rows)
    return Chart("routers", "Router agreement per layer", summary, figure, table)


# --------------------------------------------------------------------------------- chart building


def _layout(height: int) -> dict[str, Any]:
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 52, "r": 12, "t": 12, "b": 48},
        "font": {"size": 12},
        "showlegend": False,
        "xaxis": {"fixedrange": False},
        "yaxis": {"automargin": True},
    }


def _lines(
    profile: ExpertProfile,
    layers: Sequence[LayerComparison],
    quantity: str,
    series: Mapping[str, Sequence[float | None]],
) -> Figure:
    """One line per model over the layers, the source broad and behind; layers of super experts are
    marked by a dotted line."""
    widths = {"source": 6, "result": 2}
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if name == "result" else "lines",
            "name": name,
            "meta": name,
            "x": [layer.layer for layer in layers],
            "y": list(values),
            "opacity": 0.55 if name == "source" else 1,
            "line": {"width": widths[name]},
            "marker": {"size": 5},
            "hovertemplate": "%{y}",
        }
        for name, values in series.items()
    ]
    layout = _layout(300)
    layout["margin"]["t"] = 34
    layout["hovermode"] = "x unified"
    layout["showlegend"] = len(data) > 1
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    layout["xaxis"] |= {"title": {"text": "layer"}, "showgrid": False}
    layout["yaxis"] |= {"title": {"text": quantity}}
    layout["shapes"] = [
        {"type": "line", "name": "mark", "x0": layer, "x1": layer, "y0": 0, "y1": 1,
         "yref": "paper", "line": {"dash": "dot", "width": 1.5}, "layer": "below"}
        for layer in sorted({one.layer for one in profile.super_experts})
    ]  # fmt: skip
    return {"data": data, "layout": layout}


def _expert_heat(
    values: Mapping[ExpertId, float | None],
    hover: str,
    shown: Mapping[ExpertId, float | str | None],
    marked: Sequence[ExpertId],
) -> Figure:
    """Layers downwards, routed experts across, shared experts in a column of their own."""
    layers = sorted({identity.layer for identity in values})
    routed = [identity.expert for identity in values if isinstance(identity.expert, int)]
    shared = len(routed) < len(values)
    layout = _layout(_heat_height(len(layers)))
    layout["coloraxis"] = {}
    layout["yaxis"] |= {"title": {"text": "layer"}, "showgrid": False, "autorange": "reversed"}
    layout["xaxis"] |= {"title": {"text": "expert"}, "showgrid": False}
    columns: list[tuple[str, list[int | Literal["shared"]]]] = []
    if routed:
        columns.append(("x", list(range(max(routed) + 1))))
    if shared:
        layout["xaxis"]["domain"] = [0, 0.93]
        layout["xaxis2"] = {"domain": [0.945, 1], "showgrid": False, "tickangle": 0}
        columns.append(("x2", ["shared"]))
    data: list[dict[str, Any]] = []
    for axis, experts in columns:
        grid = [[ExpertId(layer, expert) for expert in experts] for layer in layers]
        data.append(
            {
                "type": "heatmap",
                "xaxis": axis,
                "x": experts,
                "y": layers,
                "z": [[_three(values.get(identity)) for identity in row] for row in grid],
                "customdata": [[shown.get(identity) for identity in row] for row in grid],
                "coloraxis": "coloraxis",
                "hovertemplate": "layer %{y}, expert %{x}<br>" + hover + "<extra></extra>",
            }
        )
        data += _markers(axis, [identity for identity in marked if identity.expert in experts])
    return {"data": data, "layout": layout}


def _markers(axis: str, marked: Sequence[ExpertId]) -> list[dict[str, Any]]:
    if not marked:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers+text",
            "xaxis": axis,
            "x": [identity.expert for identity in marked],
            "y": [identity.layer for identity in marked],
            "text": [str(identity) if axis == "x" else "" for identity in marked],
            "textposition": "top center",
            "textfont": {"size": 12},
            "meta": "mark",
            "marker": {"symbol": "circle-open", "size": 15, "line": {"width": 2.5}},
            "hoverinfo": "skip",
        }
    ]


def _heat_height(rows: int) -> int:
    return 130 + min(720, max(160, rows * 13))


def _colorbar(title: str, ticks: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    return {
        "orientation": "h",
        "thickness": 10,
        "outlinewidth": 0,
        "y": 1.01,
        "yanchor": "bottom",
        "len": 0.6,
        "x": 0,
        "xanchor": "left",
        "title": {"text": title, "side": "top"},
        "tickvals": list(ticks),
        "ticktext": list(labels),
    }


def _short(value: float) -> float | None:
    """Four significant digits: what a chart can show. JSON has no infinity and no NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _three(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _log10(value: float) -> float | None:
    return math.log10(value) if value > 0 and math.isfinite(value) else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# --------------------------------------------------------------------------------- the model card

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def render_model_card(
    recipe: Recipe,
    source_license: str | None,
    profile: ExpertProfile,
    plan: CompressionPlan,
    validation: ValidationReport,
) -> str:
    """README.md of the exported checkpoint, with front matter for the Hub."""
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(recipe, source_license, plan), sort_keys=False)}---",
        f"# {_plain_text(_short_name(recipe.output))}",
        _card_intro(recipe, source_license, profile, plan),
        "## Numbers\n\n" + _card_numbers(plan, validation),
        "## Checks\n\n" + _card_checks(profile, plan, validation),
        "## How to load it\n\n" + _how_to_load(recipe, plan),
        "## How it was made\n\n" + _card_provenance(recipe, profile, plan, validation),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(
    recipe: Recipe, source_license: str | None, plan: CompressionPlan
) -> dict[str, object]:
    quantized = any(decision.action == "quantize" for decision in plan.experts)
    tags = ["mixture-of-experts", "super-experts", "se-compress"]
    if quantized:
        tags += [plan.method, *(f"{bits}-bit" for bits in _quantized_widths(plan))]
    matter: dict[str, object] = {"base_model": _base_model(recipe.model)}
    if quantized:
        matter["base_model_relation"] = "quantized"
    return matter | {
        "license": (source_license or "unknown").lower(),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def _quantized_widths(plan: CompressionPlan) -> list[int]:
    return sorted({d.bits for d in plan.experts if d.action == "quantize" and d.bits is not None})


def _base_model(model: str) -> str:
    """The Hub's id without its revision; of a local directory the name only, not where it lies."""
    match = _HUB_ID.fullmatch(model)
    return match["id"] if match and not Path(model).exists() else _short_name(model)


def _short_name(path: str) -> str:
    return Path(path).name or path


def _plain_text(text: str) -> str:
    """Text that Markdown and HTML leave alone."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", str(escape(" ".join(text.split()))))


def _card_intro(
    recipe: Recipe, source_license: str | None, profile: ExpertProfile, plan: CompressionPlan
) -> str:
    name = _plain_text(_base_model(recipe.model))
    text = f"A compressed copy of {name}, made by se-compress. "
    text += _plain_text(_fate_of_super_experts(profile, plan))
    if Path(recipe.model).exists() or not _HUB_ID.fullmatch(recipe.model):
        text += (
            "\n\nThe source was a local directory: before an upload, replace `base_model` above by "
            "its id on the Hub."
        )
    if source_license is None:
        text += "\n\nThe source names no licence; ask its authors before you pass this copy on."
    return text


def _card_numbers(plan: CompressionPlan, validation: ValidationReport) -> str:
    rows = [
        "| | Source | This checkpoint |",
        "|---|---|---|",
        *(f"| {label} | {size(before)} | {size(after)}{_of_source(after, before)} |"
          for label, before, after in _sizes(validation)),
        f"| Bits per expert weight | | {number(plan.bits_per_weight)} |",
        f"| Perplexity, {validation.tokens:,} held-out tokens "
        f"| {number(validation.perplexity_source)} | {number(validation.perplexity_result)} |",
    ]  # fmt: skip
    return "\n".join(rows)


def _of_source(after: int, before: int) -> str:
    return f" ({percent(after / before)})" if before else ""


def _card_checks(
    profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> str:
    gates = describe_gates(validation)
    verdict = judge(gates, profile, plan, validation)
    rows = [f"**{verdict.word}.** {_plain_text(' '.join(verdict.sentences[:-1]))}", ""]
    rows += ["| Check | Measured | Limit | Outcome |", "|---|---|---|---|"]
    for gate in gates:
        limit = "" if gate.limit is None else f"{gate.bound} {gate.limit_text}".strip()
        value = "" if gate.value is None else gate.value_text
        detail = f" ({_plain_text(gate.detail)})" if gate.detail else ""
        rows.append(f"| {_plain_text(gate.title)} | {value} | {limit} | {gate.word}{detail} |")
    return "\n".join(rows)


def _how_to_load(recipe: Recipe, plan: CompressionPlan) -> str:
    path = repr(recipe.output)
    if plan.target == "transformers":
        return _code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained({path}, dtype="auto")',
            f"tokenizer = AutoTokenizer.from_pretrained({path})",
        )
    return _code(
        "from gptqmodel import GPTQModel",
        "from transformers import AutoTokenizer",
        f"model = GPTQModel.load({path})",
        f"tokenizer = AutoTokenizer.from_pretrained({path})",
    ) + (
        "\n\nUse `GPTQModel.load` and nothing else. A plain `AutoModelForCausalLM.from_pretrained` "
        "does not read GPTQ experts: it starts them at random, and the model talks nonsense. vLLM "
        "and SGLang do not load experts of different widths within one layer, which this "
        "checkpoint may have."
    )


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _card_provenance(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> str:
    facts = [fact for fact in _facts(recipe, profile, plan, validation) if fact[0] != "Source"]
    lines = [f"- {name}: {_plain_text(value)}" for name, value in facts]
    notes = [f"- Note: {_plain_text(note)}" for note in (*profile.notes, *plan.notes)]
    files = (
        "\n\n`se_compress/` holds the recipe, the profile, the plan, the validation, and "
        "`report.html`, which shows them all on one page."
    )
    return "\n".join(lines + notes) + files
