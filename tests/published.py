"""Headers of published models: real names, shapes and dtypes, in sparse files without weights.

Names and shapes of families whose every shape is known are those of `account.places`; of any other,
those that transformers would save. What is coded is coded as the models on the Hub are, which is
written down here from their configs and indexes.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.core_model_loading import revert_weight_conversion

from se_compress.artifacts import TensorInfo
from se_compress.model.binding import meta_model
from se_compress.opening.account import places
from se_compress.opening.families import ALIASES, FAMILIES
from se_compress.opening.headers import INDEX_FILE, Slot, header_bytes, lay_out

Slots = Iterable[Slot]
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Published:
    """A model as it is on the Hub.

    config  config.json, what shapes the model
    code    how its tensors in 16 bits are stored
    more    tensors that are not of the running model
    names   tensors of all files
    size    of all files, GB
    """

    config: Mapping[str, Any]
    code: Callable[[Slots], Slots]
    names: int
    size: float
    more: tuple[Slot, ...] = ()


def write_sparse(
    directory: Path, config: Mapping[str, Any], slots: Slots, shard_bytes: int = SHARD_BYTES
) -> Path:
    """A model directory whose weights are holes."""
    directory.mkdir(exist_ok=True)
    layout = lay_out(slots, directory, shard_bytes)
    shards: dict[str, list[TensorInfo]] = {}
    for info in layout.values():
        shards.setdefault(info.file, []).append(info)
    for file, infos in shards.items():
        with Path(file).open("wb") as stream:
            stream.write(header_bytes(infos, min(info.begin for info in infos)))
            stream.truncate(max(info.end for info in infos))
    if len(shards) > 1:
        weight_map = {name: Path(info.file).name for name, info in layout.items()}
        (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_published(name: str, directory: Path) -> Path:
    """One of PUBLISHED."""
    model = PUBLISHED[name]
    slots = model.code([*in_16_bits(model.config), *model.more])
    return write_sparse(directory, model.config, slots)


def in_16_bits(config: Mapping[str, Any]) -> Iterator[Slot]:
    """The tensors of the model of a config, in bfloat16; correction biases in float32."""
    model_type = ALIASES.get(config["model_type"], config["model_type"])
    family = FAMILIES[model_type]
    if family.exact:
        shapes = {
            place[0]: place[1] for place in places(family, {**config, "model_type": model_type})
        }
    else:
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        model = meta_model(plain)
        saved = revert_weight_conversion(model, model.state_dict())
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    for name, shape in shapes.items():
        yield Slot(name, "F32" if name.endswith("correction_bias") else "BF16", shape)


# ------------------------------------------------------------------------------------------- codes


_LINEAR = re.compile(r"(_proj|kv_a_proj_with_mqa|\.w[123])\.weight$")


def _in_fp8(slots: Slots) -> Iterator[Slot]:
    """Linears of the layers in blocks of 128 x 128; routers, norms and embeddings as they are."""
    for slot in slots:
        if not _LINEAR.search(slot.name) or slot.name.endswith("eh_proj.weight"):
            yield slot
            continue
        rows, columns = slot.shape
        yield Slot(slot.name, "F8_E4M3", slot.shape)
        yield Slot(f"{slot.name}_scale_inv", "F32", (-(-rows // 128), -(-columns // 128)))


def _in_int4(slots: Slots) -> Iterator[Slot]:
    """Routed experts in groups of 32."""
    for slot in slots:
        if ".mlp.experts." not in slot.name:
            yield slot
            continue
        rows, columns = slot.shape
        yield Slot(f"{slot.name}_packed", "I32", (rows, columns // 8))
        yield Slot(f"{slot.name}_scale", "BF16", (rows, columns // 32))
        yield Slot(f"{slot.name}_shape", "I32", (2,))


def _in_mxfp4(slots: Slots) -> Iterator[Slot]:
    """Fused experts [E, C, R] as blocks [E, R, C/32, 16] and scales [E, R, C/32]."""
    for slot in slots:
        if len(slot.shape) != 3:
            yield slot
            continue
        experts, columns, rows = slot.shape
        yield Slot(f"{slot.name}_blocks", "U8", (experts, rows, columns // 32, 16))
        yield Slot(f"{slot.name}_scales", "U8", (experts, rows, columns // 32))


# ------------------------------------------------------------------------------------------ models

_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
_DEEPSEEK_V3: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": _FP8,
}
_KIMI_K2: Mapping[str, Any] = {
    **_DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
}
_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32,
                "num_bits": 4, "observer": "minmax", "strategy": "group", "symmetric": True,
                "type": "int",
            },
        }
    },
}  # fmt: skip
_GPT_OSS: Mapping[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                   "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },
}  # fmt: skip


def _next_token(config: Mapping[str, Any]) -> tuple[Slot, ...]:
    """Layer 61 of DeepSeek-V3: a layer with experts, and its own embeddings, norms and head."""
    last, hidden = config["num_hidden_layers"], config["hidden_size"]
    before, prefix = f"model.layers.{last - 1}.", f"model.layers.{last}."
    table = (config["vocab_size"], hidden)
    own = {"embed_tokens": table, "shared_head.head": table, "eh_proj": (hidden, 2 * hidden),
           "enorm": (hidden,), "hnorm": (hidden,), "shared_head.norm": (hidden,)}  # fmt: skip
    return (
        *(Slot(prefix + slot.name.removeprefix(before), slot.dtype, slot.shape)
          for slot in in_16_bits(config) if slot.name.startswith(before)),
        *(Slot(f"{prefix}{name}.weight", "BF16", shape) for name, shape in own.items()),
    )  # fmt: skip


PUBLISHED: Mapping[str, Published] = {
    "deepseek-ai/DeepSeek-V3": Published(
        _DEEPSEEK_V3, _in_fp8, 91991, 688.6, _next_token(_DEEPSEEK_V3)
    ),
    "moonshotai/Kimi-K2-Instruct": Published(_KIMI_K2, _in_fp8, 139583, 1029.2),
    "moonshotai/Kimi-K2-Thinking": Published(
        {**_KIMI_K2, "quantization_config": _INT4}, _in_int4, 208215, 594.2
    ),
    "openai/gpt-oss-20b": Published(
        {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32}, _in_mxfp4, 459, 13.8
    ),
    "openai/gpt-oss-120b": Published(
        {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128}, _in_mxfp4, 687, 65.2
    ),
    "Qwen/Qwen3-30B-A3B-FP8": Published(
        {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "norm_topk_prob": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "quantization_config": _FP8,
        },
        _in_fp8, 37491, 31.2,
    ),
    "MiniMaxAI/MiniMax-M2": Published(
        {
            "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2",
            "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536,
            "num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8,
            "head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8,
            "tie_word_embeddings": False, "quantization_config": _FP8,
        },
        _in_fp8, 96103, 230.0,
    ),
}  # fmt: skip
