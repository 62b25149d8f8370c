"""Profile a model: measure the experts, find the super experts, and confirm them.

Three passes over the model, each a layer at a time: one measures every layer and expert (`watch`,
`losses`, `similarity`), one what an error in each layer costs (`sensitivity`), one silences the
experts that the `criterion` proposes (`confirm`).

States are lists of batches, in the model's dtype.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from se_compress.artifacts import (
    SOURCE_BITS,
    ExpertIndex,
    ExpertProfile,
    ExpertStats,
    LayerSimilarity,
    LayerStats,
    ModelSource,
    RunOptions,
    digest_of,
)
from se_compress.model.checkpoint import open_tensors
from se_compress.model.experts import RoutedExperts
from se_compress.model.overflow import check_inputs, check_states
from se_compress.model.states import States, batches_of, hidden_of, load_states, save_states
from se_compress.model.store import Store
from se_compress.model.streaming import StreamedModel
from se_compress.profiling.confirm import CONFIRM_SEQUENCES, confirm, doubts
from se_compress.profiling.criterion import mark_layers, propose
from se_compress.profiling.doubt import stability_of, undecided_layers, undecided_notes
from se_compress.profiling.losses import Losses, residual_norms, rounding_losses
from se_compress.profiling.sensitivity import SENSITIVITY_TOKENS, in_nats, measure_sensitivities
from se_compress.profiling.similarity import mean_outputs, output_distances
from se_compress.profiling.watch import Watch, layer_stats, sink_notes
from se_compress.quant.grid import Grid
from se_compress.recipe import Recipe
from se_compress.running.ranks import call, first
from se_compress.running.records import load_layers, save

STATES_FILE = "profile-states.safetensors"
# Widths whose losses every profile has; others are measured for a recipe that may choose them.
MEASURED_BITS = (2, 3, 4, 8)
# Of the experts of a block: their losses, and their mean outputs [H] if these are asked for.
_OfBlock = tuple[Mapping[ExpertIndex, Losses], list[Tensor]]


def profile_experts(
    source: ModelSource,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    options: RunOptions = RunOptions(),
) -> ExpertProfile:
    """What every expert and every layer of a model does with the calibration tokens.

    Raises SourceError for weights that are NaN or infinite and for activations that overflow.

    tokens   sequences of token ids, all of one length
    options  with a work directory, progress is saved after every layer and taken up again;
             STATES_FILE in it may go once the profile has been saved
    """
    call(options.ranks, profile_experts, source, tokens, recipe, options)
    model = _open(source, recipe, options)
    measured = _measure_layers(model, tokens, recipe, options)
    layers = mark_layers([part.layer for part in measured])
    experts = tuple(sorted((e for part in measured for e in part.experts), key=lambda e: e.id))
    _assert_all_seen(source, experts)
    # A few: there will be a stream of them for each MoE layer.
    some = tokens[: max(1, SENSITIVITY_TOKENS // len(tokens[0]))]
    layers, experts = in_nats(layers, experts, measure_sensitivities(model, some, recipe, options))
    found = propose(layers, experts, recipe.super_experts)
    if recipe.super_experts.confirm and found.super_experts:
        confirmed = confirm(model, tokens[:CONFIRM_SEQUENCES], found.super_experts, recipe, options)
        found = replace(found, super_experts=confirmed, notes=found.notes + doubts(confirmed))
    undecided = undecided_layers(layers, experts, found)
    return ExpertProfile(
        model=source.name,
        digest=profile_digest(source, tokens, recipe),
        source_digest=source.digest,
        tokens_digest=digest_of(tokens),
        samples=len(tokens),
        sequence_length=len(tokens[0]),
        threshold=max(found.percentile_value, found.fraction_value),
        percentile_value=found.percentile_value,
        fraction_value=found.fraction_value,
        massive=any(layer.massive for layer in layers),
        super_experts=found.super_experts,
        outliers=found.outliers,
        notes=found.notes + undecided_notes(undecided) + sink_notes(layers),
        layers=layers,
        experts=experts,
        similarities=tuple(part.similarity for part in measured if part.similarity),
        undecided=undecided,
        stability=stability_of(layers, experts, recipe.super_experts),
    )


def profile_digest(source: ModelSource, tokens: Sequence[Sequence[int]], recipe: Recipe) -> str:
    """Equal if a profile made from these inputs would be equal."""
    grid = (recipe.quantization.group_size, recipe.quantization.symmetric)
    criterion = recipe.super_experts.model_dump(exclude={"expected"})
    parts = ["profile-8", source.digest, tokens, criterion, grid, recipe.compute_dtype]
    more = [*measured_bits(recipe)] if measured_bits(recipe) != MEASURED_BITS else []
    return digest_of(*parts, *(["similarity"] if recipe.policy.merges else []), *more)


def measured_bits(recipe: Recipe) -> tuple[int, ...]:
    """Widths whose losses the profile of a recipe has."""
    return tuple(sorted({*MEASURED_BITS, *recipe.policy.bits} - {SOURCE_BITS}))


def _open(source: ModelSource, recipe: Recipe, options: RunOptions) -> StreamedModel:
    return StreamedModel(
        source,
        open_tensors(source.tensors),
        torch.device(options.device),
        getattr(torch, recipe.compute_dtype),
        options.ranks,
        Store(options.states_in),
    )


# ---------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Measured:
    """One layer's record, as it is saved while the profile is being made.

    layer       not yet marked as forming or cancelling, without sensitivity
    experts     losses not yet multiplied by the layer's sensitivity
    similarity  only for a recipe that merges, and a MoE layer
    """

    layer: LayerStats
    experts: tuple[ExpertStats, ...]
    similarity: LayerSimilarity | None


def _measure_layers(
    model: StreamedModel, tokens: Sequence[Sequence[int]], recipe: Recipe, options: RunOptions
) -> list[_Measured]:
    """The records of all layers, from the work directory as far as they are there."""
    batches = batches_of(tokens, options.batch_tokens)
    measured, states = first(options.ranks, partial(_resume, model, options))
    states = states or model.embed(batches)
    check_states(model, len(measured) - 1, hidden_of(states))
    for layer in range(model.source.layer_count):
        options.progress("profile", layer, model.source.layer_count)
        if layer < len(measured):
            continue
        record, states = _measure_layer(model, layer, states, batches, recipe)
        measured.append(record)
        first(options.ranks, partial(_save, record, states, layer, options.work))
    options.progress("profile", model.source.layer_count, model.source.layer_count)
    return measured


def _save(record: _Measured, states: list[States], layer: int, work: Path | None) -> None:
    """In this order: a record whose states are missing is measured again, see `_resume`."""
    if work:
        save(record, _record_file(work, layer))
        save_states(work / STATES_FILE, layer, {"source": states})


def _record_file(work: Path, layer: int) -> Path:
    return work / f"profile-layer-{layer:05}.json"


def _resume(model: StreamedModel, options: RunOptions) -> tuple[list[_Measured], list[States]]:
    """The records of layers that are measured, and the states behind them.

    Both are empty without progress that can be read. The states decide how many layers are done.
    """
    if options.work is None:
        return [], []
    done, streams = load_states(
        options.work / STATES_FILE, model.device, options.notice, model.store
    )
    files = [_record_file(options.work, layer) for layer in range(done + 1)]
    measured = load_layers(_Measured, files, options.notice)
    return measured, streams["source"] if measured else []


def _measure_layer(
    model: StreamedModel,
    layer: int,
    before: list[States],
    batches: Sequence[Tensor],
    recipe: Recipe,
) -> tuple[_Measured, list[States]]:
    """A layer's record, and the states after it.

    before   states before the layer, of each batch
    batches  token ids of each batch, int64 [B, T]

    Raises SourceError if the source overflows in the layer.
    """
    module = model.load_layer(layer)
    watch = Watch(batches)
    after = model.run_layer(layer, module, before, watch)
    hidden = hidden_of(after)
    _check_overflow(model, layer, hidden, watch)
    stats = layer_stats(model.source, layer, hidden_of(before), hidden, watch, batches)
    grids = [
        Grid(bits, recipe.quantization.group_size, recipe.quantization.symmetric)
        for bits in measured_bits(recipe)
    ]
    losses: dict[ExpertIndex, Losses] = {}  # of routed experts only
    means: list[Tensor] = []
    if watch.saw_experts:
        residual = residual_norms(hidden)

        def measure(block: RoutedExperts) -> list[_OfBlock]:
            outputs = mean_outputs(block, watch.hidden) if recipe.policy.merges else []
            return [(rounding_losses(block, watch, residual, grids), outputs)]

        for lost, outputs in model.layer_experts(module).each(measure, ranks=model.ranks):
            losses |= lost
            means += outputs
    similarity = LayerSimilarity(layer, output_distances(means)) if means else None
    total = sum(batch.numel() for batch in batches)
    experts = tuple(
        watch.stats(identity, total, losses.get(identity.expert, {}))
        for identity in model.source.experts
        if identity.layer == layer
    )
    return _Measured(stats, experts, similarity), after


def _check_overflow(
    model: StreamedModel, layer: int, after: Sequence[Tensor], watch: Watch
) -> None:
    """Raises SourceError if the source overflows in a layer, wherever calibration would notice."""
    check_states(model, layer, after)
    if watch.saw_experts:
        check_inputs(model, layer, watch.hidden)
    for expert, peak in watch.by_expert.items():
        if peak.overflown is not None:
            check_inputs(model, layer, peak.overflown, expert)


def _assert_all_seen(source: ModelSource, experts: Iterable[ExpertStats]) -> None:
    """Every MoE layer must have recorded something: fused experts have fooled many a hook."""
    seen = {stats.layer for stats in experts if stats.tokens}
    missing = [layer for layer in source.moe_layers if layer not in seen]
    if missing:
        raise RuntimeError(f"no expert was observed in layers {missing}; this is a bug")
