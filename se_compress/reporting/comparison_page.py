"""The page from which a newcomer decides which checkpoint to ship.

Everything on it comes from one `Comparison`; the words are in the template, but for the advice.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from se_compress.artifacts import DISTANCE, GATES, Comparison, ExpertId
from se_compress.reporting.comparison_charts import curve_figure, curves_of, trade_figure
from se_compress.reporting.comparison_rows import Row
from se_compress.reporting.draws import draws_of
from se_compress.reporting.page import (
    WORDS,
    CheckInWords,
    Figure,
    State,
    Verdict,
    count,
    number,
    percent,
    size,
    template,
)

# What is called the published pattern: the least ratio without super experts is 1.56, the largest
# without random experts 1.01.
HARMED, UNHARMED = 1.5, 1.05


class Published(NamedTuple):
    """Perplexity on WikiText-2 after removing super experts or, mean of five draws, as many random
    experts of the same layers, or of any (arXiv:2507.23279v3, section 4)."""

    model: str
    source: float
    without_super_experts: float
    without_random: float
    without_any: float

    @property
    def ratio(self) -> float:
        return self.without_super_experts / self.source


PUBLISHED = (
    Published("Qwen3-30B-A3B", 8.70, 59.86, 8.70, 8.71),
    Published("DeepSeek-V2-Lite", 6.31, 10.75, 6.32, 6.31),
    Published("Mixtral-8x7B", 3.84, 6.23, 3.85, 3.86),
    Published("DeepSeek-R1", 3.33, 5.18, 3.36, 3.35),
)


@dataclass(frozen=True)
class Zeroing:
    """A variant in which the output of some experts was set to zero and nothing else was done.

    super_experts   how many of them are super experts
    ratio           perplexity, result / source
    """

    row: Row
    zeroed: tuple[ExpertId, ...]
    super_experts: int
    ratio: float


def render_comparison(comparison: Comparison) -> str:
    """comparison.html: one file that needs nothing beside it; links lead to the single reports."""
    rows = [
        Row(variant, variant.checkpoint.size_bytes / comparison.size_bytes)
        for variant in comparison.variants
    ]
    curves = curves_of(comparison)
    ablations = _zeroings(comparison, rows)
    return template("comparison.html.j2").render(
        comparison=comparison,
        rows=rows,
        advice=advise(comparison, rows),
        failures=[(row, gate) for row in rows for gate in row.failed],
        cautions=cautions_of(comparison),
        ablations=ablations,
        pattern=_pattern(ablations),
        draws=(draws := draws_of(comparison.variants)),
        draws_heads=[f"{one.name}, {count(one.count, 'draw')}" for one in draws],
        published=PUBLISHED,
        curves=curves,
        gates=[gate for gate in GATES.values() if gate.explained],
        figures=_trade(rows) | {c.key: curve_figure(c) for c in curves},
        plotly_js=Markup(get_plotlyjs()),
    )


def _trade(rows: Sequence[Row]) -> dict[str, Figure]:
    """The chart of size against distance; none if nothing could have been shipped."""
    return {"trade": trade_figure(rows)} if any(not row.variant.zeroed for row in rows) else {}


def advise(comparison: Comparison, rows: Sequence[Row]) -> Verdict:
    """Which checkpoint to ship and why, for a reader who knows none of the words."""
    rejected = [row for row in rows if row.failed and not row.variant.zeroed]
    by_name = {row.name: row for row in rows}
    if comparison.recommended is None and comparison.published:
        return Verdict(
            state := _state(comparison),
            WORDS[state][0],
            "Nothing here is to ship",
            (
                f"What passed its gates ({count(len(comparison.published), 'variant')} of "
                f"{len(rows)}) has experts set to zero, which is done to learn from it.",
                *_lacking(comparison),
                *map(_blame, rejected),
            ),
        )
    if comparison.recommended is None:
        return Verdict(
            "failed",
            WORDS["failed"][0],
            "Ship none of them",
            ("Every variant missed a gate of its recipe.", *map(_blame, rejected)),
        )
    best = by_name[comparison.recommended]
    sentences = [_praise(best, rows), *_limits(best, rows)]
    nearest = by_name[comparison.closest or best.name]
    if nearest is not best and nearest.share < 1:
        sentences.append(_alternative(nearest))
    sentences += _lacking(comparison)
    if best.not_run:
        sentences.append(f"Not run for {best.name}: {', '.join(best.not_run).lower()}.")
    if best.no_limit:
        sentences.append(f"Without a limit for {best.name}: {', '.join(best.no_limit).lower()}.")
    sentences += map(_blame, rejected)
    state = _state(comparison)
    return Verdict(state, WORDS[state][0], f"Ship {best.name}", tuple(sentences))


def _state(comparison: Comparison) -> State:
    return "passed" if comparison.passed else "failed"


def _lacking(comparison: Comparison) -> Iterator[str]:
    """What the recipe requires to pass, and did not."""
    missing = [name for name in comparison.required if name not in comparison.published]
    if missing:
        yield f"The recipe requires {', '.join(missing)} to pass, which did not."


def cautions_of(comparison: Comparison) -> list[tuple[str, str]]:
    """Each caution with the variants that it is for, by name; one that is for all is told once."""
    names: dict[str, list[str]] = {}
    for variant in comparison.variants:
        for caution in variant.cautions:
            names.setdefault(caution, []).append(variant.checkpoint.name)
    everything = len(comparison.variants)
    return [
        ("all variants" if len(some) == everything > 1 else ", ".join(some), caution)
        for caution, some in names.items()
    ]


def _limits(best: Row, rows: Sequence[Row]) -> Iterator[str]:
    """What is to be said where a variant has looser limits than another."""
    if best.missed(rows):
        yield (
            f"{best.name} passed by looser limits than a result at least as good was held to, in "
            f"{_titles(best.missed(rows))}; no other passed by stricter ones."
        )
        return
    for row in rows:
        if row.shippable and row.missed(rows):
            yield (
                f"{row.name} passed by looser limits only: a result at least as good is held to a "
                f"stricter one in {_titles(row.missed(rows))}."
            )


def _titles(names: Sequence[str]) -> str:
    return ", ".join(GATES[name].title for name in names).lower()


def _praise(row: Row, rows: Sequence[Row]) -> str:
    one = row.checkpoint
    published = [r for r in rows if r.shippable and (row.missed(rows) or not r.missed(rows))]
    smaller = [other.name for other in published if other.share < row.share]
    why = "the only one that" if len(published) == 1 else "the smallest that"
    sentences = [
        f"It is {why} passed every gate: {size(one.size_bytes)}, {percent(row.share)} of the "
        f"source, {_distance_text(row)}."
    ]
    if one.super_experts:
        whole = one.kept == one.super_experts
        kept = (
            "No super expert was" if whole else f"{one.super_experts - one.kept} super experts were"
        )
        sentences.append(f"{kept} lost.")
    if smaller:
        verb = "is" if len(smaller) == 1 else "are"
        sentences.append(
            f"{', '.join(smaller)} {verb} hardly smaller, but farther from the source."
        )
    return " ".join(sentences)


def _distance_text(row: Row) -> str:
    gate = row.gates.get(DISTANCE)
    perplexity = (
        f"perplexity {number(row.checkpoint.perplexity_source)} → "
        f"{number(row.checkpoint.perplexity_result)}"
    )
    return perplexity + (f", KL divergence {gate.value_text} nats" if gate else "")


def _alternative(row: Row) -> str:
    return (
        f"If you can afford {size(row.checkpoint.size_bytes)}, {row.name} is nearest to the "
        f"source: {_distance_text(row)}."
    )


def _blame(row: Row) -> str:
    """Why a variant was rejected: the mechanism if that is lost, and the gate missed by most."""
    lost = row.checkpoint.super_experts - row.checkpoint.kept
    because = f"it lost {count(lost, 'super expert')}; " if lost else ""
    worst = max(row.failed, key=_excess)
    reason = f"{because}{worst.title.lower()} is {worst.value_text}"
    if worst.limit is not None:
        reason += f", {worst.side} {worst.limit_text} would do"
    return f"Do not ship {row.name}: {reason}."


def _excess(gate: CheckInWords) -> float:
    """How many times a gate was missed, whichever side of the limit is the good one."""
    value, limit = gate.value, gate.limit
    if value is None or limit is None:
        return 0.0
    better, worse = (value, limit) if gate.side == "at least" else (limit, value)
    return worse / better if better > 0 else math.inf


# --------------------------------------------------------------------------- the paper's experiment


def _zeroings(comparison: Comparison, rows: Sequence[Row]) -> list[Zeroing]:
    supers = set(comparison.super_experts)
    return [
        Zeroing(
            row=row,
            zeroed=row.variant.zeroed,
            super_experts=len(supers.intersection(row.variant.zeroed)),
            ratio=row.checkpoint.perplexity_result / row.checkpoint.perplexity_source,
        )
        for row in rows
        if row.variant.zeroed and not row.variant.removed
        if row.checkpoint.perplexity_result and row.checkpoint.perplexity_source
    ]


def _pattern(zeroings: Sequence[Zeroing]) -> str:
    """What the experiment shows here, against what was published."""
    with_super = [one.ratio for one in zeroings if one.super_experts]
    random = [one.ratio for one in zeroings if not one.super_experts]
    if not with_super or not random:
        return "The experiment needs both, super experts and random experts set to zero."
    draws = number(random[0], 1.0)
    if len(random) > 1:
        least, most = number(min(random), 1.0), number(max(random), 1.0)
        draws = f"{least} to {most} in {len(random)} draws"
    seen = (
        f"Without its super experts the perplexity of the model is {number(min(with_super))} times "
        f"the source's; without as many random experts {draws}."
    )
    as_published = min(with_super) >= HARMED and max(random) <= UNHARMED
    return seen + (
        " That is the published pattern: super experts decide, others of their layers hardly count."
        if as_published
        else " That is not the published pattern, in which only the super experts count."
    )
