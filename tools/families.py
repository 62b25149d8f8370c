"""Derive the facts about every model family from transformers, and write them to
se_compress/opening/families.json. Run it with another transformers, or after a change here:

    python tools/families.py

A family is a model type of tests/tiny_types.py. Its tiny model is built on the meta device, with
its own settings and with one setting after the other bent; names on disk are those that
save_pretrained would write and those that transformers loads as well. What runs over the experts is
found by a twin with another number of experts, and which key of the config means what by trying.
BY_HAND holds what neither names nor shapes can show.
"""

import json
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_types import CONFIGS, PUBLISHED, composite_config  # noqa: E402

from se_compress.errors import SourceError  # noqa: E402
from se_compress.model.binding import bind, experts_modules, meta_model  # noqa: E402
from se_compress.model.own_experts import ScaledInputs  # noqa: E402

FILE = ROOT / "se_compress" / "opening" / "families.json"
_DEEPSEEK = {
    "shared_width": ["moe_intermediate_size", "n_shared_experts"],
    "latent_attention": True,
    "attention_bias": "attention_bias",
    "exact": True,
}
_LATENT = ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
# Model type -> what is said of it here: the shapes of six families as functions of config.json
# (opening/account.py), routers that look at groups of experts only under a condition, and names of
# published files that nothing derives. `defaults`: keys whose default is taken from transformers.
BY_HAND: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {
        "attention_bias": "qkv_bias",
        "shared_width": ["shared_expert_intermediate_size"],
        "exact": True,
        "defaults": ["num_key_value_heads", "qkv_bias", "shared_expert_intermediate_size"],
    },
    "qwen3_moe": {
        "query_norm": "head",
        "attention_bias": "attention_bias",
        "exact": True,
        "defaults": ["num_key_value_heads"],
    },
    "olmoe": {
        "query_norm": "hidden",
        "attention_bias": "attention_bias",
        "exact": True,
        "defaults": [],
    },
    "mixtral": {
        "slides": True,
        "renames": [["block_sparse_moe.", "mlp."]],
        "exact": True,
        "defaults": ["num_key_value_heads"],
    },
    "deepseek_v2": {
        **_DEEPSEEK,
        "grouped_if": {"topk_method": "group_limited_greedy"},
        "defaults": [*_LATENT, "n_shared_experts", "topk_method"],
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "implied": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        "defaults": [
            *_LATENT,
            "n_shared_experts",
            "num_key_value_heads",
            "first_k_dense_replace",
            "n_group",
            "topk_group",
            "num_nextn_predict_layers",
        ],
    },
}
# Keys that the account of any other family looks at.
DEFAULTS = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "tie_word_embeddings",
    "num_nextn_predict_layers",
)  # fmt: skip
# Keys that some class reads without naming them.
SYNONYMS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts",
)  # fmt: skip
# Names of published files beside those that can be derived: DeepSeek-V4's begin without "model.".
ALSO: Mapping[str, Sequence[str]] = {
    "deepseek_v4": ("embed.weight", "norm.weight", "hc_head_base", "hc_head_fn", "hc_head_scale"),
}
_LAYER = re.compile(r"(?P<prefix>.*?\b)layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Modules of these names mix positions without softmax attention.
_OTHER_MIXERS = re.compile("Lightning|Delta|Mamba|Linear|Conv")
_MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}

Config = Mapping[str, Any]


def derive(model_type: str) -> dict[str, Any]:
    """The row of a family."""
    config = {"model_type": model_type, **CONFIGS[model_type]}
    base = meta_model(config)
    row: dict[str, Any] = {"model_class": type(base).__name__, **_form(base)}
    row |= _keys(config, base)
    layout = Layout(model_type)
    for settings in _variants(config):
        layout.look_at(settings, row["count_keys"][0])
    row |= layout.names()
    by_hand = dict(BY_HAND.get(model_type, {}))
    grouped, standard = row.pop("grouped"), (*DEFAULTS, row["count_keys"][0], row["top_k_keys"][0])
    if grouped:
        row["grouped_if"], standard = {}, (*standard, "n_group", "topk_group")
    row["defaults"] = _defaults(model_type, by_hand.pop("defaults", standard))
    row |= {"merged": merged} if (merged := _merged(base)) else {}
    return {**row, **by_hand, "outer": layout.outer, "leaves": layout.leaves()}


def _variants(config: Config) -> Iterator[Config]:
    """The config, the one with the settings of published models, and those that differ from it in
    a switch, or have none of what a rank would set."""
    published = {**config, **PUBLISHED.get(config["model_type"], {})}
    yield config
    yield published
    known = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    for key, value in known.items():
        if isinstance(value, bool):
            yield {**published, key: not value}
        elif key.endswith("_rank"):
            yield {**published, key: None if value else 8}


# ------------------------------------------------------------------------------------ config keys


def _keys(config: Config, base: Any) -> dict[str, Any]:
    """Which keys say how many experts there are, how wide they are, and how many a token gets."""
    grouped = _try({**config, "n_group": 4, "topk_group": 2})
    return {
        "count_keys": _working(config, "expert", 37, lambda m: len(_experts(m).down_proj) == 37),
        "width_key": _working(config, "intermediate", 37, lambda m: _width(_experts(m)) == 37)[0],
        "top_k_keys": _working(
            config, "per_tok|moe_k|top_?k(_experts)?$", 7, lambda m: _asked_of_a_router(m) == 7
        )
        or ["num_experts_per_tok"],  # a class that takes no other number than the tiny config's
        "grouped": grouped is not None and 4 in _numbers(grouped, "^(num|n)_group$"),
    }


def _working(config: Config, named: str, value: int, works: Callable[[Any], bool]) -> list[str]:
    """The keys that make a model which `works` accepts if they are `value`, of those that are
    `named` so. First the one in the tiny config; the others say the same in its place."""
    kind = CONFIG_MAPPING[config["model_type"]]
    known = {*kind.from_dict(dict(config)).to_dict(), *kind.attribute_map, *SYNONYMS}
    keys = [key for key in known if re.search(named, key)]

    def does(key: str, settings: Config) -> bool:
        model = _try({**settings, key: value})
        return model is not None and works(model)

    first = next((key for key in config if key in keys and does(key, config)), None)
    if first is None:
        return []
    others = {key: part for key, part in config.items() if key != first}
    return [first, *(key for key in sorted(keys) if key != first and does(key, others))]


def _asked_of_a_router(model: Any) -> int | None:
    """Experts of a token, by what a router's module or the config that it reads says."""
    found = _numbers(model, "^(top_k|num_experts_per_tok|moe_topk)$")
    config = model.config.get_text_config()
    own = "top_k_experts" if hasattr(type(config), "top_k_experts") else "num_experts_per_tok"
    return next(iter(found), getattr(config, own, None))


def _try(config: Config) -> Any:
    """The model of a config; None if transformers builds none."""
    try:
        return meta_model(config)
    except (SourceError, NotImplementedError):
        return None


def _numbers(model: nn.Module, named: str) -> set[int]:
    """Whole numbers that modules keep under a name like `named`."""
    return {
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is int and re.search(named, name)
    }


def _defaults(model_type: str, keys: Sequence[str]) -> dict[str, Any]:
    config = CONFIG_MAPPING[model_type]()
    return {key: getattr(config, key) for key in keys if hasattr(config, key)}


# ---------------------------------------------------------------------------------------- experts


def _experts(model: Any) -> Any:
    return experts_modules(model)[0][1]


def _width(experts: Any) -> int:
    """Neurons of an expert."""
    return int(experts.down_proj.shape[1 if experts.is_transposed else 2])


def _form(model: Any) -> dict[str, Any]:
    """How transformers holds the experts, and whether they compute something of their own."""
    experts = _experts(model)
    common = experts.has_gate and hasattr(experts, "act_fn") and _is_common(experts)
    form = {
        "gated": bool(experts.has_gate),
        "biased": bool(experts.has_bias),
        "transposed": bool(experts.is_transposed),
        "own_activation": not common,
    }
    scaled = any(isinstance(module, ScaledInputs) for module in model.modules())
    return {**form, "scaled_inputs": True} if scaled else form


def _is_common(experts: Any) -> bool:
    """Whether act(gate) * up is what lies between the projections, gate above up: seen with values
    that any clamp would cut."""
    product = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 100
    gate, up = product.chunk(2, dim=-1)
    return torch.equal(experts._apply_gate(product), experts.act_fn(gate) * up)


# ------------------------------------------------------------------------------------------ names


@dataclass(frozen=True)
class Found:
    """What is found out of a tensor of a layer: as `families.Leaf`, and

    live          rest of its live name
    dims          extents
    gates_shared  it weighs the shared expert's output
    holds_ids     its values are numbers of experts
    renamed       a name of its own on disk is all that differs there
    """

    kind: str
    live: str
    role: str
    axis: int | None
    more: bool
    dims: int
    gates_shared: bool
    holds_ids: bool
    renamed: bool


class Layout:
    """The names of a family's tensors, gathered from one model after the other.

    outer  name outside of the layers -> its kind
    """

    def __init__(self, model_type: str) -> None:
        self.outer = {name: _outer_kind(name) for name in ALSO.get(model_type, ())}
        self._seen: set[str] = set()
        self._found: dict[str, Found] = {}  # by the rest of the name on disk
        self._saved: dict[str, None] = {}  # of these, what save_pretrained writes
        self._of_experts: dict[str, str] = {}  # the same, {expert} for the number -> live
        self._layers: list[tuple[bool, set[str]]] = []  # has experts; live rests
        self._path = self._prefix = ""

    def look_at(self, config: Config, count_key: str) -> None:
        """Add what a model has. One without a new name says nothing new."""
        model = _try(config)
        if model is None or set(model.state_dict()) <= self._seen:
            return
        self._seen |= set(model.state_dict())
        count = int(_experts(model).down_proj.shape[0])
        twin = meta_model({**config, count_key: 2 * count})
        self._path = _rest(experts_modules(model)[0][0])
        found = _found(model, twin, count, self._path)
        saved = _saved(model)
        for disk, live in {**_as_live(model), **saved}.items():
            match = _LAYER.match(disk)
            if match is None:
                self.outer[disk] = _outer_kind(disk)
                continue
            self._prefix = match["prefix"]
            if live in found:
                self._note(match["rest"], found[live])
                self._saved |= {match["rest"]: None} if disk in saved else {}
            else:
                rest = _NUMBER.sub("{expert}", match["rest"])
                self._of_experts[rest] = _rest(live).rpartition(".")[2]
        self._count(model)

    def _note(self, rest: str, leaf: Found) -> None:
        """Add a leaf. What is softmax attention in some layers only is left alone in all."""
        before = self._found.get(rest, leaf)
        self._found[rest] = before if before.kind == "other" else leaf

    def _count(self, model: Any) -> None:
        """Note which layers have which names."""
        layers: dict[str, set[str]] = defaultdict(set)
        for name in model.state_dict():
            if match := _LAYER.match(name):
                layers[match["layer"]].add(match["rest"])
        for rests in layers.values():
            self._layers.append((any(r.startswith(f"{self._path}.") for r in rests), rests))

    def _where(self, live: str) -> str:
        """In which layers a tensor is: every one, every one with experts, or some."""
        if all(live in rests for _, rests in self._layers):
            return "every"
        return "experts" if all(live in rests for has, rests in self._layers if has) else "some"

    def leaves(self) -> dict[str, list[Any]]:
        """Rest of a name behind `layers.N.` -> the fields of a Leaf, without those that say
        nothing at the end."""
        leaves = {}
        for rest, found in sorted(self._found.items()):
            where = self._where(found.live) if found.renamed else "some"
            live = "" if found.live == rest else found.live
            converted = None if found.renamed else True
            fields = [found.kind, where, live, found.role, found.axis, found.more, converted]
            while fields[-1] is None or fields[-1] == "" or fields[-1] is False:
                fields.pop()
            leaves[rest] = fields
        return leaves

    def names(self) -> dict[str, Any]:
        """Templates of the names of experts, routers and shared experts."""
        start = f"{self._prefix}layers.{{layer}}."
        found = {rest: self._found[rest] for rest in self._saved}
        single = {live: rest for rest, live in self._of_experts.items() if "{expert}" in rest}
        fused = {r: live for r, live in self._of_experts.items() if "{expert}" not in r}
        path, projections = f"{self._path}.", _single_names(self._of_experts)
        if single:
            path = next(iter(single.values())).partition("{expert}")[0]
        routers = [rest for rest, leaf in found.items() if leaf.axis is not None]
        main = next(rest for rest in routers if found[rest].dims == 2)
        gate = next((rest for rest, leaf in found.items() if leaf.gates_shared), "")
        shared = next((r for r, leaf in found.items() if leaf.role == "up"), "")
        return {
            "prefix": self._prefix,
            "published_fused": not single,
            "expert": f"{start}{path}{{expert}}.{{projection}}.weight",
            "projections": projections,
            "live_experts": self._path,
            "fused": dict(sorted(fused.items())),
            "router": start + main,
            "per_expert": [start + rest for rest in routers if rest != main],
            "ids": sorted(rest for rest, leaf in self._found.items() if leaf.holds_ids),
            "shared": start + _template(shared, projections) if shared else "",
            "shared_gate": start + gate if gate else "",
        }


def _single_names(of_experts: Mapping[str, str]) -> list[str]:
    """What gate, up and down of one expert are called; "" for a gate that is not there."""
    rests = [rest for rest in of_experts if "{expert}" in rest and rest.endswith(".weight")]
    names = [rest.split(".")[-2] for rest in rests]
    if not names:
        return list(_ROLES)
    downs = [n for r, n in zip(rests, names, strict=True) if of_experts[r] == "down_proj"]
    others = [name for name in names if name not in downs]
    # transformers' converters concatenate gate before up; w1 is activated, w3 is not.
    gate = next((name for name in others if name in ("gate_proj", "w1")), "")
    return [gate, next(name for name in others if name != gate), downs[0]]


def _template(shared_up: str, projections: Sequence[str]) -> str:
    """The template of a shared expert's names from that of its up projection."""
    head, _, _ = shared_up.removesuffix(".weight").rpartition(".")
    return f"{head}.{{projection}}.weight"


def _rest(live: str) -> str:
    match = _LAYER.match(live)
    return match["rest"] if match else live


def _saved(model: Any) -> dict[str, str]:
    """Names as save_pretrained would write them -> the live ones that they fill."""
    return dict(bind(model, revert_weight_conversion(model, model.state_dict())).live_of)


def _as_live(model: Any) -> dict[str, str]:
    """The live names, where transformers loads them as they are."""
    live_of = bind(model, model.state_dict()).live_of
    return {name: live for name, live in live_of.items() if name == live}


# ------------------------------------------------------------------------------------------ kinds


def _found(model: Any, twin: Any, count: int, path: str) -> dict[str, Found]:
    """Every live tensor of the layers, but those of the experts themselves."""
    live, other = model.state_dict(), twin.state_dict()
    names = [n for n in live if _LAYER.match(n) and not _rest(n).startswith(f"{path}.")]
    axes = {name: _axis(live[name].shape, other[name].shape) for name in names}
    block = path.rpartition(".")[0]
    roots = {_root(_rest(name), block) for name, axis in axes.items() if axis is not None}
    attention, converted = _attention_paths(model), _converted(model)
    found = {}
    for name in names:
        rest, tensor, axis = _rest(name), live[name], axes[name]
        gates = "shared" in rest and rest.endswith("gate.weight") and tensor.shape[0] == 1
        router = gates or _root(rest, block) in roots
        role = "" if router else _shared_role(model, name, tensor)
        found[name] = Found(
            kind="router" if router else _kind(name, rest, tensor, attention),
            live=rest,
            role=role,
            axis=axis,
            more=axis is not None and tensor.shape[axis] != count,
            dims=tensor.dim(),
            gates_shared=gates,
            holds_ids=router and not tensor.is_floating_point(),
            renamed=name not in converted,
        )
    return found


def _converted(model: Any) -> set[str]:
    """The live tensors that are made of several on disk, or of one that is changed."""
    bound = bind(model, revert_weight_conversion(model, model.state_dict())).bound
    return {name for name, entry in bound.items() if entry.converter is not None}


def _merged(model: Any) -> dict[str, list[str]]:
    """The tensors of layers that are made of several on disk, one above the other."""
    bound = bind(model, revert_weight_conversion(model, model.state_dict())).bound
    return {
        _rest(name): [_rest(entry.sources[p][0]) for p in entry.converter.source_patterns]
        for name, entry in bound.items()
        if [(type(o).__name__, getattr(o, "dim", None)) for o in entry.operations]
        == [("Concatenate", 0)]
    }


def _axis(shape: Sequence[int], other: Sequence[int]) -> int | None:
    """The axis that runs over the experts: its extent is another in the twin."""
    return next((i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b), None)


def _root(rest: str, block: str) -> str:
    """The module of a MoE block, or of a layer, that a tensor is in; the tensor if in none."""
    start = f"{block}." if block and rest.startswith(f"{block}.") else ""
    return start + rest.removeprefix(start).partition(".")[0]


def _attention_paths(model: Any) -> tuple[str, ...]:
    """Softmax attention, by the names of its modules."""
    return tuple(
        f"{path}."
        for path, module in model.named_modules()
        if "Attention" in type(module).__name__ and not _OTHER_MIXERS.search(type(module).__name__)
    )


def _shared_role(model: Any, name: str, tensor: torch.Tensor) -> str:
    """The role of a projection of the shared expert, where that is an MLP of plain linears."""
    path, _, leaf = name.rpartition(".")
    owner, _, projection = path.rpartition(".")
    if "shared" not in owner or leaf != "weight" or tensor.dim() != 2:
        return ""
    plain = all(hasattr(model.get_submodule(owner), part) for part in ("up_proj", "down_proj"))
    return _ROLES.get(projection, "") if plain else ""


def _kind(name: str, rest: str, tensor: torch.Tensor, attention: tuple[str, ...]) -> str:
    if "norm" in rest and tensor.dim() == 1:
        return "norm"
    if "shared" in rest:
        return "shared_expert"
    if name.startswith(attention) and "indexer" not in rest and "compressor" not in rest:
        return "attention"
    *owners, module, leaf = ("", *rest.split("."))
    inside = any("attn" in owner for owner in owners)
    return "dense_mlp" if leaf == "weight" and module in _MLP and not inside else "other"


def _outer_kind(name: str) -> str:
    if ("embed" in name and "norm" not in name) or "head.weight" in name:
        return "embedding"
    return "norm" if "norm" in name else "other"


# ------------------------------------------------------------------------------------------- file


def composites() -> dict[str, list[str]]:
    """Model type of a composite whose language model transformers runs -> the key of config.json
    that holds that, its family, and what precedes `layers.N.` in the model."""
    found = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        parts = CONFIG_MAPPING[model_type].sub_configs if model_type in CONFIG_MAPPING else {}
        for key, part in parts.items():
            if getattr(part, "model_type", None) in CONFIGS:
                text = {"model_type": part.model_type, **CONFIGS[part.model_type]}
                model = meta_model(composite_config(model_type, text))
                path = experts_modules(model)[0][0]
                found[model_type] = [key, part.model_type, path.partition("layers.")[0]]
    return found


def contents() -> str:
    """The file, a family's names one to a line."""
    known = {name: derive(name) for name in sorted(CONFIGS)}
    everything = {
        "transformers": transformers.__version__,
        "composites": composites(),
        "families": known,
    }
    text = json.dumps(everything, indent=1, ensure_ascii=True)
    # Lists of words stand on one line.
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", _on_one_line, text) + "\n"


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + re.sub(r"\s*\n\s*", " ", match[1]) + "]"


def main() -> None:
    warnings.filterwarnings("ignore")
    FILE.write_text(contents(), encoding="utf-8")


if __name__ == "__main__":
    main()
