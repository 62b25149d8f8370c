"""Every tensor of a checkpoint fills a place of the model that transformers builds, or is told."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_types import CONFIGS, NAMES
from torch import Tensor

from se_compress.artifacts import ModelSource
from se_compress.errors import SourceError
from se_compress.model.binding import (
    bind,
    bind_source,
    check_bound,
    experts_modules,
    layer_of,
    meta_model,
    why_unused,
)
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]


def bound(path: Path) -> tuple[object, dict[str, Tensor], dict[str, Tensor]]:
    """The model on the meta device, what a checkpoint has, and what that makes of the model."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    model, stored = meta_model(config), load_file(path / "model.safetensors")
    binding = bind(model, stored)
    assert (binding.missing, binding.strays) == ((), ())
    assert sorted(binding.live_of) == sorted(stored)
    made: dict[str, Tensor] = {}
    for name, entry in binding.bound.items():
        if name == entry.live:
            made |= entry.values(model, stored.__getitem__)
    return model, stored, made


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_finds_its_place_and_its_shape(tiny_type: TinyModel, name: str) -> None:
    model, _, made = bound(tiny_type(name))
    live = model.state_dict()  # type: ignore[attr-defined]
    tied = set(model.all_tied_weights_keys)  # type: ignore[attr-defined]
    assert made.keys() == live.keys() - tied
    assert {n: t.shape for n, t in made.items()} == {n: live[n].shape for n in made}
    assert experts_modules(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mixtral", "kimi_linear", "granitemoe", "gpt_oss", "lfm2_moe"])
def test_what_is_bound_is_what_transformers_loads(tiny_type: TinyModel, name: str) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_type(name), dtype=torch.float32)
    _, _, made = bound(tiny_type(name))
    loaded = plain.state_dict()
    for live, value in made.items():
        assert torch.equal(value.float(), loaded[live].float()), live


def test_a_config_that_nothing_can_be_built_from_is_told(tiny_type: TinyModel) -> None:
    with pytest.raises(SourceError, match=r"^here: transformers builds no model from it \('tab'\)"):
        meta_model({"model_type": "tab"}, where="here")


def test_changes_are_those_of_the_language_model() -> None:
    config = {"model_type": "qwen3_5_moe", "text_config": dict(CONFIGS["qwen3_5_moe_text"])}
    (_, experts), *_ = experts_modules(meta_model(config, num_experts=4))
    assert experts.down_proj.shape == (4, 64, 32)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts", 3),
        ("backbone.layers.12.mixer.gate.weight", 12),
        ("model.language_model.layers.0.self_attn.q_proj.weight", 0),
        ("model.norm.weight", None),
        ("model.layers", None),
    ],
)
def test_the_layer_of_a_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.layers.61.eh_proj.weight", "of multi-token prediction"),
        ("mtp.layers.0.self_attn.q_proj.weight", "of multi-token prediction"),
        ("model.mtp_block.0.mlp.up_proj.weight", "of multi-token prediction"),
        ("model.visual.blocks.0.attn.qkv.weight", "of a vision, audio or other tower"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "rotary frequencies, which are computed"),
        ("model.layers.60.self_attn.q_proj.bias", None),
        ("model.layers.0.mlp.experts.0.up_proj.weight_scale_inv", None),
    ],
)
def test_why_a_tensor_is_not_used(name: str, why: str | None) -> None:
    assert why_unused(name, 61) == why


# -------------------------------------------------------------------------- at the start of a run


def check(source: ModelSource) -> None:
    model = meta_model(source.config)
    check_bound(model, bind_source(model, source), source)


def source(path: Path, **changes: object) -> ModelSource:
    """Opened, and then changed: what opening refuses by itself has to come past it here."""
    return dataclasses.replace(open_source(str(path)), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_what_opens_is_bound(tiny_type: TinyModel, name: str) -> None:
    check(source(tiny_type(name)))


def test_layers_for_multi_token_prediction_are_no_strays(tiny_model: TinyModel) -> None:
    check(source(tiny_model("deepseek_v3-next-token")))


def test_a_missing_tensor_is_named(tiny_model: TinyModel) -> None:
    opened = source(tiny_model("mixtral"))
    rest = {
        n: i for n, i in opened.tensors.items() if n != "model.layers.1.self_attn.k_proj.weight"
    }
    with pytest.raises(
        SourceError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight is missing"
    ):
        check(source(tiny_model("mixtral"), tensors=rest))


def test_missing_experts_are_named(tiny_model: TinyModel) -> None:
    opened = source(tiny_model("mixtral"))
    rest = {n: i for n, i in opened.tensors.items() if ".1.block_sparse_moe.experts.3." not in n}
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.experts\.gate_up_proj is \[3, 128, 64"):
        check(source(tiny_model("mixtral"), tensors=rest))


def test_another_shape_is_named(tiny_model: TinyModel) -> None:
    opened = source(tiny_model("mixtral"))
    config = {**opened.config, "num_key_value_heads": 4}
    with pytest.raises(SourceError, match=r"k_proj\.weight is \[32, 64\], but .* has \[64, 64\]$"):
        check(source(tiny_model("mixtral"), config=config))


def test_a_tensor_without_a_place_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    opened = source(tiny_model("mixtral"))
    name = "model.layers.1.self_attn.k_proj.bias"
    save_file({name: torch.zeros(32)}, tmp_path / "extra.safetensors")
    info = dataclasses.replace(
        opened.tensors["model.norm.weight"],
        name=name,
        shape=(32,),
        file=str(tmp_path / "extra.safetensors"),
    )
    with pytest.raises(
        SourceError, match=r"extra\.safetensors: .*k_proj\.bias \[32\] does not bel"
    ):
        check(source(tiny_model("mixtral"), tensors={**opened.tensors, name: info}))
