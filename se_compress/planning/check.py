"""A plan from a file, edited by hand or not, held to the same rules as a fresh one."""

from dataclasses import replace
from typing import get_args

from se_compress.artifacts import (
    SOURCE_BITS,
    Action,
    CompressionPlan,
    ExpertDecision,
    ModelSource,
    Scheme,
    TensorInfo,
)
from se_compress.artifacts.targets import DataType, targets_of
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.targets import (
    TARGETS,
    TargetRules,
    check_grid,
    find_rules,
    is_other_linear,
    unpackable,
    widths_of,
)
from se_compress.errors import RecipeError
from se_compress.formats import FORMATS
from se_compress.model.plan_checks import check_structure
from se_compress.model.surgery import renumbered


def check_plan(plan: CompressionPlan, source: ModelSource, where: str) -> CompressionPlan:
    """The plan with its sizes computed anew and the result's experts counted from 0.

    where  the file that it came from

    Raises RecipeError naming `where` and the expert that breaks a rule.
    """
    try:
        rules = _check_target(plan)
        if any(decision.action == "quantize" for decision in plan.experts):
            check_grid(source, rules, plan.scheme)
        _check_complete(plan, source)
        for decision in plan.experts:
            _check_decision(plan, decision, rules)
        if rules.granularity in ("layer", "model"):
            _check_alike(plan, rules)
        _check_others(plan, source, rules)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    plan = replace(plan, experts=tuple(renumbered(plan.experts)))
    check_structure(source, plan, where)
    blueprint = draw_blueprint(source, plan)
    return replace(
        plan,
        bits_per_weight=blueprint.bits_per_weight,
        size_bytes=blueprint.size_bytes,
        source_size_bytes=source.size_bytes,
    )


def _check_target(plan: CompressionPlan) -> TargetRules:
    """The row of the target that the plan is for."""
    known = list(dict.fromkeys(rules.target for rules in TARGETS))
    names = targets_of(plan.target)
    if not names:
        raise RecipeError(f"target is an empty list; at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise RecipeError(f"target {name!r} is not one of {', '.join(known)}")
        if names.count(name) > 1:
            raise RecipeError(f"target lists {name} twice")
    scheme = plan.scheme
    rules = find_rules(plan.target, scheme.method, scheme.format, scheme.symmetric)
    _check_scheme(scheme)
    return rules


def _check_scheme(scheme: Scheme) -> None:
    """Only one method has data types, and a plan names its format: auto is a recipe's word."""
    if scheme.format == "auto":
        raise RecipeError("scheme.format is auto; a plan names the format that its target loads")
    form = FORMATS.get(scheme.format)
    if form and form.quantize:  # by a library, in types of its own
        accepted = get_args(DataType)
        if scheme.data_type not in accepted:
            raise RecipeError(
                f"scheme.data_type is {scheme.data_type}; accepted are {', '.join(accepted)}"
            )
        return
    for key, value in (("data_type", scheme.data_type), ("double_quant", scheme.double_quant)):
        if value is not None:
            raise RecipeError(f"scheme.{key} is {value}; method {scheme.method} has no such key")


def _check_complete(plan: CompressionPlan, source: ModelSource) -> None:
    """Every expert of the model has one line, and nothing else has."""
    if len(plan.by_id) != len(plan.experts):
        raise RecipeError("an expert is listed twice")
    for identity in source.experts:
        if identity not in plan.by_id:
            raise RecipeError(f"expert {identity} of the model has no line")
    for identity in plan.by_id:
        if identity not in source.experts:
            raise RecipeError(f"the model has no expert {identity}")
    for identity in plan.protected:
        if identity not in source.experts:
            raise RecipeError(f"protected lists {identity}, which the model does not have")


def _check_decision(plan: CompressionPlan, decision: ExpertDecision, rules: TargetRules) -> None:
    """The bits of one expert are such that its action and the target have them."""
    name = f"expert {decision.id}"
    packable = widths_of(plan.scheme, rules)
    of_action: dict[Action, tuple[int | None, ...]] = {
        "keep": (SOURCE_BITS,), "quantize": packable, "prune": (None,)
    }  # fmt: skip
    accepted = of_action.get(decision.action, (*packable, SOURCE_BITS))
    down_bits = decision.bits if decision.down_bits is None else decision.down_bits
    pair = (decision.bits, down_bits)
    split = pair[0] != pair[1]
    if split and rules.granularity != "projection":
        raise RecipeError(
            f"{name} has {pair[0]} bits and down_bits {pair[1]}; target {rules.target} loads one "
            f"width per {rules.granularity}"
        )
    for what, bits in zip(("bits", "down_bits"), pair, strict=True):
        half_kept = split and bits == SOURCE_BITS and decision.action == "quantize"
        if bits not in accepted and not half_kept:
            has = f"{bits} bits" if what == "bits" else f"down_bits {bits}"
            raise RecipeError(
                f"{name} has {has}; for action {decision.action} and target {rules.target} "
                f"accepted are {', '.join('null' if a is None else str(a) for a in accepted)}"
            )
    least = min(SOURCE_BITS if bits is None else bits for bits in pair)
    if decision.id in plan.protected and least < 8:
        raise RecipeError(
            f"{name} is protected but has {least} bits; accepted are 8 and 16, unless it is taken "
            "off the list of protected"
        )


def _check_alike(plan: CompressionPlan, rules: TargetRules) -> None:
    """All routed experts of a layer, or of the model, have one width."""
    first: dict[int, ExpertDecision] = {}
    for decision in plan.experts:
        if decision.expert == "shared" or decision.bits is None:
            continue
        other = first.setdefault(0 if rules.granularity == "model" else decision.layer, decision)
        if decision.bits != other.bits:
            raise RecipeError(
                f"expert {decision.id} has {decision.bits} bits and expert {other.id} "
                f"{other.bits}; target {rules.target} loads one width per {rules.granularity}"
            )


def _check_others(plan: CompressionPlan, source: ModelSource, rules: TargetRules) -> None:
    """Lines for linears that belong to no expert."""
    if len(plan.by_name) != len(plan.others):
        raise RecipeError("a tensor is listed twice in others")
    for decision in plan.others:
        info = source.tensors.get(decision.name)
        if info is None or not is_other_linear(info):
            raise RecipeError(
                f"others lists {decision.name}, which is no linear of the model's attention or "
                "dense MLP"
            )
        accepted = (*widths_of(plan.scheme, rules), SOURCE_BITS)
        if decision.bits not in accepted:
            raise RecipeError(
                f"{decision.name} has {decision.bits} bits; for target {rules.target} accepted are "
                f"{', '.join(map(str, accepted))}"
            )
    for info in source.tensors.values():
        if info.kind != "expert" and plan.bits_of(info) != SOURCE_BITS:
            if obstacle := unpackable(info, rules, plan.scheme):
                raise RecipeError(f"{info.name} has to keep {SOURCE_BITS} bits: {obstacle}")
    _check_fused(plan, source, rules)


def _check_fused(plan: CompressionPlan, source: ModelSource, rules: TargetRules) -> None:
    """Linears that the target loads as one have one width."""
    first: dict[tuple[str, frozenset[str]], TensorInfo] = {}
    for info in filter(is_other_linear, source.tensors.values()):
        block, _, linear = info.name.removesuffix(".weight").rpartition(".")
        for group in rules.fused:
            if linear not in group:
                continue
            other = first.setdefault((block, group), info)
            bits, others = plan.bits_of(info), plan.bits_of(other)
            if bits != others:
                raise RecipeError(
                    f"{info.name} has {bits} bits and {other.name} {others}; target {rules.target} "
                    "loads them as one matrix, of one width"
                )
