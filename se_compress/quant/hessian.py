"""Second moments of a matrix's inputs: summed, mixed with a prior, damped and factorised.

E experts, R rows (out features), C columns (in features).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 4096  # tokens in one product of activations
PIECE_STEP = 256  # tokens that its size is a multiple of
# Columns of a Hessian in one product. Narrower strips skip more of the half that is known, until
# the product itself slows down.
STRIP = {"cpu": 128, "cuda": 256}


def room(elements: dict[str, int], like: Tensor) -> int:
    """The entry for a tensor's device; accelerators that have none of their own count as cuda."""
    return elements.get(like.device.type, elements["cuda"])


# --------------------------------------------------------------------------------------------- sums


def accumulate_hessian(hessian: Tensor, inputs: Tensor) -> None:
    """Fold tokens into a running SUM of x x', in float32; the caller counts them.

    hessian  [C, C] float32, symmetric up to rounding, changed in place; zeros before the first
             tokens
    inputs   [T, C], any float dtype; T may be 0
    """
    if not _multiplies(inputs):
        inputs = inputs.to(torch.float32)
    columns, width = hessian.shape[0], room(STRIP, inputs)
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


def mean_square(inputs: Tensor) -> Tensor:
    """Mean square of each column of inputs [n, C], float32 [C]; zeros for no input. The diagonal of
    their Hessian."""
    return inputs.float().square().sum(dim=0) / max(1, len(inputs))


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
    """total [a, b] += left' right of left [T, a] and right [T, b], summed in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    elif left.is_cuda:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        # On the CPU torch rounds a bfloat16 product to bfloat16 on its way out. A fourth of the
        # time (AMX; half with avx512_bf16), for 0.16 % noise in the sum over a PIECE of tokens, of
        # which chance alone makes 1.5 %.
        total += torch.mm(left.T, right)


# ------------------------------------------------------------------------------------------ factors


@dataclass(frozen=True)
class Factors:
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


def factorise(hessian: Tensor, damping: float, act_order: str) -> Factors:
    """Damp and factorise Hessians [E, C, C] float32, which are left as they are.

    With the columns in the order that `act_order` asks for, H = L L', L lower triangular. Divided
    by its pivots L is M, unit lower here because the order is that of work reversed; the squares
    of the pivots are D.
    """
    moments = hessian.diagonal(dim1=1, dim2=2)
    order = _order(moments, act_order)
    ordered = _permute(hessian, order)
    diagonal = ordered.diagonal(dim1=1, dim2=2)
    positive = moments.clamp(min=0)
    lower, used, failed = _climb(ordered, positive.gather(1, order), damping)
    # from here on `ordered` is the damped Hessian: `_climb` worked on copies
    ridge = positive * moments.new_tensor(used)[:, None]
    diagonal += ridge.gather(1, order) + (diagonal == 0)
    # `diagonal` is a view of what is divided by it
    shared = ordered.div_(diagonal.clone()[:, :, None])
    diagonal.zero_()
    shared[failed] = 0
    pivots = lower.diagonal(dim1=1, dim2=2).clone()
    lower.div_(pivots[:, None]).diagonal(dim1=1, dim2=2).zero_()
    left = torch.zeros_like(moments).scatter_(1, order, pivots.square())
    return Factors(
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
    """[E, C] int64: the columns of moments [E, C], the one to work on first at the end."""
    if act_order == "static":
        return moments.argsort(dim=1, descending=True, stable=True).flip(1)
    return torch.arange(moments.shape[1], device=moments.device).flip(0).expand(moments.shape)


def _permute(hessian: Tensor, order: Tensor) -> Tensor:
    """The Hessian [E, C, C] with the rows and columns of each member in the order [E, C]."""
    # member by member: half the time of two batched gathers on the CPU
    permuted = torch.empty_like(hessian)
    for member, indices, out in zip(hessian, order, permuted, strict=True):
        torch.index_select(member.index_select(0, indices), 1, indices, out=out)
    return permuted


def _climb(
    hessian: Tensor, moments: Tensor, damping: float
) -> tuple[Tensor, list[float], list[int]]:
    """Factor hessian [E, C, C] + damping * moments [E, C] = L L'; members that fail climb alone.

    Returns L [E, C, C], lower (the unit matrix for those that fail at damping 1 as well); the
    damping that each member got; and the members that failed.
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
