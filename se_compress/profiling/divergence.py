"""What a change within the model does to its predictions."""

from collections.abc import Sequence

from se_compress.model.measures import kl_divergence
from se_compress.model.overflow import check_logits
from se_compress.model.states import States, in_pieces
from se_compress.model.streaming import StreamedModel


def mean_divergence(
    model: StreamedModel, source: Sequence[States], changed: Sequence[States]
) -> float:
    """Mean KL(source || changed) of the next token in nats, over all positions.

    source, changed  states after the last layer, of each batch, cut alike

    Raises SourceError if the source's own logits overflow.
    """
    ours, theirs = in_pieces(source), in_pieces(changed)
    # Generators: the logits of one piece of each are in memory at a time.
    before = (check_logits(model, logits) for logits in model.logits(ours))
    pairs = zip(before, model.logits(theirs), strict=True)
    tokens = sum(states.tokens.numel() for states in source)
    return sum(float(kl_divergence(a, b).double().sum()) for a, b in pairs) / tokens
