"""Codes and scales of a quantised stack, or scales alone, while they are tuned by gradients.

E members, R rows, C columns, G groups.

Each code has a position on its grid, a real number whose nearest integer the code is. It starts
where the weight itself lies, as far as that rounds to the code which the solver chose: a code that
the solver rounded away from its weight lies at the border of its neighbour. From there it moves to
the neighbours at most. A scale is its start times a ratio near 1.

What is computed with is always what the file would hold: rounded positions, scales as they are
stored. Gradients pass through both roundings as if they were not there (the straight-through
estimator, arXiv:1308.3432); AutoRound (arXiv:2309.05516) tunes roundings so, from the weights
themselves, and GSQ (arXiv:2604.18556) from GPTQ's codes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from se_compress.quant.grid import QuantizedStack, as_stored, by_group, per_column

# How far from a code its position starts at most, and how far it may go.
NEAR, REACH = 0.49, 1.49
RATIO = 0.3  # the most by which a scale is changed, of itself


class TunedStack:
    """A stack whose codes and scales follow gradients; its zeros stay.

    positions  [E, R, C] float32, in steps: of the code less its zero
    ratios     [E, R, G] float32, by which the scales differ from their start
    """

    def __init__(self, start: QuantizedStack, weight: Tensor) -> None:
        """start  what a solver made of weight [E, R, C] float32"""
        self._start = start
        steps, _ = self._steps()
        offset = weight / per_column(start.scales, weight.shape[-1], start.grid) - steps
        self.positions = steps + offset.clamp_(-NEAR, NEAR)
        self.ratios = torch.zeros_like(start.scales)
        self.keep_in_bounds()
        self.positions.requires_grad_()
        self.ratios.requires_grad_()

    @torch.no_grad()
    def keep_in_bounds(self) -> None:
        """Bring back what a step has taken too far."""
        steps, zeros = self._steps()
        low, high = torch.maximum(steps - REACH, -zeros), steps.add_(REACH)
        high = torch.minimum(high, self._start.grid.top - zeros)
        torch.clamp(self.positions, low, high, out=self.positions)
        self.ratios.clamp_(-RATIO, RATIO)

    def _steps(self) -> tuple[Tensor, Tensor]:
        """[E, R, C] float32: where the codes start, less their zeros, and these."""
        codes = self._start.codes
        zeros = per_column(self._start.zeros.float(), codes.shape[-1], self._start.grid)
        return codes - zeros, zeros

    def weight(self) -> Tensor:
        """float32 [E, R, C]: what the file would stand for; bit for bit that of `hardened`."""
        grid, columns = self._start.grid, self.positions.shape[-1]
        steps = by_group(_through(self.positions, self.positions.round()), grid)
        return (steps * self._scales()[..., None]).flatten(-2)[..., :columns]

    def _scales(self) -> Tensor:
        exact = self._start.scales * (1 + self.ratios)
        return _through(exact, as_stored(exact.detach(), self._start.grid))

    @torch.no_grad()
    def hardened(self) -> QuantizedStack:
        """The stack as it is now, in codes."""
        grid, columns = self._start.grid, self.positions.shape[-1]
        codes = self.positions.round() + per_column(self._start.zeros.float(), columns, grid)
        return replace(self._start, codes=codes.to(torch.uint8), scales=self._scales().detach())


class ScaledStack:
    """A stack whose scales alone follow gradients, which are given; its codes and zeros stay.

    ratios  [E, R, G] float32, by which the scales differ from their start; their `grad` is that of
            `follow`
    """

    def __init__(self, start: QuantizedStack) -> None:
        self._start = start
        self.ratios = torch.zeros_like(start.scales)

    @torch.no_grad()
    def keep_in_bounds(self) -> None:
        """Bring back what a step has taken too far."""
        self.ratios.clamp_(-RATIO, RATIO)

    @torch.no_grad()
    def hardened(self) -> QuantizedStack:
        """The stack as it is now, with scales as they are stored."""
        exact = self._start.scales * (1 + self.ratios)
        return replace(self._start, scales=as_stored(exact, self._start.grid))

    @torch.no_grad()
    def follow(self, gradient: Tensor) -> None:
        """Take the gradient of the weight, [E, R, C], for that of the ratios; rounding a scale to
        what is stored is passed as if it were not there."""
        grid = self._start.grid
        zeros = per_column(self._start.zeros.float(), gradient.shape[-1], grid)
        of_scales = by_group(gradient * (self._start.codes - zeros), grid).sum(-1)
        self.ratios.grad = of_scales * self._start.scales


class _Through(torch.autograd.Function):
    """The second of two tensors, with the gradient of the first."""

    @staticmethod
    def forward(ctx: object, soft: Tensor, hard: Tensor) -> Tensor:
        return hard

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _through(soft: Tensor, hard: Tensor) -> Tensor:
    made: Tensor = _Through.apply(soft, hard)  # type: ignore[no-untyped-call]
    return made


def changed_share(before: Sequence[QuantizedStack], after: Sequence[QuantizedStack]) -> float:
    """Share of the codes of some stacks that differ in others."""
    pairs = zip(before, after, strict=True)
    changed = sum(int((one.codes != other.codes).sum()) for one, other in pairs)
    return changed / max(1, sum(stack.codes.numel() for stack in before))
