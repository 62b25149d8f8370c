"""The lines of a plan: what becomes of each expert and each other linear, and the reason for it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from se_compress.artifacts import (
    SOURCE_BITS,
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    OtherDecision,
    TensorInfo,
)
from se_compress.engines.blueprint import bits_per_weight, list_tensors, size_bytes
from se_compress.engines.targets import is_other_linear, unpackable
from se_compress.planning.units import ExpertBits, Task, Unit, unit_of

_PREDICTED = {
    "model": "one width for all: predicted loss",
    "layer": "predicted loss of the whole layer",
    "expert": "predicted loss",
}


def write_plan(task: Task, expert_bits: ExpertBits) -> CompressionPlan:
    """The plan that gives the routed experts these bits."""
    predicted = _predictions(task)
    unmeasured = CompressionPlan(
        target=task.terms.recipe.target,
        scheme=task.terms.scheme,
        bits_per_weight=0.0,
        size_bytes=0,
        source_size_bytes=task.source.size_bytes,
        protected=tuple(sorted(task.protected)),
        profile_digest=task.profile.digest if task.profile else "",
        notes=(),
        experts=tuple(_decide(task, i, expert_bits, predicted) for i in task.source.experts),
        others=tuple(_others(task)),
    )
    tensors = list_tensors(task.source, unmeasured).values()
    return replace(
        unmeasured, bits_per_weight=bits_per_weight(tensors), size_bytes=size_bytes(tensors)
    )


def _others(task: Task) -> Iterator[OtherDecision]:
    """The linears of attention and dense MLPs; no lines for them where all keep their precision."""
    if task.terms.policy.other_bits == SOURCE_BITS:
        return
    for info in filter(is_other_linear, task.source.tensors.values()):
        bits, reason = _other_bits(task, [info])
        yield OtherDecision(info.name, bits, reason)


def _other_bits(task: Task, matrices: Iterable[TensorInfo]) -> tuple[int, str]:
    """`policy.other_bits`, or SOURCE_BITS where one of the matrices cannot be packed, and why."""
    bits, terms = task.terms.policy.other_bits, task.terms
    for info in matrices:
        if bits != SOURCE_BITS and (obstacle := unpackable(info, terms.rules, terms.scheme)):
            return SOURCE_BITS, f"kept in {SOURCE_BITS} bits: {obstacle}"
    return bits, f"policy.other_bits is {bits}"


def _decide(
    task: Task, identity: ExpertId, expert_bits: ExpertBits, predicted: dict[ExpertId, str]
) -> ExpertDecision:
    """The line of one expert; a shared one, of which `expert_bits` say nothing, has those of other
    linears."""
    bits, down = expert_bits.get(identity, (SOURCE_BITS, SOURCE_BITS))
    reason = task.fixed.get(identity)
    if identity.expert == "shared" and reason is None:
        bits, reason = _other_bits(task, task.source.experts[identity].values())
        down, reason = bits, f"shared expert, every token passes it: {reason}"
    return ExpertDecision(
        identity.layer,
        identity.expert,
        "keep" if bits == down == SOURCE_BITS else "quantize",
        bits,
        reason or predicted.get(identity) or _plain_reason(task, bits),
        down_bits=down if down != bits else None,
    )


def _plain_reason(task: Task, bits: int) -> str:
    if task.terms.recipe.quantization.method == "none":
        return "quantization.method is none"
    return f"uniform width {bits}"


def _predictions(task: Task) -> dict[ExpertId, str]:
    """What the allowed bits are predicted to cost each free expert; nothing where none was chosen
    by that."""
    unchosen = task.terms.recipe.quantization.method == "none" or len(task.allowed) == 1
    if unchosen or task.profile is None:
        return {}
    granularity = task.terms.rules.granularity
    if granularity == "projection":
        free = (i for i in task.routed if i not in task.fixed)
        return {i: _prediction_by_group(task, i) for i in free}
    said = ((unit, f"{_PREDICTED[granularity]} {_prediction(task, unit)}") for unit in task.units)
    return {identity: text for unit, text in said for identity, _ in unit}


def _prediction_by_group(task: Task, identity: ExpertId) -> str:
    gate_up, down = (_prediction(task, (group,)) for group in unit_of([identity]))
    return f"predicted loss of gate and up {gate_up}; of down {down}"


def _prediction(task: Task, unit: Unit) -> str:
    losses = ", ".join(f"{task.loss(unit, bits):.3g} at {bits}" for bits in task.allowed)
    return f"{losses} bits"
