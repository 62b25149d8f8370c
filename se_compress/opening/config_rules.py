"""What has to hold between the values of a config.json before a model can be built from it.

transformers finds most of this out when it builds or runs a layer, by a traceback or not at all: a
router of 10 experts in 4 groups mixes tokens without a word. Standard library only.
"""

from collections.abc import Mapping
from typing import Any

from se_compress.errors import SourceError
from se_compress.opening.config_values import rope_settings
from se_compress.opening.families import (
    COUNT_KEYS,
    FAMILIES,
    Family,
    count_key,
    is_grouped,
    layer_count,
    moe_layers,
    setting,
    top_k_of,
)
from se_compress.opening.modelfiles import quoted

NEXT_TOKEN_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
# DeepSeek-V3 scores a group by the sum of its two best experts.
LEAST_IN_GROUP = 2


def settle(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The config with what null and synonyms leave open written out. Raises SourceError, beginning
    with `where`, if synonyms contradict each other."""
    settled = dict(config)
    of_experts = COUNT_KEYS if family.exact else family.count_keys
    for synonyms in of_experts, NEXT_TOKEN_KEYS:
        said = {key: config[key] for key in synonyms if key in config}
        if any(value != other for value in said.values() for other in said.values()):
            values = ", ".join(f"{key} is {value}" for key, value in said.items())
            raise SourceError(f"{where}: {values}; these are one number")
    if not family.exact:
        return settled
    counts = [config[key] for key in COUNT_KEYS if key in config]
    if counts and not any(key in config for key in family.count_keys):
        settled[family.count_keys[0]] = counts[0]
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        settled["num_key_value_heads"] = config.get("num_attention_heads")
    if not family.latent_attention and "head_dim" not in config and _rope_type(config) != "default":
        # Mixtral's own default is null, which no rope type but "default" can work with.
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if hidden and heads:
            settled["head_dim"] = hidden // heads
    return settled


def _rope_type(config: Mapping[str, Any]) -> str:
    rope = rope_settings(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def check_rules(config: Mapping[str, Any], family: Family, tensors: int, where: str) -> None:
    """Raises SourceError, beginning with `where`, if no model can be built from the config and so
    many tensors."""
    _check_needed(config, family, where)
    if layer_count(config) > tensors:  # before anything is done for each layer
        raise _refused(config, "num_hidden_layers", where, f"at most {tensors}, all the tensors")
    if not family.exact:
        # What else has to hold is transformers' to say, at the start of a run.
        _check_routing(config, family, where)
        if config.get("num_kv_shared_layers"):
            alone = "0: the last layers would need keys and values of others, and each runs alone"
            raise _refused(config, "num_kv_shared_layers", where, alone)
        return
    if _has_dense(config) and config.get("intermediate_size") is None:
        raise SourceError(f"{where}: intermediate_size is missing; an integer from 1 is needed")
    _check_layers(config, where)
    _check_heads(config, family, where)
    _check_routing(config, family, where)
    _check_rope(config, family, where)
    pad, vocabulary = config.get("pad_token_id"), config["vocab_size"]
    if pad is not None and not -vocabulary <= pad < vocabulary:
        raise _refused(config, "pad_token_id", where, f"a token below vocab_size, {vocabulary}")


def _refused(config: Mapping[str, Any], key: str, where: str, accepted: str) -> SourceError:
    value = setting(config, key)
    said = f"is {quoted(value)}" if key in config else f"is missing, which means {quoted(value)}"
    return SourceError(f"{where}: {key} {said}; accepted is {accepted}")


def _check_needed(config: Mapping[str, Any], family: Family, where: str) -> None:
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    exact = (*shape, "num_experts_per_tok", count_key(family, config), family.width_key)
    needed = exact if family.exact else (count_key(family, config),)
    for key in needed:
        if config.get(key) is None:
            raise SourceError(f"{where}: {key} is missing; an integer from 1 is needed")
    for key in () if family.exact else (*shape, *needed):
        if type(setting(config, key)) is not int:
            raise _refused(config, key, where, "an integer from 1")
    if setting(config, "mlp_bias"):
        raise _refused(config, "mlp_bias", where, "false: experts with biases cannot be read")


def _has_dense(config: Mapping[str, Any]) -> bool:
    return len(moe_layers(config)) < layer_count(config)


def _check_layers(config: Mapping[str, Any], where: str) -> None:
    if not moe_layers(config):
        raise SourceError(f"{where}: no layer has experts, so there is nothing to do")
    types = config.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if types is not None and (
        len(types) != config["num_hidden_layers"] or not set(types) <= set(known)
    ):
        raise _refused(config, "layer_types", where, "full_attention or sliding_attention a layer")
    slides = config.get("use_sliding_window", FAMILIES[config["model_type"]].slides)
    slides = slides or "sliding_attention" in (types or ())
    if slides and config.get("sliding_window", 1) == 0:
        raise _refused(config, "sliding_window", where, "an integer from 1, or null")


def _check_heads(config: Mapping[str, Any], family: Family, where: str) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    of_keys = setting(config, "num_key_value_heads") or heads
    if family.latent_attention:
        if of_keys != heads:
            raise _refused(config, "num_key_value_heads", where, f"num_attention_heads, {heads}")
        turned, key = setting(config, "qk_rope_head_dim"), "qk_rope_head_dim"
        sizes = {"head_dim": turned, "qk_head_dim": turned + setting(config, "qk_nope_head_dim")}
    else:
        if heads % of_keys:
            raise _refused(config, "num_key_value_heads", where, f"a divisor of {heads}, the heads")
        turned, key = config.get("head_dim") or hidden // heads, "head_dim"
        sizes = {"head_dim": hidden // heads} if family.query_norm == "hidden" else {}
    for name, size in sizes.items():
        if config.get(name, size) != size:
            raise _refused(config, name, where, f"{size}, by the other sizes")
    if hidden % heads and "head_dim" not in config:
        raise _refused(config, "num_attention_heads", where, f"a divisor of hidden_size, {hidden}")
    if turned < 2 or turned % 2:
        raise SourceError(f"{where}: {key} is {turned}; accepted is an even number, to be turned")


def _top_k_key(config: Mapping[str, Any], family: Family) -> str:
    return next((key for key in family.top_k_keys if key in config), family.top_k_keys[0])


def _top_k(config: Mapping[str, Any], family: Family, where: str) -> int:
    try:
        return top_k_of(family, config)
    except (TypeError, ValueError):
        accepted = "an integer from 1, or one for each layer"
        raise _refused(config, _top_k_key(config, family), where, accepted) from None


def _check_routing(config: Mapping[str, Any], family: Family, where: str) -> None:
    name = count_key(family, config)
    count, top_k = config[name], _top_k(config, family, where)
    if top_k > count:
        raise _refused(config, _top_k_key(config, family), where, f"1 to {count}, as {name} says")
    if family.scaled_inputs and top_k > 1:
        alone = "1: the routing weight scales what an expert is given, a row of its own for each"
        raise _refused(config, _top_k_key(config, family), where, alone)
    if family.grouped_if is None:
        return
    if "topk_method" in family.grouped_if and setting(config, "topk_method") == "noaux_tc":
        raise _refused(config, "topk_method", where, "greedy or group_limited_greedy")
    if not is_grouped(family, config):
        return
    groups, chosen = setting(config, "n_group"), setting(config, "topk_group")
    if groups in (None, 1) and not family.exact:
        return
    least = LEAST_IN_GROUP if not family.grouped_if else 1
    if not groups or count % groups or count // groups < least:
        raise _refused(
            config, "n_group", where,
            f"a divisor of {name}, {count}, that leaves {least} or more experts in each group",
        )  # fmt: skip
    if not chosen or chosen > groups:
        raise _refused(config, "topk_group", where, f"1 to {groups}, as n_group says")
    if top_k > count // groups * chosen:
        raise _refused(
            config, _top_k_key(config, family), where,
            f"1 to {count // groups * chosen}, all that topk_group {chosen} of n_group {groups} "
            "leaves to choose from",
        )  # fmt: skip


def _check_rope(config: Mapping[str, Any], family: Family, where: str) -> None:
    rope, rope_type = rope_settings(config), _rope_type(config)
    if config.get("partial_rotary_factor") not in (None, 1):
        raise _refused(config, "partial_rotary_factor", where, "1: whole heads are turned")
    if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise SourceError(f"{where}: low_freq_factor is not below high_freq_factor")
    if rope_type != "longrope":
        return
    if family.latent_attention and "factor" not in rope:
        raise SourceError(f"{where}: factor of the longrope is missing; a number above 0 is needed")
    head = config["hidden_size"] // config["num_attention_heads"]
    turned = "qk_rope_head_dim" if family.latent_attention else "head_dim"
    needed = (setting(config, turned) or head) // 2
    for key in ("short_factor", "long_factor"):
        if len(rope[key]) != needed:
            raise SourceError(f"{where}: {key} has {len(rope[key])} numbers; {needed} are needed")
