"""The facts about each model family, in one place. A new family is a new row, and no other line.

Names are those of the checkpoint on disk. `{layer}` and `{expert}` stand for indices,
`{projection}` for one of the three names in `projections`. Facts were read off the modelling and
configuration files of transformers 5.17 and off the published checkpoints; each row names its
source.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from se_compress.artifacts import ROLES, Role, TensorInfo, TensorKind
from se_compress.errors import SourceError


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
    count_keys     config keys of the number of routed experts; the first that is there counts
    width_key      config key of the routed experts' intermediate width
    shared_width   config keys whose product is the shared expert's intermediate width
    renames        (on disk, in memory) name parts, where transformers' live module differs
    groups         groups of a group-limited router if the config does not say (`n_group`)
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
    groups: int = 1


_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    source="transformers, modeling_qwen3_moe.py; Qwen/Qwen3-30B-A3B",
)
_DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    source="transformers, modeling_deepseek_v2.py; deepseek-ai/DeepSeek-V2-Lite",
    count_keys=("n_routed_experts",),
    shared="model.layers.{layer}.mlp.shared_experts.{projection}.weight",
    shared_width=("moe_intermediate_size", "n_shared_experts"),
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
            shared_width=("shared_expert_intermediate_size",),
        ),
        Family(
            model_type="olmoe",
            source="transformers, modeling_olmoe.py; allenai/OLMoE-1B-7B-0924",
            width_key="intermediate_size",
        ),
        Family(
            model_type="mixtral",
            source="transformers, modular_mixtral.py: w1 is activated; mistralai/Mixtral-8x7B-v0.1",
            expert="model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight",
            projections=("w1", "w3", "w2"),
            router="model.layers.{layer}.block_sparse_moe.gate.weight",
            width_key="intermediate_size",
            renames=(("block_sparse_moe.", "mlp."),),
        ),
        _DEEPSEEK_V2,
        replace(
            _DEEPSEEK_V2,
            model_type="deepseek_v3",
            source="transformers, modeling_deepseek_v3.py; deepseek-ai/DeepSeek-V3",
            per_expert=("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
            groups=8,
        ),
    )
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The row for a config.json. Raises SourceError for a model that is not MoE or not known."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is not None:
        return family
    known = ", ".join(sorted(FAMILIES))
    if not any("expert" in key for key in config):
        raise SourceError(
            f"{where}: model_type {model_type!r} is no Mixture-of-Experts model; known are {known}"
        )
    raise SourceError(f"{where}: model_type {model_type!r} is not supported; known are {known}")


def count_key(family: Family, config: Mapping[str, Any]) -> str:
    """The config key that holds the number of routed experts."""
    return next((key for key in family.count_keys if key in config), family.count_keys[0])


def routing_groups(family: Family, config: Mapping[str, Any]) -> int:
    """Groups of neighbouring experts that a group-limited router chooses among first; 1 for any
    other router."""
    return int(config.get("n_group") or family.groups)


def layer_count(config: Mapping[str, Any]) -> int:
    """Decoder layers, dense ones counted; layers behind them (multi-token prediction) not."""
    return int(config["num_hidden_layers"])


def moe_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Absolute indices of the layers with routed experts.

    Qwen leaves out `mlp_only_layers` and all but every `decoder_sparse_step`-th layer, DeepSeek the
    first `first_k_dense_replace`; a config without these keys has experts in every layer.
    """
    dense = set(config.get("mlp_only_layers") or ())
    step = config.get("decoder_sparse_step") or 1
    first = config.get("first_k_dense_replace") or 0
    return tuple(
        layer
        for layer in range(first, layer_count(config))
        if layer not in dense and (layer + 1) % step == 0
    )


def expected_experts(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every expert weight that the config promises, shared experts included."""
    hidden, width = int(config["hidden_size"]), int(config[family.width_key])
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in moe_layers(config):
        for expert in range(int(config[count_key(family, config)])):
            for role, projection in zip(ROLES, family.projections, strict=True):
                name = family.expert.format(layer=layer, expert=expert, projection=projection)
                shapes[name] = (hidden, width) if role == "down" else (width, hidden)
        shapes |= _expected_shared(family, config, layer, hidden)
    return shapes


def _expected_shared(
    family: Family, config: Mapping[str, Any], layer: int, hidden: int
) -> dict[str, tuple[int, ...]]:
    width = 1
    for key in family.shared_width:
        width *= int(config.get(key) or 0)
    if not family.shared or not width:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for role, projection in zip(ROLES, family.projections, strict=True):
        name = family.shared.format(layer=layer, projection=projection)
        shapes[name] = (hidden, width) if role == "down" else (width, hidden)
    return shapes


@cache
def _pattern(template: str, projections: tuple[str, ...]) -> re.Pattern[str]:
    text = re.escape(template)
    for index in ("layer", "expert"):
        text = text.replace(rf"\{{{index}\}}", rf"(?P<{index}>\d+)")
    return re.compile(text.replace(r"\{projection\}", f"(?P<projection>{'|'.join(projections)})"))


def classify(info: TensorInfo, family: Family, config: Mapping[str, Any]) -> TensorInfo:
    """The same tensor, with kind, layer, expert and role filled in.

    A layer index at or past the decoder's end (multi-token prediction) makes the tensor "other".
    """
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", info.name)
    if match is None:
        return replace(info, kind=_kind_outside_layers(info.name))
    layer, rest = int(match[1]), match[2]
    if layer >= layer_count(config):
        return info
    info = replace(info, layer=layer)
    roles: dict[str, Role] = dict(zip(family.projections, ROLES, strict=True))
    if routed := _pattern(family.expert, family.projections).fullmatch(info.name):
        role = roles[routed["projection"]]
        return replace(info, kind="expert", expert=int(routed["expert"]), role=role)
    if shared := _pattern(family.shared, family.projections).fullmatch(info.name):
        return replace(
            info, kind="shared_expert", expert="shared", role=roles[shared["projection"]]
        )
    if info.name in router_tensors(family, layer):
        return replace(info, kind="router")
    return replace(info, kind=_kind_within_layer(rest))


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


def _kind_outside_layers(name: str) -> TensorKind:
    if "embed" in name or "lm_head" in name:
        return "embedding"
    return "norm" if "norm" in name else "other"


def _kind_within_layer(rest: str) -> TensorKind:
    if "norm" in rest:
        return "norm"
    if rest.startswith("self_attn."):
        return "attention"
    return "dense_mlp" if re.fullmatch(r"mlp\.\w+\.weight", rest) else "other"
