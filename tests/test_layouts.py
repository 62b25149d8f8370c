"""Tiny models of every type under the names of published checkpoints: prefixes, composites with
towers, multi-token prediction, and names that save_pretrained would not write."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import source_types
import tiny
import tiny_types
import torch
from safetensors.torch import load_file, save_file
from test_types import kept_of, logits, plan_of
from tiny_types import composite_config
from torch import Tensor

from se_compress.errors import SourceError
from se_compress.model.binding import bind_source, check_bound, meta_model
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan

TinyType = Callable[[str], Path]
Tensors = dict[str, Tensor]
H = tiny.HIDDEN


def renamed(tensors: Mapping[str, Tensor], *pairs: tuple[str, str]) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        for pattern, other in pairs:
            name = re.sub(pattern, other, name)
        found[name] = tensor
    return found


def of_layer(tensors: Mapping[str, Tensor], layer: int, start: str) -> Tensors:
    """Copies of the tensors of a layer under other names, as multi-token prediction has them."""
    old = f"model.layers.{layer}."
    return {start + n.removeprefix(old): t.clone() for n, t in tensors.items() if n.startswith(old)}


def behind_the_decoder(tensors: Mapping[str, Tensor]) -> Tensors:
    """As DeepSeek and GLM have it: layer 4 of a decoder of 0 to 3."""
    ones = torch.ones(H)
    return {
        **of_layer(tensors, 3, "model.layers.4."),
        "model.layers.4.eh_proj.weight": torch.ones(H, 2 * H),
        "model.layers.4.enorm.weight": ones,
        "model.layers.4.hnorm.weight": ones.clone(),
        "model.layers.4.shared_head.norm.weight": ones.clone(),
    }


def fused(tensors: Mapping[str, Tensor]) -> Tensors:
    """Experts of a layer in two tensors."""
    found: Tensors = {}
    parts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match:
            parts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    for path, roles in parts.items():
        gate, up, down = (
            torch.stack([roles[role][e] for e in sorted(roles[role])])
            for role in ("gate_proj", "up_proj", "down_proj")
        )
        found[f"{path}.gate_up_proj"], found[f"{path}.down_proj"] = torch.cat([gate, up], 1), down
    return found


MTP = {"mtp.fc.weight": torch.ones(H, 2 * H), "mtp.norm.weight": torch.ones(H)}
MODEL = (r"^model\.", "model.language_model.")


def layout(name: str, tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and config as they are published."""
    if name == "qwen3_next":
        return {**tensors, **of_layer(tensors, 3, "mtp.layers.0."), **MTP}, config
    if name in ("glm4_moe", "glm_moe_dsa", "deepseek_v32", "dots1"):
        more = behind_the_decoder(tensors)
        return {**tensors, **more}, {**config, "num_nextn_predict_layers": 1}
    if name == "exaone_moe":
        return {**tensors, **of_layer(tensors, 3, "mtp.layers.0."), **MTP}, config
    if name == "ernie4_5_moe":
        more = of_layer(tensors, 3, "model.mtp_block.0.")
        more = {n: t for n, t in more.items() if ".experts." not in n and "gate." not in n}
        return {**tensors, **more, "model.mtp_emb_norm.0.weight": torch.ones(H)}, config
    if name == "mimo_v2_flash":
        return {**tensors, "model.mtp.layers.0.eh_proj.weight": torch.ones(H, 2 * H)}, config
    if name == "kimi_linear":
        return renamed(tensors, (r"layers\.0\.block_sparse_moe", "layers.0.mlp")), config
    if name == "deepseek_v4":
        plain = renamed(tensors, (r"^model\.", ""), ("^embed_tokens", "embed"))
        plain = renamed(plain, (r"^hc_head\.hc_", "hc_head_"))
        return {**plain, "mtp.0.e_proj.weight": torch.ones(H, H)}, config
    if name == "qwen3_5_moe_text":
        more = of_layer(fused(tensors), 3, "mtp.layers.0.")
        tower = {"model.visual.blocks.0.attn.qkv.weight": torch.ones(4, 4)}
        whole = {**renamed(fused(tensors), MODEL), **more, **MTP, **tower}
        return whole, composite_config("qwen3_5_moe", config)
    if name == "llama4_text":
        more = {"vision_model.class_embedding": torch.ones(4),
                "multi_modal_projector.linear_1.weight": torch.ones(H, 4)}  # fmt: skip
        whole = renamed(tensors, ("^", "language_model."))
        return {**whole, **more}, composite_config("llama4", config)
    assert name == "gemma4_text"
    tower = {"model.vision_tower.patch_embedder.input_proj.weight": torch.ones(4, 4)}
    return {**renamed(tensors, MODEL), **tower}, composite_config("gemma4", config)


LAYOUTS = (
    "qwen3_next", "glm4_moe", "glm_moe_dsa", "deepseek_v32", "dots1", "exaone_moe", "ernie4_5_moe",
    "mimo_v2_flash", "kimi_linear", "deepseek_v4", "qwen3_5_moe_text", "gemma4_text", "llama4_text",
)  # fmt: skip


@pytest.fixture
def published(tiny_type: TinyType, tmp_path: Path) -> Callable[[str], Path]:
    """A tiny model of a type under the names of its published checkpoints."""

    def make(name: str) -> Path:
        path = tmp_path / "published"
        path.mkdir()
        config = json.loads((tiny_type(name) / "config.json").read_text(encoding="utf-8"))
        tensors, config = layout(name, load_file(tiny_type(name) / "model.safetensors"), config)
        whole = {n: tensor.contiguous() for n, tensor in tensors.items()}
        save_file(whole, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_opens_as_the_model_that_it_is(
    published: Callable[[str], Path], tiny_type: TinyType, name: str
) -> None:
    source, plain = open_source(str(published(name))), open_source(str(tiny_type(name)))
    assert source.family == plain.family == name
    assert (source.moe_layers, source.expert_count) == (plain.moe_layers, plain.expert_count)
    assert list(source.experts) == list(plain.experts)
    for identity, roles in source.experts.items():
        shapes = {role: info.shape for role, info in roles.items()}
        assert shapes == {r: info.shape for r, info in plain.experts[identity].items()}
    model = meta_model(source.config)
    check_bound(model, bind_source(model, source), source)
    torch.testing.assert_close(logits(source.path), logits(plain.path), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_is_pruned_as_the_plain_one(
    published: Callable[[str], Path], tiny_type: TinyType, tmp_path: Path, name: str
) -> None:
    source, plain = open_source(str(published(name))), open_source(str(tiny_type(name)))
    kept = kept_of(plain)
    for one, directory in ((source, "a"), (plain, "b")):
        tiny.write_result(one, plan_of(one, kept), tmp_path / directory)
    found, expected = (logits(tmp_path / directory) for directory in "ab")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    again = open_source(str(tmp_path / "a"))
    unrun = [info for info in again.tensors.values() if info.layer is None and info.kind == "other"]
    before = [i for i in source.tensors.values() if i.layer is None and i.kind == "other"]
    assert bool(unrun) == bool(before)
    numbers = {info.expert for info in unrun if info.expert is not None}
    assert numbers in (set(), set(range(again.expert_count)))
    had = {info.expert for info in before if info.expert is not None}
    assert bool(numbers) == bool(had)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        ("model.layers.1.self_attn.sinks", "sinks .* does not belong to the model of config.json"),
        ("model.layers.1.mlp.experts.8.up_proj.weight", "experts.8.up_proj.weight .* not belong"),
        ("model.layers.1.mlp.experts.1.up_proj.bias", "experts.1.up_proj.bias .* does not belong"),
        ("model.layers.9.mlp.router.x", None),
        ("score.weight", "score.weight .* does not belong"),
    ],
)
def test_a_tensor_without_a_place(
    tiny_type: TinyType, tmp_path: Path, tensor: str, match: str | None
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in tiny_type("afmoe").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tiny.edit_weights(path, {tensor: torch.ones(4)})
    if match is None:
        match = "layers.9.mlp.router.x is of a layer that config.json does not know"
    with pytest.raises(SourceError, match=match):
        open_source(str(path))


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.2.mlp.router.gate.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_missing(tiny_type: TinyType, tmp_path: Path, tensor: str) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in tiny_type("afmoe").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tiny.edit_weights(path, {tensor: None})
    with pytest.raises(SourceError, match=rf"{re.escape(tensor)} is missing"):
        open_source(str(path))


def test_a_dry_run_says_what_it_does_not_look_at(tiny_type: TinyType) -> None:
    told = []
    for name in ("afmoe", "qwen3_moe"):
        source = open_source(str(tiny_type(name)))
        chosen = tiny.recipe(source.path, target="transformers", quantization={"method": "none"})
        told.append(make_plan(source, None, chosen).notes)
    note = (
        "of afmoe, a dry run looks at names, experts, routers and counts; other shapes are looked "
        "at when a run starts"
    )
    assert set(told[0]) - set(told[1]) == {note}


def test_the_config_of_a_composite_is_that_of_its_language_model(
    published: Callable[[str], Path],
) -> None:
    source = open_source(str(published("qwen3_5_moe_text")))
    assert source.text["hidden_size"] == H
    assert source.config["text_config"] == source.text
    assert "vision_config" in source.config


@pytest.mark.parametrize(
    ("name", "path"),
    [("gemma4_text", "mlp"), ("granitemoeshared", "shared_mlp"),
     ("minimax_m3_vl_text", "mlp.shared_experts"), ("inkling_text", "mlp.shared_experts"),
     ("granitemoe", ""), ("dots1", "")],
)  # fmt: skip
def test_what_is_not_profiled_is_told(tiny_type: TinyType, name: str, path: str) -> None:
    source = open_source(str(tiny_type(name)))
    chosen = tiny.recipe(source.path, target="transformers", quantization={"method": "none"})
    told = [note for note in make_plan(source, None, chosen).notes if "not profiled" in note]
    note = (
        f"of {name}, {path}, which every token passes beside the routed experts, is not profiled: "
        "no super expert is looked for in it"
    )
    assert told == ([note] if path else [])


def test_inputs_that_are_scaled_for_several_experts_are_refused(tmp_path: Path) -> None:
    path = tiny_types.build(tmp_path / "model", "llama4_text", num_experts_per_tok=2)
    match = r"num_experts_per_tok is 2; accepted is 1: the routing weight scales what an expert"
    with pytest.raises(SourceError, match=match):
        open_source(str(path))


def test_layers_that_share_keys_and_values_are_refused(tiny_type: TinyType, tmp_path: Path) -> None:
    path = tiny_types.build(tmp_path / "model", "gemma4_text", num_kv_shared_layers=2)
    match = r"num_kv_shared_layers is 2; accepted is 0: the last layers would need keys and values"
    with pytest.raises(SourceError, match=match):
        open_source(str(path))


def test_a_checkpoint_saved_under_the_names_in_memory(tiny_type: TinyType, tmp_path: Path) -> None:
    """Nemotron-H is published as `backbone.layers.N`, and `model.layers.N` in memory."""
    form, plain = source_types.write(tiny_type("nemotron_h"), "fused", tmp_path)
    assert open_source(str(form)).prefix == "model."
    assert open_source(str(plain)).prefix == "backbone."
    assert source_types.difference(form, plain) < source_types.LIMIT
