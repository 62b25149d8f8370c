"""Quantise the matrices of one loaded layer: what they see, what they become, how it went.

Gate and up of an expert see the same input and share one Hessian and one factorisation; down is
calibrated on what the *quantised* gate and up let through. The plain linears of attention, shared
experts and dense MLPs are treated alike: those that are given one and the same tensor are rows of
one matrix.

An expert that saw fewer tokens than its inputs have dimensions has a singular Hessian; it is filled
up with the layer's own, see `_hessian`. With `calibration.routing: all` every expert is calibrated
on all tokens of the layer, and the gate and up of all experts are rows of one matrix: the layer has
one Hessian for them. Hessians are made for as many experts at a time as memory allows, from the
layer's kept inputs: nothing grows with the number of experts. The inner states of as many experts
are kept until their outputs are added up, once down is quantised.

The live module's weights are replaced by what the codes stand for, so that the next run of the
layer is that of the compressed model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise
from math import ceil, sqrt
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from se_compress.artifacts import (
    ROLES,
    SOURCE_BITS,
    ExpertDecision,
    ExpertId,
    ExpertRecord,
    LinearRecord,
    ModelSource,
    Scheme,
)
from se_compress.errors import SourceError
from se_compress.formats import FORMATS
from se_compress.model.streaming import RoutingCapture, expert_inner, select_rows
from se_compress.quant.gptq import gptq
from se_compress.quant.grid import SMALLEST_SCALE, Grid, QuantizedStack, dequantize, rtn
from se_compress.quant.hessian import accumulate_hessian, shrink_towards
from se_compress.recipe import Quantization, Recipe

# Float32 elements of all Hessians and stacks that are held at once: 128 MiB on the CPU, which gains
# nothing from more; 1 GiB on a GPU.
STACK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
# Tokens of the layer that stand for "all tokens" when a rarely hit expert's down_proj is
# calibrated.
LAYER_TOKENS = 4096
# Weight -> its stored parts, by what follows the module's name.
Packed = dict[str, dict[str, Tensor]]
NOT_FACTORED = "Hessian could not be factorised: rounded to nearest"
BELOW_GRID = f"all weights are below half the least scale of engines, {SMALLEST_SCALE:.1e}: lost"


@dataclass(frozen=True)
class _Inputs:
    """Hessians of a stack of matrices, and how they came about.

    hessian    [E, C, C] float32, mean of x x^T; or [1, C, C] if all see the same
    tokens     [E] tokens that each saw
    shrinkage  [E] share of the layer's Hessian in it
    """

    hessian: Tensor
    tokens: list[int]
    shrinkage: list[float]


@dataclass(frozen=True)
class _Solved:
    """A quantised stack with, per member, its relative error, damping and fallback."""

    stack: QuantizedStack
    error: list[float]
    damping: list[float]
    fallback: list[str]


# ------------------------------------------------------------------------------- the routed experts


def quantize_experts(
    source: ModelSource,
    experts: Any,
    capture: RoutingCapture,
    decisions: Sequence[ExpertDecision],
    scheme: Scheme,
    recipe: Recipe,
) -> tuple[Packed, list[ExpertRecord], Tensor]:
    """Quantise routed experts of one layer, given as the live fused module.

    capture  what the layer's experts see
    Returns the packed matrices, by the names of their weights; the records; and the output [N, H]
    float32 of all routed experts, these and those that keep their precision.
    """
    output = torch.zeros(capture.hidden.shape, dtype=torch.float32, device=capture.hidden.device)
    made = (
        _pack_experts(source, experts, capture, decisions, scheme)
        if FORMATS[scheme.format].quantize
        else _solve_experts(source, experts, capture, decisions, scheme, recipe)
    )
    tensors: Packed = {}
    records: list[ExpertRecord] = []
    left = set(range(len(experts.down_proj)))
    for expert, record, parts, inner in made:
        tensors |= parts
        records.append(record)
        left.remove(expert)
        _add_output(output, capture, experts, expert, inner)
    for expert in sorted(left):
        _add_output(output, capture, experts, expert, _inner(capture, experts, expert))
    return tensors, sorted(records, key=lambda record: record.id), output


# An expert after its quantisation, with its record, its packed matrices, and what `_inner` gives
# for the tokens routed to it.
_Quantized = tuple[int, ExpertRecord, Packed, Tensor]


def _solve_experts(
    source: ModelSource,
    experts: Any,
    capture: RoutingCapture,
    decisions: Sequence[ExpertDecision],
    scheme: Scheme,
    recipe: Recipe,
) -> Iterator[_Quantized]:
    rule, everyone = recipe.quantization, recipe.calibration.routing == "all"
    for widths, members in _stacks(decisions, experts):
        identities = [ExpertId(decisions[0].layer, expert) for expert in members]
        inputs = _gate_up_inputs(capture, members, everyone, rule.shrinkage)
        _check_moments(inputs.hessian, [f"gate and up of expert {i}" for i in identities])
        gate_up = _replace(experts.gate_up_proj, members, inputs, widths[0], scheme, rule)
        inner_inputs, inner = _down_inputs(capture, experts, members, everyone, rule.shrinkage)
        _check_moments(inner_inputs.hessian, [f"down of expert {i}" for i in identities])
        down = _replace(experts.down_proj, members, inner_inputs, widths[1], scheme, rule)
        for i, (expert, identity) in enumerate(zip(members, identities, strict=True)):
            names = [source.experts[identity][role].name for role in ROLES]
            tensors: Packed = {}
            for part, solved in ((names[:2], gate_up), (names[2:], down)):
                if solved is not None:
                    tensors |= _packed(part, solved.stack, i, scheme.format)
            record = _record(identity, widths, i, inputs, inner_inputs, gate_up, down)
            yield expert, record, tensors, inner[i]


def _pack_experts(
    source: ModelSource,
    experts: Any,
    capture: RoutingCapture,
    decisions: Sequence[ExpertDecision],
    scheme: Scheme,
) -> Iterator[_Quantized]:
    """The same by the format's own library, which looks at weights only; the tokens serve to
    measure."""
    for decision in decisions:
        assert isinstance(decision.expert, int)
        assert decision.bits is not None
        gate_up, down = experts.gate_up_proj[decision.expert], experts.down_proj[decision.expert]
        before = gate_up.clone(), down.clone()
        tensors: Packed = {}
        for role, live in zip(ROLES, (*gate_up.chunk(2), down), strict=True):
            if decision.bits_of(role) != SOURCE_BITS:
                name = source.experts[decision.id][role].name
                tensors |= _pack_in_place(name, live, scheme)
        rows, _ = capture.rows_of(decision.expert)
        inner = _inner(capture, experts, decision.expert)
        record = ExpertRecord(
            layer=decision.layer,
            expert=decision.expert,
            bits=decision.bits,
            tokens=len(rows),
            shrinkage=0.0,
            damping=0.0,
            error_gate_up=_output_error(before[0], gate_up, capture.hidden[rows]),
            error_down=_output_error(before[1], down, inner[: len(rows)]),
            fallback="",
            down_bits=decision.down_bits,
        )
        yield decision.expert, record, tensors, inner


def _pack_in_place(name: str, live: Tensor, scheme: Scheme) -> Packed:
    """The packed parts of a live weight [R, C], which becomes what they stand for."""
    form = FORMATS[scheme.format]
    assert form.quantize is not None
    parts = form.quantize(live, scheme)
    live.copy_(form.unpack(parts, (live.shape[0], live.shape[1]), scheme))
    return {name: parts}


def _output_error(before: Tensor, after: Tensor, inputs: Tensor) -> float:
    """|x dW^T| / |x W^T| over the inputs [n, C]; without any, |dW| / |W|."""
    change, whole = (after - before).float(), before.float()
    if len(inputs):
        change, whole = inputs.float() @ change.T, inputs.float() @ whole.T
    return float(change.norm() / whole.norm().clamp(min=1e-30))


def _stacks(
    decisions: Sequence[ExpertDecision], experts: Any
) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Experts of equal widths (of gate and up, and of down), as many at a time as fit into
    STACK_ELEMENTS."""
    hidden, inner = experts.gate_up_proj.shape[-1], experts.down_proj.shape[-1]
    each = hidden**2 + inner**2 + 3 * hidden * inner
    size = max(1, STACK_ELEMENTS[experts.gate_up_proj.device.type] // each)
    members: dict[tuple[int, int], list[int]] = {}
    for decision in decisions:
        if isinstance(decision.expert, int):
            widths = (decision.bits_of("gate"), decision.bits_of("down"))
            members.setdefault(widths, []).append(decision.expert)
    for widths in sorted(members):
        for start in range(0, len(members[widths]), size):
            yield widths, members[widths][start : start + size]


def _gate_up_inputs(
    capture: RoutingCapture, members: Sequence[int], everyone: bool, enough: float
) -> _Inputs:
    layer_mean = cache(lambda: _second_moment(capture.hidden))
    if everyone:
        count = len(members)
        return _Inputs(layer_mean()[None], [len(capture.hidden)] * count, [0.0] * count)
    parts = []
    for expert in members:
        rows, _ = capture.rows_of(expert)
        parts.append(_hessian(capture.hidden.index_select(0, rows), layer_mean, enough))
    return _stack_inputs(parts)


def _down_inputs(
    capture: RoutingCapture, experts: Any, members: Sequence[int], everyone: bool, enough: float
) -> tuple[_Inputs, list[Tensor]]:
    """Beside the Hessians, what `_inner` gives for the tokens routed to each member."""
    some = capture.hidden[:: max(1, len(capture.hidden) // LAYER_TOKENS)]
    parts, kept = [], []
    for expert in members:
        rows, _ = capture.rows_of(expert)
        inner = _inner(capture, experts, expert, everyone)
        seen = inner if everyone else inner[: len(rows)]
        parts.append(_hessian(seen, partial(_down_prior, experts, expert, some), enough))
        kept.append(inner.index_select(0, rows) if everyone else inner)
    return _stack_inputs(parts), kept


def _inner(capture: RoutingCapture, experts: Any, expert: int, everyone: bool = False) -> Tensor:
    """Input [n, I] of an expert's down_proj for the tokens routed to it, and after them maybe a few
    repetitions; or for all tokens."""
    if everyone:
        return expert_inner(experts, expert, capture.hidden)
    rows, _ = capture.rows_of(expert)
    return expert_inner(experts, expert, select_rows(capture.hidden, rows))


def _add_output(
    output: Tensor, capture: RoutingCapture, experts: Any, expert: int, inner: Tensor
) -> None:
    """Add to output [N, H] what an expert makes of `_inner`, by routing weight."""
    rows, weights = capture.rows_of(expert)
    made = nn.functional.linear(inner, experts.down_proj[expert])[: len(rows)]
    output.index_add_(0, rows, made.float().mul_(weights[:, None]))


def _down_prior(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    return _second_moment(expert_inner(experts, expert, hidden))


def _stack_inputs(parts: Sequence[tuple[Tensor, int, float]]) -> _Inputs:
    hessians, tokens, shares = zip(*parts, strict=True)
    return _Inputs(torch.stack(hessians), list(tokens), list(shares))


def _second_moment(inputs: Tensor) -> Tensor:
    moment = inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32)
    accumulate_hessian(moment, inputs)
    return moment.div_(max(1, len(inputs)))


def _hessian(
    inputs: Tensor, prior: Callable[[], Tensor], enough: float
) -> tuple[Tensor, int, float]:
    """Mean of x x^T over an expert's own tokens [n, C], n, and the share of the prior in it.

    With n < C tokens the mean is singular: directions that happened not to occur would cost nothing
    and be rounded away. With n < enough C tokens the missing share, 1 - n / (enough C), comes from
    the prior: what the expert would see if all tokens of the layer went to it. An expert that saw
    nothing gets the prior alone.
    """
    tokens, columns = inputs.shape
    needed = max(1, ceil(enough * columns))
    hessian = _second_moment(inputs)
    if tokens < needed:
        hessian = shrink_towards(hessian, tokens, prior(), needed)
    return hessian, tokens, max(0.0, 1.0 - tokens / needed)


def _replace(
    live: Tensor,
    members: Sequence[int],
    inputs: _Inputs,
    bits: int,
    scheme: Scheme,
    rule: Quantization,
) -> _Solved | None:
    """Quantise members of a live stack [E, R, C] in place; None at SOURCE_BITS."""
    if bits == SOURCE_BITS:
        return None
    solved = _solve(live[members].float(), inputs.hessian, _grid(bits, scheme), rule)
    live[members] = dequantize(solved.stack).to(live.dtype)
    return solved


def _record(
    identity: ExpertId,
    widths: tuple[int, int],
    member: int,
    inputs: _Inputs,
    inner_inputs: _Inputs,
    gate_up: _Solved | None,
    down: _Solved | None,
) -> ExpertRecord:
    made = [solved for solved in (gate_up, down) if solved is not None]
    return ExpertRecord(
        layer=identity.layer,
        expert=identity.expert,
        bits=widths[0],
        tokens=inputs.tokens[member],
        shrinkage=max(inputs.shrinkage[member], inner_inputs.shrinkage[member]),
        damping=max(solved.damping[member] for solved in made),
        error_gate_up=gate_up.error[member] if gate_up else 0.0,
        error_down=down.error[member] if down else 0.0,
        fallback=next((s.fallback[member] for s in made if s.fallback[member]), ""),
        down_bits=widths[1] if widths[1] != widths[0] else None,
    )


# ------------------------------------------------------------------------------------ plain linears


@dataclass(frozen=True)
class SolvedLinear:
    """A plain linear after quantisation.

    tensors      its packed matrix, by the name of its weight
    lost, whole  output energy per token, tr(dW H dW^T) and tr(W H W^T), over its inputs
    """

    name: str
    bits: int
    tensors: Packed
    tokens: int
    damping: float
    lost: float
    whole: float
    fallback: str

    @property
    def record(self) -> LinearRecord:
        error = joint_error([self])
        return LinearRecord(self.name, self.bits, self.tokens, self.damping, error, self.fallback)


def joint_error(linears: Sequence[SolvedLinear]) -> float:
    """Relative output error of several linears together."""
    whole = sum(linear.whole for linear in linears)
    return sqrt(max(0.0, sum(linear.lost for linear in linears)) / whole) if whole else 0.0


def quantize_linears(
    module: nn.Module,
    stages: Sequence[Mapping[str, int]],
    run: Callable[[], object],
    scheme: Scheme,
    rule: Quantization,
) -> list[SolvedLinear]:
    """Quantise plain linears of a loaded layer on what they see in `run`.

    stages  name of the weight in the checkpoint -> width; a later stage sees what the quantised
            linears of the earlier ones let through
    """
    done: list[SolvedLinear] = []
    for bits in filter(None, stages):
        linears = {name: cast(nn.Linear, module.get_submodule(_path(name))) for name in bits}
        moments = _InputMoments(linears)
        with moments:
            run()
        for names, hessian, tokens in moments.groups():
            if FORMATS[scheme.format].quantize:
                done += [
                    _pack_linear(name, bits[name], linears[name], hessian, tokens, scheme)
                    for name in names
                ]
                continue
            _check_moments(hessian[None], names)
            for width in sorted({bits[name] for name in names}):
                alike = {name: linears[name] for name in names if bits[name] == width}
                done += _replace_linears(alike, hessian, tokens, width, scheme, rule)
    return done


def quantize_shared(
    module: nn.Module,
    identity: ExpertId,
    stages: Sequence[Mapping[str, int]],
    hidden: Tensor,
    scheme: Scheme,
    rule: Quantization,
) -> tuple[Packed, ExpertRecord]:
    """Quantise the shared expert of a loaded layer: gate and up, then down.

    stages as in `quantize_linears`, one of them may be empty; hidden [N, H] is its input
    """
    first = next(name for stage in stages for name in stage)
    shared = module.get_submodule(_path(first).rpartition(".")[0])

    def run() -> None:
        for piece in torch.split(hidden, LAYER_TOKENS):
            shared(piece)

    done = quantize_linears(module, stages, run, scheme, rule)
    gate_up, down = ([linear for linear in done if linear.name in stage] for stage in stages)
    tensors: Packed = {}
    for linear in done:
        tensors |= linear.tensors
    record = ExpertRecord(
        layer=identity.layer,
        expert=identity.expert,
        bits=gate_up[0].bits if gate_up else SOURCE_BITS,
        tokens=done[0].tokens,
        shrinkage=0.0,
        damping=max(linear.damping for linear in done),
        error_gate_up=joint_error(gate_up),
        error_down=joint_error(down),
        fallback=next((linear.fallback for linear in done if linear.fallback), ""),
    )
    return tensors, record


def _path(name: str) -> str:
    """Of a linear in its decoder layer: model.layers.3.self_attn.q_proj.weight is self_attn.q_proj.

    Only fused experts have other names in memory than on disk."""
    return name.split(".", 3)[3].removesuffix(".weight")


class _InputMoments:
    """Second moments of what linears are given while this is entered.

    Linears that are given one and the same tensor (q, k and v; gate and up) share a moment.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._first: dict[str, str] = {}  # linear -> the first one that sees the same
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._latest: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self._hooks = [
            linear.register_forward_pre_hook(partial(self._see, name))
            for name, linear in self._linears.items()
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._latest.clear()

    def _see(self, name: str, linear: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        given = arguments[0]
        first = next((n for n, seen in self._latest.items() if seen is given), name)
        if self._first.setdefault(name, first) != first:
            raise RuntimeError(f"{name} no longer sees the same as {self._first[name]}")
        if first == name:
            self._latest[name] = given
            flat = given.flatten(0, -2)
            if name not in self._sums:
                size = flat.shape[1]
                self._sums[name] = flat.new_zeros(size, size, dtype=torch.float32)
            accumulate_hessian(self._sums[name], flat)
            self._tokens[name] = self._tokens.get(name, 0) + len(flat)

    def groups(self) -> Iterator[tuple[list[str], Tensor, int]]:
        """Linears that see the same, the mean [C, C] of x x^T and the number of tokens."""
        for name in self._linears:
            if name not in self._first:
                raise RuntimeError(f"{name} was never called: it cannot be calibrated")
        for first, moment in self._sums.items():
            names = [name for name in self._linears if self._first[name] == first]
            yield names, moment / max(1, self._tokens[first]), self._tokens[first]


def _pack_linear(
    name: str, bits: int, linear: nn.Linear, hessian: Tensor, tokens: int, scheme: Scheme
) -> SolvedLinear:
    """By the format's own library, in place; the Hessian serves to measure."""
    before = linear.weight.float().clone()
    tensors = _pack_in_place(name, linear.weight, scheme)
    lost, whole = (
        float(_energy(part[None], hessian)) for part in (linear.weight.float() - before, before)
    )
    return SolvedLinear(name, bits, tensors, tokens, 0.0, lost, whole, "")


def _replace_linears(
    linears: Mapping[str, nn.Linear],
    hessian: Tensor,
    tokens: int,
    bits: int,
    scheme: Scheme,
    rule: Quantization,
) -> list[SolvedLinear]:
    """Quantise linears with one Hessian in place, as rows of one matrix."""
    weights = {name: linear.weight for name, linear in linears.items()}
    tall = torch.cat([weight.float() for weight in weights.values()])
    solved = _solve(tall[None], hessian[None], _grid(bits, scheme), rule)
    rounded = dequantize(solved.stack)[0]
    done: list[SolvedLinear] = []
    ends = accumulate((len(weight) for weight in weights.values()), initial=0)
    for (name, weight), (start, end) in zip(weights.items(), pairwise(ends), strict=True):
        rows = slice(start, end)
        lost, whole = (
            float(_energy(part[None], hessian)) for part in (rounded[rows] - tall[rows], tall[rows])
        )
        weight.copy_(rounded[rows])
        solved_linear = SolvedLinear(
            name=name,
            bits=bits,
            tensors=_packed_rows(name, solved.stack, 0, rows, scheme.format),
            tokens=tokens,
            damping=solved.damping[0],
            lost=lost,
            whole=whole,
            fallback=solved.fallback[0],
        )
        done.append(solved_linear)
    return done


# ---------------------------------------------------------------------------------------- any stack


def _grid(bits: int, scheme: Scheme) -> Grid:
    scale_dtype = getattr(torch, str(FORMATS[scheme.format].scale_dtype))
    return Grid(bits, scheme.group_size, scheme.symmetric, scale_dtype)


def _solve(weight: Tensor, hessian: Tensor, grid: Grid, rule: Quantization) -> _Solved:
    """weight [E, R, C] float32; hessian [E, C, C], or [1, C, C] if all see the same."""
    if rule.method == "rtn":
        moments = hessian.diagonal(dim1=1, dim2=2).expand(len(weight), -1)
        stack = rtn(weight, grid, moments if rule.scales == "activation" else None)
        lost, whole = (_energy(w, hessian) for w in (dequantize(stack) - weight, weight))
        error = (lost / whole.clamp(min=1e-30)).clamp(min=0).sqrt().tolist()
        return _Solved(stack, error, [0.0] * len(weight), _below_grid(weight))
    result = gptq(
        weight,
        hessian,
        grid,
        damping=rule.damping,
        act_order=rule.act_order,
        scales=rule.scales,
    )
    fallback = _below_grid(weight)
    for member in result.unfactorable:
        fallback[member] = NOT_FACTORED
    return _Solved(result.stack, result.error.tolist(), list(result.damping), fallback)


def _below_grid(weight: Tensor) -> list[str]:
    """For each member of [E, R, C] what is to be said if it is not zero, but becomes so."""
    largest = weight.abs().amax(dim=(1, 2)).tolist()
    return [BELOW_GRID if 0 < size < SMALLEST_SCALE / 2 else "" for size in largest]


def _check_moments(hessian: Tensor, names: Sequence[str]) -> None:
    """Raises SourceError if what a member is given has squares that float32 does not hold: hidden
    states are seen to be finite after every layer, so that these are the source's, within one."""
    finite = hessian.sum(dim=(1, 2)).isfinite().tolist()
    if not all(finite):
        raise SourceError(
            f"{names[finite.index(False)]}: its inputs on the calibration text are so large that "
            "float32 does not hold their squares; it cannot be calibrated"
        )


def _energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """[E]: output energy per token of weights [E, R, C]."""
    return ((rows @ hessian) * rows).sum(dim=(1, 2))


def _packed(names: Sequence[str], stack: QuantizedStack, member: int, form: str) -> Packed:
    """The packed matrices of a member that holds the rows of equally tall ones."""
    height = stack.codes.shape[1] // len(names)
    tensors: Packed = {}
    for i, name in enumerate(names):
        tensors |= _packed_rows(name, stack, member, slice(i * height, (i + 1) * height), form)
    return tensors


def _packed_rows(name: str, stack: QuantizedStack, member: int, rows: slice, form: str) -> Packed:
    """The packed matrix that some rows of a member are."""
    pack = FORMATS[form].pack
    assert pack is not None
    codes, scales, zeros = (
        tensor[member, rows] for tensor in (stack.codes, stack.scales, stack.zeros)
    )
    return {name: pack(codes, scales, zeros, stack.grid)}
