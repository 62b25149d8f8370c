"""One tensor of a result, before it is written: what a blueprint lists and a format describes."""

from dataclasses import dataclass
from typing import Literal

from se_compress.artifacts import TensorInfo
from se_compress.opening.headers import Slot

Making = Literal["copied", "made", "packed"]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the model that the plan leaves, and what the result stores for it.

    info    the tensor as that model has it; one that surgery makes is in no file
    name    its name in the result, before it is taken apart into stored parts
    bits    its width; SOURCE_BITS for the source's own precision
    making  copied: the source's own bytes; made: by surgery (splice.py); packed: quantised
    stored  its parts in the result: one slot, or those of a packed matrix
    """

    info: TensorInfo
    name: str
    bits: int
    making: Making
    stored: tuple[Slot, ...]

    @property
    def size_bytes(self) -> int:
        return sum(slot.size_bytes for slot in self.stored)

    @property
    def module(self) -> str:
        """The module of a weight, as engines name it."""
        return self.name.removesuffix(".weight")

    @property
    def is_linear(self) -> bool:
        """A matrix that some engine could take for quantised. Those of layers for multi-token
        prediction, behind the decoder's, are among them."""
        info = self.info
        kind = info.kind not in ("norm", "embedding") or info.name == "lm_head.weight"
        return kind and len(info.shape) == 2 and info.name.endswith(".weight")
