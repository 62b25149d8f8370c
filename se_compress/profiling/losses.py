"""What rounding an expert's weights would cost, from the tokens that are routed to it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from se_compress.artifacts import (
    ExpertIndex,
    Part,
)
from se_compress.model.observers import RoutingCapture
from se_compress.model.streaming import StreamedModel
from se_compress.quant.grid import Grid, dequantize, rtn

# Tokens per expert on which the loss of rounding is measured; the strongest ones are always among
# them.
LOSS_TOKENS = 512
LOSS_STRONGEST = 32
LOSS_STACK_ELEMENTS = 2**26


@dataclass(frozen=True)
class _Sample:
    """Tokens of one expert: inputs [n, H] and [n, I], output [n, H], and what a squared error of
    the output counts, [n]: (weight / residual norm)^2 x how many tokens this one stands for."""

    hidden: Tensor
    inner: Tensor
    output: Tensor
    factor: Tensor


def rounding_losses(
    model: StreamedModel,
    layer: int,
    module: nn.Module,
    watch: RoutingCapture,
    after: Sequence[Tensor],
    grids: Sequence[Grid],
) -> dict[ExpertIndex, dict[Part, dict[int, float]]]:
    """Expert -> part -> bits -> loss, see ExpertStats; not that of the shared expert."""
    if layer not in model.source.moe_layers:
        return {}
    experts = model.experts_module(module)
    residual = torch.cat([states.float().flatten(0, 1).norm(dim=1) for states in after])
    gate_up, down = experts.gate_up_proj, experts.down_proj
    chunk = max(1, LOSS_STACK_ELEMENTS // gate_up[0].numel())
    losses: dict[ExpertIndex, dict[Part, dict[int, float]]] = {}
    for start in range(0, gate_up.shape[0], chunk):
        stop = min(start + chunk, gate_up.shape[0])
        samples = [_sample(experts, expert, watch, residual) for expert in range(start, stop)]
        hidden_power = torch.stack([mean_square(s.hidden) for s in samples])
        inner_power = torch.stack([mean_square(s.inner) for s in samples])
        for i, sample in enumerate(samples):
            gone = _loss(sample, sample.output.float(), len(residual))
            losses[start + i] = {"gate_up": {}, "down": {0: gone}}
        for grid in grids:
            rounded_in = dequantize(rtn(gate_up[start:stop].float(), grid, hidden_power))
            rounded_out = dequantize(rtn(down[start:stop].float(), grid, inner_power))
            for i, sample in enumerate(samples):
                inner = experts._apply_gate(sample.hidden.float() @ rounded_in[i].T)
                outputs: dict[Part, Tensor] = {
                    "gate_up": inner @ down[start + i].float().T,
                    "down": sample.inner.float() @ rounded_out[i].T,
                }
                for part, output in outputs.items():
                    error = output - sample.output.float()
                    losses[start + i][part][grid.bits] = _loss(sample, error, len(residual))
    return losses


def _sample(experts: nn.Module, expert: int, watch: RoutingCapture, residual: Tensor) -> _Sample:
    rows, weights = watch.rows_of(expert)
    importance = (weights.float() / residual[rows].clamp(min=1e-12)).square()
    stands_for = torch.ones_like(importance)
    if len(rows) > LOSS_TOKENS:
        strongest = importance.topk(LOSS_STRONGEST).indices
        rest = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        rest[strongest] = False
        others = rest.nonzero()[:, 0]
        step = len(others) / (LOSS_TOKENS - LOSS_STRONGEST)
        picked = (torch.arange(LOSS_TOKENS - LOSS_STRONGEST, device=rows.device) * step).long()
        keep = torch.cat([strongest, others[picked]])
        stands_for = torch.cat(
            [stands_for[:LOSS_STRONGEST], torch.full((len(picked),), step, device=rows.device)]
        )
        rows, importance = rows[keep], importance[keep]
    hidden = watch.hidden[rows]
    inner = experts._apply_gate(nn.functional.linear(hidden, experts.gate_up_proj[expert]))  # type: ignore
    output = nn.functional.linear(inner, experts.down_proj[expert])  # type: ignore[index]
    return _Sample(hidden, inner, output, importance * stands_for)


def _loss(sample: _Sample, error: Tensor, tokens: int) -> float:
    """What an error [n, H] of an expert's output costs, over all `tokens` of the layer."""
    return float((error.square().sum(dim=1) * sample.factor).sum() / tokens)


def mean_square(inputs: Tensor) -> Tensor:
    """Per column; zero for an expert that saw no token."""
    return inputs.float().square().sum(dim=0) / max(1, len(inputs))
