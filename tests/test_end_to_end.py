"""The real model, all the way: the installed command finds the one super expert of `smollm2-moe`
and keeps it, and the engines load what it writes with the logits that were validated. Without the
super expert the gates fail.

The models are built once, into models/ (tools/reference_models.py); that takes a minute or two.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import edit_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from se_compress.artifacts import (
    CompressionPlan,
    ExpertId,
    ExpertProfile,
    ModelSource,
    RunOptions,
    Scheme,
    ValidationReport,
    from_json,
)
from se_compress.compression.execute import compress
from se_compress.model.checkpoint import Reader, open_result
from se_compress.model.streaming import StreamedModel
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.pipeline import Request, preview, preview_variants
from se_compress.planning.policy import make_plan
from se_compress.profiling.profiler import profile_experts
from se_compress.recipe import Recipe, load_recipe
from se_compress.text.calibrate import draw_sequences
from se_compress.validation.validator import validate

ROOT = Path(__file__).resolve().parents[1]
COMMAND = str(Path(sys.executable).with_name("se-compress"))
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SMALLER = (
    "calibration.samples=8",
    "calibration.sequence_length=128",
    "validation.samples=6",
    "validation.sequence_length=128",
    "validation.generation={prompts: 1, tokens: 8}",
)
UNQUANTISED = (*SMALLER, "target=transformers", "quantization.method=none")
SUPER_LAYER, LAYERS, EXPERTS = 11, 30, 16
PROMPT = "It is a small country in the north of Europe, and its people"
ENVIRONMENT = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}

LOADER = """
import json, sys, torch
from gptqmodel import GPTQModel
from safetensors.torch import save_file
directory, scratch, tokens, prompt = sys.argv[1:]
model = GPTQModel.load(directory, device="cpu").model.eval()
with torch.no_grad():
    logits = model(torch.tensor(json.loads(tokens))).logits.float()
    written = model.generate(torch.tensor([json.loads(prompt)]), max_new_tokens=32, do_sample=False)
save_file({"logits": logits.contiguous(), "written": written}, f"{scratch}/found.safetensors")
"""
TRAP = """
import json, sys
from transformers import AutoModelForCausalLM
_, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
with open(f"{sys.argv[2]}/info.json", "w") as file:
    json.dump({key: sorted(map(str, value)) for key, value in info.items()}, file)
"""


@pytest.fixture(scope="session")
def models() -> Path:
    """The directory of the reference models, built if they are not there."""
    script = str(ROOT / "tools" / "reference_models.py")
    subprocess.run([sys.executable, script], check=True, capture_output=True, cwd=ROOT)
    return ROOT / "models"


@pytest.fixture(scope="session")
def source(models: Path) -> ModelSource:
    return open_source(str(models / "smollm2-moe"))


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    request = Request(load_recipe(path, (f"output={tmp_path / 'out'}",)), text)
    previews = preview_variants(request) if request.recipe.variants else {"": preview(request)}
    for one in previews.values():
        assert 0 < one.plan.size_bytes <= one.source.size_bytes


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return load_recipe(QUICKSTART, SMALLER)


@pytest.fixture(scope="session")
def held_out(source: ModelSource, recipe: Recipe) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        drawn = draw_sequences(recipe.validation, source.path, "validation")
    return [list(sequence) for sequence in drawn]


@pytest.fixture(scope="session")
def result(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `se-compress recipes/quickstart.yaml` publishes, on less text."""
    output = tmp_path_factory.mktemp("end") / "quickstart"
    settings = [part for override in SMALLER for part in ("--set", override)]
    done = subprocess.run(
        [COMMAND, str(QUICKSTART), "--output", str(output), "--device", "cpu", *settings],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith(f"{output}: passed, ")
    return output


@pytest.fixture(scope="session")
def profile(result: Path) -> ExpertProfile:
    text = (result / "se_compress" / "profile.json").read_text("utf-8")
    return from_json(ExpertProfile, text, "profile.json")


@pytest.fixture(scope="session")
def plan(result: Path) -> CompressionPlan:
    text = (result / "se_compress" / "plan.json").read_text("utf-8")
    return from_json(CompressionPlan, text, "plan.json")


@pytest.fixture(scope="session")
def validation(result: Path) -> ValidationReport:
    text = (result / "se_compress" / "validation.json").read_text("utf-8")
    return from_json(ValidationReport, text, "validation.json")


# --------------------------------------------------------------------------- what the profile says


def test_there_is_exactly_one_super_expert_and_zeroing_it_confirms_it(
    profile: ExpertProfile,
) -> None:
    (found,) = profile.super_experts
    assert (found.layer, found.position, found.confirmed) == (SUPER_LAYER, 0, True)
    assert isinstance(found.expert, int)
    assert found.zeroed is not None
    assert found.zeroed.rise_removed > 0.9
    assert found.zeroed.massive_activation < 0.1
    assert found.zeroed.sink_mass < 0.5
    assert found.zeroed.kl_divergence > 1.0
    assert found.control is not None
    assert found.control.layer == SUPER_LAYER
    assert found.control.expert != found.expert
    assert found.control.rise_removed < 0.1
    assert found.control.kl_divergence < 0.1


def test_the_late_cancelling_experts_are_told_apart(profile: ExpertProfile) -> None:
    late = [outlier for outlier in profile.outliers if outlier.layer >= 28]
    assert late
    assert {outlier.reason for outlier in late} == {"cancels"}
    assert all(outlier.peak > profile.threshold for outlier in late)
    cancelling = {layer.layer for layer in profile.layers if layer.cancelling}
    assert {outlier.layer for outlier in late} <= cancelling <= {28, 29}


def test_only_the_super_expert_s_layer_forms_the_massive_activation(
    profile: ExpertProfile,
) -> None:
    assert profile.massive
    assert [layer.layer for layer in profile.layers if layer.forming] == [SUPER_LAYER]
    assert all(layer.position == 0 for layer in profile.layers if layer.massive)
    assert profile.layers[SUPER_LAYER - 1].sink_rate < profile.layers[20].sink_rate


def test_every_expert_has_been_measured(profile: ExpertProfile) -> None:
    assert len(profile.experts) == LAYERS * (EXPERTS + 1)
    assert all(stats.tokens for stats in profile.experts if stats.expert == "shared")


# ----------------------------------------------------------------------------- what is in the file


def test_the_super_expert_has_16_bits_and_the_others_4(
    result: Path, plan: CompressionPlan, profile: ExpertProfile
) -> None:
    (found,) = profile.super_experts
    assert plan.protected == (found.id,)
    headers = read_headers(result)
    hidden, width = 576, 64
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            stem = f"model.layers.{layer}.mlp.experts.{expert}.down_proj"
            if ExpertId(layer, expert) == found.id:
                assert headers[f"{stem}.weight"].dtype == "BF16"
                assert f"{stem}.qweight" not in headers
            else:
                assert headers[f"{stem}.qweight"].shape == (width * 4 // 32, hidden)
                assert f"{stem}.weight" not in headers


def test_the_gates_passed_on_held_out_text(validation: ValidationReport) -> None:
    assert validation.passed
    assert not validation.not_run
    assert validation.check("kl_divergence").value <= 0.06  # type: ignore[operator]
    assert validation.check("reload").passed
    assert validation.expert_bytes < 0.35 * validation.source_expert_bytes


def test_nothing_but_routed_experts_changed(
    result: Path, source: ModelSource, plan: CompressionPlan
) -> None:
    with safe_open(result / "model.safetensors", "pt") as ours:
        kept = set(ours.keys()) & set(source.tensors)
        with safe_open(source.path / "model.safetensors", "pt") as theirs:
            assert all(torch.equal(ours.get_tensor(n), theirs.get_tensor(n)) for n in kept)
    changed = {source.tensors[name].kind for name in set(source.tensors) - kept}
    assert changed == {"expert"}
    assert len(source.tensors) - len(kept) == 3 * (LAYERS * EXPERTS - 1)


# -------------------------------------------------------------------------- what the engines load


def unpack_4_bits(packed: Tensor) -> Tensor:
    """int32 [N, W] to [N, 8 W]: eight codes a word, the lowest bits first."""
    words = packed.long() & 0xFFFFFFFF
    return torch.stack([(words >> (4 * place)) & 15 for place in range(8)], -1).flatten(1)


def dequantise(stored: dict[str, Tensor], stem: str) -> Tensor:
    """[rows, columns] of a GPTQ v1 module, written down from the format alone."""
    codes = unpack_4_bits(stored[f"{stem}.qweight"].T.contiguous())
    zeros = unpack_4_bits(stored[f"{stem}.qzeros"]) + 1
    weight = torch.empty(codes.shape)
    for column, group in enumerate(stored[f"{stem}.g_idx"].tolist()):
        steps = codes[:, column] - zeros[group]
        weight[:, column] = steps * stored[f"{stem}.scales"][group].float()
    return weight


@pytest.fixture(scope="session")
def by_hand(result: Path, source: ModelSource) -> torch.nn.Module:
    """transformers' own model of the source with its experts replaced by what the file holds."""
    stored = load_file(result / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        for layer in range(LAYERS):
            experts = model.model.layers[layer].mlp.experts
            for expert in range(EXPERTS):
                stem = f"model.layers.{layer}.mlp.experts.{expert}"
                gate, up, down = (
                    dequantise(stored, f"{stem}.{part}")
                    if f"{stem}.{part}.qweight" in stored
                    else stored[f"{stem}.{part}.weight"].float()
                    for part in ("gate_proj", "up_proj", "down_proj")
                )
                experts.gate_up_proj[expert] = torch.cat([gate, up])
                experts.down_proj[expert] = down
    return model.eval()


def streamed_logits(source: ModelSource, read: Reader, tokens: list[list[int]]) -> Tensor:
    model = StreamedModel(source, read)
    states = model.embed([torch.tensor(tokens)])
    for layer in range(source.layer_count):
        states = model.run_layer(layer, model.load_layer(layer), states)
    return next(model.logits(states))


@pytest.fixture(scope="session")
def validated_logits(result: Path, source: ModelSource, held_out: list[list[int]]) -> Tensor:
    """What the validator's own reader makes of two held-out sequences."""
    read = open_result(read_headers(result), source.tensors, Scheme("gptq", "gptq", 64, True))
    return streamed_logits(source, read, held_out[:2])


@pytest.fixture(scope="session")
def through_gptqmodel(
    result: Path, held_out: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    scratch = tmp_path_factory.mktemp("gptqmodel")
    prompt = AutoTokenizer.from_pretrained(result)(PROMPT)["input_ids"]
    arguments = [str(result), str(scratch), json.dumps(held_out[:2]), json.dumps(prompt)]
    subprocess.run(
        [sys.executable, "-c", LOADER, *arguments], check=True, capture_output=True, env=ENVIRONMENT
    )
    return load_file(scratch / "found.safetensors")


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """Median over positions: in bfloat16 a few tokens go to other experts."""
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@torch.no_grad()
def test_the_validator_saw_what_is_in_the_file(
    by_hand: torch.nn.Module, validated_logits: Tensor, held_out: list[list[int]]
) -> None:
    logits = by_hand(torch.tensor(held_out[:2])).logits
    torch.testing.assert_close(validated_logits, logits, rtol=1e-3, atol=1e-2)


def test_gptqmodel_computes_what_was_validated(
    through_gptqmodel: dict[str, Tensor], validated_logits: Tensor, source: ModelSource
) -> None:
    assert relative_error(through_gptqmodel["logits"], validated_logits) < 0.05


def test_gptqmodel_writes_english(through_gptqmodel: dict[str, Tensor], result: Path) -> None:
    texts = (ROOT / "tools" / "reference" / "text").glob("*.txt")
    known = set(re.findall(r"[a-z]+", " ".join(p.read_text("utf-8") for p in texts).lower()))
    written = AutoTokenizer.from_pretrained(result).decode(through_gptqmodel["written"][0])
    assert written.startswith(PROMPT)
    words = re.findall(r"[a-z]+", written.removeprefix(PROMPT).lower())
    assert len(words) >= 15
    assert sum(word in known for word in words) >= 0.8 * len(words), written
    assert len(set(words)) >= 8, written


def test_transformers_alone_would_make_up_the_experts(result: Path, tmp_path: Path) -> None:
    """The documented trap: no exception, only the loading info tells."""
    subprocess.run(
        [sys.executable, "-c", TRAP, str(result), str(tmp_path)],
        check=True, capture_output=True, env=ENVIRONMENT,
    )  # fmt: skip
    info = json.loads((tmp_path / "info.json").read_text("utf-8"))
    for layer in set(range(LAYERS)) - {SUPER_LAYER}:  # there, one of sixteen is found
        assert f"model.layers.{layer}.mlp.experts.gate_up_proj" in info["missing_keys"]
    assert "model.layers.0.mlp.experts.0.down_proj.qweight" in info["unexpected_keys"]


# ---------------------------------------------------------------- the unquantised target, and gates


@pytest.fixture(scope="session")
def unquantised(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export for transformers. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("unquantised") / "result"
    recipe = load_recipe(QUICKSTART, UNQUANTISED)
    compress(source, make_plan(source, None, recipe), [], recipe, directory)
    return directory


@torch.no_grad()
def test_transformers_loads_the_unquantised_result(
    unquantised: Path, source: ModelSource, held_out: list[list[int]]
) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        unquantised, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    original = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    tokens = torch.tensor(held_out[:1])
    torch.testing.assert_close(model(tokens).logits, original(tokens).logits, rtol=0, atol=0)


def judge_without(
    expert: int, unquantised: Path, source: ModelSource, tokens: list[list[int]], tmp_path: Path
) -> ValidationReport:
    """The validator's report on the unquantised result with one expert of layer 11 deleted."""
    directory = tmp_path / "without"
    shutil.copytree(unquantised, directory)
    name = f"model.layers.{SUPER_LAYER}.mlp.experts.{expert}.down_proj.weight"
    edit_weights(directory, {name: torch.zeros(576, 64, dtype=torch.bfloat16)})
    recipe = load_recipe(QUICKSTART, (*UNQUANTISED, "validation.generation.tokens=0"))
    plan = make_plan(source, None, recipe)
    return validate(source, plan, directory, tokens, recipe)


def failed(report: ValidationReport) -> set[str]:
    return {check.name for check in report.checks if check.passed is False}


def test_without_the_super_expert_the_gates_fail(
    unquantised: Path,
    source: ModelSource,
    profile: ExpertProfile,
    held_out: list[list[int]],
    tmp_path: Path,
) -> None:
    expert = profile.super_experts[0].expert
    assert isinstance(expert, int)
    report = judge_without(expert, unquantised, source, held_out, tmp_path)
    assert not report.passed
    assert failed(report) == {
        "perplexity_increase",
        "kl_divergence",
        "massive_activation_ratio",
        "sink_token_error",
        "sink_decay",
        "tensors_accounted",
    }
    assert report.check("massive_activation_ratio").value < 0.1  # type: ignore[operator]
    assert report.check("sink_decay").value > 0.3  # type: ignore[operator]
    assert report.check("kl_divergence").value > 1.0  # type: ignore[operator]
    assert f"experts.{expert}.down_proj.weight differs" in report.check("tensors_accounted").detail


def test_without_another_expert_only_the_account_fails(
    unquantised: Path,
    source: ModelSource,
    profile: ExpertProfile,
    held_out: list[list[int]],
    tmp_path: Path,
) -> None:
    super_expert = profile.super_experts[0]
    assert super_expert.control is not None
    other = super_expert.control.expert
    assert isinstance(other, int)
    report = judge_without(other, unquantised, source, held_out, tmp_path)
    assert failed(report) == {"tensors_accounted"}


# ----------------------------------------------------------------------------------- the exact view


def test_the_mixtral_view_has_its_super_expert_in_the_same_layer(models: Path) -> None:
    mixtral = open_source(str(models / "smollm2-mixtral"))
    recipe = load_recipe(QUICKSTART, (*SMALLER, "calibration.samples=4"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        tokens = draw_sequences(recipe.calibration, mixtral.path, "calibration")
    profile = profile_experts(mixtral, tokens, recipe, RunOptions())
    (found,) = profile.super_experts
    assert (found.layer, found.position, found.confirmed) == (SUPER_LAYER, 0, True)
    assert {outlier.reason for outlier in profile.outliers} <= {"cancels"}
    assert {outlier.layer for outlier in profile.outliers} <= {28, 29}
