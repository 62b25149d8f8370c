"""Bits under a budget: at how many every expert is stored. Pure Python, no torch.

The budget of the free units (units.py) is what the given one leaves: a plan with every unit at the
least bits is measured by its blueprint, to the byte.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, floor

from se_compress.artifacts import (
    NO_BITS,
    SOURCE_BITS,
    CompressionPlan,
    ExpertId,
)
from se_compress.engines.targets import check_grid
from se_compress.errors import RecipeError
from se_compress.planning.decisions import write_plan
from se_compress.planning.knapsack import choose
from se_compress.planning.terms import check_bits
from se_compress.planning.units import ExpertBits, Task, unit_of
from se_compress.recipe import Recipe


def plan_bits(task: Task) -> CompressionPlan:
    """The plan of least predicted loss for all experts of a model. Without a profile the bits are
    an estimate, the most that fit all.

    Raises RecipeError for what the target cannot load and for a budget that cannot be met.
    """
    terms = task.terms
    if terms.recipe.quantization.method == "none":
        return _unquantized(replace(task, protected={}))
    check_grid(task.source, terms.rules, terms.scheme)
    check_bits(terms)
    _check_measured(task)
    task = with_raised(task)
    least = write_plan(task, task.least_bits)
    expert_bits, notes = _solve(task, least)
    plan = least if expert_bits == task.least_bits else write_plan(task, expert_bits)
    return replace(plan, notes=(*notes, *_price_of_protection(task, expert_bits)))


def _check_measured(task: Task) -> None:
    """The profile has losses of the widths that are asked for. Raises RecipeError."""
    policy, profile = task.terms.policy, task.profile
    if profile is None or not profile.widths:
        return
    unknown = sorted({*policy.bits} - {SOURCE_BITS} - profile.widths)
    if unknown:
        measured = sorted(profile.widths - {NO_BITS})
        raise RecipeError(
            f"policy.bits lists {', '.join(map(str, unknown))}; the profile has the losses of "
            f"{', '.join(map(str, measured))} alone: it was measured for another recipe"
        )


def _unquantized(task: Task) -> CompressionPlan:
    """The plan that keeps every weight."""
    policy = task.terms.policy
    if policy.other_bits != SOURCE_BITS:
        raise RecipeError(
            f"policy.other_bits is {policy.other_bits}; quantization.method none keeps "
            f"{SOURCE_BITS}"
        )
    plan = write_plan(task, task.uniform(SOURCE_BITS))
    over_size = policy.size is not None and plan.size_bytes > policy.size
    over_bits = policy.bits_per_weight is not None and plan.bits_per_weight > policy.bits_per_weight
    if over_size or over_bits:
        why = "quantization.method none keeps every weight"
        raise RecipeError(_over_budget(task.terms.recipe, plan, why))
    return plan


# --------------------------------------------------------------------------------------- solving


def _solve(task: Task, least: CompressionPlan) -> tuple[ExpertBits, tuple[str, ...]]:
    """Bits within the budget, and what is to be said of them.

    least  the plan of every free unit at the least bits
    """
    room = _room(task, least)
    if room is not None and _cost_of_option(task, 0) > room:
        raise RecipeError(_impossible(task, least))
    if len(task.allowed) == 1:
        return task.least_bits, ()
    if room is None:
        raise RecipeError(
            f"policy.bits lists the widths {task.allowed}: a budget is needed to choose, "
            "policy.bits_per_weight or policy.size"
        )
    if task.profile is None:
        note = "no profile yet: the widths are an estimate, the widest that fits all"
        return task.uniform(_most(task, room)), (note,)
    choice = choose(task.items, room)
    if choice is None:
        raise RuntimeError("no choice of bits fits, though the least do")
    gap = choice.loss / choice.bound - 1 if choice.bound > 0 else 0.0
    note = (
        f"widths {task.allowed} mixed within the budget: predicted loss {choice.loss:.4g}, at most "
        f"{gap:.2%} from the optimum; {room - choice.cost:,} bytes of the budget are left"
    )
    return task.mixed(choice.picks), (note,)


def _room(task: Task, least: CompressionPlan) -> int | None:
    """Bytes that the budget leaves for the free units; None if the recipe sets no budget."""
    policy = task.terms.policy
    if policy.size is not None:
        return policy.size - (least.size_bytes - _cost_of_option(task, 0))
    if policy.bits_per_weight is None:
        return None
    limit = floor(policy.bits_per_weight * task.weights(task.routed) / 8)
    return limit - task.stored((i for i in task.routed if i in task.fixed), task.least_bits)


def _cost_of_option(task: Task, index: int) -> int:
    """Bytes of all free units at the allowed bits of one index."""
    return sum(options[index].cost for options in task.items)


def _most(task: Task, room: int) -> int:
    """The most bits that all free units can have alike."""
    costs = enumerate(task.allowed)
    return [bits for k, bits in costs if _cost_of_option(task, k) <= room][-1]


def _impossible(task: Task, least: CompressionPlan) -> str:
    """Why the budget cannot be met; the least is rounded up, so that it is possible as written."""
    fixed = f"{_fixed(task)} at {task.terms.policy.protected_bits} bits and all other "
    why = (
        f"{fixed if task.fixed else 'all '}experts at {task.allowed[0]} bits, with scales in "
        f"groups of {task.terms.scheme.group_size}"
    )
    return _over_budget(task.terms.recipe, least, why)


def _over_budget(recipe: Recipe, least: CompressionPlan, why: str) -> str:
    if recipe.policy.size is None:
        bits = f"{ceil(least.bits_per_weight * 1000) / 1000:.3f}"
        given = str(recipe.policy.bits_per_weight)
        return f"policy.bits_per_weight is {given}, but {bits} is the least possible: {why}"
    unit, scale = ("GB", 10**9) if least.size_bytes >= 10**9 else ("MB", 10**6)
    size = f"{ceil(least.size_bytes * 10_000 / scale) / 10_000:.4f} {unit}"
    return (
        f"policy.size is {recipe.policy.size / scale:.4f} {unit}, but {size} is the least "
        f"possible: {why}, the rest of the model unchanged"
    )


# ------------------------------------------------------------------------------------ fixed bits


def with_raised(task: Task) -> Task:
    """The task with `raised`: where the target takes one number of bits per layer, the other
    experts of a layer with a protected one, which get its bits. That is expensive: it needs the
    policy's leave."""
    rules, policy = task.terms.rules, task.terms.policy
    if rules.granularity == "model":
        _check_one_width(task)
    if rules.granularity != "layer":
        return task
    bits = policy.protected_bits
    first = {i.layer: i for i in sorted(task.protected, reverse=True) if i.expert != "shared"}
    whole = [i for i in task.routed if i.layer in first]
    raised = {
        i: f"lifted to {bits} bits with expert {first[i.layer]}: target {rules.target} loads one "
        "width per layer"
        for i in whole
        if i not in task.protected
    }
    if raised and not policy.lift_layers and set(policy.bits) != {bits}:
        raise RecipeError(_without_leave(task, first, whole))
    return replace(task, raised=raised)


def _without_leave(task: Task, first: Mapping[int, ExpertId], whole: list[ExpertId]) -> str:
    """What raising whole layers would cost.

    first  layer -> the protected expert that makes it necessary
    whole  all routed experts of these layers
    """
    policy, target = task.terms.policy, task.terms.rules.target
    bits, least = policy.protected_bits, min(policy.bits)
    unit = unit_of(whole)
    more = task.cost(unit, bits) - task.cost(unit, least)
    share = 8 * more / task.weights(task.routed)
    alike = "policy.protected_bits: 8, " if set(policy.bits) == {8} else ""
    return (
        f"target {target} loads one width per layer: for the protected "
        f"{', '.join(map(str, first.values()))} all experts of layer "
        f"{', '.join(map(str, sorted(first)))} would have to be lifted from {least} to {bits} "
        f"bits, {more / 1e6:.1f} MB or {share:.3f} bits per "
        f"expert weight; accepted are policy.lift_layers: true, {alike}policy.protect: none, "
        "and a target with a width per expert"
    )


def _check_one_width(task: Task) -> None:
    bits, rules = task.terms.policy.protected_bits, task.terms.rules
    routed = sorted(identity for identity in task.protected if identity.expert != "shared")
    if routed and set(task.terms.policy.bits) != {bits}:
        raise RecipeError(
            f"expert {routed[0]} keeps {bits} bits; as {rules.format}, target {rules.target} loads "
            "one width for all experts of a model: accepted are policy.protect none and another "
            "quantization.format"
        )


def _fixed(task: Task) -> str:
    raised = f" and {len(task.raised)} lifted with them" if task.raised else ""
    return f"{len(task.protected)} protected{raised}"


def _price_of_protection(task: Task, expert_bits: ExpertBits) -> tuple[str, ...]:
    """What the experts of fixed bits take beyond the average of the others."""
    fixed = [identity for identity in expert_bits if identity in task.fixed]
    others = [identity for identity in expert_bits if identity not in task.fixed]
    if not fixed or not others:
        return ()
    average = task.stored(others, expert_bits) / task.weights(others)
    more = task.stored(fixed, expert_bits) - average * task.weights(fixed)
    share = 8 * more / task.weights(expert_bits)
    return (
        f"protection: {_fixed(task)} at {task.terms.policy.protected_bits} bits; {more:,.0f} bytes "
        f"or {share:.4f} bits per expert weight more than at the others' average of "
        f"{8 * average:.3f} bits",
    )
