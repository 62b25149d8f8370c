"""Compress the model, one layer at a time, into a checkpoint that has been laid out already.

Two streams run side by side: the hidden states of the model compressed so far, and the source's.
The first one is what later layers will really see, so it is what they are calibrated on. The second
shows how far the first has strayed; a few sequences of it are enough for that. Where it has lost
what super experts do, compressing stops (early_warning.py).

For each layer, the compressed stream shows what its matrices see (solver.py). Attention comes
first; then the layer is run again, so that experts and MLPs are calibrated behind the quantised
attention.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from se_compress.artifacts import (
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    ExpertRecord,
    LayerRecord,
    ModelSource,
    RunOptions,
    Scheme,
    TensorInfo,
)
from se_compress.checkpoint import Reader, copy_tensor, open_tensors, write_tensors
from se_compress.early_warning import Side, early_warning
from se_compress.families import FAMILIES
from se_compress.measures import relative_distance
from se_compress.progress import load_layers, save
from se_compress.recipe import Recipe
from se_compress.solver import (
    SolvedLinear,
    quantize_experts,
    quantize_linears,
    quantize_shared,
)
from se_compress.splice import open_shrunk
from se_compress.streaming import (
    Observer,
    RoutingCapture,
    SinkCapture,
    StreamedModel,
    batches_of,
    leading,
    load_states,
    save_states,
)
from se_compress.surgery import Shrunk, is_made, shrink
from se_compress.targets import planned_bits, result_name

# Tokens of the source's own stream that are kept to compare with: its leading sequences.
WITNESS_TOKENS = 1024
STATES_FILE = "compress-states.safetensors"


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
    come out are the same, byte for byte. If the last record has `failed`, compressing stopped there
    and the result is not whole.
    """
    small = shrink(source, plan)
    read, untouched = open_shrunk(source, small), small.source is source
    _copy(small, read, layout, [i for i in small.source.tensors.values() if i.layer is None])
    if untouched and not any(_planned(small, layer) for layer in range(source.layer_count)):
        return tuple(_copy_layer(small, read, n, layout) for n in range(source.layer_count))
    device, dtype = torch.device(options.device), getattr(torch, recipe.compute_dtype)
    model = StreamedModel(small.source, read, device, dtype)
    original = model
    if not untouched:
        original = StreamedModel(source, open_tensors(source.tensors), device, dtype)
    records, streams = _resume(options, model)
    if not records:
        embedded = model.embed(batches_of(tokens, options.batch_tokens))
        streams = {"source": embedded, "result": embedded}
    for layer in range(source.layer_count):
        options.progress("compress", layer, source.layer_count)
        if layer == len(records):
            record, streams = _compress_layer(
                original, model, small, layer, streams, recipe, layout
            )
            _save(options, record, streams)
            records.append(record)
        if records[layer].failed:
            return tuple(records)
    options.progress("compress", source.layer_count, source.layer_count)
    return tuple(records)


# ---------------------------------------------------------------------------------------- progress


def _record_file(work: Path, layer: int) -> Path:
    return work / f"compress-layer-{layer:05}.json"


def _resume(
    options: RunOptions, model: StreamedModel
) -> tuple[list[LayerRecord], dict[str, list[Tensor]]]:
    """Records of the layers that are done, and the streams behind them; neither without progress
    that can be read."""
    if options.work is None:
        return [], {}
    file = options.work / STATES_FILE
    done, streams = load_states(file, model.device, options.notice)
    files = [_record_file(options.work, layer) for layer in range(done + 1)]
    return load_layers(LayerRecord, files, options.notice), streams


def _save(options: RunOptions, record: LayerRecord, streams: dict[str, list[Tensor]]) -> None:
    """The record first: a layer counts as done once the states behind it are on disk."""
    if options.work is not None:
        save(record, _record_file(options.work, record.layer))
        save_states(options.work / STATES_FILE, record.layer, streams)


# ------------------------------------------------------------------------------------------ copying


def _copy(
    small: Shrunk, read: Reader, layout: Mapping[str, TensorInfo], tensors: Iterable[TensorInfo]
) -> None:
    """Put tensors that keep their precision into the result: byte for byte, or as surgery makes
    them."""
    for info in tensors:
        name = result_name(small.source, small.plan, info.name)
        if is_made(info):
            write_tensors(layout, {name: read(info.name)})
        else:
            copy_tensor(info, layout[name])


def _unquantized(small: Shrunk, layer: int) -> Iterator[TensorInfo]:
    for info in small.source.tensors.values():
        if info.layer == layer and planned_bits(small.plan, info) == 16:
            yield info


def _copy_layer(
    small: Shrunk, read: Reader, layer: int, layout: Mapping[str, TensorInfo]
) -> LayerRecord:
    started = time.perf_counter()
    _copy(small, read, layout, _unquantized(small, layer))
    return LayerRecord(layer, time.perf_counter() - started, 0.0, ())


# ---------------------------------------------------------------------------------------- one layer


@dataclass(frozen=True)
class _Planned:
    """What the plan quantises of a layer; false if that is nothing.

    experts    its routed experts
    shared     gate and up, then down, of its shared expert: name of the weight -> width
    attention  the same for linears of attention, all of them at once
    dense      the same for a dense MLP, gate and up, then down
    """

    layer: int
    experts: tuple[ExpertDecision, ...]
    shared: tuple[Mapping[str, int], ...]
    attention: Mapping[str, int]
    dense: tuple[Mapping[str, int], ...]

    def __bool__(self) -> bool:
        return bool(self.experts or any(self.shared) or self.attention or any(self.dense))


def _planned(small: Shrunk, layer: int) -> _Planned:
    source, plan = small.source, small.plan
    family = FAMILIES[source.family]
    widths: dict[str, dict[str, int]] = {}
    for info in source.tensors.values():
        bits = planned_bits(plan, info)
        if info.layer == layer and bits != 16:
            last = info.name.endswith(f".{family.projections[2]}.weight")
            widths.setdefault(info.kind + (" down" if last else ""), {})[info.name] = bits
    return _Planned(
        layer=layer,
        experts=tuple(
            d
            for d in plan.experts
            if d.layer == layer and d.action == "quantize" and d.expert != "shared"
        ),
        shared=(widths.get("shared_expert", {}), widths.get("shared_expert down", {})),
        attention=widths.get("attention", {}),
        dense=(widths.get("dense_mlp", {}), widths.get("dense_mlp down", {})),
    )


def _compress_layer(
    original: StreamedModel,
    model: StreamedModel,
    small: Shrunk,
    layer: int,
    streams: Mapping[str, list[Tensor]],
    recipe: Recipe,
    layout: Mapping[str, TensorInfo],
) -> tuple[LayerRecord, dict[str, list[Tensor]]]:
    """`original` is the source, `model` what surgery left of it: one and the same without any."""
    started, plan = time.perf_counter(), small.plan
    module = original.load_layer(layer)
    planned = _planned(small, layer)
    same = streams["result"] is streams["source"] and model is original
    untouched = same and not planned
    before = [] if untouched else leading(streams["source"], WITNESS_TOKENS)
    sinks = SinkCapture()
    source = original.run_layer(layer, module, before, sinks)  # the weights are about to change
    if model is not original:
        del module  # one layer in memory
        module = model.load_layer(layer)
    warns = recipe.validation.early_stop and not untouched
    compared = leading(streams["result"], WITNESS_TOKENS) if warns else []
    watch = _Watch(compared, runs_experts=not planned.experts)
    if planned:
        made = _quantize_layer(
            model, module, planned, streams["result"], watch, plan.scheme, recipe
        )
    else:
        made = _Made(model.run_layer(layer, module, streams["result"], watch))
    write_tensors(layout, {result_name(model.source, plan, n): t for n, t in made.tensors.items()})
    _copy(small, model.read, layout, _unquantized(small, layer))
    away, failed = 0.0, None
    if not untouched:
        result = leading(made.result, WITNESS_TOKENS)
        away = relative_distance(result, source)
        if warns:
            load = partial(original.load_layer, layer)
            ours = Side(original, before, source, sinks.sink_mass, load)
            theirs = Side(
                model=model,
                before=compared,
                after=result,
                sinks=watch.sink_mass,
                load=lambda: module,
                source_expert=lambda expert: small.origin[ExpertId(layer, expert)][0].expert,
            )
            failed = early_warning(layer, ours, theirs, recipe.validation)
    record = LayerRecord(
        layer=layer,
        seconds=time.perf_counter() - started,
        hidden_error=away,
        experts=tuple(_by_source_id(record, small) for record in made.experts),
        linears=tuple(linear.record for linear in made.linears),
        failed=failed,
    )
    return record, {"source": made.result if untouched else source, "result": made.result}


class _Watch(RoutingCapture, SinkCapture):
    """What a layer's experts see, and the sinks of the leading sequences of each batch that are
    compared with the source's."""

    def __init__(self, compared: Sequence[Tensor], *, runs_experts: bool) -> None:
        super().__init__(runs_experts=runs_experts)
        self._compared = [len(states) for states in compared]

    def watched(self, sequences: int) -> int:
        return self._compared[self.batch] if self.batch < len(self._compared) else 0


def _by_source_id(record: ExpertRecord, small: Shrunk) -> ExpertRecord:
    """Records speak of the source's experts; of merged ones, the first stands for all."""
    return replace(record, expert=small.origin[record.id][0].expert)


@dataclass
class _Made:
    """What became of one layer.

    result   the hidden states after it
    tensors  packed, by the names of the weights that they stand for
    experts  records of its experts
    linears  its quantised linears of attention and dense MLP
    """

    result: list[Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    experts: list[ExpertRecord] = field(default_factory=list)
    linears: list[SolvedLinear] = field(default_factory=list)


def _quantize_layer(
    model: StreamedModel,
    module: nn.Module,
    planned: _Planned,
    hidden: Sequence[Tensor],
    watch: _Watch,
    scheme: Scheme,
    recipe: Recipe,
) -> _Made:
    """Quantise what the plan wants of a loaded layer, in place. `hidden` is what comes into it;
    `watch` sees it run once attention and dense MLP are quantised."""
    without_experts = Observer()
    without_experts.runs_experts = False
    run = partial(model.run_layer, planned.layer, module, hidden)
    linears: list[SolvedLinear] = []
    for stages in ((planned.attention,), planned.dense):
        see = partial(run, without_experts)
        linears += quantize_linears(module, stages, see, scheme, recipe.quantization)
    made = _Made(run(watch), linears=linears)
    for linear in linears:
        made.tensors |= linear.tensors
    if planned.experts:
        live = model.experts_module(module)
        tensors, made.experts, output = quantize_experts(
            model.source, live, watch, planned.experts, scheme, recipe
        )
        made.tensors |= tensors
    if any(planned.shared):
        identity = ExpertId(planned.layer, "shared")
        tensors, record = quantize_shared(
            module, identity, planned.shared, watch.hidden, scheme, recipe.quantization
        )
        made.tensors |= tensors
        made.experts.append(record)
        # the first run had the shared expert of the source
        made.result = run(without_experts if planned.experts else None)
    if planned.experts:
        model.add_routed(made.result, output)
    return made
