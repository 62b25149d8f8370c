"""What an error in one layer costs the whole model.

An error is passed on by the later layers. They may drop it, or send tokens to other experts for it:
how much it costs differs between layers by a factor of three and more. With this factor, losses
rank like what quantising really costs (benchmarks/rank_correlation.py).

States are lists of batches, in the model's dtype.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from se_compress.artifacts import ExpertStats, LayerStats, RunOptions
from se_compress.model.experts import RoutedExperts, outputs_of
from se_compress.model.observers import Observer, RoutingCapture
from se_compress.model.states import States, batches_of, hidden_of
from se_compress.model.streaming import StreamedModel
from se_compress.profiling.divergence import mean_divergence
from se_compress.quant.grid import Grid, dequantize, rtn
from se_compress.quant.hessian import mean_square
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
    module = model.load_layer(layer)
    streams = [before, *(fork.states for fork in forks)]
    after, *changed = model.run_streams(layer, module, [(each, Observer()) for each in streams])
    for fork, states in zip(forks, changed, strict=True):
        fork.states = states
    if layer in model.source.moe_layers:
        capture = RoutingCapture(runs_experts=False)
        without = model.run_layer(layer, module, before, capture)
        output = _rounded_output(model, module, capture, grid)
        rounded = model.add_routed(layer, module, before, without, output)
        error = _squared_distance(hidden_of(rounded), hidden_of(after))
        forks.append(_Rounded(layer, error, rounded))
    return after


def _rounded_output(
    model: StreamedModel, module: nn.Module, capture: RoutingCapture, grid: Grid
) -> Tensor:
    """What a layer's experts put out, [N, H] float32, if each is rounded to the nearest codes."""

    def work(block: RoutedExperts) -> Iterator[tuple[int, Tensor]]:
        _round(block, capture, grid)
        yield from outputs_of(capture, block)

    return capture.summed(model.layer_experts(module).each(work, ranks=model.ranks))


def _round(block: RoutedExperts, capture: RoutingCapture, grid: Grid) -> None:
    """Round the experts of a block to the nearest codes, in place."""
    # Before any weight is rounded: inner states come from the true gate_up.
    inputs = [capture.hidden[capture.rows_of(expert)[0]] for expert in block.ids]
    inner = [block.inner(e, rows) for e, rows in zip(block.ids, inputs, strict=True)]
    for weight, seen in ((block.gate_up_proj, inputs), (block.down_proj, inner)):
        power = torch.stack([mean_square(rows) for rows in seen])  # [experts, columns]
        weight.copy_(dequantize(rtn(weight.float(), grid, power)))


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
