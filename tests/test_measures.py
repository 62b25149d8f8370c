"""Each measure against its definition, written out."""

import math
import random
import statistics

import pytest
import torch

from se_compress.artifacts import Loop
from se_compress.model.measures import (
    bootstrap_interval,
    cross_entropy,
    distinct,
    find_loop,
    is_massive,
    kl_divergence,
    massive_elements,
    massive_places,
    median_of,
    peak_of,
    relative_distance,
    row_products,
    sink_decay,
    sink_mass,
    sink_rate,
    sink_token_change,
)


def test_relative_distance_counts_every_token_alike() -> None:
    old = torch.tensor([[[1000.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 0.0]]])
    new = torch.tensor([[[1100.0, 0.0], [0.0, 3.0]], [[3.0, 4.0], [1.0, 1.0]]])
    expected = (0.1 + 0.5 + 0.0 + 1.0) / 4
    assert relative_distance([new], [old]) == pytest.approx(expected)
    assert relative_distance([*new[:, None]], [*old[:, None]]) == pytest.approx(expected)


def test_kl_divergence_by_hand() -> None:
    source, result = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.1, 0.6, 0.3])
    expected = sum(float(p * (p / q).log()) for p, q in zip(source, result, strict=True))
    found = kl_divergence(source.log() + 3, result.log() - 1)  # logits: any constant may be added
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_sink_mass_averages_late_queries_over_sequences() -> None:
    first_key = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(0))
    expected = [
        sum(float(first_key[b, h, t]) for b in range(2) for t in range(8, 12)) / 8 for h in range(3)
    ]
    torch.testing.assert_close(sink_mass(first_key), torch.tensor(expected))


# ------------------------------------------------------------------------------------- the interval


def test_the_interval_is_that_of_means_of_drawn_sequences() -> None:
    dice = random.Random(1)
    counts = [dice.randint(10, 40) for _ in range(12)]
    sums = [count * dice.gauss(0.5, 0.2) for count in counts]
    found = bootstrap_interval(torch.tensor(sums), torch.tensor(counts))
    means = []
    for _ in range(20_000):  # as often as it takes to be sure of two digits
        drawn = dice.choices(range(12), k=12)
        means.append(sum(sums[i] for i in drawn) / sum(counts[i] for i in drawn))
    cuts = statistics.quantiles(means, n=40)
    width = cuts[-1] - cuts[0]
    assert found == pytest.approx((cuts[0], cuts[-1]), abs=0.08 * width)
    assert bootstrap_interval(torch.tensor(sums), torch.tensor(counts)) == found, "seeded"


def test_the_interval_shrinks_with_the_sample() -> None:
    values = torch.rand(400, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(400)
    small, large = bootstrap_interval(values[:10], ones[:10]), bootstrap_interval(values, ones)
    assert small is not None
    assert large is not None
    assert large[1] - large[0] < 0.4 * (small[1] - small[0])
    assert bootstrap_interval(values[:4], ones[:4]) is None, "four say nothing"
    assert bootstrap_interval(torch.ones(5), torch.ones(5)) == (1.0, 1.0)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]]).log() + 2
    expected = [-math.log(0.25), -math.log(0.6)]
    assert cross_entropy(logits, torch.tensor([2, 1])).tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------ massive activations


def test_suns_rule_needs_both_a_hundred_and_a_thousand_medians() -> None:
    assert is_massive(1000.0, 1.0)
    assert not is_massive(999.0, 1.0)
    assert is_massive(101.0, 0.1)
    assert not is_massive(100.0, 0.01)
    states = [torch.ones(2, 3, 4), torch.full((1, 3, 4), 4.0)]
    assert median_of(states) == pytest.approx(2.0), "of each sequence, then the mean"
    states[0][1, 2, 3], states[1][0, 0, 0] = -2500.0, 1900.0
    assert peak_of(states) == 2500.0
    assert [at.tolist() for at in massive_places(states)] == [[[1, 2, 3]], []]


def streams() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Three sequences in two batches: channel 1 is massive at position 0 of all, channel 2 at
    position 1 of one and at position 2 of another."""
    old = [torch.ones(2, 3, 4), torch.ones(1, 3, 4)]
    old[0][:, 0, 1], old[1][0, 0, 1] = -5000.0, -4000.0
    old[0][0, 1, 2], old[0][1, 2, 2] = 2000.0, 2000.0
    return old, [batch.clone() for batch in old]


def test_elements_are_kept_apart_by_position_and_channel() -> None:
    old, new = streams()
    new[0][0, 0, 1], new[0][1, 0, 1], new[1][0, 0, 1] = -2500.0, -10_000.0, 4000.0
    new[0][0, 1, 2] = 1500.0
    first, second = massive_elements(old, new, massive_places(old))
    assert (first.position, first.channel, first.share) == (0, 1, 1.0)
    assert first.source == pytest.approx(-14_000 / 3)
    assert first.result == pytest.approx(-8500 / 3)
    half_twice_and_turned = (0.5 + 0.5 + 0.0) / 3
    assert first.retention == pytest.approx(half_twice_and_turned, abs=1e-5)
    assert (second.position, second.channel) == (-1, 2), "at no position in half of the sequences"
    assert second.share == pytest.approx(2 / 3)
    assert second.retention == pytest.approx((0.75 + 1.0) / 2)
    assert all(e.retention == 1 for e in massive_elements(old, old, massive_places(old)))


def test_where_nothing_is_massive_there_is_nothing_to_keep() -> None:
    plain = [torch.ones(2, 3, 4)]
    assert massive_elements(plain, [7 * plain[0]], massive_places(plain)) == ()


def test_the_change_of_the_sink_tokens_alone() -> None:
    old, new = streams()
    new[1][0, 1] = 9.0  # not a sink token
    assert sink_token_change(old, new, massive_places(old)) == (pytest.approx(1), 0)
    new[1][0, 0, 1] = 4000.0
    a, b = old[1][0, 0], new[1][0, 0]
    cosine = float(a @ b / a.norm() / b.norm())
    error = float((b - a).norm() / a.norm())
    expected = ((4 + cosine) / 5, error / 5)
    assert sink_token_change(old, new, massive_places(old)) == pytest.approx(expected)


def test_without_a_massive_activation_position_0_is_the_sink_token() -> None:
    old = [torch.ones(2, 3, 4)]
    new = [old[0].clone()]
    new[0][1, 0] = 3.0
    new[0][0, 2] = 5.0
    assert sink_token_change(old, new, massive_places(old)) == pytest.approx((1.0, 1.0))


# ---------------------------------------------------------------------------------------- attention


def test_sink_rate_counts_heads_over_the_threshold_at_each_position() -> None:
    received = torch.tensor([[0.9, 0.31, 0.0], [0.3, 0.1, 0.2], [0.35, 0.2, 0.1]])
    assert sink_rate(received).tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_decay_is_weighted_by_mass_and_small_heads_are_left_out() -> None:
    heads = [(0.8, 0.4), (0.2, 0.2), (0.049, 0.0)]
    assert sink_decay(heads) == pytest.approx(1 - 0.6 / 1.0)
    assert sink_decay([(0.5, 0.6)]) == pytest.approx(-0.2)
    assert sink_decay([(0.04, 0.0)]) is None


# ------------------------------------------------------------------------------------ continuations


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([1, 2, 3, 4, 5, 6, 7], 1.0), ([1, 2] * 8, 2 / 13), ([7] * 20, 1 / 17), ([1, 2], 1.0)],
)
def test_distinct_counts_four_grams_once(tokens: list[int], share: float) -> None:
    assert distinct(tokens) == pytest.approx(share)


def test_distinct_of_pairs() -> None:
    assert distinct([1, 2, 1, 2, 3], n=2) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([*range(20)], None),
        ([5] * 12, Loop(1, 12)),
        ([5] * 11, None),
        ([9, 8, *[1, 2, 3] * 4], Loop(3, 12)),
        ([9, 8, 3, *[1, 2, 3] * 4], Loop(3, 13)),
        ([*[1, 2, 3] * 4, 9], None),
        ([*range(7), *range(7), *range(7)], Loop(7, 21)),
        ([*range(7), *range(7), *range(6)], None),
        ([1, 1, 2] * 6, Loop(3, 18)),
    ],
    ids=str,
)
def test_a_loop_is_an_end_that_repeats_itself(tokens: list[int], loop: Loop | None) -> None:
    assert find_loop(tokens) == loop


def test_weights_are_compared_as_vectors_and_row_by_row() -> None:
    generator = torch.Generator().manual_seed(3)
    old, new = (torch.randn(7, 5, generator=generator) for _ in range(2))
    old[2] = 0.0  # a row that has no direction, and counts for nothing
    dot = sum(float(a * b) for a, b in zip(old.flatten(), new.flatten(), strict=True))
    sizes = [math.sqrt(sum(float(a) ** 2 for a in x.flatten())) for x in (old, new)]
    found = row_products(old, new)
    assert found.cosine == pytest.approx(dot / (sizes[0] * sizes[1]), rel=1e-5)
    gains = [
        sum(float(a * b) for a, b in zip(r, s, strict=True)) / sum(float(a) ** 2 for a in r)
        for i, (r, s) in enumerate(zip(old, new, strict=True))
        if i != 2
    ]
    mean = sum(gains) / len(gains)
    spread = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / len(gains))
    assert found.gain_spread == pytest.approx(spread, rel=1e-5)
    assert [found.source_norm, found.result_norm] == pytest.approx(sizes, rel=1e-5)
    zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
    assert row_products(zeros, ones).cosine is None
    assert row_products(ones, zeros).cosine == 0
    assert row_products(zeros, ones).gain_spread == 0
