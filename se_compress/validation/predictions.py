"""The next tokens that source and result predict: sums over sequences, and each position by itself.

S sequences, P predicted tokens of all of them in order, V words of the vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_compress.artifacts import Departure, Tail
from se_compress.model.measures import cross_entropy, kl_divergence
from se_compress.model.overflow import check_logits
from se_compress.model.states import States, in_pieces
from se_compress.model.streaming import StreamedModel
from se_compress.running.ranks import spread

LISTED_DEPARTURES = 5
BEFORE, AFTER = 40, 12  # tokens of the text that are shown around one
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Positions:
    """The predicted tokens one by one.

    sequence       which of the S sequences, int64 [P]
    place          position of the predicted token in it, int64 [P]
    divergence     KL(source || result), nats, float32 [P]
    tops           token that source and result hold most likely, int64 [2, P]
    shares         the probability that each gives to its own, float32 [2, P]
    """

    sequence: Tensor
    place: Tensor
    divergence: Tensor
    tops: Tensor
    shares: Tensor

    @property
    def agreement(self) -> float:
        """Share of the tokens of which both hold the same one most likely."""
        return float((self.tops[0] == self.tops[1]).double().mean())

    def quantile(self, share: float) -> float:
        """The least divergence that `share` of the tokens do not exceed; NaN is the largest."""
        ordered = self.divergence.double().sort().values
        return float(ordered[math.ceil(share * len(ordered)) - 1])

    def of(self, first: int, count: int) -> "Positions":
        """Those of the sequences from `first` on, which are numbered from 0 again."""
        here = (self.sequence >= first) & (self.sequence < first + count)
        return Positions(
            self.sequence[here] - first,
            self.place[here],
            self.divergence[here],
            self.tops[:, here],
            self.shares[:, here],
        )


@dataclass(frozen=True)
class Predictions:
    """Sums over the predicted tokens of each of S sequences, each [S] float64.

    tokens                    how many these are
    loss_source, loss_result  cross-entropy of the next token, nats
    divergence                KL(source || result) of the next token, nats
    each                      the same tokens one by one
    """

    tokens: Tensor
    loss_source: Tensor
    loss_result: Tensor
    divergence: Tensor
    each: Positions

    @property
    def perplexities(self) -> tuple[float, float]:
        total = self.tokens.sum()
        source, result = (loss.sum() / total for loss in (self.loss_source, self.loss_result))
        return bounded_exp(float(source)), bounded_exp(float(result))

    def of(self, first: int, count: int) -> "Predictions":
        """Those of `count` sequences from `first` on."""
        here = slice(first, first + count)
        return Predictions(
            self.tokens[here],
            self.loss_source[here],
            self.loss_result[here],
            self.divergence[here],
            self.each.of(first, count),
        )


def bounded_exp(loss: float) -> float:
    """Perplexity of a mean cross-entropy; finite however large that is."""
    return math.exp(min(loss, 700.0))


def compare_predictions(
    source: StreamedModel,
    result: StreamedModel,
    old: Sequence[States],
    new: Sequence[States],
) -> Predictions:
    """What both make of the next tokens, from the states `old` and `new` behind their last layer,
    of each batch."""
    # Logits of a whole sequence would be larger than any layer: they come in pieces of one row.
    targets = in_pieces([states.cut(positions=slice(1, None)) for states in old])
    ours, theirs = (
        in_pieces([states.cut(positions=slice(-1)) for states in side]) for side in (old, new)
    )
    parts = list(zip(targets, ours, theirs, strict=True))

    def work(part: tuple[States, States, States]) -> _Piece:
        target, before, after = part
        logits = check_logits(source, source.logits_of(before)), result.logits_of(after)
        return _piece(target.tokens, *logits)

    with source.head(), result.head():
        pieces = list(spread(source.ranks, parts, work))
    lengths = torch.tensor([states.length - 1 for states in old for _ in range(len(states))])
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.cat([torch.arange(1, int(length) + 1) for length in lengths])
    losses, divergence, tops, shares = (
        torch.cat(part, dim=-1) for part in zip(*pieces, strict=True)
    )
    rows = torch.split(torch.stack([*losses, divergence]).double(), lengths.tolist(), dim=1)
    loss_source, loss_result, total = torch.stack([row.sum(dim=1) for row in rows], dim=1)
    each = Positions(sequence, place, divergence, tops, shares)
    return Predictions(lengths.double(), loss_source, loss_result, total, each)


_Piece = tuple[Tensor, Tensor, Tensor, Tensor]


def _piece(target: Tensor, source: Tensor, result: Tensor) -> _Piece:
    """Of one piece of n positions: cross-entropies [2, n], divergence [n], and which token each
    model holds most likely, [2, n], with its probability, [2, n]. All on the CPU.

    target          token ids, int64 [1, n]
    source, result  float32 logits [1, n, V]
    """
    wanted = target.to(source.device)
    losses = torch.cat([cross_entropy(logits, wanted) for logits in (source, result)])
    divergence = kl_divergence(source, result)[0]
    best = [logits[0].max(dim=-1) for logits in (source, result)]
    shares = [
        (top.values - logits[0].logsumexp(-1)).exp()
        for top, logits in zip(best, (source, result), strict=True)
    ]
    tops = torch.stack([top.indices for top in best])
    return losses.cpu(), divergence.cpu(), tops.cpu(), torch.stack(shares).cpu()


# ----------------------------------------------------------------------------------------- the tail


def tail_of(found: Predictions, tokens: Sequence[Sequence[int]], decode: Decode) -> Tail:
    """Beside the mean.

    tokens   the sequences that were predicted
    decode   token ids to text
    """
    each = found.each
    median, p90, p99, most = (each.quantile(share) for share in (0.5, 0.9, 0.99, 1.0))
    return Tail(
        median=median,
        p90=p90,
        p99=p99,
        most=most,
        agreement=each.agreement,
        worst=tuple(_departure(each, at, tokens, decode) for at in _worst(each)),
    )


def _worst(each: Positions) -> Iterable[int]:
    """Where they disagree most, one of each sequence: those of one follow from each other. NaN
    comes first."""
    order = each.divergence.nan_to_num(nan=math.inf).sort(descending=True, stable=True).indices
    firsts: dict[int, int] = {}
    for at in order.tolist():
        firsts.setdefault(int(each.sequence[at]), at)
        if len(firsts) == LISTED_DEPARTURES:
            break
    return firsts.values()


def _departure(
    each: Positions, at: int, tokens: Sequence[Sequence[int]], decode: Decode
) -> Departure:
    sequence, place = int(each.sequence[at]), int(each.place[at])
    text = list(tokens[sequence])
    return Departure(
        sequence=sequence,
        position=place,
        divergence=float(each.divergence[at]),
        before=decode(text[max(0, place - BEFORE) : place]),
        token=decode(text[place : place + 1]),
        after=decode(text[place + 1 : place + 1 + AFTER]),
        source=decode([int(each.tops[0, at])]),
        source_share=float(each.shares[0, at]),
        result=decode([int(each.tops[1, at])]),
        result_share=float(each.shares[1, at]),
    )
