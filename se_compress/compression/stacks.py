"""A stack of matrices that are quantised together: what they see, their grid, codes and packing.

E members, R rows (out features), C columns (in features). A member is a matrix, or several that
see the same and are rows of one.

A member that saw fewer tokens than its inputs have dimensions has a singular Hessian; it is filled
up with the layer's own, see `filled_hessian`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt

import torch
from torch import Tensor

from se_compress.artifacts import SOURCE_BITS, ExpertRecord, Scheme
from se_compress.errors import SourceError
from se_compress.formats import FORMATS
from se_compress.quant.gptq import gptq
from se_compress.quant.grid import SMALLEST_SCALE, Grid, QuantizedStack, dequantize, rtn
from se_compress.quant.hessian import accumulate_hessian, shrink_towards
from se_compress.recipe import Quantization

# Weight -> its stored parts, by what follows the module's name.
Packed = dict[str, dict[str, Tensor]]
NOT_FACTORED = "Hessian could not be factorised: rounded to nearest"
BELOW_GRID = f"all weights are below half the least scale of engines, {SMALLEST_SCALE:.1e}: lost"


# ------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class StackInputs:
    """Hessians of a stack of matrices, and how they came about.

    hessian      [E, C, C] float32, mean of x x'; or [1, C, C] if all see the same; with `rows`
                 their diagonals, [E, C] or [1, C]
    tokens       [E] tokens that each saw
    prior_share  [E] share of the layer's Hessian in its own
    rows         float32 [m, C] of each member, or of all, whose x x' have the Hessian for their
                 sum: for a method that does not need it itself, which takes longer
    """

    hessian: Tensor
    tokens: list[int]
    prior_share: list[float]
    rows: Sequence[Tensor] = ()


def stack_rows(members: Sequence[tuple[Tensor, int, float]]) -> StackInputs:
    """The same from what `filled_rows` gave."""
    rows, tokens, shares = zip(*members, strict=True)
    diagonals = torch.stack([each.square().sum(0) for each in rows])
    return StackInputs(diagonals, list(tokens), list(shares), rows)


def stack_inputs(members: Sequence[tuple[Tensor, int, float]]) -> StackInputs:
    """The inputs of a stack from what `filled_hessian` gave for each member."""
    hessians, tokens, shares = zip(*members, strict=True)
    return StackInputs(torch.stack(hessians), list(tokens), list(shares))


def second_moment(inputs: Tensor) -> Tensor:
    """[C, C] float32: the mean of x x' over inputs [n, C], zeros for none."""
    moment = inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32)
    accumulate_hessian(moment, inputs)
    return moment.div_(max(1, len(inputs)))


def filled_hessian(
    inputs: Tensor, prior: Callable[[], Tensor], enough: float
) -> tuple[Tensor, int, float]:
    """Mean of x x' over an expert's own tokens [n, C], n, and the share of the prior in it.

    prior   gives the mean [C, C] that the expert would see if all tokens of the layer went to it
    enough  tokens per column that need no prior

    With n < C tokens the mean is singular: directions that happened not to occur would cost nothing
    and be rounded away. With n < enough C tokens the missing share, 1 - n / (enough C), comes from
    the prior. An expert that saw nothing gets the prior alone.
    """
    tokens, columns = inputs.shape
    needed = max(1, ceil(enough * columns))
    hessian = second_moment(inputs)
    if tokens < needed:
        hessian = shrink_towards(hessian, tokens, prior(), needed)
    return hessian, tokens, max(0.0, 1.0 - tokens / needed)


def filled_rows(
    inputs: Tensor, prior: Callable[[], Tensor], enough: float
) -> tuple[Tensor, int, float]:
    """The same as rows [m, C] float32, whose x x' have that mean for their sum.

    prior   gives rows [n, C] of what the expert would see if all tokens of the layer went to it
    """
    tokens, columns = inputs.shape
    own = min(1.0, tokens / max(1, ceil(enough * columns)))
    rows = inputs.float() * sqrt(own / max(1, tokens))
    if own < 1.0:
        others = prior().float()
        rows = torch.cat([rows, others * sqrt((1.0 - own) / max(1, len(others)))])
    return rows, tokens, 1.0 - own


def check_moments(hessian: Tensor, names: Sequence[str]) -> None:
    """Raises SourceError if a Hessian [E, C, C], or a diagonal [E, C], is not finite: float32 did
    not hold a square.

    Hidden states are seen to be finite after every layer. What overflows is therefore the source's
    own, within a layer.
    """
    finite = hessian.flatten(1).sum(dim=1).isfinite().tolist()
    if not all(finite):
        raise SourceError(
            f"{names[finite.index(False)]}: its inputs on the calibration text are so large that "
            "float32 does not hold their squares; it cannot be calibrated"
        )


# ------------------------------------------------------------------------------------------ solving


@dataclass(frozen=True)
class SolvedStack:
    """A quantised stack.

    stack     codes, scales and zeros of all members
    error     [E] relative output error
    damping   [E] share of each column's moment that was added for the factorisation; 0 without one
    fallback  [E] what was done instead of the planned, a sentence; "" for nothing
    """

    stack: QuantizedStack
    error: list[float]
    damping: list[float]
    fallback: list[str]


@dataclass
class SolvedExperts:
    """Experts of equal bits, quantised together.

    members  their ids in the layer
    records  of each
    gate_up, down   of all; None for what keeps its precision
    inner    what each expert's down sees of the tokens routed to it, [n, I]; none if the weights
             have changed since
    """

    members: list[int]
    records: list[ExpertRecord]
    gate_up: SolvedStack | None
    down: SolvedStack | None
    inner: list[Tensor]


def replace_members(
    live: Tensor,
    members: Sequence[int],
    inputs: StackInputs,
    bits: int,
    scheme: Scheme,
    rule: Quantization,
) -> SolvedStack | None:
    """Quantise members of a live stack [all members, R, C] in place; None at SOURCE_BITS.

    inputs are those of the members alone, in their order.
    """
    if bits == SOURCE_BITS:
        return None
    weight, grid = live[members].float(), grid_of(bits, scheme)
    if inputs.rows:
        solved = round_stack(weight, inputs, grid, rule)
    else:
        solved = solve_stack(weight, inputs.hessian, grid, rule)
    live[members] = dequantize(solved.stack).to(live.dtype)
    return solved


def grid_of(bits: int, scheme: Scheme) -> Grid:
    """The grid of a scheme at a width, with scales as the format's engine holds them."""
    scale_dtype = getattr(torch, str(FORMATS[scheme.format].scale_dtype))
    return Grid(bits, scheme.group_size, scheme.symmetric, scale_dtype)


def solve_stack(weight: Tensor, hessian: Tensor, grid: Grid, rule: Quantization) -> SolvedStack:
    """Quantise a stack by the recipe's method.

    weight [E, R, C] float32; hessian [E, C, C], or [1, C, C] if all see the same.
    """
    if rule.method == "rtn":
        power = hessian.diagonal(dim1=1, dim2=2)
        return _rounded(weight, power, grid, rule, partial(output_energy, hessian=hessian))
    result = gptq(
        weight,
        hessian,
        grid,
        damping=rule.damping,
        act_order=rule.act_order,
        scales=rule.scales,
    )
    fallback = _below_grid(weight)
    for member in result.unfactorable:
        fallback[member] = NOT_FACTORED
    return SolvedStack(result.stack, result.error.tolist(), list(result.damping), fallback)


def round_stack(weight: Tensor, inputs: StackInputs, grid: Grid, rule: Quantization) -> SolvedStack:
    """Round a stack [E, R, C] float32 to the nearest codes, with inputs that have `rows`."""
    of_each = inputs.rows if len(inputs.rows) > 1 else [*inputs.rows] * len(weight)

    def energy(weights: Tensor) -> Tensor:
        pairs = zip(of_each, weights, strict=True)
        return torch.stack([(seen @ one.T).square().sum() for seen, one in pairs])

    return _rounded(weight, inputs.hessian, grid, rule, energy)


def _rounded(
    weight: Tensor,
    power: Tensor,
    grid: Grid,
    rule: Quantization,
    energy: Callable[[Tensor], Tensor],
) -> SolvedStack:
    """A stack [E, R, C] float32, rounded to the nearest codes.

    power   mean square of each input, [E, C], or [1, C] if all see the same
    energy  gives the output energy [E] of weights
    """
    moments = power.expand(len(weight), -1)
    stack = rtn(weight, grid, moments if rule.scales == "activation" else None)
    lost, whole = (energy(weights) for weights in (dequantize(stack) - weight, weight))
    error = (lost / whole.clamp(min=1e-30)).clamp(min=0).sqrt().tolist()
    return SolvedStack(stack, error, [0.0] * len(weight), _below_grid(weight))


def _below_grid(weight: Tensor) -> list[str]:
    """[E] texts: BELOW_GRID for a member of [E, R, C] that is not zero, but becomes so."""
    largest = weight.abs().amax(dim=(1, 2)).tolist()
    return [BELOW_GRID if 0 < size < SMALLEST_SCALE / 2 else "" for size in largest]


def output_energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """[E]: output energy per token, tr(W H W'), of weights [E, R, C] under [E or 1, C, C]."""
    return ((rows @ hessian) * rows).sum(dim=(1, 2))


# ------------------------------------------------------------------------------------------ packing


def packed_members(
    rows: Mapping[str, slice], stack: QuantizedStack, member: int, form: str
) -> Packed:
    """The packed matrices of a member: name -> which of its rows are theirs."""
    tensors: Packed = {}
    for name, part in rows.items():
        tensors |= packed_rows(name, stack, member, part, form)
    return tensors


def packed_rows(name: str, stack: QuantizedStack, member: int, rows: slice, form: str) -> Packed:
    """The packed matrix `name`, whose rows are some of a member."""
    pack = FORMATS[form].pack
    assert pack is not None
    codes, scales, zeros = (
        tensor[member, rows] for tensor in (stack.codes, stack.scales, stack.zeros)
    )
    return {name: pack(codes, scales, zeros, stack.grid)}


def pack_in_place(name: str, live: Tensor, scheme: Scheme) -> Packed:
    """The stored parts of a live weight [R, C] by the format's own library.

    The weight becomes what they stand for.
    """
    form = FORMATS[scheme.format]
    assert form.quantize is not None
    parts = form.quantize(live, scheme)
    live.copy_(form.unpack(parts, (live.shape[0], live.shape[1]), scheme))
    return {name: parts}
