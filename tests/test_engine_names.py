"""Results under the names that engines look for: of models that are published under others, of
halves that engines join again, and of what is one tensor in memory."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import engine_types
import pytest
import tiny
import tiny_types
import torch
from dequantise import dequantised
from safetensors.torch import load_file

from se_compress.engines.accounting import is_complete
from se_compress.engines.blueprint import draw_blueprint
from se_compress.model.checkpoint import open_tensors
from se_compress.opening.families import FAMILIES
from se_compress.opening.headers import Slot, read_headers
from se_compress.opening.merged import merged, parted
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan

TinyType = Callable[[str], Path]


def test_gate_and_up_of_gpt_oss_are_the_halves_of_both(tiny_type: TinyType, tmp_path: Path) -> None:
    """One above the other they are gate_up_proj of the source, whose rows take turns."""
    source = open_source(str(tiny_type("gpt_oss")))
    path = engine_types.write(source, "auto-round", tmp_path / "result")
    weights, original = dequantised(path), load_file(tiny_type("gpt_oss") / "model.safetensors")
    for layer in source.moe_layers:
        stem = f"model.layers.{layer}.mlp.experts"
        whole = original[f"{stem}.gate_up_proj"].float().mT
        biases = original[f"{stem}.gate_up_proj_bias"]
        for expert in range(source.expert_count):
            parts = [f"{stem}.{expert}.{name}" for name in ("gate_proj", "up_proj")]
            found = torch.cat([weights[f"{part}.weight"] for part in parts])
            error = (found - whole[expert]).norm() / whole[expert].norm()
            assert error < (1e-6 if expert == 1 else 0.1)  # of 4 bits; the second is kept
            assert torch.equal(torch.cat([weights[f"{p}.bias"] for p in parts]), biases[expert])


def test_convolutions_of_kimi_linear_are_one_tensor(tiny_type: TinyType, tmp_path: Path) -> None:
    source = open_source(str(tiny_type("kimi_linear")))
    path = engine_types.write(source, "auto-round", tmp_path / "result")
    stored, read = load_file(path / "model.safetensors"), open_tensors(source.tensors)
    stem = "model.layers.0.self_attn."
    assert f"{stem}q_conv1d.weight" not in stored
    parts = [read(f"{stem}{letter}_conv1d.weight") for letter in "qkv"]
    assert torch.equal(stored[f"{stem}conv1d.weight"], torch.cat(parts))


def test_what_is_merged_is_found_again(tiny_type: TinyType, tmp_path: Path) -> None:
    source = open_source(str(tiny_type("kimi_linear")))
    settings = tiny.recipe(
        source.path, target="transformers", quantization={"method": "rtn", "group_size": 32},
        policy={"bits": 4, "protect": "none"},
    )  # fmt: skip
    plan = make_plan(source, None, settings)
    assert plan.scheme.format == "auto-round"
    blueprint = draw_blueprint(source, plan)
    path = tiny.write_result(source, plan, tmp_path / "result")
    headers = read_headers(path)
    assert not is_complete(blueprint, headers)
    assert is_complete(blueprint, blueprint.found_in(headers))
    assert sum(info.size_bytes for info in headers.values()) == plan.size_bytes


def test_parts_that_do_not_fit_stay_apart() -> None:
    family = FAMILIES["kimi_linear"]
    stem = "model.layers.0.self_attn."
    shapes = {"q": (4, 1, 2), "k": (4, 1, 2), "v": (6, 1, 2)}
    slots = {f"{stem}{k}_conv1d.weight": Slot(f"{stem}{k}_conv1d.weight", "BF16", s)
             for k, s in shapes.items()}  # fmt: skip
    whole = merged(slots, family)
    assert list(whole) == [f"{stem}conv1d.weight"]
    assert whole[f"{stem}conv1d.weight"].shape == (14, 1, 2)
    two = dict(list(slots.items())[:2])
    assert merged(two, family) == two
    assert parted({}, slots, family) == {}
    name = f"{stem}v_conv1d.weight"
    with pytest.raises(ValueError, match=r"v_conv1d\.weight \(6, 1, 3\) does not go below \(8, 1"):
        merged({**slots, name: Slot(name, "BF16", (6, 1, 3))}, family)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("gemma4", "model.language_model.layers"),
        ("llama4", "model.layers"),
        ("qwen3_5_moe", "model.layers"),
        ("qwen4_exp", "model.layers"),
    ],
)
def test_a_composite_goes_by_the_names_of_the_model_that_transformers_builds(
    tmp_path: Path, name: str, prefix: str
) -> None:
    source = open_source(str(tiny_types.build_composite(tmp_path / "model", name)))
    assert source.prefix == tiny_types.published_name(name, "model.")
    path = engine_types.write(source, "auto-round", tmp_path / "result")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["block_name_to_quantize"] == prefix
    names = load_file(path / "model.safetensors")
    assert any(n.startswith(f"{prefix}.") and n.endswith(".qweight") for n in names)
    towers = [n for n in source.tensors if re.match(r"model\.visual\.|vision_model\.", n)]
    assert all(tower in names for tower in towers)
    assert bool(towers) is (name != "gemma4")


def test_linears_outside_of_the_layers_are_listed_by_both_names(tmp_path: Path) -> None:
    """Qwen4's mixers of hyper-connections: what `ignore` does not list is taken for quantised."""
    source = open_source(str(tiny_types.build_composite(tmp_path / "model", "qwen4_exp")))
    path = engine_types.write(source, "compressed-tensors", tmp_path / "result")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    ignored = config["quantization_config"]["ignore"]
    mixers = [name for name in ignored if "hyper_connection_mixer" in name]
    assert {name.partition("hyper")[0] for name in mixers} == {"model.", "model.language_model."}
