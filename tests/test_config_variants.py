"""The six families whose every shape is known, under the settings that configs of theirs have: each
opens, is bound whole, and runs a layer at a time as transformers runs it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from se_compress.model.binding import check_source
from se_compress.model.checkpoint import open_tensors
from se_compress.model.states import batches_of
from se_compress.model.streaming import StreamedModel
from se_compress.opening.source import open_source

Changes = Mapping[str, Any]
TOKENS = tiny.random_tokens(2, 40)
_OLD_ROPE = {"rope_parameters": None, "rope_theta": 5000.0}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
         "original_max_position_embeddings": 64}  # fmt: skip

# Of the config that a model is built with. Those of one family come behind those of all.
BUILT: Mapping[str, Changes] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "top-1": {"num_experts_per_tok": 1},
    "top-all-but-one": {"num_experts_per_tok": 3},
    "gelu": {"hidden_act": "gelu"},
    "gelu-tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "linear": {"rope_parameters": _LINEAR},
    "dynamic": {"rope_parameters": _DYNAMIC},
    "yarn": {"rope_parameters": _YARN},
    "epsilon": {"rms_norm_eps": 1e-3},
    "two-layers": {"num_hidden_layers": 2},
}
_BIASED = {"attention_bias": True}
_QWEN: Mapping[str, Changes] = {
    "normed": {"norm_topk_prob": True},
    "not-normed": {"norm_topk_prob": False},
    "sparse-step": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "first-dense": {"mlp_only_layers": [0]},
    "last-dense": {"mlp_only_layers": [2]},
    "all-sparse": {"mlp_only_layers": []},
    "window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "one-key-head": {"num_key_value_heads": 1},
    "heads-alike": {"num_key_value_heads": 4},
}
_DEEPSEEK: Mapping[str, Changes] = {
    "low-rank-queries": {"q_lora_rank": 24},
    "plain-queries": {"q_lora_rank": None},
    "all-sparse": {"first_k_dense_replace": 0},
    "two-dense": {"first_k_dense_replace": 2},
    "one-shared": {"n_shared_experts": 1},
    "scaled": {"routed_scaling_factor": 2.5},
    "two-groups": {"n_group": 2, "topk_group": 1},
    "biased": _BIASED,
    "wide-values": {"v_head_dim": 24},
    "no-groups": {"n_group": 1, "topk_group": 1},
    "normed": {"norm_topk_prob": True},
}
OWN: Mapping[str, Mapping[str, Changes]] = {
    "qwen2_moe": {**_QWEN, "wide-shared": {"shared_expert_intermediate_size": 96},
                  "biases": {"qkv_bias": True}, "no-biases": {"qkv_bias": False}},
    "qwen3_moe": {**_QWEN, "biased": _BIASED, "wide-heads": {"head_dim": 32},
                  "experts-6": {"num_experts": 6}},
    "olmoe": {"clipped": {"clip_qkv": 0.5}, "biased": _BIASED, "normed": {"norm_topk_prob": True},
              "not-normed": {"norm_topk_prob": False}, "key-heads": {"num_key_value_heads": 2},
              "experts-6": {"num_experts": 6}, "narrow": {"intermediate_size": 16}},
    # transformers itself fails at yarn and dynamic where Mixtral's head_dim is null.
    "mixtral": {
        "yarn": {"rope_parameters": _YARN, "head_dim": 16},
        "dynamic": {"rope_parameters": _DYNAMIC, "head_dim": 16},
        "window": {"sliding_window": 12}, "no-window": {"sliding_window": None},
                "wide-heads": {"head_dim": 32}, "jitter": {"router_jitter_noise": 0.1},
                "one-key-head": {"num_key_value_heads": 1}, "experts-6": {"num_local_experts": 6},
                "narrow": {"intermediate_size": 32}},
    "deepseek_v2": {**_DEEPSEEK, "greedy": {"topk_method": "greedy"},
                    "grouped": {"topk_method": "group_limited_greedy", "n_group": 4,
                                "topk_group": 2}},
    "deepseek_v3": {**_DEEPSEEK, "not-interleaved": {"rope_interleave": False},
                    "next-token": {"num_nextn_predict_layers": 1}},
}  # fmt: skip
# Of a file that is there: keys of older checkpoints, and tensors that some have.
EDITED: Mapping[str, Changes] = {
    "old-rope": _OLD_ROPE,
    "old-linear": {**_OLD_ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "old-dynamic": {**_OLD_ROPE, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "no-dtype": {"dtype": None},
    "torch-dtype": {"dtype": None, "torch_dtype": "bfloat16"},
    "cache-and-kernels": {"use_cache": False, "attn_implementation": "flash_attention_2"},
}
HEAD, STRAY = "tied-with-a-stored-head", "stray-frequencies"
NAMES = [
    (family, name)
    for family in tiny.CONFIGS
    for name in dict.fromkeys((*BUILT, *OWN[family], *EDITED, HEAD, STRAY))
    # transformers multiplies its head_dim, which is null there, when it scales dynamically
    if (family, name) != ("mixtral", "old-dynamic")
]


def edit(directory: Path, changes: Changes) -> None:
    """Set keys of config.json; None takes one out. Others that are null stay."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in config.items() if value is not None or key not in changes}
    file.write_text(json.dumps(kept), encoding="utf-8")


def build(directory: Path, family: str, name: str) -> Path:
    changes = {**BUILT, **OWN[family]}.get(name, {})
    path = tiny.build(directory, family, **{**changes, **({} if name != HEAD else BUILT["tied"])})
    edit(path, EDITED.get(name, {}))
    tensors = load_file(path / "model.safetensors")
    if name == HEAD:
        tiny.edit_weights(path, {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    if name == STRAY:
        frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4)
                       for n in range(3)}  # fmt: skip
        tiny.edit_weights(path, frequencies)
    return path


def test_there_are_as_many_as_were_right_before() -> None:
    assert len(NAMES) >= 131


@pytest.mark.parametrize(("family", "name"), NAMES)
@torch.no_grad()
def test_a_variant_runs_as_transformers_runs_it(tmp_path: Path, family: str, name: str) -> None:
    path = build(tmp_path / "model", family, name)
    source = open_source(str(path))
    check_source(source)
    model = StreamedModel(source, open_tensors(source.tensors))
    states = model.embed(batches_of(TOKENS, 10**6))
    for layer in range(source.layer_count):
        states = model.run_layer(layer, model.load_layer(layer), states)
    found = torch.cat([*model.logits(states)]).flatten(0, -2)
    # A file may ask for a kernel of another machine, which changes nothing.
    edit(path, {"attn_implementation": None})
    expected = tiny.plain_model(path)(torch.tensor(TOKENS)).logits.flatten(0, -2)
    away = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(away.median()) < 1e-5
    assert float((away < 1e-3).float().mean()) == 1.0
