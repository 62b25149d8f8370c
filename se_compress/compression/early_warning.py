"""The first sign that a result is broken, seen while it is being made.

After each layer the executor has a few sequences of two streams: the hidden states of the source
and those of the compressed model. Where the massive activation or the attention sinks of the source
are gone from the second, no later layer brings them back, and hours of further work are saved.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_compress.artifacts import Check, ExpertId, ExpertIndex
from se_compress.model.measures import (
    COMMON_SHARE,
    massive_elements,
    massive_places,
    overflows,
    sink_decay,
)
from se_compress.model.observers import Observer
from se_compress.model.states import States, hidden_of
from se_compress.model.streaming import StreamedModel
from se_compress.recipe import Validation

# Sinks vary from layer to layer; they have collapsed if a layer has lost this share of theirs.
SINK_COLLAPSE = 0.5


@dataclass(frozen=True)
class Side:
    """One of the two models, around a layer.

    model           gives it
    before, after   its states of the same few sequences
    sinks           the layer's sink mass [heads]
    source_expert   an expert's index in the source
    """

    model: Callable[[], StreamedModel]
    before: Sequence[States]
    after: Sequence[States]
    sinks: Tensor
    source_expert: Callable[[ExpertIndex], ExpertIndex] = lambda expert: expert


def early_warning(layer: int, source: Side, result: Side, limits: Validation) -> Check | None:
    """The gate that the result fails already, after `layer`; None if all is well.

    A massive activation that most sequences share has to keep to its gate: it is what one chain of
    super experts has written. Sinks have to keep 1 - SINK_COLLAPSE of their mass.
    """
    old, new = hidden_of(source.after), hidden_of(result.after)
    places = massive_places(old)
    limit = limits.limit("massive_activation_ratio")
    where = f"after layer {layer} on calibration text"
    for element in massive_elements(old, new, places):
        if element.share >= COMMON_SHARE and not element.retention >= limit:
            position = f"position {element.position}, " if element.position >= 0 else ""
            at = [found[found[:, 2] == element.channel, :2] for found in places]
            culprit = _culprit(layer, source, result, at, element.channel)
            detail = f"{where}, {position}channel {element.channel}; {culprit}"
            return Check("massive_activation_ratio", element.retention, limit, False, detail)
    decay = sink_decay(zip(source.sinks.tolist(), result.sinks.tolist(), strict=True))
    collapse = max(SINK_COLLAPSE, limits.limit("sink_decay"))
    if decay is not None and not decay <= collapse:
        return Check("sink_decay", decay, collapse, False, where)
    return None


def overflow_warning(layer: int, result: Sequence[Tensor], limits: Validation) -> Check | None:
    """The same for hidden states of the result [B, T, H] that are no numbers any more, while those
    of the source are. No later layer can be calibrated on them, so nothing turns this one off."""
    if not any(overflows(batch) for batch in result):
        return None
    detail = f"activations of the result overflow after layer {layer} on calibration text"
    return Check("kl_divergence", math.nan, limits.limit("kl_divergence"), False, detail)


class _Writes(Observer):
    """What each expert adds to one channel of some tokens, given by sequence and position [n, 2]
    for each batch; mean over the tokens."""

    wants_inner = True

    def __init__(self, tokens: Sequence[Tensor], length: int, channel: int) -> None:
        super().__init__()
        self.rows = [at[:, 0] * length + at[:, 1] for at in tokens]
        self.channel = channel

    def expert(
        self, expert: ExpertIndex, rows: Tensor, inner: Tensor, output: Tensor, weights: Tensor
    ) -> None:
        here = torch.isin(rows, self.rows[self.batch].to(rows.device))
        added = float((output[here, self.channel].float() * weights[here].float()).sum())
        count = sum(len(rows) for rows in self.rows)
        self.by_expert[expert] = self.by_expert.get(expert, 0.0) + added / count


def _written(
    layer: int, side: Side, tokens: Sequence[Tensor], channel: int
) -> dict[ExpertIndex, float]:
    watch = _Writes(tokens, side.before[0].length, channel)
    model = side.model()
    model.run_layer(layer, model.load_layer(layer), side.before, watch)
    return {side.source_expert(expert): value for expert, value in watch.by_expert.items()}


def _culprit(layer: int, source: Side, result: Side, tokens: Sequence[Tensor], channel: int) -> str:
    """The expert whose contribution to `channel` has changed most, if that is most of the change of
    all experts."""
    before, after = (_written(layer, side, tokens, channel) for side in (source, result))
    changes = {e: abs(after.get(e, 0.0) - before.get(e, 0.0)) for e in before.keys() | after.keys()}
    most = max(changes, key=lambda e: changes[e], default=None)
    if most is None or changes[most] < 0.5 * sum(changes.values()):
        return f"no one expert of layer {layer} did it"
    return (
        f"expert {ExpertId(layer, most)} wrote {before.get(most, 0.0):.1f} there, "
        f"and now {after.get(most, 0.0):.1f}"
    )
