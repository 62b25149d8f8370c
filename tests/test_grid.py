"""Scales and rounding against loops that try every possibility, one group at a time."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from se_compress.quant import grid as grid_module
from se_compress.quant.grid import (
    LARGEST_SCALE,
    RANGES,
    SMALLEST_SCALE,
    WIDTHS,
    Grid,
    QuantizedStack,
    choose_scales,
    dequantize,
    round_to_grid,
    rtn,
)

COLUMNS = 40
GRIDS = [
    Grid(bits, group_size, symmetric)
    for bits, group_size, symmetric in itertools.product(WIDTHS, (-1, 8, 16), (True, False))
]
SHARES = range(RANGES, 0, -1)


def describe(grid: Grid) -> str:
    return f"{grid.bits}-{grid.group_size}-{'sym' if grid.symmetric else 'asym'}"


each_grid = pytest.mark.parametrize("grid", GRIDS, ids=describe)


def stack(seed: int = 0, rows: int = 5) -> tuple[Tensor, Tensor]:
    """Weights [2, rows, COLUMNS], and importances over four orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, rows, COLUMNS, generator=draw) + 0.1
    return weight, torch.randn(2, COLUMNS, generator=draw).mul(2).exp()


def groups_of(grid: Grid, columns: int = COLUMNS) -> list[slice]:
    width = columns if grid.group_size == -1 else grid.group_size
    return [slice(i, min(i + width, columns)) for i in range(0, columns, width)]


def total_cost(weight: Tensor, importance: Tensor, made: QuantizedStack) -> float:
    return float(((dequantize(made) - weight).square() * importance[:, None]).sum())


# --------------------------------------------------------------------------- slow, obvious twins


def best_fit(weights: list[float], costs: list[float], grid: Grid) -> tuple[float, float, int]:
    """Cost, scale and zero of the best of all candidates for one group."""
    low, high = min(0.0, *weights), max(0.0, *weights)
    levels = grid.middle if grid.symmetric else grid.top
    reach = max(-low, high) if grid.symmetric else high - low
    best = (math.inf, 0.0, 0)
    for share in (levels / (levels - 1), *(i / RANGES for i in SHARES)):
        scale = share * reach / levels
        for sign, zero in ways(low * levels / reach, grid):
            steps = [min(max(round(w / (sign * scale)), -zero), grid.top - zero) for w in weights]
            size = sum(c * d * d for c, d in zip(costs, steps, strict=True))
            fit = sum(c * w * d for c, w, d in zip(costs, weights, steps, strict=True))
            fitted = fit / size if size else 0.0
            cost = sum(
                c * (w - fitted * d) ** 2 for c, w, d in zip(costs, weights, steps, strict=True)
            )
            best = min(best, (cost, fitted, zero))
    return best


def ways(low: float, grid: Grid) -> Iterator[tuple[int, int]]:
    if grid.symmetric:
        yield 1, grid.middle
        yield -1, grid.middle
    else:
        for zero in (math.floor(-low), math.ceil(-low)):
            yield 1, min(max(zero, 1), grid.top)


def shrunk_range_cost(weights: Tensor, costs: Tensor, grid: Grid) -> float:
    """The usual search, for rows [N, group_size]: 100 shrunk ranges, one zero, positive scales."""
    low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
    best = torch.full_like(low, math.inf)
    for i in range(100):
        shrink = 1 - i / 100
        if grid.symmetric:
            scale = torch.maximum(-low, high) * shrink / (grid.middle - 1)
            zero = torch.full_like(scale, grid.middle)
        else:
            scale = (high - low) * shrink / grid.top
            zero = (-low * shrink / scale).round().clamp(1, grid.top)
        scale = scale.to(torch.float16).to(torch.float32).clamp(min=SMALLEST_SCALE)
        steps = (weights / scale[:, None]).round().add(zero[:, None]).clamp(0, grid.top)
        rounded = (steps - zero[:, None]) * scale[:, None]
        best = torch.minimum(best, ((weights - rounded).square() * costs).sum(1))
    return float(best.sum())


# ------------------------------------------------------------------------------------------ scales


@each_grid
def test_the_search_finds_what_trying_every_candidate_finds(grid: Grid) -> None:
    weight, importance = stack()
    scales, zeros = choose_scales(weight, grid, importance)
    for e, r, (g, columns) in itertools.product(range(2), range(5), enumerate(groups_of(grid))):
        weights, costs = weight[e, r, columns], importance[e, columns]
        cost, scale, zero = best_fit(weights.tolist(), costs.tolist(), grid)
        if float(zeros[e, r, g]) == zero and math.isclose(scales[e, r, g], scale, rel_tol=1e-3):
            continue
        # another candidate won, as good to within float32 and the scale's own rounding
        codes = (weights / scales[e, r, g]).round().add(zeros[e, r, g]).clamp(0, grid.top)
        rounded = (codes - zeros[e, r, g]) * scales[e, r, g]
        slack = 2e-6 * float((weights.square() * costs).sum())
        assert float(((rounded - weights).square() * costs).sum()) <= 1.001 * cost + slack


@each_grid
def test_the_search_beats_a_hundred_shrunk_ranges(grid: Grid) -> None:
    weight, importance = stack(seed=1, rows=40)
    usual = sum(
        shrunk_range_cost(weight[e, :, columns], importance[e, columns], grid)
        for e, columns in itertools.product(range(2), groups_of(grid))
    )
    searched = total_cost(weight, importance, rtn(weight, grid, importance))
    # 8 bits have more ranges worth trying than 17, for a loss that is a thousandth of 4 bits'
    assert searched <= usual * (1.05 if grid.bits == 8 else 1.0)


@pytest.mark.parametrize("outlying", [1.0, 6.0])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_left_out_only_where_they_cannot_win(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, bits: int, outlying: float
) -> None:
    """With columns that count about alike few groups go on to the narrow ranges; with an outlying
    weight in each group more do."""
    draw = torch.Generator().manual_seed(4)
    weight = torch.randn(2, 40, 128, generator=draw)
    weight[:, :, ::64] *= outlying
    importance = torch.rand(2, 128, generator=draw) + 0.5
    grid = Grid(bits, 64, symmetric)
    seen: list[Tensor] = []
    which = grid_module._open

    def watched(*arguments: Any) -> Tensor:
        seen.append(which(*arguments))
        return seen[-1]

    monkeypatch.setattr(grid_module, "_open", watched)
    some = total_cost(weight, importance, rtn(weight, grid, importance))
    share = float(torch.cat([found.flatten() for found in seen]).float().mean())
    assert share < 0.1 if outlying == 1.0 else share > 0.05

    def everywhere(share: Tensor, *_: Any) -> Tensor:
        return torch.ones_like(share, dtype=torch.bool)

    monkeypatch.setattr(grid_module, "_open", everywhere)
    assert some <= 1.001 * total_cost(weight, importance, rtn(weight, grid, importance))


@each_grid
def test_the_search_never_loses_to_the_whole_range(grid: Grid) -> None:
    weight, importance = stack(seed=2)
    searched = total_cost(weight, importance, rtn(weight, grid, importance))
    assert searched < total_cost(weight, importance, rtn(weight, grid))


@each_grid
@pytest.mark.parametrize("size", [1.0, 1e-7, 1e9, 0.0])
def test_scales_zeros_and_codes_are_what_files_can_hold(grid: Grid, size: float) -> None:
    weight, importance = stack(seed=3)
    for given in (None, importance):
        made = rtn(weight * size, grid, given)
        assert made.codes.shape == weight.shape
        assert made.scales.shape == made.zeros.shape == (2, 5, grid.groups(COLUMNS))
        assert torch.equal(made.scales, made.scales.to(torch.float16).to(torch.float32))
        assert made.scales.abs().min() >= SMALLEST_SCALE
        assert made.scales.abs().max() <= LARGEST_SCALE
        assert made.codes.dtype == made.zeros.dtype == torch.uint8
        assert made.codes.max() <= grid.top
        assert made.zeros.min() >= 1
        assert made.zeros.max() <= grid.top
        if grid.symmetric:
            assert (made.zeros == grid.middle).all()


@each_grid
def test_the_whole_range_is_covered(grid: Grid) -> None:
    weight, _ = stack(seed=4)
    made = rtn(weight, grid)
    away = (dequantize(made) - weight).abs()
    step = made.scales.abs().amax()
    # an integer zero moves a range by up to half a step
    assert away.max() <= step * (0.5 if grid.symmetric else 1.0) * 1.001


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("given", [None, torch.ones(1, 8)])
def test_positive_weights_keep_a_zero_that_can_be_stored(bits: int, given: Tensor | None) -> None:
    weight = torch.linspace(1, 2, 8).reshape(1, 1, 8)
    made = rtn(weight, Grid(bits, -1, symmetric=False), given)
    assert made.zeros.item() == 1
    assert (dequantize(made) - weight).abs().max() <= 2 / (2**bits - 2) / 2 * 1.01


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_long_positive_side_turns_the_symmetric_grid_over(bits: int) -> None:
    half = 2 ** (bits - 1)
    weight = torch.arange(1.0 - half, half + 1).reshape(1, 1, -1) / half
    for given in (None, torch.ones(1, weight.shape[-1])):
        made = rtn(weight, Grid(bits, -1, symmetric=True), given)
        assert made.scales.item() == pytest.approx(-1 / half, rel=1e-3)
        assert torch.allclose(dequantize(made), weight, rtol=1e-3)
        mirrored = rtn(-weight, Grid(bits, -1, symmetric=True), given)
        assert torch.equal(dequantize(mirrored), -dequantize(made))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_two_valued_groups_are_kept_exactly(bits: int, symmetric: bool) -> None:
    weight = torch.tensor([0.75, -0.75, -0.75, 0.75]).repeat(1, 3, 2)
    made = rtn(weight, Grid(bits, 4, symmetric), torch.rand(1, 8) + 0.5)
    assert torch.allclose(dequantize(made), weight, rtol=1e-3)


@each_grid
def test_importance_counts_within_a_group_only(grid: Grid) -> None:
    weight, importance = stack(seed=5)
    plain = choose_scales(weight, grid, importance)
    scaled = importance.clone()
    for columns in groups_of(grid):
        scaled[:, columns] *= 2.0 ** (columns.start or 1)
    for got, wanted in zip(choose_scales(weight, grid, scaled), plain, strict=True):
        assert torch.equal(got, wanted)


def test_a_group_without_importance_counts_its_columns_alike() -> None:
    weight, importance = stack(seed=6)
    importance[:, :8] = 0
    alike = importance.clone()
    alike[:, :8] = 3
    for symmetric in (True, False):
        grid = Grid(3, 8, symmetric)
        for got, wanted in zip(
            choose_scales(weight, grid, importance), choose_scales(weight, grid, alike), strict=True
        ):
            assert torch.equal(got, wanted)


@each_grid
def test_chunks_make_no_difference(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = stack(seed=7)
    whole = choose_scales(weight, grid, importance)
    for elements in (1, 50, 200):
        monkeypatch.setitem(grid_module.CHUNK, "cpu", elements)
        for got, wanted in zip(choose_scales(weight, grid, importance), whole, strict=True):
            assert (got == wanted).float().mean() > 0.98  # ties fall either way


# ---------------------------------------------------------------------------------------- rounding


@each_grid
def test_each_code_is_the_nearest(grid: Grid) -> None:
    weight, importance = stack(seed=8)
    scales, zeros = choose_scales(weight, grid, importance)
    codes = round_to_grid(weight, scales, zeros, grid)
    levels = torch.arange(grid.top + 1)
    for g, columns in enumerate(groups_of(grid)):
        values = (levels - zeros[..., g, None].float()) * scales[..., g, None]  # [2, 5, levels]
        away = (weight[..., columns, None] - values[..., None, :]).abs()
        chosen = away.gather(-1, codes[..., columns, None].long())[..., 0]
        assert torch.allclose(chosen, away.amin(-1), atol=1e-6)


@each_grid
def test_reading_back_is_exact(grid: Grid) -> None:
    weight, importance = stack(seed=9)
    made = rtn(weight, grid, importance)
    read = dequantize(made)
    assert read.dtype == torch.float32
    for g, columns in enumerate(groups_of(grid)):
        for column in range(columns.start, columns.stop):
            steps = made.codes[..., column].int() - made.zeros[..., g].int()
            assert torch.equal(read[..., column], steps.float() * made.scales[..., g])


def test_inputs_are_left_alone() -> None:
    weight, importance = stack()
    before = weight.clone(), importance.clone()
    rtn(weight, Grid(4, 16, symmetric=False), importance)
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])


# -------------------------------------------------------------------------------------------- Grid


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (7, 64, "bits is 7: accepted are 2, 3, 4, 5, 6, 8"),
        (4, 0, "group_size is 0: accepted are -1 and 1 or more"),
        (4, -2, "group_size is -2: accepted are -1 and 1 or more"),
    ],
)
def test_impossible_grids_are_refused(bits: int, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(bits, group_size, symmetric=True)
