"""Quantise the routed experts of one layer, a block of them at a time.

N tokens of the layer, H hidden size, I inner size of an expert, E members of a stack.

Gate and up of an expert see the same input and share one Hessian and one factorisation; down is
calibrated on what the *quantised* gate and up let through. With `calibration.routing: all` every
expert is calibrated on all tokens of the layer, and the gate and up of all experts are rows of one
matrix: the layer has one Hessian for them.

A block is loaded, quantised on the rows of the layer's kept inputs that are routed to it, written,
run on these rows, and dropped: nothing grows with the number of experts. Members of a block that
get equal bits are solved as one stack. Outputs are added in the order of the experts, whatever bits
they have. Only refining has all experts of the layer in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor

from se_compress.artifacts import (
    ALONE,
    SOURCE_BITS,
    ExpertDecision,
    ExpertId,
    ExpertRecord,
    Ranks,
    RefineRecord,
    Role,
    Scheme,
)
from se_compress.compression.refine import Aim, refine_experts
from se_compress.compression.repair import Repair, repair_block
from se_compress.compression.stacks import (
    Packed,
    SolvedExperts,
    SolvedStack,
    StackInputs,
    check_moments,
    filled_hessian,
    filled_rows,
    pack_in_place,
    packed_members,
    replace_members,
    second_moment,
    stack_inputs,
    stack_rows,
)
from se_compress.formats import FORMATS
from se_compress.model.experts import LayerExperts, RoutedExperts
from se_compress.model.observers import RoutingCapture
from se_compress.model.routing import select_rows
from se_compress.quant.hessian import room
from se_compress.recipe import Recipe, Refine

# The most experts of a block, and float32 elements of its Hessians and stacks: 128 MiB on the CPU,
# which gains nothing from more; 1 GiB on a GPU. Results of the two differ anyway; nothing else
# decides.
BLOCK_EXPERTS = {"cpu": 8, "cuda": 16}
BLOCK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
# Tokens of the layer that stand for "all tokens" when a rarely hit expert's down_proj is
# calibrated; and when all that has to be known is how strong its inputs are.
LAYER_TOKENS, POWER_TOKENS = 4096, 512
DOWN: Mapping[Role, slice] = {"down": slice(None)}
NameOf = Callable[[ExpertId, Role], str]
# An expert with its record, if it is quantised, and its outputs [n, H] for the rows routed to it.
Made = tuple[int, ExpertRecord | None, Tensor]


@dataclass(frozen=True)
class QuantizedExperts:
    """The routed experts of a layer, quantised.

    records  by the experts' ids
    output   [N, H] float32: of all routed experts, these and those that keep their precision
    refined  how refining went; None if it was not asked for
    """

    records: list[ExpertRecord]
    output: Tensor
    refined: RefineRecord | None


@dataclass(frozen=True)
class _Done:
    """An expert of a block after its quantisation.

    tensors  its packed matrices
    inner    what `_inner` gives for the tokens routed to it
    """

    expert: int
    record: ExpertRecord
    tensors: Packed
    inner: Tensor


@dataclass(frozen=True)
class _Work:
    """What there is to do with the routed experts of one layer.

    name_of    expert and projection -> name of the weight
    capture    what the layer's experts see
    decisions  of those that are quantised, by their ids
    put        takes packed matrices, by the names of their weights
    repair     of the layer, if surgery has left less of it
    """

    name_of: NameOf
    capture: RoutingCapture
    decisions: Mapping[int, ExpertDecision]
    scheme: Scheme
    recipe: Recipe
    put: Callable[[Packed], None]
    repair: Repair | None

    @property
    def everyone(self) -> bool:
        """Every expert is calibrated on all tokens of the layer."""
        return self.recipe.calibration.routing == "all"

    @property
    def rounds(self) -> bool:
        """Rounding to nearest looks at how strong inputs are, and not at how they go together."""
        return self.recipe.quantization.method == "rtn"

    @cached_property
    def layer_mean(self) -> Tensor:
        """[H, H]: the second moment of all tokens of the layer; worked out if somebody asks."""
        return second_moment(self.capture.hidden)

    def thinned(self, most: int) -> Tensor:
        """At most about so many tokens of the layer, evenly, [n, H]: they stand for all."""
        hidden = self.capture.hidden
        return hidden[:: max(1, len(hidden) // most)]


def quantize_experts(
    name_of: NameOf,
    experts: LayerExperts,
    capture: RoutingCapture,
    decisions: Sequence[ExpertDecision],
    scheme: Scheme,
    recipe: Recipe,
    put: Callable[[Packed], None],
    aim: Aim | None = None,
    ranks: Ranks = ALONE,
    repair: Repair | None = None,
) -> QuantizedExperts:
    """Quantise routed experts of one layer, and repair them before.

    name_of  expert and projection -> name of the weight
    capture  what the layer's experts see
    put      takes the packed matrices of a block, by the names of their weights, on the rank that
             made them
    aim      what they are refined towards, if the recipe wants that; every rank does that whole
    repair   of the layer, if the plan wants that: one expert after the other, so that every rank
             does it whole
    """
    mine = {d.expert: d for d in decisions if isinstance(d.expert, int)}
    work = _Work(name_of, capture, mine, scheme, recipe, put, repair)
    records: list[ExpertRecord] = []
    refined: RefineRecord | None = None
    if aim is not None and recipe.quantization.refine is not None:
        made, refined = _refined(experts, work, aim, recipe.quantization.refine)
    else:
        made = experts.each(
            partial(_quantized, work),
            ranks=ranks if repair is None else ALONE,
            size=_block_size(experts, capture.hidden),
            costs=_costs(experts, capture),
        )

    def outputs() -> Iterator[tuple[int, Tensor]]:
        for expert, record, output in made:
            records.extend([record] if record else [])
            yield expert, output

    return QuantizedExperts(records, capture.summed(outputs()), refined)


def _block_size(experts: LayerExperts, like: Tensor) -> int:
    """Experts of a block on the device of a tensor."""
    _, hidden, inner = experts.shapes
    each = hidden**2 + inner**2 + 3 * hidden * inner
    return max(1, min(room(BLOCK_EXPERTS, like), room(BLOCK_ELEMENTS, like) // each))


def _costs(experts: LayerExperts, capture: RoutingCapture) -> list[float]:
    """What quantising each expert costs, about: a product with each row that it sees, and as much
    as that of one row with each row and column of its weights."""
    rows, hidden, inner = experts.shapes
    return [len(capture.rows_of(e)[0]) + rows + hidden + inner for e in range(len(experts))]


def _quantized(work: _Work, block: RoutedExperts) -> Iterator[Made]:
    """Quantise the experts of a block, in place, and run all of them."""
    _repair(work, block)
    if not work.decisions:
        return _run_on(block, [], work)
    if FORMATS[work.scheme.format].quantize:
        return _run_on(block, list(_pack_block(block, work)), work)
    return _run_on(block, list(_packed(block, _solve_block(block, work), work)), work)


def _repair(work: _Work, block: RoutedExperts) -> None:
    """Repair the experts of a block, if they are to be, and let go of those that stay so."""
    if work.repair is None:
        return
    repair_block(block, work.capture, work.repair)
    for expert in filter(work.repair.stored.get, block.ids):
        decision = work.decisions.get(expert)
        if decision is None or decision.bits_of("down") == SOURCE_BITS:
            down = block.down_proj[block.place(expert)].to(work.repair.stored[expert])
            work.put({work.name_of(ExpertId(work.repair.layer, expert), "down"): {"weight": down}})


def _refined(
    experts: LayerExperts, work: _Work, aim: Aim, rule: Refine
) -> tuple[Iterator[Made], RefineRecord]:
    """All experts of the layer at once, quantised and refined; beside it how that went."""
    whole = experts.load(range(len(experts)))
    _repair(work, whole)
    before = whole.gate_up_proj.clone(), whole.down_proj.clone()
    blocks = whole.slices(_block_size(experts, aim.hidden))
    solved = [some for block in blocks for some in _solve_block(block, work)]
    record = refine_experts(whole, before, solved, aim, rule)
    return _run_on(whole, list(_packed(whole, solved, work)), work), record


def _run_on(block: RoutedExperts, done: Sequence[_Done], work: _Work) -> Iterator[Made]:
    """Let go of the packed matrices of a block, and run its experts as they are now."""
    work.put({name: parts for one in done for name, parts in one.tensors.items()})
    of = {one.expert: one for one in done}
    for expert in block.ids:
        one = of.pop(expert, None)
        inner = _inner(work.capture, block, expert) if one is None else one.inner
        rows, _ = work.capture.rows_of(expert)
        yield expert, one.record if one else None, block.output(expert, inner)[: len(rows)]


def _solve_block(block: RoutedExperts, work: _Work) -> Iterator[SolvedExperts]:
    """Solve the experts of a block, those of equal bits together, in place."""
    scheme, rule = work.scheme, work.recipe.quantization
    for bits, members in _stacks(block, work.decisions):
        identities = [work.decisions[expert].id for expert in members]
        places = block.places(members)
        inputs = _gate_up_inputs(work, members)
        check_moments(inputs.hessian, [f"gate and up of expert {i}" for i in identities])
        gate_up = replace_members(block.gate_up_proj, places, inputs, bits[0], scheme, rule)
        # only now: down sees what the quantised gate and up let through
        inner_inputs, inner = _down_inputs(work, block, members)
        check_moments(inner_inputs.hessian, [f"down of expert {i}" for i in identities])
        down = replace_members(block.down_proj, places, inner_inputs, bits[1], scheme, rule)
        records = [
            _record(identity, bits, i, inputs, inner_inputs, gate_up, down)
            for i, identity in enumerate(identities)
        ]
        yield SolvedExperts(members, records, gate_up, down, inner)


def _packed(block: RoutedExperts, solved: Iterable[SolvedExperts], work: _Work) -> Iterator[_Done]:
    """Pack solved experts."""
    for some in solved:
        for i, (expert, record) in enumerate(zip(some.members, some.records, strict=True)):
            tensors: Packed = {}
            for roles, made in ((block.roles, some.gate_up), (DOWN, some.down)):
                if made is not None:
                    rows = {work.name_of(record.id, role): part for role, part in roles.items()}
                    tensors |= packed_members(rows, made.stack, i, work.scheme.format)
            inner = some.inner[i] if some.inner else _inner(work.capture, block, expert)
            yield _Done(expert, record, tensors, inner)


def _stacks(
    block: RoutedExperts, decisions: Mapping[int, ExpertDecision]
) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """The experts of a block that are quantised, by their bits (of gate and up, and of down)."""
    members: dict[tuple[int, int], list[int]] = {}
    for expert in filter(decisions.get, block.ids):
        decision = decisions[expert]
        bits = (decision.bits_of("gate"), decision.bits_of("down"))
        members.setdefault(bits, []).append(expert)
    yield from sorted(members.items())


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


def _pack_block(block: RoutedExperts, work: _Work) -> Iterator[_Done]:
    """Pack the experts by the format's own library, in place. It looks at weights only; the tokens
    serve to measure."""
    capture = work.capture
    for expert in filter(work.decisions.get, block.ids):
        decision, at = work.decisions[expert], block.place(expert)
        assert decision.bits is not None
        gate_up, down = block.gate_up_proj[at], block.down_proj[at]
        before = gate_up.clone(), down.clone()
        tensors: Packed = {}
        lives = {role: gate_up[rows] for role, rows in block.roles.items()} | {"down": down}
        for role, live in lives.items():
            if decision.bits_of(role) != SOURCE_BITS:
                tensors |= pack_in_place(work.name_of(decision.id, role), live, work.scheme)
        rows, _ = capture.rows_of(expert)
        inner = _inner(capture, block, expert)
        record = ExpertRecord(
            layer=decision.layer,
            expert=expert,
            bits=decision.bits,
            tokens=len(rows),
            prior_share=0.0,
            damping=0.0,
            error_gate_up=_output_error(before[0], gate_up, capture.hidden[rows]),
            error_down=_output_error(before[1], down, inner[: len(rows)]),
            fallback="",
            down_bits=decision.down_bits,
        )
        yield _Done(expert, record, tensors, inner)


def _output_error(before: Tensor, after: Tensor, inputs: Tensor) -> float:
    """|x dW'| / |x W'| of weights [R, C] over the inputs [n, C]; without any, |dW| / |W|."""
    change, whole = (after - before).float(), before.float()
    if len(inputs):
        change, whole = inputs.float() @ change.T, inputs.float() @ whole.T
    return float(change.norm() / whole.norm().clamp(min=1e-30))


# --------------------------------------------------------------------------- what they see and give


def _gate_up_inputs(work: _Work, members: Sequence[int]) -> StackInputs:
    """What gate and up of each member see: the layer's inputs [n, H] routed to it, or all of
    them."""
    capture, enough = work.capture, work.recipe.quantization.shrinkage
    if work.everyone:
        count, tokens = len(members), len(capture.hidden)
        if work.rounds:
            one = stack_rows([filled_rows(capture.hidden, _nothing, 0.0)])
            return replace(one, tokens=[tokens] * count, prior_share=[0.0] * count)
        return StackInputs(work.layer_mean[None], [tokens] * count, [0.0] * count)
    seen = [capture.hidden.index_select(0, capture.rows_of(expert)[0]) for expert in members]
    if work.rounds:
        some = partial(work.thinned, POWER_TOKENS)
        return stack_rows([filled_rows(inputs, some, enough) for inputs in seen])
    return stack_inputs(
        [filled_hessian(inputs, lambda: work.layer_mean, enough) for inputs in seen]
    )


def _down_inputs(
    work: _Work, block: RoutedExperts, members: Sequence[int]
) -> tuple[StackInputs, list[Tensor]]:
    """What down of each member sees; beside it, what `_inner` gives for the tokens routed to it."""
    capture, enough = work.capture, work.recipe.quantization.shrinkage
    # "all tokens" of the prior
    some = work.thinned(POWER_TOKENS if work.rounds else LAYER_TOKENS)
    moments, kept = [], []
    for expert in members:
        rows, _ = capture.rows_of(expert)
        inner = _inner(capture, block, expert, work.everyone)
        seen = inner if work.everyone else inner[: len(rows)]
        prior = partial(block.inner, expert, some)
        if work.rounds:
            moments.append(filled_rows(seen, prior, enough))
        else:
            moments.append(filled_hessian(seen, partial(_moment_of, prior), enough))
        kept.append(inner.index_select(0, rows) if work.everyone else inner)
    return (stack_rows if work.rounds else stack_inputs)(moments), kept


def _moment_of(inputs: Callable[[], Tensor]) -> Tensor:
    """[I, I]: what down of an expert would see on average if some tokens were routed to it."""
    return second_moment(inputs())


def _nothing() -> Tensor:
    raise RuntimeError("all tokens of a layer need no prior; this is a bug")


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
