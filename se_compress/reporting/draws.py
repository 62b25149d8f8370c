"""Variants that differ by a seed alone are draws of one experiment: their means, with intervals."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from se_compress.artifacts import GATES, ComparedVariant

SEED = "policy.zero_seed"
RATIO = "perplexity, result / source"


@dataclass(frozen=True)
class Mean:
    """Mean of some draws; `half` is half of its 95 % interval by Student's t, None for one draw."""

    value: float
    half: float | None


@dataclass(frozen=True)
class Draws:
    """One experiment.

    name     what was set to zero
    count    draws
    means    measure -> its mean, for what every draw has
    """

    name: str
    count: int
    means: Mapping[str, Mean]


def draws_of(variants: Sequence[ComparedVariant]) -> list[Draws]:
    """The experiments among the variants in which experts are set to zero, in their order."""
    groups: dict[str, list[ComparedVariant]] = {}
    for variant in variants:
        if variant.zeroed and not variant.removed:
            changes = {k: v for k, v in variant.changes.items() if k != SEED}
            groups.setdefault(json.dumps(changes, sort_keys=True), []).append(variant)
    return [_summary(members) for members in groups.values()]


def _summary(members: Sequence[ComparedVariant]) -> Draws:
    zeroed = members[0].changes.get("policy.zero", "")
    columns = [_measures(member) for member in members]
    shared = [name for name in columns[0] if all(name in column for column in columns)]
    return Draws(
        name=str(json.loads(zeroed)) if zeroed else members[0].name,
        count=len(members),
        means={name: mean_of([column[name] for column in columns]) for name in shared},
    )


def _measures(variant: ComparedVariant) -> dict[str, float]:
    """What was measured of a variant, by title."""
    one = variant.checkpoint
    found: dict[str, float] = {}
    if one.perplexity_result and one.perplexity_source:
        found[RATIO] = one.perplexity_result / one.perplexity_source
    for check in one.checks:
        if check.name in GATES and check.value is not None and math.isfinite(check.value):
            found[GATES[check.name].title] = check.value
    return found


def mean_of(values: Sequence[float]) -> Mean:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Mean(mean, None)
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(mean, float(t.ppf(0.975, len(values) - 1)) * error)
