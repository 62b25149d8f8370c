"""What one layer shows while the calibration tokens run through it.

B sequences of a batch, T positions, H channels, n tokens and I neurons of one expert. Measures are
taken in float32, sums over tokens in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from se_compress.artifacts import ExpertId, ExpertIndex, ExpertStats, LayerStats, ModelSource
from se_compress.model.measures import is_massive, overflows, sink_rate
from se_compress.model.observers import RoutingCapture, SinkCapture
from se_compress.profiling.losses import Losses


@dataclass
class _Peak:
    """What one expert's outputs have shown so far.

    value                        greatest |output|, before the routing weight
    weighted                     greatest |output| x routing weight
    channel, position, token_id  where `value` stands; -1 before any token
    tokens                       tokens routed to the expert
    weight_sum                   sum of their routing weights
    norm_sum                     sum of the L2 norms of their outputs
    saliency_sum                 sum of routing weight x norm
    halves                       `value` in sequences of even and of odd index
    overflown                    input of its down_proj [n, I] where it overflowed first
    """

    value: float = 0.0
    weighted: float = 0.0
    channel: int = -1
    position: int = -1
    token_id: int = -1
    tokens: int = 0
    weight_sum: float = 0.0
    norm_sum: float = 0.0
    saliency_sum: float = 0.0
    halves: list[float] = field(default_factory=lambda: [0.0, 0.0])
    overflown: Tensor | None = None


class Watch(RoutingCapture, SinkCapture):
    """Observes one layer over all batches: experts, dense MLP, attention to the sink.

    batches     token ids of each batch, int64 [B, T]
    by_expert   expert -> what it did; only experts that got a token
    dense_peak  greatest |output| of a dense layer's down_proj; None in a MoE layer
    """

    wants_inner = True

    def __init__(self, batches: Sequence[Tensor]) -> None:
        super().__init__()
        self.batches = batches
        self.first_sequences = list(accumulate(map(len, batches), initial=0))
        self.by_expert: dict[ExpertIndex, _Peak] = {}
        self.dense_peak: float | None = None

    def expert(
        self, expert: ExpertIndex, rows: Tensor, inner: Tensor, output: Tensor, weights: Tensor
    ) -> None:
        peak = self.by_expert.setdefault(expert, _Peak())
        if peak.overflown is None and overflows(inner):
            peak.overflown = inner
        size = output.float().abs()  # [n, H]; what follows has a number per token, [n]
        strength, norms = size.amax(dim=1), output.float().norm(dim=1)
        at = int(strength.argmax())
        if float(strength[at]) > peak.value:
            token_ids = self.batches[self.batch]
            row = int(rows[at])  # of the batch: sequence * T + position
            peak.value, peak.channel = float(strength[at]), int(size[at].argmax())
            peak.position = row % token_ids.shape[1]
            peak.token_id = int(token_ids.reshape(-1)[row])
        self._note_halves(peak, rows, strength)
        peak.weighted = max(peak.weighted, float((strength * weights.float()).max()))
        peak.tokens += len(rows)
        peak.weight_sum += float(weights.sum(dtype=torch.float64))
        peak.norm_sum += float(norms.sum(dtype=torch.float64))
        peak.saliency_sum += float((norms * weights.float()).sum(dtype=torch.float64))

    def _note_halves(self, peak: _Peak, rows: Tensor, strength: Tensor) -> None:
        """Rows of a batch, int64 [n], with their greatest |output|, [n], by half of the text."""
        sequences = self.first_sequences[self.batch] + rows // self.batches[self.batch].shape[1]
        odd = (sequences % 2).to(strength.dtype)
        for half, member in enumerate((1 - odd, odd)):
            peak.halves[half] = max(peak.halves[half], float((strength * member).max()))

    def dense(self, inner: Tensor, output: Tensor) -> None:
        self.dense_peak = max(self.dense_peak or 0.0, float(output.float().abs().max()))

    def stats(self, identity: ExpertId, total: int, loss: Losses) -> ExpertStats:
        """The statistics of one expert; zeros and -1 if it got no token.

        total  number of tokens of all batches
        loss   what rounding would cost it, see `losses.rounding_losses`
        """
        peak = self.by_expert.get(identity.expert, _Peak())
        tokens = max(peak.tokens, 1)
        return ExpertStats(
            layer=identity.layer,
            expert=identity.expert,
            peak=peak.value,
            weighted_peak=peak.weighted,
            channel=peak.channel,
            position=peak.position,
            token_id=peak.token_id,
            tokens=peak.tokens,
            gate_mass=peak.weight_sum / total,
            mean_output_norm=peak.norm_sum / tokens,
            saliency=peak.saliency_sum / tokens,
            loss_gate_up=loss.get("gate_up", {}),
            loss_down=loss.get("down", {}),
            half_peaks=tuple(peak.halves) if self.first_sequences[-1] > 1 else (),
        )


def layer_stats(
    source: ModelSource,
    layer: int,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    watch: Watch,
    batches: Sequence[Tensor],
) -> LayerStats:
    """The residual stream after a layer, and its sinks; `forming`, `cancelling` are not known yet.

    before, after  hidden states [B, T, H] of each batch
    watch          what the run from one to the other has shown
    batches        token ids of each batch, int64 [B, T]
    """
    peak, place = 0.0, (0, 0, 0, 0)  # batch, sequence, position, channel
    rise = fall = 0.0
    medians: list[float] = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        size = new.float().abs()
        # Of sizes, element by element: positive where |h| grows, whatever the sign of h.
        change = size - old.float().abs()
        rise, fall = max(rise, float(change.max())), max(fall, float(-change.min()))
        medians += size.flatten(1).median(dim=1).values.tolist()
        if float(size.max()) > peak:
            peak = float(size.max())
            at = torch.unravel_index(size.argmax(), size.shape)
            place = (index, int(at[0]), int(at[1]), int(at[2]))
    index, sequence, position, channel = place
    median = sum(medians) / len(medians)
    return LayerStats(
        layer=layer,
        moe=layer in source.moe_layers,
        peak=peak,
        position=position,
        channel=channel,
        token_id=int(batches[index][sequence, position]),
        median=median,
        rise=rise,
        fall=fall,
        massive=is_massive(peak, median),
        forming=False,
        cancelling=False,
        mlp_peak=watch.dense_peak,
        sink_mass=tuple(watch.sink_mass.tolist()),
        # An absolute threshold means nothing where learned sinks take part of all attention.
        sink_rate=None
        if watch.received is None or watch.learned_sinks
        else float(sink_rate(watch.received)[0]),
    )


def sink_notes(layers: Sequence[LayerStats]) -> tuple[str, ...]:
    """What a reader has to know of the attention sinks of layers that are not like most."""
    without = [stats.layer for stats in layers if not stats.sink_mass]
    learned = [stats.layer for stats in layers if stats.sink_mass and stats.sink_rate is None]
    notes: list[str] = []
    if without:
        notes.append(
            f"{_named(without)} no softmax attention, and no attention sinks: {len(without)} of "
            f"{len(layers)}"
        )
    if learned:
        notes.append(
            f"{_named(learned)} learned sinks beside the keys: attention to a token is compared "
            "with the source's, and no absolute threshold holds for it"
        )
    return tuple(notes)


def _named(layers: Sequence[int]) -> str:
    named = ", ".join(map(str, layers))
    return f"layer {named} has" if len(layers) == 1 else f"layers {named} have"
