"""What each target engine loads, and what a plan therefore puts into the file. No torch.

One row per engine, each fact with its source. The planner takes a row as its constraint; the layout
of the result (`result_slots`) follows from plan and headers alone, exact to the byte.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from se_compress.artifacts import CompressionPlan, ExpertId, ModelSource, Role, TensorInfo
from se_compress.errors import RecipeError
from se_compress.families import FAMILIES, unfused_name
from se_compress.headers import Slot

TABLE_VERSION = "2026-11"


@dataclass(frozen=True)
class TargetRules:
    """What one engine accepts.

    methods          quantisation methods whose files it loads
    widths           bits that experts may have, beside 16
    group_sizes      columns that may share a scale; -1 is a whole row
    asymmetric       it loads groups with a zero point of their own
    row_multiple     an expert matrix needs this many rows (or a multiple) to be packed
    column_multiple  and this many columns
    unfused_names    tensors go by their names in the live model with its experts unfused
    source           where the facts are from
    """

    name: str
    methods: tuple[str, ...]
    widths: tuple[int, ...]
    group_sizes: tuple[int, ...]
    asymmetric: bool
    row_multiple: int
    column_multiple: int
    unfused_names: bool
    source: str


TARGETS: Mapping[str, TargetRules] = {
    rules.name: rules
    for rules in (
        TargetRules(
            name="gptqmodel",
            methods=("gptq", "rtn"),
            widths=(2, 3, 4, 8),
            group_sizes=(-1, 32, 64, 128, 256),
            asymmetric=False,
            row_multiple=32,
            column_multiple=32,
            unfused_names=True,
            source="GPTQModel 7.6: `dynamic` is looked up per module, so per expert and"
            " projection; its qlinears pack whole int32 words along both axes; a Mixtral file with"
            " w1, w3, w2 is refused, and so is GPTQ v1 with sym false unless it claims to be"
            " GPTQModel's own; 4 bits in groups of 16 load, and fail in its CPU kernel",
        ),
        TargetRules(
            name="transformers",
            methods=("none",),
            widths=(),
            group_sizes=(),
            asymmetric=False,
            row_multiple=1,
            column_multiple=1,
            unfused_names=False,
            source="transformers 5.17: unquantised experts load through AutoModelForCausalLM; a"
            " GPTQ file of experts would be re-initialised at random without an error",
        ),
    )
}


def check_target(target: str, method: str) -> TargetRules:
    """The rules of a target. Raises RecipeError if it cannot load files of `method`."""
    rules = TARGETS[target]
    if method not in rules.methods:
        able = " or ".join(name for name, other in TARGETS.items() if method in other.methods)
        raise RecipeError(
            f"target {target} does not load experts of method {method}; it loads "
            f"{', '.join(rules.methods)}" + (f", and {method} needs target {able}" if able else "")
        )
    return rules


def check_grid(source: ModelSource, rules: TargetRules, group_size: int, symmetric: bool) -> None:
    """Raises RecipeError if the target does not load this grid or a matrix does not fit it."""
    if group_size not in rules.group_sizes:
        raise RecipeError(
            f"quantization.group_size is {group_size}; target {rules.name} loads "
            f"{', '.join(map(str, rules.group_sizes))}"
        )
    if not symmetric and not rules.asymmetric:
        raise RecipeError(
            f"quantization.symmetric is false; target {rules.name} loads symmetric groups only"
        )
    for identity, roles in source.experts.items():
        for info in roles.values() if identity.expert != "shared" else ():
            rows, columns = info.shape
            if group_size != -1 and columns % group_size:
                fitting = [g for g in rules.group_sizes if g == -1 or columns % g == 0]
                raise RecipeError(
                    f"quantization.group_size {group_size} does not divide the {columns} columns of"
                    f" {info.name}; accepted there: {', '.join(map(str, fitting))}"
                )
            if rows % rules.row_multiple or columns % rules.column_multiple:
                raise RecipeError(
                    f"{info.name} is {rows} x {columns}; target {rules.name} packs multiples of "
                    f"{rules.row_multiple} x {rules.column_multiple}"
                )


def result_name(source: ModelSource, plan: CompressionPlan, name: str) -> str:
    """The name by which the plan's target looks for a tensor of the source."""
    if not TARGETS[plan.target].unfused_names:
        return name
    return unfused_name(FAMILIES[source.family], name)


def packed_slots(info: TensorInfo, bits: int, group_size: int) -> tuple[Slot, ...]:
    """The four GPTQ v1 tensors that hold one [rows, columns] weight.

    qweight int32 [columns * bits / 32, rows], qzeros int32 [groups, rows * bits / 32], scales
    float16 [groups, rows], g_idx int32 [columns] (GPTQModel, nn_modules/qlinear/__init__.py).
    """
    rows, columns = info.shape
    groups = 1 if group_size == -1 else -(-columns // group_size)
    stem = info.name.removesuffix(".weight")
    return (
        Slot(f"{stem}.qweight", "I32", (columns * bits // 32, rows)),
        Slot(f"{stem}.qzeros", "I32", (groups, rows * bits // 32)),
        Slot(f"{stem}.scales", "F16", (groups, rows)),
        Slot(f"{stem}.g_idx", "I32", (columns,)),
    )


def expert_bytes(roles: Mapping[Role, TensorInfo], bits: int, group_size: int) -> int:
    """Bytes of one expert at a width, scales and indices included; 16 is the source's precision."""
    if bits == 16:
        return sum(info.size_bytes for info in roles.values())
    return sum(
        slot.size_bytes for info in roles.values() for slot in packed_slots(info, bits, group_size)
    )


def result_slots(source: ModelSource, plan: CompressionPlan) -> Iterator[Slot]:
    """Every tensor of the result, in the order in which the source holds them."""
    for info in sorted(source.tensors.values(), key=lambda i: (i.file, i.begin)):
        bits = planned_bits(plan, info)
        info = replace(info, name=result_name(source, plan, info.name))
        if bits == 16:
            yield Slot(info.name, info.dtype, info.shape)
        else:
            yield from packed_slots(info, bits, plan.group_size)


def planned_bits(plan: CompressionPlan, info: TensorInfo) -> int:
    """The width that the plan gives a tensor; 16 leaves it as it is."""
    if info.role is None or info.layer is None or info.expert is None:
        return 16
    decision = plan.by_id.get(ExpertId(info.layer, info.expert))
    return decision.bits if decision is not None and decision.bits is not None else 16
