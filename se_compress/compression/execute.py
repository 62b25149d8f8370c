"""Compress the model, one layer at a time, into a checkpoint that is laid out before.

Two streams run side by side: the hidden states of the model compressed so far, and the source's.
The first one is what later layers will really see, so it is what they are calibrated on. The second
shows how far the first has strayed; a few sequences of it are enough for that. Where it has lost
what super experts do, compressing stops (early_warning.py).

For each layer (layer.py), the compressed stream shows what its matrices see (linears.py,
experts.py). Attention comes first; then the layer is run again, so that experts and MLPs are
calibrated behind the quantised attention.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from se_compress.artifacts import (
    COMPRESSION_FILE,
    Compressed,
    CompressionPlan,
    ExpertId,
    ExpertRecord,
    LayerRecord,
    ModelSource,
    RunOptions,
    TensorInfo,
    to_json,
    write_atomically,
)
from se_compress.compression.distill import distill, sentence_of, with_distilled
from se_compress.compression.folds import records_of_folds
from se_compress.compression.layer import Models, Streams, compress_layer
from se_compress.compression.stacks import Packed
from se_compress.engines.accounting import change_since
from se_compress.engines.blueprint import Blueprint, draw_blueprint
from se_compress.engines.export import checked_settings, export_config
from se_compress.formats import PlannedTensor
from se_compress.model.checkpoint import (
    Reader,
    check_finite,
    copy_tensor,
    open_result,
    open_tensors,
    reserve,
    write_tensors,
)
from se_compress.model.digests import by_owner, digest_of_tensor
from se_compress.model.splice import open_shrunk
from se_compress.model.states import batches_of, load_states, save_states
from se_compress.model.store import Store
from se_compress.model.streaming import StreamedModel
from se_compress.opening.headers import lay_out
from se_compress.recipe import Recipe
from se_compress.running.ranks import call, exchange, first
from se_compress.running.records import load_layers, save

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

    The shards are reserved at full size first. With a work directory, progress is saved after
    every layer and taken up again; the tensors that come out are the same, byte for byte. A result
    that stopped early is not whole: it gets no config, so that nobody takes it for one.

    Raises ResourceError if the disk is too small, SourceError if the source cannot be read,
    ValidationFailed if the engine would read the settings otherwise than they are meant.
    """
    call(options.ranks, compress, source, plan, tokens, recipe, directory, options)
    blueprint = draw_blueprint(source, plan)
    settings = checked_settings(blueprint)
    files = lay_out(blueprint.on_disk.values(), directory, recipe.shard_size)
    first(options.ranks, partial(_reserve, files, directory, options))
    layout = blueprint.found_in(files)
    made = Compressed(_fill(blueprint, tokens, recipe, layout, options))
    if recipe.quantization.refine or recipe.distill or plan.repaired:
        made = replace(made, folds=records_of_folds(tokens))
    if recipe.distill and made.stopped is None:
        train = partial(_distill, blueprint, tokens, recipe, layout, options, made)
        made = first(options.ranks, train)
    if options.ranks.rank == 0:
        if made.stopped is None:
            export_config(blueprint, settings, directory, options.keep_code)
        write_atomically(directory / COMPRESSION_FILE, to_json(made))
    return made


def _reserve(files: Mapping[str, TensorInfo], directory: Path, options: RunOptions) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _forget_what_is_gone(reserve(files), options)


def _fill(
    blueprint: Blueprint,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    layout: Mapping[str, TensorInfo],
    options: RunOptions,
) -> tuple[LayerRecord, ...]:
    """Write every tensor of the result to its place in `layout`."""
    source, ranks = blueprint.shrunk.original, options.ranks
    read, untouched = open_shrunk(blueprint.shrunk), blueprint.source is source
    records, streams = first(ranks, partial(_resume, options, blueprint, layout))
    first(ranks, partial(_copy_outside, read, layout, blueprint, is_new=not records))
    if untouched and not any(blueprint.packed()):
        copy = partial(_copy_layer, blueprint, read, layout=layout)
        return tuple(first(ranks, lambda: [*map(copy, range(source.layer_count))]))
    device, dtype = torch.device(options.device), getattr(torch, recipe.compute_dtype)
    store = Store(options.states_in)
    reduced = original = StreamedModel(blueprint.source, read, device, dtype, ranks, store)
    if not untouched:
        tensors = open_tensors(source.tensors)
        original = StreamedModel(source, tensors, device, dtype, ranks, store)
    models = Models(original, reduced)
    if streams is None:
        embedded = reduced.embed(batches_of(tokens, options.batch_tokens))
        streams = Streams(embedded)
    for layer in range(source.layer_count):
        options.progress("compress", layer, source.layer_count)
        if layer == len(records):
            record, streams = _make_layer(models, blueprint, layer, streams, recipe, layout)
            first(ranks, partial(_save, options, record, streams))
            records.append(record)
            _tell_undone(record, options)
        if records[layer].failed:
            return tuple(records)
    options.progress("compress", source.layer_count, source.layer_count)
    return tuple(records)


def _tell_undone(record: LayerRecord, options: RunOptions) -> None:
    if record.refined is not None and not record.refined.step:
        error = f"{record.refined.selection_before:.2%}"
        options.notice(f"layer {record.layer}: refining left the error at {error} and was undone")


def _distill(
    blueprint: Blueprint,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    layout: Mapping[str, TensorInfo],
    options: RunOptions,
    made: Compressed,
) -> Compressed:
    """Train the finished result on this rank, and put what has changed into its place. A run that
    is killed between that and its record starts the stage again."""
    done = distill(blueprint, tokens, recipe, layout, options)
    options.notice(sentence_of(done.record))
    write_tensors(layout, done.tensors)
    layers = (with_distilled(record, blueprint, layout, done.tensors) for record in made.layers)
    return replace(made, layers=tuple(layers), distilled=done.record)


# ---------------------------------------------------------------------------------------- progress


def _record_file(work: Path, layer: int) -> Path:
    return work / f"compress-layer-{layer:05}.json"


def _resume(
    options: RunOptions, blueprint: Blueprint, layout: Mapping[str, TensorInfo]
) -> tuple[list[LayerRecord], Streams | None]:
    """Records of the layers that are done, and the streams behind them; neither without progress
    that can be read, or if what they wrote is not on disk as it was written."""
    if options.work is None:
        return [], None
    file = options.work / STATES_FILE
    done, streams = load_states(
        file, torch.device(options.device), options.notice, Store(options.states_in)
    )
    files = [_record_file(options.work, layer) for layer in range(done + 1)]
    records = load_layers(LayerRecord, files, options.notice)
    if change := change_since(blueprint, layout, records):
        options.notice(f"{change}: its stage starts again")
        return [], None
    return records, Streams(streams["source"], streams.get("result")) if records else None


def _save(options: RunOptions, record: LayerRecord, streams: Streams) -> None:
    """The record first: a layer counts as done once the states behind it are on disk."""
    if options.work is not None:
        save(record, _record_file(options.work, record.layer))
        named = {"source": streams.source, "result": streams.changed}
        there = {name: states for name, states in named.items() if states is not None}
        save_states(options.work / STATES_FILE, record.layer, there)


def _forget_what_is_gone(emptied: Sequence[str], options: RunOptions) -> None:
    """Start the stage again if shards that were begun had to be made anew."""
    states = options.work / STATES_FILE if options.work else None
    if emptied and states and states.exists():
        options.notice(f"{emptied[0]} is missing or damaged: its stage starts again")
        states.unlink()


# ------------------------------------------------------------------------------------------ copying


def _copy_outside(
    read: Reader, layout: Mapping[str, TensorInfo], blueprint: Blueprint, is_new: bool
) -> None:
    """Copy what is in no layer. Raises SourceError as `_check_copied`, which once is enough."""
    outside = blueprint.of_layer(None)
    if is_new:
        _check_copied(read, outside)
    _copy(read, layout, outside)


def _check_copied(read: Reader, tensors: Iterable[PlannedTensor]) -> None:
    """Raises SourceError if one that is copied holds NaN or infinity: layers for multi-token
    prediction are in no forward pass, which would show it."""
    for tensor in tensors:
        if tensor.making in ("copied", "decoded"):
            check_finite(tensor.info.name, read(tensor.info.name))


def _copy(
    read: Reader, layout: Mapping[str, TensorInfo], tensors: Iterable[PlannedTensor]
) -> dict[str, str]:
    """Put those of the tensors that keep their precision into the result: byte for byte, decoded,
    or as surgery makes them. Returns the digests of the latter by name."""
    digests: dict[str, str] = {}
    for tensor in tensors:
        if tensor.making == "copied":
            copy_tensor(tensor.info, layout[tensor.name])
        elif tensor.making in ("decoded", "made"):
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


# ----------------------------------------------------------------------------------- a layer's turn


@dataclass(frozen=True)
class _Written:
    """The tensors of one layer, on their way to their places.

    digests  by name, of those that were made here
    """

    blueprint: Blueprint
    layout: Mapping[str, TensorInfo]
    digests: dict[str, str] = field(default_factory=dict)

    def put(self, packed: Packed) -> None:
        """Write packed matrices, given by the names of their weights."""
        stored = {
            f"{self.blueprint.tensors[name].module}.{part}": tensor
            for name, parts in packed.items()
            for part, tensor in parts.items()
        }
        self.digests.update(_write(self.layout, stored))

    def opened(self, like: StreamedModel) -> StreamedModel:
        """The result on disk as a model, on the device and in the dtype of another one."""
        model, scheme = self.blueprint.source, self.blueprint.plan.scheme
        read = open_result(self.layout, model.tensors, scheme, self.blueprint.names)
        return StreamedModel(model, read, like.device, like.dtype)


def _make_layer(
    models: Models,
    blueprint: Blueprint,
    layer: int,
    streams: Streams,
    recipe: Recipe,
    layout: Mapping[str, TensorInfo],
) -> tuple[LayerRecord, Streams]:
    """Compress one layer and write all tensors of it: its record, and the streams behind it."""
    started = time.perf_counter()
    written = _Written(blueprint, layout)
    ranks, here = models.reduced.ranks, blueprint.of_layer(layer)
    written.digests.update(first(ranks, partial(_copy, models.reduced.read, layout, here)))
    opened = partial(written.opened, models.reduced)
    done = compress_layer(models, blueprint, layer, streams, recipe, written.put, opened)
    for digests in exchange(ranks, lambda: written.digests):
        written.digests.update(digests)
    origin = blueprint.shrunk.origin
    record = LayerRecord(
        layer=layer,
        seconds=time.perf_counter() - started,
        hidden_error=done.hidden_error,
        experts=tuple(_by_source_id(expert, origin) for expert in done.made.experts),
        linears=tuple(linear.record for linear in done.made.linears),
        failed=done.failed,
        refined=done.made.refined,
        repaired=done.made.repaired,
        digests=by_owner(written.digests),
    )
    return record, done.streams


def _by_source_id(
    record: ExpertRecord, origin: Mapping[ExpertId, tuple[ExpertId, ...]]
) -> ExpertRecord:
    """Records speak of the source's experts; of merged ones, the first stands for all."""
    return replace(record, expert=origin[record.id][0].expert)
