"""plan.json: what becomes of every expert, and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from se_compress.artifacts.ids import (
    NO_BITS,
    SOURCE_BITS,
    UNLESS_NONE,
    Action,
    ExpertId,
    ExpertIndex,
    Role,
)
from se_compress.artifacts.source import TensorInfo


@dataclass(frozen=True)
class Scheme:
    """How every quantised matrix of a plan is stored, whatever its width.

    format        file format, see targets.py; "source" if nothing is quantised
    method        how the codes are found
    group_size    input columns that share a scale; -1: one scale per row
    symmetric     one zero for all groups
    data_type     bitsandbytes' nf4, fp4 or int8
    double_quant  bitsandbytes' scales are quantised themselves
    """

    format: str
    method: str
    group_size: int
    symmetric: bool
    data_type: str | None = field(default=None, metadata=UNLESS_NONE)
    double_quant: bool | None = field(default=None, metadata=UNLESS_NONE)


@dataclass(frozen=True)
class ExpertDecision:
    """What becomes of one expert, and why.

    layer, expert  the expert, see ExpertId
    action      keep, quantize, prune, merge, zero or average: the experts of a layer that have it
                become their average, each in its own place
    reason      why, in a sentence
    bits        width of gate_proj and up_proj, 16 for the source's own precision; None for a pruned
                expert
    down_bits   width of down_proj where it is another one
    becomes     its index in the result where experts of its layer go; None: as before
    share       its weight in the average, for merge and average: those that become one add up to 1
    """

    layer: int
    expert: ExpertIndex
    action: Action
    bits: int | None
    reason: str
    down_bits: int | None = field(default=None, metadata=UNLESS_NONE)
    becomes: int | None = field(default=None, metadata=UNLESS_NONE)
    share: float | None = field(default=None, metadata=UNLESS_NONE)

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)

    def bits_of(self, role: Role) -> int:
        """The width of one of the three projections; NO_BITS of a pruned expert."""
        bits = self.down_bits if role == "down" and self.down_bits is not None else self.bits
        return NO_BITS if bits is None else bits


@dataclass(frozen=True)
class OtherDecision:
    """The width of a linear that belongs to no expert (attention, dense MLP).

    name    of its weight, as in the source
    bits    16 for the source's own precision
    reason  why, in a sentence
    """

    name: str
    bits: int
    reason: str


@dataclass(frozen=True)
class Rescue:
    """A protected expert that the score or the budget would have taken.

    layer, expert  the expert, see ExpertId
    action      what would have become of it without any protection
    bits        at how many; None for a pruned expert
    reason      why, as that plan has it
    """

    layer: int
    expert: ExpertIndex
    action: Action
    bits: int | None
    reason: str

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)


@dataclass(frozen=True)
class CompressionPlan:
    """plan.json: readable, editable, handed back with `--plan`.

    target            the engine that has to load the result, or a list of those that all have to
    scheme            how what is quantised is stored
    bits_per_weight   over all weights of the routed experts, scales and indices included
    size_bytes        all tensor data of the checkpoint as the export will write it
    source_size_bytes  the same of the source
    protected         experts that must not be lowered, pruned or merged away
    profile_digest    of the profile it was made from; "" without one
    notes             what a reader has to know, a sentence each
    experts           one line an expert, shared ones included
    others            linears of attention and dense MLPs; those without a line stay as they are
    rescued           the protected experts to which protection made a difference; none without a
                      profile
    repaired          true: the experts that are left make up for those that went, but for the
                      protected ones
    """

    target: str | tuple[str, ...]
    scheme: Scheme
    bits_per_weight: float
    size_bytes: int
    source_size_bytes: int
    protected: tuple[ExpertId, ...]
    profile_digest: str
    notes: tuple[str, ...]
    experts: tuple[ExpertDecision, ...]
    others: tuple[OtherDecision, ...] = ()
    rescued: tuple[Rescue, ...] = ()
    repaired: bool | None = field(default=None, metadata=UNLESS_NONE)

    @cached_property
    def by_id(self) -> dict[ExpertId, ExpertDecision]:
        return {decision.id: decision for decision in self.experts}

    @cached_property
    def by_name(self) -> dict[str, OtherDecision]:
        return {decision.name: decision for decision in self.others}

    def noting(self, notes: Iterable[str]) -> "CompressionPlan":
        """The plan with further notes; none is said twice."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))

    def bits_of(self, info: TensorInfo) -> int:
        """The width of a tensor of the model whose experts the plan lists."""
        if info.name in self.by_name:
            return self.by_name[info.name].bits
        if info.role is None or info.layer is None or info.expert is None:
            return SOURCE_BITS
        decision = self.by_id.get(ExpertId(info.layer, info.expert))
        return (decision.bits_of(info.role) if decision else NO_BITS) or SOURCE_BITS


@dataclass(frozen=True)
class CurvePoint:
    """What one budget would buy.

    widths           one: all unprotected experts have it; several: the best mixture of these
    bits_per_weight, size_bytes   as in CompressionPlan
    predicted_loss   sum over experts and projection groups of what their widths lose, see
                     ExpertStats; None without a profile, and for widths that it did not
                     measure
    """

    widths: tuple[int, ...]
    bits_per_weight: float
    size_bytes: int
    predicted_loss: float | None
