"""Tiny random models of every model type of transformers' experts interface, as `tiny` has them of
the six families whose every shape is known.

A type is here if transformers 5.17 has it as a causal language model whose experts are run by
`use_experts_implementation`, or if they are put behind that interface (OWN_BLOCKS). NOT_RUN says of
the other types with experts why they are not.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

_COMMON: Mapping[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": tiny.HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_OWN_TOP_K = {key: value for key, value in _COMMON.items() if key != "num_experts_per_tok"}
_LAST_THREE = ["dense", "sparse", "sparse", "sparse"]
_QWEN = {**_COMMON, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8}
_LOCAL = {**_COMMON, "intermediate_size": 32, "num_local_experts": 8}
_GRANITE = {**_LOCAL, "shared_intermediate_size": 48}
_DEEPSEEK = {
    **_COMMON,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_UNGROUPED = {"n_group": 1, "topk_group": 1}
_GROUPED = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_INDEXER = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
_DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
    "shared_expert_intermediate_size": 48,
}
_WINDOW = {"head_dim": 16, "sliding_window": 16}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    **tiny.CONFIGS,
    "afmoe": {**_QWEN, **_WINDOW, "num_shared_experts": 1, "num_dense_layers": 1},
    "axk1": {**_DEEPSEEK, **_GROUPED},
    "axk2": {**_DEEPSEEK, **_INDEXER},
    "cohere2_moe": {
        **_COMMON,
        **_WINDOW,
        "intermediate_size": 32,
        "num_experts": 8,
        "num_shared_experts": 1,
        "prefix_dense_intermediate_size": 96,
        "tie_word_embeddings": True,
    },
    "deepseek_v32": {**_DEEPSEEK, **_INDEXER, **_GROUPED, "mlp_layer_types": _LAST_THREE},
    "deepseek_v4": {
        **_COMMON,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 48,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "sliding_window": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 8,
        "hc_mult": 2,
        "num_nextn_predict_layers": 0,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "qk_rope_head_dim": 8,
        "partial_rotary_factor": 0.5,
    },
    "dots1": {
        **_DEEPSEEK,
        **_UNGROUPED,
        "first_k_dense_replace": 1,
        "sliding_window": None,
        "head_dim": 16,
    },
    "ernie4_5_moe": {
        **_OWN_TOP_K,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
    },
    "exaone_moe": {
        **_QWEN,
        **_UNGROUPED,
        "num_shared_experts": 1,
        "sliding_window": 16,
        "first_k_dense_replace": 1,
        "mlp_layer_types": _LAST_THREE,
    },
    "flex_olmo": {**_COMMON, "intermediate_size": 32, "num_experts": 7},
    "gemma4_text": {
        **_OWN_TOP_K,
        **_WINDOW,
        "intermediate_size": 96,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": tiny.VOCABULARY,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": True,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    },
    "glm4_moe": {
        **_DEEPSEEK,
        **_UNGROUPED,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_nextn_predict_layers": 0,
    },
    "glm4_moe_lite": {**_DEEPSEEK, **_UNGROUPED, "mlp_layer_types": _LAST_THREE},
    "glm_moe_dsa": {
        **_DEEPSEEK,
        **_INDEXER,
        **_UNGROUPED,
        "first_k_dense_replace": 1,
        "mlp_layer_types": _LAST_THREE,
    },
    "gpt_oss": {
        **_LOCAL,
        **_WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granitemoe": _LOCAL,
    "granitemoe_swa": {**_GRANITE, "sliding_window": 16},
    "granitemoehybrid": {
        **_GRANITE,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_head": 16,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
    },
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": {
        **_OWN_TOP_K,
        "intermediate_size": 32,
        "num_experts": 8,
        "moe_topk": 2,
        "head_dim": 16,
    },
    "hy_v3": {**_QWEN, "head_dim": 16, "num_shared_experts": 1, "mlp_layer_types": _LAST_THREE},
    "hy_v4": {
        **_DEEPSEEK,
        **_INDEXER,
        **_UNGROUPED,
        "head_dim": 16,
        "hc_mult": 2,
        "mlp_layer_types": _LAST_THREE,
    },
    "inkling_text": {
        **_COMMON,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 16,
        "d_rel": 4,
        "rel_extent": 32,
        "mlp_layer_types": _LAST_THREE,
    },
    "jamba": {
        **_COMMON,
        "intermediate_size": 32,
        "num_experts": 8,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **_OWN_TOP_K,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_shared_experts": 1,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "mlp_layer_types": _LAST_THREE,
    },
    "laguna": {
        **_QWEN,
        **_WINDOW,
        "shared_expert_intermediate_size": 32,
        "mlp_layer_types": _LAST_THREE,
    },
    "lfm2_moe": {
        **_QWEN,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "tie_word_embeddings": True,
    },
    "llama4_text": {
        **_LOCAL,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "head_dim": 16,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 16,
        "floor_scale": 8,
    },
    "mellum": {**_LOCAL, **_WINDOW, "intermediate_size": 96, "moe_intermediate_size": 32},
    "mimo_v2_flash": {
        **_COMMON,
        **_UNGROUPED,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "head_dim": 24,
        "v_head_dim": 16,
        "sliding_window": 16,
        "layer_types": [
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
        "mlp_layer_types": _LAST_THREE,
    },
    "minimax": {**_LOCAL, "head_dim": 16, "block_size": 16},
    "minimax_m2": {**_LOCAL, "head_dim": 16},
    "minimax_m3_vl_text": {
        **_LOCAL,
        "head_dim": 16,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 2,
        "mlp_layer_types": _LAST_THREE,
    },
    "nemotron_h": {
        **_COMMON,
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
        "n_routed_experts": 8,
        "head_dim": 16,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "use_mamba_kernels": False,
    },
    "phimoe": _LOCAL,
    "qwen3_5_moe_text": {**_QWEN, **_DELTA},
    "qwen3_next": {**_QWEN, **_DELTA},
    "qwen4_exp_text": {
        **_QWEN,
        **_DELTA,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_embed_dim": 32,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 512,
        "split_ngram_parts": 4,
    },
    "solar_open": {**_DEEPSEEK, **_UNGROUPED, "head_dim": 16, "num_key_value_heads": 2},
    "zaya": {
        **_COMMON,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "router_hidden_size": 16,
        "tie_word_embeddings": True,
    },
}

_MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.2,
}
# What published checkpoints set and the defaults above do not.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"mup_enabled": True, "route_scale": 2.5},
    "cohere2_moe": {"logit_scale": 0.25},
    "ernie4_5_moe": {"use_bias": False, "tie_word_embeddings": True},
    "gemma4_text": {"final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 8},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5},
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
            "rope_theta": 150000.0,
        }
    },
    "granitemoe": {**_MULTIPLIERS, "tie_word_embeddings": True},
    "granitemoe_swa": _MULTIPLIERS,
    "granitemoehybrid": _MULTIPLIERS,
    "granitemoeshared": _MULTIPLIERS,
    "hunyuan_v1_moe": {"use_qk_norm": True},
    "inkling_text": {"unpadded_vocab_size": 280},
    "jamba": {"tie_word_embeddings": True},
    "laguna": {"moe_routed_scaling_factor": 2.5, "moe_router_logit_softcapping": 5.0},
    "lfm2_moe": {"use_expert_bias": True},
    "llama4_text": {
        "interleave_moe_layer_step": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 500000.0,
        },
    },
    "minimax": {
        "full_attn_alpha_factor": 3.5,
        "full_attn_beta_factor": 1.0,
        "linear_attn_alpha_factor": 3.5,
        "mlp_alpha_factor": 3.5,
    },
    "nemotron_h": {"moe_latent_size": 16, "routed_scaling_factor": 2.5, "n_group": 1},
    "olmoe": {"clip_qkv": 0.5},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": {"norm_topk_prob": True},
}

NAMES = (*CONFIGS, *(f"{model_type}-published" for model_type in PUBLISHED))

# Types whose blocks have no experts interface, and get one (model/own_experts.py).
OWN_BLOCKS = ("llama4_text",)
# Causal language models of transformers 5.17 with experts that are not among CONFIGS, and why.
NOT_RUN: Mapping[str, str] = {
    "aria_text": "its experts are grouped matrices of its own (AriaGroupedExpertsGemm)",
    "dbrx": "its experts are one matrix of all rows (DbrxExpertGLU)",
    "doge": "16,384 embeddings chosen by product keys; its forward pass raises TypeError",
    "jetmoe": "its experts are JetMoeParallelExperts, in attention too",
    "longcat_flash": "its own experts module; 5.17 cannot load the published layout",
}
# Parameters that are no weights to be drawn: their initial values keep a recurrence stable.
_KEPT = re.compile(r"A_log|dt_bias|\.D$|inv_freq|rotary|layer_scalar|time_decay|slope")


def build(directory: Path, model_type: str, **changes: Any) -> Path:
    """Save the tiny model of a type in float32, tokenizer included; `changes` go to the config.
    Equal calls give equal weights."""
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, torch.Generator().manual_seed(len(model_type)))
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    return tiny.save_tokenizer(directory)


def build_named(directory: Path, name: str) -> Path:
    """A type, or with "-published" behind it the same with the settings of published ones."""
    model_type, _, published = name.partition("-")
    if model_type in COMPOSITES:
        return build_composite(directory, model_type)
    return build(directory, model_type, **(PUBLISHED[model_type] if published else {}))


# Composites -> the type of their language model, and what their config has beside it.
_VISION = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32,
           "out_hidden_size": tiny.HIDDEN}  # fmt: skip
_VISION_OF_LLAMA = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16,
    "image_size": 28,
}  # fmt: skip
COMPOSITES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma4": (
        "gemma4_text",
        {"vision_config": None, "audio_config": None, "tie_word_embeddings": True},
    ),
    "llama4": (
        "llama4_text",
        # transformers loads a packed file's tensors in their own dtype if it changes their names.
        {"vision_config": _VISION_OF_LLAMA, "tie_word_embeddings": False, "dtype": "bfloat16"},
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"vision_config": _VISION, "tie_word_embeddings": False}),
    "qwen4_exp": ("qwen4_exp_text", {"vision_config": _VISION, "tie_word_embeddings": False}),
}
# What the names of their language model begin with in published files, and in one of its own.
_PUBLISHED_START = {"llama4": ("", "language_model.")}
_TOWERS = re.compile(r"(model\.visual|vision_model|multi_modal_projector)\.")


def published_name(model_type: str, name: str) -> str:
    """The name that a tensor of a composite's language model has in published files."""
    start, other = _PUBLISHED_START.get(model_type, ("model.", "model.language_model."))
    return other + name.removeprefix(start) if name.startswith(start) else name


def composite_config(model_type: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a composite with a language model of this config."""
    inner = {key: value for key, value in text.items() if key != "architectures"}
    # Gemma 4 puts the padding in the place of pictures.
    inner |= {"pad_token_id": 0} if model_type == "gemma4" else {}
    beside = COMPOSITES[model_type][1]
    inner |= {"dtype": beside["dtype"]} if "dtype" in beside else {}
    return {"model_type": model_type, "text_config": inner, **beside}


def build_composite(directory: Path, model_type: str) -> Path:
    """The tiny model of a composite, under the names of published ones, with its tower."""
    path = build(directory, COMPOSITES[model_type][0])
    file = path / "model.safetensors"
    stored = load_file(file)
    whole = {published_name(model_type, name): tensor for name, tensor in stored.items()}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config = composite_config(model_type, config)
    dtype = getattr(torch, config.get("dtype", "float32"))
    if config["vision_config"]:
        kind = AutoConfig.for_model(**config)
        model = AutoModelForImageTextToText.from_config(kind, dtype=torch.float32)
        towers = {n: t for n, t in model.state_dict().items() if _TOWERS.match(n)}
        whole |= {name: tensor.clone().contiguous() for name, tensor in towers.items()}
    whole = {name: tensor.to(dtype) for name, tensor in whole.items()}
    save_file(whole, file, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@torch.no_grad()
def fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw the weights of a model, in place."""
    stored = model.state_dict().keys()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("tid2eid"):
            _draw_table(weight, model.config.get_text_config().n_routed_experts, generator)
        elif name in stored and weight.is_floating_point() and not _KEPT.search(name):
            weight.copy_(_draw(name, weight, generator))


def _draw(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator)
    if "norm" in name and weight.dim() == 1:
        # Some norms multiply by 1 + weight and begin at 0.
        return (1.0 if weight.any() else 0.0) + 0.1 * noise
    return 0.2 * noise


def _draw_table(table: Tensor, experts: int, generator: torch.Generator) -> None:
    """For each token [V, k] different experts, in place."""
    scores = torch.rand(table.shape[0], experts, generator=generator)
    table.copy_(scores.argsort(dim=1)[:, : table.shape[1]])
