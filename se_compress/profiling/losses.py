"""What rounding an expert's weights would cost, from the tokens that are routed to it.

Weights are rounded to the nearest codes, without GPTQ; scales are chosen for the power of the
inputs. One projection group is rounded at a time: gate and up, or down. Of a large expert some
neurons and output channels stand for all: the search for scales is what takes the time, ten seconds
for an expert of DeepSeek-V3's shape, of which 6,144 wait.

N tokens of a layer with H channels, experts of I neurons, n tokens of one expert, S experts that
are rounded together, r rows of each. R is 2I, or I without a gate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_compress.artifacts import ExpertIndex, ProjectionGroup
from se_compress.model.experts import RoutedExperts
from se_compress.model.observers import RoutingCapture
from se_compress.quant.grid import Grid, dequantize, rtn
from se_compress.quant.hessian import mean_square

# Tokens per expert on which the loss of rounding is measured; the strongest ones are always among
# them.
LOSS_TOKENS = 512
LOSS_STRONGEST = 32
# The same for neurons, whose rows of gate and up are rounded, and for channels, whose rows of down
# are.
LOSS_ROWS = 768
LOSS_STRONGEST_ROWS = 64

# Projection group -> bits -> loss.
Losses = Mapping[ProjectionGroup, Mapping[int, float]]


@dataclass(frozen=True)
class _Some:
    """Some of many that stand for all of them.

    places      int64 [n]
    stands_for  float32 [n], for how many each does
    """

    places: Tensor
    stands_for: Tensor


@dataclass(frozen=True)
class _Sample:
    """Some tokens of one expert, and some of its rows; float32.

    hidden    inputs of gate_proj and up_proj, [n, H]
    product   what these make of them, [n, R]
    inner     inputs of down_proj, [n, I]
    output    outputs of down_proj, [n, H]
    factor    what a squared error of the output counts, [n]: (routing weight / residual norm)^2 x
              how many tokens this one stands for
    neurons   whose rows of gate_proj and up_proj are rounded
    channels  whose rows of down_proj are
    """

    hidden: Tensor
    product: Tensor
    inner: Tensor
    output: Tensor
    factor: Tensor
    neurons: _Some
    channels: _Some


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
    gate_up, down = block.gate_up_proj, block.down_proj
    upper = _chosen(gate_up, [_rows_of(block, sample.neurons.places) for sample in samples])
    lower = _chosen(down, [sample.channels.places for sample in samples])
    hidden_power = torch.stack([mean_square(sample.hidden) for sample in samples])  # [S, H]
    inner_power = torch.stack([mean_square(sample.inner) for sample in samples])  # [S, I]
    tokens = len(residual)
    # 0 bits of down_proj: nothing is left of the output, so the error is the output.
    losses: list[dict[ProjectionGroup, dict[int, float]]] = [
        {"gate_up": {}, "down": {0: _loss(sample, sample.output, tokens)}} for sample in samples
    ]
    for grid in grids:
        rounded = dequantize(rtn(upper, grid, hidden_power))
        for expert, sample, loss, rows in zip(block.ids, samples, losses, rounded, strict=True):
            error = _gate_up_error(block, expert, sample, rows)
            loss["gate_up"][grid.bits] = _loss(sample, error, tokens)
        change = dequantize(rtn(lower, grid, inner_power)).sub_(lower)
        for sample, loss, rows in zip(samples, losses, change, strict=True):
            error = sample.inner @ rows.T * sample.channels.stands_for.sqrt()
            loss["down"][grid.bits] = _loss(sample, error, tokens)
    return dict(zip(block.ids, losses, strict=True))


def _rows_of(block: RoutedExperts, neurons: Tensor) -> Tensor:
    """The rows of `gate_up_proj` that are of some neurons, int64: of one projection, then of the
    other."""
    rows = torch.arange(block.gate_up_proj.shape[1], device=neurons.device)
    return torch.cat([rows[part][neurons] for part in block.roles.values()])


def _chosen(weights: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Some rows of each weight of a stack [S, R, C]: float32 [S, r, C]; the stack itself where they
    are all that there are."""
    if len(rows[0]) == weights.shape[1]:
        return weights.float()
    return torch.stack([one[some] for one, some in zip(weights, rows, strict=True)]).float()


def _gate_up_error(block: RoutedExperts, expert: int, sample: _Sample, rounded: Tensor) -> Tensor:
    """What rounding the rows of its neurons in gate_proj and up_proj does to an expert's output,
    float32 [n, H].

    Errors of different neurons do not go together, so that a neuron that stands for four is one
    with twice the error.

    rounded  those rows, float32 [r, H]
    """
    neurons = sample.neurons.places
    product = sample.product.clone()
    product[:, _rows_of(block, neurons)] = sample.hidden @ rounded.T
    change = block.activated(expert, product).sub_(sample.inner)
    down = block.down_proj[block.place(expert)].float()
    if len(neurons) < len(sample.inner.T):
        change, down = change[:, neurons] * sample.neurons.stands_for.sqrt(), down[:, neurons]
    return change @ down.T


def _sample(
    experts: RoutedExperts, expert: int, capture: RoutingCapture, residual: Tensor
) -> _Sample:
    """At most LOSS_TOKENS of an expert's tokens; `residual` [N] are the norms after the layer."""
    rows, weights = capture.rows_of(expert)
    importance = (weights.float() / residual[rows].clamp(min=1e-12)).square()
    some = _some(importance, LOSS_TOKENS, LOSS_STRONGEST)
    at = experts.place(expert)
    gate_up, down = experts.gate_up_proj[at].float(), experts.down_proj[at].float()
    hidden = capture.hidden[rows[some.places]].float()
    product = hidden @ gate_up.T
    inner = experts.activated(expert, product)
    # How much of the output goes through a neuron, and into a channel.
    squares, power = down.square(), mean_square(inner)
    return _Sample(
        hidden,
        product,
        inner,
        experts.output(expert, inner, down),
        importance[some.places] * some.stands_for,
        neurons=_some(squares.sum(0) * power, LOSS_ROWS, LOSS_STRONGEST_ROWS),
        channels=_some(squares @ power, LOSS_ROWS, LOSS_STRONGEST_ROWS),
    )


def _some(importance: Tensor, count: int, strongest: int) -> _Some:
    """At most `count` places in `importance` [n].

    The strongest are all kept and stand for themselves. The others are taken at even steps, and
    each stands for a step.
    """
    every = torch.arange(len(importance), device=importance.device)
    if len(every) <= count:
        return _Some(every, torch.ones_like(importance))
    kept = importance.topk(strongest).indices
    rest = torch.ones_like(every, dtype=torch.bool)
    rest[kept] = False
    others = every[rest]
    step = len(others) / (count - strongest)
    picked = (every[: count - strongest] * step).long()
    stands_for = torch.full((count,), step, device=importance.device)
    stands_for[:strongest] = 1.0
    return _Some(torch.cat([kept, others[picked]]), stands_for)


def _loss(sample: _Sample, error: Tensor, tokens: int) -> float:
    """What an error [n, H] of an expert's output costs, mean over all `tokens` of the layer."""
    return float((error.square().sum(dim=1) * sample.factor).sum() / tokens)
