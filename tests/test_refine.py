"""Refining: the same as a slow twin that takes one token and one expert at a time, undone where it
does not help, and nothing where it is not asked for."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_execute import TOKENS, Stop, run, stop_at, timeless
from tiny import recipe
from torch import Tensor, nn

from se_compress.artifacts import COMPRESSION_FILE, Compressed, from_json
from se_compress.compression import refine
from se_compress.compression.execute import compress
from se_compress.compression.folds import SELECTION, folds_of, records_of_folds
from se_compress.compression.refine import Aim, aim_of, refine_experts
from se_compress.compression.stacks import SolvedExperts, solve_stack
from se_compress.errors import RecipeError
from se_compress.model.experts import RoutedExperts, fused_experts
from se_compress.model.routing import bunched
from se_compress.model.streaming import StreamedModel
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.profiling.profiler import profile_experts
from se_compress.quant.grid import Grid, QuantizedStack, dequantize, rtn
from se_compress.quant.tuned import REACH, TunedStack
from se_compress.recipe import Quantization, Refine

TinyModel = Callable[[str], Path]
ROLES = ("gate_up", "down")
EXPERTS, HIDDEN, INNER, CHOSEN, ROWS = 5, 24, 16, 2, 240
GRIDS = (Grid(2, 8, True), Grid(3, -1, False), Grid(4, 16, True, torch.bfloat16))


class Experts(nn.Module):
    """Fused experts as transformers has them, with biases."""

    has_gate = has_bias = is_concatenated = True
    is_transposed = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.gate_up_proj = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=draw) / 5
        self.down_proj = torch.randn(EXPERTS, HIDDEN, INNER, generator=draw) / 4
        self.gate_up_proj_bias = torch.randn(EXPERTS, 2 * INNER, generator=draw) / 10
        self.down_proj_bias = torch.randn(EXPERTS, HIDDEN, generator=draw) / 10

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def slow_output(gate_up: Tensor, down: Tensor, aim: Aim, row: int) -> Tensor:
    """One token, expert by expert, in the dtype of the weights."""
    into, out = Experts().gate_up_proj_bias, Experts().down_proj_bias
    hidden = aim.hidden[row].to(gate_up.dtype)
    total = torch.zeros(HIDDEN, dtype=gate_up.dtype)
    for expert, weight in zip(aim.chosen[row].tolist(), aim.weights[row], strict=True):
        if expert == EXPERTS:  # one that does nothing
            continue
        gate, up = (gate_up[expert] @ hidden + into[expert]).chunk(2)
        made = down[expert] @ (gate * gate.sigmoid() * up) + out[expert]
        total = total + weight.to(gate_up.dtype) * made
    return total


def slow_error(gate_up: Tensor, down: Tensor, aim: Aim, rows: Sequence[int]) -> Tensor:
    errors = [
        (slow_output(gate_up, down, aim, row) - aim.wanted[row]).square().sum() * aim.counts[row]
        for row in rows
    ]
    return torch.stack(errors).mean()


def routing(seed: int = 1, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, choices that leave the last expert out, prefer the first and have some of none, and
    their weights."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=draw)
    scores = torch.randn(rows, EXPERTS - 1, generator=draw) + torch.tensor([2.0, 0.0, 0.0, -1.0])
    weights, chosen = scores.softmax(-1).topk(CHOSEN, dim=-1)
    chosen[::17, 1] = EXPERTS
    return hidden, chosen, weights


def solved(
    module: RoutedExperts, grid: Grid, members: Sequence[Sequence[int]]
) -> list[SolvedExperts]:
    """The experts rounded to nearest, in stacks; the module gets the rounded weights."""
    stacks = []
    for some in members:
        made = []
        for live in (module.gate_up_proj, module.down_proj):
            hessian = torch.eye(live.shape[-1])[None]
            one = solve_stack(live[list(some)], hessian, grid, Quantization(method="rtn"))
            live[list(some)] = dequantize(one.stack)
            made.append(one)
        stacks.append(SolvedExperts(list(some), [], made[0], made[1], []))
    return stacks


def problem(grid: Grid, members: Sequence[Sequence[int]] = ((0, 2), (3, 1))) -> Any:
    """Live experts of which some are rounded, the weights before, the stacks and their aim: what
    the experts did before, and a little that was lost before them."""
    module = fused_experts(Experts())
    before = module.gate_up_proj.clone(), module.down_proj.clone()
    hidden, chosen, weights = routing()
    plain = Aim(hidden, chosen, weights, torch.zeros(ROWS, HIDDEN), torch.ones(ROWS), {})
    wanted = torch.stack([slow_output(*before, plain, row) for row in range(ROWS)])
    beside = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(2))
    batches = [(beside + wanted).view(40, 6, HIDDEN)]
    aim = aim_of(hidden, chosen, weights, batches, [beside.view(40, 6, HIDDEN)])
    return module, before, solved(module, grid, members), aim


def test_the_folds_are_disjoint_and_whole() -> None:
    for count in (8, 32, 100):
        folds = folds_of(count)
        assert sorted(i for fold in folds.values() for i in fold) == list(range(count))
        assert len(folds["selection"]) == count // SELECTION
        assert all(folds.values())
    records = records_of_folds([[i, i + 1] for i in range(32)])
    assert [(r.fold, r.sequences) for r in records] == [
        ("tuning", 26), ("selection", 4), ("report", 2)
    ]  # fmt: skip
    other = records_of_folds([[i, i + 2] for i in range(32)])
    assert all(a.digest != b.digest for a, b in zip(records, other, strict=True))


def test_every_choice_lies_at_a_place_of_its_own() -> None:
    _, chosen, _ = routing()
    made = bunched(chosen, EXPERTS)
    there = chosen < EXPERTS
    rows = torch.cat([bunch.rows.flatten() for bunch in made.bunches])
    experts = torch.cat(
        [torch.tensor(b.experts).repeat_interleave(b.rows.shape[1]) for b in made.bunches]
    )
    assert not bool(there.all())
    assert len(made.places[there].unique()) == int(there.sum())
    numbers = torch.arange(ROWS)[:, None].expand(-1, CHOSEN)
    assert torch.equal(rows[made.places][there], numbers[there])
    assert torch.equal(experts[made.places][there], chosen[there])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_stack_starts_as_the_solver_left_it_and_moves_a_step_at_most(grid: Grid) -> None:
    weight = Experts().gate_up_proj
    start = rtn(weight, grid)
    tuned = TunedStack(start, weight)
    assert same(tuned.hardened(), start)
    assert torch.equal(tuned.weight(), dequantize(start))
    with torch.no_grad():
        tuned.positions += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 3
        tuned.ratios += 0.123
    tuned.keep_in_bounds()
    after = tuned.hardened()
    moved = after.codes.int() - start.codes.int()
    assert 1 == int(moved.abs().max()) == math.floor(REACH + 0.5)
    assert int(after.codes.max()) <= grid.top
    assert torch.equal(after.scales, after.scales.to(grid.scale_dtype).float())
    assert torch.equal(tuned.weight(), dequantize(after))


def same(one: QuantizedStack, other: QuantizedStack) -> bool:
    pairs = ((one.codes, other.codes), (one.scales, other.scales), (one.zeros, other.zeros))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_output_and_gradients_are_those_of_one_token_and_expert_at_a_time(grid: Grid) -> None:
    module, before, stacks, aim = problem(grid)
    layer = refine._layer_of(module, before, stacks)
    rows = list(range(0, ROWS, 3))
    error = layer.error(aim, torch.tensor(rows))
    error.backward()

    twins = [live.double().requires_grad_() for live in (module.gate_up_proj, module.down_proj)]
    expected = slow_error(twins[0], twins[1], aim, rows)
    expected.backward()

    assert float(error.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for live, fused, side in zip(twins, (layer.gate_up, layer.down), ROLES, strict=True):
        for some, tuned in zip(stacks, fused.tuned, strict=True):
            stack = getattr(some, side).stack
            gradient = live.grad[some.members]
            width = grid.width(gradient.shape[-1])
            columns = gradient.shape[-1]
            zeros = stack.zeros.double().repeat_interleave(width, -1)[..., :columns]
            steps, scales = stack.codes.double() - zeros, stack.scales.double()
            by_code = gradient * scales.repeat_interleave(width, -1)[..., :columns]
            assert torch.allclose(tuned.positions.grad.double(), by_code, rtol=1e-3, atol=1e-7)
            by_scale = scales * torch.stack(
                [part.sum(-1) for part in (gradient * steps).split(width, -1)], -1
            )
            assert torch.allclose(tuned.ratios.grad.double(), by_scale, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_kept_is_nearer_to_the_source_on_rows_that_chose_it(grid: Grid) -> None:
    module, before, stacks, aim = problem(grid)
    rounded = module.gate_up_proj.clone(), module.down_proj.clone()
    record = refine_experts(module, before, stacks, aim, Refine(steps=200, tokens=32))
    assert record.step > 0
    assert record.codes_changed > 0
    for fold, was, now in (
        ("selection", record.selection_before, record.selection),
        ("report", record.report_before, record.report),
    ):
        rows = aim.rows[fold].tolist()
        after = slow_error(module.gate_up_proj, module.down_proj, aim, rows)
        assert now == pytest.approx(math.sqrt(float(after)), rel=1e-4)
        assert was == pytest.approx(math.sqrt(float(slow_error(*rounded, aim, rows))), rel=1e-4)
    assert record.selection < record.selection_before
    for some in stacks:
        assert torch.equal(module.gate_up_proj[some.members], dequantize(some.gate_up.stack))
        assert torch.equal(module.down_proj[some.members], dequantize(some.down.stack))
    for side, live in enumerate((module.gate_up_proj, module.down_proj)):
        assert torch.equal(live[4], before[side][4])  # it keeps its precision


def test_how_the_experts_are_stacked_decides_nothing() -> None:
    made = []
    for members in (((0, 1, 2, 3),), ((3,), (1,), (0,), (2,))):
        module, before, stacks, aim = problem(GRIDS[1], members)
        refine_experts(module, before, stacks, aim, Refine(steps=20, tokens=32))
        made.append((module.gate_up_proj, module.down_proj))
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


def test_what_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "CODE_RATE", 5.0)  # far beyond what any step could gain
    module, before, stacks, aim = problem(GRIDS[2])
    starts = [(some.gate_up, some.down) for some in stacks]
    rounded = module.gate_up_proj.clone(), module.down_proj.clone()
    record = refine_experts(module, before, stacks, aim, Refine(steps=8, tokens=32))
    assert (record.step, record.codes_changed) == (0, 0.0)
    assert (record.selection, record.report) == (record.selection_before, record.report_before)
    assert torch.equal(module.gate_up_proj, rounded[0])
    assert torch.equal(module.down_proj, rounded[1])
    assert starts == [(some.gate_up, some.down) for some in stacks]


# --------------------------------------------------------------------------------- a whole model


def refined(path: Path, directory: Path, **changes: Any) -> Any:
    return run(path, directory, "rtn", refine=Refine(steps=20, tokens=64), **changes)


@pytest.fixture(scope="module")
def twice(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of mixed widths with a shared expert, without refining and with it."""
    path, work = tiny_model("qwen2_moe"), tmp_path_factory.mktemp("refine")
    widths: Mapping[int, int | tuple[int, int]] = {2: 3, 3: (4, 2)}
    return (
        run(path, work / "plain", "rtn", widths=widths, others=8),
        refined(path, work / "refined", widths=widths, others=8),
    )


def test_a_layer_comes_nearer_to_the_source_and_says_so(twice: Any) -> None:
    plain, better = twice
    assert all(record.refined is None for record in plain.records)
    layers = better.source.moe_layers
    assert [record.layer for record in better.records if record.refined] == list(layers)
    assert any(record.refined.step for record in better.records if record.refined)
    # the whole stream, tuning rows and all: what the next layer gets
    assert better.records[-1].hidden_error < plain.records[-1].hidden_error
    text = (better.directory / COMPRESSION_FILE).read_text()
    made = from_json(Compressed, text, "the test")
    assert made.folds is not None
    assert sum(fold.sequences for fold in made.folds) == len(TOKENS)
    assert '"folds"' not in (plain.directory / COMPRESSION_FILE).read_text()
    assert '"refined"' not in (plain.directory / COMPRESSION_FILE).read_text()


def test_only_routed_experts_that_are_quantised_change(twice: Any) -> None:
    plain, better = twice
    assert plain.tensors.keys() == better.tensors.keys()
    changed = {n for n, t in plain.tensors.items() if not torch.equal(t, better.tensors[n])}
    first = next(r.layer for r in better.records if r.refined and r.refined.step)
    # behind it, everything sees another stream
    here = [name for name in changed if f"layers.{first}." in name]
    assert here
    assert all(".experts." in name and name.endswith(("qweight", "scales")) for name in here)


def test_a_killed_run_ends_with_the_same_bytes(twice: Any, tmp_path: Path) -> None:
    path, work = twice[0].source.path, tmp_path / "work"
    work.mkdir()
    widths: Mapping[int, int | tuple[int, int]] = {2: 3, 3: (4, 2)}
    with pytest.raises(Stop):
        refined(path, tmp_path / "made", work=work, progress=stop_at(2), widths=widths, others=8)
    again = refined(path, tmp_path / "made", work=work, widths=widths, others=8)
    assert timeless(again.records) == timeless(twice[1].records)
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor, twice[1].tensors[name])


def test_what_was_undone_is_told(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "CODE_RATE", 5.0)
    told: list[str] = []
    made = refined(tiny_model("qwen3_moe"), tmp_path / "made", notice=told.append)
    undone = [r.layer for r in made.records if r.refined and not r.refined.step]
    assert undone
    assert [text.split(":")[0] for text in told] == [f"layer {layer}" for layer in undone]
    assert all("was undone" in text for text in told)


def test_a_pruned_model_is_refined_towards_the_source(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The experts that are left see another routing than the source's; their aim is its output."""
    path = tiny_model("qwen3_moe")
    source = open_source(str(path))
    settings = recipe(
        path,
        target="gptqmodel",
        policy={"bits": [3], "protect": "none", "prune": {"fraction": 0.25}},
        quantization={"method": "rtn", "group_size": 32, "refine": {"steps": 20, "tokens": 64}},
        calibration={"data": "unused.txt", "samples": len(TOKENS), "sequence_length": 20},
    )
    profile = profile_experts(source, TOKENS, settings)
    plan = make_plan(source, profile, settings)
    records = compress(source, plan, TOKENS, settings, tmp_path / "made").layers
    found = [record.refined for record in records if record.refined]
    assert len(found) == len(source.moe_layers)
    assert all(one.selection <= one.selection_before for one in found)
    assert any(one.step for one in found)


def test_a_layer_that_does_not_add_what_experts_put_out_is_refused(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamedModel, "adds_routed", lambda *_: False)
    with pytest.raises(RecipeError, match=r"refine: layer 1 does not add .* leave it out"):
        refined(tiny_model("qwen2_moe"), tmp_path / "made")
