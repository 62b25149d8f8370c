"""The facts about each model family: rows that tools/families.py derives from transformers.

Names are those of the checkpoint on disk. `{layer}` and `{expert}` stand for indices,
`{projection}` for one of the three names in `projections`. The rows are in families.json, made by
that tool and committed, so that a model opens without torch; a test holds them to transformers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from se_compress.artifacts import ROLES, Role, TensorKind
from se_compress.errors import SourceError
from se_compress.opening.modelfiles import quoted


class Leaf(NamedTuple):
    """What a name in a decoder layer stands for, behind `layers.N.`; experts are no leaves.

    kind   what the tensor is to the model
    where  in every layer, in every layer with experts, or in some
    live   its name in the live model, "" if that is the same
    role   of the shared expert, which of its projections
    axis   the axis that runs over the routed experts, None if none does
    more   that axis is longer than there are experts; what is behind them is something else
    converted   the live tensor is made of it, of several maybe, and not merely called otherwise
    """

    kind: TensorKind
    where: Literal["every", "experts", "some"]
    live: str = ""
    role: Role | Literal[""] = ""
    axis: int | None = None
    more: bool = False
    converted: bool = False


@dataclass(frozen=True)
class Family:
    """How one model family names its tensors and its config keys.

    source         what the facts were derived from
    prefix         what precedes `layers.N.` in names
    expert         weight of one routed expert; [expert_width, hidden] for gate and up,
                   [hidden, expert_width] for down
    projections    the family's names of gate, up, down: out = down(act(gate x) * up x); "" for a
                   gate that the experts do not have
    live_experts   path of the experts' module in a live layer
    fused          tensors of a layer that hold all its experts -> parameter of that module
    published_fused   the family's checkpoints hold those, not a tensor for each expert
    gated, biased, transposed   form of the fused parameters: up and down alone or with a gate;
                   with biases; [E, in, out]
    own_activation   between the projections there is more than act(gate) * up
    scaled_inputs  the routing weight scales what an expert is given, and its output counts as it is
    router         [experts, hidden]
    per_expert     other tensors with an axis that runs over the experts
    ids            tensors of a layer whose values are numbers of experts
    shared         weight of the shared expert, "" if the family has none
    shared_gate    the gate of the shared expert's output, "" if there is none
    count_keys     config keys in which transformers looks for the number of routed experts
    top_k_keys     and for the number of those that a token is routed to
    width_key      config key of the routed experts' intermediate width
    leaves         every name of a layer, behind `layers.N.`
    outer          every name outside of the layers -> its kind
    merged         tensor of a live layer -> those on disk that it is made of, one above the other
    renames        (on disk, in memory) name parts, where transformers' live module differs
    grouped_if     config values with which the router is group-limited; None: it never is
    defaults       what transformers takes for config keys that are not there
    implied        keys that transformers neither writes nor reads, with what its code does: the
                   published configs have them, and other engines ask for them
    exact          every shape is known as a function of the config (account.py), by the rest:
    shared_width   config keys whose product is the shared expert's intermediate width
    latent_attention   multi-head latent attention: keys and values come from a low rank
    query_norm     over what queries and keys are normed: "head", "hidden", or "" for not at all
    attention_bias config key that says whether attention has biases, "" if it never has
    slides         `sliding_window` holds without `use_sliding_window`
    """

    model_type: str
    source: str
    prefix: str = "model."
    expert: str = "model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    live_experts: str = "mlp.experts"
    fused: Mapping[str, str] = field(default_factory=dict)
    published_fused: bool = False
    gated: bool = True
    biased: bool = False
    transposed: bool = False
    own_activation: bool = False
    scaled_inputs: bool = False
    router: str = "model.layers.{layer}.mlp.gate.weight"
    per_expert: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    shared: str = ""
    shared_gate: str = ""
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    width_key: str = "moe_intermediate_size"
    leaves: Mapping[str, Leaf] = field(default_factory=dict)
    outer: Mapping[str, TensorKind] = field(default_factory=dict)
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    grouped_if: Mapping[str, str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    shared_width: tuple[str, ...] = ()
    latent_attention: bool = False
    query_norm: str = ""
    attention_bias: str = ""
    slides: bool = False

    @property
    def roles(self) -> tuple[Role, ...]:
        """The projections that an expert has."""
        return ROLES if self.gated else ("up", "down")

    def at(self, prefix: str) -> "Family":
        """The row for a checkpoint whose layers are called otherwise: `{prefix}layers.N.`."""
        if prefix == self.prefix:
            return self

        def moved(name: str) -> str:
            return prefix + name.removeprefix(self.prefix) if name else name

        return replace(
            self,
            prefix=prefix,
            expert=moved(self.expert),
            router=moved(self.router),
            per_expert=tuple(map(moved, self.per_expert)),
            shared=moved(self.shared),
            shared_gate=moved(self.shared_gate),
            outer={
                **self.outer,
                **{_moved(n, self.prefix, prefix): k for n, k in self.outer.items()},
            },
        )


def _moved(name: str, before: str, after: str) -> str:
    """A name where another prefix precedes the layers. What is beside `model.`, such as the head,
    goes with it: `language_model.lm_head` beside `language_model.model.layers`."""
    if before and name.startswith(before):
        return after + name.removeprefix(before)
    return _beside(after) + name.removeprefix(_beside(before))


def _beside(prefix: str) -> str:
    """What precedes the names of what is beside a whole `model.` that has the layers."""
    owner = prefix.removesuffix("model.")
    return owner if owner != prefix and owner.endswith(".") else ""


def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    )
    return found


def _family(model_type: str, row: Mapping[str, Any], version: str) -> Family:
    lists = ("projections", "per_expert", "ids", "count_keys", "top_k_keys", "shared_width")
    fields: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in row.items()}
    fields["renames"] = tuple(map(tuple, row.get("renames", ())))
    fields["merged"] = {live: tuple(disk) for live, disk in row.get("merged", {}).items()}
    fields["leaves"] = {name: Leaf(*leaf) for name, leaf in row["leaves"].items()}
    source = f"transformers {version}, {fields.pop('model_class')}"
    return Family(model_type=model_type, source=source, **fields)


_FILE = _read()
FAMILIES: Mapping[str, Family] = {
    name: _family(name, row, _FILE["transformers"]) for name, row in _FILE["families"].items()
}
# Model type of a composite -> the key of its config that holds the language model's.
COMPOSITES: Mapping[str, str] = {name: row[0] for name, row in _FILE["composites"].items()}
_TEXT_TYPES: Mapping[str, str] = {name: row[1] for name, row in _FILE["composites"].items()}
# And what precedes `layers.N.` in the model that transformers builds of it; of any other, this.
_LIVE_PREFIXES: Mapping[str, str] = {name: row[2] for name, row in _FILE["composites"].items()}
_LIVE_PREFIX = "model."
# Model types of remote code that transformers does not have -> the type that is the same model.
ALIASES: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
# Why a type with experts is not read, where more can be said than that it is unknown.
_NOT_READ: Mapping[str, str] = {
    **dict.fromkeys(
        ("dbrx", "aria", "aria_text", "jetmoe"),
        "transformers runs its experts by code of its own, not by its experts interface",
    ),
    "longcat_flash": "transformers 5.17 cannot load the published layout, with experts that are "
    "no experts (zero_expert_num)",
    "doge": "its experts are embeddings, and transformers 5.17 cannot run it",
}
# Names of the output head.
HEADS = ("lm_head.weight", "head.weight")
# The keys of all families. An engine may look at any of them, whatever the family.
COUNT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts")
_QWEN, _DEEPSEEK = ("qwen2_moe", "qwen3_moe"), ("deepseek_v2", "deepseek_v3")
# Config keys that shape the models of these families only. In a config of any other they mean
# nothing: Qwen3-Coder has a shared_expert_intermediate_size of 0.
_OWNERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("decoder_sparse_step", "mlp_only_layers"), _QWEN),
    **dict.fromkeys(
        ("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "q_lora_rank",
         "kv_lora_rank", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
         "routed_scaling_factor", "pretraining_tp"), _DEEPSEEK,
    ),
    "moe_intermediate_size": (*_QWEN, *_DEEPSEEK),
    "shared_expert_intermediate_size": ("qwen2_moe",),
    "qkv_bias": ("qwen2_moe",),
    "clip_qkv": ("olmoe",),
    "topk_method": ("deepseek_v2",),
    "mlp_bias": ("deepseek_v2",),
    "rope_interleave": ("deepseek_v3",),
    "router_jitter_noise": ("mixtral",),
}  # fmt: skip


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The row for a config.json. Raises SourceError for a model that is not MoE or not known."""
    model_type = config.get("model_type")
    family = FAMILIES.get(_type_of_text(config))
    if family is not None:
        return family
    said = f"{where}: model_type {quoted(model_type)}"
    if isinstance(model_type, str) and model_type in _NOT_READ:
        raise SourceError(f"{said} is not supported: {_NOT_READ[model_type]}; {_known(model_type)}")
    inner = next((key for key, part in config.items() if isinstance(part, dict)
                  and key.endswith("_config") and _has_experts(part)), None)  # fmt: skip
    if inner is not None:
        raise SourceError(
            f"{said} is a composite of models, with experts below {inner} of config.json; of "
            f"composites, {', '.join(sorted(COMPOSITES))} are read; {_known(model_type)}"
        )
    if not _has_experts(config):
        raise SourceError(
            f"{said} is no Mixture-of-Experts model; recipes/MODELS.md lists what is read"
        )
    raise SourceError(f"{said} is not supported; {_known(model_type)}")


def _known(model_type: object) -> str:
    """How many types are known, and which of them are called nearly the same."""
    close = get_close_matches(str(model_type)[:40], FAMILIES, n=4, cutoff=0.5)
    return f"recipes/MODELS.md lists the {len(FAMILIES)} types that are" + (
        f"; close to this name are {', '.join(close)}" if close else ""
    )


def _has_experts(config: Mapping[str, Any]) -> bool:
    return any("expert" in key or "moe" in key for key in config)


def _type_of_text(config: Mapping[str, Any]) -> str:
    model_type = str(config.get("model_type"))
    return _TEXT_TYPES.get(model_type) or ALIASES.get(model_type, model_type)


def text_family(model_type: str) -> str:
    """The family of a composite's language model."""
    return _TEXT_TYPES[model_type]


def text_key(config: Mapping[str, Any]) -> str:
    """The key of a composite's config that holds the language model's; "" for any other."""
    return COMPOSITES.get(str(config.get("model_type")), "")


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of the language model: all of it, or that part of a composite."""
    key = text_key(config)
    part = config.get(key) if key else None
    return part if isinstance(part, Mapping) else config


def live_prefix(config: Mapping[str, Any]) -> str:
    """What precedes `layers.N.` in the causal language model that transformers builds."""
    return _LIVE_PREFIXES.get(str(config.get("model_type")), _LIVE_PREFIX)


def is_foreign(config: Mapping[str, Any], key: str) -> bool:
    """The key shapes models of other families only, so that nothing goes by it here."""
    family = FAMILIES.get(str(config.get("model_type")))
    if key not in _OWNERS or (family is not None and not family.exact):
        return False
    return config.get("model_type") not in _OWNERS[key]


def setting(config: Mapping[str, Any], key: str) -> Any:
    """The value of a config key; where it is not there, what transformers takes for it. None for a
    key of other families."""
    if is_foreign(config, key):
        return None
    family = FAMILIES.get(str(config.get("model_type")))
    return config.get(key, family.defaults.get(key) if family else None)


def count_key(family: Family, config: Mapping[str, Any]) -> str:
    """The config key that holds the number of routed experts."""
    return next((key for key in family.count_keys if key in config), family.count_keys[0])


def is_grouped(family: Family, config: Mapping[str, Any]) -> bool:
    """The router chooses among groups of neighbouring experts first."""
    if family.grouped_if is None:
        return False
    return all(setting(config, key) == value for key, value in family.grouped_if.items())


def routing_groups(family: Family, config: Mapping[str, Any]) -> int:
    """Groups of neighbouring experts that a group-limited router chooses among first; 1 for any
    other router."""
    return int(setting(config, "n_group") or 1) if is_grouped(family, config) else 1


def chosen_groups(family: Family, config: Mapping[str, Any]) -> int:
    """Of how many of its groups a group-limited router takes experts; 1 for any other router."""
    return int(setting(config, "topk_group") or 1) if is_grouped(family, config) else 1


def layer_count(config: Mapping[str, Any]) -> int:
    """Decoder layers, dense ones counted; layers behind them (multi-token prediction) not."""
    if "num_hidden_layers" not in config:
        # Nemotron-H says of each what it is, by a list or by a letter.
        for key in ("layers_block_type", "hybrid_override_pattern"):
            if isinstance(config.get(key), (list, str)):
                return len(config[key])
    return int(setting(config, "num_hidden_layers"))


def moe_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Absolute indices of the layers with routed experts.

    Qwen leaves out `mlp_only_layers` and all but every `decoder_sparse_step`-th layer, DeepSeek the
    first `first_k_dense_replace`; a config without these keys has experts in every layer.
    """
    dense = set(setting(config, "mlp_only_layers") or ())
    step = setting(config, "decoder_sparse_step") or 1
    first = setting(config, "first_k_dense_replace") or 0
    return tuple(
        layer
        for layer in range(first, layer_count(config))
        if layer not in dense and (layer + 1) % step == 0
    )


def top_k_of(family: Family, config: Mapping[str, Any]) -> int:
    """Experts that a token is routed to; of layers that differ, the most."""
    key = next((key for key in family.top_k_keys if key in config), family.top_k_keys[0])
    value = setting(config, key)
    return int(max(value) if isinstance(value, list) else value)


def unfused_name(family: Family, name: str, prefix: str | None = None) -> str:
    """What `name` (or a template of names) is called in a live model whose experts are modules of
    their own, with gate_proj, up_proj and down_proj.

    prefix  what precedes `layers.N.` there; None: the same as in `name`
    """
    start, number, rest = _split(family, name)
    if not number:
        return name if prefix is None else _moved(name, family.prefix, prefix)
    start = start if prefix is None else f"{prefix}layers."
    leaf = family.leaves.get(rest)
    if leaf is not None:
        return start + (f"{number}.{rest}" if leaf.converted else f"{number}.{leaf.live or rest}")
    path = _experts_path(family)
    if rest.startswith(path):
        expert, _, projection = rest.removeprefix(path).partition(".")
        rest = f"{family.live_experts}.{expert}.{projection}"
    for own, common in zip(family.projections, Family.projections, strict=True):
        rest = rest.replace(f".{own}.", f".{common}.") if own else rest
    return f"{start}{number}.{rest}"


def live_name(family: Family, name: str, prefix: str) -> str:
    """What transformers calls the tensor that `name` becomes, experts apart.

    prefix  what precedes `layers.N.` in the model that it builds, see `live_prefix`
    """
    _, number, rest = _split(family, name)
    leaf = family.leaves.get(rest)
    if number and leaf is not None:
        return f"{prefix}layers.{number}.{leaf.live or rest}"
    return "lm_head.weight" if name in HEADS else _moved(name, family.prefix, prefix)


def _split(family: Family, name: str) -> tuple[str, str, str]:
    """A name as what precedes the number of its layer, the number, and the rest."""
    start = f"{family.prefix}layers."
    if not name.startswith(start):
        return "", "", name
    number, _, rest = name.removeprefix(start).partition(".")
    return start, number, rest


def _experts_path(family: Family) -> str:
    """What precedes the number of an expert, behind `layers.N.`."""
    return family.expert.partition("{layer}.")[2].partition("{expert}")[0]


def router_tensors(family: Family, layer: int) -> tuple[str, ...]:
    """Names of the layer's tensors that decide who computes: never quantised."""
    templates = (family.router, *family.per_expert, family.shared_gate)
    return tuple(template.format(layer=layer) for template in templates if template)


def per_expert_tensors(family: Family, layer: int) -> tuple[str, ...]:
    """Names of the layer's tensors with an axis that runs over the routed experts."""
    return tuple(t.format(layer=layer) for t in (family.router, *family.per_expert))
