"""Which experts are protected, what that made of them, and what a reader has to know of it."""

from collections.abc import Iterator

from se_compress.artifacts import (
    GONE,
    SOURCE_BITS,
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    ExpertProfile,
    Rescue,
    surprise,
)
from se_compress.planning.structure import listed
from se_compress.planning.units import Task
from se_compress.recipe import Recipe

ALL_BUT = "all-but-super-experts"
NAMED = 8  # experts that a note names


def protected_experts(task: Task) -> dict[ExpertId, str]:
    """The protected experts and why. Raises RecipeError for one that is not there."""
    source, profile, recipe = task.source, task.profile, task.terms.recipe
    protect, bits = recipe.policy.protect, recipe.policy.protected_bits
    expected = listed(source, recipe.super_experts.expected, "super_experts.expected")
    reasons: dict[ExpertId, str] = {}
    if isinstance(protect, tuple):
        for identity in listed(source, protect, "policy.protect"):
            kept = SOURCE_BITS if identity.expert == "shared" else bits
            reasons[identity] = f"protected at {kept} bits: listed in policy.protect"
    elif protect == "super-experts" and profile is not None:
        for expert in profile.super_experts:
            state = {True: "confirmed", False: "not confirmed", None: "not asked to confirm"}
            reasons[expert.id] = (
                f"protected at {bits} bits: super expert, peak {expert.peak:.0f} on channel "
                f"{expert.channel} at position {expert.position}, {state[expert.confirmed]}"
            )
    elif protect == ALL_BUT:
        lowered = {expert.id for expert in profile.super_experts} if profile else set(expected)
        for identity in source.experts:
            if identity not in lowered:
                reasons[identity] = f"protected at {bits} bits: no super expert"
    elif protect == "super-experts":
        for identity in expected:
            reasons[identity] = f"protected at {bits} bits: expected, not profiled yet"
    return reasons


def rescued(plan: CompressionPlan, bare: CompressionPlan) -> tuple[Rescue, ...]:
    """The protected experts of `plan` that are worse off in `bare`, the plan without protection."""
    pairs = ((plan.by_id[i], bare.by_id[i]) for i in plan.protected)
    return tuple(
        Rescue(without.layer, without.expert, without.action, without.bits, without.reason)
        for with_it, without in pairs
        if _least(without) < _least(with_it) or (_is_gone(without) and not _is_gone(with_it))
    )


def _least(decision: ExpertDecision) -> int:
    return min(decision.bits_of("gate"), decision.bits_of("down"))


def _is_gone(decision: ExpertDecision) -> bool:
    return decision.action in GONE


def protection_notes(
    plan: CompressionPlan, profile: ExpertProfile | None, recipe: Recipe
) -> tuple[str, ...]:
    """What a reader has to know of the super experts and of what protection did."""
    return tuple(_notes(plan, profile, recipe))


def _notes(plan: CompressionPlan, profile: ExpertProfile | None, recipe: Recipe) -> Iterator[str]:
    protect, expected = recipe.policy.protect, recipe.super_experts.expected
    if protect == "none":
        yield "policy.protect is none: super experts are treated like any other expert"
    if protect == ALL_BUT:
        yield "an experiment: super experts alone are treated, the others are protected"
    if profile is None:
        if protect == "super-experts":
            yield _unprofiled(len(expected))
        return
    if protect == "super-experts" and not profile.super_experts:
        yield "the profile found no super expert, so none is protected"
    if said := surprise(profile, recipe.super_experts.expected_ids):
        yield said
    yield from _fates(plan, profile)


def _unprofiled(expected: int) -> str:
    if expected:
        return f"no profile yet: the {expected} experts of super_experts.expected are protected"
    return "no profile yet: super experts are not known, so none is protected in this estimate"


def _fates(plan: CompressionPlan, profile: ExpertProfile) -> Iterator[str]:
    """Super experts that were rescued, or are taken all the same; and undecided ones that go."""
    gone = [one for one in plan.rescued if one.action in GONE]
    for one in gone[:NAMED]:
        yield f"rescued by protection: expert {one.id} would be gone ({one.reason})"
    if len(gone) > NAMED:
        yield f"rescued by protection: {len(gone) - NAMED} more experts would be gone"
    taken = {one.id for one in profile.super_experts} - set(plan.protected)
    for decision in plan.experts:
        if decision.id in taken and _is_gone(decision):
            yield f"super expert {decision.id} is {GONE[decision.action]}: it is not protected"
    unseen = {
        ExpertId(one.layer, expert)
        for one in profile.undecided
        if one.reason == "no token"
        for expert in one.experts
    }
    if lost := [i for i in sorted(unseen) if _is_gone(plan.by_id[i])]:
        named = ", ".join(map(str, lost[:NAMED])) + (" ..." if len(lost) > NAMED else "")
        yield (
            f"{len(lost)} of the experts that go got no calibration token: whether one of them is "
            f"a super expert is undecided ({named})"
        )
