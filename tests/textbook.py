"""GPTQ as its papers write it: a column and a row at a time, in float64, with explicit inverses.

Slow and obvious: what quant/gptq.py is held to, on the CPU (tests/test_gptq.py) and on a GPU
(benchmarks/gpu.py).
"""

import itertools

import torch
from torch import Tensor

from se_compress.quant.grid import Grid, QuantizedStack, dequantize

MEMBERS, ROWS, COLUMNS = 3, 6, 40
DAMPING = 0.2


def stack(
    seed: int = 0, members: int = MEMBERS, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[Tensor, Tensor]:
    """Weights, and the second moments of correlated inputs of which two channels are large."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(members, columns // 4, columns, generator=draw)
    inputs = torch.randn(members, 4 * columns, columns // 4, generator=draw) @ mix
    inputs += torch.randn(members, 4 * columns, columns, generator=draw)
    inputs[:, :, 3] *= 20
    inputs[:, :, 11] *= 5
    weight = torch.randn(members, rows, columns, generator=draw)
    return weight, inputs.mT @ inputs / inputs.shape[1]


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """One member's Hessian as the solver should see it, in float64."""
    hessian = hessian.double()
    return hessian + damping * hessian.diagonal().diag()


def group_of(column: int, grid: Grid) -> int:
    return 0 if grid.group_size == -1 else column // grid.group_size


def nearest(target: float, scale: float, zero: int, grid: Grid) -> int:
    return min(max(round(target / scale) + zero, 0), grid.top)


def textbook_gptq(
    weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, order: list[int]
) -> Tensor:
    """Codes of one member: round a column, spread its error by the inverse Hessian, eliminate it
    from the inverse Hessian (Frantar et al., equations 2 and 3)."""
    left = weight.double().clone()
    inverse = damped(hessian).inverse()
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for column in order:
        group = group_of(column, grid)
        for row in range(len(weight)):
            scale, zero = float(scales[row, group]), int(zeros[row, group])
            code = nearest(float(left[row, column]), scale, zero, grid)
            codes[row, column] = code
            error = (left[row, column] - (code - zero) * scale) / inverse[column, column]
            left[row] -= error * inverse[column]
        row_of_inverse = inverse[column].clone()
        inverse -= row_of_inverse[:, None] * row_of_inverse / row_of_inverse[column]
        inverse[column, column] = 1.0  # never used again
    return codes


def textbook_refit(
    weight: Tensor, hessian: Tensor, codes: Tensor, zeros: Tensor, grid: Grid
) -> Tensor:
    """The scales of one member that cost least for its codes: least squares, row by row."""
    root = torch.linalg.cholesky(damped(hessian)).mT  # cost = |root (w - q)|^2
    scales = torch.zeros(zeros.shape, dtype=torch.float64)
    for row in range(len(weight)):
        design = torch.zeros(codes.shape[1], zeros.shape[1], dtype=torch.float64)
        for column in range(codes.shape[1]):
            group = group_of(column, grid)
            design[column, group] = float(codes[row, column]) - float(zeros[row, group])
        wanted = (root @ weight[row].double())[:, None]
        scales[row] = torch.linalg.lstsq(root @ design, wanted).solution[:, 0]
    return scales


def textbook_sweep(
    weight: Tensor, hessian: Tensor, made: QuantizedStack, order: list[int]
) -> Tensor:
    """Codes of one member, each in turn set to the one that costs least given all the others."""
    grid, every = made.grid, damped(hessian)
    change = (dequantize(made)[0] - weight).double()
    codes = made.codes[0].clone()
    for column, row in itertools.product(order, range(len(weight))):
        group = group_of(column, grid)
        steps = torch.arange(grid.top + 1) - float(made.zeros[0, row, group])
        tried = change[row].repeat(len(steps), 1)
        tried[:, column] = steps * made.scales[0, row, group] - weight[row, column]
        best = int(((tried @ every) * tried).sum(1).argmin())
        codes[row, column] = best
        change[row] = tried[best]
    return codes


def order_of(hessian: Tensor) -> list[int]:
    moments = hessian.diagonal().tolist()
    return sorted(range(len(moments)), key=lambda column: -moments[column])
