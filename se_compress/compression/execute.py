"""Compress the model, one layer at a time, into a checkpoint that is laid out before.

Two streams run side by side: the hidden states of the model compressed so far, and the source's.
The first one is what later layers will really see, so it is what they are calibrated on. The second
shows how far the first has strayed; a few sequences of it are enough for that. Where it has lost
what super experts do, compressing stops (early_warning.py).

For each layer, the compressed stream shows what its matrices see (solver.py). Attention comes
first; then the layer is run again, so that experts and MLPs are calibrated behind the quantised
attention.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from se_compress.artifacts import (
    COMPRESSION_FILE,
    Compressed,
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    ExpertRecord,
    LayerRecord,
    ModelSource,
    RunOptions,
    Scheme,
    TensorInfo,
    to_json,
    write_atomically,
)
from se_compress.compression.early_warning import Side, early_warning, overflow_warning
from se_compress.compression.solver import (
    Packed,
    SolvedLinear,
    quantize_experts,
    quantize_linears,
    quantize_shared,
)
from se_compress.engines.accounting import change_since
from se_compress.engines.blueprint import Blueprint, draw_blueprint
from se_compress.engines.export import export_config
from se_compress.formats import PlannedTensor
from se_compress.model.checkpoint import Reader, allocate, copy_tensor, open_tensors, write_tensors
from se_compress.model.digests import by_owner, digest_of_tensor
from se_compress.model.measures import relative_distance
from se_compress.model.observers import Observer, RoutingCapture, SinkCapture
from se_compress.model.overflow import check_states
from se_compress.model.splice import open_shrunk
from se_compress.model.states import batches_of, leading, load_states, save_states
from se_compress.model.streaming import StreamedModel
from se_compress.opening.families import FAMILIES
from se_compress.opening.headers import lay_out
from se_compress.recipe import Recipe
from se_compress.running.run_directory import load_layers, save

# Tokens of the source's own stream that are kept to compare with: its leading sequences.
WITNESS_TOKENS = 1024
STATES_FILE = "compress-states.safetensors"


def compress(
    source: ModelSource,
    plan: CompressionPlan,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    directory: Path,
    options: RunOptions = RunOptions(),
) -> Compressed:
    """Write the checkpoint that a plan makes of a source into `directory`.

    tokens  calibration sequences of token ids

    The shards are allocated at full size first. With a work directory, progress is saved after
    every layer and taken up again; the tensors that come out are the same, byte for byte. A result
    that stopped early is not whole: it gets no config, so that nobody takes it for one.

    Raises ResourceError if the disk is too small, SourceError if the source cannot be read.
    """
    blueprint = draw_blueprint(source, plan)
    layout = lay_out(blueprint.slots.values(), directory, recipe.shard_size)
    directory.mkdir(parents=True, exist_ok=True)
    _forget_what_is_gone(allocate(layout), options)
    made = Compressed(_fill(blueprint, tokens, recipe, layout, options))
    if made.stopped is None:
        export_config(blueprint, directory, options.keep_code)
    write_atomically(directory / COMPRESSION_FILE, to_json(made))
    return made


def _fill(
    blueprint: Blueprint,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    layout: Mapping[str, TensorInfo],
    options: RunOptions,
) -> tuple[LayerRecord, ...]:
    """Write every tensor of the result to its place in `layout`."""
    source = blueprint.shrunk.original
    read, untouched = open_shrunk(blueprint.shrunk), blueprint.source is source
    _copy(read, layout, blueprint.of_layer(None))
    if untouched and not any(blueprint.packed()):
        return tuple(_copy_layer(blueprint, read, n, layout) for n in range(source.layer_count))
    device, dtype = torch.device(options.device), getattr(torch, recipe.compute_dtype)
    model = StreamedModel(blueprint.source, read, device, dtype)
    original = model
    if not untouched:
        original = StreamedModel(source, open_tensors(source.tensors), device, dtype)
    records, streams = _resume(options, model, blueprint, layout)
    if not records:
        embedded = model.embed(batches_of(tokens, options.batch_tokens))
        streams = {"source": embedded, "result": embedded}
    for layer in range(source.layer_count):
        options.progress("compress", layer, source.layer_count)
        if layer == len(records):
            record, streams = _compress_layer(
                original, model, blueprint, layer, streams, recipe, layout
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
    options: RunOptions,
    model: StreamedModel,
    blueprint: Blueprint,
    layout: Mapping[str, TensorInfo],
) -> tuple[list[LayerRecord], dict[str, list[Tensor]]]:
    """Records of the layers that are done, and the streams behind them; neither without progress
    that can be read, or if what they wrote is not on disk as it was written."""
    if options.work is None:
        return [], {}
    file = options.work / STATES_FILE
    done, streams = load_states(file, model.device, options.notice)
    files = [_record_file(options.work, layer) for layer in range(done + 1)]
    records = load_layers(LayerRecord, files, options.notice)
    if change := change_since(blueprint, layout, records):
        options.notice(f"{change}: its stage starts again")
        return [], {}
    return records, streams


def _save(options: RunOptions, record: LayerRecord, streams: dict[str, list[Tensor]]) -> None:
    """The record first: a layer counts as done once the states behind it are on disk."""
    if options.work is not None:
        save(record, _record_file(options.work, record.layer))
        save_states(options.work / STATES_FILE, record.layer, streams)


def _forget_what_is_gone(emptied: Sequence[str], options: RunOptions) -> None:
    """Start the stage again if shards that were begun had to be made anew."""
    states = options.work / STATES_FILE if options.work else None
    if emptied and states and states.exists():
        options.notice(f"{emptied[0]} is missing or damaged: its stage starts again")
        states.unlink()


# ------------------------------------------------------------------------------------------ copying


def _copy(
    read: Reader, layout: Mapping[str, TensorInfo], tensors: Iterable[PlannedTensor]
) -> dict[str, str]:
    """Put those of the tensors that keep their precision into the result: byte for byte, or as
    surgery makes them. Returns the digests of the latter by name."""
    digests: dict[str, str] = {}
    for tensor in tensors:
        if tensor.making == "copied":
            copy_tensor(tensor.info, layout[tensor.name])
        elif tensor.making == "made":
            digests |= _write(layout, {tensor.name: read(tensor.info.name)})
    return digests


def _write(layout: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Put tensors that were made here into the result, and return their digests by name."""
    digests = {name: digest_of_tensor(tensor) for name, tensor in tensors.items()}
    write_tensors(layout, tensors)
    return digests


def _copy_layer(
    blueprint: Blueprint, read: Reader, layer: int, layout: Mapping[str, TensorInfo]
) -> LayerRecord:
    started = time.perf_counter()
    _copy(read, layout, blueprint.of_layer(layer))
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


def _planned(blueprint: Blueprint, layer: int) -> _Planned:
    down = f".{FAMILIES[blueprint.source.family].projections[2]}.weight"
    widths: dict[str, dict[str, int]] = {}
    for tensor in blueprint.of_layer(layer):
        if tensor.making == "packed":
            info = tensor.info
            kind = info.kind + (" down" if info.name.endswith(down) else "")
            widths.setdefault(kind, {})[info.name] = tensor.bits
    return _Planned(
        layer=layer,
        experts=tuple(
            d
            for d in blueprint.plan.experts
            if d.layer == layer and d.action == "quantize" and d.expert != "shared"
        ),
        shared=(widths.get("shared_expert", {}), widths.get("shared_expert down", {})),
        attention=widths.get("attention", {}),
        dense=(widths.get("dense_mlp", {}), widths.get("dense_mlp down", {})),
    )


def _compress_layer(
    original: StreamedModel,
    model: StreamedModel,
    blueprint: Blueprint,
    layer: int,
    streams: Mapping[str, list[Tensor]],
    recipe: Recipe,
    layout: Mapping[str, TensorInfo],
) -> tuple[LayerRecord, dict[str, list[Tensor]]]:
    """`original` is the source, `model` what surgery left of it: one and the same without any."""
    started = time.perf_counter()
    module = original.load_layer(layer)
    planned = _planned(blueprint, layer)
    same = streams["result"] is streams["source"] and model is original
    untouched = same and not planned
    before = [] if untouched else leading(streams["source"], WITNESS_TOKENS)
    sinks = SinkCapture()
    source = original.run_layer(layer, module, before, sinks)  # the weights are about to change
    check_states(original, layer, source)
    if model is not original:
        del module  # one layer in memory
        module = model.load_layer(layer)
    warns = recipe.validation.early_stop and not untouched
    compared = leading(streams["result"], WITNESS_TOKENS) if warns else []
    watch = _Watch(compared, runs_experts=not planned.experts)
    if planned:
        made = _quantize_layer(
            model, module, planned, streams["result"], watch, blueprint.plan.scheme, recipe
        )
    else:
        made = _Made(model.run_layer(layer, module, streams["result"], watch))
    digests = _write(layout, _stored(blueprint, made.tensors))
    digests |= _copy(model.read, layout, blueprint.of_layer(layer))
    away, failed, origin = 0.0, None, blueprint.shrunk.origin
    if not untouched:
        result = leading(made.result, WITNESS_TOKENS)
        away = relative_distance(result, source)
        failed = overflow_warning(layer, made.result, recipe.validation)
        if warns and not failed:
            load = partial(original.load_layer, layer)
            ours = Side(original, before, source, sinks.sink_mass, load)
            theirs = Side(
                model=model,
                before=compared,
                after=result,
                sinks=watch.sink_mass,
                load=lambda: module,
                source_expert=lambda expert: origin[ExpertId(layer, expert)][0].expert,
            )
            failed = early_warning(layer, ours, theirs, recipe.validation)
    record = LayerRecord(
        layer=layer,
        seconds=time.perf_counter() - started,
        hidden_error=away,
        experts=tuple(_by_source_id(record, origin) for record in made.experts),
        linears=tuple(linear.record for linear in made.linears),
        failed=failed,
        digests=by_owner(digests),
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


def _stored(blueprint: Blueprint, packed: Packed) -> dict[str, Tensor]:
    """The stored parts of packed matrices, by their names in the result."""
    return {
        f"{blueprint.tensors[name].module}.{part}": tensor
        for name, parts in packed.items()
        for part, tensor in parts.items()
    }


def _by_source_id(
    record: ExpertRecord, origin: Mapping[ExpertId, tuple[ExpertId, ...]]
) -> ExpertRecord:
    """Records speak of the source's experts; of merged ones, the first stands for all."""
    return replace(record, expert=origin[record.id][0].expert)


@dataclass
class _Made:
    """What became of one layer.

    result   the hidden states after it
    tensors  packed matrices, by the names of their weights
    experts  records of its experts
    linears  its quantised linears of attention and dense MLP
    """

    result: list[Tensor]
    tensors: Packed = field(default_factory=dict)
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
