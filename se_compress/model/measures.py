"""What is measured of a model and of a pair of models, each measure defined once, with its source.

B sequences of a batch, T positions, H channels, V words; h residual stream after a layer, p
attention probabilities. Hidden states are lists of batches [B, T, H] of any floating dtype,
measured in float32; those of a pair are cut alike. Tensors in, numbers out.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_compress.artifacts import Loop, MassiveElement

# Sun et al. (arXiv:2402.17762): a massive activation exceeds 100 and a thousand medians.
MASSIVE_PEAK = 100.0
MASSIVE_RATIO = 1000.0
# Attention to the sink is averaged over queries from here on: the first few have nowhere else to
# look.
FIRST_SINK_QUERY = 8
SINK_RATE_THRESHOLD = 0.3  # Gu et al. (arXiv:2410.10781)
# A head that gives the sink less than this has no sink to lose; ratios of such masses are noise.
SINK_HEAD_FLOOR = 0.05
# A massive element belongs to the model, and not to some text, if it stands at the same place in
# this share of the sequences.
COMMON_SHARE = 0.5
NGRAM = 4
# The end of a continuation is a loop if it says the same at least so often, in so many tokens.
LOOP_REPEATS, LOOP_TOKENS = 3, 12
PIECE_ROWS = 4096  # looked at together: no second copy of all hidden states is made
BOOTSTRAP_DRAWS = 1000
LEAST_SEQUENCES = 5  # resampling fewer says nothing


# ------------------------------------------------------------------------------------- predictions


def kl_divergence(source: Tensor, result: Tensor) -> Tensor:
    """KL(source || result) in nats for each position, [...], from float32 logits [..., V]."""
    source, result = source.log_softmax(-1), result.log_softmax(-1)
    return (source.exp() * (source - result)).sum(-1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log probability of each target in nats, [...].

    logits  float32 [..., V]
    target  token ids, int64 [...]
    """
    return -logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]


def bootstrap_interval(sums: Tensor, counts: Tensor) -> tuple[float, float] | None:
    """Where 95 % of the means sum(sums) / sum(counts) lie when sequences are drawn again.

    The percentile bootstrap (Efron 1979): BOOTSTRAP_DRAWS times as many sequences are drawn as
    there are, with replacement, from a fixed seed. Whole sequences are drawn, as the positions of
    one depend on each other. None for fewer than LEAST_SEQUENCES.

    sums, counts  for each of S sequences, the sum over its positions and their number, [S]
    """
    sequences = len(sums)
    if sequences < LEAST_SEQUENCES:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(sequences, (BOOTSTRAP_DRAWS, sequences), generator=generator)
    means = sums.double()[drawn].sum(dim=1) / counts.double()[drawn].sum(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


# ------------------------------------------------------------------------------ the residual stream


def relative_distance(result: Sequence[Tensor], source: Sequence[Tensor]) -> float:
    """|result - source| / |source| of each token's vector, mean over tokens.

    A token with a massive activation counts like any other.
    """
    ratios = [
        ((new.float() - old.float()).norm(dim=-1) / old.float().norm(dim=-1)).flatten()
        for new, old in zip(result, source, strict=True)
    ]
    return float(torch.cat(ratios).mean())


def overflows(states: Tensor) -> bool:
    """Whether a vector of `states` [..., C] has a NaN or a size whose square leaves float32."""
    pieces = torch.split(states.reshape(-1, states.shape[-1]), PIECE_ROWS)
    return not all(bool(p.float().square().sum(dim=-1).isfinite().all()) for p in pieces)


def peak_of(states: Sequence[Tensor]) -> float:
    """The largest |h| of all batches [B, T, H]; NaN if there is a NaN."""
    return float(torch.stack([batch.abs().max() for batch in states]).max())


def median_of(states: Sequence[Tensor]) -> float:
    """Median |h| over positions and channels, mean over the sequences of all batches [B, T, H]."""
    medians = [batch.float().abs().flatten(1).median(dim=1).values for batch in states]
    return float(torch.cat(medians).mean())


def is_massive(peak: float, median: float) -> bool:
    """Sun's rule for a residual stream with the largest |h| `peak` and the median |h| `median`."""
    return peak > MASSIVE_PEAK and peak >= MASSIVE_RATIO * median


def massive_places(states: Sequence[Tensor]) -> list[Tensor]:
    """For each batch [B, T, H], its massive |h| by Sun's rule: int64 [n, 3], a row for each.

    A row is sequence of the batch, position, channel.
    """
    median = median_of(states)
    return [
        torch.nonzero((size > MASSIVE_PEAK) & (size >= MASSIVE_RATIO * median))
        for size in (batch.float().abs() for batch in states)
    ]


def massive_elements(
    source: Sequence[Tensor], result: Sequence[Tensor], places: Sequence[Tensor]
) -> tuple[MassiveElement, ...]:
    """What the result makes of the source's massive activations, the strongest first.

    They are joined by position and channel. With r = h_result / h_source, the retention is
    max(0, min(r, 1/r)), mean over the sequences: too large, too small and of the wrong sign are all
    losses. Places that fewer than COMMON_SHARE of the sequences share go under position -1.

    source, result  hidden states [B, T, H] of each batch
    places          the source's massive elements [n, 3] of each batch, see `massive_places`
    """
    sequences = sum(len(batch) for batch in source)
    # (position, channel) -> (source, result) of every sequence that is massive there.
    pairs: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for old, new, at in zip(source, result, places, strict=True):
        index = tuple(at.T)
        values = zip(old[index].tolist(), new[index].tolist(), strict=True)
        for (_, position, channel), pair in zip(at.tolist(), values, strict=True):
            pairs[position, channel].append(pair)
    common: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for (position, channel), found in pairs.items():
        shared = len(found) >= COMMON_SHARE * sequences
        common[position if shared else -1, channel] += found
    elements = [_element(place, found, sequences) for place, found in common.items()]
    return tuple(sorted(elements, key=lambda e: (-abs(e.source), e.position, e.channel)))


def _element(
    place: tuple[int, int], pairs: Sequence[tuple[float, float]], sequences: int
) -> MassiveElement:
    """The element at a place (position, channel) from (source, result) of some `sequences`."""
    old, new = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    ratio = (new / old).clamp(min=1e-6)
    return MassiveElement(
        position=place[0],
        channel=place[1],
        share=len(pairs) / sequences,
        source=float(old.mean()),
        result=float(new.mean()),
        retention=float(torch.minimum(ratio, 1 / ratio).mean()),
    )


def sink_token_change(
    source: Sequence[Tensor], result: Sequence[Tensor], places: Sequence[Tensor]
) -> tuple[float, float]:
    """How the residual of the sink tokens has turned.

    The cosine of h_result and h_source, and |h_result - h_source| / |h_source|, both mean over the
    sink tokens. These are the tokens with a massive activation; where there is none, those at
    position 0. A massive activation enters every later layer through a norm. So its direction is
    what later layers see, and few bits spoil it long before its size.

    source, result  hidden states [B, T, H] of each batch
    places          the source's massive elements [n, 3] of each batch, see `massive_places`
    """
    cosines, errors = [], []
    for old, new, at in zip(source, result, places, strict=True):
        tokens = torch.unique(at[:, :2], dim=0)  # several channels of a token are one token
        if not any(len(part) for part in places):
            tokens = torch.tensor([[sequence, 0] for sequence in range(len(old))])
        a, b = (states[tokens[:, 0], tokens[:, 1]].float() for states in (old, new))
        cosines.append(torch.nn.functional.cosine_similarity(a, b, dim=-1))
        errors.append((b - a).norm(dim=-1) / a.norm(dim=-1))
    return float(torch.cat(cosines).mean()), float(torch.cat(errors).mean())


# ---------------------------------------------------------------------------------------- attention


def sink_mass(first_key: Tensor) -> Tensor:
    """Mean attention to position 0 of each head, [heads], from queries FIRST_SINK_QUERY and later.

    first_key  probability that each query gives to position 0, [B, heads, T]
    """
    return first_key[..., FIRST_SINK_QUERY:].mean(dim=(0, 2))


def mean_over_sequences(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Mean over all sequences, from (number of sequences, their mean [...]) of each batch."""
    total = sum(count for count, _ in parts)
    return torch.stack([count * value for count, value in parts]).sum(dim=0) / total


def sink_rate(received: Tensor) -> Tensor:
    """Share of the heads for which each position is a sink, [T].

    Sink_k of Gu et al. (arXiv:2410.10781) with eps 0.3. Meaningful for the first half of the
    positions: the last ones have few queries.

    received  what each head pays to each position, mean over the queries that see it, [heads, T]
    """
    return (received > SINK_RATE_THRESHOLD).float().mean(dim=0)


def sink_decay(pairs: Iterable[tuple[float, float]]) -> float | None:
    """1 - sum p_result / sum p_source, from (source, result) masses of heads, see `sink_mass`.

    The decay rate of arXiv:2507.23279, eq. 7, weighted by mass, over the heads whose mass in the
    source is at least SINK_HEAD_FLOOR: a mean of ratios would be ruled by heads with hardly any.
    Negative if the sink grew; None if no head has a sink.
    """
    heads = [(old, new) for old, new in pairs if old >= SINK_HEAD_FLOOR]
    if not heads:
        return None
    return 1.0 - sum(new for _, new in heads) / sum(old for old, _ in heads)


# ------------------------------------------------------------------------------------ continuations


def distinct(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Different n-grams / n-grams (Li et al., arXiv:1510.03055).

    1 without repetition and for a text that is too short to have any n-gram; near 0 in a loop.
    """
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return len(grams) / grams.total() if grams else 1.0


def find_loop(tokens: Sequence[int]) -> Loop | None:
    """The shortest period p with which the end of a continuation repeats itself; None if none.

    t[i] = t[i - p] for its last tokens, LOOP_REPEATS times over and for LOOP_TOKENS at least.
    """
    for period in range(1, len(tokens) // LOOP_REPEATS + 1):
        length = period  # of the end that repeats; it grows to the left
        while length < len(tokens) and tokens[-length - 1] == tokens[-length - 1 + period]:
            length += 1
        if length >= max(LOOP_REPEATS * period, LOOP_TOKENS):
            return Loop(period, length)
    return None


@dataclass(frozen=True)
class RowProducts:
    """What two matrices [R, C] have of each other, row by row: <source, source>, <result, source>
    and <result, result>, float32 [R] each."""

    source: Tensor
    both: Tensor
    result: Tensor

    @property
    def source_norm(self) -> float:
        """Frobenius."""
        return float(self.source.sum().sqrt())

    @property
    def result_norm(self) -> float:
        """Frobenius."""
        return float(self.result.sum().sqrt())

    @property
    def cosine(self) -> float | None:
        """Cosine between the two, taken as vectors; None if the source's is zero.

        What was quantised keeps its direction. What belongs elsewhere is at a right angle.
        """
        if self.source_norm == 0:
            return None
        return float(self.both.sum()) / (self.source_norm * max(self.result_norm, 1e-30))

    @property
    def gain_spread(self) -> float:
        """Standard deviation over rows of <result, source> / <source, source>.

        Rounding leaves every row its size; a scale that belongs to another row does not. Rows where
        the source is zero are left out.
        """
        gain = (self.both / self.source)[self.source > 0]
        return float(gain.std(correction=0)) if len(gain) else 0.0


def row_products(source: Tensor, result: Tensor) -> RowProducts:
    """Of matrices [R, C] float32, without a copy of either."""
    rule = "rc,rc->r"
    pairs = ((source, source), (result, source), (result, result))
    return RowProducts(*(torch.einsum(rule, one, other) for one, other in pairs))
