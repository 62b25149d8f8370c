"""Checkpoints of the real shapes of published models, with random weights and few layers.

Written tensor by tensor, so that this needs the memory of one of them. Expert weights repeat after
EXPERTS_DRAWN experts: drawing 23 GB takes longer than using them. Tokens are bytes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARD_BYTES = 5 * 10**9
EXPERTS_DRAWN = 8
BYTES, BOS, EOS = 256, 256, 257  # token ids: a byte, or one of these
VOCABULARY = 288

Weights = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Shape:
    """A model to write.

    family      model_type of transformers
    config      its config, less what is the same for all
    layers      decoder layers, the first `dense` of them without experts
    experts     routed experts of a layer
    vocabulary  words of embedding and head; VOCABULARY of them are ever seen
    """

    family: str
    config: Mapping[str, Any]
    layers: int
    experts: int
    dense: int = 0
    vocabulary: int = VOCABULARY

    @property
    def settings(self) -> dict[str, Any]:
        """What is written to config.json."""
        count = "n_routed_experts" if self.family == "deepseek_v3" else "num_experts"
        architecture = {"deepseek_v3": "DeepseekV3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
        return {
            "architectures": [architecture[self.family]],
            "model_type": self.family,
            "torch_dtype": "bfloat16",
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            count: self.experts,
            **({"first_k_dense_replace": self.dense} if self.family == "deepseek_v3" else {}),
            **self.config,
        }


QWEN3_30B = Shape(
    "qwen3_moe",
    {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "norm_topk_prob": True,
    },
    layers=2,
    experts=128,
)
DEEPSEEK_V3 = Shape(
    "deepseek_v3",
    {
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_nextn_predict_layers": 0,
    },
    layers=2,
    experts=256,
    dense=1,
)
# Qwen3's kind at a size at which a run takes less than a minute.
SMALL = replace(
    QWEN3_30B,
    config={
        **QWEN3_30B.config,
        "hidden_size": 512,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts_per_tok": 4,
    },
    experts=32,
)


def write_model(shape: Shape, directory: Path) -> Path:
    """Write the model, tokenizer included. One that is there is not written again."""
    settings, done = shape.settings, directory / "model.safetensors.index.json"
    if done.exists() and json.loads((directory / "config.json").read_text()) == settings:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(settings, indent=1))
    _write_tokenizer(directory)
    places: dict[str, str] = {}
    for number, weights in enumerate(_shards(shape)):
        file = f"model-{number + 1:05}.safetensors"
        _write_shard(directory / file, weights)
        places |= dict.fromkeys(weights, file)
    done.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def _shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each file."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, extents in _weights(shape):
        if shard and _bytes_of(shard) + _bytes_of({name: extents}) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = extents
    yield shard


def _bytes_of(weights: Mapping[str, tuple[int, ...]]) -> int:
    return sum(2 * torch.Size(extents).numel() for extents in weights.values())


def _weights(shape: Shape) -> Weights:
    hidden = shape.config["hidden_size"]
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{stem}.{norm}.weight", (hidden,)
        attention = _mla if shape.family == "deepseek_v3" else _attention
        for name, extents in attention(shape.config):
            yield f"{stem}.self_attn.{name}.weight", extents
        for name, extents in _mlp(shape, layer):
            yield f"{stem}.mlp.{name}", extents
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocabulary, hidden)


def _attention(config: Mapping[str, Any]) -> Weights:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = (config[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    yield "q_proj", (queries, hidden)
    yield "k_proj", (keys, hidden)
    yield "v_proj", (keys, hidden)
    yield "o_proj", (hidden, queries)
    yield "q_norm", (head,)
    yield "k_norm", (head,)


def _mla(config: Mapping[str, Any]) -> Weights:
    """DeepSeek's latent attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    plain, rotary, value = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    queries, latent = config["q_lora_rank"], config["kv_lora_rank"]
    yield "q_a_proj", (queries, hidden)
    yield "q_a_layernorm", (queries,)
    yield "q_b_proj", (heads * (plain + rotary), queries)
    yield "kv_a_proj_with_mqa", (latent + rotary, hidden)
    yield "kv_a_layernorm", (latent,)
    yield "kv_b_proj", (heads * (plain + value), latent)
    yield "o_proj", (hidden, heads * value)


def _mlp(shape: Shape, layer: int) -> Weights:
    config = shape.config
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    if layer < shape.dense:
        yield from _gated("", hidden, config["intermediate_size"])
        return
    yield "gate.weight", (shape.experts, hidden)
    if shape.family == "deepseek_v3":
        yield "gate.e_score_correction_bias", (shape.experts,)
        yield from _gated("shared_experts.", hidden, inner * config["n_shared_experts"])
    for expert in range(shape.experts):
        yield from _gated(f"experts.{expert}.", hidden, inner)


def _gated(stem: str, hidden: int, inner: int) -> Weights:
    for role in ("gate", "up"):
        yield f"{stem}{role}_proj.weight", (inner, hidden)
    yield f"{stem}down_proj.weight", (hidden, inner)


# ----------------------------------------------------------------------------------------- on disk


def _write_shard(file: Path, weights: Mapping[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, extents in weights.items():
        begin, end = end, end + _bytes_of({name: extents})
        header[name] = {"dtype": "BF16", "shape": extents, "data_offsets": [begin, end]}
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    drawn: dict[str, bytes] = {}
    with file.open("wb") as opened:
        opened.write(len(head).to_bytes(8, "little") + head)
        for name, extents in weights.items():
            key = _drawn_as(name)
            if key not in drawn:
                drawn[key] = _draw(key, extents).view(torch.int16).numpy().tobytes()
            opened.write(drawn[key])
            if ".experts." not in key:
                del drawn[key]


def _drawn_as(name: str) -> str:
    """The weight of whose values this one is a copy."""
    before, marker, after = name.partition(".experts.")
    if not marker:
        return name
    expert, _, rest = after.partition(".")
    return f"{before}{marker}{int(expert) % EXPERTS_DRAWN}.{rest}"


def _draw(name: str, extents: tuple[int, ...]) -> Tensor:
    """Weights at a scale where routing, attention and logits are far from uniform."""
    seed = sum(place * byte for place, byte in enumerate(name.encode(), 1))
    noise = torch.randn(extents, generator=torch.Generator().manual_seed(seed))
    if "norm" in name:
        noise = noise.mul_(0.1).add_(1.0)
    elif len(extents) == 1:
        noise = noise.mul_(0.1)
    elif "embed" not in name:
        sharp = 3.0 if ".gate.weight" in name or "lm_head" in name else 1.0
        noise = noise.mul_(sharp / extents[-1] ** 0.5)
    return noise.bfloat16()


def _write_tokenizer(directory: Path) -> None:
    """A token for each byte, and the two special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=4096
    )
    tokenizer.save_pretrained(directory)
