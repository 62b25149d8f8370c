"""Repair: least squares are those of a textbook, protected experts stay, the file is accounted for,
and a result that is quantised afterwards gains too."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distill import Made, settings_of
from test_execute import Stop, timeless
from tiny import random_tokens, recipe
from torch import Tensor

from se_compress.artifacts import RunOptions, to_json
from se_compress.compression import repair
from se_compress.compression.folds import folds_of
from se_compress.engines.accounting import account
from se_compress.errors import RecipeError
from se_compress.model.experts import RoutedExperts
from se_compress.model.observers import RoutingCapture
from se_compress.opening.headers import read_headers
from se_compress.planning.check import check_plan
from se_compress.planning.policy import make_plan
from se_compress.recipe import Recipe
from se_compress.validation.validator import validate

TinyModel = Callable[[str], Path]
TOKENS = random_tokens(96, 48)
GPTQ = {"method": "gptq", "group_size": 32}


def repaired(path: Path, surgery: str = "prune", bits: int = 16, **more: Any) -> Recipe:
    """A recipe with repair, widths and sections as given."""
    policy = {"repair": True, **more.pop("policy", {})}
    return settings_of(path, bits, surgery, TOKENS, policy, **more)


class Alike:
    """A module of experts as transformers has them."""

    has_gate, has_bias = True, False

    @staticmethod
    def _apply_gate(product: Tensor) -> Tensor:
        gate, up = product.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


# ---------------------------------------------------------------------------------------- solving


def test_an_expert_is_solved_as_in_a_textbook() -> None:
    """The normal equations, row by row in float64; and what one has done is no longer missing to
    the next."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    hidden, experts = (
        randn(200, 12),
        torch.stack([torch.randperm(3, generator=draw)[:2] for _ in range(200)]),
    )
    weights, missing, counts = randn(200, 2).abs(), randn(200, 12), randn(200).abs()
    block = RoutedExperts(Alike(), range(3), randn(3, 16, 12), randn(3, 12, 8))
    before = block.down_proj.clone().double()
    capture = RoutingCapture()
    capture.routed(hidden, experts, weights)
    tunes = torch.arange(200) < 150
    folds = {"tuning": tunes, "selection": ~tunes, "report": ~tunes}
    one = repair.Repair(0, missing.clone(), counts, folds, dict.fromkeys(range(3), torch.float32))
    repair.repair_block(block, capture, one)
    left = missing.double()
    for expert in range(3):
        moments, towards, seen = torch.zeros(8, 8).double(), torch.zeros(8, 12).double(), {}
        for row in range(200):
            for choice in range(2):
                if experts[row, choice] == expert:
                    gate, up = (block.gate_up_proj[expert].double() @ hidden[row].double()).chunk(2)
                    inner = torch.nn.functional.silu(gate) * up * weights[row, choice].double()
                    seen[row] = inner
                    if tunes[row]:
                        moments += counts[row] * inner[:, None] * inner
                        towards += counts[row] * inner[:, None] * left[row]
        moments += repair.RIDGE * moments.diagonal().mean() * torch.eye(8)
        change = torch.linalg.solve(moments, towards)
        errors = [
            sum(
                float(counts[row] * (left[row] - share * inner @ change).square().sum())
                for row, inner in seen.items()
                if not tunes[row]
            )
            for share in (0.0, 1.0)
        ]
        assert (expert in one.changed) == (errors[1] < errors[0])
        if expert in one.changed:
            for row, inner in seen.items():
                left[row] -= inner @ change
            before[expert] += change.T
    assert one.changed
    torch.testing.assert_close(block.down_proj.double(), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.missing.double(), left, rtol=1e-3, atol=1e-4)


def test_experts_without_tokens_and_zeros_stay() -> None:
    block = RoutedExperts(Alike(), range(2), torch.zeros(2, 16, 12), torch.ones(2, 12, 8))
    capture = RoutingCapture()
    capture.routed(torch.ones(40, 12), torch.zeros(40, 1, dtype=torch.int64), torch.ones(40, 1))
    every = torch.ones(40, dtype=torch.bool)
    folds = {"tuning": every, "selection": every, "report": every}
    stored = dict.fromkeys(range(2), torch.float32)
    one = repair.Repair(0, torch.ones(40, 12), torch.ones(40), folds, stored)
    repair.repair_block(block, capture, one)
    assert torch.equal(block.down_proj, torch.ones(2, 12, 8))
    assert one.record.changed == 0
    assert one.record.report == one.record.report_before


# --------------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def alike(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts have gate and up of the first one of their layer: what one puts out,
    the others could."""
    path = tmp_path_factory.mktemp("alike") / "model"
    shutil.copytree(tiny_model("qwen2_moe"), path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if ".experts." in name and "down_proj" not in name:
            start, _, rest = name.partition(".experts.")
            tensors[name] = tensors[f"{start}.experts.0.{rest.partition('.')[2]}"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def both(alike: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """A pruned model, without repair and with it."""
    path, work = alike, tmp_path_factory.mktemp("repair")
    policy = {"protect": [{"layer": 1, "expert": 2}]}
    plain = repaired(path, policy={"repair": False, **policy})
    made = repaired(path, policy=policy)
    return Made(path, work / "plain", plain, TOKENS), Made(path, work / "made", made, TOKENS)


def test_layers_come_nearer_to_the_source(both: tuple[Made, Made]) -> None:
    records = [record.repaired for record in both[1].made.layers if record.repaired]
    assert len(records) == len(both[1].source.moe_layers)
    assert all(record.changed for record in records)
    told = [(r.changed, r.experts, r.report_before, r.report) for r in records]
    assert all(record.report < 0.97 * record.report_before for record in records), told
    assert all(record.repaired is None for record in both[0].made.layers)


def test_only_down_proj_of_unprotected_experts_changes(both: tuple[Made, Made]) -> None:
    before, after = both[0].tensors, both[1].tensors
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    inner = both[1].blueprint.plan
    planned = {t.name for t in both[1].blueprint.tensors.values() if t.making == "repaired"}
    assert changed <= planned
    assert all(".experts." in name and "down_proj" in name for name in planned)
    protected = {both[1].blueprint.source.experts[i]["down"].name for i in inner.protected}
    assert not protected & planned


def test_it_is_accounted_for(both: tuple[Made, Made]) -> None:
    made = both[1]
    found = made.blueprint.found_in(read_headers(made.directory))
    check = account(made.blueprint, made.directory, found, made.made.layers)
    assert (check.value, check.passed, check.detail) == (1.0, True, "")
    name = next(t.name for t in made.blueprint.tensors.values() if t.making == "repaired")
    file, begin = Path(found[name].file), found[name].begin
    whole = file.read_bytes()
    file.write_bytes(whole[:begin] + bytes([whole[begin] ^ 1]) + whole[begin + 1 :])
    check = account(made.blueprint, made.directory, found, made.made.layers)
    file.write_bytes(whole)
    assert not check.passed
    assert check.detail == f"{name} differs from what was written"


def test_the_prediction_comes_nearer_to_the_source(both: tuple[Made, Made]) -> None:
    """On the sequences that nothing was solved on."""
    unseen = [TOKENS[i] for i in folds_of(len(TOKENS))["report"]]
    found = []
    for made in both:
        report = validate(
            made.source, made.plan, made.directory, unseen, made.recipe, RunOptions(), reload=False
        )
        found.append(next(c.value for c in report.checks if c.name == "kl_divergence"))
    assert found[1] < found[0]


@pytest.mark.parametrize(
    ("name", "surgery", "bits", "more"),
    [
        ("mixtral", "merge", 16, {}),
        ("qwen3_moe", "prune", 4, {}),
        ("deepseek_v2", "merge", 3, {}),
        ("qwen2_moe", "prune", 3, {"quantization": GPTQ | {"refine": {"steps": 4}}}),
        ("olmoe", "prune", 16, {"compute_dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_with_all_that_follows(
    tiny_model: TinyModel, tmp_path: Path, name: str, surgery: str, bits: int, more: Any
) -> None:
    made = Made(
        tiny_model(name), tmp_path / "made", repaired(tiny_model(name), surgery, bits, **more)
    )
    found = made.blueprint.found_in(read_headers(made.directory))
    check = account(made.blueprint, made.directory, found, made.made.layers)
    assert check.passed, check.detail
    records = [record.repaired for record in made.made.layers if record.repaired]
    assert len(records) == len(made.source.moe_layers)
    assert any(record.changed for record in records)
    assert all(record.changed <= record.experts for record in records)


def test_a_killed_run_ends_with_the_same_bytes(both: tuple[Made, Made], tmp_path: Path) -> None:
    made, work = both[1], tmp_path / "work"
    work.mkdir()

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("compress", total - 1):
            raise Stop

    path, settings = made.source.path, made.recipe
    with pytest.raises(Stop):
        Made(path, tmp_path / "made", settings, TOKENS, work=work, progress=stop)
    again = Made(path, tmp_path / "made", settings, TOKENS, work=work)
    assert again.bytes == made.bytes
    assert timeless(again.made.layers) == timeless(made.made.layers)


# ---------------------------------------------------------------------------------------- refusals


def test_the_keys_are_checked(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3_moe")
    with pytest.raises(RecipeError, match="repair is for what prune or merge leaves"):
        recipe(path, policy={"repair": True})
    few = {"data": "unused.txt", "samples": 4}
    with pytest.raises(RecipeError, match=r"policy\.repair sets some calibration samples apart"):
        recipe(path, calibration=few, policy={"prune": {"fraction": 0.25}, "repair": True})


def test_a_plan_that_has_nothing_to_repair_is_refused(both: tuple[Made, Made]) -> None:
    settings = settings_of(both[0].source.path)
    whole = replace(make_plan(both[0].source, None, settings), repaired=True)
    with pytest.raises(RecipeError, match=r"p\.json: repaired is true, but no expert is pruned"):
        check_plan(whole, both[0].source, "p.json")
    assert check_plan(both[1].plan, both[1].source, "p.json") == both[1].plan


def test_a_plan_says_it(both: tuple[Made, Made]) -> None:
    assert '"repaired": true' in to_json(both[1].plan)
    assert "repaired" not in to_json(both[0].plan)
    assert settings_of(both[0].source.path, 3, "prune").policy.repair is False
