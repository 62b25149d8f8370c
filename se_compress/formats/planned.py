"""One tensor of a result, before it is written: what a blueprint lists and a format describes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from se_compress.artifacts import TensorInfo
from se_compress.opening.headers import Slot

Making = Literal["copied", "decoded", "made", "packed", "repaired"]
# A part of a stored matrix: suffix, safetensors dtype, shape.
StoredPart = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the model that the plan leaves, and what the result stores for it.

    info        the tensor as that model has it; one that surgery makes is in no file
    name        its name in the result, before it is taken apart into stored parts
    bits        its width; SOURCE_BITS for the source's own precision
    making      copied: the source's own bytes; decoded: those of a source that codes its weights
                (decoding.py); made: by surgery, or a bias of zero (splice.py); packed: quantised;
                repaired: solved anew where experts went (compression/repair.py)
    size_bytes  of all that is stored of it
    parts       what a packed matrix is taken apart into; of any other nothing
    live        its name in the live model, where engines may look settings up by that and not by
                `name`; "" where they are the same
    """

    info: TensorInfo
    name: str
    bits: int
    making: Making
    size_bytes: int
    parts: Sequence[StoredPart] = ()
    live: str = ""

    @property
    def stored(self) -> tuple[Slot, ...]:
        """Its tensors in the result: one, or the parts of a packed matrix.

        Made when they are asked for: a plan needs the bytes only, and large models have 150,000.
        """
        if self.making != "packed":
            return (Slot(self.name, self.info.dtype, self.info.shape),)
        stem = self.module
        return tuple(Slot(f"{stem}.{suffix}", dtype, shape) for suffix, dtype, shape in self.parts)

    @property
    def module(self) -> str:
        """The module of a weight, as engines name it."""
        return self.name.removesuffix(".weight")

    @property
    def modules(self) -> tuple[str, ...]:
        """All names of the module of a weight, for settings that list modules."""
        return (self.module, self.live.removesuffix(".weight")) if self.live else (self.module,)

    @property
    def is_linear(self) -> bool:
        """A matrix that some engine could take for quantised. Those of layers for multi-token
        prediction, behind the decoder's, are among them."""
        info = self.info
        table = info.kind == "embedding" and "head" not in info.name
        return (
            info.kind != "norm"
            and not table
            and len(info.shape) == 2
            and info.name.endswith(".weight")
        )
