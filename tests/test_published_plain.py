"""Published models in bfloat16: real names, shapes and counts in sparse files, opened within a
second for 10,000 tensors, with as many weights as the Hub says."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from published import in_16_bits, write_sparse
from tiny import recipe
from transformers import AutoConfig, AutoModelForImageTextToText

from se_compress.model.binding import check_source, meta_model
from se_compress.opening.headers import Slot
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan


@dataclass(frozen=True)
class Plain:
    """A model as it is on the Hub.

    config    config.json, what shapes the model
    counts    decoder layers, those with experts, experts of one, of a token
    billions  weights of all its files, as the Hub rounds them
    mtp       what precedes the names of a layer for multi-token prediction, "" without one
    """

    config: Mapping[str, Any]
    counts: tuple[int, int, int, int]
    billions: float
    mtp: str = ""


def _config(model_type: str, words: str, **more: Any) -> dict[str, Any]:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size",
            "num_hidden_layers", "num_attention_heads", "num_key_value_heads")  # fmt: skip
    values = dict(zip(keys, map(int, words.split()), strict=True))
    return {"model_type": model_type, "tie_word_embeddings": False, **values, **more}


def _glm(words: str, **more: Any) -> dict[str, Any]:
    common = {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 128,
              "num_experts_per_tok": 8, "attention_bias": True,
              "num_nextn_predict_layers": 1}  # fmt: skip
    return _config("glm4_moe", words, **common, **more)


_LINEAR = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
           "linear_value_head_dim": 128, "head_dim": 256,
           "shared_expert_intermediate_size": 512}  # fmt: skip
_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
           "n_shared_experts": 2}  # fmt: skip
PLAIN: Mapping[str, Plain] = {
    "Qwen/Qwen3-235B-A22B": Plain(
        _config("qwen3_moe", "151936 4096 12288 1536 94 64 4", head_dim=128, num_experts=128,
                num_experts_per_tok=8),
        (94, 94, 128, 8), 235.1,
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": Plain(
        _config("qwen2_moe", "151936 2048 5632 1408 24 16 16", num_experts=60,
                num_experts_per_tok=4, shared_expert_intermediate_size=5632),
        (24, 24, 60, 4), 14.3,
    ),
    "Qwen/Qwen2-57B-A14B": Plain(
        _config("qwen2_moe", "151936 3584 18944 2560 28 28 4", num_experts=64,
                num_experts_per_tok=8, shared_expert_intermediate_size=20480),
        (28, 28, 64, 8), 57.4,
    ),
    "mistralai/Mixtral-8x22B-v0.1": Plain(
        _config("mixtral", "32000 6144 16384 16384 56 48 8", num_local_experts=8,
                num_experts_per_tok=2),
        (56, 56, 8, 2), 140.6,
    ),
    "allenai/OLMoE-1B-7B-0924": Plain(
        _config("olmoe", "50304 2048 1024 1024 16 16 16", num_experts=64, num_experts_per_tok=8),
        (16, 16, 64, 8), 6.9,
    ),
    "deepseek-ai/DeepSeek-V2": Plain(
        _config("deepseek_v2", "102400 5120 12288 1536 60 128 128", **_LATENT, q_lora_rank=1536,
                n_routed_experts=160, num_experts_per_tok=6, first_k_dense_replace=1, n_group=8,
                topk_group=3, topk_method="group_limited_greedy"),
        (60, 59, 160, 6), 235.7,
    ),
    "zai-org/GLM-4.5": Plain(
        _glm("151552 5120 12288 1536 92 96 8", n_routed_experts=160, first_k_dense_replace=3,
             use_qk_norm=True),
        (92, 89, 160, 8), 358.3, "model.layers.92.",
    ),
    "zai-org/GLM-4.5-Air": Plain(
        _glm("151552 4096 10944 1408 46 96 8", n_routed_experts=128, first_k_dense_replace=1,
             use_qk_norm=False),
        (46, 45, 128, 8), 110.5, "model.layers.46.",
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Plain(
        _config("qwen3_next", "151936 2048 5120 512 48 16 2", **_LINEAR, num_experts=512,
                num_experts_per_tok=10),
        (48, 48, 512, 10), 81.3, "mtp.layers.0.",
    ),
    "ibm-granite/granite-3.1-1b-a400m-base": Plain(
        {**_config("granitemoe", "49155 1024 512 512 24 16 8", num_local_experts=32,
                   num_experts_per_tok=8), "tie_word_embeddings": True},
        (24, 24, 32, 8), 1.3,
    ),
}  # fmt: skip


def slots_of(model: Plain) -> Iterator[Slot]:
    """Every tensor of the files."""
    config, last = model.config, model.config["num_hidden_layers"] - 1
    hidden, before = config["hidden_size"], f"model.layers.{last}."
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    slots = [slot for slot in in_16_bits(config) if slot.name not in tied]
    yield from slots
    if not model.mtp:
        return
    for slot in slots:
        if slot.name.startswith(before):
            yield Slot(model.mtp + slot.name.removeprefix(before), slot.dtype, slot.shape)
    start = "mtp." if model.mtp.startswith("mtp") else model.mtp
    yield Slot(
        f"{start}{'fc' if start == 'mtp.' else 'eh_proj'}.weight", "BF16", (hidden, 2 * hidden)
    )
    if start != "mtp.":
        table = (config["vocab_size"], hidden)
        yield Slot(f"{start}embed_tokens.weight", "BF16", table)
        yield Slot(f"{start}shared_head.head.weight", "BF16", table)


@pytest.mark.parametrize("name", PLAIN)
def test_it_opens_with_the_published_counts(tmp_path: Path, name: str) -> None:
    model = PLAIN[name]
    path = write_sparse(tmp_path / "model", model.config, slots_of(model))
    start = time.process_time()
    source = open_source(str(path))
    took = time.process_time() - start
    assert took < max(1.0, len(source.tensors) / 10_000)
    routed = [identity for identity in source.experts if identity.expert != "shared"]
    layers, sparse, experts, chosen = model.counts
    assert (source.layer_count, len(source.moe_layers)) == (layers, sparse)
    assert (source.expert_count, source.top_k, len(routed)) == (experts, chosen, sparse * experts)
    weights = sum(prod(info.shape) for info in source.tensors.values())
    assert round(weights / 1e9, 1) == model.billions
    unrun = [
        info for info in source.tensors.values() if info.expert is not None and info.layer is None
    ]
    assert {info.expert for info in unrun} == (set(range(experts)) if model.mtp else set())


def test_a_composite_as_it_is_published(tmp_path: Path) -> None:
    """Qwen3.5-35B-A3B: experts fused, language model and tower side by side."""
    text = _config("qwen3_5_moe_text", "248320 2048 5632 512 40 16 2", **_LINEAR, num_experts=256,
                   num_experts_per_tok=8)  # fmt: skip
    vision = {"hidden_size": 1152, "depth": 27}
    config = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": vision}
    live = meta_model(text).state_dict()
    slots = [
        Slot(re.sub(r"^model\.", "model.language_model.", name), "BF16", tuple(tensor.shape))
        for name, tensor in live.items()
    ]
    slots.append(Slot("model.visual.blocks.0.attn.qkv.weight", "BF16", (3456, 1152)))
    source = open_source(str(write_sparse(tmp_path / "model", config, slots)))
    assert (source.family, source.text_key) == ("qwen3_5_moe_text", "text_config")
    assert (source.prefix, source.expert_count) == ("model.language_model.", 256)
    assert len(source.experts) == 40 * 257
    assert source.size_bytes == sum(2 * prod(slot.shape) for slot in slots)


# Layers with experts, experts of one, and parameters as the Hub counts them in the files.
LLAMA_4 = {
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (48, 16, 108_641_793_536),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (24, 128, 401_583_781_376),
}


def llama_4(sparse: int, experts: int) -> dict[str, Any]:
    """config.json. Maverick has experts in every other layer, no norms of queries and keys, and
    rotary frequencies that are not scaled."""
    layers = range(48)
    scout = sparse == 48
    text = {
        **_config("llama4_text", "202048 5120 8192 0 48 40 8"),
        "intermediate_size_mlp": 16384, "head_dim": 128, "num_local_experts": experts,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 48 // sparse,
        "moe_layers": [n for n in layers if scout or n % 2],
        "no_rope_layers": [int((n + 1) % 4 != 0) for n in layers],
        "attention_chunk_size": 8192, "attn_temperature_tuning": True, "attn_scale": 0.1,
        "floor_scale": 8192, "attention_bias": False, "use_qk_norm": scout,
        "max_position_embeddings": 10485760 if scout else 1048576, "rope_theta": 500000.0,
        "rope_scaling": _ROPE if scout else None, "pad_token_id": 200018, "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
    }  # fmt: skip
    del text["moe_intermediate_size"]
    vision = {
        "model_type": "llama4_vision_model", "hidden_size": 1408, "num_hidden_layers": 34,
        "num_attention_heads": 16, "intermediate_size": 5632, "vision_output_dim": 4096,
        "projector_input_dim": 4096, "projector_output_dim": 4096, "image_size": 336,
        "patch_size": 14, "pixel_shuffle_ratio": 0.5,
    }  # fmt: skip
    return {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"],
            "text_config": text, "vision_config": vision}  # fmt: skip


_ROPE = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
         "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize("name", LLAMA_4)
def test_llama_4_as_it_is_published(tmp_path: Path, name: str) -> None:
    """Fused experts, a vision tower beside the language model, and the head beside that one's."""
    sparse, experts, parameters = LLAMA_4[name]
    config = llama_4(sparse, experts)
    with torch.device("meta"):
        kind = AutoConfig.for_model(**config)
        whole = AutoModelForImageTextToText.from_config(kind).state_dict()
    slots = [Slot(n, "BF16", tuple(tensor.shape)) for n, tensor in whole.items()]
    source = open_source(str(write_sparse(tmp_path / "model", config, slots)))
    assert sum(prod(info.shape) for info in source.tensors.values()) == parameters
    assert source.size_bytes == 2 * parameters
    assert (source.family, source.prefix) == ("llama4_text", "language_model.model.")
    assert (len(source.moe_layers), source.expert_count, source.top_k) == (sparse, experts, 1)
    assert len(source.experts) == sparse * (experts + 1)  # one is shared
    fused = "language_model.model.layers.1.feed_forward.experts."
    assert {f"{fused}gate_up_proj", f"{fused}down_proj"} < set(whole)
    check_source(source)
    chosen = recipe(source.path, target="transformers", quantization={"method": "none"})
    assert make_plan(source, None, chosen).size_bytes == source.size_bytes
