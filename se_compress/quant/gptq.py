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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from se_compress.quant.grid import Grid, QuantizedStack
from se_compress.quant.hessian import factorise, room
from se_compress.quant.sweep import RowSlice

# Weights and Hessian elements that are worked on together, about nine float32 copies of them. More
# costs the CPU page faults (64 x 512 x 512: a fifth of the time), less a GPU its parallelism.
WORKING_SET = {"cpu": 2**23, "cuda": 2**29}


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
        factors = factorise(hessian[e], damping, act_order)
        used += factors.damping
        failed += [e.start + member for member in factors.failed]
        for r in row_slices:
            some = RowSlice(tall[e, r], hessian[e], factors, grid)
            made = some.quantize(scales, rounds)
            codes[e, r], group_scales[e, r], zeros[e, r] = made.codes, made.scales, made.zeros
            lost[e, r], whole[e, r] = some.lost(made), some.whole()
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
    affordable = room(WORKING_SET, weight) // columns
    size = max(1, affordable // (rows + columns))
    most = max(1, rows if size > 1 else affordable)
    row_slices = [slice(r, min(r + most, rows)) for r in range(0, rows, most)]
    for start in range(0, members, size):
        yield slice(start, min(start + size, members)), row_slices
