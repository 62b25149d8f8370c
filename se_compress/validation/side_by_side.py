"""Source and result run over the same text, one layer of each in memory."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_compress.artifacts import LayerComparison, ModelSource, RunOptions, SinkPosition
from se_compress.model.checkpoint import Reader, open_tensors
from se_compress.model.measures import (
    cross_entropy,
    is_massive,
    kl_divergence,
    massive_elements,
    massive_places,
    median_of,
    peak_of,
    relative_distance,
    sink_rate,
    sink_token_change,
)
from se_compress.model.overflow import check_logits, check_states
from se_compress.model.streaming import (
    PIECE_TOKENS,
    RoutingCapture,
    SinkCapture,
    StreamedModel,
    batches_of,
    in_pieces,
)
from se_compress.model.surgery import Shrunk
from se_compress.recipe import Recipe

LISTED_ELEMENTS, LISTED_SINKS = 8, 4


class _Watch(RoutingCapture, SinkCapture):
    """Routing and attention sinks of one layer of one model."""


@dataclass(frozen=True)
class Seen:
    """What one model showed of one layer: hidden states after it, sinks, and in a MoE layer the
    chosen experts [N, k]."""

    states: list[Tensor]
    sink_mass: Tensor
    received: Tensor
    experts: Tensor | None


class Original:
    """The source's side of a comparison. With `keep`, what its layers showed stays in memory, so
    that several results of a small model are judged at the cost of theirs alone."""

    def __init__(
        self,
        source: ModelSource,
        tokens: Sequence[Sequence[int]],
        recipe: Recipe,
        options: RunOptions,
        keep: bool = False,
    ) -> None:
        read = open_tensors(source.tensors)
        self.model = stream(source, read, recipe, options)
        self.tokens = tokens
        self.batches = batches_of(tokens, options.batch_tokens)
        self._seen: list[Seen] | None = list(self._walk()) if keep else None
        self._continuations: dict[int, list[list[int]]] = {}

    def walk(self) -> Iterable[Seen]:
        return self._seen if self._seen is not None else self._walk()

    def _walk(self) -> Iterator[Seen]:
        for batch in self.batches:
            check_states(self.model, -1, self.model.embed([batch]))
        for layer, seen in enumerate(_walk(self.model, self.batches)):
            check_states(self.model, layer, seen.states)
            yield seen

    def generate(
        self, prompts: Tensor, count: int, on_token: Callable[[], None]
    ) -> list[list[int]]:
        if count not in self._continuations:
            self._continuations[count] = self.model.generate(prompts, count, on_token).tolist()
        return self._continuations[count]


def stream(source: ModelSource, read: Reader, recipe: Recipe, options: RunOptions) -> StreamedModel:
    dtype = getattr(torch, recipe.compute_dtype)
    return StreamedModel(source, read, torch.device(options.device), dtype)


def _walk(model: StreamedModel, batches: Sequence[Tensor]) -> Iterator[Seen]:
    states = model.embed(batches)
    for layer in range(model.source.layer_count):
        watch = _Watch()
        states = model.run_layer(layer, model.load_layer(layer), states, watch)
        experts = watch.experts if watch.saw_experts else None
        yield Seen(states, watch.sink_mass, watch.received, experts)


@dataclass(frozen=True)
class Predictions:
    """Sums over the predicted tokens of each sequence [S], in nats, and the number of these."""

    tokens: Tensor
    loss_source: Tensor
    loss_result: Tensor
    divergence: Tensor

    @property
    def perplexities(self) -> tuple[float, float]:
        total = self.tokens.sum()
        source, result = (loss.sum() / total for loss in (self.loss_source, self.loss_result))
        return bounded_exp(float(source)), bounded_exp(float(result))


def bounded_exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class Compared:
    """What the two streams showed. `received_*` [heads, T], mean over all layers."""

    layers: tuple[LayerComparison, ...]
    sinks: tuple[SinkPosition, ...]
    predictions: Predictions


def compare(
    original: Original, result: StreamedModel, small: Shrunk | None, options: RunOptions
) -> Compared:
    layers: list[LayerComparison] = []
    sinks = _SinkSums()
    count = result.source.layer_count
    options.progress("validate", 0, count)
    pairs = zip(original.walk(), _walk(result, original.batches), strict=True)
    for layer, (old, new) in enumerate(pairs):
        layers.append(
            _compare_layer(layer, old, new, _new_ids(small, layer, result.source.expert_count))
        )
        sinks.add(old, new)
        options.progress("validate", layer + 1, count)
    return Compared(
        tuple(layers), sinks.strongest(), _compare_predictions(original, result, old, new)
    )


def _compare_layer(layer: int, old: Seen, new: Seen, new_ids: Mapping[int, int]) -> LayerComparison:
    places = massive_places(old.states)
    cosine, error = sink_token_change(old.states, new.states, places)
    return LayerComparison(
        layer=layer,
        peak_source=peak_of(old.states),
        peak_result=peak_of(new.states),
        sink_mass_source=float(old.sink_mass.mean()),
        sink_mass_result=float(new.sink_mass.mean()),
        sink_heads_source=tuple(old.sink_mass.tolist()),
        sink_heads_result=tuple(new.sink_mass.tolist()),
        hidden_error=relative_distance(new.states, old.states),
        router_agreement=_agreement(old.experts, new.experts, new_ids),
        massive=massive_elements(old.states, new.states, places)[:LISTED_ELEMENTS],
        massive_result=is_massive(peak_of(new.states), median_of(new.states)),
        sink_cosine=cosine,
        sink_error=error,
        sink_rate_source=float(sink_rate(old.received)[0]),
        sink_rate_result=float(sink_rate(new.received)[0]),
    )


def _new_ids(small: Shrunk | None, layer: int, count: int) -> Mapping[int, int]:
    """What the result calls each routed expert of the source's layer that it still has; the same
    without surgery."""
    if small is None:
        return {expert: expert for expert in range(count)}
    return {
        member.expert: new.expert
        for new, members in small.origin.items()
        for member in members
        if new.layer == layer and isinstance(new.expert, int) and isinstance(member.expert, int)
    }


def _agreement(old: Tensor | None, new: Tensor | None, new_ids: Mapping[int, int]) -> float | None:
    if old is None or new is None:
        return None
    renamed = torch.full((int(old.max()) + 1,), -1, device=old.device)
    for expert in range(len(renamed)):
        renamed[expert] = new_ids.get(expert, -1)
    return float((renamed[old][:, :, None] == new[:, None, :]).any(dim=2).float().mean())


@dataclass
class _SinkSums:
    """Over the layers: rate and mass of each position that enough queries can see."""

    layers: int = 0
    sums: Tensor | None = None

    def add(self, old: Seen, new: Seen) -> None:
        half = (old.received.shape[1] + 1) // 2
        parts = [
            part[:half]
            for received in (old.received, new.received)
            for part in (received.mean(dim=0), sink_rate(received))
        ]
        stacked = torch.stack(parts).double()
        self.sums = stacked if self.sums is None else self.sums + stacked
        self.layers += 1

    def strongest(self) -> tuple[SinkPosition, ...]:
        assert self.sums is not None
        means = self.sums / self.layers
        at = means[[0, 2]].amax(dim=0).topk(min(LISTED_SINKS, means.shape[1])).indices.tolist()
        rows = ((position, *means[:, position].tolist()) for position in at)
        return tuple(
            SinkPosition(position, mass, mass_after, rate, rate_after)
            for position, mass, rate, mass_after, rate_after in rows
        )


def _compare_predictions(
    original: Original, result: StreamedModel, old: Seen, new: Seen
) -> Predictions:
    sequences = [row[1:] for batch in original.batches for row in batch]
    pieces = [(i, part) for i, row in enumerate(sequences) for part in row.split(PIECE_TOKENS)]
    ours = in_pieces([states[:, :-1] for states in old.states])
    predictions = zip(
        pieces,
        (check_logits(original.model, logits) for logits in original.model.logits(ours)),
        result.logits(in_pieces([states[:, :-1] for states in new.states])),
        strict=True,
    )
    sums = torch.zeros(4, len(sequences), dtype=torch.float64)
    for (sequence, target), source_logits, result_logits in predictions:
        wanted = target[None].to(source_logits.device)
        sums[0, sequence] += target.numel()
        for row, part in enumerate(
            (
                cross_entropy(source_logits, wanted),
                cross_entropy(result_logits, wanted),
                kl_divergence(source_logits, result_logits),
            )
        ):
            sums[row + 1, sequence] += float(part.double().sum())
    return Predictions(*sums)
