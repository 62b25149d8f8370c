"""Every tensor of a checkpoint is bound to a place in the model, or explained, or refused.

The tables name what a decoder layer of transformers 5.17 has, by the names on disk, with extents
that a config gives. A test holds them to the models themselves. Standard library only.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from se_compress.artifacts import ROLES, ExpertIndex, Role, TensorInfo, TensorKind
from se_compress.errors import SourceError
from se_compress.opening.config_rules import NEXT_TOKEN_KEYS
from se_compress.opening.families import Family, count_key, layer_count, moe_layers, setting
from se_compress.opening.modelfiles import shown
from se_compress.opening.naming import unrun

WEIGHT_DTYPES = ("BF16", "F16", "F32")

Shape = tuple[int, ...]
# Name, shape, kind, layer, expert, role.
Place = tuple[str, Shape, TensorKind, int | None, ExpertIndex | None, Role | None]
# Name behind `model.layers.{layer}.` -> its extents, names of `_sizes`.
Parts = Mapping[str, tuple[str, ...]]

_NORMS: Parts = {
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
}
_GROUPED: Parts = {
    "self_attn.q_proj.weight": ("queries", "hidden"),
    "self_attn.k_proj.weight": ("keys", "hidden"),
    "self_attn.v_proj.weight": ("keys", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "queries"),
}
_GROUPED_BIAS: Parts = {
    "self_attn.q_proj.bias": ("queries",),
    "self_attn.k_proj.bias": ("keys",),
    "self_attn.v_proj.bias": ("keys",),
}
_QUERY_NORM: Mapping[str, Parts] = {
    "": {},
    "head": {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)},
    "hidden": {"self_attn.q_norm.weight": ("hidden",), "self_attn.k_norm.weight": ("keys",)},
}
_LATENT: Parts = {
    "self_attn.kv_a_proj_with_mqa.weight": ("latent+turned", "hidden"),
    "self_attn.kv_a_layernorm.weight": ("latent",),
    "self_attn.kv_b_proj.weight": ("keys+values", "latent"),
    "self_attn.o_proj.weight": ("hidden", "values"),
}
_LATENT_BIAS: Parts = {"self_attn.kv_a_proj_with_mqa.bias": ("latent+turned",)}
_DIRECT_QUERY: Parts = {"self_attn.q_proj.weight": ("queries", "hidden")}
_LOW_RANK_QUERY: Parts = {
    "self_attn.q_a_proj.weight": ("query rank", "hidden"),
    "self_attn.q_a_layernorm.weight": ("query rank",),
    "self_attn.q_b_proj.weight": ("queries", "query rank"),
}
_LOW_RANK_QUERY_BIAS: Parts = {"self_attn.q_a_proj.bias": ("query rank",)}
_OUTPUT_BIAS: Parts = {"self_attn.o_proj.bias": ("hidden",)}
_DENSE: Parts = {
    "mlp.gate_proj.weight": ("dense", "hidden"),
    "mlp.up_proj.weight": ("dense", "hidden"),
    "mlp.down_proj.weight": ("hidden", "dense"),
}
# Last parts of names that quantisers give to scales, zero points and packed weights.
_QUANTISED = re.compile(
    r"(\w+_)?(scale(_inv|_2)?|scales|zero_point|qweight|qzeros|g_idx|blocks|absmax|quant_map|SCB)"
    r"|weight_(packed|shape|format)|bitsandbytes__\w+"
)
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)", re.ASCII)
_FIRST_NORM = "layers.0.input_layernorm.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def bind(
    found: Mapping[str, TensorInfo], family: Family, config: Mapping[str, Any], path: Path
) -> dict[str, TensorInfo]:
    """The tensors with kind, layer, expert and role filled in, in the order of `found`.

    Raises SourceError for the first one that is missing, has another shape, cannot be read, or has
    no place in the model.
    """
    _check_readable(found)
    _check_fused(found)
    bound: dict[str, TensorInfo] = {}
    for name, shape, kind, layer, expert, role in places(family, config):
        info = found.get(name)
        if info is None:
            raise SourceError(f"{path}: {_why_missing(name, found)}")
        if info.shape != shape:
            raise SourceError(
                f"{path}: {name} is {shown(list(info.shape))}, but config.json says {list(shape)}"
            )
        if info.dtype not in WEIGHT_DTYPES:
            raise SourceError(
                f"{path}: {name} is {info.dtype}; {', '.join(WEIGHT_DTYPES)} can be read"
            )
        bound[name] = TensorInfo(
            *(name, info.dtype, shape, info.file, info.begin, info.end),
            *(kind, layer, expert, role, _axis(family, name, kind), info.stored),
        )
    if len(bound) < len(found):
        bound |= {
            name: _explained(info, family, config)
            for name, info in found.items()
            if name not in bound
        }
    return {name: bound[name] for name in found}


def places(family: Family, config: Mapping[str, Any]) -> Iterator[Place]:
    """Every tensor that the model of a config has."""
    sizes = _sizes(family, config)
    table = (sizes["vocabulary"], sizes["hidden"])
    yield EMBEDDING, table, "embedding", None, None, None
    yield "model.norm.weight", (sizes["hidden"],), "norm", None, None, None
    if not setting(config, "tie_word_embeddings"):
        yield HEAD, table, "embedding", None, None, None
    common = _resolved({**_NORMS, **_attention(family, config)}, sizes)
    dense, sparse = _resolved(_DENSE, sizes), set(moe_layers(config))
    for layer in range(layer_count(config)):
        prefix = f"model.layers.{layer}."
        for rest, shape, kind in common if layer in sparse else [*common, *dense]:
            yield prefix + rest, shape, kind, layer, None, None
        if layer in sparse:
            yield from _experts(family, layer, sizes)


def _axis(family: Family, name: str, kind: TensorKind) -> int | None:
    """The axis of a router's tensor that runs over the experts."""
    if kind != "router":
        return None
    return family.leaves[name.split(".", 3)[3]].axis


def _experts(family: Family, layer: int, sizes: Mapping[str, int]) -> Iterator[Place]:
    hidden, count = sizes["hidden"], sizes["experts"]
    yield family.router.format(layer=layer), (count, hidden), "router", layer, None, None
    for template in family.per_expert:
        yield template.format(layer=layer), (count,), "router", layer, None, None
    if family.shared_gate:
        yield family.shared_gate.format(layer=layer), (1, hidden), "router", layer, None, None
    if family.shared:
        yield from _projections(family, family.shared, layer, "shared", hidden, sizes["shared"])
    for expert in range(count):
        yield from _projections(family, family.expert, layer, expert, hidden, sizes["width"])


def _projections(
    family: Family, template: str, layer: int, expert: ExpertIndex, hidden: int, width: int
) -> Iterator[Place]:
    kind: TensorKind = "shared_expert" if expert == "shared" else "expert"
    for role, projection in zip(ROLES, family.projections, strict=True):
        name = template.format(layer=layer, expert=expert, projection=projection)
        shape = (hidden, width) if role == "down" else (width, hidden)
        yield name, shape, kind, layer, expert, role


def _attention(family: Family, config: Mapping[str, Any]) -> Parts:
    biased = bool(family.attention_bias and setting(config, family.attention_bias))
    if family.latent_attention:
        low_rank = setting(config, "q_lora_rank") is not None
        parts = {**_LATENT, **(_LOW_RANK_QUERY if low_rank else _DIRECT_QUERY)}
        query_bias = _LOW_RANK_QUERY_BIAS if low_rank else {}
        return {**parts, **_LATENT_BIAS, **_OUTPUT_BIAS, **query_bias} if biased else parts
    parts = {**_GROUPED, **_QUERY_NORM[family.query_norm]}
    output_bias = {} if family.attention_bias == "qkv_bias" else _OUTPUT_BIAS
    return {**parts, **_GROUPED_BIAS, **output_bias} if biased else parts


def _sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    shared = 1
    for key in family.shared_width:
        shared *= setting(config, key) or 0
    sizes = {
        "hidden": hidden,
        "vocabulary": config["vocab_size"],
        "dense": config.get("intermediate_size") or 0,
        "experts": config[count_key(family, config)],
        "width": config[family.width_key],
        "shared": shared,
    }
    if not family.latent_attention:
        head = config.get("head_dim") or hidden // heads
        keys = (setting(config, "num_key_value_heads") or heads) * head
        return sizes | {"head": head, "queries": heads * head, "keys": keys}
    latent, turned, plain, values = (
        setting(config, key)
        for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    return sizes | {
        "latent": latent,
        "latent+turned": latent + turned,
        "queries": heads * (plain + turned),
        "keys+values": heads * (plain + values),
        "values": heads * values,
        "query rank": setting(config, "q_lora_rank") or 0,
    }


def _resolved(parts: Parts, sizes: Mapping[str, int]) -> list[tuple[str, Shape, TensorKind]]:
    return [
        (rest, tuple(sizes[extent] for extent in extents), _kind(rest))
        for rest, extents in parts.items()
    ]


def _kind(rest: str) -> TensorKind:
    if "norm" in rest:
        return "norm"
    return "attention" if rest.startswith("self_attn.") else "dense_mlp"


# ------------------------------------------------------------------------ what is not as it should


@cache
def _is_quantised(leaf: str) -> bool:
    return _QUANTISED.fullmatch(leaf) is not None


def _check_readable(found: Mapping[str, TensorInfo]) -> None:
    """Quantised weights, and scales of such, are refused by name wherever they are."""
    for name, info in found.items():
        scale = _is_quantised(name.rpartition(".")[2])
        if info.dtype in WEIGHT_DTYPES and not scale:
            continue
        if info.dtype.startswith(("F8", "F6_", "F4")):
            told = f"is {info.dtype}: FP{info.dtype[1]} weights go with scales"
        elif scale or info.dtype in ("I8", "U8"):
            told = f"is {info.dtype}, of weights that are quantised with scales"
        else:
            continue
        raise SourceError(
            f"{info.file}: {shown(name)} {told}, of which config.json says nothing that can be "
            "read (quantization_config); convert the model to bfloat16"
        )


def _check_fused(found: Mapping[str, TensorInfo]) -> None:
    for name, info in found.items():
        _, inside, rest = name.partition(".experts.")
        if inside and not rest[:1].isdigit():
            raise SourceError(
                f"{info.file}: {shown(name)} is {shown(list(info.shape))}: the experts of a layer "
                "are fused into one tensor under a name that is not known; gate_up_proj and "
                "down_proj are, and one for each expert"
            )


def _why_missing(name: str, found: Mapping[str, TensorInfo]) -> str:
    if f"model.{_FIRST_NORM}" not in found:
        other = next((n for n in found if n.endswith(_FIRST_NORM)), None)
        if other is not None:
            start = other.removesuffix(_FIRST_NORM)
            return (
                f"the names of its tensors begin with {shown(start)}layers., where model.layers. is"
                " needed; rename them, or save the language model alone"
            )
    if name == HEAD:
        return (
            f"{HEAD} is missing, and tie_word_embeddings is not true, so the model has no output "
            "head (is it a reward model or a classifier?)"
        )
    return f"{name} is missing; config.json promises it"


def _explained(info: TensorInfo, family: Family, config: Mapping[str, Any]) -> TensorInfo:
    """A tensor that the running model has no place for, and for which there is a reason: layers
    for multi-token prediction, which are not run; frequencies, which are computed; a head stored
    beside the embeddings that it is tied to. Raises SourceError for any other."""
    name, layers = info.name, layer_count(config)
    match = _LAYER.fullmatch(name)
    if match is not None and int(match[1]) >= layers:
        further = max((setting(config, key) or 0 for key in NEXT_TOKEN_KEYS), default=0)
        if int(match[1]) < layers + further:
            return unrun(info, match[2], family, config[count_key(family, config)])
        raise SourceError(
            f"{info.file}: {shown(name)} is of a layer that config.json does not know: "
            f"num_hidden_layers is {layers}, so layers end at {layers - 1}"
            + (f", and at {layers + further - 1} with multi-token prediction" if further else "")
        )
    if name.endswith("rotary_emb.inv_freq"):
        return replace(info, layer=int(match[1]) if match else None, kind="other")
    if name == HEAD and info.shape == (config["vocab_size"], config["hidden_size"]):
        return replace(info, kind="embedding")
    raise SourceError(
        f"{info.file}: {shown(name)} {shown(list(info.shape))} does not belong to the model of "
        "config.json, which has no place for it"
    )
