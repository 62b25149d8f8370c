"""Decide what becomes of every expert. Pure Python on numbers: no torch, deterministic.

Protection comes first: a super expert keeps `protected_bits`, whatever the budget, and stays where
others are pruned. What is pruned, merged or zeroed is decided next (structure.py); the widths are
then those of the smaller model that is left (surgery.py, bits.py), so that nothing there has to
know of it. What the target cannot load is refused here, before any weight is read. A plan that
comes back from a file is held to the same rules (check.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from se_compress.artifacts import (
    NO_BITS,
    SOURCE_BITS,
    CompressionPlan,
    CurvePoint,
    ExpertDecision,
    ExpertId,
    ExpertProfile,
    ModelSource,
)
from se_compress.engines.serving import float16_notes
from se_compress.engines.targets import cautions, rules_of
from se_compress.errors import RecipeError
from se_compress.model.plan_checks import check_structure
from se_compress.model.surgery import renumbered, restored, shrink, shrunk_profile
from se_compress.planning import structure
from se_compress.planning.bits import plan_bits
from se_compress.planning.curve import cost_curve
from se_compress.planning.terms import Terms, terms_of
from se_compress.recipe import Prune, Recipe


def make_plan(
    source: ModelSource, profile: ExpertProfile | None, recipe: Recipe
) -> CompressionPlan:
    """The plan for a recipe. Without a profile (a dry run before the first profile) no super expert
    is known; the plan then says so. Raises RecipeError for what cannot be planned."""
    protected = _protected(source, profile, recipe)
    plan = _plan(source, profile, terms_of(recipe), protected)
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
    """What has to be known before the plan's result is served, a sentence each."""
    return cautions(source, rules_of(plan)) + float16_notes(source, plan, profile)


def _plan(
    source: ModelSource,
    profile: ExpertProfile | None,
    terms: Terms,
    reasons: Mapping[ExpertId, str],
) -> CompressionPlan:
    """Surgery first, if the recipe wants any, then bits for what is left.

    reasons  the experts to protect, and why
    """
    policy = terms.policy
    if policy.zero:
        zeroed = structure.zero(source, profile, policy)
        silent = {decision.id for decision in zeroed}
        reasons = {i: reason for i, reason in reasons.items() if i not in silent}
        return _with_structure(source, profile, terms, reasons, zeroed, ())
    if policy.merge:
        fraction = policy.merge.fraction
        count = structure.count_of(source, reasons.keys(), fraction, "policy.merge.fraction")
        merged = structure.merge(source, profile, reasons.keys(), count)
        notes = structure.notes(source, count, "merged into others")
        return _with_structure(source, profile, terms, reasons, merged, notes)
    prune = policy.prune
    if prune is None:
        return plan_bits(source, profile, terms, reasons)
    if prune.fraction == "auto":
        return _best_pruned(source, profile, terms, reasons, prune)
    count = structure.count_of(source, reasons.keys(), prune.fraction, "policy.prune.fraction")
    return _pruned(source, profile, terms, reasons, prune, count)


def _pruned(
    source: ModelSource,
    profile: ExpertProfile | None,
    terms: Terms,
    reasons: Mapping[ExpertId, str],
    prune: Prune,
    count: int,
) -> CompressionPlan:
    """The plan with `count` experts of each routing group gone."""
    gone = structure.prune(source, profile, reasons.keys(), prune.score, count)
    notes = structure.notes(source, count, "pruned")
    return _with_structure(source, profile, terms, reasons, gone, notes)


def _best_pruned(
    source: ModelSource,
    profile: ExpertProfile | None,
    terms: Terms,
    reasons: Mapping[ExpertId, str],
    prune: Prune,
) -> CompressionPlan:
    """`fraction: auto`: of all counts that can meet the budget, the one of least predicted loss.
    Without a profile no loss is known, and the least count that can meet it is taken."""
    best: tuple[float, CompressionPlan] | None = None
    tried, last = [], None
    for count in structure.steps(source, reasons.keys()):
        try:
            plan = _pruned(source, profile, terms, reasons, prune, count)
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
    terms: Terms,
    reasons: Mapping[ExpertId, str],
    decisions: Sequence[ExpertDecision],
    notes: tuple[str, ...],
) -> CompressionPlan:
    """The plan in which `decisions` hold for the experts that they name, and bits are planned for
    what is left of the model."""
    if not decisions:
        return plan_bits(source, profile, terms, reasons)
    whole = CompressionPlan(
        target=terms.recipe.target,
        scheme=terms.scheme,
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
    return restored(whole, plan_bits(small.source, known, terms, left))


def curve_of(
    source: ModelSource, profile: ExpertProfile | None, recipe: Recipe, plan: CompressionPlan
) -> tuple[CurvePoint, ...]:
    """What other budgets would buy for the model as the plan leaves it, see `cost_curve`."""
    small = shrink(source, plan)
    known = shrunk_profile(profile, plan, small) if profile else None
    kept = {new: "" for new, old in small.origin.items() if old[0] in plan.protected}
    return cost_curve(small.source, known, terms_of(recipe), kept)


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
    """What a reader has to know of the super experts."""
    if recipe.policy.protect == "none":
        return ("policy.protect is none: super experts are treated like any other expert",)
    if recipe.policy.protect == "super-experts" and profile is None:
        return (
            "no profile yet: super experts are not known, so none is protected in this estimate",
        )
    if recipe.policy.protect == "super-experts" and profile and not profile.super_experts:
        return ("the profile found no super expert, so none is protected",)
    return ()
