"""What is measured of a model and of a pair of models, each defined once. Tensors in, numbers out.

Hidden states are lists of batches [B, T, H], all of one model's streams cut alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Sun et al. (arXiv:2402.17762): a massive activation exceeds 100 and a thousand medians.
MASSIVE_PEAK = 100.0
MASSIVE_RATIO = 1000.0
# Attention to the sink is averaged over queries from here on: the first few have nowhere else to
# look.
FIRST_SINK_QUERY = 8


def is_massive(peak: float, median: float) -> bool:
    """Sun's rule for a residual stream with the largest |h| `peak` and the median |h| `median`."""
    return peak > MASSIVE_PEAK and peak >= MASSIVE_RATIO * median


def relative_distance(result: Sequence[Tensor], source: Sequence[Tensor]) -> float:
    """|result - source| / |source|, mean over tokens: a massive one counts like any other."""
    ratios = [
        ((new.float() - old.float()).norm(dim=-1) / old.float().norm(dim=-1)).flatten()
        for new, old in zip(result, source, strict=True)
    ]
    return float(torch.cat(ratios).mean())


def kl_divergence(source: Tensor, result: Tensor) -> Tensor:
    """KL(source || result) in nats for each position, from logits [..., V]."""
    source, result = source.log_softmax(-1), result.log_softmax(-1)
    return (source.exp() * (source - result)).sum(-1)


def sink_mass(first_key: Tensor) -> Tensor:
    """Mean attention to position 0 per head [heads], from probabilities [B, heads, T]; queries from
    position FIRST_SINK_QUERY on."""
    return first_key[..., FIRST_SINK_QUERY:].mean(dim=(0, 2))


def mean_over_sequences(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Mean of (number of sequences, their mean): of what batches of several sizes have shown."""
    total = sum(count for count, _ in parts)
    return torch.stack([count * value for count, value in parts]).sum(dim=0) / total
