"""Decide what becomes of every expert. Pure Python on numbers: no torch, deterministic.

Protection comes first: a super expert keeps `protected_bits`, whatever the budget, and stays where
others are pruned. What is pruned, merged or zeroed is decided next (structure.py); the widths are
then those of the smaller model that is left (surgery.py, bits.py), so that nothing there has to
know of it. What the target cannot load is refused here, before any weight is read. A plan that
comes back from a file is held to the same rules (check.py).
"""

from collections.abc import Sequence
from dataclasses import replace

from se_compress.artifacts import (
    NO_BITS,
    CompressionPlan,
    CurvePoint,
    ExpertDecision,
    ExpertProfile,
    ModelSource,
)
from se_compress.engines.adapting import adaptations
from se_compress.engines.serving import float16_notes
from se_compress.engines.targets import cautions
from se_compress.errors import RecipeError
from se_compress.model.plan_checks import check_structure
from se_compress.model.surgery import renumbered, restored, shrink, shrunk_profile
from se_compress.planning import structure
from se_compress.planning.bits import plan_bits
from se_compress.planning.curve import cost_curve
from se_compress.planning.granularity import bytes_of_granularity
from se_compress.planning.protection import (
    ALL_BUT,
    protected_experts,
    protection_notes,
    rescued,
)
from se_compress.planning.terms import terms_of
from se_compress.planning.units import Task
from se_compress.recipe import Recipe


def make_plan(
    source: ModelSource, profile: ExpertProfile | None, recipe: Recipe
) -> CompressionPlan:
    """The plan for a recipe. Without a profile (a dry run before the first profile) no super expert
    is known; the plan then says so. Raises RecipeError for what cannot be planned."""
    task = task_of(source, profile, recipe)
    plan = _plan(task)
    if profile is not None and plan.protected and recipe.policy.protect != ALL_BUT:
        plan = replace(plan, rescued=rescued(plan, _plan(replace(task, protected={}))))
    if recipe.policy.repair:
        plan = replace(plan, repaired=True)
    said = (*protection_notes(plan, profile, recipe), *cautions_of(plan, source, profile))
    return plan.noting((task.terms.note, *said) if task.terms.note else said)


def task_of(source: ModelSource, profile: ExpertProfile | None, recipe: Recipe) -> Task:
    """What a recipe asks for a model. Raises RecipeError for what cannot be asked."""
    task = Task(source, profile, terms_of(recipe, source))
    return replace(task, protected=protected_experts(task))


def cautions_of(
    plan: CompressionPlan, source: ModelSource, profile: ExpertProfile | None
) -> tuple[str, ...]:
    """What has to be known before the plan's result is served, a sentence each."""
    told = cautions(source) + adaptations(source, plan.target)
    return told + float16_notes(source, plan, profile)


def _plan(task: Task) -> CompressionPlan:
    """Surgery first, if the recipe wants any, then bits for what is left."""
    policy, prune = task.terms.policy, task.terms.policy.prune
    if policy.zero:
        zeroed = structure.zero(task)
        silent = {decision.id for decision in zeroed}
        heard = {i: why for i, why in task.protected.items() if i not in silent}
        return _with_structure(replace(task, protected=heard), zeroed, ())
    if policy.average:
        averaged = structure.average(task)
        mixed = {decision.id for decision in averaged}
        alone = {i: why for i, why in task.protected.items() if i not in mixed}
        notes = structure.average_notes(task)
        return _with_structure(replace(task, protected=alone), averaged, notes)
    if policy.merge:
        count = structure.count_of(task, policy.merge.fraction, "policy.merge.fraction")
        notes = structure.notes(task.source, count, "merged into others")
        return _with_structure(task, structure.merge(task, count), notes)
    if prune is None:
        return plan_bits(task)
    if prune.fraction == "auto":
        return _best_pruned(task, prune.score)
    count = structure.count_of(task, prune.fraction, "policy.prune.fraction")
    return _pruned(task, prune.score, count)


def _pruned(task: Task, score: str, count: int) -> CompressionPlan:
    """The plan with `count` experts of each routing group gone."""
    notes = structure.notes(task.source, count, "pruned")
    return _with_structure(task, structure.prune(task, score, count), notes)


def _best_pruned(task: Task, score: str) -> CompressionPlan:
    """`fraction: auto`: of all counts that can meet the budget, the one of least predicted loss.
    Without a profile no loss is known, and the least count that can meet it is taken."""
    best: tuple[float, CompressionPlan] | None = None
    tried, last = [], None
    for count in structure.steps(task):
        try:
            plan = _pruned(task, score, count)
        except RecipeError as error:
            last = error
            continue
        if task.profile is None:
            return plan
        loss = predicted_loss(plan, task.profile)
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


def price_of_granularity(task: Task, plan: CompressionPlan) -> str:
    """What it costs that the target takes one width per layer or model: beside the finest mix, a
    width for each projection group of each expert, under the same budget; before the first profile
    in bytes alone. "" where the target takes that."""
    terms, profile = task.terms, task.profile
    coarse = terms.rules.granularity
    if profile is None:
        return bytes_of_granularity(task)
    if not terms.rules.widths or coarse == "projection":
        return ""
    finer = replace(terms, rules=replace(terms.rules, granularity="projection"))
    finest = _plan(replace(task, terms=finer))
    if len(terms.policy.bits) > 1:
        here, there = (predicted_loss(one, profile) for one in (plan, finest))
        return (
            f"one width per {coarse}: predicted loss {here:.4g}; the finest mix, a width for each "
            f"projection group, has {there:.4g} within the same budget"
        )
    more = plan.bits_per_weight - finest.bits_per_weight
    if more <= 0:
        return ""
    return (
        f"one width per {coarse}: {more:.3f} bits per expert weight more than the finest mix, "
        "which keeps the protected experts alone"
    )


def _with_structure(
    task: Task, decisions: Sequence[ExpertDecision], notes: tuple[str, ...]
) -> CompressionPlan:
    """The plan in which `decisions` hold for the experts that they name, and bits are planned for
    what is left of the model."""
    if not decisions:
        return plan_bits(task)
    whole = CompressionPlan(
        target=task.terms.recipe.target,
        scheme=task.terms.scheme,
        bits_per_weight=0.0,
        size_bytes=0,
        source_size_bytes=task.source.size_bytes,
        protected=tuple(sorted(task.protected)),
        profile_digest="",
        notes=notes,
        experts=tuple(renumbered(structure.complete(task.source, decisions))),
    )
    check_structure(task.source, whole, "policy")
    whole = replace(whole, notes=notes + structure.new_names(whole))
    return restored(whole, plan_bits(_left(task, whole)))


def _left(task: Task, plan: CompressionPlan) -> Task:
    """The task of planning bits for the model that `plan` leaves, in its own ids."""
    small = shrink(task.source, plan)
    known = shrunk_profile(task.profile, plan, small) if task.profile else None
    reasons = ((new, task.protected.get(old[0])) for new, old in small.origin.items())
    kept = {new: why for new, why in reasons if why is not None}
    return Task(small.source, known, task.terms, kept)


def curve_of(task: Task, plan: CompressionPlan) -> tuple[CurvePoint, ...]:
    """What other budgets would buy for the model as the plan leaves it, see `cost_curve`."""
    kept = {i: why for i, why in task.protected.items() if i in plan.protected}
    return cost_curve(_left(replace(task, protected=kept), plan))
