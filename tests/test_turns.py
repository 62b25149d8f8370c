"""Sources share the samples by weight and take turns; equal ones as they always did."""

import itertools

import pytest

from se_compress.text.turns import in_turns, shares


@pytest.mark.parametrize("sources", range(1, 7))
def test_equal_weights_are_dealt_like_cards(sources: int) -> None:
    for samples in range(sources, 40):
        counts = shares(samples, [1.0] * sources)
        hands = [range(source, samples, sources) for source in range(sources)]
        assert counts == [len(hand) for hand in hands]
        dealt = [x for turn in itertools.zip_longest(*hands) for x in turn if x is not None]
        assert list(in_turns(hands)) == dealt == list(range(samples))


@pytest.mark.parametrize(
    ("samples", "weights", "counts"),
    [
        (8, [3.0, 1.0], [6, 2]),
        (10, [3.0, 1.0], [8, 2]),
        (3, [1000.0, 1.0], [2, 1]),
        (4, [0.001, 0.001, 9.0], [1, 1, 2]),
        (2, [1.0, 5.0], [1, 1]),
        (30, [0.1, 0.2], [10, 20]),
    ],
)
def test_weights_share_the_samples_and_nobody_gets_none(
    samples: int, weights: list[float], counts: list[int]
) -> None:
    assert shares(samples, weights) == counts


def test_every_beginning_holds_the_sources_in_their_proportions() -> None:
    order = list(in_turns(["a" * 30, "b" * 10, "c" * 20]))
    for length in range(1, 61):
        for name, share in (("a", 30), ("b", 10), ("c", 20)):
            assert abs(order[:length].count(name) - share * length / 60) <= 1
