"""GPTQ over stacks of experts.

E experts, R rows (out features), C columns (in features), G groups.

The algorithm. Rounding W to Q costs tr((W - Q) H (W - Q)') on calibration inputs with second moment
H. With H = M D M', M unit upper triangular and D diagonal, that is the sum over columns j of
D_j |(W - Q)_j + sum_k<j (W - Q)_k M_kj|^2, so each column in turn is rounded at

    W_j + sum over k < j of (W - Q)_k M_kj

which undoes what the columns before did. This is GPTQ (arXiv:2210.17323) in the form of QuIP's LDLQ
(arXiv:2307.13304, theorem 6 shows that they are one): the same roundings as with the Cholesky
factor of the inverse Hessian, without inverting anything.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from se_compress.quant.grid import (
    Grid,
    QuantizedStack,
    choose_scales,
    dequantize,
    per_column,
)

BLOCK = 128
SMALL_BLOCK = 16


@dataclass(frozen=True)
class GptqResult:
    """What came out, and what it took.

    stack         codes, scales and zeros of all members
    damping       the share of the mean diagonal that each member's factorisation needed
    error         [E] float32, relative output error sqrt(tr(dW H dW') / tr(W H W'))
    unfactorable  members that no damping made factorable; they are rounded to nearest
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
    damping: float = 0.01,
    act_order: Literal["static", "none"] = "static",
    scales: Literal["activation", "minmax"] = "activation",
) -> GptqResult:
    """Quantize a stack [E, R, C] float32 under hessian [E, C, C] float32, the mean of x x'."""
    _check(weight, hessian)
    columns = weight.shape[-1]
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if act_order == "static":
        order = diagonal.argsort(dim=1, descending=True, stable=True)
    else:
        order = torch.arange(columns, device=weight.device).expand(len(weight), columns)
    ordered = hessian.gather(1, order[..., None].expand_as(hessian))
    ordered = ordered.gather(2, order[:, None].expand_as(hessian))
    feedback, used, unfactorable = _factor(ordered, damping)
    group_scales, zeros = choose_scales(
        weight, grid, diagonal if scales == "activation" else None
    )

    def arranged(x: Tensor) -> Tensor:  # [E, R, C] to [E, C, R], columns in order
        return x.mT.gather(1, order[..., None].expand(-1, -1, x.shape[1])).contiguous()

    scale = arranged(per_column(group_scales, columns, grid))
    zero = arranged(per_column(zeros, columns, grid)).float()
    steps = _sweep(arranged(weight), feedback, scale, -zero, grid.top - zero)
    back = order.argsort(dim=1)[..., None].expand_as(steps)
    codes = (steps + zero).gather(1, back).mT.contiguous().to(torch.uint8)
    stack = QuantizedStack(codes, group_scales, zeros, grid)
    return GptqResult(stack, used, _relative_error(weight, stack, hessian), unfactorable)


def _check(weight: Tensor, hessian: Tensor) -> None:
    for e, member in enumerate(hessian):
        if not torch.isfinite(member).all():
            raise ValueError(f"the Hessian of member {e} holds NaN or infinity")


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, tuple[float, ...], tuple[int, ...]]:
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    feedback = torch.zeros_like(hessian)
    pending = list(range(len(hessian)))
    used = [damping] * len(hessian)
    while pending and damping <= 1:
        damped = hessian[pending]
        damped.diagonal(dim1=1, dim2=2).add_(damping * mean[pending, None])
        lower, info = torch.linalg.cholesky_ex(damped.flip(1, 2))
        upper = lower.flip(1, 2)
        upper = upper / upper.diagonal(dim1=1, dim2=2)[:, None]
        failed = []
        for i, e in enumerate(pending):
            used[e] = damping
            if info[i] == 0 and torch.isfinite(upper[i]).all():
                feedback[e] = upper[i].T.tril(-1)
            else:
                failed.append(e)
        pending = failed
        damping *= 10
    return feedback, tuple(used), tuple(pending)


def _sweep(weight: Tensor, feedback: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    columns = weight.shape[1]
    error = torch.zeros_like(weight)
    steps = torch.zeros_like(weight)
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        target = torch.baddbmm(weight[:, a:b], feedback[:, a:b, :a], error[:, :a])
        for c in range(a, b, SMALL_BLOCK):
            d = min(c + SMALL_BLOCK, b)
            t = torch.baddbmm(target[:, c - a : d - a], feedback[:, c:d, a:c], error[:, a:c])
            for j in range(c, d):
                q = (t[:, j - c] / scale[:, j]).round_()
                q = torch.clamp(q, low[:, j], high[:, j])
                steps[:, j] = q
                e = torch.addcmul(weight[:, j], q, scale[:, j], value=-1)
                error[:, j] = e
                if j + 1 < d:
                    t[:, j - c + 1 :].addcmul_(feedback[:, j + 1 : d, j : j + 1], e[:, None])
    return steps


def _relative_error(weight: Tensor, stack: QuantizedStack, hessian: Tensor) -> Tensor:
    change = dequantize(stack) - weight
    lost = (torch.bmm(change, hessian) * change).sum((1, 2))
    whole = (torch.bmm(weight, hessian) * weight).sum((1, 2))
    return (lost.clamp(min=0) / whole).sqrt()
