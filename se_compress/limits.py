"""What the limit of a gate is worth: which side of it is good, and where it decides nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from se_compress.artifacts import Check, CheckpointSummary


class Bound(NamedTuple):
    """`upper`: good values lie below the limit. `harmless`: no result can miss a limit from there
    on; where values have no end, it is far beyond those of a model that babbles."""

    upper: bool
    harmless: float


# A cosine can be negative, so that 0 is a limit.
BOUNDS: Mapping[str, Bound] = {
    "perplexity_increase": Bound(True, 1e6),
    "kl_divergence": Bound(True, 1e3),
    "massive_activation_ratio": Bound(False, 0.0),
    "sink_decay": Bound(True, 1.0),
    "sink_token_error": Bound(True, 1e6),
    "router_agreement": Bound(False, 0.0),
    "router_agreement_least": Bound(False, 0.0),
    "repetition": Bound(True, 1.0),
    "loops": Bound(True, 1.0),
    "weight_cosine": Bound(False, -1.0),
    "weight_gain": Bound(True, 1e6),
    "tensors_accounted": Bound(False, 0.0),
    "reload": Bound(True, math.inf),
}


def unlimited(check: Check) -> bool:
    """It passed, and would have passed whatever had been measured."""
    bound = BOUNDS.get(check.name)
    if bound is None or check.limit is None or not check.passed:
        return False
    return check.limit >= bound.harmless if bound.upper else check.limit <= bound.harmless


def distance(checkpoint: CheckpointSummary) -> float:
    """From the source, in nats; infinite where it is not known."""
    check = checkpoint.by_name.get("kl_divergence")
    return math.inf if check is None or check.value is None else check.value


def missed(checkpoint: CheckpointSummary, all_of_them: Sequence[CheckpointSummary]) -> list[str]:
    """The gates that it passed by looser limits than a result was held to that is at least as near
    to the source, and would not have passed under those."""
    judges = [one for one in all_of_them if distance(one) <= distance(checkpoint)]
    return [
        check.name
        for check in checkpoint.checks
        if any(_stricter(one, check) and not _meets(check, one) for one in judges)
    ]


def undecided(checkpoint: CheckpointSummary, all_of_them: Sequence[CheckpointSummary]) -> int:
    """How many gates say less of it than they could: not run, without a limit, or with a looser
    limit than elsewhere."""
    return sum(
        check.passed is None
        or unlimited(check)
        or any(_stricter(one, check) for one in all_of_them)
        for check in checkpoint.checks
    )


def _stricter(one: CheckpointSummary, check: Check) -> bool:
    """Whether `one` was held to a stricter limit of the gate."""
    limit, bound = _limit(one, check.name), BOUNDS.get(check.name)
    if limit is None or check.limit is None or bound is None:
        return False
    return limit < check.limit if bound.upper else limit > check.limit


def _meets(check: Check, one: CheckpointSummary) -> bool:
    """Whether it would pass with the limit of `one`."""
    limit = _limit(one, check.name)
    if limit is None or check.value is None:
        return False
    return check.value <= limit if BOUNDS[check.name].upper else check.value >= limit


def _limit(one: CheckpointSummary, name: str) -> float | None:
    return one.by_name[name].limit if name in one.by_name else None
