"""What rounding an expert's weights would cost, from the tokens that are routed to it.

Weights are rounded to the nearest codes, without GPTQ; scales are chosen for the power of the
inputs. One projection group is rounded at a time: gate and up, or down.

N tokens of a layer with H channels, E experts of I neurons, n tokens of one expert, S experts that
are rounded together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_compress.artifacts import ExpertIndex, ProjectionGroup
from se_compress.model.experts import RoutedExperts
from se_compress.model.observers import RoutingCapture
from se_compress.quant.grid import Grid, dequantize, rtn

# Tokens per expert on which the loss of rounding is measured; the strongest ones are always among
# them.
LOSS_TOKENS = 512
LOSS_STRONGEST = 32

# Projection group -> bits -> loss.
Losses = Mapping[ProjectionGroup, Mapping[int, float]]


@dataclass(frozen=True)
class _Sample:
    """Some tokens of one expert. All but `factor` have the model's dtype.

    hidden  inputs of gate_proj and up_proj, [n, H]
    inner   inputs of down_proj, [n, I]
    output  outputs of down_proj, [n, H]
    factor  what a squared error of the output counts, float32 [n]: (routing weight / residual
            norm)^2 x how many tokens this one stands for
    """

    hidden: Tensor
    inner: Tensor
    output: Tensor
    factor: Tensor


def residual_norms(after: Sequence[Tensor]) -> Tensor:
    """Norms [N] float32 of the hidden states after a layer, [B, T, H] for each batch."""
    return torch.cat([states.float().flatten(0, 1).norm(dim=1) for states in after])


def rounding_losses(
    block: RoutedExperts, capture: RoutingCapture, residual: Tensor, grids: Sequence[Grid]
) -> dict[ExpertIndex, Losses]:
    """Routed expert of a block -> its losses, see ExpertStats; not yet times the layer's
    sensitivity.

    capture   what a run of the layer has told
    residual  norms after the layer, [N]
    grids     what the weights are rounded to
    """
    samples = [_sample(block, expert, capture, residual) for expert in block.ids]
    hidden_power = torch.stack([mean_square(sample.hidden) for sample in samples])  # [S, H]
    inner_power = torch.stack([mean_square(sample.inner) for sample in samples])  # [S, I]
    tokens = len(residual)
    # 0 bits of down_proj: nothing is left of the output, so the error is the output.
    losses: list[dict[ProjectionGroup, dict[int, float]]] = [
        {"gate_up": {}, "down": {0: _loss(sample, sample.output.float(), tokens)}}
        for sample in samples
    ]
    for grid in grids:
        gate_up = dequantize(rtn(block.gate_up_proj.float(), grid, hidden_power))
        down = dequantize(rtn(block.down_proj.float(), grid, inner_power))
        for place, (expert, sample) in enumerate(zip(block.ids, samples, strict=True)):
            errors = _errors(block, expert, sample, gate_up[place], down[place])
            for part, error in errors.items():
                losses[place][part][grid.bits] = _loss(sample, error, tokens)
    return dict(zip(block.ids, losses, strict=True))


def _errors(
    experts: RoutedExperts, expert: int, sample: _Sample, gate_up: Tensor, down: Tensor
) -> dict[ProjectionGroup, Tensor]:
    """Projection group -> what rounding it alone does to the expert's output, float32 [n, H].

    gate_up, down  the expert's rounded weights, float32 [2I, H] and [H, I]
    """
    output = sample.output.float()
    inner = experts.activated(expert, sample.hidden.float() @ gate_up.T)
    exact = experts.down_proj[experts.place(expert)].float()
    return {
        "gate_up": experts.output(expert, inner, exact) - output,
        "down": experts.output(expert, sample.inner.float(), down) - output,
    }


def _sample(
    experts: RoutedExperts, expert: int, capture: RoutingCapture, residual: Tensor
) -> _Sample:
    """At most LOSS_TOKENS of an expert's tokens; `residual` [N] are the norms after the layer."""
    rows, weights = capture.rows_of(expert)
    importance = (weights.float() / residual[rows].clamp(min=1e-12)).square()
    stands_for = torch.ones_like(importance)
    if len(rows) > LOSS_TOKENS:
        kept, stands_for = _thinned(importance)
        rows, importance = rows[kept], importance[kept]
    hidden = capture.hidden[rows]
    inner = experts.inner(expert, hidden)
    output = experts.output(expert, inner)
    return _Sample(hidden, inner, output, importance * stands_for)


def _thinned(importance: Tensor) -> tuple[Tensor, Tensor]:
    """LOSS_TOKENS places, int64, in `importance` [n], and how many tokens each stands for.

    The strongest are all kept and stand for themselves. The others are taken at even steps, and
    each stands for a step.
    """
    strongest = importance.topk(LOSS_STRONGEST).indices
    rest = torch.ones(len(importance), dtype=torch.bool, device=importance.device)
    rest[strongest] = False
    others = rest.nonzero()[:, 0]
    count = LOSS_TOKENS - LOSS_STRONGEST
    step = len(others) / count
    picked = (torch.arange(count, device=importance.device) * step).long()
    stands_for = torch.cat(
        [
            torch.ones_like(importance)[:LOSS_STRONGEST],
            torch.full((count,), step, device=importance.device),
        ]
    )
    return torch.cat([strongest, others[picked]]), stands_for


def _loss(sample: _Sample, error: Tensor, tokens: int) -> float:
    """What an error [n, H] of an expert's output costs, mean over all `tokens` of the layer."""
    return float((error.square().sum(dim=1) * sample.factor).sum() / tokens)


def mean_square(inputs: Tensor) -> Tensor:
    """Mean square of each column of inputs [n, C], float32 [C]; zeros for no input."""
    return inputs.float().square().sum(dim=0) / max(1, len(inputs))
