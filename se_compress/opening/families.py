"""The facts about each model family, in one place. A new family is a new row, and no other line.

Names are those of the checkpoint on disk. `{layer}` and `{expert}` stand for indices,
`{projection}` for one of the three names in `projections`. Facts were read off the modelling and
configuration files of transformers 5.17 and off the published checkpoints; each row names its
source.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from se_compress.errors import SourceError
from se_compress.opening.modelfiles import quoted


@dataclass(frozen=True)
class Family:
    """How one model family names its tensors and its config keys.

    expert         weight of one routed expert; [expert_width, hidden] for gate and up,
                   [hidden, expert_width] for down
    projections    the family's names of gate, up, down: out = down(act(gate x) * up x)
    router         [experts, hidden]
    per_expert     other tensors whose axis 0 runs over the experts
    shared         weight of the shared expert, "" if the family has none
    shared_gate    the gate of the shared expert's output, "" if there is none
    count_keys     config keys in which transformers looks for the number of routed experts
    width_key      config key of the routed experts' intermediate width
    shared_width   config keys whose product is the shared expert's intermediate width
    renames        (on disk, in memory) name parts, where transformers' live module differs
    fused          tensors that hold all experts of a layer where a file has such, by what follows
                   `layers.N.` in their names -> what transformers calls them in its module
    transposed     fused matrices hold [columns, rows]
    interleaved    in a fused tensor rows of gate and up take turns
    latent_attention   multi-head latent attention: keys and values come from a low rank
    query_norm     over what queries and keys are normed: "head", "hidden", or "" for not at all
    attention_bias config key that says whether attention has biases, "" if it never has
    slides         `sliding_window` holds without `use_sliding_window`
    grouped_if     config values with which the router is group-limited; None: it never is
    defaults       what transformers takes for config keys that are not there
    implied        keys that transformers neither writes nor reads, with what its code does: the
                   published configs have them, and other engines ask for them
    """

    model_type: str
    source: str
    expert: str = "model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: str = "model.layers.{layer}.mlp.gate.weight"
    per_expert: tuple[str, ...] = ()
    shared: str = ""
    shared_gate: str = ""
    # transformers 5 saves a Qwen3 config with num_local_experts; the published ones have
    # num_experts.
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    width_key: str = "moe_intermediate_size"
    shared_width: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, str] = field(
        default_factory=lambda: {
            "mlp.experts.gate_up_proj": "gate_up_proj",
            "mlp.experts.down_proj": "down_proj",
        }
    )
    transposed: bool = False
    interleaved: bool = False
    grouped_if: Mapping[str, str] | None = None
    latent_attention: bool = False
    query_norm: str = ""
    attention_bias: str = ""
    slides: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)


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
_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    source="transformers, modeling_qwen3_moe.py; Qwen/Qwen3-30B-A3B",
    query_norm="head",
    attention_bias="attention_bias",
    defaults={"num_key_value_heads": 4},
)
_LATENT_ATTENTION: Mapping[str, int] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    source="transformers, modeling_deepseek_v2.py; deepseek-ai/DeepSeek-V2-Lite",
    count_keys=("n_routed_experts", "num_experts"),
    shared="model.layers.{layer}.mlp.shared_experts.{projection}.weight",
    shared_width=("moe_intermediate_size", "n_shared_experts"),
    grouped_if={"topk_method": "group_limited_greedy"},
    latent_attention=True,
    attention_bias="attention_bias",
    defaults={**_LATENT_ATTENTION, "n_shared_experts": 2, "topk_method": "greedy"},
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        _QWEN3_MOE,
        replace(
            _QWEN3_MOE,
            model_type="qwen2_moe",
            source="transformers, modeling_qwen2_moe.py; Qwen/Qwen1.5-MoE-A2.7B",
            shared="model.layers.{layer}.mlp.shared_expert.{projection}.weight",
            shared_gate="model.layers.{layer}.mlp.shared_expert_gate.weight",
            count_keys=("num_experts",),
            query_norm="",
            attention_bias="qkv_bias",
            shared_width=("shared_expert_intermediate_size",),
            defaults={
                "num_key_value_heads": 16,
                "qkv_bias": True,
                "shared_expert_intermediate_size": 5632,
            },
        ),
        Family(
            model_type="olmoe",
            source="transformers, modeling_olmoe.py; allenai/OLMoE-1B-7B-0924",
            width_key="intermediate_size",
            query_norm="hidden",
            attention_bias="attention_bias",
        ),
        Family(
            model_type="mixtral",
            source="transformers, modular_mixtral.py: w1 is activated; mistralai/Mixtral-8x7B-v0.1",
            expert="model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight",
            projections=("w1", "w3", "w2"),
            router="model.layers.{layer}.block_sparse_moe.gate.weight",
            width_key="intermediate_size",
            renames=(("block_sparse_moe.", "mlp."),),
            slides=True,
            count_keys=("num_local_experts", "num_experts"),
            defaults={"num_key_value_heads": 8},
        ),
        _DEEPSEEK_V2,
        replace(
            _DEEPSEEK_V2,
            model_type="deepseek_v3",
            source="transformers, modeling_deepseek_v3.py; deepseek-ai/DeepSeek-V3",
            count_keys=("n_routed_experts", "num_local_experts"),
            per_expert=("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
            grouped_if={},
            defaults={
                **_LATENT_ATTENTION,
                "n_shared_experts": 1,
                "num_key_value_heads": 128,
                "first_k_dense_replace": 3,
                "n_group": 8,
                "topk_group": 4,
                "num_nextn_predict_layers": 1,
            },
            implied={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        ),
    )
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The row for a config.json. Raises SourceError for a model that is not MoE or not known."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is not None:
        return family
    known, said = ", ".join(sorted(FAMILIES)), quoted(model_type)
    inner = next((key for key, part in config.items() if isinstance(part, dict)
                  and key.endswith("_config") and _has_experts(part)), None)  # fmt: skip
    if inner is not None:
        raise SourceError(
            f"{where}: model_type {said} is a composite of models, with experts below {inner} of "
            f"config.json; a language model alone is read, known are {known}"
        )
    if not _has_experts(config):
        raise SourceError(
            f"{where}: model_type {said} is no Mixture-of-Experts model; known are {known}"
        )
    raise SourceError(f"{where}: model_type {said} is not supported; known are {known}")


def _has_experts(config: Mapping[str, Any]) -> bool:
    return any("expert" in key or "moe" in key for key in config)


def is_foreign(config: Mapping[str, Any], key: str) -> bool:
    """The key shapes models of other families only, so that nothing goes by it here."""
    return key in _OWNERS and config.get("model_type") not in _OWNERS[key]


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
    return int(setting(config, "n_group")) if is_grouped(family, config) else 1


def chosen_groups(family: Family, config: Mapping[str, Any]) -> int:
    """Of how many of its groups a group-limited router takes experts; 1 for any other router."""
    return int(setting(config, "topk_group")) if is_grouped(family, config) else 1


def layer_count(config: Mapping[str, Any]) -> int:
    """Decoder layers, dense ones counted; layers behind them (multi-token prediction) not."""
    return int(config["num_hidden_layers"])


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


def unfused_name(family: Family, name: str) -> str:
    """What `name` (or a template of names) is called in a live model whose experts are modules of
    their own, with gate_proj, up_proj and down_proj."""
    for disk, memory in family.renames:
        name = name.replace(disk, memory)
    for own, common in zip(family.projections, Family.projections, strict=True):
        name = name.replace(f".{own}.", f".{common}.")
    return name


def router_tensors(family: Family, layer: int) -> tuple[str, ...]:
    """Names of the layer's tensors that decide who computes: never quantised."""
    templates = (family.router, *family.per_expert, family.shared_gate)
    return tuple(template.format(layer=layer) for template in templates if template)


def per_expert_tensors(family: Family, layer: int) -> tuple[str, ...]:
    """Names of the layer's tensors whose axis 0 runs over the routed experts."""
    return tuple(t.format(layer=layer) for t in (family.router, *family.per_expert))
