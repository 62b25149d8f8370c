"""The routed experts of a layer: loaded a block at a time, computed one by one.

transformers 5 fuses a layer's experts into two tensors. Those of a large model's layer fit into no
memory, so they are never made: its module stays on the meta device and says how experts compute,
with and without a gate, with biases, transposed, gate and up row by row in turn or one above the
other, with an activation of the family's own. `LayerExperts` loads blocks of them, and all that is
computed of an expert, here or in a stage, goes through the `RoutedExperts` of a block.

N rows (tokens of a batch) with H channels, E experts of I neurons, e of them in a block, k of them
chosen per row, n rows of one. R is 2I, or I without a gate. Dtypes are the model's.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from se_compress.artifacts import ALONE, Ranks, Role
from se_compress.model.observers import Observer, RoutingCapture
from se_compress.model.routing import padded, rows_by_expert
from se_compress.model.store import IN_MEMORY, Store
from se_compress.running.ranks import exchange, owners

# The most experts of a block, so that ranks have something to share, and the most weights: 128 MiB
# in float32. A block follows from the model alone.
BLOCK_EXPERTS, BLOCK_ELEMENTS = 4, 2**25
# Blocks that each rank does before all tell each other what they made of theirs: what is told waits
# in memory.
WAVE_BLOCKS = 4
Part = TypeVar("Part")


@dataclass(frozen=True)
class RoutedExperts:
    """Some experts of a layer with their weights, known by their ids in it.

    module        transformers' module of the layer's experts: how they compute; its own weights
                  are not looked at
    ids           the experts, in the order of the tensors
    gate_up_proj  [e, R, H]: rows of gate and of up, or of up alone, in the module's order
    down_proj     [e, H, I]
    gate_up_bias  [e, R]; None without biases
    down_bias     [e, H]; None without biases
    """

    module: Any
    ids: Sequence[int]
    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def place(self, expert: int) -> int:
        """Where an expert lies in the tensors."""
        return self.ids.index(expert)

    def places(self, experts: Sequence[int]) -> list[int]:
        return [self.place(expert) for expert in experts]

    @property
    def roles(self) -> Mapping[Role, slice]:
        """The projections in `gate_up_proj`, and which of its rows are theirs."""
        return roles_of(self.module, self.gate_up_proj.shape[1])

    def slices(self, size: int) -> Iterator["RoutedExperts"]:
        """The same in blocks of at most `size`: views."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            biases = (
                bias if bias is None else bias[part] for bias in (self.gate_up_bias, self.down_bias)
            )
            weights = self.gate_up_proj[part], self.down_proj[part]
            yield RoutedExperts(self.module, self.ids[part], *weights, *biases)

    def inner(self, expert: int, inputs: Tensor) -> Tensor:
        """The input [n, I] of an expert's down_proj, from the expert's inputs [n, H]."""
        weight = self.gate_up_proj[self.place(expert)]
        return self.activated(expert, nn.functional.linear(inputs, weight))

    def activated(self, expert: int | list[int], product: Tensor) -> Tensor:
        """The input [n, I] of down_proj, from what gate and up make of the inputs, [n, R].

        The product may have another dtype than the model, and is without biases. That of several
        experts is [experts, n, R].
        """
        module = self.module
        if self.gate_up_bias is not None:
            at = self.places(expert) if isinstance(expert, list) else self.place(expert)
            product = product + self.gate_up_bias[at].to(product.dtype).unsqueeze(-2)
        return cast(
            Tensor, module._apply_gate(product) if module.has_gate else module.act_fn(product)
        )

    def output(self, expert: int, inner: Tensor, down: Tensor | None = None) -> Tensor:
        """An expert's output [n, H], not yet weighted, from the input [n, I] of its down_proj.

        down  [H, I], stands in for its weight
        """
        at = self.place(expert)
        made = nn.functional.linear(inner, self.down_proj[at] if down is None else down)
        if self.down_bias is not None:
            made = made + self.down_bias[at].to(made.dtype)
        return made

    def whole_output(self, expert: int, inputs: Tensor) -> Tensor:
        """An expert's output [n, H], not yet weighted, from its inputs [n, H]."""
        # Both products see the padding; what leaves here does not.
        return self.output(expert, self.inner(expert, padded(inputs)))[: len(inputs)]

    def stack(self, experts: list[int], gate_up: Tensor, down: Tensor, inputs: Tensor) -> Tensor:
        """The outputs [experts, n, H] of several experts at once, not yet weighted.

        gate_up, down  [experts, R, H] and [experts, H, I], stand in for their weights
        inputs         of each, [experts, n, H]
        """
        inner = self.activated(experts, torch.bmm(inputs, gate_up.mT))
        made = torch.bmm(inner, down.mT)
        if self.down_bias is not None:
            made = made + self.down_bias[self.places(experts)].to(made.dtype).unsqueeze(-2)
        return made


def roles_of(module: Any, rows: int) -> Mapping[Role, slice]:
    """The projections in the fused gate_up_proj of so many rows, and which of these are theirs: its
    halves, see opening/fused.py."""
    if not module.has_gate:
        return {"up": slice(None)}
    return {"gate": slice(0, rows // 2), "up": slice(rows // 2, None)}


def fused_experts(module: Any) -> RoutedExperts:
    """All experts of a transformers module that has its weights: views of them."""
    weight = module.gate_up_proj if module.has_gate else module.up_proj
    bias: Tensor | None = None
    if module.has_bias:
        bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
    gate_up, down = (
        part.transpose(1, 2) if module.is_transposed else part
        for part in (weight, module.down_proj)
    )
    biases = (bias, module.down_proj_bias) if module.has_bias else (None, None)
    return RoutedExperts(module, range(len(down)), gate_up, down, *biases)


# ------------------------------------------------------------------------------- a block at a time


@dataclass
class LayerExperts:
    """All routed experts of a layer, most of them on disk.

    module  transformers' module, on the meta device
    load    gives some of them with their weights, by their ids; these may be changed. Raises
            SourceError for a weight that is missing, is NaN or infinite
    kept    all of them, if they stay in memory
    """

    module: Any
    load: Callable[[Sequence[int]], RoutedExperts]
    kept: RoutedExperts | None = None

    def __len__(self) -> int:
        return len(self.module.down_proj)

    @property
    def shapes(self) -> tuple[int, int, int]:
        """R, H and I."""
        module = self.module
        weight = module.gate_up_proj if module.has_gate else module.up_proj
        rows, hidden = weight.shape[:0:-1] if module.is_transposed else weight.shape[1:]
        inner = module.down_proj.shape[1 if module.is_transposed else 2]
        return rows, hidden, inner

    @property
    def block_size(self) -> int:
        """Experts of a block, at least one."""
        rows, hidden, inner = self.shapes
        return max(1, min(BLOCK_EXPERTS, BLOCK_ELEMENTS // (hidden * (rows + inner))))

    def keep(self) -> None:
        """Load all experts for good."""
        self.kept = self.load(range(len(self)))

    def each(
        self,
        work: Callable[[RoutedExperts], Iterable[Part]],
        *,
        ranks: Ranks = ALONE,
        wanted: Sequence[int] | None = None,
        size: int | None = None,
        costs: Sequence[float] | None = None,
    ) -> Iterator[Part]:
        """What `work` makes of the experts, block by block in ascending order.

        Raises what it raises, and SourceError as `load` does.

        work    makes something of a block; with several ranks, on the rank that owns it
        wanted  only these experts; None: all
        size    experts of a block; None: `block_size`
        costs   what the work on each expert of the layer costs, in any unit; None: all the same
        """
        ids = range(len(self)) if wanted is None else sorted(wanted)
        parts = _even_parts(ids, size or self.block_size)
        if ranks.count == 1:
            for block in self._read_ahead(parts):
                yield from work(block)
            return
        wave = WAVE_BLOCKS * ranks.count
        for start in range(0, len(parts), wave):
            some = parts[start : start + wave]
            yield from self._shared_out(work, ranks, some, costs or [1.0] * len(self))

    def _shared_out(
        self,
        work: Callable[[RoutedExperts], Iterable[Part]],
        ranks: Ranks,
        parts: Sequence[Sequence[int]],
        costs: Sequence[float],
    ) -> Iterator[Part]:
        """The same of some blocks, each done by one rank."""
        owned = owners(ranks, [sum(costs[expert] for expert in part) for part in parts])
        mine = [part for part, rank in zip(parts, owned, strict=True) if rank == ranks.rank]
        made = exchange(ranks, lambda: [list(work(block)) for block in self._read_ahead(mine)])
        turns = [iter(one) for one in made]
        for rank in owned:
            yield from next(turns[rank])

    def _read_ahead(self, parts: Sequence[Sequence[int]]) -> Iterator[RoutedExperts]:
        """Blocks of these experts. The next one is read while one is at work."""
        if self.kept is not None:
            yield self.kept
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = [ahead.submit(self.load, part) for part in parts[:1]]
            for at in range(len(parts)):
                block = coming.pop().result()
                coming += [ahead.submit(self.load, part) for part in parts[at + 1 : at + 2]]
                yield block
                del block


def _even_parts(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """The ids in order, in as few parts of at most `size` as there can be, none more than one
    larger than another: ranks that share them have as much to do."""
    count = math.ceil(len(ids) / size)
    bounds = [len(ids) * part // max(1, count) for part in range(count + 1)]
    return [ids[start:end] for start, end in pairwise(bounds)]


# ----------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Given:
    """What the routed experts of a layer are given in one batch.

    observer  is told what they do with it
    batch     its index there
    hidden    [N, H]
    experts   chosen experts, int64 [N, k]; numbers that no expert has (experts that do nothing) add
              nothing
    weights   their routing weights, [N, k]
    """

    observer: Observer
    batch: int
    hidden: Tensor
    experts: Tensor
    weights: Tensor


def run_experts(
    experts: LayerExperts,
    batches: Sequence[Given],
    ranks: Ranks = ALONE,
    store: Store = IN_MEMORY,
) -> Tensor:
    """What the experts of a layer add to each row: [N, H] float32, rows of all batches in order.

    Each expert works on its rows of all batches at once, whatever block it is in. The weighted
    outputs of a row are summed in the order of the experts. Raises SourceError as
    `LayerExperts.load` does.

    ranks  share the experts; observers learn on each what all have seen of them
    store  keeps the sums
    """
    sizes = [len(given.hidden) for given in batches]
    first = batches[0].hidden
    total = store.empty((sum(sizes), first.shape[1]), first, torch.float32).zero_()
    routed = [rows_by_expert(given.experts, given.weights, len(experts)) for given in batches]
    sums = torch.split(total, sizes)
    costs = [float(sum(len(rows[e][0]) for rows in routed)) for e in range(len(experts))]
    wanted = [expert for expert, rows in enumerate(costs) if rows]

    def work(block: RoutedExperts) -> Iterator[tuple[int, list[Tensor]]]:
        for expert in block.ids:
            if costs[expert]:
                yield expert, _run_expert(block, expert, batches, [rows[expert] for rows in routed])

    for expert, outputs in experts.each(work, ranks=ranks, wanted=wanted, costs=costs):
        for part, rows, output in zip(sums, routed, outputs, strict=True):
            mine, weights = rows[expert]
            part.index_add_(0, mine, output.float() * weights[:, None])
    _share_what_was_kept(ranks, batches)
    return total


def _share_what_was_kept(ranks: Ranks, batches: Sequence[Given]) -> None:
    """Each observer gets what its like have kept of experts on other ranks."""
    observers = list({id(given.observer): given.observer for given in batches}.values())
    for kept in exchange(ranks, lambda: [observer.by_expert for observer in observers]):
        for observer, theirs in zip(observers, kept, strict=True):
            observer.by_expert.update(theirs)


def _run_expert(
    block: RoutedExperts,
    expert: int,
    batches: Sequence[Given],
    routed: Sequence[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """The outputs [n, H] of an expert for its rows of each batch, not yet weighted.

    routed  its rows [n] of each batch, and their weights [n]
    """
    parts = zip(batches, routed, strict=True)
    inputs = torch.cat([given.hidden.index_select(0, rows) for given, (rows, _) in parts])
    # Both products see the padding; what leaves here does not.
    inner = block.inner(expert, padded(inputs))
    output = block.output(expert, inner)[: len(inputs)]
    counts = [len(rows) for rows, _ in routed]
    inners, made_of = torch.split(inner[: len(inputs)], counts), torch.split(output, counts)
    outputs = []
    for given, (rows, weights), seen, made in zip(batches, routed, inners, made_of, strict=True):
        observer = given.observer
        out = torch.zeros_like(made) if expert in observer.silenced else made
        if len(rows):
            observer.batch = given.batch
            observer.expert(expert, rows, seen, out, weights)
        outputs.append(out)
    return outputs


def outputs_of(capture: RoutingCapture, block: RoutedExperts) -> Iterator[tuple[int, Tensor]]:
    """The experts of a block as they are, with their outputs [n, H] for the rows routed to them."""
    for expert in block.ids:
        rows, _ = capture.rows_of(expert)
        if len(rows):
            yield expert, block.whole_output(expert, capture.hidden.index_select(0, rows))


# What the routed experts of a layer put out, [N, H], for the hidden states, the chosen experts and
# the routing weights of a batch, as in `Given`.
Routed = Callable[[Tensor, Tensor, Tensor], Tensor]


def experts_forward(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The routed experts' output [N, H]. The signature is transformers'.

    The module has a `routed` that says what it is, or its `layer_experts` are run at once.

    module         transformers' module of the experts
    hidden         [N, H]
    top_k_index    int64 [N, k]
    top_k_weights  [N, k]
    """
    routed = cast(Routed | None, getattr(module, "routed", None))
    if routed is not None:
        return routed(hidden, top_k_index, top_k_weights)
    given = Given(Observer(), 0, hidden, top_k_index, top_k_weights)
    return run_experts(cast(LayerExperts, module.layer_experts), [given]).to(hidden.dtype)


def dense_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook on the down_proj of a dense layer: reports input [B, T, I], output [B, T, H]."""
    observer = cast(Observer, module.observer)
    observer.dense(inputs[0].flatten(0, -2), output.flatten(0, -2))


def shared_hooks(
    up: nn.Module, down: nn.Module, gate: nn.Module | None
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Forward hooks that report the shared expert or silence it, with the modules they are for.

    up, down  linears of the shared expert: H to I, and I to H
    gate      linear H -> 1 whose sigmoid weighs the shared expert's output; None if nothing does
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [inputs[0].flatten(0, -2)]
        cast(Observer, module.observer).shared_input(seen[0])

    def report(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        observer = cast(Observer, module.observer)
        hidden = seen.pop()
        if "shared" in observer.silenced:
            return torch.zeros_like(output)
        if observer.wants_inner:
            weights = torch.sigmoid(gate(hidden))[:, 0] if gate else hidden.new_ones(len(hidden))
            rows = torch.arange(len(hidden))
            inner, made = inputs[0].flatten(0, -2), output.flatten(0, -2)
            observer.expert("shared", rows, inner, made, weights)
        return output

    return [(up, keep), (down, report)]
