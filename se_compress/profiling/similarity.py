"""How far the experts of a layer are from each other, for merging."""

from typing import Any

import torch
from torch import Tensor, nn

# Tokens of a layer on which every expert is evaluated, to compare their outputs.
SIMILARITY_TOKENS = 1024


def output_distances(experts: Any, hidden: Tensor) -> tuple[float, ...]:
    """See LayerSimilarity; five digits of each, which is what their reading needs."""
    some = hidden[:: max(1, len(hidden) // SIMILARITY_TOKENS)]
    means = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        inner = experts._apply_gate(nn.functional.linear(some, gate_up))
        means.append(nn.functional.linear(inner, down).float().mean(dim=0))
    return tuple(float(f"{d:.5g}") for d in nn.functional.pdist(torch.stack(means)).tolist())
