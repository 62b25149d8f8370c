"""Run a causal language model one decoder layer at a time.

transformers owns the mathematics of every family; this module owns the order of the work. The model
is built on the meta device and runs its own forward pass, in which stand-ins take the place of the
layers that are not at work (standins.py). Each real layer is loaded without its routed experts, run
over all batches and dropped. What its routed experts are given is kept; then these are loaded a
block at a time (experts.py), and what they put out is added. So memory holds the rest of one layer,
a block or two, and the hidden states, whatever the size of the model.

What happens inside a layer is told to an observer: of routed experts by the blocks, of all else by
the parts of the layer while it runs (hooks.py).

Batches hold sequences of equal length and no padding.

B sequences of a batch, T positions, H channels, V words of the vocabulary. Hidden states are a list
of `States`, one a batch, in the model's dtype, on its device.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from se_compress.artifacts import ALONE, ModelSource, Ranks
from se_compress.model.binding import bind_source, check_bound, experts_modules, meta_model
from se_compress.model.checkpoint import Reader
from se_compress.model.experts import (
    Given,
    LayerExperts,
    experts_forward,
    run_experts,
)
from se_compress.model.hooks import plain_hooks, told
from se_compress.model.live import Lookup, Weights
from se_compress.model.observers import Kept, Notes, Observer, RoutingCapture, tell
from se_compress.model.own_experts import run_experts_by
from se_compress.model.standins import Pass, StandIn, run_until
from se_compress.model.states import States
from se_compress.model.store import IN_MEMORY, Store
from se_compress.running.ranks import spread

# What our experts function is called in transformers' table.
IMPLEMENTATION = "se_compress"
# Positions on which it is seen how routed outputs enter the stream, and the greatest error, of half
# of the channels, of a sum that is taken for one: bfloat16 rounds, any multiplier is further off.
PROBE_POSITIONS, PROBE_ERROR = 16, 0.02


@dataclass
class StreamedModel:
    """A model whose weights come from `read`, a layer at a time.

    Raises SourceError if transformers builds no model from the source's config, or if the source's
    tensors are not exactly those of that model.

    source  config and tensors of the checkpoint
    read    reads a tensor by its name in the source; its values may be those of a compressed model
    device  of weights and hidden states
    dtype   of weights and hidden states
    ranks   share the work, batch by batch and block by block; all of them have all hidden states
    model   the transformers model: weights of decoder layers, embeddings and head stay on the meta
            device, everything else is real
    layers  its decoder layers, on the meta device
    """

    source: ModelSource
    read: Reader
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    ranks: Ranks = ALONE
    store: Store = IN_MEMORY
    _running: Pass = field(default_factory=Pass)
    _adds: dict[object, bool] = field(default_factory=dict)
    _heads: list[nn.Module] = field(default_factory=list)  # the meta head, and once for each user

    def __post_init__(self) -> None:
        where = str(self.source.path / "config.json")
        model = meta_model(self.source.config, where=where, dtype=self.dtype)
        run_experts_by(model, IMPLEMENTATION, experts_forward)
        binding = bind_source(model, self.source)
        check_bound(model, binding, self.source)
        self.weights = Weights(self.source, self.read, model, binding, self.device)
        self.model = model
        # "model.layers" of "model.layers.0.mlp.experts"
        self._path = experts_modules(model)[0][0].partition("layers.")[0] + "layers"
        self.layers: list[nn.Module] = list(model.get_submodule(self._path))
        self._replace_layers()
        self._replace_embeddings()
        self.weights.fill(model, "", skip=(f"{self._head_path}.",))

    def _replace_layers(self) -> None:
        stands = [StandIn(layer, i, self._running) for i, layer in enumerate(self.layers)]
        owner, _, leaf = self._path.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, nn.ModuleList(stands))

    def _replace_embeddings(self) -> None:
        named = [*self.model.named_modules()]
        for path, module in named:
            if isinstance(module, nn.Embedding):
                self.weights.fill(module, path, skip=("weight",))
                table = cache(partial(self.weights.value, f"{path}.weight"))
                owner, _, leaf = path.rpartition(".")
                stand_in = Lookup(module, table, self.device)
                setattr(self.model.get_submodule(owner), leaf, stand_in)

    @property
    def _head_path(self) -> str:
        head = self.model.get_output_embeddings()
        return next(str(path) for path, module in self.model.named_modules() if module is head)

    # -- loading

    def load_layer(self, layer: int) -> nn.Module:
        """A copy of decoder layer `layer` on the device, with its weights but those of its routed
        experts, which `layer_experts` loads.

        Raises SourceError for a weight that is missing, is NaN or infinite.
        """
        return self.weights.loaded(self.layers[layer], f"{self._path}.{layer}")

    def layer_experts(self, module: nn.Module) -> LayerExperts:
        """The routed experts of a loaded MoE layer."""
        (_, experts), *_ = experts_modules(module)
        return cast(LayerExperts, experts.layer_experts)

    def linear_path(self, name: str) -> str:
        """Path of a linear within its decoder layer, e.g. `self_attn.q_proj`.

        name  of its weight in the source
        """
        live = self.weights.binding.live_of[name].removesuffix(".weight")
        return live.removeprefix(f"{self._path}.").partition(".")[2]

    # -- running

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor]) -> list[States]:
        """What comes before the first layer, of each batch of token ids, int64 [B, T].

        Raises SourceError for an embedding that is NaN or infinite.
        """

        def given(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        found = []
        for batch in batches:
            tokens = batch.to(self.device)
            forward = partial(self.model, input_ids=tokens, use_cache=False)
            states = States(tokens, run_until(self._running, 0, None, given, forward))
            found.append(states.kept_in(self.store))
        return found

    def run_layer(
        self,
        layer: int,
        module: nn.Module,
        batches: Sequence[States],
        observer: Observer | None = None,
    ) -> list[States]:
        """The states of each batch after a layer. The input is not changed.

        layer     index of the layer
        module    the layer itself, from `load_layer`
        batches   states before it
        observer  is told what happens inside; without one nobody is
        """
        return self.run_streams(layer, module, [(batches, observer or Observer())])[0]

    @torch.no_grad()
    def run_streams(
        self,
        layer: int,
        module: nn.Module,
        streams: Sequence[tuple[Sequence[States], Observer]],
    ) -> list[list[States]]:
        """The same of several streams, each with its observer: its experts are loaded once."""
        makes = bool(experts_modules(module)) and any(o.runs_experts for _, o in streams)
        adds = not makes or self.adds_routed(module, layer, streams[0][0])
        alone = any(observer.everywhere for _, observer in streams)
        ranks = ALONE if alone else self.ranks
        # Where the layer is run again, all but the routing is seen only then.
        nobody = Observer()
        first = [
            _Job(at, seen, seen if adds or not seen.runs_experts else nobody, batch, states)
            for at, (batches, seen) in enumerate(streams)
            for batch, states in enumerate(batches)
        ]
        found: list[list[States]] = [[] for _ in streams]
        given: list[Given] = []
        seen_of = self._spread(layer, module, first, ranks)
        for job, (after, kept) in zip(first, seen_of, strict=True):
            found[job.stream].append(after.kept_in(self.store))
            kept = _kept_in(self.store, kept)
            job.observer.store = self.store
            tell(job.watching, job.batch, kept)
            if kept[0] is not None:
                job.observer.batch = job.batch
                job.observer.routed(*kept[0])
                if job.observer.runs_experts:
                    given.append(Given(job.observer, job.batch, *kept[0]))
        if given:
            output = run_experts(self.layer_experts(module), given, ranks, self.store)
            parts = iter(torch.split(output, [len(one.hidden) for one in given]))
            running = [job for job in first if job.observer.runs_experts]
            again = [
                replace(job, watching=job.observer, output=part)
                for job, part in zip(running, parts, strict=True)
            ]
            self._finish(layer, module, again, found, adds, ranks)
        return found

    def _finish(
        self,
        layer: int,
        module: nn.Module,
        jobs: Sequence["_Job"],
        found: list[list[States]],
        adds: bool,
        ranks: Ranks,
    ) -> None:
        """Give the states behind a layer what its routed experts put out, in place."""
        if adds:
            for job in jobs:
                assert job.output is not None
                _add(found[job.stream][job.batch], job.output)
            return
        for job, (after, kept) in zip(jobs, self._spread(layer, module, jobs, ranks), strict=True):
            found[job.stream][job.batch] = after.kept_in(self.store)
            tell(job.watching, job.batch, kept)

    def _spread(
        self, layer: int, module: nn.Module, jobs: Sequence["_Job"], ranks: Ranks
    ) -> Iterator[tuple[States, Kept]]:
        """The states behind a layer for each job, and what is to be told; the ranks take turns."""
        hooks = plain_hooks(self.source, self.linear_path, layer, module)

        def work(job: _Job) -> tuple[States, Kept]:
            notes = Notes(job.watching, job.batch)
            with told(module, notes, partial(_stand_in, notes, job.output), hooks):
                after = job.states.behind(self._run(layer, module, job.states))
            return after, notes.kept

        return spread(ranks, jobs, work)

    def _run(self, layer: int, module: nn.Module, states: States) -> Any:
        """What a layer returns for one batch."""

        def work(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Before the first layer it is the embeddings that come, which `states` has.
            first = (states.stream, *args[1:]) if args and index == 0 else args
            return module(*first, **kwargs)

        forward = partial(self.model, input_ids=states.tokens, use_cache=False)
        return run_until(self._running, layer, states.handed_on, work, forward)

    # -- routed outputs that are computed outside of the layer

    @torch.no_grad()
    def add_routed(
        self,
        layer: int,
        module: nn.Module,
        before: Sequence[States],
        without: Sequence[States],
        output: Tensor,
    ) -> list[States]:
        """The states behind a layer whose routed experts give `output`.

        before   states before it
        without  what `run_layer` returned with no output of routed experts; it is changed in place
                 where outputs enter the stream as they are. Elsewhere the layer is run again
        output   [N, H] float32, rows of all batches in order
        """
        if not self.adds_routed(module, layer, before):
            return self._with_output(layer, module, before, output, self.ranks)
        parts = torch.split(output, [states.tokens.numel() for states in without])
        for states, part in zip(without, parts, strict=True):
            _add(states, part)
        return list(without)

    def _with_output(
        self,
        layer: int,
        module: nn.Module,
        before: Sequence[States],
        output: Tensor,
        ranks: Ranks,
    ) -> list[States]:
        """The states behind a layer whose routed experts put out rows [N, H] of all batches."""
        sizes = [states.tokens.numel() for states in before]
        nobody = Observer()
        jobs = [
            _Job(0, nobody, nobody, batch, states, part)
            for batch, (states, part) in enumerate(
                zip(before, torch.split(output, sizes), strict=True)
            )
        ]
        return [after.kept_in(self.store) for after, _ in self._spread(layer, module, jobs, ranks)]

    def adds_routed(self, module: nn.Module, layer: int, before: Sequence[States]) -> bool:
        """Whether routed outputs enter the stream as they are; seen once for layers of one make."""
        make = tuple(type(child) for child in (module, *module.children()))
        if make not in self._adds:
            some = [before[0].cut(slice(1), slice(PROBE_POSITIONS))]
            self._adds[make] = self._adds_as_it_is(module, layer, some)
        return self._adds[make]

    @torch.no_grad()
    def _adds_as_it_is(self, module: nn.Module, layer: int, some: Sequence[States]) -> bool:
        """Run a layer over one batch without routed outputs and with random ones, and compare."""
        capture = RoutingCapture(runs_experts=False)
        capture.everywhere = True
        without = self.run_layer(layer, module, some, capture)[0].hidden
        noise = torch.randn(capture.hidden.shape, generator=torch.Generator().manual_seed(0))
        output = noise.to(self.device) * without.float().square().mean().sqrt()
        changed = self._with_output(layer, module, some, output, ALONE)[0].hidden
        if changed.numel() != output.numel():
            return False
        error = (changed.float() - without.float()).view_as(output) - output
        return float((error.abs() / output.abs()).median()) < PROBE_ERROR

    # -- predictions

    @contextmanager
    def head(self) -> Iterator[None]:
        """While this is entered, by one or by several at once, the head has its weights."""
        path = self._head_path
        if not self._heads:
            self._heads.append(self.model.get_output_embeddings())
            self.model.set_submodule(path, self.weights.loaded(self._heads[0], path))
        self._heads.append(self._heads[0])
        try:
            yield
        finally:
            meta = self._heads.pop()
            if len(self._heads) == 1:
                self._heads.clear()
                self.model.set_submodule(path, meta)

    @torch.no_grad()
    def logits(self, batches: Sequence[States]) -> Iterator[Tensor]:
        """Float32 logits [B, T, V] of each batch, from the states behind the last layer."""
        with self.head():
            for states in batches:
                yield self.logits_of(states)

    @torch.no_grad()
    def logits_of(self, states: States) -> Tensor:
        """The same of one batch, while `head` is entered."""
        self._running.at, self._running.value = len(self.layers), states.handed_on
        logits: Tensor = self.model(input_ids=states.tokens, use_cache=False).logits
        return logits.float()

    @torch.no_grad()
    def generate(
        self, prompts: Tensor, tokens: int, on_token: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Greedy continuations, int64 [B, tokens] on the CPU. Every step loads every layer once.

        No token ends a continuation early, so that models can be compared.

        prompts   token ids of equal length, int64 [B, P]
        tokens    how many are generated
        on_token  called after each step
        """

        def work(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.load_layer(index)(*args, **kwargs)

        last = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        options: dict[str, Any] = {"logits_to_keep": 1} if last else {}
        cache, step, chosen = None, prompts.to(self.device), []
        with self.head():
            for _ in range(tokens):
                self._running.at, self._running.work = 0, work
                found = self.model(input_ids=step, past_key_values=cache, use_cache=True, **options)
                cache, step = found.past_key_values, found.logits[:, -1:].argmax(-1)
                chosen.append(step.cpu())
                on_token()
        return torch.cat(chosen, dim=1)


@dataclass(frozen=True)
class _Job:
    """A layer to be run over one batch.

    stream    which of several streams it is of
    observer  of the stream
    watching  is told what happens but in the routed experts: the observer, or nobody yet
    batch     its index in the stream
    states    before the layer
    output    what the routed experts put out, [N, H]; None: nothing
    """

    stream: int
    observer: Observer
    watching: Observer
    batch: int
    states: States
    output: Tensor | None = None


def _kept_in(store: Store, kept: Kept) -> Kept:
    """What was noted of a batch, with the inputs of routed and shared experts kept there: once, if
    they are the same."""
    given, said, learned = kept
    if store.directory is None or given is None:
        return kept
    hidden, experts, weights = given
    there = store.put(hidden)

    def moved(part: Tensor) -> Tensor:
        alike = part.data_ptr() == hidden.data_ptr() and part.shape == hidden.shape
        return there if alike else store.put(part)

    said = [(kind, (moved(*w),) if kind == "shared_input" else w) for kind, w in said]
    return (there, experts, weights), said, learned


def _stand_in(
    notes: Notes, output: Tensor | None, hidden: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """What stands for the routed experts of a layer, [N, H]; it is noted what they are given."""
    notes.given = hidden.contiguous(), experts.contiguous(), weights.contiguous()
    if output is None:
        return torch.zeros_like(hidden)
    return output.to(hidden.dtype).view_as(hidden)


def _add(states: States, output: Tensor) -> None:
    """Add output [N, H] to the states of a batch, in place."""
    states.hidden.add_(output.view_as(states.hidden).to(states.hidden.dtype))
