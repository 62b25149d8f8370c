"""What a run of a layer tells, and to whom."""

from functools import cached_property

import torch
from torch import Tensor

from se_compress.artifacts import ExpertIndex
from se_compress.model.measures import mean_over_sequences, sink_mass
from se_compress.model.routing import rows_by_expert


class Observer:
    """What a run of a layer reports; override what is needed. Tensors are not to be changed.

    `batch` is set before each batch: its index among the batches. `wants_inner` asks for `expert`
    of shared experts, whose inner state has to be computed once more for that. Without
    `runs_experts` the routed experts are told of, not run: they add nothing.
    """

    batch: int = 0
    wants_attention = False
    wants_inner = False
    runs_experts = True
    silenced: frozenset[ExpertIndex] = frozenset()

    def routed(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
        """Input of the routed experts [N, H], chosen experts [N, k] and their weights [N, k];
        N = sequences x length, row = sequence * length + position."""

    def expert(
        self, expert: ExpertIndex, rows: Tensor, inner: Tensor, output: Tensor, weights: Tensor
    ) -> None:
        """One expert: its rows [n], input [n, I] and output [n, H] of down_proj, and the weights
        [n] with which the output enters the sum (the shared expert's: its gate, or 1)."""

    def dense(self, inner: Tensor, output: Tensor) -> None:
        """Input [N, I] and output [N, H] of a dense layer's down_proj."""

    def watched(self, sequences: int) -> int:
        """Of how many sequences of a batch, its leading ones, `attention` is told."""
        return sequences

    def attention(self, first_key: Tensor, mean_received: Tensor) -> None:
        """Attention probabilities on position 0, [B, heads, T] per query, and the mean that each
        key position receives from the queries that can see it, [B, heads, T]."""


class RoutingCapture(Observer):
    """Keeps the input of a layer's routed experts and the routing, over all batches.

    After the run: `hidden` [N, H], `experts` [N, k], `weights` [N, k], rows in the order of the
    batches.
    """

    def __init__(self, *, runs_experts: bool = True) -> None:
        super().__init__()
        self.runs_experts = runs_experts
        self._hidden: list[Tensor] = []
        self._routings: list[tuple[Tensor, Tensor]] = []

    def routed(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
        self._hidden.append(hidden.detach())
        self._routings.append((experts, weights))

    @property
    def saw_experts(self) -> bool:
        """False for a dense layer."""
        return bool(self._routings)

    @cached_property
    def hidden(self) -> Tensor:
        whole = torch.cat(self._hidden)
        self._hidden.clear()  # not twice in memory
        return whole

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
        """Rows [n] routed to `expert`, ascending, and their routing weights [n]."""
        if expert < len(self._by_expert):
            return self._by_expert[expert]
        return self.experts.new_empty(0), self.weights.new_empty(0)  # behind the last one chosen


class SinkCapture(Observer):
    """Attention sinks of one layer, mean over the sequences of all batches.

    After the run: `sink_mass` [heads], see `measures.sink_mass`, and `received` [heads, T], the
    mean attention that each position receives from the queries that can see it.
    """

    wants_attention = True

    def __init__(self) -> None:
        super().__init__()
        self._mass: list[tuple[int, Tensor]] = []
        self._received: list[tuple[int, Tensor]] = []

    def attention(self, first_key: Tensor, mean_received: Tensor) -> None:
        sequences = first_key.shape[0]
        self._mass.append((sequences, sink_mass(first_key).cpu()))
        self._received.append((sequences, mean_received.mean(dim=0).cpu()))

    @property
    def sink_mass(self) -> Tensor:
        return mean_over_sequences(self._mass)

    @property
    def received(self) -> Tensor:
        return mean_over_sequences(self._received)
