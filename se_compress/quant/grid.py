"""Integer grids over groups of columns: choose scales, round, and read back.

E experts, R rows (out features), C columns (in features), G groups.

A weight is stored as a code of `bits` bits; its value is (code - zero) * scale, with one scale and
one zero per row and group of `group_size` columns. Scales are exact float16 values and zeros
integers, because that is what the files hold.

Without activations the range of a group is its least and greatest weight. With them
(`importance`, the diagonal of the Hessian) shrunk ranges compete, per row and group, for the least
error weighted by importance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)
SMALLEST_SCALE = 2.0**-14  # the least normal float16; a subnormal or zero scale loses whole groups
LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class Grid:
    """Width, columns per group (-1: one group per row; the last may be shorter), and zero point.

    Symmetric fixes the zero at the middle code; otherwise each group has its own.
    """

    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits is {self.bits}: accepted are {WIDTHS}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}: accepted are -1 or at least 1")

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return int(2 ** (self.bits - 1))

    def width(self, columns: int) -> int:
        """Columns in a full group of a matrix with so many columns."""
        return columns if self.group_size == -1 else self.group_size

    def groups(self, columns: int) -> int:
        return -(-columns // self.width(columns))


@dataclass(frozen=True)
class QuantizedStack:
    """codes uint8 [E, R, C]; scales float32 [E, R, G], exact in float16; zeros uint8 [E, R, G]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    grid: Grid


def rtn(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> QuantizedStack:
    """Round a stack [E, R, C] to the nearest codes; see `choose_scales` for importance [E, C]."""
    scales, zeros = choose_scales(weight, grid, importance)
    return QuantizedStack(round_to_grid(weight, scales, zeros, grid), scales, zeros, grid)


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, uint8 [E, R, C]."""
    columns = weight.shape[-1]
    steps = (weight / per_column(scales, columns, grid)).round_()
    return (steps + per_column(zeros, columns, grid)).clamp_(0, grid.top).to(torch.uint8)


def dequantize(stack: QuantizedStack) -> Tensor:
    """float32 [E, R, C], bit for bit (code - zero) * scale."""
    columns = stack.codes.shape[-1]
    steps = stack.codes.to(torch.float32) - per_column(stack.zeros, columns, stack.grid)
    return steps * per_column(stack.scales, columns, stack.grid)


def per_column(grouped: Tensor, columns: int, grid: Grid) -> Tensor:
    """[..., G] to [..., C]: each column its group's value."""
    return grouped.repeat_interleave(grid.width(columns), -1)[..., :columns]


def choose_scales(weight: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales float32 and zeros uint8, [E, R, G], for a stack [E, R, C] float32.

    importance  [E, C], none negative: the weight of a column's squared error; a group where it is
                all zero counts its columns alike. None takes the range of the weights as it is.
    """
    groups = _grouped(weight, grid)
    if importance is None:
        return _min_max(groups, grid, 1.0)
    cost = _grouped(importance[:, None], grid)
    cost = torch.where(cost.sum(-1, keepdim=True) > 0, cost, torch.ones_like(cost))
    best_scale, best_zero = _min_max(groups, grid, 1.0)
    best = _error(groups, best_scale, best_zero, cost, grid)
    for i in range(1, 80):
        scale, zero = _min_max(groups, grid, 1 - i / 100)
        error = _error(groups, scale, zero, cost, grid)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _grouped(x: Tensor, grid: Grid) -> Tensor:
    """[..., C] to [..., G, group_size]; the last group is filled up with zeros."""
    columns = x.shape[-1]
    width = grid.width(columns)
    missing = grid.groups(columns) * width - columns
    return torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, width))


def _min_max(groups: Tensor, grid: Grid, shrink: float) -> tuple[Tensor, Tensor]:
    low = groups.amin(-1).clamp(max=0) * shrink
    high = groups.amax(-1).clamp(min=0) * shrink
    if grid.symmetric:
        scale = torch.maximum(-low, high) / (grid.middle - 1)
        return as_stored(scale), torch.full_like(scale, grid.middle, dtype=torch.uint8)
    scale = as_stored((high - low) / grid.top)
    zero = (-low / scale).round_().clamp_(1, grid.top)
    return scale, zero.to(torch.uint8)


def as_stored(scale: Tensor) -> Tensor:
    """The nearest scale that float16 holds as a normal number."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).to(torch.float32)


def _error(groups: Tensor, scale: Tensor, zero: Tensor, cost: Tensor, grid: Grid) -> Tensor:
    z = zero[..., None].float()
    s = scale[..., None]
    steps = torch.clamp(torch.round(groups / s), -z, grid.top - z)
    return ((steps * s - groups).square() * cost).sum(-1)
