"""A gate, judged."""

from dataclasses import dataclass, field

from se_compress.artifacts.ids import UNLESS_NONE


@dataclass(frozen=True)
class Check:
    """One gate.

    name        of the gate, a key of `gates.GATES`
    value       what was measured; None if nothing could be
    limit       what the value may not go beyond; None where there is none
    passed      None when the check could not be run
    detail      where the value was found, or why the check was not run
    low, high   95 % interval of the value over the held-out sequences, for the checks that have one
    retry       true if it was the machine that kept it from running: the next run tries again
    """

    name: str
    value: float | None
    limit: float | None
    passed: bool | None
    detail: str = ""
    low: float | None = field(default=None, metadata=UNLESS_NONE)
    high: float | None = field(default=None, metadata=UNLESS_NONE)
    retry: bool | None = field(default=None, metadata=UNLESS_NONE)
