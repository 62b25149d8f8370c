"""What stands beside the tensors: settings that mean what the plan says, and the source's files."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from se_compress.artifacts import CompressionPlan, ExpertDecision, ModelSource
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.export import checked_settings, export_config, quantization_config
from se_compress.errors import ValidationFailed
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan

TinyModel = Callable[[str], Path]


def plan_for(source: ModelSource, **policy: Any) -> CompressionPlan:
    settings = {
        "target": "gptqmodel",
        "policy": {"bits": 4, **policy},
        "quantization": {"method": "rtn", "group_size": 32},
    }
    return make_plan(source, None, tiny.recipe(source.name, **settings))


def unquantised(source: ModelSource) -> CompressionPlan:
    return make_plan(source, None, tiny.recipe(source.name, quantization={"method": "none"}))


def bits_by_config(config: dict[str, Any], module: str) -> int:
    """The width that GPTQModel gives a module: the first pattern that matches decides, "-:" leaves
    it alone, "+:" overrides (quantization/config.py, dynamic_get); "-:" is moved to the front."""
    for rule, override in sorted(config["dynamic"].items(), key=lambda rule: rule[0][0] != "-"):
        if re.match(rule[2:], module):
            return 16 if rule.startswith("-:") else int(override["bits"])
    return int(config["bits"])


# -------------------------------------------------------------------------------------- settings


def test_the_settings_are_those_of_gptq_v1(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    protect = [{"layer": 1, "expert": 2}]
    assert quantization_config(draw_blueprint(source, plan_for(source, protect=protect))) == {
        "quant_method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": {
            r"-:^model\.layers\.1\.mlp\.experts\.2\.": {},
            r"-:^(model\.|lm_head)(?!.*\.experts(\.|$)).*$": {},
        },
        "meta": {"quantizer": ["se-compress"]},
    }


def test_an_unquantised_model_has_no_settings(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    assert quantization_config(draw_blueprint(source, unquantised(source))) == {}


def mixed(decision: ExpertDecision) -> ExpertDecision:
    """Every width, also of one part alone: the commonest is 3."""
    if decision.expert == "shared":
        return decision
    place = (decision.layer + decision.expert) % 8
    bits, down = (3, 3, 2, 3, 8, 16, 16, 3)[place], (None, None, 4, None, 16, None, 2, None)[place]
    action = "keep" if (bits, down) == (16, None) else "quantize"
    return replace(decision, bits=bits, down_bits=down, action=action)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_the_patterns_give_every_module_what_the_plan_says(
    tiny_model: TinyModel, family: str
) -> None:
    source = open_source(str(tiny_model(family)))
    plan = plan_for(source)
    plan = replace(plan, experts=tuple(map(mixed, plan.experts)))
    blueprint = draw_blueprint(source, plan)
    config = quantization_config(blueprint)
    assert config["bits"] == 3
    for tensor in blueprint.tensors.values():
        assert bits_by_config(config, tensor.module) == tensor.bits, tensor.module


def test_expert_1_is_not_taken_for_expert_10(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3_moe", num_experts=12)
    source = open_source(str(tmp_path))
    config = quantization_config(
        draw_blueprint(source, plan_for(source, protect=[{"layer": 1, "expert": 1}]))
    )
    kept = [
        (layer, expert)
        for layer in range(3)
        for expert in range(12)
        if bits_by_config(config, f"model.layers.{layer}.mlp.experts.{expert}.up_proj") == 16
    ]
    assert kept == [(1, 1)]


def test_equally_common_widths_are_settled_alike(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    plan = plan_for(source)
    halves = [replace(d, bits=2 if i % 2 else 8) for i, d in enumerate(plan.experts)]
    configs = [
        quantization_config(draw_blueprint(source, replace(plan, experts=tuple(rows))))["bits"]
        for rows in (halves, halves[::-1])
    ]
    assert configs == [8, 8]


@pytest.mark.parametrize("data_type", ["nf4", "int8"])
def test_bitsandbytes_settings_name_what_is_not_packed(
    tiny_model: TinyModel, data_type: str
) -> None:
    source = open_source(str(tiny_model("mixtral")))
    blocks = {} if data_type == "int8" else {"block_size": 32, "double_quant": False}
    recipe = tiny.recipe(
        source.name,
        policy={"bits": 8 if blocks == {} else 4, "protect": [{"layer": 1, "expert": 2}]},
        quantization={"method": "bitsandbytes", "data_type": data_type, **blocks},
    )
    expert = "model.layers.1.block_sparse_moe.experts.2"
    assert quantization_config(draw_blueprint(source, make_plan(source, None, recipe))) == {
        "quant_method": "se-compress",
        "format": "bitsandbytes",
        "version": 1,
        "data_type": data_type,
        **blocks,
        "in_16_bit": [f"{expert}.w1", f"{expert}.w2", f"{expert}.w3"],
        "others": [],
    }


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def source(tiny_model: TinyModel, tmp_path: Path) -> ModelSource:
    """A model with everything beside it that a download may hold."""
    directory = tmp_path / "source"
    shutil.copytree(tiny_model("qwen3_moe"), directory)
    for name in ("LICENSE", "chat_template.jinja", "vocab.txt", "README.md", ".gitattributes",
                 "pytorch_model.bin", "pytorch_model.bin.index.json", "model.onnx", "model.gguf",
                 "quantize_config.json", "model.safetensors.index.json.bak"):  # fmt: skip
        (directory / name).write_text(name, encoding="utf-8")
    (directory / "onnx").mkdir()
    (directory / "merges.txt").symlink_to(directory / "vocab.txt")
    return open_source(str(directory))


def export(source: ModelSource, plan: CompressionPlan, directory: Path) -> set[str]:
    directory.mkdir()
    blueprint = draw_blueprint(source, plan)
    export_config(blueprint, checked_settings(blueprint), directory)
    return {entry.name for entry in directory.iterdir()}


KEPT = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE",
    "chat_template.jinja", "vocab.txt", "merges.txt",
}  # fmt: skip


def test_what_a_loader_may_want_is_copied_and_no_weights(
    source: ModelSource, tmp_path: Path
) -> None:
    assert export(source, unquantised(source), tmp_path / "out") == KEPT
    copy = tmp_path / "out" / "tokenizer.json"
    assert copy.read_bytes() == (source.path / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "merges.txt").is_symlink()


def test_the_config_of_an_unquantised_model_is_the_source_s(
    source: ModelSource, tmp_path: Path
) -> None:
    export(source, unquantised(source), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config == source.config


def test_the_settings_stand_in_both_files_that_loaders_read(
    source: ModelSource, tmp_path: Path
) -> None:
    plan = plan_for(source)
    assert export(source, plan, tmp_path / "out") == KEPT | {"quantize_config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text(encoding="utf-8"))
    assert config == {**source.config, "quantization_config": settings}
    assert settings == quantization_config(draw_blueprint(source, plan))


def test_configs_lose_code_that_nobody_asked_for(source: ModelSource, tmp_path: Path) -> None:
    mapped = {"auto_map": {"AutoConfig": "configuration_x.X"}}
    tiny.edit_config(source.path, **mapped)
    (source.path / "configuration_x.py").write_text("from .part import X\n", encoding="utf-8")
    (source.path / "part.py").write_text("class X: pass\n", encoding="utf-8")
    source = open_source(str(source.path))
    assert export(source, unquantised(source), tmp_path / "out") == KEPT
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config == {k: v for k, v in source.config.items() if k != "auto_map"}
    (tmp_path / "kept").mkdir()
    export_config(
        draw_blueprint(source, unquantised(source)), {}, tmp_path / "kept", keep_code=True
    )
    kept = {entry.name for entry in (tmp_path / "kept").iterdir()}
    assert kept == KEPT | {"configuration_x.py", "part.py"}
    config = json.loads((tmp_path / "kept" / "config.json").read_text(encoding="utf-8"))
    assert config == dict(source.config)


def test_settings_that_an_engine_would_read_wrong_are_not_written(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("se_compress.formats.gptq._dynamic", lambda *arguments: {})
    with pytest.raises(ValidationFailed, match=r"read wrong by gptqmodel: model\.layers\.0\.mlp"):
        export(source, plan_for(source), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_of_multi_token_prediction_are_left_alone_by_one_rule(
    tmp_path: Path, layers: int
) -> None:
    tiny.build(tmp_path, "deepseek_v3", num_nextn_predict_layers=layers)
    source = open_source(str(tmp_path))
    for policy in ({}, {"other_bits": 8}):
        dynamic = quantization_config(draw_blueprint(source, plan_for(source, **policy)))["dynamic"]
        of_them = [rule for rule in dynamic if r"layers\.3" in rule or r"layers\.4" in rule]
        assert of_them == [rf"-:^model\.layers\.{3 + n}\." for n in range(layers)]
