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


def contested(checkpoints: Sequence[CheckpointSummary]) -> dict[str, float]:
    """The strictest limit of each gate whose limit is not the same for all of them."""
    found: dict[str, float] = {}
    for name, bound in BOUNDS.items():
        checks = (one.by_name.get(name) for one in checkpoints)
        limits = {check.limit for check in checks if check is not None and check.limit is not None}
        if len(limits) > 1:
            found[name] = min(limits) if bound.upper else max(limits)
    return found


def missed(checkpoint: CheckpointSummary, strictest: Mapping[str, float]) -> tuple[str, ...]:
    """The gates that it did not pass, or would not have passed under these limits."""
    return tuple(name for name, limit in strictest.items() if not _meets(checkpoint, name, limit))


def _meets(checkpoint: CheckpointSummary, name: str, limit: float) -> bool:
    check = checkpoint.by_name.get(name)
    if check is None or check.value is None or check.limit is None:
        return False
    return check.value <= limit if BOUNDS[name].upper else check.value >= limit


def undecided(checkpoint: CheckpointSummary, strictest: Mapping[str, float]) -> int:
    """How many gates say less of it than they could: not run, without a limit, or with a looser
    limit than the strictest."""
    return sum(
        check.passed is None or unlimited(check) or check.limit != strictest.get(name, check.limit)
        for name, check in checkpoint.by_name.items()
    )
