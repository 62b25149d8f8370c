"""What a run of a layer tells, and to whom.

B sequences of a batch, T positions, N = B * T rows of a batch with H channels, k experts per token,
n rows and I neurons of one expert. Row = sequence * T + position.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from se_compress.artifacts import ExpertIndex
from se_compress.model.measures import mean_over_sequences, sink_mass
from se_compress.model.routing import rows_by_expert
from se_compress.model.store import IN_MEMORY


class Observer:
    """What a run of a layer reports, batch by batch. Override what is needed.

    The tensors are the run's own and must not be changed. Their dtype is the model's unless a
    method says otherwise.

    batch            index of the batch that is being run; set by the run
    wants_attention  `attention` is called; it costs the probabilities of every head
    wants_inner      `expert` is called for shared experts too; their inner state is computed again
    runs_experts     False: routed experts are told of, not run; nothing stands in
    silenced         experts whose output is replaced by zero
    store            set by the run: where what is kept of all batches is to lie
    learned_sinks    set by the run: attention has sinks that the model has learned, beside its keys
    everywhere       with several ranks, each of them runs all batches: what is wanted of the run is
                     not told here
    by_expert        what `expert` keeps, by expert: with several ranks, each expert is told of on
                     one of them, and all get what was kept
    """

    batch: int = 0
    wants_attention = False
    wants_inner = False
    runs_experts = True
    silenced: frozenset[ExpertIndex] = frozenset()
    store = IN_MEMORY
    learned_sinks = False
    everywhere = False

    def __init__(self) -> None:
        self.by_expert: dict[ExpertIndex, Any] = {}

    def routed(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
        """The routing of one batch.

        hidden   input of the routed experts, [N, H]
        experts  chosen experts, int64 [N, k]
        weights  their routing weights, floating [N, k]
        """

    def expert(
        self, expert: ExpertIndex, rows: Tensor, inner: Tensor, output: Tensor, weights: Tensor
    ) -> None:
        """What one expert did in one batch; it is not called for an expert without a row.

        rows     its rows, int64 [n], ascending
        inner    input of its down_proj, [n, I]
        output   output of its down_proj, [n, H]; zeros if it is silenced
        weights  factor of the output in the layer's sum, [n]; a shared expert's gate, or 1
        """

    def shared_input(self, hidden: Tensor) -> None:
        """Input of the shared expert, [N, H]; in most families that of the routed experts too."""

    def dense(self, inner: Tensor, output: Tensor) -> None:
        """Input [N, I] and output [N, H] of a dense layer's down_proj."""

    def watched(self, sequences: int) -> int:
        """How many of a batch's sequences, from the first on, `attention` is told about."""
        return sequences

    def attention(self, first_key: Tensor, mean_received: Tensor) -> None:
        """Where attention goes in the B watched sequences of a batch; both in float32.

        Not called in a layer without softmax attention (Mamba, convolution, linear attention).
        With learned sinks the probabilities of a query are less than 1 in all.

        first_key      probability that each query gives to position 0, [B, heads, T]
        mean_received  mean probability that each key gets from the queries that see it,
                       [B, heads, T]
        """


class Notes(Observer):
    """What a run tells of one batch, kept until it is told to the observer that wants it, maybe by
    another process.

    given  input [N, H] of the routed experts, the choices and the weights; None in a dense layer
    """

    KINDS = ("shared_input", "dense", "attention", "expert")

    def __init__(self, observer: Observer, batch: int) -> None:
        super().__init__()
        self._observer, self.batch = observer, batch
        self.wants_attention, self.wants_inner = observer.wants_attention, observer.wants_inner
        self.silenced = observer.silenced
        self.given: tuple[Tensor, Tensor, Tensor] | None = None
        self.said: list[tuple[str, tuple[Any, ...]]] = []

    def watched(self, sequences: int) -> int:
        self._observer.batch = self.batch
        return self._observer.watched(sequences)

    def shared_input(self, hidden: Tensor) -> None:
        self._note("shared_input", hidden)

    def dense(self, inner: Tensor, output: Tensor) -> None:
        self._note("dense", inner, output)

    def attention(self, first_key: Tensor, mean_received: Tensor) -> None:
        self._note("attention", first_key, mean_received)

    def expert(
        self, expert: ExpertIndex, rows: Tensor, inner: Tensor, output: Tensor, weights: Tensor
    ) -> None:
        self._note("expert", expert, rows, inner, output, weights)

    def _note(self, kind: str, *what: Any) -> None:
        """Only what the observer has a method for."""
        if getattr(type(self._observer), kind) is not getattr(Observer, kind):
            # What another process hears is contiguous, and strides decide in which order one sums.
            alike = (part.contiguous() if isinstance(part, Tensor) else part for part in what)
            self.said.append((kind, tuple(alike)))

    @property
    def kept(self) -> "Kept":
        return self.given, self.said, self.learned_sinks


# What Notes keep: given, said, learned sinks.
Kept = tuple[tuple[Tensor, Tensor, Tensor] | None, list[tuple[str, tuple[Any, ...]]], bool]


def tell(observer: Observer, batch: int, kept: Kept) -> None:
    """Tell an observer what was noted of a batch, but what its routed experts are given."""
    _, said, learned = kept
    observer.batch = batch
    observer.learned_sinks |= learned
    for kind, what in said:
        getattr(observer, kind)(*what)


class RoutingCapture(Observer):
    """Keeps the input of a layer's routed experts and the routing, over all batches.

    Available after the run, rows in the order of the batches, N of all batches together.

    hidden         [N, H]
    experts        int64 [N, k]
    weights        [N, k]
    shared_hidden  input of the shared expert, [N, H]: `hidden` itself where both are given the same
    """

    def __init__(self, *, runs_experts: bool = True) -> None:
        super().__init__()
        self.runs_experts = runs_experts
        self._hidden: list[Tensor] = []
        self._shared: list[Tensor] = []
        self._routings: list[tuple[Tensor, Tensor]] = []

    def routed(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
        self._hidden.append(hidden.detach())
        self._routings.append((experts, weights))

    def shared_input(self, hidden: Tensor) -> None:
        self._shared.append(hidden.detach())

    @property
    def saw_experts(self) -> bool:
        """False for a dense layer."""
        return bool(self._routings)

    @cached_property
    def hidden(self) -> Tensor:
        whole = self.store.cat(self._hidden)
        alike = zip(self._hidden, self._shared, strict=False)
        if all(a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in alike):
            self._shared.clear()
        self._hidden.clear()  # not twice in memory
        return whole

    @cached_property
    def shared_hidden(self) -> Tensor:
        routed = self.hidden  # says whether `_shared` is anything else
        return self.store.cat(self._shared) if self._shared else routed

    @cached_property
    def experts(self) -> Tensor:
        return torch.cat([experts for experts, _ in self._routings])

    @cached_property
    def weights(self) -> Tensor:
        return torch.cat([weights for _, weights in self._routings])

    @cached_property
    def _by_expert(self) -> list[tuple[Tensor, Tensor]]:
        return rows_by_expert(self.experts, self.weights, 0)

    def rows_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Rows routed to `expert`, int64 [n], ascending, and their routing weights [n]."""
        if expert < len(self._by_expert):
            return self._by_expert[expert]
        return self.experts.new_empty(0), self.weights.new_empty(0)  # behind the last one chosen

    def summed(self, outputs: Iterable[tuple[int, Tensor]]) -> Tensor:
        """What experts put out together, [N, H] float32: of each its outputs [n, H] for the rows
        routed to it, weighted, added in the order in which the experts come."""
        total = self.store.empty(self.hidden.shape, self.hidden, torch.float32).zero_()
        for expert, output in outputs:
            rows, weights = self.rows_of(expert)
            total.index_add_(0, rows, output.float() * weights[:, None])
        return total


class SinkCapture(Observer):
    """Keeps how much attention position 0 gets in a layer, mean over the sequences of all batches.

    Available after the run, float32 on the CPU.

    sink_mass  attention to position 0, see `measures.sink_mass`, [heads]; [0] in a layer without
               softmax attention
    received   mean attention that each position gets from the queries that see it, [heads, T];
               None in a layer without softmax attention
    """

    wants_attention = True

    def __init__(self) -> None:
        super().__init__()
        # For each batch, its number of sequences and their mean.
        self._mass: list[tuple[int, Tensor]] = []
        self._received: list[tuple[int, Tensor]] = []

    def attention(self, first_key: Tensor, mean_received: Tensor) -> None:
        sequences = first_key.shape[0]
        self._mass.append((sequences, sink_mass(first_key).cpu()))
        self._received.append((sequences, mean_received.mean(dim=0).cpu()))

    @property
    def sink_mass(self) -> Tensor:
        return mean_over_sequences(self._mass) if self._mass else torch.zeros(0)

    @property
    def received(self) -> Tensor | None:
        return mean_over_sequences(self._received) if self._received else None
