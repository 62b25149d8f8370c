"""One row per family, and what a row and a config say together."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_types
import torch
from safetensors import safe_open
from tiny import CONFIGS, VARIANTS
from transformers import AutoConfig, AutoModelForCausalLM

from se_compress.errors import SourceError
from se_compress.opening import families
from se_compress.opening.families import FAMILIES

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import families as families_tool

TinyModel = Callable[[str], Path]
# The rows as they were when each fact was read off a modelling file and a published checkpoint.
BY_HAND = json.loads(Path(__file__).with_name("six_families.json").read_text(encoding="utf-8"))


def read(directory: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json, and name -> shape as the safetensors library reads it."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with safe_open(directory / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return config, shapes


def test_every_row_has_a_tiny_model() -> None:
    assert set(tiny_types.CONFIGS) == set(FAMILIES)
    assert all(row.model_type == key for key, row in FAMILIES.items())
    assert {name for name, row in FAMILIES.items() if row.exact} == set(CONFIGS)


def test_the_rows_are_what_transformers_says_today() -> None:
    """The file is what its tool derives from the transformers that is installed."""
    assert families_tool.contents() == families_tool.FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rows_of_six_families_say_what_they_said_when_they_were_written_by_hand(
    name: str,
) -> None:
    row = json.loads(json.dumps(asdict(FAMILIES[name])))
    assert {key: row[key] for key in BY_HAND[name]} == BY_HAND[name]
    assert len(BY_HAND[name]) == 16


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
def test_expert_layers_are_those_of_transformers(tiny_model: TinyModel, name: str) -> None:
    config, _ = read(tiny_model(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model(name)))
    live = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    assert families.moe_layers(config) == live
    assert families.layer_count(config) == len(model.model.layers)


# ---------------------------------------------------------------------------- layers and refusals


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "deepseek_v2", "first_k_dense_replace": 3}, (3, 4, 5)),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, (1, 3, 5)),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 3, "mlp_only_layers": [2]}, (5,)),
        ({"model_type": "qwen2_moe", "mlp_only_layers": [0, 4]}, (1, 2, 3, 5)),
        ({"model_type": "qwen2_moe", "mlp_only_layers": None}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": None}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 6}, ()),
    ],
)
def test_expert_layers(config: dict[str, object], layers: tuple[int, ...]) -> None:
    assert families.moe_layers({"num_hidden_layers": 6, **config}) == layers


def test_not_a_mixture_of_experts() -> None:
    match = r"^here: model_type 'llama' is no Mixture-of-Experts model; recipes/MODELS\.md lists"
    with pytest.raises(SourceError, match=match):
        families.family_of({"model_type": "llama", "hidden_size": 64}, "here")


def test_an_unknown_family() -> None:
    match = r"^here: model_type 'qwen3_moo' is not supported; .*close to this name are .*qwen3_moe"
    with pytest.raises(SourceError, match=match):
        families.family_of({"model_type": "qwen3_moo", "num_local_experts": 32}, "here")


@pytest.mark.parametrize("model_type", tiny_types.NOT_RUN)
def test_a_family_that_transformers_cannot_run_as_others(model_type: str) -> None:
    match = rf"^here: model_type '{model_type}' is not supported: .*transformers"
    with pytest.raises(SourceError, match=match):
        families.family_of({"model_type": model_type, "num_experts": 8}, "here")


def test_no_model_type() -> None:
    with pytest.raises(SourceError, match="model_type None is "):
        families.family_of({}, "here")


@pytest.mark.parametrize(
    ("config", "inner"),
    [
        ({"model_type": "qwen3_vl_moe", "text_config": {"num_experts": 8}}, "text_config"),
        ({"model_type": "new", "llm_config": {"moe_intermediate_size": 8}}, "llm_config"),
    ],
)
def test_a_composite_model(config: dict[str, Any], inner: str) -> None:
    match = (
        rf"model_type '{config['model_type']}' is a composite .* experts below {inner} of config"
        r".*; of composites, gemma4, llama4, qwen3_5_moe, .* are read"
    )
    with pytest.raises(SourceError, match=match):
        families.family_of(config, "here")


def test_a_composite_that_is_read() -> None:
    config = {"model_type": "qwen3_5_moe", "text_config": {"num_experts": 8, "hidden_size": 64}}
    assert families.family_of(config, "here").model_type == "qwen3_5_moe_text"
    assert families.text_of(config) == config["text_config"]
    assert families.text_of({"model_type": "mixtral"}) == {"model_type": "mixtral"}


def test_kimi_k2_is_deepseek_v3() -> None:
    assert families.family_of({"model_type": "kimi_k2"}, "here") is FAMILIES["deepseek_v3"]


@pytest.mark.parametrize("model_type", [5, ["mixtral"], {"a": 1}, "x" * 10**6, "a\nb", None])
def test_a_model_type_that_is_none(model_type: object) -> None:
    with pytest.raises(SourceError, match=r"^here: model_type .* is not supported") as caught:
        families.family_of({"model_type": model_type, "num_experts": 4}, "here")
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("config", "groups", "chosen"),
    [
        ({"model_type": "deepseek_v3"}, 8, 4),
        ({"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2}, 4, 2),
        ({"model_type": "deepseek_v2", "n_group": 4, "topk_group": 2}, 1, 1),
        ({"model_type": "deepseek_v2", "topk_method": "greedy", "n_group": 4}, 1, 1),
        (
            {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 4,
             "topk_group": 3}, 4, 3,
        ),
        ({"model_type": "mixtral", "n_group": 4, "topk_group": 2}, 1, 1),
    ],
)  # fmt: skip
def test_routing_groups(config: dict[str, Any], groups: int, chosen: int) -> None:
    family = FAMILIES[config["model_type"]]
    assert families.routing_groups(family, config) == groups
    assert families.chosen_groups(family, config) == chosen


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    config = AutoConfig.for_model(name)
    assert FAMILIES[name].defaults or name == "olmoe"
    for key, value in FAMILIES[name].defaults.items():
        assert getattr(config, key) == value, key


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", ["moe_num_experts", *families.COUNT_KEYS])
def test_the_count_keys_are_those_that_transformers_listens_to(name: str, key: str) -> None:
    family = FAMILIES[name]
    config = AutoConfig.for_model(name, **{key: 37})
    assert (key in family.count_keys) == (getattr(config, family.count_keys[0]) == 37)
