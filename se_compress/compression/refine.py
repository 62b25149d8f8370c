"""Refine the quantised experts of one layer: codes and scales, tuned on what the layer puts out.

N rows (tokens) with H channels, E experts, k of them chosen per row.

A solver looks at one matrix at a time. Here all routed experts of a layer are tuned together so
that the residual stream behind the layer is the source's: they make up for each other, for what a
layer's activation function does to an error, and for some of what the layers before have lost. Each
row's squared error counts relative to the row itself, as the norms of later layers see it: a token
with a massive activation would outweigh all others otherwise.

Sequences of the calibration text are in one of three folds (folds.py). Gradients come from
`tuning`. Of the states met at every quarter of the steps, and the solver's own, the one of least
error on `selection` is kept: if that is the solver's own, refining is undone. `report` decides
nothing; its errors are what is said of the layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import sqrt

import torch
from torch import Tensor

from se_compress.artifacts import RefineRecord
from se_compress.compression.folds import FOLDS, rows_of_folds
from se_compress.compression.stacks import SolvedExperts, SolvedStack
from se_compress.model.experts import RoutedExperts
from se_compress.model.routing import Routing, bunched
from se_compress.quant.grid import QuantizedStack, dequantize
from se_compress.quant.tuned import TunedStack, changed_share
from se_compress.recipe import Refine

# Adam's step sizes at the start, falling to nothing: of positions, in steps of the grid; of scales,
# relative. Four times as much brought layers nearer to the source, but, in one run, not the logits.
CODE_RATE, SCALE_RATE = 2e-3, 5e-4
BETAS = (0.9, 0.99)
EPSILON = 1e-20  # errors are relative, and a gradient is of one weight of millions
LOOKS = 4  # how often the error on `selection` is measured
PIECE_ROWS = 1024  # of a measurement, at once


# ------------------------------------------------------------------------------------------ the aim


@dataclass(frozen=True)
class Aim:
    """What the routed experts of a layer should add to the stream.

    hidden   what they are given, [N, H]
    chosen   experts of each row, int64 [N, k]; numbers that no expert has add nothing
    weights  their routing weights, [N, k]
    wanted   [N, H] float32: the source's stream behind the layer, less all else of this one
    counts   [N] float32: what the squared error of a row counts
    rows     of each fold, int64
    """

    hidden: Tensor
    chosen: Tensor
    weights: Tensor
    wanted: Tensor
    counts: Tensor
    rows: Mapping[str, Tensor]


def aim_of(
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    source: Sequence[Tensor],
    others: Sequence[Tensor],
) -> Aim:
    """The aim of a layer's routed experts.

    hidden, chosen, weights  as in Aim
    source  the source's hidden states behind the layer, [B, T, H] a batch, of all sequences
    others  those of the result without what its routed experts add
    """
    behind, beside = (
        torch.cat([states.flatten(0, 1) for states in batches]).float()
        for batches in (source, others)
    )
    lengths = [states.shape[1] for states in source for _ in range(states.shape[0])]
    counts = 1 / behind.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    rows = {fold: rows.to(hidden.device) for fold, rows in rows_of_folds(lengths).items()}
    return Aim(hidden, chosen, weights, behind - beside, counts, rows)


# -------------------------------------------------------------------------------------------- state


class _Fused:
    """One fused tensor [E, R, C] of a layer while its stacks are tuned.

    Experts are taken in the order of the stacks, those that keep their precision behind them.
    """

    def __init__(
        self, live: Tensor, before: Tensor, stacks: Sequence[tuple[list[int], SolvedStack | None]]
    ) -> None:
        """live is the module's tensor, before its weights as the source has them"""
        solved = [(members, one.stack) for members, one in stacks if one is not None]
        self.tuned = [TunedStack(stack, before[members].float()) for members, stack in solved]
        order = [member for members, _ in solved for member in members]
        rest = sorted(set(range(len(live))) - set(order))
        self._rest = live[rest].float()
        self._place = torch.tensor(order + rest, device=live.device).argsort()

    def weight(self) -> Tensor:
        """[E, R, C] float32 in the order of this class."""
        return torch.cat([*(stack.weight() for stack in self.tuned), self._rest])

    def places(self, experts: Sequence[int]) -> Tensor:
        """Where experts lie in `weight`, int64."""
        return self._place[list(experts)]

    def hardened(self) -> list[QuantizedStack]:
        return [stack.hardened() for stack in self.tuned]


@dataclass(frozen=True)
class _Layer:
    """The routed experts of a layer, being tuned."""

    experts: RoutedExperts
    gate_up: _Fused
    down: _Fused

    @property
    def tuned(self) -> list[TunedStack]:
        return [*self.gate_up.tuned, *self.down.tuned]

    def output(self, hidden: Tensor, routing: Routing, weights: Tensor) -> Tensor:
        """What the experts add to rows [n, H], float32, by routing weights [n, k]."""
        gate_up, down = self.gate_up.weight(), self.down.weight()
        made = []
        for bunch in routing.bunches:
            into, out = (
                weight[fused.places(bunch.experts)]
                for weight, fused in ((gate_up, self.gate_up), (down, self.down))
            )
            outputs = self.experts.stack(bunch.experts, into, out, hidden[bunch.rows])
            made.append(outputs.flatten(0, 1))
        # gathered and not scattered: no two additions to one place, whose order CUDA would choose
        each = torch.cat(made)[routing.places]
        return (each * weights[..., None]).sum(1)

    def error(self, aim: Aim, rows: Tensor) -> Tensor:
        """Mean relative squared error of some rows [n]."""
        chosen = aim.chosen[rows]
        routing = bunched(chosen, len(self.experts))
        weights = aim.weights[rows].float().masked_fill(chosen >= len(self.experts), 0)
        output = self.output(aim.hidden[rows].float(), routing, weights)
        return ((output - aim.wanted[rows]).square().sum(1) * aim.counts[rows]).mean()

    @torch.no_grad()
    def error_of_fold(self, aim: Aim, fold: str) -> float:
        """The same of a whole fold, in pieces."""
        rows = aim.rows[fold]
        pieces = torch.split(rows, PIECE_ROWS)
        return sum(float(self.error(aim, piece)) * len(piece) for piece in pieces) / len(rows)


# ------------------------------------------------------------------------------------------- tuning


def refine_experts(
    experts: RoutedExperts,
    before: tuple[Tensor, Tensor],
    solved: Sequence[SolvedExperts],
    aim: Aim,
    rule: Refine,
) -> RefineRecord:
    """Tune the solved experts of a layer, in place; they stay as they are unless that helps.

    experts  the live ones; they get the weights that are kept
    before   the source's gate_up_proj and down_proj
    """
    layer = _layer_of(experts, before, solved)
    started = {fold: layer.error_of_fold(aim, fold) for fold in FOLDS[1:]}
    starts = [stack.hardened() for stack in layer.tuned]
    best, step, found = starts, 0, started
    looks = {round(rule.steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    for done in _tune(layer, aim, rule):
        if done in looks and layer.error_of_fold(aim, "selection") < found["selection"]:
            best, step = [stack.hardened() for stack in layer.tuned], done
            found = {fold: layer.error_of_fold(aim, fold) for fold in FOLDS[1:]}
    if step:
        _put(experts, solved, best)
    return RefineRecord(
        step=step,
        selection_before=sqrt(started["selection"]),
        selection=sqrt(found["selection"]),
        report_before=sqrt(started["report"]),
        report=sqrt(found["report"]),
        codes_changed=changed_share(starts, best),
    )


def _layer_of(
    experts: RoutedExperts, before: tuple[Tensor, Tensor], solved: Sequence[SolvedExperts]
) -> _Layer:
    gate_up = _Fused(experts.gate_up_proj, before[0], [(s.members, s.gate_up) for s in solved])
    down = _Fused(experts.down_proj, before[1], [(s.members, s.down) for s in solved])
    return _Layer(experts, gate_up, down)


def _tune(layer: _Layer, aim: Aim, rule: Refine) -> Iterator[int]:
    """Take the steps, and tell the number of each that is done."""
    rates = (CODE_RATE, SCALE_RATE)
    groups = ([s.positions for s in layer.tuned], [s.ratios for s in layer.tuned])
    adam = torch.optim.Adam(
        [{"params": each} for each in groups], betas=BETAS, eps=EPSILON, fused=True
    )
    for step, rows in enumerate(islice(_draws(aim.rows["tuning"], rule.tokens), rule.steps)):
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / rule.steps)
        adam.zero_grad()
        with torch.enable_grad():
            layer.error(aim, rows).backward()  # type: ignore[no-untyped-call]
        adam.step()
        for stack in layer.tuned:
            stack.keep_in_bounds()
        yield step + 1


def _draws(rows: Tensor, size: int) -> Iterator[Tensor]:
    """`size` of the rows at a time, without end; each once before any comes again."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        yield from torch.split(rows[order], size)[: max(1, len(rows) // size)]


def _put(
    experts: RoutedExperts, solved: Sequence[SolvedExperts], stacks: Sequence[QuantizedStack]
) -> None:
    """Give the solved experts and the live module the tuned stacks, all of gate and up first."""
    left = iter(stacks)
    for live, role in ((experts.gate_up_proj, "gate_up"), (experts.down_proj, "down")):
        for some in solved:
            before: SolvedStack | None = getattr(some, role)
            if before is not None:
                stack = next(left)
                setattr(some, role, replace(before, stack=stack))
                live[some.members] = dequantize(stack).to(live.dtype)
    for some in solved:
        some.inner = []
