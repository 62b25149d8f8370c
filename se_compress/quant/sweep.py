"""Codes and scales of some rows, decided by sweeps over the columns and refits of the scales.

The algorithm is told in gptq.py. E members, R rows, C columns, G groups.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from se_compress.quant.grid import (
    Grid,
    QuantizedStack,
    as_stored,
    choose_scales,
    dequantize,
    rtn,
)
from se_compress.quant.hessian import Factors, room

BLOCK = 128  # columns whose effect on the others is one product of matrices
SMALL_BLOCK = 16  # columns that are settled one by one
REFIT_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}  # of the largest temporary of a refit
# A CPU's products of matrices take twice the time where rows are no multiple of its vectors.
WHOLE_ROWS = 64
HOLD = 1e-5  # how hard a refit holds on to the scales it starts from
STRETCH = 2.0  # the most by which a refit may change a scale


def _arrange(columns_first: Tensor, order: Tensor) -> Tensor:
    """[E, C, K] by the indices [E, L] of its columns: [E, L, K], contiguous."""
    members, columns, width = columns_first.shape
    # rows of one flat matrix: twice as fast on the CPU as a gather
    first = torch.arange(members, device=order.device)[:, None] * columns
    flat = columns_first.reshape(-1, width).index_select(0, (order + first).flatten())
    return flat.view(members, -1, width)


class RowSlice:
    """Some rows of some members while their codes and scales are being decided.

    original  [E, R, C] float32, the weights as they are given
    weight    [E, C, R], the same with columns first: those of all rows of a member are contiguous
    codes     [E, C, R] uint8, what has been decided
    error     [E, C, R], weight less its rounded value
    scales, zeros   [E, G, R] float32

    The columns of `weight`, `codes` and `error` lie in `factors.order`. That is the reverse of the
    order of work, because Cholesky's factor of the Hessian in reverse is M D^(1/2).
    """

    def __init__(self, weight: Tensor, hessian: Tensor, factors: Factors, grid: Grid) -> None:
        self.original, self.hessian, self.factors, self.grid = weight, hessian, factors, grid
        self.width = grid.width(weight.shape[2])
        self.group = factors.order // self.width  # [E, C]
        self.weight = _arrange(weight.mT, factors.order)
        self.codes = torch.zeros_like(self.weight, dtype=torch.uint8)
        self.error = torch.zeros_like(self.weight)
        self.scales = self.zeros = torch.empty(0)  # until they are chosen

    def quantize(self, scales: str, rounds: int) -> QuantizedStack:
        """Choose scales, sweep once, then `rounds` times refit and sweep again."""
        importance = self.factors.importance if scales == "activation" else None
        chosen, zeros = choose_scales(self.original, self.grid, importance)
        self.scales, self.zeros = chosen.mT.contiguous(), zeros.mT.to(torch.float32)
        self._sweep(self.factors.passed_on, first=True)
        for _ in range(rounds):
            self._refit()
            self._sweep(self.factors.shared)
        codes = _arrange(self.codes, self.factors.order.argsort(1))
        stack = QuantizedStack(codes.mT, self.scales.mT, zeros, self.grid)
        for e in self.factors.failed:
            nearest = rtn(self.original[e, None], self.grid, self.factors.moments[e, None])
            stack.codes[e], stack.scales[e] = nearest.codes[0], nearest.scales[0]
            stack.zeros[e] = nearest.zeros[0]
        return stack

    def lost(self, stack: QuantizedStack) -> Tensor:
        """[E, R]: the output energy of what rounding changed."""
        change = dequantize(stack).sub_(self.original)
        energy = torch.zeros_like(change[:, :, 0])
        # half of a symmetric matrix is enough
        for start in range(0, change.shape[2], BLOCK):
            block, before = slice(start, start + BLOCK), slice(start)
            response = torch.bmm(change[:, :, block], self.hessian[:, block, block])
            response.baddbmm_(change[:, :, before], self.hessian[:, before, block], alpha=2)
            energy += (change[:, :, block] * response).sum(2)
        return self._under_diagonal(energy, change)

    def whole(self) -> Tensor:
        """[E, R]: the output energy of the weights."""
        return self._under_diagonal((self.original * self._response.mT).sum(2), self.original)

    def _under_diagonal(self, energy: Tensor, rows: Tensor) -> Tensor:
        """An indefinite Hessian gives no energy, its diagonal does."""
        for e in self.factors.failed:
            energy[e] = rows[e].square() @ self.factors.moments[e]
        return energy

    @cached_property
    def _response(self) -> Tensor:
        """hessian @ weight, [E, C, R] in original order."""
        return torch.bmm(self.hessian, self.original.mT)

    def _sweep(self, coupling: Tensor, *, first: bool = False) -> None:
        """Decide the code of every column once, at weight + coupling @ error.

        coupling  [E, C, C], zero diagonal
        first     no column has an error yet, and coupling is strictly upper triangular
        """
        # Two levels of blocks: what settled columns mean for a block is one product of matrices,
        # and within it for a small block another; only inside that columns are taken one by one.
        for end in range(self.weight.shape[1], 0, -BLOCK):
            start = max(0, end - BLOCK)
            block, known = slice(start, end), slice(end if first else 0, None)
            target = self.weight[:, block].baddbmm(coupling[:, block, known], self.error[:, known])
            for b in range(end, start, -SMALL_BLOCK):
                a = max(start, b - SMALL_BLOCK)
                change = self._round(slice(a, b), target[:, a - start : b - start], coupling)
                target[:, : a - start].baddbmm_(coupling[:, start:a, a:b], change)

    def _round(self, where: slice, target: Tensor, coupling: Tensor) -> Tensor:
        """Round the columns of a small block in turn, each at its target.

        target  [E, S, R], changed in place as the columns pass on what they changed
        Returns how their errors changed, [E, S, R].
        """
        scale = _arrange(self.scales, self.group[:, where])
        # rounded values so far: the weights themselves in a first sweep
        before = self.weight[:, where] - self.error[:, where]
        steps, change = torch.empty_like(target), torch.empty_like(target)
        zero, low, high = self._limits(where)
        parts = (x.unbind(1) for x in (target, scale, before, steps, change))
        columns = zip(*parts, low, high, strict=True)
        passing_on = coupling[:, where, where].unbind(2)
        for i, (t, s, was, step, moved, least, most) in reversed(list(enumerate(columns))):
            torch.div(t, s, out=step).round_()
            torch.clamp(step, least, most, out=step)
            torch.addcmul(was, step, s, value=-1, out=moved)
            if i:
                target[:, :i].addcmul_(passing_on[i][:, :i, None], moved[:, None])
        self.codes[:, where] = steps.add_(zero).to(torch.uint8)
        self.error[:, where] += change
        return change

    def _limits(self, where: slice) -> tuple[Any, Sequence[Any], Sequence[Any]]:
        """The zeros of a small block, and the least and the greatest step of each column."""
        middle, top = self.grid.middle, self.grid.top
        if self.grid.symmetric:
            count = where.stop - where.start
            return middle, [-middle] * count, [top - middle] * count
        zero = _arrange(self.zeros, self.group[:, where])
        return zero, (-zero).unbind(1), (top - zero).unbind(1)

    def _refit(self) -> None:
        """Set each row's scales to those of least cost for its codes, where that is less.

        With steps q = code - zero, a row is the sum over groups of s_g q_g, and its cost is
        s' gram s - 2 pull' s and a constant. The ridge that damping added counts as well.
        """
        steps = _arrange(self.codes, self.factors.order.argsort(1)).to(torch.float32)
        self._change_groups(steps, Tensor.sub_, self.zeros)
        weight, ridge = self.original.mT, self.factors.ridge[..., None]
        for e, r in self._refit_chunks():
            part = steps[e, :, r]
            gram = _gram(part, self.hessian[e], ridge[e], self.grid)
            pull = torch.addcmul(self._response[e, :, r], ridge[e], weight[e, :, r]).mul_(part)
            pull = _sums(pull, self.grid).mT
            self.scales[e, :, r] = _least(gram, pull, self.scales[e, :, r].mT, self.grid).mT
        self._change_groups(steps, Tensor.mul_, self.scales)
        torch.sub(self.weight, _arrange(steps, self.factors.order), out=self.error)

    def _change_groups(
        self, columns: Tensor, change: Callable[[Tensor, Tensor], object], grouped: Tensor
    ) -> None:
        """Change [E, C, R], in original order, in place by what each group has, [E, G, R]."""
        parts = torch.split(columns, self.width, dim=1)
        for part, each in zip(parts, grouped.unbind(1), strict=True):
            change(part, each[:, None])

    def _refit_chunks(self) -> Iterator[tuple[slice, slice]]:
        """Slices of members and rows whose largest temporary stays below REFIT_ELEMENTS."""
        members, columns, rows = self.weight.shape
        each = columns + self.grid.groups(columns) ** 2
        affordable = room(REFIT_ELEMENTS, self.weight) // each
        r = min(rows, max(1, affordable // WHOLE_ROWS * WHOLE_ROWS or affordable))
        e = min(members, max(1, affordable // r))
        for i, j in product(range(0, members, e), range(0, rows, r)):
            yield slice(i, i + e), slice(j, j + r)


def _gram(steps: Tensor, hessian: Tensor, ridge: Tensor, grid: Grid) -> Tensor:
    """[E, R, G, G]: a row's scales s add s' gram s to its cost.

    steps [E, C, R], codes less zeros; hessian [E, C, C]; ridge [E, C, 1]
    """
    members, columns, rows = steps.shape
    width, groups = grid.width(columns), grid.groups(columns)
    gram = steps.new_empty(members, rows, groups, groups)
    for g, start in enumerate(range(0, columns, width)):
        group = slice(start, min(start + width, columns))
        # half of a symmetric matrix is enough
        response = torch.bmm(hessian[:, start:, group], steps[:, group])
        response[:, :width].addcmul_(ridge[:, group], steps[:, group])
        gram[:, :, g:, g] = gram[:, :, g, g:] = _sums(response.mul_(steps[:, start:]), grid).mT
    return gram


def _sums(columns_first: Tensor, grid: Grid) -> Tensor:
    """[E, C, R] to [E, G, R]: over each group's columns."""
    members, columns, rows = columns_first.shape
    missing = grid.groups(columns) * grid.width(columns) - columns
    if missing:
        columns_first = torch.nn.functional.pad(columns_first, (0, 0, 0, missing))
    return columns_first.reshape(members, -1, grid.width(columns), rows).sum(2)


def _least(gram: Tensor, pull: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The scales [E, R, G] of least cost, row by row; those given where that is not less.

    gram [E, R, G, G] and pull [E, R, G]: the cost is s' gram s - 2 pull' s
    """
    # In units in which gram has a unit diagonal, and held lightly to the given scales: a group
    # whose codes are all zero has no say in the cost and keeps its scale.
    size = gram.diagonal(dim1=2, dim2=3)
    size = torch.where(size > 0, size, 1).sqrt()
    system = gram / size[..., None] / size[..., None, :]
    system.diagonal(dim1=2, dim2=3).add_(HOLD)
    factor, _ = torch.linalg.cholesky_ex(system)
    wanted = pull / size + HOLD * scales * size
    fitted = torch.cholesky_solve(wanted[..., None], factor)[..., 0] / size
    # A group that inputs hardly reach would be blown up without bounds to make up for the others.
    fitted = as_stored(scales * (fitted / scales).clamp(1 / STRETCH, STRETCH), grid)

    def cost(s: Tensor) -> Tensor:
        return ((gram @ s[..., None])[..., 0] * s).sum(-1) - 2 * (pull * s).sum(-1)

    return torch.where((cost(fitted) < cost(scales))[..., None], fitted, scales)
