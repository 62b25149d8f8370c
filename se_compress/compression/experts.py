"""Quantise the routed experts of one loaded layer.

N tokens of the layer, H hidden size, I inner size of an expert, E members of a stack.

Gate and up of an expert see the same input and share one Hessian and one factorisation; down is
calibrated on what the *quantised* gate and up let through. With `calibration.routing: all` every
expert is calibrated on all tokens of the layer, and the gate and up of all experts are rows of one
matrix: the layer has one Hessian for them.

Hessians are made for as many experts at a time as memory allows, from the layer's kept inputs:
nothing grows with the number of experts. The inner states of as many experts are kept until their
outputs are added up, once down is quantised.

The live module's weights are replaced by what the codes stand for, so that the next run of the
layer is that of the compressed model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from se_compress.artifacts import (
    SOURCE_BITS,
    ExpertDecision,
    ExpertId,
    ExpertRecord,
    RefineRecord,
    Role,
    Scheme,
)
from se_compress.compression.refine import Aim, refine_experts
from se_compress.compression.stacks import (
    Packed,
    SolvedExperts,
    SolvedStack,
    StackInputs,
    check_moments,
    filled_hessian,
    pack_in_place,
    packed_members,
    replace_members,
    second_moment,
    stack_inputs,
)
from se_compress.formats import FORMATS
from se_compress.model.experts import RoutedExperts
from se_compress.model.observers import RoutingCapture
from se_compress.model.routing import select_rows
from se_compress.recipe import Recipe

# Float32 elements of all Hessians and stacks that are held at once: 128 MiB on the CPU, which gains
# nothing from more; 1 GiB on a GPU.
STACK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
# Tokens of the layer that stand for "all tokens" when a rarely hit expert's down_proj is
# calibrated.
LAYER_TOKENS = 4096
DOWN: Mapping[Role, slice] = {"down": slice(None)}
# An expert after its quantisation, with its record, its packed matrices, and what `_inner` gives
# for the tokens routed to it.
_Quantized = tuple[int, ExpertRecord, Packed, Tensor]
NameOf = Callable[[ExpertId, Role], str]


@dataclass(frozen=True)
class QuantizedExperts:
    """The routed experts of a layer, quantised.

    tensors  packed matrices, by the names of their weights
    records  by the experts' ids
    output   [N, H] float32: of all routed experts, these and those that keep their precision
    refined  how refining went; None if it was not asked for
    """

    tensors: Packed
    records: list[ExpertRecord]
    output: Tensor
    refined: RefineRecord | None


def quantize_experts(
    name_of: NameOf,
    experts: RoutedExperts,
    capture: RoutingCapture,
    decisions: Sequence[ExpertDecision],
    scheme: Scheme,
    recipe: Recipe,
    aim: Aim | None = None,
) -> QuantizedExperts:
    """Quantise routed experts of one layer, given as the live fused module.

    name_of  expert and projection -> name of the weight
    capture  what the layer's experts see
    aim      what they are refined towards, if the recipe wants that
    """
    output = torch.zeros(capture.hidden.shape, dtype=torch.float32, device=capture.hidden.device)
    refined: RefineRecord | None = None
    if FORMATS[scheme.format].quantize:
        made = _pack_experts(name_of, experts, capture, decisions, scheme)
    else:
        solved: Iterable[SolvedExperts] = _solve_experts(
            experts, capture, decisions, scheme, recipe
        )
        if aim is not None and recipe.quantization.refine is not None:
            before = experts.gate_up_proj.clone(), experts.down_proj.clone()
            solved = list(solved)
            refined = refine_experts(experts, before, solved, aim, recipe.quantization.refine)
        made = _packed_experts(name_of, experts, capture, solved, scheme)
    tensors: Packed = {}
    records: list[ExpertRecord] = []
    left = set(range(len(experts)))
    for expert, record, packed, inner in made:
        tensors |= packed
        records.append(record)
        left.remove(expert)
        _add_output(output, capture, experts, expert, inner)
    for expert in sorted(left):
        _add_output(output, capture, experts, expert, _inner(capture, experts, expert))
    records.sort(key=lambda record: record.id)
    return QuantizedExperts(tensors, records, output, refined)


def _solve_experts(
    experts: RoutedExperts,
    capture: RoutingCapture,
    decisions: Sequence[ExpertDecision],
    scheme: Scheme,
    recipe: Recipe,
) -> Iterator[SolvedExperts]:
    """Solve the experts, those of equal bits together, in place."""
    rule, everyone = recipe.quantization, recipe.calibration.routing == "all"
    for bits, members in _stacks(decisions, experts):
        identities = [ExpertId(decisions[0].layer, expert) for expert in members]
        inputs = _gate_up_inputs(capture, members, everyone, rule.shrinkage)
        check_moments(inputs.hessian, [f"gate and up of expert {i}" for i in identities])
        gate_up = replace_members(experts.gate_up_proj, members, inputs, bits[0], scheme, rule)
        # only now: down sees what the quantised gate and up let through
        inner_inputs, inner = _down_inputs(capture, experts, members, everyone, rule.shrinkage)
        check_moments(inner_inputs.hessian, [f"down of expert {i}" for i in identities])
        down = replace_members(experts.down_proj, members, inner_inputs, bits[1], scheme, rule)
        records = [
            _record(identity, bits, i, inputs, inner_inputs, gate_up, down)
            for i, identity in enumerate(identities)
        ]
        yield SolvedExperts(members, records, gate_up, down, inner)


def _packed_experts(
    name_of: NameOf,
    experts: RoutedExperts,
    capture: RoutingCapture,
    solved: Iterable[SolvedExperts],
    scheme: Scheme,
) -> Iterator[_Quantized]:
    """Pack solved experts."""
    for some in solved:
        for i, (expert, record) in enumerate(zip(some.members, some.records, strict=True)):
            tensors: Packed = {}
            for roles, made in ((experts.roles, some.gate_up), (DOWN, some.down)):
                if made is not None:
                    rows = {name_of(record.id, role): part for role, part in roles.items()}
                    tensors |= packed_members(rows, made.stack, i, scheme.format)
            inner = some.inner[i] if some.inner else _inner(capture, experts, expert)
            yield expert, record, tensors, inner


def _stacks(
    decisions: Sequence[ExpertDecision], experts: RoutedExperts
) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Experts of equal bits (of gate and up, and of down), as many at a time as fit into
    STACK_ELEMENTS: the bits, and the experts' indices in the live module."""
    hidden, inner = experts.gate_up_proj.shape[-1], experts.down_proj.shape[-1]
    each = hidden**2 + inner**2 + 3 * hidden * inner
    size = max(1, STACK_ELEMENTS[experts.gate_up_proj.device.type] // each)
    members: dict[tuple[int, int], list[int]] = {}
    for decision in decisions:
        if isinstance(decision.expert, int):
            bits = (decision.bits_of("gate"), decision.bits_of("down"))
            members.setdefault(bits, []).append(decision.expert)
    for bits in sorted(members):
        for start in range(0, len(members[bits]), size):
            yield bits, members[bits][start : start + size]


def _record(
    identity: ExpertId,
    bits: tuple[int, int],
    member: int,
    inputs: StackInputs,
    inner_inputs: StackInputs,
    gate_up: SolvedStack | None,
    down: SolvedStack | None,
) -> ExpertRecord:
    """What is recorded of one member of a stack, whose `bits` are those of gate and up, and of
    down; one of the two solved stacks may be None."""
    made = [solved for solved in (gate_up, down) if solved is not None]
    return ExpertRecord(
        layer=identity.layer,
        expert=identity.expert,
        bits=bits[0],
        tokens=inputs.tokens[member],
        prior_share=max(inputs.prior_share[member], inner_inputs.prior_share[member]),
        damping=max(solved.damping[member] for solved in made),
        error_gate_up=gate_up.error[member] if gate_up else 0.0,
        error_down=down.error[member] if down else 0.0,
        fallback=next((s.fallback[member] for s in made if s.fallback[member]), ""),
        down_bits=bits[1] if bits[1] != bits[0] else None,
    )


# ---------------------------------------------------------------------- by the format's own library


def _pack_experts(
    name_of: NameOf,
    experts: RoutedExperts,
    capture: RoutingCapture,
    decisions: Sequence[ExpertDecision],
    scheme: Scheme,
) -> Iterator[_Quantized]:
    """Pack the experts by the format's own library, which looks at weights only; the tokens serve
    to measure."""
    for decision in decisions:
        assert isinstance(decision.expert, int)
        assert decision.bits is not None
        gate_up, down = experts.gate_up_proj[decision.expert], experts.down_proj[decision.expert]
        before = gate_up.clone(), down.clone()
        tensors: Packed = {}
        lives = {role: gate_up[rows] for role, rows in experts.roles.items()} | {"down": down}
        for role, live in lives.items():
            if decision.bits_of(role) != SOURCE_BITS:
                tensors |= pack_in_place(name_of(decision.id, role), live, scheme)
        rows, _ = capture.rows_of(decision.expert)
        inner = _inner(capture, experts, decision.expert)
        record = ExpertRecord(
            layer=decision.layer,
            expert=decision.expert,
            bits=decision.bits,
            tokens=len(rows),
            prior_share=0.0,
            damping=0.0,
            error_gate_up=_output_error(before[0], gate_up, capture.hidden[rows]),
            error_down=_output_error(before[1], down, inner[: len(rows)]),
            fallback="",
            down_bits=decision.down_bits,
        )
        yield decision.expert, record, tensors, inner


def _output_error(before: Tensor, after: Tensor, inputs: Tensor) -> float:
    """|x dW'| / |x W'| of weights [R, C] over the inputs [n, C]; without any, |dW| / |W|."""
    change, whole = (after - before).float(), before.float()
    if len(inputs):
        change, whole = inputs.float() @ change.T, inputs.float() @ whole.T
    return float(change.norm() / whole.norm().clamp(min=1e-30))


# --------------------------------------------------------------------------- what they see and give


def _gate_up_inputs(
    capture: RoutingCapture, members: Sequence[int], everyone: bool, enough: float
) -> StackInputs:
    """What gate and up of each member see: the layer's inputs [n, H] routed to it, or all of them.

    enough as in `filled_hessian`
    """
    layer_mean = cache(lambda: second_moment(capture.hidden))  # worked out for rarely hit ones only
    if everyone:
        count = len(members)
        return StackInputs(layer_mean()[None], [len(capture.hidden)] * count, [0.0] * count)
    hessians = []
    for expert in members:
        rows, _ = capture.rows_of(expert)
        hessians.append(filled_hessian(capture.hidden.index_select(0, rows), layer_mean, enough))
    return stack_inputs(hessians)


def _down_inputs(
    capture: RoutingCapture,
    experts: RoutedExperts,
    members: Sequence[int],
    everyone: bool,
    enough: float,
) -> tuple[StackInputs, list[Tensor]]:
    """What down of each member sees; beside it, what `_inner` gives for the tokens routed to it."""
    # "all tokens" of the prior, evenly thinned out
    some = capture.hidden[:: max(1, len(capture.hidden) // LAYER_TOKENS)]
    hessians, kept = [], []
    for expert in members:
        rows, _ = capture.rows_of(expert)
        inner = _inner(capture, experts, expert, everyone)
        seen = inner if everyone else inner[: len(rows)]
        prior = partial(_down_prior, experts, expert, some)
        hessians.append(filled_hessian(seen, prior, enough))
        kept.append(inner.index_select(0, rows) if everyone else inner)
    return stack_inputs(hessians), kept


def _down_prior(experts: RoutedExperts, expert: int, hidden: Tensor) -> Tensor:
    """[I, I]: what down of an expert would see on average if hidden [n, H] were routed to it."""
    return second_moment(experts.inner(expert, hidden))


def _inner(
    capture: RoutingCapture, experts: RoutedExperts, expert: int, everyone: bool = False
) -> Tensor:
    """Input [n, I] of an expert's down_proj for the tokens routed to it, or for all tokens.

    Those routed to it may be followed by a few repetitions, see `select_rows`.
    """
    if everyone:
        return experts.inner(expert, capture.hidden)
    rows, _ = capture.rows_of(expert)
    return experts.inner(expert, select_rows(capture.hidden, rows))


def _add_output(
    output: Tensor, capture: RoutingCapture, experts: RoutedExperts, expert: int, inner: Tensor
) -> None:
    """Add to output [N, H] float32 what an expert makes of `_inner` [n, I], by routing weight."""
    rows, weights = capture.rows_of(expert)
    made = experts.output(expert, inner)[: len(rows)]
    output.index_add_(0, rows, made.float().mul_(weights[:, None]))
