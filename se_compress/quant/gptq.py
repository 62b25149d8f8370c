"""GPTQ over stacks of experts: all members at once, one column at a time.

E experts, R rows (out features), C columns (in features), G groups.

**The algorithm.** Rounding W to Q costs tr((W - Q) H (W - Q)') on inputs with second moment H.
With H = M D M', M unit upper triangular and D diagonal, that is the sum over columns j of
D_j |(W - Q)_j + sum over k < j of (W - Q)_k M_kj|^2. So each column in turn is rounded at

    W_j + sum over k < j of (W - Q)_k M_kj

where it makes up for what the columns before it did. This is GPTQ (arXiv:2210.17323) as LDLQ writes
it (arXiv:2307.13304, theorem 6: the roundings are the same) and needs no inverse of H. Then come
`rounds` of two steps, neither of which raises the cost:

    refit   all scales of a row together, in closed form: the cost is a quadratic of G unknowns
    sweep   each column again, best given all others: W_j + sum over k of (W - Q)_k H_kj / H_jj

Measured on the experts of a real model (576 in, 128 and 64 out; group 64; 8,192 tokens), error on
text that was not calibrated on, gate and up | down, whose inputs have massive activations:

    damping by each column's own moment, 0.2, not by 0.01 of the mean     -3 % | -41 %
    scales chosen under D, not under the diagonal of H                    -4 % |   0 %
    act_order static, not none                                            -3 % | -43 %
    two rounds, 4 bits                                                    -7 % | -20 %
    two rounds, 2 bits                                                    -9 % | -25 %

A mean that one channel dominates drowns all the others; a share of their own leaves each its say.

**Cost.** (5 + 4 rounds) C^2 R + C^3 / 3 flops a member, and five small element-wise operations a
column and pass, whatever the number of members and rows.

**Declined.** Reordering what is stored: groups are those of the original columns, whatever the
order of work. Zeroing columns that no input reached: they are rounded like any other. Choosing
scales again from the weights as they are when their group's turn comes: 2 to 8 % more error.
Members in threads of Python: no faster on two cores, and slower where they are small, for the small
operations wait for each other in the interpreter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

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

BLOCK = 128  # columns whose effect on the others is one product of matrices
SMALL_BLOCK = 16  # columns that are settled one by one

# Weights and Hessian elements that are worked on together, about nine float32 copies of them. More
# costs the CPU page faults (64 x 512 x 512: a fifth of the time), less a GPU its parallelism.
WORKING_SET = {"cpu": 2**23, "cuda": 2**29}
REFIT_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}  # of the largest temporary of a refit

HOLD = 1e-5  # how hard a refit holds on to the scales it starts from
STRETCH = 2.0  # the most by which a refit may change a scale
PIECE = 4096  # tokens in one product of activations
PIECE_STEP = 256  # tokens that its size is a multiple of
# Columns of a Hessian in one product. Narrower strips skip more of the half that is known, until
# the product itself slows down.
STRIP = {"cpu": 128, "cuda": 256}


@dataclass(frozen=True)
class GptqResult:
    """What came out, and what it took.

    stack         codes, scales and zeros of all members
    damping       the share that each member's factorisation needed
    error         [E] float32, relative output error sqrt(tr(dW H dW') / tr(W H W')); 0 if H is 0
    unfactorable  members whose Hessian no damping made positive: rounded to nearest, and their
                  error is under its diagonal
    """

    stack: QuantizedStack
    damping: tuple[float, ...]
    error: Tensor
    unfactorable: tuple[int, ...]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = 0.2,
    act_order: Literal["static", "none"] = "static",
    scales: Literal["activation", "minmax"] = "activation",
    rounds: int = 2,
) -> GptqResult:
    """Quantize a stack so that its outputs change least.

    weight     [E, R, C] float32
    hessian    [E, C, C] float32, the mean of x x' over each member's inputs; or [1, C, C] if all
               see the same: it is factorised once
    damping    share of each column's own moment to add to it, above 0, up to 1; a member that
               cannot be factorised climbs in steps of ten up to 1
    act_order  static: columns with larger moments first; none: as they come
    rounds     of refit and sweep after the first pass; 0 is plain GPTQ
    Raises ValueError if shapes do not fit or an input is not finite.
    """
    _check(weight, hessian, damping)
    sharing = len(weight) // len(hessian)  # members under one Hessian are rows of one member
    tall = weight.reshape(len(hessian), -1, weight.shape[2])
    codes = torch.empty_like(tall, dtype=torch.uint8)
    group_scales = tall.new_empty(*tall.shape[:2], grid.groups(tall.shape[2]))
    zeros = torch.empty_like(group_scales, dtype=torch.uint8)
    lost, whole = torch.empty_like(tall[:, :, 0]), torch.empty_like(tall[:, :, 0])
    used: list[float] = []
    failed: list[int] = []
    for e, row_slices in _chunks(tall):
        factors = _factor(hessian[e], damping, act_order)
        used += factors.damping
        failed += [e.start + member for member in factors.failed]
        for r in row_slices:
            part = _Part(tall[e, r], hessian[e], factors, grid)
            made = part.quantize(scales, rounds)
            codes[e, r], group_scales[e, r], zeros[e, r] = made.codes, made.scales, made.zeros
            lost[e, r], whole[e, r] = part.lost(made), part.whole()
    apart = (*weight.shape[:2], -1)
    stack = QuantizedStack(codes.view(apart), group_scales.view(apart), zeros.view(apart), grid)
    energy = whole.view(weight.shape[:2]).sum(1)
    share = lost.view(weight.shape[:2]).sum(1).clamp(min=0) / energy
    return GptqResult(
        stack,
        tuple(share for share in used for _ in range(sharing)),
        torch.where(energy > 0, share, 0).sqrt(),
        tuple(member * sharing + i for member in failed for i in range(sharing)),
    )


def _check(weight: Tensor, hessian: Tensor, damping: float) -> None:
    members, _, columns = weight.shape
    if hessian.shape not in ((members, columns, columns), (1, columns, columns)):
        raise ValueError(
            f"hessian is {list(hessian.shape)}: weight {list(weight.shape)} "
            f"takes {[members, columns, columns]} or {[1, columns, columns]}"
        )
    if not 0 < damping <= 1:
        raise ValueError(f"damping is {damping}: accepted are shares above 0, up to 1")
    for name, tensor in (("weight", weight), ("Hessian", hessian)):
        finite = tensor.sum((1, 2)).isfinite().tolist()
        if not all(finite):
            raise ValueError(f"the {name} of member {finite.index(False)} has NaN or infinity")


def _chunks(weight: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of members, and of the rows of each, that make a working set."""
    members, rows, columns = weight.shape
    room = _room(WORKING_SET, weight) // columns
    size = max(1, room // (rows + columns))
    most = max(1, rows if size > 1 else room)
    row_slices = [slice(r, min(r + most, rows)) for r in range(0, rows, most)]
    for start in range(0, members, size):
        yield slice(start, min(start + size, members)), row_slices


def _room(elements: dict[str, int], like: Tensor) -> int:
    return elements.get(like.device.type, elements["cuda"])


# ------------------------------------------------------------------------------------ the Hessian


@dataclass(frozen=True)
class _Factors:
    """What the damped Hessians of a few members say of their columns.

    order       [E, C]: the columns, last one to work on first
    passed_on   [E, C, C] in that order, strictly upper: M', the share of an earlier column's error
                that j makes up for
    shared      [E, C, C] in that order, zero diagonal: H_jk / H_jj
    moments     [E, C]: the diagonal of H, none negative
    ridge       [E, C]: what damping added to it
    importance  [E, C]: D, what a column's rounding costs once the later ones made up for it
    failed      members that could not be factorised: passed_on and shared are zero there
    """

    order: Tensor
    passed_on: Tensor
    shared: Tensor
    moments: Tensor
    ridge: Tensor
    importance: Tensor
    damping: list[float]
    failed: list[int]


def _factor(hessian: Tensor, damping: float, act_order: str) -> _Factors:
    moments = hessian.diagonal(dim1=1, dim2=2)
    order = _order(moments, act_order)
    ordered = _permute(hessian, order)
    diagonal = ordered.diagonal(dim1=1, dim2=2)
    positive = moments.clamp(min=0)
    lower, used, failed = _climb(ordered, positive.gather(1, order), damping)
    ridge = positive * moments.new_tensor(used)[:, None]
    diagonal += ridge.gather(1, order) + (diagonal == 0)
    shared = ordered.div_(diagonal.clone()[:, :, None])
    diagonal.zero_()
    shared[failed] = 0
    pivots = lower.diagonal(dim1=1, dim2=2).clone()
    lower.div_(pivots[:, None]).diagonal(dim1=1, dim2=2).zero_()
    left = torch.zeros_like(moments).scatter_(1, order, pivots.square())
    return _Factors(
        order=order,
        passed_on=lower.mT,
        shared=shared,
        moments=positive,
        ridge=ridge,
        importance=torch.where(moments > 0, left, 0),
        damping=used,
        failed=failed,
    )


def _order(moments: Tensor, act_order: str) -> Tensor:
    if act_order == "static":
        return moments.argsort(dim=1, descending=True, stable=True).flip(1)
    return torch.arange(moments.shape[1], device=moments.device).flip(0).expand(moments.shape)


def _permute(hessian: Tensor, order: Tensor) -> Tensor:
    """hessian with the rows and columns of each member in the given order."""
    # member by member: half the time of two batched gathers on the CPU
    permuted = torch.empty_like(hessian)
    for member, indices, out in zip(hessian, order, permuted, strict=True):
        torch.index_select(member.index_select(0, indices), 1, indices, out=out)
    return permuted


def _climb(
    hessian: Tensor, moments: Tensor, damping: float
) -> tuple[Tensor, list[float], list[int]]:
    """Factor hessian + damping * moments = L L', L lower; members that fail climb alone.

    Returns L (1 for those that fail at damping 1 as well), the damping used and who failed.
    """

    def factor_at(members: Tensor, share: float) -> tuple[Tensor, list[int]]:
        damped = hessian[members]
        diagonal = damped.diagonal(dim1=1, dim2=2)
        # any number does for a column that no input reached: nothing is coupled to it
        diagonal += share * moments[members] + (diagonal == 0)
        factor, info = torch.linalg.cholesky_ex(damped)
        return factor, members[info != 0].tolist()

    everyone = torch.arange(len(hessian), device=hessian.device)
    lower, failed = factor_at(everyone, damping)
    used = [damping] * len(hessian)
    while failed and damping < 1:
        damping = min(1.0, damping * 10)
        climbing = everyone[failed]
        lower[climbing], failed = factor_at(climbing, damping)
        for e in climbing.tolist():
            used[e] = damping
    lower[failed] = torch.eye(hessian.shape[1], device=hessian.device)
    return lower, used, failed


# ------------------------------------------------------------------------------------- the solver


def _arrange(columns_first: Tensor, order: Tensor) -> Tensor:
    """[E, C, K] with its columns in the given order, contiguous."""
    members, columns, width = columns_first.shape
    # rows of one flat matrix: twice as fast on the CPU as a gather
    first = torch.arange(members, device=order.device)[:, None] * columns
    flat = columns_first.reshape(-1, width).index_select(0, (order + first).flatten())
    return flat.view(members, -1, width)


class _Part:
    """Some rows of some members while their codes and scales are being decided.

    Columns come first, so that a column of all rows of a member is contiguous, and lie in
    `factors.order`. That is the reverse of the order of work, because Cholesky's factor of the
    Hessian in reverse is M D^(1/2).
    """

    def __init__(self, weight: Tensor, hessian: Tensor, factors: _Factors, grid: Grid) -> None:
        self.original, self.hessian, self.factors, self.grid = weight, hessian, factors, grid
        self.width = grid.width(weight.shape[2])
        self.group = factors.order // self.width  # [E, C]
        self.weight = _arrange(weight.mT, factors.order)
        self.codes = torch.zeros_like(self.weight, dtype=torch.uint8)
        self.error = torch.zeros_like(self.weight)  # weight less its rounded value
        self.scales = self.zeros = torch.empty(0)  # [E, G, R] once they are chosen

    def quantize(self, scales: str, rounds: int) -> QuantizedStack:
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

        first: no column has an error yet, and coupling is strictly upper triangular.
        """
        for end in range(self.weight.shape[1], 0, -BLOCK):
            start = max(0, end - BLOCK)
            block, known = slice(start, end), slice(end if first else 0, None)
            target = self.weight[:, block].baddbmm(coupling[:, block, known], self.error[:, known])
            for b in range(end, start, -SMALL_BLOCK):
                a = max(start, b - SMALL_BLOCK)
                change = self._round(slice(a, b), target[:, a - start : b - start], coupling)
                target[:, : a - start].baddbmm_(coupling[:, start:a, a:b], change)

    def _round(self, where: slice, target: Tensor, coupling: Tensor) -> Tensor:
        """Round the columns of a small block in turn; returns how their errors changed."""
        scale = _arrange(self.scales, self.group[:, where])
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
        """Set each row's scales to those of least cost for its codes, where that is less."""
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
        members, columns, rows = self.weight.shape
        each = columns + self.grid.groups(columns) ** 2
        room = _room(REFIT_ELEMENTS, self.weight) // each
        r = min(rows, max(1, room))
        e = min(members, max(1, room // r))
        for i, j in product(range(0, members, e), range(0, rows, r)):
            yield slice(i, i + e), slice(j, j + r)


def _gram(steps: Tensor, hessian: Tensor, ridge: Tensor, grid: Grid) -> Tensor:
    """[E, R, G, G]: a row's scales s add s' gram s to its cost. steps are [E, C, R]."""
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
    """The scales [E, R, G] of least cost, row by row; those given where that is not less."""
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


# ------------------------------------------------------------------------------- second moments


def accumulate_hessian(hessian: Tensor, inputs: Tensor) -> None:
    """Fold tokens into a running SUM of x x', in float32; the caller counts them.

    hessian  [C, C] float32, symmetric up to rounding, changed in place; zeros before the first
             tokens
    inputs   [T, C], any float dtype; T may be 0
    """
    if not _multiplies(inputs):
        inputs = inputs.to(torch.float32)
    columns, width = hessian.shape[0], _room(STRIP, inputs)
    strips = [(a, min(a + width, columns)) for a in range(0, columns, width)]
    for piece in torch.split(inputs, PIECE):
        if piece.dtype != torch.float32:
            # a few sizes only, for oneDNN compiles a kernel for each; zeros add nothing
            piece = torch.nn.functional.pad(piece, (0, 0, 0, -len(piece) % PIECE_STEP))
        # a strip at a time from its own diagonal on: half of a symmetric matrix is enough
        for a, b in strips:
            _add_product(hessian[a:b, a:], piece[:, a:b], piece[:, a:])
    for a, b in strips:
        hessian[b:, a:b] = hessian[a:b, b:].T


def shrink_towards(hessian: Tensor, tokens: int, prior: Tensor, minimum_tokens: int) -> Tensor:
    """a hessian + (1 - a) prior, a = min(1, tokens / minimum_tokens): for experts that saw little.

    hessian and prior are means over tokens, of one shape.
    """
    return torch.lerp(prior, hessian, min(1.0, tokens / minimum_tokens))


def _multiplies(inputs: Tensor) -> bool:
    """Whether the hardware multiplies this dtype as it is and sums in float32."""
    if inputs.is_cuda:
        return inputs.dtype in (torch.bfloat16, torch.float16)
    supported: bool = torch.cpu._is_avx512_bf16_supported()
    return supported and inputs.dtype == torch.bfloat16


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left' right, float32."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    elif left.is_cuda:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        # On the CPU torch rounds a bfloat16 product to bfloat16 on its way out. A fourth of the
        # time (AMX; half with avx512_bf16), for 0.16 % noise in the sum over a PIECE of tokens, of
        # which chance alone makes 1.5 %.
        total += torch.mm(left.T, right)
