"""Limits of several results beside each other: who passed only because its own were looser."""

import math
from collections.abc import Sequence

from se_compress.artifacts import GATES, Check, CheckpointSummary, unlimited


def distance(checkpoint: CheckpointSummary) -> float:
    """From the source, in nats; infinite where it is not known."""
    return math.inf if checkpoint.distance is None else checkpoint.distance


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
    limit, gate = _limit(one, check.name), GATES.get(check.name)
    if limit is None or check.limit is None or gate is None:
        return False
    return gate.is_stricter(limit, check.limit)


def _meets(check: Check, one: CheckpointSummary) -> bool:
    """Whether it would pass with the limit of `one`."""
    limit = _limit(one, check.name)
    if limit is None or check.value is None:
        return False
    return GATES[check.name].meets(check.value, limit)


def _limit(one: CheckpointSummary, name: str) -> float | None:
    return one.by_name[name].limit if name in one.by_name else None
