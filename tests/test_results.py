"""What holds of results in every format: shards, tied weights, tensors that no pass uses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from dequantise import dequantised, width
from safetensors.torch import load_file

from se_compress.artifacts import CompressionPlan, ModelSource, TensorInfo
from se_compress.engines.blueprint import draw_blueprint
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan

TinyModel = Callable[[str], Path]
FORMATS = [
    ("gptqmodel", "gptq"),
    ("gptqmodel", "gptq_v2"),
    ("transformers", "auto-round"),
    ("transformers", "compressed-tensors"),
    ("vllm", "compressed-tensors"),
]


def plan_for(source: ModelSource, target: str, form: str) -> CompressionPlan:
    settings = {
        "target": target,
        "policy": {"bits": 4, "protect": "none"},
        "quantization": {"method": "rtn", "group_size": 32, "format": form},
    }
    return make_plan(source, None, tiny.recipe(source.name, **settings))


@pytest.mark.parametrize(("target", "form"), FORMATS)
def test_shards_are_no_larger_than_asked_and_hold_every_planned_tensor(
    tiny_model: TinyModel, tmp_path: Path, target: str, form: str
) -> None:
    source = open_source(str(tiny_model("qwen3_moe-tied")))
    plan = plan_for(source, target, form)
    directory = tiny.write_result(source, plan, tmp_path / "result", shard_bytes=60_000)
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    slots = draw_blueprint(source, plan).slots
    largest = max(slot.size_bytes for slot in slots.values())
    for shard in shards:
        assert sum(t.numel() * t.itemsize for t in load_file(shard).values()) <= max(
            60_000, largest
        )
    found = read_headers(directory)
    assert found.keys() == slots.keys()
    assert "lm_head.weight" not in found  # tied to the embedding, as in the source
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is True


@pytest.mark.parametrize(("target", "form"), FORMATS)
def test_layers_for_multi_token_prediction_are_carried_over_unchanged(
    tiny_model: TinyModel, tmp_path: Path, target: str, form: str
) -> None:
    source = open_source(str(tiny_model("deepseek_v3-next-token")))
    directory = tiny.write_result(source, plan_for(source, target, form), tmp_path / "result")
    found = read_headers(directory)
    extra = [i for i in source.tensors.values() if i.name.startswith("model.layers.3.")]
    assert any(".experts." in info.name for info in extra)
    for info in extra:
        assert raw(found[info.name]) == raw(info)
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings = settings["quantization_config"]
    if form == "compressed-tensors":  # it counts what nothing names as quantised
        modules = [i.name.removesuffix(".weight") for i in extra if len(i.shape) == 2]
        assert {width(settings, module) for module in modules} == {16}


def raw(info: TensorInfo) -> bytes:
    return Path(info.file).read_bytes()[info.begin : info.end]


def test_the_independent_reading_fails_where_settings_and_tensors_disagree(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The proof by engine rests on it: it must not look away."""
    source = open_source(str(tiny_model("qwen3_moe")))
    plan = plan_for(source, "transformers", "auto-round")
    directory = tiny.write_result(source, plan, tmp_path / "result")
    right = dequantised(directory)
    name = "model.layers.1.mlp.experts.3.up_proj"
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["extra_config"][name] = {"bits": 8}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises((ValueError, IndexError)):
        assert dequantised(directory)[f"{name}.weight"].shape == right[f"{name}.weight"].shape
