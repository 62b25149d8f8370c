"""Decide what becomes of every expert. Pure Python on numbers: no torch, deterministic.

Protection comes first: a super expert keeps `protected_bits`, whatever the budget, and stays where
others are pruned. What is pruned, merged or zeroed is decided next (structure.py); the widths are
then those of the smaller model that is left (surgery.py), so that nothing here has to know of it.
With one allowed width every other routed expert gets that. With several, the profile says what each
width would cost each expert, and a knapsack solver spends the budget where it saves most. What the
target cannot load is refused here, before any weight is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, floor

from se_compress import structure
from se_compress.artifacts import (
    Action,
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    ExpertProfile,
    ModelSource,
    Scheme,
)
from se_compress.errors import RecipeError
from se_compress.knapsack import Option, choose
from se_compress.recipe import Prune, Recipe
from se_compress.surgery import (
    check_structure,
    lifted,
    renumbered,
    shrink,
    shrunk_profile,
)
from se_compress.targets import (
    TARGETS,
    TargetRules,
    check_grid,
    expert_bytes,
    find_rules,
    widths_of,
)


def make_plan(
    source: ModelSource, profile: ExpertProfile | None, recipe: Recipe
) -> CompressionPlan:
    """The plan for a recipe. Without a profile (a dry run before the first profile) no super expert
    is known; the plan then says so. Raises RecipeError for what cannot be planned."""
    reasons, rule = _protected(source, profile, recipe), recipe.policy.prune
    if recipe.policy.zero:
        zeroed = structure.zero(source, profile, recipe.policy)
        silent = {decision.id for decision in zeroed}
        reasons = {i: reason for i, reason in reasons.items() if i not in silent}
        return _with_structure(source, profile, recipe, reasons, zeroed, ())
    if rule is None:
        return _allocate(source, profile, recipe, reasons)
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
    ExpertStats.loss; an expert that is gone or silent has 0 bits."""
    total = 0.0
    for decision in plan.experts:
        gone = decision.action in ("prune", "zero")
        if decision.expert != "shared" and (gone or decision.action == "quantize"):
            total += profile.by_id[decision.id].loss[0 if gone else decision.bits or 0]
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
        return _allocate(source, profile, recipe, reasons)
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
    small = shrink(source, whole)
    left = {new: reasons[m[0]] for new, m in small.origin.items() if m[0] in reasons}
    known = shrunk_profile(profile, whole, small) if profile else None
    return lifted(whole, _allocate(small.source, known, recipe, left))


def _allocate(
    source: ModelSource,
    profile: ExpertProfile | None,
    recipe: Recipe,
    reasons: Mapping[ExpertId, str],
) -> CompressionPlan:
    """Widths for all experts of a model; `reasons` says which are protected and why."""
    quantization = recipe.quantization
    rules = find_rules(recipe.target, quantization.method)
    protected = frozenset(reasons)
    if quantization.method == "none":
        _check_unquantized_budget(source, recipe)
        return _assemble(source, profile, recipe, {}, _widths(source, protected, recipe, 16), ())
    check_grid(source, rules, scheme_of(recipe))
    width = _widest_uniform(source, protected, recipe)
    widths, notes = _widths(source, protected, recipe, width), tuple[str, ...]()
    if len(recipe.policy.bits) > 1:
        widths, notes = _mixed_widths(source, profile, protected, recipe, widths)
    return _assemble(source, profile, recipe, reasons, widths, notes)


def scheme_of(recipe: Recipe) -> Scheme:
    """How the recipe stores what it quantises."""
    rule = recipe.quantization
    rules = find_rules(recipe.target, rule.method)
    if rules.format == "bitsandbytes":
        block = (-1, None) if rule.data_type == "int8" else (rule.block_size, rule.double_quant)
        return Scheme(rules.format, rule.method, block[0], True, rule.data_type, block[1])
    return Scheme(rules.format, rule.method, rule.group_size, rule.symmetric)


def check_plan(plan: CompressionPlan, source: ModelSource, where: str) -> CompressionPlan:
    """A plan from a file, held to the same rules as a fresh one, with its sizes computed anew.

    Raises RecipeError naming `where` and the expert.
    """
    known = list(dict.fromkeys(rules.target for rules in TARGETS))
    if plan.target not in known:
        raise RecipeError(f"{where}: target {plan.target!r} is not one of {', '.join(known)}")
    try:
        rules = find_rules(plan.target, plan.scheme.method)
        if any(decision.action == "quantize" for decision in plan.experts):
            check_grid(source, rules, plan.scheme)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    if len(plan.by_id) != len(plan.experts):
        raise RecipeError(f"{where}: an expert is listed twice")
    for identity in source.experts:
        if identity not in plan.by_id:
            raise RecipeError(f"{where}: expert {identity} of the model has no line")
    for identity in plan.protected:
        if identity not in source.experts:
            raise RecipeError(f"{where}: protected lists {identity}, which the model does not have")
    for decision in plan.experts:
        _check_decision(plan, decision, source, rules, where)
    plan = replace(plan, experts=tuple(renumbered(source, plan.experts)))
    check_structure(source, plan, where)
    small = shrink(source, plan)
    widths = {d.id: d.bits or 16 for d in small.plan.experts if d.expert != "shared"}
    return replace(
        plan,
        bits_per_weight=bits_per_weight(small.source, widths, plan.scheme),
        size_bytes=_size_bytes(small.source, widths, plan.scheme),
        source_size_bytes=source.size_bytes,
    )


def _check_decision(
    plan: CompressionPlan,
    decision: ExpertDecision,
    source: ModelSource,
    rules: TargetRules,
    where: str,
) -> None:
    identity = decision.id
    if identity not in source.experts:
        raise RecipeError(f"{where}: the model has no expert {identity}")
    packable = widths_of(plan.scheme, rules) if identity.expert != "shared" else ()
    accepted: dict[Action, tuple[int | None, ...]] = {
        "keep": (16,), "quantize": packable, "prune": (None,)
    }  # fmt: skip
    widths = accepted.get(decision.action, (*packable, 16))
    if decision.bits not in widths:
        named = ", ".join("null" if width is None else str(width) for width in widths)
        raise RecipeError(
            f"{where}: expert {identity} has {decision.bits} bits; for action {decision.action} and"
            f" target {plan.target} accepted are {named or 'none'}"
        )
    if identity in plan.protected and (decision.bits or 16) < 8:
        raise RecipeError(
            f"{where}: expert {identity} is protected but has {decision.bits} bits; accepted are 8 "
            "and 16, unless it is taken off the list of protected"
        )


def bits_per_weight(source: ModelSource, widths: Mapping[ExpertId, int], scheme: Scheme) -> float:
    """Stored bits per weight over all routed experts; scales, zero points and indices count."""
    size = weights = 0
    for identity, roles in source.experts.items():
        if identity.expert != "shared":
            size += expert_bytes(roles, widths.get(identity, 16), scheme)
            weights += sum(info.shape[0] * info.shape[1] for info in roles.values())
    return 8 * size / weights


def _protected(
    source: ModelSource, profile: ExpertProfile | None, recipe: Recipe
) -> dict[ExpertId, str]:
    """The protected experts and why."""
    protect, bits = recipe.policy.protect, recipe.policy.protected_bits
    reasons: dict[ExpertId, str] = {}
    if isinstance(protect, tuple):
        for identity in structure.listed(source, protect, "policy.protect"):
            kept = 16 if identity.expert == "shared" else bits
            reasons[identity] = f"protected at {kept} bits: listed in policy.protect"
    elif protect == "super-experts" and profile is not None:
        for expert in profile.super_experts:
            state = {True: "confirmed", False: "not confirmed", None: "not asked to confirm"}
            reasons[expert.id] = (
                f"protected at {bits} bits: super expert, peak {expert.peak:.0f} on channel "
                f"{expert.channel} at position {expert.position}, {state[expert.confirmed]}"
            )
    return reasons


def _widest_uniform(source: ModelSource, protected: frozenset[ExpertId], recipe: Recipe) -> int:
    """The widest of the allowed widths that all unprotected experts can have within the budget."""
    budget, widths = _budget(recipe), sorted(recipe.policy.bits)
    if budget is None:
        if len(widths) > 1:
            raise RecipeError(
                f"policy.bits lists the widths {widths}: a budget is needed to choose, "
                "policy.bits_per_weight or policy.size"
            )
        return widths[0]
    measured = {width: _measure(source, protected, recipe, width) for width in widths}
    fitting = [width for width in widths if measured[width] <= budget]
    if not fitting:
        kept = f"{len(protected)} protected at {recipe.policy.protected_bits} bits and all other "
        why = (
            f"{kept if protected else 'all '}experts at {widths[0]} bits, with scales in groups "
            f"of {scheme_of(recipe).group_size}"
        )
        raise RecipeError(_impossible(recipe, min(measured.values()), why))
    return fitting[-1]


def _mixed_widths(
    source: ModelSource,
    profile: ExpertProfile | None,
    protected: frozenset[ExpertId],
    recipe: Recipe,
    uniform: Mapping[ExpertId, int],
) -> tuple[dict[ExpertId, int], tuple[str, ...]]:
    """The widths of least predicted loss within the budget, and what the solver says of them.

    The loss of a width is the profile's: the error it puts into the residual stream, see
    ExpertStats.loss. Experts count alike, so no layer is favoured but by what was measured.
    """
    if profile is None:
        return dict(uniform), (
            "no profile yet: the widths are an estimate, the widest that fits all",
        )
    scheme = scheme_of(recipe)
    widths: list[int] = sorted(recipe.policy.bits)
    free = [identity for identity in uniform if identity not in protected]
    items = [
        [
            Option(
                expert_bytes(source.experts[identity], width, scheme),
                profile.by_id[identity].loss[width],
            )
            for width in widths
        ]
        for identity in free
    ]
    spent = sum(items[i][widths.index(uniform[identity])].cost for i, identity in enumerate(free))
    choice = choose(items, spent + _bytes_left(source, uniform, recipe))
    if choice is None:
        raise RuntimeError("no choice of widths fits, though a uniform width does")
    mixed = dict(uniform) | {i: widths[pick] for i, pick in zip(free, choice.picks, strict=True)}
    gap = choice.loss / choice.bound - 1 if choice.bound > 0 else 0.0
    return mixed, (
        f"widths {widths} mixed within the budget: predicted loss {choice.loss:.4g}, at most "
        f"{gap:.2%} from the optimum",
    )


def _bytes_left(source: ModelSource, widths: Mapping[ExpertId, int], recipe: Recipe) -> int:
    """What the budget leaves beside a plan of these widths."""
    policy, scheme = recipe.policy, scheme_of(recipe)
    if policy.size is not None:
        return policy.size - _size_bytes(source, widths, scheme)
    weights = sum(
        info.shape[0] * info.shape[1]
        for identity in widths
        for info in source.experts[identity].values()
    )
    size = sum(expert_bytes(source.experts[i], bits, scheme) for i, bits in widths.items())
    return floor((policy.bits_per_weight or 0.0) * weights / 8) - size


def _budget(recipe: Recipe) -> float | None:
    """In the unit of `_measure`; None if the recipe sets none."""
    return recipe.policy.size if recipe.policy.size is not None else recipe.policy.bits_per_weight


def _check_unquantized_budget(source: ModelSource, recipe: Recipe) -> None:
    budget, size = _budget(recipe), _measure(source, frozenset(), recipe, 16)
    if budget is not None and size > budget:
        raise RecipeError(_impossible(recipe, size, "quantization.method none keeps every weight"))


def _measure(
    source: ModelSource, protected: frozenset[ExpertId], recipe: Recipe, width: int
) -> float:
    """What the budget counts: bytes of the whole checkpoint, or bits per routed expert weight."""
    widths = _widths(source, protected, recipe, width)
    if recipe.policy.size is not None:
        return _size_bytes(source, widths, scheme_of(recipe))
    return bits_per_weight(source, widths, scheme_of(recipe))


def _impossible(recipe: Recipe, least: float, why: str) -> str:
    """The least is rounded up, so that it is possible as it is written."""
    if recipe.policy.size is None:
        given, least_text = str(recipe.policy.bits_per_weight), f"{ceil(least * 1000) / 1000:.3f}"
        return f"policy.bits_per_weight is {given}, but {least_text} is the least possible: {why}"
    unit, scale = ("GB", 10**9) if least >= 10**9 else ("MB", 10**6)
    least_text = f"{ceil(least * 10_000 / scale) / 10_000:.4f} {unit}"
    return (
        f"policy.size is {recipe.policy.size / scale:.4f} {unit}, but {least_text} is the least "
        f"possible: {why}, the rest of the model unchanged"
    )


def _widths(
    source: ModelSource, protected: frozenset[ExpertId], recipe: Recipe, width: int
) -> dict[ExpertId, int]:
    return {
        identity: recipe.policy.protected_bits if identity in protected else width
        for identity in source.experts
        if identity.expert != "shared"
    }


def _size_bytes(source: ModelSource, widths: Mapping[ExpertId, int], scheme: Scheme) -> int:
    changed = sum(
        expert_bytes(roles, widths.get(identity, 16), scheme) - expert_bytes(roles, 16, scheme)
        for identity, roles in source.experts.items()
    )
    return source.size_bytes + changed


def _assemble(
    source: ModelSource,
    profile: ExpertProfile | None,
    recipe: Recipe,
    reasons: Mapping[ExpertId, str],
    widths: Mapping[ExpertId, int],
    notes: tuple[str, ...],
) -> CompressionPlan:
    protected = frozenset(reasons)
    scheme = scheme_of(recipe)
    decisions = tuple(_decide(i, profile, widths, reasons, recipe) for i in source.experts)
    return CompressionPlan(
        target=recipe.target,
        scheme=scheme,
        bits_per_weight=bits_per_weight(source, widths, scheme),
        size_bytes=_size_bytes(source, widths, scheme),
        source_size_bytes=source.size_bytes,
        protected=tuple(sorted(protected)),
        profile_digest=profile.digest if profile else "",
        notes=notes + _notes(profile, recipe),
        experts=decisions,
    )


def _decide(
    identity: ExpertId,
    profile: ExpertProfile | None,
    widths: Mapping[ExpertId, int],
    reasons: Mapping[ExpertId, str],
    recipe: Recipe,
) -> ExpertDecision:
    bits = widths.get(identity, 16)
    reason = reasons.get(identity)
    if identity.expert == "shared":
        reason = reason or "shared expert: every token passes it, policy.other_bits is 16"
    elif recipe.quantization.method == "none":
        reason = reason or "quantization.method is none"
    elif len(recipe.policy.bits) > 1 and profile is not None:
        loss = profile.by_id[identity].loss
        predicted = ", ".join(f"{loss[w]:.3g} at {w}" for w in sorted(recipe.policy.bits))
        reason = reason or f"predicted loss {predicted} bits"
    action: Action = "keep" if bits == 16 else "quantize"
    return ExpertDecision(
        identity.layer, identity.expert, action, bits, reason or f"uniform width {bits}"
    )


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
