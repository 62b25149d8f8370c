"""What an error in one layer costs the whole model.

An error is passed on by the later layers. They may drop it, or send tokens to other experts for it:
how much it costs differs between layers by a factor of three and more. With this factor, losses
rank like what quantising really costs (benchmarks/rank_correlation.py).

States are lists of batches, in the model's dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from se_compress.artifacts import ExpertStats, LayerStats, RunOptions
from se_compress.model.experts import RoutedExperts
from se_compress.model.observers import RoutingCapture
from se_compress.model.states import States, batches_of, hidden_of
from se_compress.model.streaming import StreamedModel
from se_compress.profiling.divergence import mean_divergence
from se_compress.profiling.losses import mean_square, stacks_of
from se_compress.quant.grid import Grid, dequantize, rtn
from se_compress.recipe import Recipe

# What a layer's error costs is measured on so many tokens, at this width of all its experts. Not at
# a wider one: errors that are too small to send a token to another expert cost less than they will.
SENSITIVITY_TOKENS = 512
SENSITIVITY_BITS = 3


@dataclass
class _Rounded:
    """A copy of the stream, forked behind a layer whose experts were rounded.

    layer   the layer
    error   squared relative distance that the rounding made in the layer's output, mean over tokens
    states  those after the last layer that was run, of each batch
    """

    layer: int
    error: float
    states: list[States]


def measure_sensitivities(
    model: StreamedModel, tokens: Sequence[Sequence[int]], recipe: Recipe, options: RunOptions
) -> dict[int, float]:
    """MoE layer -> LayerStats.sensitivity.

    One pass: the stream is forked behind every MoE layer, once with its experts rounded. Memory
    holds one stream for each layer, so that `tokens` should be few (SENSITIVITY_TOKENS).
    """
    grid = Grid(SENSITIVITY_BITS, recipe.quantization.group_size, recipe.quantization.symmetric)
    base, forks = model.embed(batches_of(tokens, options.batch_tokens)), list[_Rounded]()
    count = model.source.layer_count
    for layer in range(count):
        options.progress("sensitivity", layer, count)
        base = _fork_layer(model, layer, base, forks, grid)
    options.progress("sensitivity", count, count)
    costs = (mean_divergence(model, base, fork.states) for fork in forks)
    # Rounding may change nothing, and a mean of divergences may come out just below zero.
    return {
        fork.layer: max(cost, 1e-9) / max(fork.error, 1e-12)
        for fork, cost in zip(forks, costs, strict=True)
    }


def _fork_layer(
    model: StreamedModel, layer: int, before: list[States], forks: list[_Rounded], grid: Grid
) -> list[States]:
    """The stream after a layer. The forks are run as well, and a MoE layer adds one."""
    module, capture = model.load_layer(layer), RoutingCapture()
    for fork in forks:
        fork.states = model.run_layer(layer, module, fork.states)
    after = model.run_layer(layer, module, before, capture)
    if layer in model.source.moe_layers:
        # The layer's own weights are changed: nothing runs through it unrounded after this.
        _round_experts(model.experts_module(module), capture, grid)
        rounded = model.run_layer(layer, module, before)
        error = _squared_distance(hidden_of(rounded), hidden_of(after))
        forks.append(_Rounded(layer, error, rounded))
    return after


def _round_experts(experts: RoutedExperts, capture: RoutingCapture, grid: Grid) -> None:
    """Round the live weights of a layer's experts to the nearest codes, in place."""
    for members in stacks_of(experts.gate_up_proj):
        # Before any weight of these experts is rounded: inner states come from the true gate_up.
        inputs = [capture.hidden[capture.rows_of(expert)[0]] for expert in members]
        inner = [experts.inner(expert, rows) for expert, rows in zip(members, inputs, strict=True)]
        for weight, seen in ((experts.gate_up_proj, inputs), (experts.down_proj, inner)):
            power = torch.stack([mean_square(rows) for rows in seen])  # [experts, columns]
            stack = weight[members.start : members.stop]
            stack.copy_(dequantize(rtn(stack.float(), grid, power)))


def _squared_distance(changed: Sequence[Tensor], states: Sequence[Tensor]) -> float:
    """(|changed - states| / |states|)^2 of each token's vector, mean over tokens."""
    ratios = [
        ((new.float() - old.float()).norm(dim=-1) / old.float().norm(dim=-1)).square().flatten()
        for new, old in zip(changed, states, strict=True)
    ]
    return float(torch.cat(ratios).mean())


def in_nats(
    layers: Sequence[LayerStats], experts: Sequence[ExpertStats], sensitivity: Mapping[int, float]
) -> tuple[tuple[LayerStats, ...], tuple[ExpertStats, ...]]:
    """The layers with their sensitivity, and the experts with losses in nats per token.

    sensitivity  MoE layer -> what `measure_sensitivities` found; it multiplies the losses
    """

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
