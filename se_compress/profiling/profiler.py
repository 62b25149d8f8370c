"""Measure the experts, find the super experts, and confirm them.

Published criterion (arXiv:2507.23279, eq. 6): an expert is a super expert if its peak |down_proj
output| exceeds both the 99.5th percentile of all experts' peaks and a tenth of the greatest, and
its layer is one of those that form the massive activations. Three things are stricter here than in
the published code:

* the peak is taken over all tokens and all experts of all layers, before the routing weight;
* the forming layers are measured (see `forming_layers`), not the first 75 %;
* if the model has no massive activation, it has no super expert, however uneven the peaks are.

The criterion is relative and only proposes. What confirms is the cause: with the expert's output
set to zero, the massive activation has to vanish, and with another expert of the layer it has to
stay.
"""

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_compress.artifacts import (
    Ablation,
    ExpertId,
    ExpertIndex,
    ExpertProfile,
    ExpertStats,
    LayerSimilarity,
    LayerStats,
    ModelSource,
    OutlierExpert,
    OutlierReason,
    Part,
    RunOptions,
    SuperExpert,
    digest_of,
)
from se_compress.model.checkpoint import open_tensors
from se_compress.model.measures import (
    MASSIVE_PEAK,
    MASSIVE_RATIO,
    is_massive,
    kl_divergence,
    overflows,
    peak_of,
    sink_rate,
)
from se_compress.model.overflow import check_inputs, check_logits, check_states
from se_compress.model.streaming import (
    RoutingCapture,
    SinkCapture,
    StreamedModel,
    batches_of,
    in_pieces,
    load_states,
    save_states,
)
from se_compress.quant.grid import Grid, dequantize, rtn
from se_compress.recipe import Recipe, SuperExperts
from se_compress.running.run_directory import load_layers, save

# A layer forms massive activations if it adds at least this share of the largest addition of any
# layer. Half of the criterion's own tenth, as the residual sees an expert only after its routing
# weight.
FORMING_SHARE = 0.05
CANCELLING_SHARE = 0.25
# A candidate is confirmed if zeroing it takes away this share of its layer's rise, and its control
# less. Not more, because several experts of one layer may share the work (DeepSeek-R1, layer 14:
# two).
CONFIRMING_SHARE = 0.25
CONFIRM_SEQUENCES = 8
# Tokens per expert on which the loss of rounding is measured; the strongest ones are always among
# them.
LOSS_TOKENS = 512
LOSS_STRONGEST = 32
LOSS_STACK_ELEMENTS = 2**26
# Tokens of a layer on which every expert is evaluated, to compare their outputs.
SIMILARITY_TOKENS = 1024
# What a layer's error costs is measured on so many tokens, at this width of all its experts. Not at
# a wider one: errors that are too small to send a token to another expert cost less than they will.
SENSITIVITY_TOKENS = 512
SENSITIVITY_BITS = 3
STATES_FILE = "profile-states.safetensors"


def profile_experts(
    source: ModelSource,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    options: RunOptions = RunOptions(),
) -> ExpertProfile:
    """Run the calibration tokens through the model and measure every expert and every layer.

    tokens   sequences of token ids, all of one length
    options  with a work directory, progress is saved after every layer and taken up again;
             STATES_FILE in it may go once the profile has been saved
    """
    model = _open(source, recipe, options)
    measured = _measure_layers(model, tokens, recipe, options)
    layers = _mark_layers([part.layer for part in measured])
    experts = tuple(sorted((e for part in measured for e in part.experts), key=lambda e: e.id))
    _assert_all_seen(source, experts)
    some = tokens[: max(1, SENSITIVITY_TOKENS // len(tokens[0]))]
    layers, experts = _in_nats(layers, experts, _sensitivities(model, some, recipe, options))
    found = _select(layers, experts, recipe.super_experts)
    if recipe.super_experts.confirm and found.super_experts:
        confirmed = _confirm(
            model, tokens[:CONFIRM_SEQUENCES], found.super_experts, recipe, options
        )
        found = replace(found, super_experts=confirmed, notes=found.notes + _doubts(confirmed))
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
        notes=found.notes,
        layers=layers,
        experts=experts,
        similarities=tuple(part.similarity for part in measured if part.similarity),
    )


def profile_digest(source: ModelSource, tokens: Sequence[Sequence[int]], recipe: Recipe) -> str:
    """Equal if a profile made from these inputs would be equal."""
    grid = (recipe.quantization.group_size, recipe.quantization.symmetric)
    criterion = recipe.super_experts.model_dump()
    parts = ["profile-5", source.digest, tokens, criterion, grid, recipe.compute_dtype]
    return digest_of(*parts, *(["similarity"] if recipe.policy.merge else []))


def _open(source: ModelSource, recipe: Recipe, options: RunOptions) -> StreamedModel:
    return StreamedModel(
        source,
        open_tensors(source.tensors),
        torch.device(options.device),
        getattr(torch, recipe.compute_dtype),
    )


# ------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class _Measured:
    """One layer's part of the profile, as it is saved while the profile is being made."""

    layer: LayerStats
    experts: tuple[ExpertStats, ...]
    similarity: LayerSimilarity | None


def _measure_layers(
    model: StreamedModel, tokens: Sequence[Sequence[int]], recipe: Recipe, options: RunOptions
) -> list[_Measured]:
    batches = batches_of(tokens, options.batch_tokens)
    measured, hidden = _resume(model, options)
    hidden = hidden or model.embed(batches)
    check_states(model, len(measured) - 1, hidden)
    for layer in range(model.source.layer_count):
        options.progress("profile", layer, model.source.layer_count)
        if layer < len(measured):
            continue
        part, hidden = _measure_layer(model, layer, hidden, batches, recipe)
        measured.append(part)
        if options.work:
            save(part, _record_file(options.work, layer))
            save_states(options.work / STATES_FILE, layer, {"source": hidden})
    options.progress("profile", model.source.layer_count, model.source.layer_count)
    return measured


def _record_file(work: Path, layer: int) -> Path:
    return work / f"profile-layer-{layer:05}.json"


def _resume(model: StreamedModel, options: RunOptions) -> tuple[list[_Measured], list[Tensor]]:
    """The layers that are measured, and the hidden states behind them; neither without progress
    that can be read."""
    if options.work is None:
        return [], []
    done, streams = load_states(options.work / STATES_FILE, model.device, options.notice)
    files = [_record_file(options.work, layer) for layer in range(done + 1)]
    measured = load_layers(_Measured, files, options.notice)
    return measured, streams["source"] if measured else []


def _measure_layer(
    model: StreamedModel,
    layer: int,
    hidden: list[Tensor],
    batches: Sequence[Tensor],
    recipe: Recipe,
) -> tuple[_Measured, list[Tensor]]:
    module = model.load_layer(layer)
    watch = _Watch(batches)
    after = model.run_layer(layer, module, hidden, watch)
    _check_overflow(model, layer, after, watch)
    stats = _layer_stats(model.source, layer, hidden, after, watch, batches)
    grids = [
        Grid(bits, recipe.quantization.group_size, recipe.quantization.symmetric)
        for bits in (2, 3, 4, 8)
    ]
    losses = _rounding_losses(model, layer, module, watch, after, grids)
    total = sum(batch.numel() for batch in batches)
    experts = tuple(
        watch.stats(ExpertId(layer, expert), total, losses.get(expert, {}))
        for identity in model.source.experts
        if identity.layer == layer
        for expert in [identity.expert]
    )
    similarity = None
    if recipe.policy.merge and watch.saw_experts:
        distances = _output_distances(model.experts_module(module), watch.hidden)
        similarity = LayerSimilarity(layer, distances)
    return _Measured(stats, experts, similarity), after


def _check_overflow(
    model: StreamedModel, layer: int, after: Sequence[Tensor], watch: "_Watch"
) -> None:
    """Raises SourceError if the source overflows in a layer, wherever calibration would notice."""
    check_states(model, layer, after)
    if watch.saw_experts:
        check_inputs(model, layer, watch.hidden)
    for expert, inner in watch.overflown.items():
        check_inputs(model, layer, inner, expert)


def _output_distances(experts: Any, hidden: Tensor) -> tuple[float, ...]:
    """See LayerSimilarity; five digits of each, which is what their reading needs."""
    some = hidden[:: max(1, len(hidden) // SIMILARITY_TOKENS)]
    means = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        inner = experts._apply_gate(nn.functional.linear(some, gate_up))
        means.append(nn.functional.linear(inner, down).float().mean(dim=0))
    return tuple(float(f"{d:.5g}") for d in nn.functional.pdist(torch.stack(means)).tolist())


@dataclass
class _Peak:
    """Running maximum of |output| and its place, and sums for the means."""

    value: float = 0.0
    weighted: float = 0.0
    channel: int = -1
    position: int = -1
    token_id: int = -1
    tokens: int = 0
    weight_sum: float = 0.0
    norm_sum: float = 0.0
    saliency_sum: float = 0.0


class _Watch(RoutingCapture, SinkCapture):
    """Observes one layer over all batches: experts, dense MLP, attention to the sink."""

    wants_inner = True

    def __init__(self, batches: Sequence[Tensor]) -> None:
        super().__init__()
        self.batches = batches
        self.peaks: dict[ExpertIndex, _Peak] = {}
        self.overflown: dict[ExpertIndex, Tensor] = {}
        self.dense_peak: float | None = None

    def expert(
        self, expert: ExpertIndex, rows: Tensor, inner: Tensor, output: Tensor, weights: Tensor
    ) -> None:
        if overflows(inner):
            self.overflown.setdefault(expert, inner)
        size = output.float().abs()
        strength, norms = size.amax(dim=1), output.float().norm(dim=1)
        peak = self.peaks.setdefault(expert, _Peak())
        at = int(strength.argmax())
        if float(strength[at]) > peak.value:
            token_ids = self.batches[self.batch]
            row = int(rows[at])
            peak.value, peak.channel = float(strength[at]), int(size[at].argmax())
            peak.position = row % token_ids.shape[1]
            peak.token_id = int(token_ids.reshape(-1)[row])
        peak.weighted = max(peak.weighted, float((strength * weights.float()).max()))
        peak.tokens += len(rows)
        peak.weight_sum += float(weights.sum(dtype=torch.float64))
        peak.norm_sum += float(norms.sum(dtype=torch.float64))
        peak.saliency_sum += float((norms * weights.float()).sum(dtype=torch.float64))

    def dense(self, inner: Tensor, output: Tensor) -> None:
        self.dense_peak = max(self.dense_peak or 0.0, float(output.float().abs().max()))

    def stats(
        self, identity: ExpertId, total: int, loss: Mapping[Part, Mapping[int, float]]
    ) -> ExpertStats:
        peak = self.peaks.get(identity.expert, _Peak())
        tokens = max(peak.tokens, 1)
        return ExpertStats(
            layer=identity.layer,
            expert=identity.expert,
            peak=peak.value,
            weighted_peak=peak.weighted,
            channel=peak.channel,
            position=peak.position,
            token_id=peak.token_id,
            tokens=peak.tokens,
            gate_mass=peak.weight_sum / total,
            mean_output_norm=peak.norm_sum / tokens,
            saliency=peak.saliency_sum / tokens,
            loss_gate_up=loss.get("gate_up", {}),
            loss_down=loss.get("down", {}),
        )


def _layer_stats(
    source: ModelSource,
    layer: int,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    watch: _Watch,
    batches: Sequence[Tensor],
) -> LayerStats:
    peak, place = 0.0, (0, 0, 0, 0)
    rise = fall = 0.0
    medians: list[float] = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        size = new.float().abs()
        change = size - old.float().abs()
        rise, fall = max(rise, float(change.max())), max(fall, float(-change.min()))
        medians += size.flatten(1).median(dim=1).values.tolist()
        if float(size.max()) > peak:
            peak = float(size.max())
            at = torch.unravel_index(size.argmax(), size.shape)
            place = (index, int(at[0]), int(at[1]), int(at[2]))
    index, sequence, position, channel = place
    median = sum(medians) / len(medians)
    return LayerStats(
        layer=layer,
        moe=layer in source.moe_layers,
        peak=peak,
        position=position,
        channel=channel,
        token_id=int(batches[index][sequence, position]),
        median=median,
        rise=rise,
        fall=fall,
        massive=is_massive(peak, median),
        forming=False,
        cancelling=False,
        mlp_peak=watch.dense_peak,
        sink_mass=tuple(watch.sink_mass.tolist()),
        sink_rate=float(sink_rate(watch.received)[0]),
    )


def _rounding_losses(
    model: StreamedModel,
    layer: int,
    module: nn.Module,
    watch: _Watch,
    after: Sequence[Tensor],
    grids: Sequence[Grid],
) -> dict[ExpertIndex, dict[Part, dict[int, float]]]:
    """Expert -> part -> bits -> loss, see ExpertStats; not that of the shared expert."""
    if layer not in model.source.moe_layers:
        return {}
    experts = model.experts_module(module)
    residual = torch.cat([states.float().flatten(0, 1).norm(dim=1) for states in after])
    gate_up, down = experts.gate_up_proj, experts.down_proj
    chunk = max(1, LOSS_STACK_ELEMENTS // gate_up[0].numel())
    losses: dict[ExpertIndex, dict[Part, dict[int, float]]] = {}
    for start in range(0, gate_up.shape[0], chunk):
        stop = min(start + chunk, gate_up.shape[0])
        samples = [_sample(experts, expert, watch, residual) for expert in range(start, stop)]
        hidden_power = torch.stack([_mean_square(s.hidden) for s in samples])
        inner_power = torch.stack([_mean_square(s.inner) for s in samples])
        for i, sample in enumerate(samples):
            gone = _loss(sample, sample.output.float(), len(residual))
            losses[start + i] = {"gate_up": {}, "down": {0: gone}}
        for grid in grids:
            rounded_in = dequantize(rtn(gate_up[start:stop].float(), grid, hidden_power))
            rounded_out = dequantize(rtn(down[start:stop].float(), grid, inner_power))
            for i, sample in enumerate(samples):
                inner = experts._apply_gate(sample.hidden.float() @ rounded_in[i].T)
                outputs: dict[Part, Tensor] = {
                    "gate_up": inner @ down[start + i].float().T,
                    "down": sample.inner.float() @ rounded_out[i].T,
                }
                for part, output in outputs.items():
                    error = output - sample.output.float()
                    losses[start + i][part][grid.bits] = _loss(sample, error, len(residual))
    return losses


@dataclass(frozen=True)
class _Sample:
    """Tokens of one expert: inputs [n, H] and [n, I], output [n, H], and what a squared error of
    the output counts, [n]: (weight / residual norm)^2 x how many tokens this one stands for."""

    hidden: Tensor
    inner: Tensor
    output: Tensor
    factor: Tensor


def _sample(experts: nn.Module, expert: int, watch: _Watch, residual: Tensor) -> _Sample:
    rows, weights = watch.rows_of(expert)
    importance = (weights.float() / residual[rows].clamp(min=1e-12)).square()
    stands_for = torch.ones_like(importance)
    if len(rows) > LOSS_TOKENS:
        strongest = importance.topk(LOSS_STRONGEST).indices
        rest = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        rest[strongest] = False
        others = rest.nonzero()[:, 0]
        step = len(others) / (LOSS_TOKENS - LOSS_STRONGEST)
        picked = (torch.arange(LOSS_TOKENS - LOSS_STRONGEST, device=rows.device) * step).long()
        keep = torch.cat([strongest, others[picked]])
        stands_for = torch.cat(
            [stands_for[:LOSS_STRONGEST], torch.full((len(picked),), step, device=rows.device)]
        )
        rows, importance = rows[keep], importance[keep]
    hidden = watch.hidden[rows]
    inner = experts._apply_gate(nn.functional.linear(hidden, experts.gate_up_proj[expert]))  # type: ignore
    output = nn.functional.linear(inner, experts.down_proj[expert])  # type: ignore[index]
    return _Sample(hidden, inner, output, importance * stands_for)


def _loss(sample: _Sample, error: Tensor, tokens: int) -> float:
    """What an error [n, H] of an expert's output costs, over all `tokens` of the layer."""
    return float((error.square().sum(dim=1) * sample.factor).sum() / tokens)


def _mean_square(inputs: Tensor) -> Tensor:
    """Per column; zero for an expert that saw no token."""
    return inputs.float().square().sum(dim=0) / max(1, len(inputs))


def _assert_all_seen(source: ModelSource, experts: Iterable[ExpertStats]) -> None:
    """Every MoE layer must have recorded something: fused experts have fooled many a hook."""
    seen = {stats.layer for stats in experts if stats.tokens}
    missing = [layer for layer in source.moe_layers if layer not in seen]
    if missing:
        raise RuntimeError(f"no expert was observed in layers {missing}; this is a bug")


# ---------------------------------------------------------------------------------- sensitivity


@dataclass
class _Rounded:
    """A copy of the stream behind one layer's rounded experts; `error` is the mean over tokens of
    the squared relative distance that the rounding made in the layer's output."""

    layer: int
    error: float
    hidden: list[Tensor]


def _sensitivities(
    model: StreamedModel, tokens: Sequence[Sequence[int]], recipe: Recipe, options: RunOptions
) -> dict[int, float]:
    """MoE layer -> LayerStats.sensitivity.

    An error is passed on by the later layers, which may drop it or send tokens to other experts for
    it; how much it costs differs between layers by a factor of three and more, and with it, losses
    rank like what quantising really costs (benchmarks/rank_correlation.py). One pass, the stream
    forked behind every MoE layer.
    """
    rule = recipe.quantization
    grid = Grid(SENSITIVITY_BITS, rule.group_size, rule.symmetric)
    base, forks = model.embed(batches_of(tokens, options.batch_tokens)), list[_Rounded]()
    count = model.source.layer_count
    for layer in range(count):
        options.progress("sensitivity", layer, count)
        base = _fork_layer(model, layer, base, forks, grid)
    options.progress("sensitivity", count, count)
    costs = (_mean_divergence(model, base, fork.hidden) for fork in forks)
    return {
        fork.layer: max(cost, 1e-9) / max(fork.error, 1e-12)
        for fork, cost in zip(forks, costs, strict=True)
    }


def _fork_layer(
    model: StreamedModel, layer: int, before: list[Tensor], forks: list[_Rounded], grid: Grid
) -> list[Tensor]:
    """Run a layer over the stream and its copies and fork one more; returns the stream after it."""
    module, capture = model.load_layer(layer), RoutingCapture()
    for fork in forks:
        fork.hidden = model.run_layer(layer, module, fork.hidden)
    after = model.run_layer(layer, module, before, capture)
    if layer in model.source.moe_layers:
        _round_experts(model.experts_module(module), capture, grid)
        rounded = model.run_layer(layer, module, before)
        forks.append(_Rounded(layer, _squared_distance(rounded, after), rounded))
    return after


def _round_experts(experts: Any, capture: RoutingCapture, grid: Grid) -> None:
    """Round the live weights of a layer's experts to the nearest codes, in place."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    chunk = max(1, LOSS_STACK_ELEMENTS // gate_up[0].numel())
    for start in range(0, gate_up.shape[0], chunk):
        members = range(start, min(start + chunk, gate_up.shape[0]))
        inputs = [capture.hidden[capture.rows_of(expert)[0]] for expert in members]
        inner = [
            experts._apply_gate(nn.functional.linear(rows, gate_up[expert]))
            for expert, rows in zip(members, inputs, strict=True)
        ]
        for weight, seen in ((gate_up, inputs), (down, inner)):
            power = torch.stack([_mean_square(rows) for rows in seen])
            part = weight[members.start : members.stop]
            part.copy_(dequantize(rtn(part.float(), grid, power)))


def _squared_distance(changed: Sequence[Tensor], states: Sequence[Tensor]) -> float:
    ratios = [
        ((new.float() - old.float()).norm(dim=-1) / old.float().norm(dim=-1)).square().flatten()
        for new, old in zip(changed, states, strict=True)
    ]
    return float(torch.cat(ratios).mean())


def _mean_divergence(
    model: StreamedModel, source: Sequence[Tensor], changed: Sequence[Tensor]
) -> float:
    """Mean KL(source || changed) over positions, from the hidden states after the last layer."""
    ours, theirs = in_pieces(source), in_pieces(changed)
    before = (check_logits(model, logits) for logits in model.logits(ours))
    pairs = zip(before, model.logits(theirs), strict=True)
    tokens = sum(states.shape[0] * states.shape[1] for states in source)
    return sum(float(kl_divergence(a, b).double().sum()) for a, b in pairs) / tokens


def _in_nats(
    layers: Sequence[LayerStats], experts: Sequence[ExpertStats], sensitivity: Mapping[int, float]
) -> tuple[tuple[LayerStats, ...], tuple[ExpertStats, ...]]:
    """Layers with their sensitivity, and experts whose losses are multiplied by it."""

    def scaled(loss: Mapping[int, float], layer: int) -> dict[int, float]:
        return {bits: sensitivity[layer] * value for bits, value in loss.items()}

    return (
        tuple(replace(s, sensitivity=sensitivity.get(s.layer, s.sensitivity)) for s in layers),
        tuple(
            replace(
                e,
                loss_gate_up=scaled(e.loss_gate_up, e.layer),
                loss_down=scaled(e.loss_down, e.layer),
            )
            for e in experts
        ),
    )


# ------------------------------------------------------------------------------------ the criterion


@dataclass(frozen=True)
class _Selection:
    super_experts: tuple[SuperExpert, ...]
    outliers: tuple[OutlierExpert, ...]
    percentile_value: float
    fraction_value: float
    notes: tuple[str, ...] = ()


def forming_layers(layers: Sequence[LayerStats]) -> frozenset[int]:
    """Layers that form massive activations.

    After such a layer the residual stream is massive (Sun et al.), and the layer adds to some |h|
    at least FORMING_SHARE of what any layer adds. What counts is the change of an element, not of
    the maximum: super experts that build one activation up over several layers, or on several
    channels, are all found; a layer that only carries or cancels it is not.
    """
    greatest = max((layer.rise for layer in layers if layer.massive), default=0.0)
    return frozenset(
        layer.layer for layer in layers if layer.massive and layer.rise >= FORMING_SHARE * greatest
    )


def cancelling_layers(layers: Sequence[LayerStats]) -> frozenset[int]:
    """Layers that take away at least a quarter of the massive activation that reached them."""
    return frozenset(
        layer.layer
        for before, layer in pairwise(layers)
        if before.massive and layer.fall >= CANCELLING_SHARE * before.peak
    )


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear interpolation between order statistics, as numpy.percentile does by default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def over_thresholds(
    peaks: Mapping[ExpertId, float], percent: float, fraction: float
) -> tuple[list[ExpertId], float, float]:
    """Experts whose peak exceeds both clauses of eq. 6, and the two values. All experts of the
    model belong in `peaks`, never-routed ones with 0: leaving some out would shift the
    percentile."""
    by_percentile = percentile(peaks.values(), percent)
    by_fraction = fraction * max(peaks.values())
    chosen = [e for e, peak in peaks.items() if peak > by_percentile and peak > by_fraction]
    return sorted(chosen), by_percentile, by_fraction


def select_super_experts(
    peaks: Mapping[ExpertId, float],
    forming: Collection[int],
    percent: float = 99.5,
    fraction: float = 0.1,
) -> list[ExpertId]:
    """The criterion as published: over both thresholds, and in a layer that forms massive
    activations."""
    chosen, _, _ = over_thresholds(peaks, percent, fraction)
    return [identity for identity in chosen if identity.layer in forming]


def _mark_layers(layers: Sequence[LayerStats]) -> tuple[LayerStats, ...]:
    forming, cancelling = forming_layers(layers), cancelling_layers(layers)
    return tuple(
        replace(s, forming=s.layer in forming, cancelling=s.layer in cancelling) for s in layers
    )


def _select(
    layers: Sequence[LayerStats], experts: Sequence[ExpertStats], rule: SuperExperts
) -> _Selection:
    stats = {expert.id: expert for expert in experts}
    peaks = {identity: expert.peak for identity, expert in stats.items()}
    chosen, by_percentile, by_fraction = over_thresholds(
        peaks, rule.percentile, rule.fraction_of_max
    )
    marks = {layer.layer: layer for layer in layers}
    supers, outliers = [], []
    for identity in chosen:
        e, layer = stats[identity], marks[identity.layer]
        if layer.forming:
            supers.append(SuperExpert(e.layer, e.expert, e.peak, e.channel, e.position, e.token_id))
            continue
        outliers.append(
            OutlierExpert(e.layer, e.expert, e.peak, e.channel, e.position, _why_not(layer, layers))
        )
    notes = _notes(layers, {e.layer for e in supers})
    return _Selection(tuple(supers), tuple(outliers), by_percentile, by_fraction, notes)


def _why_not(layer: LayerStats, layers: Sequence[LayerStats]) -> OutlierReason:
    if not any(other.massive for other in layers):
        return "model has none"
    return "cancels" if layer.cancelling else "layer forms no massive activation"


def _notes(layers: Sequence[LayerStats], with_super_experts: set[int]) -> tuple[str, ...]:
    if not any(layer.massive for layer in layers):
        ratios = {layer: layer.peak / max(layer.median, 1e-12) for layer in layers}
        best = max(layers, key=lambda layer: ratios[layer])
        return (
            f"no massive activation: the residual peaks at {best.peak:.1f} after layer "
            f"{best.layer}, {ratios[best]:.0f} times the median, and more than "
            f"{MASSIVE_PEAK:.0f} and {MASSIVE_RATIO:.0f} medians are needed; "
            "so there is no super expert",
        )
    notes = []
    for layer in layers:
        if layer.forming and layer.layer not in with_super_experts:
            source = (
                f"its dense MLP (peak {layer.mlp_peak:.1f})" if not layer.moe else "no one expert"
            )
            notes.append(
                f"layer {layer.layer} forms massive activations (adds {layer.rise:.1f}), "
                f"by {source}: no super expert there"
            )
    return tuple(notes)


# --------------------------------------------------------------------------------------- confirming


@dataclass
class _Variant:
    """A copy of the stream in which one expert is silent."""

    silent: ExpertId
    hidden: list[Tensor] = field(default_factory=list)
    rise_removed: float = 0.0
    peaks: dict[int, float] = field(default_factory=dict)
    sinks: dict[int, float] = field(default_factory=dict)
    divergence: float = 0.0


class _SinkWatch(SinkCapture):
    """Attention to the sink, with some experts silent."""

    def __init__(self, silent: Iterable[ExpertIndex] = ()) -> None:
        super().__init__()
        self.silenced = frozenset(silent)

    @property
    def mean(self) -> float:
        return float(self.sink_mass.mean())


def _confirm(
    model: StreamedModel,
    tokens: Sequence[Sequence[int]],
    candidates: Sequence[SuperExpert],
    recipe: Recipe,
    options: RunOptions,
) -> tuple[SuperExpert, ...]:
    """Silence every candidate, and beside it a random expert of its layer, and watch the stream.

    One pass: the source's stream and one copy for each silenced expert, forked at its layer.
    """
    candidate_ids = {candidate.id for candidate in candidates}
    pairs = {c.id: _control_for(c.id, candidate_ids, model.source, recipe) for c in candidates}
    variants = [_Variant(i) for pair in pairs.items() for i in pair if i is not None]
    base = _Variant(ExpertId(-1, -1))
    batches = batches_of(tokens, options.batch_tokens)
    base.hidden = model.embed(batches)
    for layer in range(model.source.layer_count):
        options.progress("confirm", layer, model.source.layer_count)
        _confirm_layer(model, layer, base, variants)
    options.progress("confirm", model.source.layer_count, model.source.layer_count)
    _measure_divergence(model, base, variants)
    results = {variant.silent: _ablation(base, variant) for variant in variants}
    return tuple(_with_evidence(c, results, pairs[c.id]) for c in candidates)


def _control_for(
    candidate: ExpertId, candidates: Collection[ExpertId], source: ModelSource, recipe: Recipe
) -> ExpertId | None:
    others = [ExpertId(candidate.layer, expert) for expert in range(source.expert_count)]
    others = [identity for identity in others if identity not in candidates]
    chooser = random.Random(f"{recipe.calibration.seed} {candidate}")
    return chooser.choice(others) if others else None


def _confirm_layer(
    model: StreamedModel, layer: int, base: _Variant, variants: Sequence[_Variant]
) -> None:
    module = model.load_layer(layer)
    before = base.hidden
    watch = _SinkWatch()
    base.hidden = model.run_layer(layer, module, before, watch)
    base.peaks[layer], base.sinks[layer] = peak_of(base.hidden), watch.mean
    for variant in variants:
        forks = variant.silent.layer == layer
        if layer < variant.silent.layer:
            continue
        watch = _SinkWatch([variant.silent.expert] if forks else [])
        variant.hidden = model.run_layer(layer, module, before if forks else variant.hidden, watch)
        variant.peaks[layer], variant.sinks[layer] = peak_of(variant.hidden), watch.mean
        if forks:
            variant.rise_removed = _rise_removed(before, base.hidden, variant.hidden)


def _rise_removed(
    before: Sequence[Tensor], after: Sequence[Tensor], silenced: Sequence[Tensor]
) -> float:
    """1 - (rise with the expert silent) / (rise), at each sequence's element that rises most."""
    rises = removed = 0.0
    for old, new, silent in zip(before, after, silenced, strict=True):
        rise = (new.float().abs() - old.float().abs()).flatten(1)
        without = (silent.float().abs() - old.float().abs()).flatten(1)
        at = rise.argmax(dim=1, keepdim=True)
        rises += float(rise.gather(1, at).sum())
        removed += float((rise - without).gather(1, at).sum())
    return removed / rises if rises else 0.0


def _measure_divergence(model: StreamedModel, base: _Variant, variants: Sequence[_Variant]) -> None:
    for variant in variants:
        variant.divergence = _mean_divergence(model, base.hidden, variant.hidden)


def _ablation(base: _Variant, variant: _Variant) -> Ablation:
    strongest = max(variant.peaks, key=lambda layer: base.peaks[layer])
    later = [layer for layer in variant.sinks if layer > variant.silent.layer]
    before = sum(base.sinks[layer] for layer in later)
    return Ablation(
        layer=variant.silent.layer,
        expert=variant.silent.expert,
        rise_removed=variant.rise_removed,
        massive_activation=variant.peaks[strongest] / base.peaks[strongest],
        sink_mass=sum(variant.sinks[layer] for layer in later) / before if before else 1.0,
        kl_divergence=variant.divergence,
    )


def _with_evidence(
    candidate: SuperExpert, results: Mapping[ExpertId, Ablation], control: ExpertId | None
) -> SuperExpert:
    zeroed = results[candidate.id]
    beside = results[control] if control else None
    confirmed = zeroed.rise_removed >= CONFIRMING_SHARE and (
        beside is None or beside.rise_removed < CONFIRMING_SHARE
    )
    return replace(candidate, confirmed=confirmed, zeroed=zeroed, control=beside)


def _doubts(candidates: Sequence[SuperExpert]) -> tuple[str, ...]:
    return tuple(
        f"expert {candidate.id} meets the criterion, but zeroing it takes away only "
        f"{max(0.0, candidate.zeroed.rise_removed):.0%} of its layer's rise: it is protected, not "
        "confirmed"
        for candidate in candidates
        if candidate.zeroed and not candidate.confirmed
    )
