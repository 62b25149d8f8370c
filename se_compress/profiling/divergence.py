"""What a change within the model does to its predictions."""

from collections.abc import Sequence

from torch import Tensor

from se_compress.model.measures import (
    kl_divergence,
)
from se_compress.model.overflow import check_logits
from se_compress.model.states import in_pieces
from se_compress.model.streaming import StreamedModel


def mean_divergence(
    model: StreamedModel, source: Sequence[Tensor], changed: Sequence[Tensor]
) -> float:
    """Mean KL(source || changed) over positions, from the hidden states after the last layer."""
    ours, theirs = in_pieces(source), in_pieces(changed)
    before = (check_logits(model, logits) for logits in model.logits(ours))
    pairs = zip(before, model.logits(theirs), strict=True)
    tokens = sum(states.shape[0] * states.shape[1] for states in source)
    return sum(float(kl_divergence(a, b).double().sum()) for a, b in pairs) / tokens
