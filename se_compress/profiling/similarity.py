"""How far the experts of a layer are from each other, for merging."""

import torch
from torch import Tensor, nn

from se_compress.model.experts import RoutedExperts

# Tokens of a layer on which every expert is evaluated, to compare their outputs.
SIMILARITY_TOKENS = 1024


def output_distances(experts: RoutedExperts, hidden: Tensor) -> tuple[float, ...]:
    """Distances between the mean outputs of a layer's E experts, in the order of LayerSimilarity.

    Every expert sees the same tokens, whether they are routed to it or not. Five digits of each
    distance are kept, which is what their reading needs.

    experts  the layer's routed experts
    hidden   input of the experts, [N, H]
    """
    some = hidden[:: max(1, len(hidden) // SIMILARITY_TOKENS)]
    means = []
    for expert in range(len(experts)):
        output = experts.output(expert, experts.inner(expert, some))
        means.append(output.float().mean(dim=0))
    # pdist [E * (E - 1) / 2]: pairs (0, 1), (0, 2), ..., (1, 2), ...
    return tuple(float(f"{d:.5g}") for d in nn.functional.pdist(torch.stack(means)).tolist())
