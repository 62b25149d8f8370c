"""Which rows of a layer's input go to which of its routed experts, and the sum of what comes back.

Nothing here knows of models or of observers, so that engines can use it while transformers is being
imported.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# oneDNN compiles and keeps a kernel for every number of rows that it meets: 1 ms and 0.7 MB each
# with bfloat16 on a CPU, half of the time of an expert's product. So experts see rounded numbers:
# multiples of this, or eight sizes an octave.
ROW_BLOCK = 64


def rows_by_expert(
    top_k_index: Tensor, top_k_weights: Tensor, experts: int
) -> list[tuple[Tensor, Tensor]]:
    """For each expert the rows [n] routed to it, ascending, and their weights [n]; from the chosen
    experts [N, k] of every row and their weights [N, k]."""
    chosen, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    counts = torch.bincount(chosen, minlength=experts).tolist()
    places = torch.split(torch.argsort(chosen, stable=True), counts)
    return [(mine // top_k_index.shape[-1], weights[mine]) for mine in places]


def select_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden[rows], and after them repetitions of row 0 up to a number of which there are few."""
    block = max(ROW_BLOCK, 2 ** (len(rows).bit_length() - 4)) if len(rows) > ROW_BLOCK else 1
    missing = -len(rows) % block
    return hidden.index_select(0, nn.functional.pad(rows, (0, missing)))


def sum_routed(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    run: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """The weighted sum [N, H] of what the chosen experts make of `hidden` [N, H].

    `run` gets an expert, its rows [n] and their weights [n], and returns its output [n, H] before
    the weights. Tokens are sorted by expert once; each expert then works on its contiguous rows.
    The weighted outputs of a token are summed in float32 in the order of the experts, so the result
    is deterministic.
    """
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    routed = rows_by_expert(top_k_index, top_k_weights, experts)
    for expert, (rows, weights) in enumerate(routed):
        if len(rows):
            output = run(expert, rows, weights)
            total.index_add_(0, rows, output.float() * weights[:, None])
    return total.to(hidden.dtype)
