"""What everything is keyed by, and the words and numbers that all artefacts share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ExpertIndex = int | Literal["shared"]
Role = Literal["gate", "up", "down"]
ProjectionGroup = Literal["gate_up", "down"]
Action = Literal["keep", "quantize", "prune", "merge", "zero", "average"]
# What an action that leaves an expert other weights, or none, made of it.
GONE: Mapping[Action, str] = {
    "prune": "pruned",
    "merge": "merged",
    "zero": "set to zero",
    "average": "averaged with another",
}
ROLES: tuple[Role, ...] = ("gate", "up", "down")
PROJECTION_GROUPS: Mapping[ProjectionGroup, tuple[Role, ...]] = {
    "gate_up": ("gate", "up"),
    "down": ("down",),
}

# The width that stands for the source's own precision, whatever that is; and for nothing being
# left of a weight.
SOURCE_BITS = 16
NO_BITS = 0
# In a result, the directory of what we say about it.
OURS = "se_compress"
# Of a field that is written to JSON only where it says something.
UNLESS_NONE: Mapping[str, bool] = {"unless_none": True}


@dataclass(frozen=True, slots=True)
class ExpertId:
    """One expert.

    layer   decoder layer, absolute: 0-based, dense layers counted
    expert  index within the layer, or "shared"
    """

    layer: int
    expert: ExpertIndex

    @property
    def sort_key(self) -> tuple[int, bool, int]:
        """Layer first, routed experts by index, the shared expert last."""
        routed = isinstance(self.expert, int)
        return (self.layer, not routed, self.expert if isinstance(self.expert, int) else 0)

    def __lt__(self, other: "ExpertId") -> bool:
        return self.sort_key < other.sort_key

    def __str__(self) -> str:
        return f"({self.layer}, {self.expert})"
