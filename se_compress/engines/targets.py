"""What each target engine loads, and what a plan therefore puts into the file. No torch.

A format says how one matrix is stored (formats/). A row of the table says what an engine loads of
it, each fact with its source. The planner takes a row as its constraint; what the result then holds
is in its blueprint (blueprint.py), exact to the byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from se_compress.artifacts import (
    SOURCE_BITS,
    CompressionPlan,
    ModelSource,
    Scheme,
    TensorInfo,
)
from se_compress.errors import RecipeError
from se_compress.formats import FORMATS, StoredPart
from se_compress.opening.headers import Slot

TABLE_VERSION = "2026-11"

Granularity = Literal["projection", "expert", "layer", "model"]


@dataclass(frozen=True)
class TargetRules:
    """What one engine loads of one format.

    methods          quantisation methods whose codes the format holds
    widths           bits that experts may have, beside SOURCE_BITS
    granularity      what may have a width of its own: a projection; an expert; a layer, all experts
                     and projections alike; or nothing, all experts of the model alike
    group_sizes      columns that may share a scale; -1 is a whole row
    asymmetric       it loads groups with a zero point of their own
    row_multiple     a matrix needs this many rows (or a multiple) to be packed
    column_multiple  and this many columns
    unfused_names    tensors go by their names in the live model with its experts unfused
    source           where the facts are from
    dense_mlp        it loads packed matrices of dense MLPs
    fused            plain linears that it loads as one: those of a layer need one width
    """

    target: str
    format: str
    methods: tuple[str, ...]
    widths: tuple[int, ...]
    granularity: Granularity
    group_sizes: tuple[int, ...]
    asymmetric: bool
    row_multiple: int
    column_multiple: int
    unfused_names: bool
    source: str
    dense_mlp: bool = True
    fused: tuple[frozenset[str], ...] = ()


_GPTQMODEL = TargetRules(
    target="gptqmodel",
    format="gptq",
    methods=("gptq", "rtn"),
    widths=(2, 3, 4, 8),
    granularity="projection",
    group_sizes=(-1, 32, 64, 128, 256),
    asymmetric=False,
    row_multiple=32,
    column_multiple=32,
    unfused_names=True,
    source="GPTQModel 7.6: `dynamic` is looked up per module, so per expert and projection; its"
    " qlinears pack whole int32 words along both axes; a Mixtral file with w1, w3, w2 is refused,"
    " and so is GPTQ v1 with sym false unless it claims to be GPTQModel's own; 4 bits in groups of"
    " 16 load, and fail in its CPU kernel. Scales may be negative: its kernels multiply. It"
    " knows no dense MLP in Qwen models and leaves a packed one uninitialised, without an error",
    dense_mlp=False,
)
_AUTO_ROUND = replace(
    _GPTQMODEL,
    target="transformers",
    format="auto-round",
    asymmetric=True,
    dense_mlp=True,
    source="auto-round 0.15.1 under transformers 5.17: `extra_config` is looked up per module"
    " (inference/convert_model.py); packing auto_round holds 2, 3, 4 and 8 bits in whole words of"
    " 32 rows and columns, zeros as they are (inference/backend.py, auto_round:torch); experts are"
    " unfused to gate_proj, up_proj, down_proj. It writes negative scales itself",
)
_VLLM = TargetRules(
    target="vllm",
    format="compressed-tensors",
    methods=("gptq", "rtn"),
    widths=(4, 8),
    granularity="layer",
    group_sizes=(32, 64, 128),
    asymmetric=False,
    row_multiple=32,
    column_multiple=32,
    unfused_names=False,
    source="vLLM 0.32: the scheme of expert 0 is that of its layer, and its three projections must"
    " agree (compressed_tensors_moe.py); Marlin and Triton hold 4 and 8 bits"
    " (oracle/int_wna16.py), Marlin in groups of 32, 64, 128 (marlin_utils.py); scales per row need"
    " Marlin, zero points 4 bits, so neither is offered; Mixtral is read as w1, w3, w2 of"
    " block_sparse_moe. Scales multiply codes less 8 or 128: they may be negative. What"
    " packed_modules_mapping of a model lists is one linear, under the scheme of its first part"
    " (compressed_tensors/utils.py)",
    fused=(
        frozenset(("q_proj", "k_proj", "v_proj")),
        frozenset(("gate_proj", "up_proj")),
        frozenset(("q_a_proj", "kv_a_proj_with_mqa")),
    ),
)
_AS_IT_IS = TargetRules(
    target="transformers",
    format="source",
    methods=("none",),
    widths=(),
    granularity="expert",
    group_sizes=(),
    asymmetric=False,
    row_multiple=1,
    column_multiple=1,
    unfused_names=False,
    source="transformers 5.17: unquantised experts load through AutoModelForCausalLM; a GPTQ file"
    " of experts would be re-initialised at random without an error",
)

# For a target, method and symmetry the first row that holds them is taken.
TARGETS: tuple[TargetRules, ...] = (
    _GPTQMODEL,
    replace(
        _GPTQMODEL,
        format="gptq_v2",
        asymmetric=True,
        source="GPTQModel 7.6: like gptq, zeros stored as they are (FORMAT.GPTQ_V2), sym false too",
    ),
    _AUTO_ROUND,
    replace(
        _VLLM,
        target="transformers",
        widths=(2, 3, 4, 8),
        granularity="model",
        fused=(),
        group_sizes=(-1, 32, 64, 128, 256),
        source="transformers 5.17 unpacks all experts by one scheme, without zero points"
        " (integrations/compressed_tensors.py): another width is read wrong, without an error",
    ),
    TargetRules(
        target="transformers",
        format="bitsandbytes",
        methods=("bitsandbytes",),
        widths=(4, 8),
        granularity="projection",
        group_sizes=(-1, 32, 64, 128, 256, 512, 1024),
        asymmetric=False,
        row_multiple=1,
        column_multiple=1,
        unfused_names=False,
        source="our own quantizer for transformers, loading.py; bitsandbytes 0.50.2 takes these"
        " block sizes (functional.py), and its CPU kernel reads blocks that run on into the next"
        " row with the wrong maxima; -1 is int8, which has one maximum per row",
    ),
    _AS_IT_IS,
    _VLLM,
    replace(_AS_IT_IS, target="vllm", source="vLLM 0.32 reads what transformers writes"),
    replace(
        _VLLM,
        target="sglang",
        source="SGLang: schemes are looked up per layer (get_moe_scheme, pull request 29761 of June"
        " 2026), 4 and 8 bits, symmetric only (compressed_tensors_wNa16_moe.py). Read, not run",
    ),
    replace(_AS_IT_IS, target="sglang", source="SGLang reads what transformers writes. Not run"),
)


def find_rules(target: str, method: str, form: str = "auto", symmetric: bool = True) -> TargetRules:
    """The row of a target for a method, and for a format unless that is "auto". Raises RecipeError
    if the target loads no such file."""
    rows = [rules for rules in TARGETS if rules.target == target]
    able = [rules for rules in rows if method in rules.methods]
    if not able:
        loads = ", ".join(dict.fromkeys(name for rules in rows for name in rules.methods))
        others = " or ".join(sorted({r.target for r in TARGETS if method in r.methods}))
        raise RecipeError(
            f"target {target} does not load experts of method {method}; it loads {loads}"
            + (f", and {method} needs target {others}" if others else "")
        )
    formats = ", ".join(rules.format for rules in able)
    if form != "auto":
        able = [rules for rules in able if rules.format == form]
    if not able:
        raise RecipeError(
            f"quantization.format is {form}; target {target} loads method {method} as {formats}"
        )
    for rules in able:
        if symmetric or rules.asymmetric or not rules.widths:
            return rules
    within = f" of format {form}" if form != "auto" else ""
    raise RecipeError(
        f"quantization.symmetric is false; target {target} loads symmetric groups only{within}"
    )


def rules_of(plan: CompressionPlan) -> TargetRules:
    """The row that a plan was made for."""
    return next(r for r in TARGETS if (r.target, r.format) == (plan.target, plan.scheme.format))


def widths_of(scheme: Scheme, rules: TargetRules) -> tuple[int, ...]:
    """What a quantised matrix of the scheme may have: a data type of bitsandbytes has one width."""
    if scheme.data_type is None:
        return rules.widths
    return (8,) if scheme.data_type == "int8" else (4,)


def check_grid(source: ModelSource, rules: TargetRules, scheme: Scheme) -> None:
    """Raises RecipeError if the target does not load this grid or a routed expert does not fit."""
    packed = [
        info
        for identity, roles in source.experts.items()
        for info in (roles.values() if identity.expert != "shared" else ())
    ]
    obstacle = ""
    if scheme.group_size not in rules.group_sizes:
        obstacle = f"target {rules.target} does not load {_size_key(scheme)} {scheme.group_size}"
    obstacles = (unpackable(info, rules, scheme) for info in packed)
    if obstacle := obstacle or next(filter(None, obstacles), ""):
        raise RecipeError(f"{obstacle}; {_accepted_instead(packed, rules, scheme)}")


def _size_key(scheme: Scheme) -> str:
    return "quantization." + ("block_size" if scheme.data_type else "group_size")


def unpackable(info: TensorInfo, rules: TargetRules, scheme: Scheme) -> str:
    """Why a matrix cannot be packed; "" if it can."""
    rows, columns = info.shape
    if info.kind == "dense_mlp" and not rules.dense_mlp:
        return f"{info.name}: target {rules.target} does not load a packed dense MLP"
    if rows % rules.row_multiple or columns % rules.column_multiple:
        return (
            f"{info.name} is {rows} x {columns}; target {rules.target} packs multiples of "
            f"{rules.row_multiple} x {rules.column_multiple}"
        )
    if scheme.group_size != -1 and columns % scheme.group_size:
        return (
            f"{_size_key(scheme)} {scheme.group_size} does not divide the {columns} columns of "
            f"{info.name}"
        )
    return ""


def _accepted_instead(packed: Sequence[TensorInfo], rules: TargetRules, scheme: Scheme) -> str:
    """With which group sizes the target would take all these matrices, `packed`; where none would
    do, which methods leave them as they are."""
    per_row = scheme.data_type is None  # of bitsandbytes' types int8 alone is, and always
    shapes = {(info.kind, info.shape): info for info in packed}.values()
    fitting = [
        str(size)
        for size in rules.group_sizes
        if (size != -1 or per_row)
        and not any(unpackable(i, rules, replace(scheme, group_size=size)) for i in shapes)
    ]
    if fitting:
        return f"accepted there: {', '.join(fitting)}"
    others = sorted({r.target for r in TARGETS if "none" in r.methods})
    return (
        f"no {_size_key(scheme)} changes that; quantization.method none with target "
        f"{' or '.join(others)} leaves the experts as they are"
    )


def cautions(source: ModelSource, rules: TargetRules) -> tuple[str, ...]:
    """What goes wrong when the target loads a model that others load right."""
    bias = source.family == "qwen2_moe" and not any(
        name.endswith(".q_proj.bias") for name in source.tensors
    )
    if rules.target == "vllm" and bias:
        return (
            "vLLM 0.32 gives every Qwen2-MoE biases of q, k and v (models/qwen2_moe.py) and leaves "
            "them uninitialised if the checkpoint has none, as here: its results may be NaN",
        )
    return ()


def is_other_linear(info: TensorInfo) -> bool:
    """A matrix of attention or of a dense MLP in a decoder layer."""
    matrix = len(info.shape) == 2 and info.name.endswith(".weight")
    return matrix and info.layer is not None and info.kind in ("attention", "dense_mlp")


@cache
def packed_parts(shape: tuple[int, ...], bits: int, scheme: Scheme) -> tuple[StoredPart, ...]:
    """What holds a weight [R, C] at a width. A model has few shapes, and so few answers."""
    rows, columns = shape
    return tuple(FORMATS[scheme.format].parts(rows, columns, bits, scheme))


def stored_bytes(info: TensorInfo, bits: int, scheme: Scheme) -> int:
    """Bytes of one matrix at a width, scales and indices included."""
    return info.size_bytes if bits == SOURCE_BITS else _packed_bytes(info.shape, bits, scheme)


@cache
def _packed_bytes(shape: tuple[int, ...], bits: int, scheme: Scheme) -> int:
    parts = packed_parts(shape, bits, scheme)
    return sum(Slot("", dtype, extent).size_bytes for _, dtype, extent in parts)
