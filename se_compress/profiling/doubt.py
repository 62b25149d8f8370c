"""Where the criterion cannot decide, and what its choice hangs on.

A layer without a super expert is clean only if the statistics could have shown one. The choice is
worth more if other thresholds and other text would have made it too.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from se_compress.artifacts import (
    Choice,
    ExpertId,
    ExpertStats,
    LayerStats,
    Stability,
    UndecidedLayer,
)
from se_compress.profiling.criterion import Proposal, select_super_experts
from se_compress.recipe import SuperExperts

# Those of table 9 of arXiv:2507.23279.
PERCENTILES = (95.0, 99.0, 99.5, 99.9)
FRACTIONS = (0.10, 0.09, 0.08, 0.07)
LISTED = 8  # layers that a note names


def undecided_layers(
    layers: Sequence[LayerStats], experts: Sequence[ExpertStats], found: Proposal
) -> tuple[UndecidedLayer, ...]:
    """The layers of which neither can be said, in order; a layer has one entry for each reason.

    layers   all layers of the model, marked
    found    what the criterion proposes in them
    """
    members: dict[int, list[ExpertStats]] = {}
    for stats in experts:
        members.setdefault(stats.layer, []).append(stats)
    return tuple(
        doubt
        for layer in layers
        if layer.moe
        for doubt in _doubts(layer, members[layer.layer], found)
    )


def _doubts(
    layer: LayerStats, members: Sequence[ExpertStats], found: Proposal
) -> Iterator[UndecidedLayer]:
    chosen = {expert.id for expert in found.super_experts}
    strong = [e for e in members if e.peak > found.fraction_value]
    held = tuple(e.expert for e in strong if layer.forming and e.id not in chosen)
    silent = tuple(e.expert for e in members if not e.tokens)
    if layer.forming and not strong:
        yield UndecidedLayer(layer.layer, "no one expert")
    if held:
        yield UndecidedLayer(layer.layer, "percentile", held)
    if silent:
        yield UndecidedLayer(layer.layer, "no token", silent)


def undecided_notes(undecided: Sequence[UndecidedLayer]) -> tuple[str, ...]:
    """A note for each reason but the first, which the criterion tells itself."""
    held = [one for one in undecided if one.reason == "percentile"]
    silent = [one for one in undecided if one.reason == "no token"]
    notes = [
        f"layer {one.layer} is undecided: expert {', '.join(map(str, one.experts))} is over the "
        "share of the greatest peak, and only the percentile holds it back; a lower "
        "super_experts.percentile would take it"
        for one in held
    ]
    if silent:
        count = sum(len(one.experts) for one in silent)
        names = [str(one.layer) for one in silent]
        named = ", ".join(names[:LISTED])
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        notes.append(
            f"{count} experts got no calibration token, so whether they are super experts is "
            f"undecided: layers {named}{more}; more samples or other text would tell"
        )
    return tuple(notes)


def stability_of(
    layers: Sequence[LayerStats], experts: Sequence[ExpertStats], criterion: SuperExperts
) -> Stability:
    """What other thresholds, and each half of the text, would have chosen in the forming layers."""
    forming = {layer.layer for layer in layers if layer.forming}
    peaks = {stats.id: stats.peak for stats in experts}
    choices = (
        Choice(percent, fraction, _chosen(peaks, forming, percent, fraction))
        for percent in PERCENTILES
        for fraction in FRACTIONS
    )
    halves: tuple[tuple[ExpertId, ...], ...] = ()
    if any(stats.half_peaks for stats in experts):
        by_half = ({e.id: e.half_peaks[half] for e in experts} for half in (0, 1))
        own = criterion.percentile, criterion.fraction_of_max
        halves = tuple(_chosen(half, forming, *own) for half in by_half)
    return Stability(tuple(choices), halves)


def _chosen(
    peaks: Mapping[ExpertId, float], forming: Collection[int], percent: float, fraction: float
) -> tuple[ExpertId, ...]:
    return tuple(select_super_experts(peaks, forming, percent, fraction))
