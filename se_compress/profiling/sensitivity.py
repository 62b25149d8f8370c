"""What an error in one layer costs the whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from se_compress.artifacts import (
    ExpertStats,
    LayerStats,
    RunOptions,
)
from se_compress.model.observers import RoutingCapture
from se_compress.model.states import batches_of
from se_compress.model.streaming import StreamedModel
from se_compress.profiling.divergence import mean_divergence
from se_compress.profiling.losses import LOSS_STACK_ELEMENTS, mean_square
from se_compress.quant.grid import Grid, dequantize, rtn
from se_compress.recipe import Recipe

# What a layer's error costs is measured on so many tokens, at this width of all its experts. Not at
# a wider one: errors that are too small to send a token to another expert cost less than they will.
SENSITIVITY_TOKENS = 512
SENSITIVITY_BITS = 3


@dataclass
class _Rounded:
    """A copy of the stream behind one layer's rounded experts; `error` is the mean over tokens of
    the squared relative distance that the rounding made in the layer's output."""

    layer: int
    error: float
    hidden: list[Tensor]


def measure_sensitivities(
    model: StreamedModel, tokens: Sequence[Sequence[int]], recipe: Recipe, options: RunOptions
) -> dict[int, float]:
    """MoE layer -> LayerStats.sensitivity.

    An error is passed on by the later layers, which may drop it or send tokens to other experts for
    it; how much it costs differs between layers by a factor of three and more, and with it, losses
    rank like what quantising really costs (benchmarks/rank_correlation.py). One pass, the stream
    forked behind every MoE layer.
    """
    rule = recipe.quantization
    grid = Grid(SENSITIVITY_BITS, rule.group_size, rule.symmetric)
    base, forks = model.embed(batches_of(tokens, options.batch_tokens)), list[_Rounded]()
    count = model.source.layer_count
    for layer in range(count):
        options.progress("sensitivity", layer, count)
        base = _fork_layer(model, layer, base, forks, grid)
    options.progress("sensitivity", count, count)
    costs = (mean_divergence(model, base, fork.hidden) for fork in forks)
    return {
        fork.layer: max(cost, 1e-9) / max(fork.error, 1e-12)
        for fork, cost in zip(forks, costs, strict=True)
    }


def _fork_layer(
    model: StreamedModel, layer: int, before: list[Tensor], forks: list[_Rounded], grid: Grid
) -> list[Tensor]:
    """Run a layer over the stream and its copies and fork one more; returns the stream after it."""
    module, capture = model.load_layer(layer), RoutingCapture()
    for fork in forks:
        fork.hidden = model.run_layer(layer, module, fork.hidden)
    after = model.run_layer(layer, module, before, capture)
    if layer in model.source.moe_layers:
        _round_experts(model.experts_module(module), capture, grid)
        rounded = model.run_layer(layer, module, before)
        forks.append(_Rounded(layer, _squared_distance(rounded, after), rounded))
    return after


def _round_experts(experts: Any, capture: RoutingCapture, grid: Grid) -> None:
    """Round the live weights of a layer's experts to the nearest codes, in place."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    chunk = max(1, LOSS_STACK_ELEMENTS // gate_up[0].numel())
    for start in range(0, gate_up.shape[0], chunk):
        members = range(start, min(start + chunk, gate_up.shape[0]))
        inputs = [capture.hidden[capture.rows_of(expert)[0]] for expert in members]
        inner = [
            experts._apply_gate(nn.functional.linear(rows, gate_up[expert]))
            for expert, rows in zip(members, inputs, strict=True)
        ]
        for weight, seen in ((gate_up, inputs), (down, inner)):
            power = torch.stack([mean_square(rows) for rows in seen])
            part = weight[members.start : members.stop]
            part.copy_(dequantize(rtn(part.float(), grid, power)))


def _squared_distance(changed: Sequence[Tensor], states: Sequence[Tensor]) -> float:
    ratios = [
        ((new.float() - old.float()).norm(dim=-1) / old.float().norm(dim=-1)).square().flatten()
        for new, old in zip(changed, states, strict=True)
    ]
    return float(torch.cat(ratios).mean())


def in_nats(
    layers: Sequence[LayerStats], experts: Sequence[ExpertStats], sensitivity: Mapping[int, float]
) -> tuple[tuple[LayerStats, ...], tuple[ExpertStats, ...]]:
    """Layers with their sensitivity, and experts whose losses are multiplied by it."""

    def scaled(loss: Mapping[int, float], layer: int) -> dict[int, float]:
        return {bits: sensitivity[layer] * value for bits, value in loss.items()}

    return (
        tuple(replace(s, sensitivity=sensitivity.get(s.layer, s.sensitivity)) for s in layers),
        tuple(
            replace(
                e,
                loss_gate_up=scaled(e.loss_gate_up, e.layer),
                loss_down=scaled(e.loss_down, e.layer),
            )
            for e in experts
        ),
    )
