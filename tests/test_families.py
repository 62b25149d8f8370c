"""One row per family: each template finds its tensors, and each tensor is one thing only."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import CONFIGS, VARIANTS
from transformers import AutoConfig, AutoModelForCausalLM

from se_compress import families
from se_compress.artifacts import ROLES, TensorInfo
from se_compress.errors import SourceError
from se_compress.families import FAMILIES

TinyModel = Callable[[str], Path]


def read(directory: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json, and name -> shape as the safetensors library reads it."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with safe_open(directory / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return config, shapes


def info(name: str) -> TensorInfo:
    return TensorInfo(name, "BF16", (1,), "model.safetensors", 0, 2)


def classified(name: str, family: str) -> TensorInfo:
    return families.classify(info(name), FAMILIES[family], CONFIGS[family])


def test_every_row_has_a_tiny_model() -> None:
    assert set(CONFIGS) == set(FAMILIES)
    assert all(row.model_type == key for key, row in FAMILIES.items())


# ------------------------------------------------------------------------- templates and tensors


@pytest.mark.parametrize("name", VARIANTS)
def test_every_template_finds_its_tensors(tiny_model: TinyModel, name: str) -> None:
    config, shapes = read(tiny_model(name))
    family = FAMILIES[config["model_type"]]
    count = config[families.count_key(family, config)]
    hidden = config["hidden_size"]
    for layer in families.moe_layers(config):
        assert shapes[family.router.format(layer=layer)] == (count, hidden)
        for template in family.per_expert:
            assert shapes[template.format(layer=layer)][0] == count
        if family.shared_gate:
            assert shapes[family.shared_gate.format(layer=layer)] == (1, hidden)
        for expert, projection in product(range(count), family.projections):
            assert family.expert.format(layer=layer, expert=expert, projection=projection) in shapes
        for projection in family.projections if family.shared else ():
            assert family.shared.format(layer=layer, projection=projection) in shapes


@pytest.mark.parametrize("name", VARIANTS)
def test_the_config_promises_exactly_the_experts_that_transformers_saves(
    tiny_model: TinyModel, name: str
) -> None:
    config, shapes = read(tiny_model(name))
    promised = families.expected_experts(FAMILIES[config["model_type"]], config)
    behind = tuple(f"model.layers.{config['num_hidden_layers'] + i}." for i in range(2))
    saved = {
        tensor: shape
        for tensor, shape in shapes.items()
        if ".experts." in tensor or ".shared_expert" in tensor
        if "shared_expert_gate" not in tensor and not tensor.startswith(behind)
    }
    assert promised == saved


@pytest.mark.parametrize("name", VARIANTS)
def test_each_expert_tensor_is_classified_exactly_once(tiny_model: TinyModel, name: str) -> None:
    config, shapes = read(tiny_model(name))
    family = FAMILIES[config["model_type"]]
    found = [families.classify(info(tensor), family, config) for tensor in shapes]
    layers, count = families.moe_layers(config), config[families.count_key(family, config)]
    routed = [(i.layer, i.expert, i.role) for i in found if i.kind == "expert"]
    assert sorted(routed, key=str) == sorted(product(layers, range(count), ROLES), key=str)
    shared = [(i.layer, i.expert, i.role) for i in found if i.kind == "shared_expert"]
    assert sorted(shared, key=str) == sorted(
        product(layers, ["shared"] if family.shared else [], ROLES), key=str
    )
    routers = sorted(i.name for i in found if i.kind == "router")
    assert routers == sorted(n for at in layers for n in families.router_tensors(family, at))
    assert all((i.expert is None) == (i.role is None) for i in found)
    behind = [i for i in found if f"layers.{config['num_hidden_layers']}." in i.name]
    assert {i.kind for i in found if i not in behind} >= {"attention", "norm", "embedding"}
    assert "other" not in {i.kind for i in found if i not in behind}


@pytest.mark.parametrize("name", VARIANTS)
def test_expert_layers_are_those_of_transformers(tiny_model: TinyModel, name: str) -> None:
    config, _ = read(tiny_model(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model(name)))
    live = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    assert families.moe_layers(config) == live
    assert families.layer_count(config) == len(model.model.layers)


# -------------------------------------------------------------------------------- classification


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        (
            "mixtral",
            "model.layers.2.block_sparse_moe.experts.0.w1.weight",
            ("expert", 2, 0, "gate"),
        ),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.0.w3.weight", ("expert", 2, 0, "up")),
        (
            "mixtral",
            "model.layers.2.block_sparse_moe.experts.0.w2.weight",
            ("expert", 2, 0, "down"),
        ),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", ("router", 0, None, None)),
        ("qwen3_moe", "model.layers.1.mlp.experts.11.up_proj.weight", ("expert", 1, 11, "up")),
        ("qwen3_moe", "model.layers.1.self_attn.q_norm.weight", ("norm", 1, None, None)),
        ("qwen3_moe", "model.layers.1.self_attn.k_proj.weight", ("attention", 1, None, None)),
        ("qwen2_moe", "model.layers.1.self_attn.k_proj.bias", ("attention", 1, None, None)),
        ("qwen2_moe", "model.layers.0.mlp.down_proj.weight", ("dense_mlp", 0, None, None)),
        (
            "qwen2_moe",
            "model.layers.2.mlp.shared_expert.gate_proj.weight",
            ("shared_expert", 2, "shared", "gate"),
        ),
        ("qwen2_moe", "model.layers.2.mlp.shared_expert_gate.weight", ("router", 2, None, None)),
        (
            "deepseek_v2",
            "model.layers.2.mlp.shared_experts.down_proj.weight",
            ("shared_expert", 2, "shared", "down"),
        ),
        (
            "deepseek_v3",
            "model.layers.1.mlp.gate.e_score_correction_bias",
            ("router", 1, None, None),
        ),
        (
            "deepseek_v3",
            "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
            ("attention", 1, None, None),
        ),
        ("deepseek_v3", "model.layers.1.self_attn.kv_a_layernorm.weight", ("norm", 1, None, None)),
        ("deepseek_v3", "model.layers.1.post_attention_layernorm.weight", ("norm", 1, None, None)),
        ("deepseek_v3", "model.layers.1.some_future_thing.weight", ("other", 1, None, None)),
        ("deepseek_v3", "model.layers.3.mlp.experts.0.up_proj.weight", ("other", None, None, None)),
        ("deepseek_v3", "model.layers.3.embed_tokens.weight", ("other", None, None, None)),
        ("olmoe", "model.embed_tokens.weight", ("embedding", None, None, None)),
        ("olmoe", "lm_head.weight", ("embedding", None, None, None)),
        ("olmoe", "model.norm.weight", ("norm", None, None, None)),
        ("olmoe", "model.something_else", ("other", None, None, None)),
    ],
)
def test_kind(family: str, name: str, expected: tuple[object, ...]) -> None:
    found = classified(name, family)
    assert (found.kind, found.layer, found.expert, found.role) == expected


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.up_proj.bias",
        "model.layers.1.mlp.experts.3.up_proj.weight_scale",
        "model.layers.1.mlp.experts.gate_up_proj",
        "xmodel.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.1.mlp.expertsX3.up_proj.weight",
    ],
)
def test_what_only_resembles_an_expert_is_none(name: str) -> None:
    found = classified(name, "qwen3_moe")
    assert (found.kind, found.expert, found.role) == ("other", None, None)


# ---------------------------------------------------------------------------- layers and refusals


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 3}, (3, 4, 5)),
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (5,)),
        ({"mlp_only_layers": [0, 4]}, (1, 2, 3, 5)),
        ({"mlp_only_layers": None, "first_k_dense_replace": None}, (0, 1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 6}, ()),
    ],
)
def test_expert_layers(config: dict[str, object], layers: tuple[int, ...]) -> None:
    assert families.moe_layers({"num_hidden_layers": 6, **config}) == layers


def test_a_shared_expert_of_no_width_is_not_expected() -> None:
    config = {**CONFIGS["deepseek_v2"], "n_shared_experts": None}
    names = families.expected_experts(FAMILIES["deepseek_v2"], config)
    assert not [name for name in names if "shared" in name]


def test_not_a_mixture_of_experts() -> None:
    match = r"^here: model_type 'llama' is .* Mixture-of-Experts model; known are deepseek_v2, "
    with pytest.raises(SourceError, match=match):
        families.family_of({"model_type": "llama", "hidden_size": 64}, "here")


def test_an_unknown_family() -> None:
    match = r"^here: model_type 'gpt_oss' is not supported; known are .*mixtral, olmoe, qwen2_moe"
    with pytest.raises(SourceError, match=match):
        families.family_of({"model_type": "gpt_oss", "num_local_experts": 32}, "here")


def test_no_model_type() -> None:
    with pytest.raises(SourceError, match="model_type None is "):
        families.family_of({}, "here")
