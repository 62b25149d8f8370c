"""Source and result run over the same text, one layer of each in memory.

The text may be that of several domains. Then all of them go through a layer while it is in memory,
and what is measured is measured of each, and of all together.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_compress.artifacts import LayerComparison, ModelSource, RunOptions, SinkPosition
from se_compress.engines.tasks import Answers, answers_of_source
from se_compress.model.checkpoint import Reader, open_tensors
from se_compress.model.measures import (
    is_massive,
    massive_elements,
    massive_places,
    mean_over_sequences,
    median_of,
    peak_of,
    relative_distance,
    sink_rate,
    sink_token_change,
)
from se_compress.model.observers import RoutingCapture, SinkCapture
from se_compress.model.overflow import check_states
from se_compress.model.residents import resident
from se_compress.model.states import States, batches_of, hidden_of
from se_compress.model.store import Store
from se_compress.model.streaming import StreamedModel
from se_compress.model.surgery import Shrunk
from se_compress.recipe import Recipe, Tasks
from se_compress.validation.predictions import Predictions, compare_predictions

Tokens = Sequence[Sequence[int]]
LISTED_ELEMENTS, LISTED_SINKS = 8, 4


class _Watch(RoutingCapture, SinkCapture):
    """Routing and attention sinks of one layer of one model."""


@dataclass(frozen=True)
class Seen:
    """What one model showed of one layer.

    states     those after it, of each batch
    sink_mass  attention to position 0, mean over queries from position 8 on, [heads]; [0] in a
               layer without softmax attention
    received   attention that each position receives, mean over the queries that see it, [heads, T];
               None in such a layer
    learned    attention has learned sinks beside its keys: no absolute threshold holds for it
    experts    chosen experts of all N = B x T tokens, [N, k]; None in a dense layer
    """

    states: list[States]
    sink_mass: Tensor
    received: Tensor | None
    learned: bool
    experts: Tensor | None

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden states after the layer, [B, T, H] of each batch."""
        return hidden_of(self.states)

    @property
    def sink_rates(self) -> Tensor | None:
        """Share of the heads for which each position is a sink, [T]; None if nothing says so."""
        return None if self.received is None or self.learned else sink_rate(self.received)


def joined(parts: Sequence[Seen]) -> Seen:
    """What a layer showed of several texts, as if they were one."""
    if len(parts) == 1:
        return parts[0]
    sizes = [sum(len(batch) for batch in part.states) for part in parts]
    experts = [part.experts for part in parts if part.experts is not None]
    received = [
        (size, part.received)
        for size, part in zip(sizes, parts, strict=True)
        if part.received is not None
    ]
    return Seen(
        states=[batch for part in parts for batch in part.states],
        sink_mass=mean_over_sequences(
            [(size, part.sink_mass) for size, part in zip(sizes, parts, strict=True)]
        ),
        received=mean_over_sequences(received) if received else None,
        learned=parts[0].learned,
        experts=torch.cat(experts) if experts else None,
    )


class Original:
    """The source's side of a comparison.

    With `keep`, what its layers showed stays in memory. Several results of a small model are then
    judged at the cost of their own runs alone.

    texts    held-out sequences by domain; one text without a name is called ""
    tokens   those of all domains, one after the other
    """

    def __init__(
        self,
        source: ModelSource,
        tokens: Tokens | Mapping[str, Tokens],
        recipe: Recipe,
        options: RunOptions,
        keep: bool = False,
    ) -> None:
        read = open_tensors(source.tensors)
        self.model = stream(source, read, recipe, options)
        self.texts = tokens if isinstance(tokens, Mapping) else {"": tokens}
        self.tokens = [sequence for text in self.texts.values() for sequence in text]
        self.batches = [batches_of(text, options.batch_tokens) for text in self.texts.values()]
        self._seen: list[list[Seen]] | None = list(self._walk()) if keep else None
        self._continuations: dict[int, list[list[int]]] = {}
        self._answers: dict[Tasks, Answers | str] = {}

    @property
    def all_batches(self) -> list[Tensor]:
        return [batch for batches in self.batches for batch in batches]

    def walk(self) -> Iterable[list[Seen]]:
        """What each layer showed of each text."""
        return self._seen if self._seen is not None else self._walk()

    def _walk(self) -> Iterator[list[Seen]]:
        for batch in self.all_batches:
            check_states(self.model, -1, hidden_of(self.model.embed([batch])))
        for layer, texts in enumerate(_walk(self.model, self.batches)):
            for seen in texts:
                check_states(self.model, layer, seen.hidden)
            yield texts

    def generate(
        self, prompts: Tokens, count: int, on_token: Callable[[], None]
    ) -> list[list[int]]:
        """Greedy continuations of `count` tokens; those of one count are kept for other results."""
        if count not in self._continuations:
            self._continuations[count] = continuations(self.model, prompts, count, on_token)
        return self._continuations[count]

    def answers(self, tasks: Tasks) -> Answers | str:
        """What it gets right of them, or why that is not known; kept for other results."""
        if tasks not in self._answers:
            self._answers[tasks] = answers_of_source(tasks, self.model.source.path)
        return self._answers[tasks]


def continuations(
    model: StreamedModel, prompts: Tokens, count: int, on_token: Callable[[], None]
) -> list[list[int]]:
    """Greedy continuations of `count` tokens of each prompt. Prompts of one length go together,
    with keys and values cached, on layers that stay in memory if they fit."""
    found: dict[int, list[int]] = {}
    with resident(model):
        for length in sorted({len(prompt) for prompt in prompts}):
            here = [at for at, prompt in enumerate(prompts) if len(prompt) == length]
            batch = torch.tensor([list(prompts[at]) for at in here])
            made = model.generate(batch, count, on_token).tolist()
            found |= zip(here, made, strict=True)
    return [found[at] for at in range(len(prompts))]


def stream(source: ModelSource, read: Reader, recipe: Recipe, options: RunOptions) -> StreamedModel:
    """A model that runs layer by layer on tensors that `read` gives by the names of `source`."""
    dtype = getattr(torch, recipe.compute_dtype)
    device, store = torch.device(options.device), Store(options.states_in)
    return StreamedModel(source, read, device, dtype, options.ranks, store)


def _walk(model: StreamedModel, texts: Sequence[Sequence[Tensor]]) -> Iterator[list[Seen]]:
    """What the model shows of each layer, for each text; token ids [B, T] for each batch."""
    states = [model.embed(batches) for batches in texts]
    for layer in range(model.source.layer_count):
        module = model.load_layer(layer)
        found = []
        for index, before in enumerate(states):
            watch = _Watch()
            states[index] = model.run_layer(layer, module, before, watch)
            experts = watch.experts if watch.saw_experts else None
            found.append(
                Seen(states[index], watch.sink_mass, watch.received, watch.learned_sinks, experts)
            )
        del module  # before the next one is loaded
        yield found


@dataclass(frozen=True)
class Compared:
    """What the two streams showed: after each layer, of the strongest sinks, and at the end."""

    layers: tuple[LayerComparison, ...]
    sinks: tuple[SinkPosition, ...]
    predictions: Predictions


def compare(
    original: Original, result: StreamedModel, small: Shrunk | None, options: RunOptions
) -> tuple[Compared, dict[str, Compared]]:
    """Run both models over the texts of `original`: what they show of all together, and of each by
    its name. `small` says which experts of the source are left, None if all are.

    Raises SourceError if the source itself overflows."""
    count = result.source.layer_count
    options.progress("validate", 0, count)
    several = len(original.texts) > 1
    # The whole first, then each text, if these are not the same.
    groups = [_Course() for _ in range(1 + several * len(original.texts))]
    pairs = zip(original.walk(), _walk(result, original.batches), strict=True)
    for layer, (old, new) in enumerate(pairs):
        ids = _new_ids(small, layer, result.source.expert_count)
        before, after = ([joined(side), *(side if several else [])] for side in (list(old), new))
        for group, was, is_now in zip(groups, before, after, strict=True):
            group.add(_compare_layer(layer, was, is_now, ids), was, is_now)
        options.progress("validate", layer + 1, count)
    predictions = compare_predictions(original.model, result, before[0].states, after[0].states)
    whole = groups[0].end(predictions)
    if not several:
        return whole, dict.fromkeys(original.texts, whole)
    begins = itertools.accumulate((len(text) for text in original.texts.values()), initial=0)
    each = {
        name: group.end(predictions.of(begin, len(text)))
        for (name, text), group, begin in zip(
            original.texts.items(), groups[1:], begins, strict=False
        )
    }
    return whole, each


class _Course:
    """What the layers of both models showed so far."""

    def __init__(self) -> None:
        self._layers: list[LayerComparison] = []
        self._sinks = _SinkSums()

    def add(self, layer: LayerComparison, old: Seen, new: Seen) -> None:
        self._layers.append(layer)
        self._sinks.add(old, new)

    def end(self, predictions: Predictions) -> Compared:
        return Compared(tuple(self._layers), self._sinks.strongest(), predictions)


def _compare_layer(layer: int, old: Seen, new: Seen, new_ids: Mapping[int, int]) -> LayerComparison:
    source, result = old.hidden, new.hidden
    places = massive_places(source)
    cosine, error = sink_token_change(source, result, places)
    return LayerComparison(
        layer=layer,
        peak_source=peak_of(source),
        peak_result=peak_of(result),
        sink_mass_source=_mean(old.sink_mass),
        sink_mass_result=_mean(new.sink_mass),
        sink_heads_source=tuple(old.sink_mass.tolist()),
        sink_heads_result=tuple(new.sink_mass.tolist()),
        hidden_error=relative_distance(result, source),
        router_agreement=_agreement(old.experts, new.experts, new_ids),
        massive=massive_elements(source, result, places)[:LISTED_ELEMENTS],
        massive_result=is_massive(peak_of(result), median_of(result)),
        sink_cosine=cosine,
        sink_error=error,
        sink_rate_source=None if old.sink_rates is None else float(old.sink_rates[0]),
        sink_rate_result=None if new.sink_rates is None else float(new.sink_rates[0]),
    )


def _mean(masses: Tensor) -> float | None:
    """Mean over the heads [heads]; None if there are none."""
    return float(masses.mean()) if len(masses) else None


def _new_ids(small: Shrunk | None, layer: int, count: int) -> Mapping[int, int]:
    """Routed expert of the source's layer -> its index in the result, for those that are left. All
    stay as they are without surgery (`small` is None)."""
    if small is None:
        return {expert: expert for expert in range(count)}
    pairs = [
        (member.expert, new.expert, first)
        for new, members in small.origin.items()
        for first, member in enumerate(members)
        if new.layer == layer and isinstance(new.expert, int) and isinstance(member.expert, int)
    ]
    # Of an averaged expert, what stands first is itself.
    return {old: new for old, new, _ in sorted(pairs, key=lambda pair: -pair[2])}


def _agreement(old: Tensor | None, new: Tensor | None, new_ids: Mapping[int, int]) -> float | None:
    """Share of the experts that the source chose for N tokens, `old` [N, k], which the result
    chose for the same token too, `new` [N, k]. None in a dense layer."""
    if old is None or new is None:
        return None
    renamed = torch.full((int(old.max()) + 1,), -1, device=old.device)
    for expert in range(len(renamed)):
        renamed[expert] = new_ids.get(expert, -1)
    return float((renamed[old][:, :, None] == new[:, None, :]).any(dim=2).float().mean())


class _SinkSums:
    """Attention to each position that enough queries can see, summed over the layers that have
    softmax attention. Rates are summed over those without learned sinks."""

    def __init__(self) -> None:
        self._masses: list[Tensor] = []  # [2, T / 2] float64, source and result
        self._rates: list[Tensor] = []

    def add(self, old: Seen, new: Seen) -> None:
        if old.received is None or new.received is None:
            return
        half = (old.received.shape[1] + 1) // 2
        masses = [received.mean(dim=0)[:half] for received in (old.received, new.received)]
        self._masses.append(torch.stack(masses).double())
        rates = [side.sink_rates for side in (old, new) if side.sink_rates is not None]
        if len(rates) == 2:
            self._rates.append(torch.stack([rate[:half] for rate in rates]).double())

    def strongest(self) -> tuple[SinkPosition, ...]:
        """None without a layer that has softmax attention."""
        if not self._masses:
            return ()
        masses = _mean_of(self._masses)
        rates = _mean_of(self._rates) if self._rates else None
        at = masses.amax(dim=0).topk(min(LISTED_SINKS, masses.shape[1])).indices.tolist()
        return tuple(
            SinkPosition(
                position,
                *masses[:, position].tolist(),
                *((None, None) if rates is None else rates[:, position].tolist()),
            )
            for position in at
        )


def _mean_of(parts: Sequence[Tensor]) -> Tensor:
    """Mean of tensors of one shape, summed in order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts)
