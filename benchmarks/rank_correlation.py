"""Does the predicted loss rank as what quantising really costs? And do losses add up?

    python benchmarks/rank_correlation.py [--model smollm2-moe] [--every 5]

One expert of every fifth layer, drawn at random, and every super expert, is quantised alone with
GPTQ, its Hessian from the calibration tokens: gate and up, down, or both, at 2, 3 and 4 bits. The
stream is forked there, and the KL divergence to the source on held-out text (2 x 256 tokens) is
what it costs. Spearman's rank correlation with the profile's loss says how good the prediction is,
over all and within each width.

The alternatives beside it: the error without the residual's norm; the same losses from what GPTQ
made instead of rounding; how often the expert is used; and each without the layer's sensitivity.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from policy import WORK, Setting, recipe_for
from reference import profile_of
from results import machine, write_section
from scipy.stats import spearmanr
from torch import Tensor

from se_compress.artifacts import ExpertId, ProjectionGroup
from se_compress.model.checkpoint import open_tensors
from se_compress.model.measures import kl_divergence
from se_compress.model.observers import RoutingCapture
from se_compress.model.states import States, batches_of, hidden_of
from se_compress.model.streaming import StreamedModel
from se_compress.opening.source import open_source
from se_compress.quant.gptq import gptq
from se_compress.quant.grid import Grid, dequantize
from se_compress.quant.hessian import accumulate_hessian, shrink_towards
from se_compress.recipe import Recipe
from se_compress.text.calibrate import draw_sequences

GROUP_SIZE, WIDTHS, HELD_OUT = 64, (2, 3, 4), 2
PARTS_OF: Mapping[str, tuple[ProjectionGroup, ...]] = {
    "gate and up": ("gate_up",),
    "down": ("down",),
    "both": ("gate_up", "down"),
}
KINDS = tuple(PARTS_OF)


@dataclass
class Fork:
    """A copy of the held-out stream behind one change. `predicted` by the name of the predictor."""

    layer: int
    bits: int
    kind: str
    expert: ExpertId
    predicted: dict[str, float]
    states: list[States]
    cost: float = 0.0


def moment(inputs: Tensor) -> Tensor:
    total = torch.zeros(inputs.shape[1], inputs.shape[1])
    accumulate_hessian(total, inputs)
    return total / max(1, len(inputs))


def solved(weight: Tensor, inputs: Tensor, everyone: Tensor, bits: int, recipe: Recipe) -> Tensor:
    """What GPTQ makes of one weight [R, C] for its inputs [n, C]."""
    hessian = moment(inputs)
    if len(inputs) < inputs.shape[1]:
        hessian = shrink_towards(hessian, len(inputs), moment(everyone), inputs.shape[1])
    rule, grid = recipe.quantization, Grid(bits, GROUP_SIZE, True)
    done = gptq(
        weight[None].float(),
        hessian[None],
        grid,
        damping=rule.damping,
        act_order=rule.act_order,
        scales=rule.scales,
    )
    return dequantize(done.stack)[0]


@dataclass
class Study:
    """One model, its calibration and held-out streams up to some layer, and the forks so far."""

    model: StreamedModel
    recipe: Recipe
    hidden: list[States]
    held_out: list[States]
    forks: list[Fork]

    def pass_layer(self, layer: int, chosen: Sequence[int]) -> None:
        module = self.model.load_layer(layer)
        if layer in self.model.source.moe_layers:
            self.model.layer_experts(module).keep()
        for fork in self.forks:
            fork.states = self.model.run_layer(layer, module, fork.states)
        before, capture = self.held_out, RoutingCapture()
        self.held_out = self.model.run_layer(layer, module, before)
        self.hidden = self.model.run_layer(layer, module, self.hidden, capture)
        sizes = torch.cat([h.flatten(0, 1).norm(dim=1) for h in hidden_of(self.hidden)])
        for expert in chosen:
            self.forks += self._quantized(layer, module, expert, before, capture, sizes)

    def _quantized(
        self,
        layer: int,
        module: Any,
        expert: int,
        before: list[States],
        capture: RoutingCapture,
        sizes: Tensor,
    ) -> Iterator[Fork]:
        live = self.model.layer_experts(module).kept
        assert live is not None
        gate_up, down = live.gate_up_proj[expert].clone(), live.down_proj[expert].clone()
        rows, weights = capture.rows_of(expert)
        inputs, everyone = capture.hidden[rows], capture.hidden[::2]

        def inner(weight: Tensor, tokens: Tensor) -> Tensor:
            return live.activated(expert, tokens @ weight.T)

        output = inner(gate_up, inputs) @ down.T
        for bits in WIDTHS:
            new = solved(gate_up, inputs, everyone, bits, self.recipe)
            for kind in KINDS:
                used = gate_up if kind == "down" else new
                made = down
                if kind != "gate and up":
                    seen = inner(used, inputs)
                    made = solved(down, seen, inner(used, everyone), bits, self.recipe)
                live.gate_up_proj[expert], live.down_proj[expert] = used, made
                states = self.model.run_layer(layer, module, before)
                error = (inner(used, inputs) @ made.T - output).square().sum(dim=1) * weights**2
                predicted = {
                    "GPTQ's own error": float((error / sizes[rows] ** 2).sum() / len(sizes)),
                    "without the residual's norm": float(error.sum() / len(sizes)),
                    "use of the expert x 4^-bits": float(weights.sum()) * 4.0**-bits,
                }
                yield Fork(layer, bits, kind, ExpertId(layer, expert), predicted, states)
        live.gate_up_proj[expert], live.down_proj[expert] = gate_up, down

    def settle(self) -> None:
        """The cost of every fork."""

        def logits(states: list[States]) -> Tensor:
            return next(self.model.logits(states))

        source = logits(self.held_out)
        for fork in self.forks:
            cost = kl_divergence(source, logits(fork.states)).double().mean()
            fork.cost, fork.states = float(cost), []


@torch.no_grad()
def study(name: str, every: int, work: Path) -> list[Fork]:
    recipe = recipe_for(name, Setting({}))
    source = open_source(recipe.model)
    calibration = draw_sequences(recipe.calibration, source.path, "calibration")
    held_out = draw_sequences(recipe.validation, source.path, "validation")
    profile = profile_of(name, recipe, source, calibration, work)
    model = StreamedModel(source, open_tensors(source.tensors))
    picked = [torch.tensor(held_out[:: len(held_out) // HELD_OUT])]
    found = Study(
        model, recipe, model.embed(batches_of(calibration, 4096)), model.embed(picked), []
    )
    dice = random.Random(0)
    for layer in range(source.layer_count):
        chosen = {e.expert for e in profile.super_experts if e.layer == layer}
        if layer in source.moe_layers and layer % every == 0:
            chosen.add(dice.randrange(source.expert_count))
        found.pass_layer(layer, sorted(e for e in chosen if isinstance(e, int)))
        print(name, "layer", layer, len(found.forks), flush=True)
    found.settle()
    sensitivity = {stats.layer: stats.sensitivity for stats in profile.layers}
    for fork in found.forks:
        stats, of_layer = profile.by_id[fork.expert], sensitivity[fork.layer]
        parts = PARTS_OF[fork.kind]
        loss = sum(stats.loss_of(part, fork.bits) for part in parts)
        own = fork.predicted["GPTQ's own error"]
        fork.predicted = {
            "the profile's loss": loss,
            "without the layer's sensitivity": loss / of_layer,
            "GPTQ's own error x sensitivity": own * of_layer,
            **fork.predicted,
        }
    return found.forks


# -------------------------------------------------------------------------------------------- table


def rank(forks: Sequence[Fork], predictor: str) -> float:
    predicted = [fork.predicted[predictor] for fork in forks]
    return float(spearmanr(predicted, [fork.cost for fork in forks])[0])


def section(name: str, forks: Sequence[Fork]) -> str:
    def select(keep: Callable[[Fork], bool]) -> list[Fork]:
        return [fork for fork in forks if keep(fork)]

    columns: dict[str, list[Fork]] = {
        "all": list(forks),
        **{f"{bits} bits": select(lambda f, b=bits: f.bits == b) for bits in WIDTHS},  # type: ignore[misc]
        **{kind: select(lambda f, k=kind: f.kind == k) for kind in KINDS},  # type: ignore[misc]
    }
    lines = [
        "## Rank correlation of the predicted loss with the measured KL divergence",
        "",
        f"`python benchmarks/rank_correlation.py`, {machine()}. {name}: {len(forks)} changes of "
        f"{len({fork.expert for fork in forks})} experts, Spearman.",
        "",
        f"| predictor | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for predictor in forks[0].predicted:
        cells = " | ".join(f"{rank(chosen, predictor):.3f}" for chosen in columns.values())
        lines.append(f"| {predictor} | {cells} |")
    by = {(fork.expert, fork.bits, fork.kind): fork for fork in forks}
    both = select(lambda f: f.kind == "both")
    parts = [[by[f.expert, f.bits, kind] for kind in KINDS[:2]] for f in both]
    measured = [f.cost / sum(p.cost for p in two) for f, two in zip(both, parts, strict=True)]
    lines += [
        "",
        f"Both parts together cost {median(measured):.2f} of the sum of each alone (median; "
        f"{min(measured):.2f} to {max(measured):.2f}).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-moe")
    parser.add_argument("--every", type=int, default=5, help="layers from one expert to the next")
    parser.add_argument("--work", type=Path, default=WORK, help="where a profile is, or goes")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    forks = study(arguments.model, arguments.every, arguments.work)
    write_section("rank correlation", section(arguments.model, forks))


if __name__ == "__main__":
    main()
