"""Which rows of a layer's input go to which of its routed experts, and the sum of what comes back.

N rows (tokens) with H channels, k experts chosen for each row, n rows of one expert. Nothing here
knows of models or observers: `engines.loading` imports this while transformers is half imported.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# oneDNN compiles and keeps a kernel for every number of rows that it meets: 1 ms and 0.7 MB each
# with bfloat16 on a CPU, half of the time of an expert's product. So experts see rounded numbers:
# multiples of this, or eight sizes an octave.
ROW_BLOCK = 64


def rows_by_expert(
    top_k_index: Tensor, top_k_weights: Tensor, experts: int
) -> list[tuple[Tensor, Tensor]]:
    """For each expert, its rows [n] (int64, ascending) and their routing weights [n].

    top_k_index    chosen experts of every row, int64 [N, k]
    top_k_weights  their routing weights, floating [N, k]
    experts        how many entries the list has at least; those of unused experts are empty
    """
    chosen, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    counts = torch.bincount(chosen, minlength=experts).tolist()
    # A stable sort of the N * k choices: those of one expert lie together, in the order of rows.
    places = torch.split(torch.argsort(chosen, stable=True), counts)
    return [(mine // top_k_index.shape[-1], weights[mine]) for mine in places]


def select_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden[rows], padded to a rounded number of rows: [n, H] with n >= len(rows).

    The padding repeats row 0; callers cut it off what they compute from it. `hidden` is [N, H],
    `rows` int64. ROW_BLOCK says why.
    """
    return hidden.index_select(0, nn.functional.pad(rows, (0, _missing(len(rows)))))


def padded(inputs: Tensor) -> Tensor:
    """Inputs [n, H] with the same padding: their first row again."""
    return torch.cat([inputs, inputs[:1].expand(_missing(len(inputs)), -1)])


def _missing(rows: int) -> int:
    """How many more make a rounded number."""
    # Above ROW_BLOCK, an eighth of the largest power of two in the number: 8 sizes an octave.
    block = max(ROW_BLOCK, 2 ** (rows.bit_length() - 4)) if rows > ROW_BLOCK else 1
    return -rows % block


def sum_routed(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    run: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """The weighted sum of what the chosen experts make of each row: [N, H], dtype of `hidden`.

    Each expert works on its rows at once. The weighted outputs of a token are summed in float32 in
    the order of the experts, so that the result is deterministic.

    hidden         input of the layer's experts, [N, H]
    top_k_index    chosen experts of every row, int64 [N, k]
    top_k_weights  their routing weights, [N, k]
    experts        number of routed experts
    run            (expert, its rows [n], their weights [n]) -> its output [n, H] without weights
    """
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    routed = rows_by_expert(top_k_index, top_k_weights, experts)
    for expert, (rows, weights) in enumerate(routed[:experts]):
        if len(rows):
            output = run(expert, rows, weights)
            total.index_add_(0, rows, output.float() * weights[:, None])
    return total.to(hidden.dtype)


# ------------------------------------------------------------------------------- experts in stacks


@dataclass(frozen=True)
class Bunch:
    """Experts with about as many rows each, to be run as one stack.

    experts  some of them
    rows     those of each, int64 [experts, n], filled up with row 0
    """

    experts: list[int]
    rows: Tensor


@dataclass(frozen=True)
class Routing:
    """All choices of some rows, in bunches.

    places  int64 [N, k]: where the output of a choice lies if those of all bunches, [experts * n]
            each, are put one behind the other
    """

    bunches: list[Bunch]
    places: Tensor


def bunched(top_k_index: Tensor, experts: int) -> Routing:
    """The choices int64 [N, k] in bunches whose experts' rows differ by less than a factor of two.

    They follow from the choices alone. No output lies at two places, and none is added up there.
    Numbers that none of so many `experts` has are at place 0: their output has to count nothing.
    """
    chosen = top_k_index.reshape(-1)
    counts = torch.bincount(chosen, minlength=experts).tolist()
    choices = torch.split(torch.argsort(chosen, stable=True), counts)
    counts = counts[:experts]
    places, bunches, start = torch.zeros_like(chosen), [], 0
    for octave in sorted({count.bit_length() for count in counts if count}):
        some = [e for e, count in enumerate(counts) if count.bit_length() == octave]
        most = max(counts[e] for e in some)
        rows = chosen.new_zeros(len(some), most)
        for i, e in enumerate(some):
            rows[i, : counts[e]] = choices[e] // top_k_index.shape[-1]
            first = start + i * most
            places[choices[e]] = torch.arange(first, first + counts[e], device=chosen.device)
        bunches.append(Bunch(some, rows))
        start += rows.numel()
    return Routing(bunches, places.view(top_k_index.shape))
