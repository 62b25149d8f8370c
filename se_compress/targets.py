"""What each target engine loads, and what a plan therefore puts into the file. No torch.

A format says how one matrix is stored. A row of the table says what an engine loads of a format,
each fact with its source. The planner takes a row as its constraint; the layout of the result
(`result_slots`) follows from plan and headers alone, exact to the byte.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from se_compress.artifacts import (
    CompressionPlan,
    ExpertId,
    ModelSource,
    Scheme,
    TensorInfo,
)
from se_compress.errors import RecipeError
from se_compress.families import FAMILIES, unfused_name
from se_compress.headers import Slot

TABLE_VERSION = "2026-11"

# The parts of a stored matrix: suffix, safetensors dtype, shape.
Parts = Iterator[tuple[str, str, tuple[int, ...]]]


def _gptq_parts(rows: int, columns: int, bits: int, scheme: Scheme) -> Parts:
    """GPTQ v1 (GPTQModel, nn_modules/qlinear/__init__.py)."""
    groups = 1 if scheme.group_size == -1 else -(-columns // scheme.group_size)
    yield "qweight", "I32", (columns * bits // 32, rows)
    yield "qzeros", "I32", (groups, rows * bits // 32)
    yield "scales", "F16", (groups, rows)
    yield "g_idx", "I32", (columns,)


def _bitsandbytes_parts(rows: int, columns: int, bits: int, scheme: Scheme) -> Parts:
    """What `quant.bnb.quantize_bnb` gives, under bitsandbytes' own names; 8 bits are int8."""
    if bits == 8:
        yield "weight", "I8", (rows * columns, 1)
        yield "SCB", "F32", (rows,)
        return
    blocks = rows * columns // scheme.group_size
    yield "weight", "U8", (rows * columns // 2, 1)
    yield "weight.absmax", "U8" if scheme.double_quant else "F32", (blocks,)
    if scheme.double_quant:
        yield "weight.nested_absmax", "F32", (-(-blocks // 256),)
        yield "weight.nested_offset", "F32", ()


FORMATS: Mapping[str, Callable[[int, int, int, Scheme], Parts]] = {
    "gptq": _gptq_parts,
    "bitsandbytes": _bitsandbytes_parts,
}


@dataclass(frozen=True)
class TargetRules:
    """What one engine loads of one format.

    methods          quantisation methods whose codes the format holds
    widths           bits that experts may have, beside 16
    granularity      what may have a width of its own
    group_sizes      columns that may share a scale; -1 is a whole row
    asymmetric       it loads groups with a zero point of their own
    row_multiple     a matrix needs this many rows (or a multiple) to be packed
    column_multiple  and this many columns
    unfused_names    tensors go by their names in the live model with its experts unfused
    source           where the facts are from
    """

    target: str
    format: str
    methods: tuple[str, ...]
    widths: tuple[int, ...]
    granularity: Literal["projection", "expert", "layer"]
    group_sizes: tuple[int, ...]
    asymmetric: bool
    row_multiple: int
    column_multiple: int
    unfused_names: bool
    source: str


# For a target and a method the first row that holds it is taken.
TARGETS: tuple[TargetRules, ...] = (
    TargetRules(
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
        " qlinears pack whole int32 words along both axes; a Mixtral file with w1, w3, w2 is"
        " refused, and so is GPTQ v1 with sym false unless it claims to be GPTQModel's own; 4 bits"
        " in groups of 16 load, and fail in its CPU kernel",
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
    TargetRules(
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
        source="transformers 5.17: unquantised experts load through AutoModelForCausalLM; a GPTQ"
        " file of experts would be re-initialised at random without an error",
    ),
)


def find_rules(target: str, method: str) -> TargetRules:
    """The row of a target for a method. Raises RecipeError if the target loads no such file."""
    rows = [rules for rules in TARGETS if rules.target == target]
    for rules in rows:
        if method in rules.methods:
            return rules
    able = " or ".join(sorted({rules.target for rules in TARGETS if method in rules.methods}))
    loads = ", ".join(name for rules in rows for name in rules.methods)
    raise RecipeError(
        f"target {target} does not load experts of method {method}; it loads {loads}"
        + (f", and {method} needs target {able}" if able else "")
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
    """Raises RecipeError if the target does not load this grid or a matrix does not fit it."""
    group_size, symmetric = scheme.group_size, scheme.symmetric
    if group_size not in rules.group_sizes:
        raise RecipeError(
            f"{_size_key(scheme)} is {group_size}; target {rules.target} loads "
            f"{', '.join(map(str, rules.group_sizes))}"
        )
    if not symmetric and not rules.asymmetric:
        raise RecipeError(
            f"quantization.symmetric is false; target {rules.target} loads symmetric groups only"
        )
    for identity, roles in source.experts.items():
        for info in roles.values() if identity.expert != "shared" else ():
            if obstacle := unpackable(info, rules, scheme):
                raise RecipeError(obstacle)


def _size_key(scheme: Scheme) -> str:
    return "quantization." + ("block_size" if scheme.data_type else "group_size")


def unpackable(info: TensorInfo, rules: TargetRules, scheme: Scheme) -> str:
    """Why a matrix cannot be packed; "" if it can."""
    rows, columns = info.shape
    if scheme.group_size != -1 and columns % scheme.group_size:
        fitting = [g for g in rules.group_sizes if g == -1 or columns % g == 0]
        return (
            f"{_size_key(scheme)} {scheme.group_size} does not divide the {columns} columns of "
            f"{info.name}; accepted there: {', '.join(map(str, fitting)) or 'none'}"
        )
    if rows % rules.row_multiple or columns % rules.column_multiple:
        return (
            f"{info.name} is {rows} x {columns}; target {rules.target} packs multiples of "
            f"{rules.row_multiple} x {rules.column_multiple}"
        )
    return ""


def is_other_linear(info: TensorInfo) -> bool:
    """A matrix of attention or of a dense MLP in a decoder layer."""
    matrix = len(info.shape) == 2 and info.name.endswith(".weight")
    return matrix and info.layer is not None and info.kind in ("attention", "dense_mlp")


def result_name(source: ModelSource, plan: CompressionPlan, name: str) -> str:
    """The name by which the plan's target looks for a tensor of the source."""
    if not rules_of(plan).unfused_names:
        return name
    return unfused_name(FAMILIES[source.family], name)


def packed_slots(info: TensorInfo, bits: int, scheme: Scheme) -> tuple[Slot, ...]:
    """The tensors that hold one [rows, columns] weight at a width."""
    stem = info.name.removesuffix(".weight")
    rows, columns = info.shape
    parts = FORMATS[scheme.format](rows, columns, bits, scheme)
    return tuple(Slot(f"{stem}.{suffix}", dtype, shape) for suffix, dtype, shape in parts)


def stored_bytes(info: TensorInfo, bits: int, scheme: Scheme) -> int:
    """Bytes of one matrix at a width, scales and indices included; 16 is the source's precision."""
    return info.size_bytes if bits == 16 else _packed_bytes(info.shape, bits, scheme)


@cache
def _packed_bytes(shape: tuple[int, ...], bits: int, scheme: Scheme) -> int:
    rows, columns = shape
    parts = FORMATS[scheme.format](rows, columns, bits, scheme)
    return sum(Slot("", dtype, extent).size_bytes for _, dtype, extent in parts)


def result_slots(source: ModelSource, plan: CompressionPlan) -> Iterator[Slot]:
    """Every tensor of the result, in the order in which the source holds them."""
    for info in sorted(source.tensors.values(), key=lambda i: (i.file, i.begin)):
        bits = planned_bits(plan, info)
        info = replace(info, name=result_name(source, plan, info.name))
        if bits == 16:
            yield Slot(info.name, info.dtype, info.shape)
        else:
            yield from packed_slots(info, bits, plan.scheme)


def planned_bits(plan: CompressionPlan, info: TensorInfo) -> int:
    """The width that the plan gives a tensor; 16 leaves it as it is."""
    if info.name in plan.by_name:
        return plan.by_name[info.name].bits
    if info.role is None or info.layer is None or info.expert is None:
        return 16
    decision = plan.by_id.get(ExpertId(info.layer, info.expert))
    return (decision.bits_of(info.role) if decision else None) or 16
