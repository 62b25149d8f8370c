"""The engines load what we write: names, patterns and packed numbers, for every family.

GPTQModel patches torch and transformers when it is imported and takes seconds over it, so one
process loads all families and writes down what it found.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from se_compress import reload
from se_compress.artifacts import CompressionPlan, ExpertDecision, ModelSource
from se_compress.compression.execute import compress
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.targets import is_other_linear
from se_compress.formats import UNQUANTISED
from se_compress.model.checkpoint import Reader, open_result
from se_compress.model.streaming import StreamedModel
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.check import check_plan
from se_compress.planning.policy import make_plan

TinyModel = Callable[[str], Path]
TOKENS = tiny.random_tokens(2, 24, seed=5)
MIXED = "qwen3_moe-mixed"
OTHERS = ("qwen2_moe-others", "deepseek_v2-others")  # attention and MLPs are packed as well
CASES = (*tiny.CONFIGS, MIXED, *OTHERS)

# Logits, and what each expert's projection stands for, through GPTQModel; float16, as its reference
# kernel has no float32. TORCHDYNAMO_DISABLE: compiling its 2- and 8-bit kernels takes longer than
# all the rest.
LOADER = """
import json, sys, torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
for directory in sys.argv[2:]:
    wrapped = GPTQModel.load(
        directory, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH
    )
    model = wrapped.model.eval()
    with torch.no_grad():
        found = {"logits": model(torch.tensor(json.loads(sys.argv[1]))).logits.float()}
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            found[f"packed {name}"] = module.dequantize_weight().T.contiguous()
        elif type(module) is torch.nn.Linear:
            found[f"plain {name}"] = module.weight.detach().contiguous()
    save_file(found, f"{directory}.found")
"""


def plan_for(source: ModelSource, name: str) -> CompressionPlan:
    settings = {
        "target": "gptqmodel",
        "policy": {
            "protect": [{"layer": source.moe_layers[-1], "expert": 2}],
            "bits": 4,
            "other_bits": 8 if name in OTHERS else 16,
        },
        "quantization": {"method": "rtn", "group_size": 32},
    }
    plan = make_plan(source, None, tiny.recipe(source.name, **settings))
    if name != MIXED:
        return plan
    experts = tuple(map(mixed, plan.experts))
    return check_plan(replace(plan, experts=experts), source, "mixed")


def mixed(decision: ExpertDecision) -> ExpertDecision:
    if decision.bits == 16 or decision.expert == "shared":
        return decision
    return replace(decision, bits=(2, 3, 4, 8)[(decision.layer + decision.expert) % 4])


def write(source: ModelSource, plan: CompressionPlan, directory: Path) -> None:
    """The whole result, as the pipeline writes it."""
    settings = {
        "target": plan.target,
        "quantization": {
            "method": plan.scheme.method,
            "group_size": plan.scheme.group_size,
        },
    }
    compress(source, plan, TOKENS, tiny.recipe(source.name, **settings), directory)


def reader(source: ModelSource, plan: CompressionPlan, directory: Path) -> Reader:
    found = read_headers(directory)
    names = draw_blueprint(source, plan).names
    return open_result(found, source.tensors, plan.scheme, names)


def logits(source: ModelSource, read: Reader) -> Tensor:
    model = StreamedModel(source, read)
    states = model.embed([torch.tensor(TOKENS)])
    for layer in range(source.layer_count):
        states = model.run_layer(layer, model.load_layer(layer), states)
    return next(model.logits(states))


Loaded = Mapping[str, tuple[ModelSource, CompressionPlan, Reader, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def loaded(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """For each case: source, plan, our reader of the result, and what GPTQModel found in it."""
    root = tmp_path_factory.mktemp("gptqmodel")
    parts = {}
    for name in CASES:
        source = open_source(str(tiny_model(name.partition("-")[0])))
        plan = plan_for(source, name)
        write(source, plan, root / name)
        parts[name] = (source, plan, reader(source, plan, root / name))
    run_loader(*(root / name for name in CASES))
    return {name: (*parts[name], load_file(root / f"{name}.found")) for name in CASES}


def run_loader(*directories: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(TOKENS), *map(str, directories)],
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_reads_every_matrix_as_we_do(loaded: Loaded, name: str) -> None:
    source, plan, read, found = loaded[name]
    blueprint, packed = draw_blueprint(source, plan), 0
    for info in source.tensors.values():
        if info.role is not None or is_other_linear(info):
            planned = blueprint.tensors[info.name]
            module, quantized = planned.module, planned.making == "packed"
            packed += quantized
            stands_for = found[f"{'packed' if quantized else 'plain'} {module}"]
            torch.testing.assert_close(stands_for, read(info.name).half(), rtol=0, atol=0)
    assert packed == sum(key.startswith("packed ") for key in found)
    experts = 3 * (len(source.moe_layers) * source.expert_count - 1)
    assert (packed > experts + 10) if name in OTHERS else (packed == experts)


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_computes_what_the_validator_sees(loaded: Loaded, name: str) -> None:
    source, _, read, found = loaded[name]
    expected = logits(source, read)
    error = (found["logits"] - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A median, as float16 sends a token or two of a random model to other experts.
    assert error.median() < 0.01


def test_the_widths_of_the_mixed_case_are_mixed(loaded: Loaded) -> None:
    source, plan, _, _ = loaded[MIXED]
    assert {plan.by_id[identity].bits for identity in source.experts} == {2, 3, 4, 8, 16}


# ------------------------------------------------------------------------------ the reload process


def ask(scratch: Path, target: str, form: str = UNQUANTISED) -> list[str]:
    request = {"tokens": TOKENS[0], "target": target, "format": form}
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    return ["reload", str(scratch.parent / "result"), str(scratch)]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def test_transformers_computes_what_the_validator_sees(
    tiny_model: TinyModel, scratch: Path
) -> None:
    source = open_source(str(tiny_model("deepseek_v3-next-token")))
    plan = make_plan(source, None, tiny.recipe(source.name, quantization={"method": "none"}))
    directory = scratch.parent / "result"
    write(source, plan, directory)
    command = [sys.executable, "-m", "se_compress.reload", *ask(scratch, "transformers")[1:]]
    subprocess.run(command, check=True, capture_output=True)
    found = load_file(scratch / "logits.safetensors")["logits"]
    expected = logits(source, reader(source, plan, directory))[:1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_transformers_refuses_a_result_with_a_tensor_missing(
    tiny_model: TinyModel, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = scratch.parent / "result"
    source = open_source(str(tiny_model("qwen3_moe")))
    plan = make_plan(source, None, tiny.recipe(source.name, quantization={"method": "none"}))
    write(source, plan, directory)
    tiny.edit_weights(directory, {"model.layers.1.self_attn.q_proj.weight": None})
    monkeypatch.setattr(sys, "argv", ask(scratch, "transformers"))
    with pytest.raises(SystemExit, match=r"missing_keys: \['model.layers.1.self_attn.q_proj"):
        reload.main()


def test_a_missing_engine_is_told_from_a_broken_result(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (scratch.parent / "result").mkdir()
    (scratch.parent / "result" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(reload.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ask(scratch, "gptqmodel"))
    assert reload.main() == 77
    message = "gptqmodel is not installed (pip install 'se-compress[gptq]')\n"
    assert capsys.readouterr().err == message


def test_a_missing_bitsandbytes_is_told_from_a_broken_result(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (scratch.parent / "result").mkdir()
    (scratch.parent / "result" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(reload.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ask(scratch, "transformers", "bitsandbytes"))
    assert reload.main() == 77
    message = "bitsandbytes is not installed (pip install 'se-compress[bnb]')\n"
    assert capsys.readouterr().err == message


def test_layers_of_several_widths_are_not_shown_to_transformers(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "quant_method": "compressed-tensors",
        "ignore": [r"re:.*\.layers\.(1)\..*\.experts\.\d+\..*"],
    }
    (scratch.parent / "result").mkdir()
    config = json.dumps({"quantization_config": settings})
    (scratch.parent / "result" / "config.json").write_text(config, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ask(scratch, "vllm"))
    assert reload.main() == 78
    assert "vllm is not installed, and transformers would read" in capsys.readouterr().err


def test_a_machine_that_is_too_small_is_told_from_a_broken_result(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = scratch.parent / "result"
    result.mkdir()
    (result / "model.safetensors").write_bytes(bytes(600))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(sys, "argv", ask(scratch, "gptqmodel"))
    assert reload.main() == 77
    assert capsys.readouterr().err == (
        "loading needs about 0.0 GB of memory, and 0.0 GB of this machine are available\n"
    )
