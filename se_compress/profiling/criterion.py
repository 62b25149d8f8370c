"""Which experts the published criterion proposes as super experts.

The criterion (arXiv:2507.23279, eq. 6): an expert is a super expert if its peak |down_proj
output| exceeds both the 99.5th percentile of all experts' peaks and a tenth of the greatest, and
its layer is one of those that form the massive activations. Three things are stricter here than in
the published code:

* the peak is taken over all tokens and all experts of all layers, before the routing weight;
* the forming layers are measured (see `forming_layers`), not the first 75 %;
* if the model has no massive activation, it has no super expert, however uneven the peaks are.

The criterion is relative and only proposes; `confirm` asks for the cause.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from se_compress.artifacts import (
    ExpertId,
    ExpertStats,
    LayerStats,
    OutlierExpert,
    OutlierReason,
    SuperExpert,
)
from se_compress.model.measures import MASSIVE_PEAK, MASSIVE_RATIO
from se_compress.recipe import SuperExperts

# A layer forms massive activations if it adds at least this share of the largest addition of any
# layer. Half of the criterion's own tenth, as the residual sees an expert only after its routing
# weight.
FORMING_SHARE = 0.05
CANCELLING_SHARE = 0.25


@dataclass(frozen=True)
class Proposal:
    """What the criterion finds in a model.

    super_experts     over both thresholds, in a layer that forms massive activations
    outliers          over both thresholds in another layer
    percentile_value  threshold of the first clause of eq. 6, the percentile of all peaks
    fraction_value    threshold of the second clause, a fraction of the greatest peak
    notes             why there is no super expert where one might look for it
    """

    super_experts: tuple[SuperExpert, ...]
    outliers: tuple[OutlierExpert, ...]
    percentile_value: float
    fraction_value: float
    notes: tuple[str, ...] = ()


def forming_layers(layers: Sequence[LayerStats]) -> frozenset[int]:
    """Layers that form massive activations.

    After such a layer the residual stream is massive (Sun et al.), and the layer adds to some |h|
    at least FORMING_SHARE of what any layer adds. What counts is the change of an element, not of
    the maximum. So super experts that build one activation up over several layers, or on several
    channels, are all found. A layer that only carries it is none, nor one that takes away more than
    it adds: what cancels 16,000 on one channel of the reference model adds 1,450 on another.
    """
    greatest = max((layer.rise for layer in layers if layer.massive), default=0.0)
    return frozenset(
        layer.layer
        for layer in layers
        if layer.massive and layer.rise >= max(FORMING_SHARE * greatest, layer.fall)
    )


def cancelling_layers(layers: Sequence[LayerStats]) -> frozenset[int]:
    """Layers that take away at least CANCELLING_SHARE of the massive activation before them."""
    return frozenset(
        layer.layer
        for before, layer in pairwise(layers)
        if before.massive and layer.fall >= CANCELLING_SHARE * before.peak
    )


def percentile(values: Iterable[float], percent: float) -> float:
    """The `percent`-th percentile: order statistics, interpolated linearly.

    As numpy.percentile by default. `values` must not be empty.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def over_thresholds(
    peaks: Mapping[ExpertId, float], percent: float, fraction: float
) -> tuple[list[ExpertId], float, float]:
    """Experts whose peak exceeds both clauses of eq. 6, and the values of the two clauses.

    peaks     every expert of the model -> its peak; 0 for one that was never routed to, as leaving
              some out would shift the percentile
    percent   first clause: above this percentile of the peaks
    fraction  second clause: above this fraction of the greatest peak
    """
    by_percentile = percentile(peaks.values(), percent)
    by_fraction = fraction * max(peaks.values())
    chosen = [e for e, peak in peaks.items() if peak > by_percentile and peak > by_fraction]
    return sorted(chosen), by_percentile, by_fraction


def select_super_experts(
    peaks: Mapping[ExpertId, float],
    forming: Collection[int],
    percent: float = 99.5,
    fraction: float = 0.1,
) -> list[ExpertId]:
    """The criterion as published: over both thresholds, in a layer of `forming`.

    The other arguments are those of `over_thresholds`.
    """
    chosen, _, _ = over_thresholds(peaks, percent, fraction)
    return [identity for identity in chosen if identity.layer in forming]


def mark_layers(layers: Sequence[LayerStats]) -> tuple[LayerStats, ...]:
    """All layers of a model, with `forming` and `cancelling` as they are in its company."""
    forming, cancelling = forming_layers(layers), cancelling_layers(layers)
    return tuple(
        replace(s, forming=s.layer in forming, cancelling=s.layer in cancelling) for s in layers
    )


def propose(
    layers: Sequence[LayerStats], experts: Sequence[ExpertStats], criterion: SuperExperts
) -> Proposal:
    """What the criterion, with the thresholds of `criterion`, finds in layers that are marked.

    layers   all layers of the model, see `mark_layers`
    experts  all experts of the model
    """
    stats = {expert.id: expert for expert in experts}
    peaks = {identity: expert.peak for identity, expert in stats.items()}
    chosen, by_percentile, by_fraction = over_thresholds(
        peaks, criterion.percentile, criterion.fraction_of_max
    )
    marks = {layer.layer: layer for layer in layers}
    supers, outliers = [], []
    for identity in chosen:
        e, layer = stats[identity], marks[identity.layer]
        if layer.forming:
            supers.append(SuperExpert(e.layer, e.expert, e.peak, e.channel, e.position, e.token_id))
            continue
        outliers.append(
            OutlierExpert(e.layer, e.expert, e.peak, e.channel, e.position, _why_not(layer, layers))
        )
    notes = _notes(layers, {e.layer for e in supers})
    return Proposal(tuple(supers), tuple(outliers), by_percentile, by_fraction, notes)


def _why_not(layer: LayerStats, layers: Sequence[LayerStats]) -> OutlierReason:
    """Why an expert over both thresholds in `layer` is no super expert."""
    if not any(other.massive for other in layers):
        return "model has none"
    return "cancels" if layer.cancelling else "layer forms no massive activation"


def _notes(layers: Sequence[LayerStats], with_super_experts: set[int]) -> tuple[str, ...]:
    """Told to the user: no massive activation at all, or forming layers without a super expert."""
    if not any(layer.massive for layer in layers):
        ratios = {layer: layer.peak / max(layer.median, 1e-12) for layer in layers}
        best = max(layers, key=lambda layer: ratios[layer])
        return (
            f"no massive activation: the residual peaks at {best.peak:.1f} after layer "
            f"{best.layer}, {ratios[best]:.0f} times the median, and more than "
            f"{MASSIVE_PEAK:.0f} and {MASSIVE_RATIO:.0f} medians are needed; "
            "so there is no super expert",
        )
    notes = []
    for layer in layers:
        if layer.forming and layer.layer not in with_super_experts:
            by = (
                "no one expert: undecided"
                if layer.moe
                else f"its dense MLP (peak {layer.mlp_peak:.1f}): no super expert there"
            )
            notes.append(
                f"layer {layer.layer} forms massive activations (adds {layer.rise:.1f}), by {by}"
            )
    return tuple(notes)
