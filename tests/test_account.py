"""The table of tensors is that of transformers' own models, and no tensor escapes the account."""

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from published import write_sparse
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, VARIANTS, edit_config, edit_weights
from transformers import AutoConfig, AutoModelForCausalLM

from se_compress.artifacts import ROLES, TensorInfo
from se_compress.errors import SourceError
from se_compress.opening.account import Place, places
from se_compress.opening.families import (
    FAMILIES,
    Family,
    count_key,
    moe_layers,
    per_expert_tensors,
    router_tensors,
)
from se_compress.opening.headers import Slot
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]
Change = Mapping[str, object]
BF16 = torch.bfloat16

# What a config can say beyond the tiny models' own.
SHAPES: Mapping[str, tuple[str, Change]] = {
    **{name: (family, differs) for name, (family, differs, _) in VARIANTS.items()},
    "qwen2 without biases": ("qwen2_moe", {"qkv_bias": False}),
    "qwen2 with its own head": ("qwen2_moe", {"head_dim": 32}),
    "qwen2 dense twice": ("qwen2_moe", {"mlp_only_layers": [0, 2], "intermediate_size": 48}),
    "qwen2 shared width": ("qwen2_moe", {"shared_expert_intermediate_size": 40}),
    "qwen3 with biases": ("qwen3_moe", {"attention_bias": True}),
    "qwen3 without its own head": ("qwen3_moe", {"head_dim": ...}),
    "qwen3 with a wide head": ("qwen3_moe", {"head_dim": 48, "num_key_value_heads": 1}),
    "qwen3 every second": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "olmoe grouped": ("olmoe", {"num_key_value_heads": 2}),
    "olmoe with biases": ("olmoe", {"attention_bias": True}),
    "olmoe tied": ("olmoe", {"tie_word_embeddings": True}),
    "mixtral with its own head": ("mixtral", {"head_dim": 32}),
    "mixtral of one group": ("mixtral", {"num_key_value_heads": 1, "intermediate_size": 40}),
    "v2 with low-rank queries": ("deepseek_v2", {"q_lora_rank": 48}),
    "v2 with biases": ("deepseek_v2", {"attention_bias": True}),
    "v2 with both": ("deepseek_v2", {"attention_bias": True, "q_lora_rank": 24}),
    "v2 all sparse": ("deepseek_v2", {"first_k_dense_replace": 0, "n_shared_experts": 1}),
    "v2 other heads": ("deepseek_v2", {"v_head_dim": 12, "qk_nope_head_dim": 20}),
    "v3 with direct queries": ("deepseek_v3", {"q_lora_rank": None}),
    "v3 with biases": ("deepseek_v3", {"attention_bias": True}),
    "v3 two dense": ("deepseek_v3", {"first_k_dense_replace": 2, "n_shared_experts": 3}),
    "v3 tied": ("deepseek_v3", {"tie_word_embeddings": True, "kv_lora_rank": 24}),
}


def config_of(name: str) -> tuple[Family, dict[str, Any]]:
    """Family and config.json of an entry of SHAPES; `...` leaves a key out."""
    family, differs = SHAPES[name]
    config = {"model_type": family, **CONFIGS[family], **differs}
    return FAMILIES[family], {key: value for key, value in config.items() if value is not ...}


def live_tensors(config: Mapping[str, Any], family: Family) -> dict[str, tuple[int, ...]]:
    """Names, as they are on disk, and shapes of everything that transformers' model has."""
    built = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        for disk, memory in family.renames:
            name = name.replace(memory, disk)
        stem, fused, part = name.partition(".experts.")
        if not fused:
            found[name] = tuple(tensor.shape)
            continue
        layer, (gate, up, down) = int(stem.split(".")[2]), family.projections
        for expert, weight in enumerate(tensor):
            projections = {gate: 0, up: 1} if part == "gate_up_proj" else {down: 0}
            for projection, half in projections.items():
                shape = weight.chunk(len(projections))[half].shape
                disk = family.expert.format(layer=layer, expert=expert, projection=projection)
                found[disk] = tuple(shape)
    if config.get("tie_word_embeddings"):
        del found["lm_head.weight"]
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_is_the_model_of_transformers(name: str) -> None:
    family, config = config_of(name)
    table = {place[0]: place[1] for place in places(family, config)}
    assert table == live_tensors(config, family)


def sparse_places(name: str) -> tuple[Family, dict[str, Any], list[Place]]:
    family, config = config_of(name)
    return family, config, list(places(family, config))


@pytest.mark.parametrize("name", SHAPES)
def test_each_expert_tensor_has_one_place(name: str) -> None:
    family, config, table = sparse_places(name)
    layers, count = moe_layers(config), config[count_key(family, config)]
    routed = [(p[3], p[4], p[5]) for p in table if p[2] == "expert"]
    assert sorted(routed, key=str) == sorted(product(layers, range(count), ROLES), key=str)
    shared = [(p[3], p[4], p[5]) for p in table if p[2] == "shared_expert"]
    assert sorted(shared, key=str) == sorted(
        product(layers, ["shared"] if family.shared else [], ROLES), key=str
    )
    routers = sorted(p[0] for p in table if p[2] == "router")
    assert routers == sorted(n for at in layers for n in router_tensors(family, at))
    by_expert = {n for at in layers for n in per_expert_tensors(family, at)}
    assert all(p[1][0] == count for p in table if p[0] in by_expert)
    assert by_expert <= set(routers)
    assert all((p[4] is None) == (p[5] is None) for p in table)
    assert {p[2] for p in table} >= {"attention", "norm", "embedding"}
    assert all((p[3] is None) == (not p[0].startswith("model.layers.")) for p in table)


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
        ("qwen3_moe", "model.layers.1.mlp.experts.7.up_proj.weight", ("expert", 1, 7, "up")),
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
        ("olmoe", "model.embed_tokens.weight", ("embedding", None, None, None)),
        ("olmoe", "lm_head.weight", ("embedding", None, None, None)),
        ("olmoe", "model.norm.weight", ("norm", None, None, None)),
    ],
)
def test_kind(family: str, name: str, expected: tuple[object, ...]) -> None:
    found = {place[0]: place[2:] for place in sparse_places(family)[2]}
    assert found[name] == expected


# ------------------------------------------------------------------------------- what is refused


@pytest.fixture
def copy_of(tiny_model: TinyModel, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny model that a test may break."""
    return lambda name: shutil.copytree(tiny_model(name), tmp_path / "model")


def refusal(path: Path, match: str) -> None:
    with pytest.raises(SourceError, match=match) as caught:
        open_source(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    assert str(path) in message


@pytest.mark.parametrize("name", CONFIGS)
def test_every_single_tensor_is_needed_in_its_shape(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    """Names are taken away, and shapes are changed, one after the other, in the header alone."""
    path = shutil.copytree(tiny_model(name), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    others = {}
    for tensor in tensors:
        kind = re.sub(r"\.\d+\.", ".N.", tensor)
        others[kind] = tensor  # the last of each kind
    for tensor in others.values():
        escaped = re.escape(tensor)
        edit_weights(path, {tensor: None})
        refusal(path, rf"{escaped} is missing")
        shape = tensors[tensor].shape
        for wrong in ((2, *shape), (*shape[:-1], shape[-1] + 2), (0,), ()):
            edit_weights(path, {tensor: torch.zeros(wrong, dtype=BF16)})
            refusal(path, rf"{escaped} is \[.*\], but config\.json says \[")
        edit_weights(path, {tensor: torch.zeros(shape, dtype=torch.int64)})
        refusal(path, rf"{escaped} is I64; BF16, F16, F32 can be read")
        edit_weights(path, {tensor: tensors[tensor]})
    assert open_source(str(path)).tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("qwen3_moe", "model.layers.0.self_attn.q_proj.bias", (64,)),
        ("qwen3_moe", "model.layers.0.self_attn.sinks", (4,)),
        ("mixtral", "model.layers.0.mlp.gate_proj.weight", (64, 64)),
        ("mixtral", "model.layers.0.self_attn.q_norm.weight", (16,)),
        ("qwen2_moe", "model.layers.1.mlp.experts.8.up_proj.weight", (32, 64)),  # they end at 7
        ("qwen2_moe", "model.layers.1.mlp.experts.3.up_proj.bias", (32,)),
        ("qwen2_moe", "model.layers.1.mlp.experts.3.side_proj.weight", (32, 64)),
        ("qwen2_moe", "model.layers.1.mlp.experts.03.up_proj.weight", (32, 64)),
        ("qwen2_moe", "model.layers.1.mlp.shared_experts.up_proj.weight", (64, 64)),
        ("qwen2_moe", "model.layers.0.mlp.experts.0.up_proj.weight", (32, 64)),  # a dense layer
        ("qwen2_moe", "model.layers.1.mlp.up_proj.weight", (96, 64)),  # and one with experts
        ("deepseek_v2", "model.layers.0.self_attn.q_a_proj.weight", (48, 64)),
        ("deepseek_v3", "model.layers.0.self_attn.indexer.wk.weight", (8, 64)),
        ("olmoe", "score.weight", (1, 64)),
        ("olmoe", "model.norm.bias", (64,)),
        ("olmoe", "model.embed_positions.weight", (8, 64)),
        ("olmoe", "base_model.model.lora_A.weight", (8, 64)),
        ("olmoe", "", (1,)),
        ("qwen3_moe-tied", "lm_head.weight", (64, 288)),
    ],
)
def test_a_tensor_without_a_place(
    copy_of: Callable[[str], Path], name: str, tensor: str, shape: tuple[int, ...]
) -> None:
    path = copy_of(name)
    edit_weights(path, {tensor: torch.zeros(shape, dtype=BF16)})
    name_as_told = f"{re.escape(tensor)} " if tensor else ""
    refusal(path, rf"model\.safetensors: {name_as_told}\[.*does not belong to the model of")


@pytest.mark.parametrize("layer", [3, 4, 61, 10**8])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_layer_that_the_config_does_not_know(
    copy_of: Callable[[str], Path], name: str, layer: int
) -> None:
    path = copy_of(name)
    tensor = f"model.layers.{layer}.input_layernorm.weight"
    edit_weights(path, {tensor: torch.ones(64, dtype=BF16)})
    refusal(
        path, rf"{tensor} is of a layer that config\.json does not know: num_hidden_layers is 3"
    )


def test_fewer_layers_than_the_file_has(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("mixtral")
    edit_config(path, num_hidden_layers=2)
    refusal(path, r"model\.layers\.2\.\S+ is of a layer that config\.json does not know")


def test_one_layer_more_than_multi_token_prediction_has(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("deepseek_v3-next-token")
    assert open_source(str(path)).tensors["model.layers.3.eh_proj.weight"].kind == "other"
    edit_weights(path, {"model.layers.4.enorm.weight": torch.ones(64, dtype=BF16)})
    refusal(path, r"layers\.4\.enorm\.weight is of a layer .* end at 2, and at 3 with multi-token")


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "kind"),
    [
        ("mixtral", "model.layers.1.self_attn.rotary_emb.inv_freq", (8,), "other"),
        ("qwen3_moe", "model.rotary_emb.inv_freq", (8,), "other"),
        ("qwen3_moe-tied", "lm_head.weight", (288, 64), "embedding"),
    ],
)
def test_a_tensor_that_is_explained(
    copy_of: Callable[[str], Path], name: str, tensor: str, shape: tuple[int, ...], kind: str
) -> None:
    path = copy_of(name)
    edit_weights(path, {tensor: torch.zeros(shape)})
    found = open_source(str(path)).tensors[tensor]
    assert (found.kind, found.expert, found.role) == (kind, None, None)


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.experts.2.down_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "lm_head.weight",
        "model.layers.3.eh_proj.weight",  # not run, but published
    ],
)
@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float8_e4m3fn, "is F8_E4M3: FP8 weights go with scales"),
        (torch.float8_e5m2, "is F8_E5M2: FP8 weights go with scales"),
        (torch.int8, "is I8, of weights that are quantised with scales"),
        (torch.uint8, "is U8, of weights that are quantised with scales"),
    ],
)
def test_a_quantised_weight_without_a_word_in_the_config(
    copy_of: Callable[[str], Path], tensor: str, dtype: torch.dtype, words: str
) -> None:
    path = copy_of("deepseek_v3-next-token")
    shape = load_file(path / "model.safetensors")[tensor].shape
    edit_weights(path, {tensor: torch.ones(shape).to(dtype)})
    refusal(
        path, rf"model\.safetensors: {tensor} {words}, of which config\.json says nothing that can"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.int64, torch.bool])
def test_a_weight_of_a_dtype_that_no_quantiser_writes(
    copy_of: Callable[[str], Path], dtype: torch.dtype
) -> None:
    path, tensor = copy_of("olmoe"), "model.layers.1.self_attn.o_proj.weight"
    edit_weights(path, {tensor: torch.ones(64, 64).to(dtype)})
    refusal(path, rf"{tensor} is \w+; BF16, F16, F32 can be read")


@pytest.mark.parametrize(
    "suffix",
    ["weight_scale_inv", "weight_scale", "input_scale", "weight_zero_point", "scales", "qzeros",
     "g_idx", "weight_packed", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "SCB"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.int32])
def test_a_scale_beside_the_weights(
    copy_of: Callable[[str], Path], suffix: str, dtype: torch.dtype
) -> None:
    path = copy_of("mixtral")
    tensor = f"model.layers.0.self_attn.k_proj.{suffix}"
    edit_weights(path, {tensor: torch.ones(1, 1).to(dtype)})
    refusal(path, rf"{tensor} is \w+, of weights that are quantised with scales")


# -------------------------------------------------------------- laid out otherwise, and how to tell


def test_fused_experts_under_another_name(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("qwen2_moe")
    edit_weights(path, {"model.layers.1.mlp.experts.w13": torch.zeros(8, 64, 64, dtype=BF16)})
    refusal(path, r"mlp\.experts\.w13 is \[8, 64, 64\]: the experts of a layer are fused .* each")


@pytest.mark.parametrize(
    "prefix",
    ["model.language_model.", "module.model.", "language_model.model.", "transformer.", ""],
)
def test_other_prefixes(copy_of: Callable[[str], Path], prefix: str) -> None:
    path = copy_of("olmoe")
    tensors = load_file(path / "model.safetensors")
    renamed = {
        (prefix + n.removeprefix("model.") if n.startswith("model.") else n): tensor
        for n, tensor in tensors.items()
    }
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    refusal(path, rf"begin with {re.escape(prefix)}layers\., where model\.layers\. is needed")


@pytest.mark.parametrize("changes", [{}, {"score.weight": torch.zeros(1, 64, dtype=BF16)}])
def test_no_output_head_and_untied(
    copy_of: Callable[[str], Path], changes: Mapping[str, torch.Tensor]
) -> None:
    path = copy_of("mixtral")
    edit_weights(path, {"lm_head.weight": None, **changes})
    refusal(path, r"lm_head\.weight is missing, and tie_word_embeddings is not true")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000; accepted is at most 60"),
        ({"num_hidden_layers": 59}, r"model\.layers\.3\.\S+ is missing"),
        ({"num_local_experts": 10**9}, r"block_sparse_moe\.gate\.weight is \[4, 64\], but"),
        ({"vocab_size": 2**61}, r"model\.embed_tokens\.weight is \[288, 64\], but"),
        ({"intermediate_size": 10**15}, r"w1\.weight is \[64, 64\], but config\.json says"),
    ],
)
def test_numbers_that_would_fill_memory(
    copy_of: Callable[[str], Path], config: Change, match: str
) -> None:
    path = copy_of("mixtral")
    edit_config(path, **config)
    refusal(path, match)


def test_the_order_is_that_of_the_file(tiny_model: TinyModel) -> None:
    path = tiny_model("deepseek_v3-next-token")
    content = (path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    names = [name for name in header if name != "__metadata__"]
    source = open_source(str(path))
    assert list(source.tensors) == names
    assert all(isinstance(info, TensorInfo) for info in source.tensors.values())


def test_ten_thousand_tensors_within_a_second(tmp_path: Path) -> None:
    """Of real shapes and names; the files are sparse and nothing of their data is read."""
    config: dict[str, Any] = {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
        "num_hidden_layers": 26, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }  # fmt: skip
    slots = [Slot(place[0], "BF16", place[1]) for place in places(FAMILIES["qwen3_moe"], config)]
    write_sparse(tmp_path, config, slots)
    start = time.process_time()
    source = open_source(str(tmp_path))
    assert len(source.digest) == 16
    assert time.process_time() - start < 1
    assert len(source.tensors) == 3 + 26 * (9 + 3 * 128)
