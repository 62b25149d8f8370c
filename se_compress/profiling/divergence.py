"""What a change within the model does to its predictions."""

from collections.abc import Sequence

from se_compress.model.measures import kl_divergence
from se_compress.model.overflow import check_logits
from se_compress.model.states import States, in_pieces
from se_compress.model.streaming import StreamedModel
from se_compress.running.ranks import spread


def mean_divergence(
    model: StreamedModel, source: Sequence[States], changed: Sequence[States]
) -> float:
    """Mean KL(source || changed) of the next token in nats, over all positions.

    source, changed  states after the last layer, of each batch, cut alike

    Raises SourceError if the source's own logits overflow.
    """
    ours, theirs = in_pieces(source), in_pieces(changed)

    def work(pair: tuple[States, States]) -> float:
        before, after = (model.logits_of(states) for states in pair)
        return float(kl_divergence(check_logits(model, before), after).double().sum())

    tokens = sum(states.tokens.numel() for states in source)
    with model.head():  # the logits of one piece of each are in memory at a time
        return sum(spread(model.ranks, list(zip(ours, theirs, strict=True)), work)) / tokens
