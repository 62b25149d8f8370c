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

**Declined.** Reordering what is stored: groups are those of the original columns, whatever the
order of work. Zeroing columns that no input reached: they are rounded like any other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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

BLOCK = 128
SMALL_BLOCK = 16
REFIT_ELEMENTS = 2**24  # of the largest temporary of a refit
HOLD = 1e-5
PIECE = 1024
STRIP = 256


@dataclass(frozen=True)
class GptqResult:
    """What came out, and what it took.

    stack         codes, scales and zeros of all members
    damping       the share that each member's factorisation needed
    error         [E] float32, relative output error sqrt(tr(dW H dW') / tr(W H W')); 0 if H is 0
    unfactorable  members whose Hessian no damping made positive; they were rounded to nearest
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
    hessian    [E, C, C] float32, the mean of x x' over each member's inputs
    damping    share of each column's own moment to add to it, in (0, 1]; a member that cannot be
               factorised climbs in steps of ten up to 1
    act_order  static: columns with larger moments first; none: as they come
    rounds     of refit and sweep after the first pass; 0 is plain GPTQ
    Raises ValueError naming the member if an input is not finite.
    """
    _check(weight, hessian, damping)
    moments = hessian.diagonal(dim1=1, dim2=2)
    order = _order(moments, act_order)
    factors = _factor(hessian, order, damping)
    importance = factors.importance if scales == "activation" else None
    group_scales, zeros = choose_scales(weight, grid, importance)
    solver = _Solver(weight, order, group_scales, zeros, grid)
    solver.sweep(factors.passed_on, first=True)
    pull = torch.bmm(hessian, weight.mT)  # [E, C, R]
    whole = (pull * weight.mT).sum((1, 2))
    pull.addcmul_(factors.ridge[..., None], weight.mT)
    for _ in range(rounds):
        solver.refit(hessian, pull, factors.ridge)
        solver.sweep(factors.shared)
    stack = solver.stack()
    _round_to_nearest(stack, factors.unfactorable, weight, moments)
    change = dequantize(stack).sub_(weight)
    lost = torch.bmm(change, hessian).mul_(change).sum((1, 2)).clamp_(min=0)
    error = torch.where(whole > 0, lost / whole, 0).sqrt()
    return GptqResult(stack, factors.damping, error, factors.unfactorable)


def _check(weight: Tensor, hessian: Tensor, damping: float) -> None:
    members, _, columns = weight.shape
    if hessian.shape != (members, columns, columns):
        raise ValueError(
            f"hessian is {list(hessian.shape)}: weight {list(weight.shape)} "
            f"takes {[members, columns, columns]}"
        )
    if not 0 < damping <= 1:
        raise ValueError(f"damping is {damping}: accepted are shares above 0, up to 1")
    for name, tensor in (("weight", weight), ("Hessian", hessian)):
        finite = tensor.sum((1, 2)).isfinite().tolist()
        if not all(finite):
            raise ValueError(f"the {name} of member {finite.index(False)} has NaN or infinity")


def _order(moments: Tensor, act_order: str) -> Tensor:
    """[E, C]: the columns in reverse order of work."""
    if act_order == "static":
        return moments.argsort(dim=1, descending=True, stable=True).flip(1)
    return torch.arange(moments.shape[1], device=moments.device).flip(0).expand(moments.shape)


@dataclass(frozen=True)
class _Factors:
    """What the damped Hessian says of the columns.

    passed_on   [E, C, C], strictly upper: M', what j makes up for of the error of each column
                before it; like `shared` in reverse order of work, hence upper
    shared      [E, C, C], zero diagonal: H_jk / H_jj
    importance  [E, C], original order: D, what is left of a column's moment given the later ones
    ridge       [E, C], original order: what damping added to the diagonal
    """

    passed_on: Tensor
    shared: Tensor
    importance: Tensor
    ridge: Tensor
    damping: tuple[float, ...]
    unfactorable: tuple[int, ...]


def _factor(hessian: Tensor, order: Tensor, damping: float) -> _Factors:
    moments = hessian.diagonal(dim1=1, dim2=2).gather(1, order)
    ordered = _permute(hessian, order)
    diagonal = ordered.diagonal(dim1=1, dim2=2)
    diagonal += moments == 0  # any number does for a column that nothing is coupled to
    lower, used, unfactorable = _climb(ordered, moments.clamp(min=0), damping)
    ridge = moments.clamp(min=0) * moments.new_tensor(used)[:, None]
    diagonal += ridge
    shared = ordered.div_(diagonal.clone()[:, :, None])
    diagonal.zero_()
    pivots = lower.diagonal(dim1=1, dim2=2).clone()
    lower.div_(pivots[:, None]).diagonal(dim1=1, dim2=2).zero_()
    left = pivots.square() * (moments > 0)
    return _Factors(
        passed_on=lower.mT,
        shared=shared,
        importance=torch.zeros_like(left).scatter_(1, order, left),
        ridge=torch.zeros_like(ridge).scatter_(1, order, ridge),
        damping=used,
        unfactorable=unfactorable,
    )


def _permute(hessian: Tensor, order: Tensor) -> Tensor:
    """hessian with the rows and columns of each member in the given order."""
    # member by member: half the time of two batched gathers on the CPU
    permuted = torch.empty_like(hessian)
    for member, indices, out in zip(hessian, order, permuted, strict=True):
        torch.index_select(member.index_select(0, indices), 1, indices, out=out)
    return permuted


def _climb(
    hessian: Tensor, moments: Tensor, damping: float
) -> tuple[Tensor, tuple[float, ...], tuple[int, ...]]:
    """Factor hessian + damping * moments = L L', L lower; members that fail climb alone.

    Returns L (1 for those that fail at damping 1 as well), the damping used and who failed.
    """

    def factor_at(members: Tensor, share: float) -> tuple[Tensor, list[int]]:
        damped = hessian[members]
        damped.diagonal(dim1=1, dim2=2).add_(share * moments[members])
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
    return lower, tuple(used), tuple(failed)


def _arrange(columns_first: Tensor, order: Tensor) -> Tensor:
    """[E, C, K] with its columns in the given order, contiguous."""
    return columns_first.gather(1, order[..., None].expand(-1, -1, columns_first.shape[-1]))


class _Solver:
    """Codes and scales of a stack while they are being decided.

    Columns come first, so that a column of all rows of a member is contiguous. They lie in reverse
    order of work: Cholesky's factor of a matrix in that order is M D^(1/2) in the order of work.
    """

    def __init__(
        self, weight: Tensor, order: Tensor, scales: Tensor, zeros: Tensor, grid: Grid
    ) -> None:
        columns = weight.shape[-1]
        self.grid = grid
        self.order = order
        self.group = order // grid.width(columns)  # [E, C]
        self.weight = _arrange(weight.mT, order)
        self.scales = scales.mT.contiguous()  # [E, G, R]
        self.zeros = zeros.mT.to(torch.float32)
        self.codes = torch.zeros_like(self.weight, dtype=torch.uint8)
        self.error = torch.zeros_like(self.weight)  # weight less its rounded value

    def stack(self) -> QuantizedStack:
        codes = _arrange(self.codes, self.order.argsort(1)).mT.contiguous()
        zeros = self.zeros.to(torch.uint8).mT.contiguous()
        return QuantizedStack(codes, self.scales.mT.contiguous(), zeros, self.grid)

    def sweep(self, coupling: Tensor, *, first: bool = False) -> None:
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
        zero = _arrange(self.zeros, self.group[:, where])
        before = self.weight[:, where] - self.error[:, where]
        steps, change = torch.empty_like(target), torch.empty_like(target)
        low, high = -zero, self.grid.top - zero
        columns = zip(*(x.unbind(1) for x in (target, scale, low, high, before)), strict=True)
        passing_on = coupling[:, where, where].unbind(2)
        for i, (t, s, lo, hi, was) in reversed(list(enumerate(columns))):
            step = torch.div(t, s, out=steps[:, i]).round_()
            torch.clamp(step, lo, hi, out=step)
            moved = torch.addcmul(was, step, s, value=-1, out=change[:, i])
            target[:, :i].addcmul_(passing_on[i][:, :i, None], moved[:, None])
        self.codes[:, where] = steps.add_(zero).to(torch.uint8)
        self.error[:, where] += change
        return change

    def refit(self, hessian: Tensor, pull: Tensor, ridge: Tensor) -> None:
        """Set each row's scales to those of least cost for its codes, where that is less.

        pull is (hessian + ridge) @ weight, [E, C, R]; like hessian and ridge, in original order.
        """
        back = self.order.argsort(1)
        steps = _arrange(self.codes, back) - self._per_column(self.zeros)
        for e, r in self._chunks():
            gram = _gram(steps[e, :, r], hessian[e], ridge[e], self.grid)
            wanted = _sums(pull[e, :, r] * steps[e, :, r], self.grid)
            self.scales[e, :, r] = _least(gram, wanted.mT, self.scales[e, :, r].mT).mT
        rounded = _arrange(steps.mul_(self._per_column(self.scales)), self.order)
        torch.sub(self.weight, rounded, out=self.error)

    def _per_column(self, grouped: Tensor) -> Tensor:
        """[E, G, R] to [E, C, R], columns in original order."""
        columns = self.weight.shape[1]
        return grouped.repeat_interleave(self.grid.width(columns), 1)[:, :columns]

    def _chunks(self) -> Iterator[tuple[slice, slice]]:
        """Slices of members and rows such that a refit's temporaries stay within bounds."""
        members, columns, rows = self.weight.shape
        each = columns + self.grid.groups(columns) ** 2
        r = min(rows, max(1, REFIT_ELEMENTS // each))
        e = min(members, max(1, REFIT_ELEMENTS // (each * r)))
        for i in range(0, members, e):
            for j in range(0, rows, r):
                yield slice(i, i + e), slice(j, j + r)


def _gram(steps: Tensor, hessian: Tensor, ridge: Tensor, grid: Grid) -> Tensor:
    """[E, R, G, G]: scales s [G] of a row add s' gram s to its cost; steps [E, C, R]."""
    columns, width = steps.shape[1], grid.width(steps.shape[1])
    product = torch.empty(steps.shape, device=steps.device)
    gram = []
    for i in range(0, columns, width):
        group = slice(i, min(i + width, columns))
        torch.bmm(hessian[:, :, group], steps[:, group], out=product)
        gram.append(_sums(product.mul_(steps), grid))
    square = torch.stack(gram, 1).permute(0, 3, 1, 2).contiguous()
    own = _sums(torch.mul(steps, steps, out=product).mul_(ridge[..., None]), grid)
    square.diagonal(dim1=2, dim2=3).add_(own.mT)
    return square


def _sums(columns_first: Tensor, grid: Grid) -> Tensor:
    """[E, C, R] to [E, G, R]: over each group's columns."""
    columns = columns_first.shape[1]
    missing = grid.groups(columns) * grid.width(columns) - columns
    if missing:
        columns_first = torch.nn.functional.pad(columns_first, (0, 0, 0, missing))
    members, _, rows = columns_first.shape
    return columns_first.reshape(members, -1, grid.width(columns), rows).sum(2)


def _least(gram: Tensor, pull: Tensor, scales: Tensor) -> Tensor:
    """The scales [E, R, G] of least cost, row by row; the ones given where they cost no more."""
    # In units in which gram has a unit diagonal, held lightly to the given scales: a group whose
    # codes are all zero has no say in the cost and keeps its scale.
    size = gram.diagonal(dim1=2, dim2=3)
    size = torch.where(size > 0, size, 1).sqrt()
    system = gram / size[..., None] / size[..., None, :]
    system.diagonal(dim1=2, dim2=3).add_(HOLD)
    factor, _ = torch.linalg.cholesky_ex(system)
    wanted = pull / size + HOLD * scales * size
    fitted = torch.cholesky_solve(wanted[..., None], factor)[..., 0] / size
    fitted = as_stored(torch.where(fitted * scales > 0, fitted, scales))

    def cost(s: Tensor) -> Tensor:
        return ((gram @ s[..., None])[..., 0] * s).sum(-1) - 2 * (pull * s).sum(-1)

    return torch.where((cost(fitted) < cost(scales))[..., None], fitted, scales)


def _round_to_nearest(
    stack: QuantizedStack, members: Sequence[int], weight: Tensor, moments: Tensor
) -> None:
    """Overwrite members of the stack with their nearest codes under activation-weighted scales."""
    for e in members:
        nearest = rtn(weight[e : e + 1], stack.grid, moments[e : e + 1].clamp(min=0))
        stack.codes[e], stack.scales[e] = nearest.codes[0], nearest.scales[0]
        stack.zeros[e] = nearest.zeros[0]


def accumulate_hessian(hessian: Tensor, inputs: Tensor, counts: Sequence[int] = ()) -> None:
    """Fold tokens into a running SUM of x x', in float32; the caller counts them.

    hessian  [C, C] or [E, C, C] float32, symmetric, changed in place; zeros before the first tokens
    inputs   [T, C], any float dtype; T may be 0
    counts   for [E, C, C]: so many tokens of each member, one member after the other
    Raises ValueError if the counts do not fit.
    """
    if hessian.dim() == 2:
        _add_products(hessian, inputs)
        return
    if len(counts) != len(hessian) or sum(counts) != len(inputs):
        raise ValueError(
            f"{len(counts)} counts of {sum(counts)} tokens: "
            f"{len(hessian)} members and {len(inputs)} tokens are given"
        )
    for member, tokens in zip(hessian, torch.split(inputs, list(counts)), strict=True):
        _add_products(member, tokens)


def shrink_towards(hessian: Tensor, tokens: int, prior: Tensor, minimum_tokens: int) -> Tensor:
    """a hessian + (1 - a) prior, a = min(1, tokens / minimum_tokens): for experts that saw little.

    hessian and prior are means over tokens, of one shape.
    """
    if tokens >= minimum_tokens:
        return hessian
    return torch.lerp(prior, hessian, tokens / minimum_tokens)


def _add_products(hessian: Tensor, inputs: Tensor) -> None:
    if not _multiplies(inputs):
        inputs = inputs.to(torch.float32)
    columns = hessian.shape[0]
    for piece in torch.split(inputs, PIECE):
        # a strip at a time from its own diagonal on: half of a symmetric matrix is enough
        for a in range(0, columns, STRIP):
            b = min(a + STRIP, columns)
            product = _product(piece[:, a:b], piece[:, a:])
            hessian[a:b, a:] += product
            hessian[b:, a:b] += product[:, b - a :].T


def _multiplies(inputs: Tensor) -> bool:
    """Whether the hardware multiplies this dtype as it is and sums in float32."""
    if inputs.is_cuda:
        return inputs.dtype in (torch.bfloat16, torch.float16)
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported and inputs.dtype == torch.bfloat16


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left' right, float32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    # On the CPU torch rounds a bfloat16 product to bfloat16 on its way out. Four times the speed
    # (AMX) for 0.16 % noise in each sum over PIECE tokens, where chance alone leaves 3 %.
    return torch.mm(left.T, right).to(torch.float32)
