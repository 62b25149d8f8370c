"""The blueprint of a result: for every tensor of it, what it is made from and what is stored.

Drawn once from a source and a plan. Sizes in the plan, the layout on disk, compression, the
engine's settings, validation and the account of tensors all read this one table, so that they
cannot disagree. No weight is read; no torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from se_compress.artifacts import (
    SOURCE_BITS,
    CompressionPlan,
    ExpertId,
    ModelSource,
    TensorInfo,
)
from se_compress.engines.adapting import adapted
from se_compress.engines.targets import engine_name, packed_parts, rules_of, stored_bytes
from se_compress.formats import UNQUANTISED, Making, PlannedTensor
from se_compress.model.surgery import Shrunk, is_made, shrink
from se_compress.opening.families import FAMILIES, Family, live_name, live_prefix
from se_compress.opening.fused import fused, unfused
from se_compress.opening.headers import Slot
from se_compress.opening.merged import merged, parted


@dataclass(frozen=True)
class Blueprint:
    """What a result will hold.

    shrunk   the model that the plan leaves of the source, with what its engine asks for beside
             (adapting.py), and the plan in its ids
    tensors  every tensor of that model, by its name there
    """

    shrunk: Shrunk
    tensors: Mapping[str, PlannedTensor]

    @property
    def source(self) -> ModelSource:
        """The model that the plan leaves."""
        return self.shrunk.source

    @property
    def plan(self) -> CompressionPlan:
        """The plan in the ids of that model."""
        return self.shrunk.plan

    @cached_property
    def names(self) -> dict[str, str]:
        """Tensor of the model -> its name in the result."""
        return {name: tensor.name for name, tensor in self.tensors.items()}

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Everything that is stored, by its name in the result, in the order in which the source
        holds what it is made from."""
        ordered = sorted(self.tensors.values(), key=lambda t: (t.info.file, t.info.begin))
        return {slot.name: slot for tensor in ordered for slot in tensor.stored}

    @cached_property
    def on_disk(self) -> dict[str, Slot]:
        """The tensors of the files: those, or experts fused where the family is published so, and
        what is one in memory as one where the engine looks for names in memory."""
        if self._is_fused:
            return fused(self.slots, self._family)
        return merged(self.slots, self._family) if self._is_merged else self.slots

    def found_in(self, headers: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Where `slots` are in files with these headers."""
        if self._is_fused:
            return unfused(headers, self._family)
        return parted(headers, self.slots, self._family) if self._is_merged else headers

    @property
    def _family(self) -> Family:
        return FAMILIES[self.source.family]

    @property
    def _is_fused(self) -> bool:
        return self._family.published_fused and self.plan.scheme.format == UNQUANTISED

    @property
    def _is_merged(self) -> bool:
        return bool(self._family.merged) and rules_of(self.plan).unfused_names

    @cached_property
    def size_bytes(self) -> int:
        """All tensor data of the result, headers not counted."""
        return size_bytes(self.tensors.values())

    @cached_property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all routed experts; scales, zeros and indices count."""
        return bits_per_weight(self.tensors.values())

    @cached_property
    def linears(self) -> list[PlannedTensor]:
        """The matrices that some engine could take for quantised."""
        return [tensor for tensor in self.tensors.values() if tensor.is_linear]

    def packed(self) -> Iterator[PlannedTensor]:
        """The matrices that are quantised."""
        return (tensor for tensor in self.tensors.values() if tensor.making == "packed")

    def of_layer(self, layer: int | None) -> Sequence[PlannedTensor]:
        """The tensors of one decoder layer; of None, those outside of all layers."""
        return self._by_layer.get(layer, ())

    @cached_property
    def _by_layer(self) -> dict[int | None, list[PlannedTensor]]:
        found: dict[int | None, list[PlannedTensor]] = {}
        for tensor in self.tensors.values():
            found.setdefault(tensor.info.layer, []).append(tensor)
        return found


def draw_blueprint(source: ModelSource, plan: CompressionPlan) -> Blueprint:
    """The blueprint of the result that a consistent plan makes of a source."""
    shrunk = shrink(source, plan)
    shrunk = replace(shrunk, source=adapted(shrunk.source, plan.target))
    return Blueprint(shrunk, list_tensors(shrunk.source, shrunk.plan))


def list_tensors(source: ModelSource, plan: CompressionPlan) -> dict[str, PlannedTensor]:
    """Every tensor of a result, by its name in the source, of a plan without surgery."""
    source = adapted(source, plan.target)
    rules = rules_of(plan)
    family, prefix = FAMILIES[source.family].at(source.prefix), live_prefix(source.config)
    tensors = {}
    for info in source.tensors.values():
        name = engine_name(source, rules, info.name)
        live = "" if family.exact else live_name(family, info.name, prefix)
        planned = _planned(info, name, plan)
        tensors[info.name] = replace(planned, live=live) if live not in ("", name) else planned
    return tensors


def size_bytes(tensors: Iterable[PlannedTensor]) -> int:
    """All tensor data, headers not counted."""
    return sum(tensor.size_bytes for tensor in tensors)


def bits_per_weight(tensors: Iterable[PlannedTensor]) -> float:
    """Stored bits per weight over the routed experts among them."""
    experts = [t for t in tensors if t.info.kind == "expert" and t.info.role is not None]
    weights = sum(tensor.info.shape[0] * tensor.info.shape[1] for tensor in experts)
    return 8 * sum(tensor.size_bytes for tensor in experts) / weights


def _planned(info: TensorInfo, name: str, plan: CompressionPlan) -> PlannedTensor:
    bits = plan.bits_of(info)
    size = stored_bytes(info, bits, plan.scheme)
    if bits == SOURCE_BITS:
        making = "repaired" if _is_repaired(info, plan) else _making(info)
        return PlannedTensor(info, name, bits, making, size)
    parts = packed_parts(info.shape, bits, plan.scheme)
    return PlannedTensor(info, name, bits, "packed", size, parts)


def _is_repaired(info: TensorInfo, plan: CompressionPlan) -> bool:
    """Whether a weight that keeps its precision is solved anew; not of protected experts."""
    if not plan.repaired or info.kind != "expert" or info.role != "down":
        return False
    assert info.layer is not None
    assert info.expert is not None
    return ExpertId(info.layer, info.expert) not in plan.protected


def _making(info: TensorInfo) -> Making:
    if is_made(info):
        return "made"
    return "copied" if info.stored is None else "decoded"
