"""Compress the model, one layer at a time, into a checkpoint that has been laid out already.

Two streams run side by side: the hidden states of the model compressed so far, and the source's.
The first one is what later layers will really see, so it is what they are calibrated on. The second
shows how far the first has strayed; a few sequences of it are enough for that.

For each layer, the compressed stream shows the input of every expert. Gate and up of an expert see
the same input and share one Hessian and one factorisation; down is calibrated on what the
*quantised* gate and up let through. An expert that saw fewer tokens than its inputs have dimensions
has a singular Hessian; it is filled up with the layer's own, see `_hessian`. Hessians are made for
as many experts at a time as memory allows, from the layer's kept inputs: nothing grows with the
number of experts.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_compress.artifacts import (
    ROLES,
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    ExpertRecord,
    LayerRecord,
    ModelSource,
    Role,
    RunOptions,
    Scheme,
    TensorInfo,
    from_json,
    to_json,
    write_atomically,
)
from se_compress.checkpoint import copy_tensor, open_tensors, write_tensors
from se_compress.measures import relative_distance
from se_compress.quant.bnb import dequantize_bnb, quantize_bnb
from se_compress.quant.gptq import accumulate_hessian, gptq, shrink_towards
from se_compress.quant.grid import Grid, QuantizedStack, dequantize, rtn
from se_compress.quant.packing import pack_gptq
from se_compress.recipe import Quantization, Recipe
from se_compress.streaming import (
    RoutingCapture,
    StreamedModel,
    batches_of,
    leading,
    load_states,
    save_states,
)
from se_compress.targets import planned_bits, result_name

# Tokens of the source's own stream that are kept to compare with: its leading sequences.
WITNESS_TOKENS = 2048
# Float32 elements of all Hessians and stacks that are held at once: 1 GiB.
STACK_ELEMENTS = 2**28
# Tokens of the layer that stand for "all tokens" when a rarely hit expert's down_proj is
# calibrated.
LAYER_TOKENS = 4096


def compress(
    source: ModelSource,
    plan: CompressionPlan,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    layout: Mapping[str, TensorInfo],
    options: RunOptions,
) -> tuple[LayerRecord, ...]:
    """Write every tensor of the result to its place in `layout` (allocated by the caller).

    With a work directory, progress is saved after every layer and taken up again; the tensors that
    come out are the same, byte for byte.
    """
    _copy_outside_layers(source, plan, layout)
    if not any(decision.action == "quantize" for decision in plan.experts):
        return tuple(
            _copy_layer(source, plan, layer, layout) for layer in range(source.layer_count)
        )
    model = StreamedModel(
        source,
        open_tensors(source.tensors),
        torch.device(options.device),
        getattr(torch, recipe.compute_dtype),
    )
    done, streams = _resume(options, model)
    if not streams:
        embedded = model.embed(batches_of(tokens, options.batch_tokens))
        streams = {"source": embedded, "result": embedded}
    records = []
    for layer in range(source.layer_count):
        options.progress("compress", layer, source.layer_count)
        if layer > done:
            record, streams = _compress_layer(model, plan, layer, streams, recipe, layout)
            _save(options, record, streams)
        else:
            record = _load_record(options, layer)
        records.append(record)
    options.progress("compress", source.layer_count, source.layer_count)
    return tuple(records)


# ---------------------------------------------------------------------------------------- progress


def _record_file(work: Path, layer: int) -> Path:
    return work / f"compress-layer-{layer:05}.json"


def _resume(options: RunOptions, model: StreamedModel) -> tuple[int, dict[str, list[Tensor]]]:
    if options.work is None:
        return -1, {}
    return load_states(options.work / "compress-states.safetensors", model.device)


def _save(options: RunOptions, record: LayerRecord, streams: dict[str, list[Tensor]]) -> None:
    """The record first: a layer counts as done once the states behind it are on disk."""
    if options.work is not None:
        write_atomically(_record_file(options.work, record.layer), to_json(record))
        save_states(options.work / "compress-states.safetensors", record.layer, streams)


def _load_record(options: RunOptions, layer: int) -> LayerRecord:
    assert options.work is not None
    file = _record_file(options.work, layer)
    return from_json(LayerRecord, file.read_text(encoding="utf-8"), str(file))


# ------------------------------------------------------------------------------------------ copying


def _copy_outside_layers(
    source: ModelSource, plan: CompressionPlan, layout: Mapping[str, TensorInfo]
) -> None:
    for info in source.tensors.values():
        if info.layer is None:
            copy_tensor(info, layout[result_name(source, plan, info.name)])


def _copy_unchanged(
    source: ModelSource, plan: CompressionPlan, layer: int, layout: Mapping[str, TensorInfo]
) -> None:
    for info in source.tensors.values():
        if info.layer == layer and planned_bits(plan, info) == 16:
            copy_tensor(info, layout[result_name(source, plan, info.name)])


def _copy_layer(
    source: ModelSource, plan: CompressionPlan, layer: int, layout: Mapping[str, TensorInfo]
) -> LayerRecord:
    started = time.perf_counter()
    _copy_unchanged(source, plan, layer, layout)
    return LayerRecord(layer, time.perf_counter() - started, 0.0, ())


# ---------------------------------------------------------------------------------------- one layer


def _compress_layer(
    model: StreamedModel,
    plan: CompressionPlan,
    layer: int,
    streams: Mapping[str, list[Tensor]],
    recipe: Recipe,
    layout: Mapping[str, TensorInfo],
) -> tuple[LayerRecord, dict[str, list[Tensor]]]:
    started = time.perf_counter()
    module = model.load_layer(layer)
    decisions = [d for d in plan.experts if d.layer == layer and d.action == "quantize"]
    untouched = streams["result"] is streams["source"] and not decisions
    source = [] if untouched else leading(streams["source"], WITNESS_TOKENS)
    source = model.run_layer(layer, module, source)  # first: the weights are about to change
    capture = RoutingCapture(runs_experts=not decisions)
    result = model.run_layer(layer, module, streams["result"], capture)
    records: list[ExpertRecord] = []
    if decisions:
        if plan.scheme.format == "bitsandbytes":
            tensors, records = _pack_experts(model, module, capture, decisions, plan.scheme)
        else:
            tensors, records = _quantize_experts(model, module, capture, decisions, recipe)
        named = {result_name(model.source, plan, n): tensor for n, tensor in tensors.items()}
        write_tensors(layout, named)
        model.add_experts(module, result, capture)
    _copy_unchanged(model.source, plan, layer, layout)
    away = 0.0 if untouched else relative_distance(leading(result, WITNESS_TOKENS), source)
    record = LayerRecord(layer, time.perf_counter() - started, away, tuple(records))
    return record, {"source": result if untouched else source, "result": result}


@dataclass(frozen=True)
class _Inputs:
    """Hessians of a stack of experts, and how they came about.

    hessian    [E, C, C] float32, mean of x x^T
    tokens     [E] tokens routed to each
    shrinkage  [E] share of the layer's Hessian in it
    """

    hessian: Tensor
    tokens: list[int]
    shrinkage: list[float]


@dataclass(frozen=True)
class _Solved:
    """A quantised stack with, per expert, its relative error, damping and fallback."""

    stack: QuantizedStack
    error: list[float]
    damping: list[float]
    fallback: list[str]


def _quantize_experts(
    model: StreamedModel,
    module: nn.Module,
    capture: RoutingCapture,
    decisions: Sequence[ExpertDecision],
    recipe: Recipe,
) -> tuple[dict[str, Tensor], list[ExpertRecord]]:
    """Quantise the experts of one layer. The live module's weights are replaced by what the codes
    stand for, so that the next run of the layer is that of the compressed model."""
    experts = model.experts_module(module)
    tensors: dict[str, Tensor] = {}
    records: list[ExpertRecord] = []
    for bits, members in _stacks(decisions, experts):
        grid = Grid(bits, recipe.quantization.group_size, recipe.quantization.symmetric)
        inputs = _gate_up_inputs(capture, members)
        gate_up = _solve(experts.gate_up_proj[members].float(), inputs, grid, recipe.quantization)
        experts.gate_up_proj[members] = dequantize(gate_up.stack).to(experts.gate_up_proj.dtype)
        inner_inputs = _down_inputs(capture, experts, members)
        down = _solve(experts.down_proj[members].float(), inner_inputs, grid, recipe.quantization)
        experts.down_proj[members] = dequantize(down.stack).to(experts.down_proj.dtype)
        for i, expert in enumerate(members):
            identity = ExpertId(decisions[0].layer, expert)
            tensors |= _pack(model.source.experts[identity], gate_up.stack, down.stack, i)
            records.append(_record(identity, bits, i, inputs, inner_inputs, gate_up, down))
    return tensors, sorted(records, key=lambda record: record.id)


def _pack_experts(
    model: StreamedModel,
    module: nn.Module,
    capture: RoutingCapture,
    decisions: Sequence[ExpertDecision],
    scheme: Scheme,
) -> tuple[dict[str, Tensor], list[ExpertRecord]]:
    """The same through bitsandbytes, which looks at weights only; the tokens serve to measure."""
    experts = model.experts_module(module)
    tensors: dict[str, Tensor] = {}
    records: list[ExpertRecord] = []
    for decision in decisions:
        assert isinstance(decision.expert, int)
        assert decision.bits is not None
        gate_up, down = experts.gate_up_proj[decision.expert], experts.down_proj[decision.expert]
        before = gate_up.clone(), down.clone()
        for role, live in zip(ROLES, (*gate_up.chunk(2), down), strict=True):
            if decision.bits_of(role) != 16:
                name = model.source.experts[decision.id][role].name
                tensors |= _pack_in_place(name, live, scheme)
        rows, _ = capture.rows_of(decision.expert)
        inputs = capture.hidden[rows]
        inner = _inner(experts, decision.expert, inputs)
        errors = _output_error(before[0], gate_up, inputs), _output_error(before[1], down, inner)
        records.append(
            ExpertRecord(
                layer=decision.layer,
                expert=decision.expert,
                bits=decision.bits,
                tokens=len(rows),
                shrinkage=0.0,
                damping=0.0,
                error_gate_up=errors[0],
                error_down=errors[1],
                fallback="",
            )
        )
    return tensors, records


def _pack_in_place(name: str, live: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The packed parts of a live weight [R, C], which becomes what they stand for."""
    parts = quantize_bnb(live, scheme)
    live.copy_(dequantize_bnb(parts, (live.shape[0], live.shape[1]), scheme, torch.float32))
    return {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}


def _output_error(before: Tensor, after: Tensor, inputs: Tensor) -> float:
    """|x dW^T| / |x W^T| over the inputs [n, C]; without any, |dW| / |W|."""
    change, whole = (after - before).float(), before.float()
    if len(inputs):
        change, whole = inputs.float() @ change.T, inputs.float() @ whole.T
    return float(change.norm() / whole.norm().clamp(min=1e-30))


def _stacks(decisions: Sequence[ExpertDecision], experts: Any) -> Iterator[tuple[int, list[int]]]:
    """Experts of equal width, as many at a time as fit into STACK_ELEMENTS."""
    hidden, inner = experts.gate_up_proj.shape[-1], experts.down_proj.shape[-1]
    each = hidden**2 + inner**2 + 3 * hidden * inner
    size = max(1, STACK_ELEMENTS // each)
    for bits in sorted({d.bits for d in decisions if d.bits is not None}):
        members = [d.expert for d in decisions if d.bits == bits and isinstance(d.expert, int)]
        for start in range(0, len(members), size):
            yield bits, members[start : start + size]


def _gate_up_inputs(capture: RoutingCapture, members: Sequence[int]) -> _Inputs:
    layer_mean = cache(lambda: _second_moment(capture.hidden))
    parts = []
    for expert in members:
        rows, _ = capture.rows_of(expert)
        parts.append(_hessian(capture.hidden[rows], layer_mean))
    return _stack_inputs(parts)


def _down_inputs(capture: RoutingCapture, experts: Any, members: Sequence[int]) -> _Inputs:
    some = capture.hidden[:: max(1, len(capture.hidden) // LAYER_TOKENS)]
    parts = []
    for expert in members:
        rows, _ = capture.rows_of(expert)
        inner = _inner(experts, expert, capture.hidden[rows])
        parts.append(_hessian(inner, partial(_down_prior, experts, expert, some)))
    return _stack_inputs(parts)


def _down_prior(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    return _second_moment(_inner(experts, expert, hidden))


def _stack_inputs(parts: Sequence[tuple[Tensor, int, float]]) -> _Inputs:
    hessians, tokens, shares = zip(*parts, strict=True)
    return _Inputs(torch.stack(hessians), list(tokens), list(shares))


def _inner(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    inner: Tensor = experts._apply_gate(nn.functional.linear(hidden, experts.gate_up_proj[expert]))
    return inner


def _second_moment(inputs: Tensor) -> Tensor:
    moment = inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32)
    accumulate_hessian(moment, inputs)
    return moment.div_(max(1, len(inputs)))


def _hessian(inputs: Tensor, prior: Callable[[], Tensor]) -> tuple[Tensor, int, float]:
    """Mean of x x^T over an expert's own tokens [n, C], n, and the share of the prior in it.

    With n < C tokens the mean is singular: directions that happened not to occur would cost nothing
    and be rounded away. The missing share, 1 - n / C, comes from the prior: what the expert would
    see if all tokens of the layer went to it. An expert that saw nothing gets the prior alone.
    """
    tokens, columns = inputs.shape
    hessian = _second_moment(inputs)
    if tokens < columns:
        hessian = shrink_towards(hessian, tokens, prior(), columns)
    return hessian, tokens, max(0.0, 1.0 - tokens / columns)


def _solve(weight: Tensor, inputs: _Inputs, grid: Grid, rule: Quantization) -> _Solved:
    hessian = inputs.hessian
    if rule.method == "rtn":
        importance = hessian.diagonal(dim1=1, dim2=2) if rule.scales == "activation" else None
        stack = rtn(weight, grid, importance)
        error = _relative_error(weight, dequantize(stack), hessian)
        return _Solved(stack, error, [0.0] * len(weight), [""] * len(weight))
    result = gptq(
        weight,
        hessian,
        grid,
        damping=rule.damping,
        act_order=rule.act_order,
        scales=rule.scales,
    )
    fallback = [
        "Hessian could not be factorised: rounded to nearest" if i in result.unfactorable else ""
        for i in range(len(weight))
    ]
    return _Solved(result.stack, result.error.tolist(), list(result.damping), fallback)


def _relative_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> list[float]:
    def energy(rows: Tensor) -> Tensor:
        return ((rows @ hessian) * rows).sum(dim=(1, 2))

    return (energy(rounded - weight) / energy(weight).clamp(min=1e-30)).clamp(min=0).sqrt().tolist()


def _pack(
    roles: Mapping[Role, TensorInfo], gate_up: QuantizedStack, down: QuantizedStack, member: int
) -> dict[str, Tensor]:
    """The packed tensors of one expert, by the names of the weights that they stand for."""
    half = gate_up.codes.shape[1] // 2
    rows = {"gate": slice(0, half), "up": slice(half, 2 * half), "down": slice(None)}
    tensors: dict[str, Tensor] = {}
    for role in ROLES:
        stack = down if role == "down" else gate_up
        packed = pack_gptq(
            stack.codes[member, rows[role]],
            stack.scales[member, rows[role]],
            stack.zeros[member, rows[role]],
            bits=stack.grid.bits,
            group_size=stack.grid.group_size,
        )
        stem = roles[role].name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": tensor for part, tensor in packed._asdict().items()}
    return tensors


def _record(
    identity: ExpertId,
    bits: int,
    member: int,
    inputs: _Inputs,
    inner_inputs: _Inputs,
    gate_up: _Solved,
    down: _Solved,
) -> ExpertRecord:
    return ExpertRecord(
        layer=identity.layer,
        expert=identity.expert,
        bits=bits,
        tokens=inputs.tokens[member],
        shrinkage=max(inputs.shrinkage[member], inner_inputs.shrinkage[member]),
        damping=max(gate_up.damping[member], down.damping[member]),
        error_gate_up=gate_up.error[member],
        error_down=down.error[member],
        fallback=gate_up.fallback[member] or down.fallback[member],
    )
