"""Decide what becomes of every expert. Pure Python on numbers: no torch, deterministic.

Protection comes first: a super expert keeps `protected_bits`, whatever the budget, and stays where
others are pruned. What is pruned, merged or zeroed is decided next (structure.py); the widths are
then those of the smaller model that is left (surgery.py, allocate.py), so that nothing there has to
know of it. What the target cannot load is refused here, before any weight is read. A plan that
comes back from a file, edited by hand or not, is held to the same rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from se_compress.artifacts import (
    NO_BITS,
    SOURCE_BITS,
    Action,
    CompressionPlan,
    CurvePoint,
    ExpertDecision,
    ExpertId,
    ExpertProfile,
    ModelSource,
    TensorInfo,
)
from se_compress.engines.serving import float16_notes
from se_compress.engines.targets import (
    TARGETS,
    TargetRules,
    cautions,
    check_grid,
    find_rules,
    is_other_linear,
    rules_of,
    unpackable,
    widths_of,
)
from se_compress.errors import RecipeError
from se_compress.model.plan_checks import check_structure
from se_compress.model.surgery import lifted, renumbered, shrink, shrunk_profile
from se_compress.planning import structure
from se_compress.planning.allocate import allocate, cost_curve, scheme_of, with_sizes
from se_compress.recipe import Prune, Recipe


def make_plan(
    source: ModelSource, profile: ExpertProfile | None, recipe: Recipe
) -> CompressionPlan:
    """The plan for a recipe. Without a profile (a dry run before the first profile) no super expert
    is known; the plan then says so. Raises RecipeError for what cannot be planned."""
    plan = _plan(source, profile, recipe, _protected(source, profile, recipe))
    plan = replace(plan, notes=plan.notes + _notes(profile, recipe))
    return with_cautions(plan, source, profile)


def with_cautions(
    plan: CompressionPlan, source: ModelSource, profile: ExpertProfile | None
) -> CompressionPlan:
    """The plan with what has to be known before its result is served; a note that it has already
    is not repeated."""
    said = cautions_of(plan, source, profile)
    return replace(plan, notes=(*plan.notes, *(note for note in said if note not in plan.notes)))


def cautions_of(
    plan: CompressionPlan, source: ModelSource, profile: ExpertProfile | None
) -> tuple[str, ...]:
    return cautions(source, rules_of(plan)) + float16_notes(source, plan, profile)


def _plan(
    source: ModelSource,
    profile: ExpertProfile | None,
    recipe: Recipe,
    reasons: Mapping[ExpertId, str],
) -> CompressionPlan:
    """Surgery first, if the recipe wants any, then widths for what is left."""
    rule = recipe.policy.prune
    if recipe.policy.zero:
        zeroed = structure.zero(source, profile, recipe.policy)
        silent = {decision.id for decision in zeroed}
        reasons = {i: reason for i, reason in reasons.items() if i not in silent}
        return _with_structure(source, profile, recipe, reasons, zeroed, ())
    if recipe.policy.merge:
        fraction = recipe.policy.merge.fraction
        count = structure.count_of(source, reasons.keys(), fraction, "policy.merge.fraction")
        merged = structure.merge(source, profile, reasons.keys(), count)
        notes = structure.notes(source, count, "merged into others")
        return _with_structure(source, profile, recipe, reasons, merged, notes)
    if rule is None:
        return allocate(source, profile, recipe, reasons)
    if rule.fraction == "auto":
        return _best_pruned(source, profile, recipe, reasons, rule)
    count = structure.count_of(source, reasons.keys(), rule.fraction, "policy.prune.fraction")
    return _pruned(source, profile, recipe, reasons, rule, count)


def _pruned(
    source: ModelSource,
    profile: ExpertProfile | None,
    recipe: Recipe,
    reasons: Mapping[ExpertId, str],
    rule: Prune,
    count: int,
) -> CompressionPlan:
    """The plan with `count` experts of each routing group gone."""
    gone = structure.prune(source, profile, reasons.keys(), rule.score, count)
    notes = structure.notes(source, count, "pruned")
    return _with_structure(source, profile, recipe, reasons, gone, notes)


def _best_pruned(
    source: ModelSource,
    profile: ExpertProfile | None,
    recipe: Recipe,
    reasons: Mapping[ExpertId, str],
    rule: Prune,
) -> CompressionPlan:
    """`fraction: auto`: of all counts that can meet the budget, the one of least predicted loss.
    Without a profile no loss is known, and the least count that can meet it is taken."""
    best: tuple[float, CompressionPlan] | None = None
    tried, last = [], None
    for count in structure.steps(source, reasons.keys()):
        try:
            plan = _pruned(source, profile, recipe, reasons, rule, count)
        except RecipeError as error:
            last = error
            continue
        if profile is None:
            return plan
        loss = predicted_loss(plan, profile)
        tried.append(f"{loss:.4g} with {count}")
        if best is None or loss < best[0]:
            best = loss, plan
    if best is None:
        raise last or RuntimeError("no number of experts could be tried")
    tried_text = f"predicted loss by experts pruned per routing group: {', '.join(tried)}"
    return replace(best[1], notes=(tried_text, *best[1].notes))


def predicted_loss(plan: CompressionPlan, profile: ExpertProfile) -> float:
    """Sum over the routed experts of what the profile says that their widths cost, see
    ExpertStats; an expert that is gone or silent has NO_BITS."""
    total = 0.0
    for decision in plan.experts:
        gone = decision.action in ("prune", "zero")
        if decision.expert != "shared" and (gone or decision.action == "quantize"):
            stats = profile.by_id[decision.id]
            total += stats.loss_of("down", NO_BITS if gone else decision.bits_of("down"))
            total += 0.0 if gone else stats.loss_of("gate_up", decision.bits_of("gate"))
    return total


def _with_structure(
    source: ModelSource,
    profile: ExpertProfile | None,
    recipe: Recipe,
    reasons: Mapping[ExpertId, str],
    decisions: Sequence[ExpertDecision],
    notes: tuple[str, ...],
) -> CompressionPlan:
    """The plan in which `decisions` hold for the experts that they name, and widths are allocated
    to what is left of the model."""
    if not decisions:
        return allocate(source, profile, recipe, reasons)
    whole = CompressionPlan(
        target=recipe.target,
        scheme=scheme_of(recipe),
        bits_per_weight=0.0,
        size_bytes=0,
        source_size_bytes=source.size_bytes,
        protected=tuple(sorted(reasons)),
        profile_digest="",
        notes=notes,
        experts=tuple(renumbered(source, structure.complete(source, decisions))),
    )
    check_structure(source, whole, "policy")
    whole = replace(whole, notes=notes + structure.new_names(whole))
    small = shrink(source, whole)
    left = {new: reasons[m[0]] for new, m in small.origin.items() if m[0] in reasons}
    known = shrunk_profile(profile, whole, small) if profile else None
    return lifted(whole, allocate(small.source, known, recipe, left))


def curve_of(
    source: ModelSource, profile: ExpertProfile | None, recipe: Recipe, plan: CompressionPlan
) -> tuple[CurvePoint, ...]:
    """What other budgets would buy for the model as the plan leaves it, see `cost_curve`."""
    small = shrink(source, plan)
    known = shrunk_profile(profile, plan, small) if profile else None
    kept = {new: "" for new, old in small.origin.items() if old[0] in plan.protected}
    return cost_curve(small.source, known, recipe, kept)


def check_plan(plan: CompressionPlan, source: ModelSource, where: str) -> CompressionPlan:
    """A plan from a file, held to the same rules as a fresh one, with its sizes computed anew.

    Raises RecipeError naming `where` and the expert.
    """
    try:
        rules = _check_scheme(plan, source)
        _check_complete(plan, source)
        for decision in plan.experts:
            _check_decision(plan, decision, rules)
        if rules.granularity in ("layer", "model"):
            _check_alike(plan, rules)
        _check_others(plan, source, rules)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    plan = replace(plan, experts=tuple(renumbered(source, plan.experts)))
    check_structure(source, plan, where)
    small = shrink(source, plan)
    sizes = with_sizes(small.plan, small.source)
    return replace(
        plan,
        bits_per_weight=sizes.bits_per_weight,
        size_bytes=sizes.size_bytes,
        source_size_bytes=source.size_bytes,
    )


def _check_scheme(plan: CompressionPlan, source: ModelSource) -> TargetRules:
    known = list(dict.fromkeys(rules.target for rules in TARGETS))
    if plan.target not in known:
        raise RecipeError(f"target {plan.target!r} is not one of {', '.join(known)}")
    scheme = plan.scheme
    rules = find_rules(plan.target, scheme.method, scheme.format, scheme.symmetric)
    if any(decision.action == "quantize" for decision in plan.experts):
        check_grid(source, rules, plan.scheme)
    return rules


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
            f"{name} has {pair[0]} bits and down_bits {pair[1]}; target {plan.target} loads one "
            f"width per {rules.granularity}"
        )
    for what, bits in zip(("bits", "down_bits"), pair, strict=True):
        half_kept = split and bits == SOURCE_BITS and decision.action == "quantize"
        if bits not in accepted and not half_kept:
            has = f"{bits} bits" if what == "bits" else f"down_bits {bits}"
            raise RecipeError(
                f"{name} has {has}; for action {decision.action} and target {plan.target} accepted "
                f"are {', '.join('null' if a is None else str(a) for a in accepted) or 'none'}"
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
                f"{other.bits}; target {plan.target} loads one width per {rules.granularity}"
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
                f"{decision.name} has {decision.bits} bits; for target {plan.target} accepted are "
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
                    f"{info.name} has {bits} bits and {other.name} {others}; target {plan.target} "
                    "loads them as one matrix, of one width"
                )


def _protected(
    source: ModelSource, profile: ExpertProfile | None, recipe: Recipe
) -> dict[ExpertId, str]:
    """The protected experts and why."""
    protect, bits = recipe.policy.protect, recipe.policy.protected_bits
    reasons: dict[ExpertId, str] = {}
    if isinstance(protect, tuple):
        for identity in structure.listed(source, protect, "policy.protect"):
            kept = SOURCE_BITS if identity.expert == "shared" else bits
            reasons[identity] = f"protected at {kept} bits: listed in policy.protect"
    elif protect == "super-experts" and profile is not None:
        for expert in profile.super_experts:
            state = {True: "confirmed", False: "not confirmed", None: "not asked to confirm"}
            reasons[expert.id] = (
                f"protected at {bits} bits: super expert, peak {expert.peak:.0f} on channel "
                f"{expert.channel} at position {expert.position}, {state[expert.confirmed]}"
            )
    return reasons


def _notes(profile: ExpertProfile | None, recipe: Recipe) -> tuple[str, ...]:
    if recipe.policy.protect == "none":
        return ("policy.protect is none: super experts are treated like any other expert",)
    if recipe.policy.protect == "super-experts" and profile is None:
        return (
            "no profile yet: super experts are not known, so none is protected in this estimate",
        )
    if recipe.policy.protect == "super-experts" and profile and not profile.super_experts:
        return ("the profile found no super expert, so none is protected",)
    return ()
