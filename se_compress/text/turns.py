"""How several sources of text share the samples, and in which order theirs follow each other."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

Item = TypeVar("Item")


def shares(samples: int, weights: Sequence[float]) -> list[int]:
    """How many of the samples each source gives: by its weight, but one at least.

    Of `samples`, at least as many as there are sources, one goes to each; what is left of its share
    follows, and what cannot be divided goes to the largest fractions, of equal ones to the first.
    """
    total = sum(map(Fraction, weights))
    wanted = [max(samples * Fraction(weight) / total - 1, Fraction(0)) for weight in weights]
    scale = Fraction(samples - len(weights)) / (sum(wanted) or 1)
    exact = [share * scale for share in wanted]
    counts = [1 + int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in order[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def in_turns(lists: Sequence[Sequence[Item]]) -> Iterator[Item]:
    """The items of all lists, each list spread evenly over the whole; of equals the first list
    comes first. So every beginning holds the lists in about their proportions."""
    places = sorted(
        (Fraction(2 * k + 1, len(items)), i, k)
        for i, items in enumerate(lists)
        for k in range(len(items))
    )
    return (lists[i][k] for _, i, k in places)
