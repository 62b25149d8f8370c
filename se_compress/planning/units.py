"""What is to be planned: a model, what is known of it, what is wanted of it.

What has bits of its own, what it costs and what it loses is worked out here.

An expert has two projection groups: gate and up together, and down. What has bits of its own is a
*unit*: some projection groups of some experts. The target's granularity says which: one group of
one expert ("projection"), an expert, or all routed experts of a layer or of the model.
Units with a protected expert are fixed. The others are the items of a multiple-choice knapsack: a
number of bits costs the bytes that the file will hold for it, and loses what the profile predicts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from se_compress.artifacts import (
    PROJECTION_GROUPS,
    ExpertId,
    ExpertProfile,
    ModelSource,
    ProjectionGroup,
)
from se_compress.engines.targets import stored_bytes
from se_compress.planning.knapsack import Option
from se_compress.planning.terms import Terms

# What shares its bits: projection groups of experts.
Unit = tuple[tuple[ExpertId, ProjectionGroup], ...]
# The bits of gate and up, and of down, of every routed expert.
ExpertBits = Mapping[ExpertId, tuple[int, int]]


@dataclass(frozen=True)
class Task:
    """One model to plan for: the source, or what surgery leaves of it.

    profile    None before the first one: nothing is predicted then
    protected  the experts that keep `policy.protected_bits`, and why
    raised     those that get them because others have to, and why, see `bits.with_raised`
    """

    source: ModelSource
    profile: ExpertProfile | None
    terms: Terms
    protected: Mapping[ExpertId, str] = field(default_factory=dict)
    raised: Mapping[ExpertId, str] = field(default_factory=dict)

    @cached_property
    def fixed(self) -> dict[ExpertId, str]:
        """The experts that keep `policy.protected_bits`, and why."""
        return {**self.raised, **self.protected}

    @cached_property
    def allowed(self) -> list[int]:
        """The bits that the others may have, least first."""
        return sorted(self.terms.policy.bits)

    @cached_property
    def routed(self) -> list[ExpertId]:
        return [identity for identity in self.source.experts if identity.expert != "shared"]

    @cached_property
    def units(self) -> list[Unit]:
        """The units of free bits, in the order of their experts."""
        granularity = self.terms.rules.granularity
        free = [i for i in self.routed if i not in self.fixed]
        if granularity == "model":
            return [unit_of(free)]
        if granularity == "layer":
            layers = sorted({identity.layer for identity in free})
            return [unit_of(i for i in free if i.layer == layer) for layer in layers]
        if granularity == "expert":
            return [unit_of([identity]) for identity in free]
        return [(group,) for group in unit_of(free)]

    @cached_property
    def items(self) -> list[list[Option]]:
        """An option for each of the allowed bits, by unit; without a profile nothing is lost."""
        return [
            [Option(self.cost(unit, bits), self.loss(unit, bits)) for bits in self.allowed]
            for unit in self.units
        ]

    @cached_property
    def least_bits(self) -> ExpertBits:
        """Every free unit at the least of the allowed bits."""
        return self.uniform(self.allowed[0])

    def cost(self, unit: Unit, bits: int) -> int:
        """Bytes of a unit at some bits."""
        experts, scheme = self.source.experts, self.terms.scheme
        return sum(
            stored_bytes(experts[identity][role], bits, scheme)
            for identity, group in unit
            for role in PROJECTION_GROUPS[group]
        )

    def loss(self, unit: Unit, bits: int) -> float:
        """What the profile predicts that a unit loses at some bits; 0 without one."""
        if self.profile is None:
            return 0.0
        known = self.profile.by_id
        return sum(known[identity].loss_of(group, bits) for identity, group in unit)

    def uniform(self, bits: int) -> ExpertBits:
        """The bits of the routed experts if every free one had these."""
        kept = self.terms.policy.protected_bits
        fixed, free = (kept, kept), (bits, bits)
        return {i: fixed if i in self.fixed else free for i in self.routed}

    def mixed(self, picks: Sequence[int]) -> ExpertBits:
        """The bits of the routed experts if unit i had the allowed ones of index `picks[i]`."""
        mixture = dict(self.least_bits)
        for unit, pick in zip(self.units, picks, strict=True):
            bits = self.allowed[pick]
            for identity, group in unit:
                gate_up, down = mixture[identity]
                mixture[identity] = (gate_up, bits) if group == "down" else (bits, down)
        return mixture

    def stored(self, experts: Iterable[ExpertId], expert_bits: ExpertBits) -> int:
        """Bytes of some experts at the bits that they would have."""
        return sum(
            self.cost(((identity, group),), bits)
            for identity in experts
            for group, bits in zip(PROJECTION_GROUPS, expert_bits[identity], strict=True)
        )

    def weights(self, experts: Iterable[ExpertId]) -> int:
        """Weights of some experts."""
        matrices = self.source.experts
        return sum(
            info.shape[0] * info.shape[1]
            for identity in experts
            for info in matrices[identity].values()
        )


def unit_of(experts: Iterable[ExpertId]) -> Unit:
    """All projection groups of some experts."""
    return tuple((identity, group) for identity in experts for group in PROJECTION_GROUPS)
