"""How far the experts of a layer are from each other, for merging."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from se_compress.model.experts import RoutedExperts

# Tokens of a layer on which every expert is evaluated, to compare their outputs.
SIMILARITY_TOKENS = 1024


def mean_outputs(block: RoutedExperts, hidden: Tensor) -> list[Tensor]:
    """What each expert of a block makes of the same tokens on average, float32 [H] each, whether
    they are routed to it or not.

    hidden  input of the layer's experts, [N, H]
    """
    some = hidden[:: max(1, len(hidden) // SIMILARITY_TOKENS)]
    return [
        block.output(expert, block.inner(expert, some)).float().mean(dim=0) for expert in block.ids
    ]


def output_distances(means: Sequence[Tensor]) -> tuple[float, ...]:
    """Distances between the mean outputs [H] of a layer's E experts, in the order of
    LayerSimilarity. Five digits of each are kept, which is what their reading needs."""
    # pdist [E * (E - 1) / 2]: pairs (0, 1), (0, 2), ..., (1, 2), ...
    return tuple(float(f"{d:.5g}") for d in nn.functional.pdist(torch.stack(list(means))).tolist())
