"""config.json, each value taken for what it is. Standard library only.

People and converters write 8 as "8" or 8.0, and null for a key that they do not use. transformers'
config classes take none of that, hours later. Here a value becomes what the class wants, or it is
refused with file, key and what is accepted. Keys that are not in the table are handed on as they
are. The table was read off the config classes of transformers 5.17.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from se_compress.errors import SourceError
from se_compress.opening.families import FAMILIES, is_foreign
from se_compress.opening.modelfiles import quoted, shown

_INTEGER = re.compile(r"[+-]?\d{1,18}(\.0*)?", re.ASCII)
_REAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_LARGEST = 2**62
# Activations with a weight of their own (prelu, xielu) are not among them: no tensor of an expert
# is theirs.
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh",
    "gelu_python_tanh", "gelu_accurate", "hardswish", "laplace", "leaky_relu", "linear", "mish",
    "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh",
)  # fmt: skip


def integer(value: object) -> int | None:
    """8, 8.0 and "8" are 8; None for what is no integer."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        value = int(value.strip().partition(".")[0])
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and abs(value) < _LARGEST else None


def real(value: object) -> float | None:
    """1, 1.0 and "1e0" are 1.0; None for what is no finite number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and _REAL.fullmatch(value.strip()):
        value = float(value)
    if not isinstance(value, (int, float)) or abs(value) >= _LARGEST or not math.isfinite(value):
        return None
    return float(value)


def number(value: object) -> float | None:
    """As `real`, but an integer stays one."""
    whole = integer(value)
    return real(value) if whole is None or isinstance(value, float) else whole


def flag(value: object) -> bool | None:
    """True, 1 and "true" are true."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return bool(value) if value in (0, 1) else None


@dataclass(frozen=True)
class Kind:
    """What a key of config.json can hold.

    accepted   in words
    take       the value as it is meant; None if it cannot be
    null       what null stands for: "absent", or a value to write in its place
    """

    accepted: str
    take: Callable[[object], object]
    null: object = "absent"


def _at_least(least: int, null: object = "absent") -> Kind:
    def take(value: object) -> int | None:
        found = integer(value)
        return found if found is not None and found >= least else None

    return Kind(f"an integer from {least}", take, null)


def _real(least: float = -math.inf, null: object = "absent") -> Kind:
    def take(value: object) -> float | None:
        found = real(value)
        return found if found is not None and found >= least else None

    return Kind("a number" if least < 0 else f"a number from {least:g}", take, null)


def _word(*accepted: str) -> Kind:
    words = ", ".join(accepted)
    return Kind(f"one of {words}", lambda value: value if value in accepted else None)


def _integers(value: object) -> list[int] | None:
    if not isinstance(value, list):
        return None
    found = [part for part in map(integer, value) if part is not None]
    return found if len(found) == len(value) else None


def _words(value: object) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else None


def _end(value: object) -> int | list[int] | None:
    return _integers(value) if isinstance(value, list) else integer(value)


def _dtype(value: object) -> str | None:
    word = value.removeprefix("torch.") if isinstance(value, str) else None
    return word if word in ("bfloat16", "float16", "float32", "float64") else None


def _labels(value: object) -> object:
    """id2label or its reverse: either side a number or a word."""
    if not isinstance(value, dict) or not all(isinstance(v, (int, str)) for v in value.values()):
        return None
    return value


_COUNT, _FROM_ZERO, _NUMBER = _at_least(1), _at_least(0), _real(0)
_FLAG = Kind("true or false", flag)
_TOKEN = Kind("an integer", integer, None)
_TEXT = Kind("a word", lambda value: value if isinstance(value, str) else None)
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
         "intermediate_size", "moe_intermediate_size", "num_experts_per_tok",
         "num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts",
         "shared_expert_intermediate_size", "head_dim", "qk_head_dim", "kv_lora_rank",
         "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings",
         "decoder_sparse_step"), _COUNT,
    ),
    **dict.fromkeys(
        ("first_k_dense_replace", "num_nextn_predict_layers", "num_mtp_layers", "max_window_layers",
         "chunk_size_feed_forward"), _FROM_ZERO,
    ),
    **dict.fromkeys(("n_group", "topk_group", "sliding_window", "pretraining_tp"),
                    _at_least(0, null=None)),
    **dict.fromkeys(("q_lora_rank", "num_key_value_heads"), _at_least(1, null=None)),
    **dict.fromkeys(
        ("rms_norm_eps", "attention_dropout", "initializer_range", "router_aux_loss_coef",
         "router_jitter_noise"), _NUMBER,
    ),
    "routed_scaling_factor": _real(),
    "rope_theta": Kind("a number above 1", lambda value: _above(value, 1)),
    "clip_qkv": _real(0, null=None),
    **dict.fromkeys(
        ("tie_word_embeddings", "use_cache", "output_router_logits", "qkv_bias", "attention_bias",
         "mlp_bias", "use_sliding_window", "return_dict", "is_encoder_decoder",
         "output_hidden_states", "output_attentions", "is_causal", "is_decoder",
         "add_cross_attention"), _FLAG,
    ),
    "norm_topk_prob": Kind("true or false", flag, False),
    "rope_interleave": Kind("true or false", flag, False),
    "hidden_act": _word(*ACTIVATIONS),
    "topk_method": _word("greedy", "group_limited_greedy", "noaux_tc"),
    "problem_type": _word("regression", "single_label_classification",
                          "multi_label_classification"),
    "mlp_only_layers": Kind("a list of integers", _integers),
    "layer_types": Kind("a list of words", _words),
    "architectures": Kind("a list of words", _words),
    "bos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
    "eos_token_id": Kind("an integer or a list of them", _end, None),
    "dtype": Kind("bfloat16, float16, float32 or float64", _dtype),
    "torch_dtype": Kind("bfloat16, float16, float32 or float64", _dtype),
    "transformers_version": _TEXT,
    "auto_map": Kind("a mapping", lambda value: value if isinstance(value, dict) else None),
    "id2label": Kind("a mapping", _labels),
    "label2id": Kind("a mapping", _labels),
    "num_labels": _COUNT,
}  # fmt: skip
# Keys that mean the same to every class of transformers; of families whose shapes are not known as
# functions of the config, these alone are looked at.
_COMMON = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_experts_per_tok",
    "num_experts", "num_local_experts", "n_routed_experts", "num_nextn_predict_layers",
    "tie_word_embeddings",
)  # fmt: skip
_ROPE: Mapping[str, Kind] = {
    "factor": Kind("a number above 0", lambda value: _above(value, 0)),
    "rope_theta": Kind("a number above 1", lambda value: _above(value, 1)),
    "original_max_position_embeddings": _at_least(2),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"),
                    Kind("a number from 0", lambda value: _above(value, -1e-300))),
    **dict.fromkeys(
        ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"),
        Kind("a number above 0", lambda value: _above(value, 0)),
    ),
    **dict.fromkeys(("short_factor", "long_factor"), Kind("a list of numbers",
                                                         lambda value: _numbers(value))),
    "truncate": _FLAG,
}  # fmt: skip
# Rope type -> what it needs beside its own name.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def _above(value: object, least: float) -> float | None:
    found = number(value)
    return found if found is not None and found > least else None


def _numbers(value: object) -> list[float] | None:
    if not isinstance(value, list):
        return None
    found = [part for part in (_above(item, 0) for item in value) if part is not None]
    return found if len(found) == len(value) else None


def take_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config with each value as transformers wants it. Raises SourceError, beginning with
    `where`, for a value that cannot be one. Keys of other families are handed on as they are."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None and not family.exact:
        return _take(config, {key: KINDS[key] for key in _COMMON}, where, "")
    kinds = {key: kind for key, kind in KINDS.items() if not is_foreign(config, key)}
    taken = _take(config, kinds, where, "")
    for key in ("rope_scaling", "rope_parameters"):
        if key in taken:
            taken[key] = _rope(taken[key], f"{where}: {key}")
            if not taken[key]:
                del taken[key]
    return taken


def _take(
    values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str, within: str
) -> dict[str, Any]:
    taken: dict[str, Any] = {}
    for key, value in values.items():
        kind = kinds.get(key)
        if kind is None:
            taken[key] = value
        elif value is not None:
            taken[key] = kind.take(value)
            if taken[key] is None:
                raise SourceError(
                    f"{where}: {within}{key} is {quoted(value)}; accepted is {kind.accepted}"
                )
        elif kind.null != "absent":
            taken[key] = kind.null
    return taken


def _rope(value: object, where: str) -> dict[str, Any]:
    """Settings of the rotary embedding, of either spelling."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SourceError(f"{where} is {quoted(value)}; accepted is a mapping with a rope_type")
    if inner := next((key for key, part in value.items() if isinstance(part, dict)), None):
        raise SourceError(
            f"{where}.{shown(inner)} is a mapping; settings of one layer type each are not taken"
        )
    present = {key: part for key, part in value.items() if part is not None}
    named = next((key for key in ("rope_type", "type") if key in present), "rope_type")
    rope_type = present.get(named, "default")
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise SourceError(
            f"{where}.{named} is {quoted(rope_type)}; accepted are {', '.join(ROPE_TYPES)}"
        )
    head, _, name = where.rpartition(": ")
    taken = _take(present, _ROPE, head, f"{name}.")
    for key in ROPE_TYPES[rope_type]:
        if key not in taken:
            raise SourceError(f"{where}.{key} is missing; rope_type {rope_type} needs it")
    if taken.get("partial_rotary_factor", 1) != 1:
        raise SourceError(
            f"{where}.partial_rotary_factor is {taken['partial_rotary_factor']}; accepted is 1: "
            "these models turn whole heads"
        )
    return taken


def rope_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the rotary embedding that transformers goes by."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}
