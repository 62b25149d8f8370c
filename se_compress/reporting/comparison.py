"""Several results of one model side by side: who passed, what each cost, and which one to ship."""

import json
from collections.abc import Mapping, Sequence

from se_compress.artifacts import (
    GONE,
    Action,
    CheckpointSummary,
    ComparedVariant,
    Comparison,
    CompressionPlan,
    ExpertId,
    ExpertProfile,
)
from se_compress.artifacts.targets import spoken
from se_compress.recipe import Recipe, flatten
from se_compress.reporting.limits import distance, missed, undecided
from se_compress.request import Outcome

# Sizes that differ by less are the same to whoever has to choose.
SAME_SIZE = 1.02


def summarize(outcome: Outcome, name: str, directory: str) -> CheckpointSummary:
    """One checkpoint in numbers, under a variant's name.

    directory   as the reader will see it
    """
    profile, plan, validation = outcome.profile, outcome.plan, outcome.validation
    fates = [plan.by_id[one.id].action for one in profile.super_experts]
    return CheckpointSummary(
        name=name,
        directory=directory,
        published=outcome.published,
        target=spoken(plan.target),
        method=plan.scheme.method,
        size_bytes=validation.size_bytes,
        source_size_bytes=validation.source_size_bytes,
        bits_per_weight=plan.bits_per_weight,
        perplexity_source=validation.perplexity_source if validation.tokens else None,
        perplexity_result=validation.perplexity_result if validation.tokens else None,
        super_experts=len(fates),
        kept=sum(fate not in GONE for fate in fates),
        protected=len(plan.protected),
        checks=validation.checks,
    )


def compare_outcomes(recipe: Recipe, outcomes: Mapping[str, Outcome]) -> Comparison:
    """The comparison of what became of the variants of `recipe`, by their names."""
    variants = [_describe(outcome, name, recipe) for name, outcome in outcomes.items()]
    profile = next(iter(outcomes.values())).profile
    tokens = max(outcome.validation.tokens for outcome in outcomes.values())
    return compare(recipe, profile, tokens, variants)


def _describe(outcome: Outcome, name: str, recipe: Recipe) -> ComparedVariant:
    """A variant as the comparison shows it."""
    common, own = flatten(recipe), flatten(recipe.variants[name])
    return ComparedVariant(
        checkpoint=summarize(outcome, name, outcome.directory.name),
        changes={
            key: json.dumps(value, ensure_ascii=False)
            for key, value in own.items()
            if key != "output" and value != common.get(key)
        },
        removed=_with_action(outcome.plan, "prune", "merge"),
        zeroed=_with_action(outcome.plan, "zero"),
        layers=outcome.validation.layers,
        tail=outcome.validation.tail,
        domains=outcome.validation.domains,
        texts=outcome.validation.texts,
        cautions=outcome.validation.cautions,
    )


def _with_action(plan: CompressionPlan, *actions: Action) -> tuple[ExpertId, ...]:
    return tuple(sorted(d.id for d in plan.experts if d.action in actions))


def compare(
    recipe: Recipe,
    profile: ExpertProfile,
    tokens: int,
    variants: Sequence[ComparedVariant],
) -> Comparison:
    """Judge all variants of a recipe, in its order.

    tokens   how many held-out tokens they were judged on
    """
    checkpoints = [variant.checkpoint for variant in variants]
    published = {one.name for one in checkpoints if one.published}
    first = checkpoints[0]
    return Comparison(
        model=recipe.model,
        passed=bool(published) and published.issuperset(recipe.require),
        required=recipe.require,
        recommended=recommend(variants),
        closest=closest(variants),
        size_bytes=first.source_size_bytes,
        perplexity=next((c.perplexity_source for c in checkpoints if c.perplexity_source), None),
        tokens=tokens,
        super_experts=tuple(one.id for one in profile.super_experts),
        variants=tuple(variants),
    )


def recommend(variants: Sequence[ComparedVariant]) -> str | None:
    """The one to ship: see `Comparison.recommended`."""
    candidates = _candidates(variants)
    sizes = [variant.checkpoint.size_bytes for variant in candidates]
    small = [v for v in candidates if v.checkpoint.size_bytes <= SAME_SIZE * min(sizes)]
    return _nearest(small, variants)


def closest(variants: Sequence[ComparedVariant]) -> str | None:
    """Of those that could be shipped, the one with the least KL divergence.

    Of equals it is the smaller one, then the one of which the gates say more.
    """
    return _nearest(_candidates(variants), variants)


def _nearest(
    candidates: Sequence[ComparedVariant], variants: Sequence[ComparedVariant]
) -> str | None:
    everything = [variant.checkpoint for variant in variants]
    found = min(
        (variant.checkpoint for variant in candidates),
        key=lambda one: (distance(one), one.size_bytes, undecided(one, everything)),
        default=None,
    )
    return found.name if found else None


def _candidates(variants: Sequence[ComparedVariant]) -> list[ComparedVariant]:
    """What could be shipped.

    Experts are set to zero to learn something, not to ship it. What passed by looser limits than a
    result at least as good was held to is left out, unless all did.
    """
    passed = [one for one in variants if one.checkpoint.published and not one.zeroed]
    everything = [variant.checkpoint for variant in variants]
    return [one for one in passed if not missed(one.checkpoint, everything)] or passed
