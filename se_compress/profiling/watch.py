"""What one layer shows while the calibration tokens run through it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_compress.artifacts import (
    ExpertId,
    ExpertIndex,
    ExpertStats,
    LayerStats,
    ModelSource,
    Part,
)
from se_compress.model.measures import (
    is_massive,
    overflows,
    sink_rate,
)
from se_compress.model.observers import RoutingCapture, SinkCapture


@dataclass
class _Peak:
    """Running maximum of |output| and its place, and sums for the means."""

    value: float = 0.0
    weighted: float = 0.0
    channel: int = -1
    position: int = -1
    token_id: int = -1
    tokens: int = 0
    weight_sum: float = 0.0
    norm_sum: float = 0.0
    saliency_sum: float = 0.0


class Watch(RoutingCapture, SinkCapture):
    """Observes one layer over all batches: experts, dense MLP, attention to the sink."""

    wants_inner = True

    def __init__(self, batches: Sequence[Tensor]) -> None:
        super().__init__()
        self.batches = batches
        self.peaks: dict[ExpertIndex, _Peak] = {}
        self.overflown: dict[ExpertIndex, Tensor] = {}
        self.dense_peak: float | None = None

    def expert(
        self, expert: ExpertIndex, rows: Tensor, inner: Tensor, output: Tensor, weights: Tensor
    ) -> None:
        if overflows(inner):
            self.overflown.setdefault(expert, inner)
        size = output.float().abs()
        strength, norms = size.amax(dim=1), output.float().norm(dim=1)
        peak = self.peaks.setdefault(expert, _Peak())
        at = int(strength.argmax())
        if float(strength[at]) > peak.value:
            token_ids = self.batches[self.batch]
            row = int(rows[at])
            peak.value, peak.channel = float(strength[at]), int(size[at].argmax())
            peak.position = row % token_ids.shape[1]
            peak.token_id = int(token_ids.reshape(-1)[row])
        peak.weighted = max(peak.weighted, float((strength * weights.float()).max()))
        peak.tokens += len(rows)
        peak.weight_sum += float(weights.sum(dtype=torch.float64))
        peak.norm_sum += float(norms.sum(dtype=torch.float64))
        peak.saliency_sum += float((norms * weights.float()).sum(dtype=torch.float64))

    def dense(self, inner: Tensor, output: Tensor) -> None:
        self.dense_peak = max(self.dense_peak or 0.0, float(output.float().abs().max()))

    def stats(
        self, identity: ExpertId, total: int, loss: Mapping[Part, Mapping[int, float]]
    ) -> ExpertStats:
        peak = self.peaks.get(identity.expert, _Peak())
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
        )


def layer_stats(
    source: ModelSource,
    layer: int,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    watch: Watch,
    batches: Sequence[Tensor],
) -> LayerStats:
    peak, place = 0.0, (0, 0, 0, 0)
    rise = fall = 0.0
    medians: list[float] = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        size = new.float().abs()
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
        sink_rate=float(sink_rate(watch.received)[0]),
    )
