"""How to run, as against what to make: none of it is in the recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run, and which of them this one is.

    rank   of this process; 0 decides and publishes
    count  how many there are
    """

    rank: int = 0
    count: int = 1


ALONE = Ranks()


@dataclass(frozen=True)
class RunOptions:
    """How to run. Nothing in here changes the result beyond float round-off.

    device        "cpu", "cuda" or "cuda:N"
    work          directory for saved progress; None: nothing is saved
    batch_tokens  tokens that go through a layer at once
    states_in     directory in whose files hidden states are kept, not in memory; CPU only
    keep_code     the result keeps `auto_map` and the Python files that it names
    notice        called with a sentence when saved progress cannot be used
    progress      called with stage, steps done, steps in all
    ranks         the processes that share the work; they decide no byte of the result
    """

    device: str = "cpu"
    work: Path | None = None
    batch_tokens: int = 1024
    states_in: Path | None = None
    keep_code: bool = False
    notice: Callable[[str], None] = lambda sentence: None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    ranks: Ranks = ALONE

    @property
    def on_disk(self) -> bool:
        """Hidden states are kept in files."""
        return self.states_in is not None
