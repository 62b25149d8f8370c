"""The solver against an exhaustive twin, and at the size of the largest models."""

import itertools
import random

import pytest

from se_compress.knapsack import RELATIVE_GAP, Option, choose


def _by_trying_all(items: list[list[Option]], budget: int) -> float | None:
    losses = [
        sum(option.loss for option in choice)
        for choice in itertools.product(*items)
        if sum(option.cost for option in choice) <= budget
    ]
    return min(losses, default=None)


def _items(count: int, seed: int, options: int = 4) -> list[list[Option]]:
    draw = random.Random(seed)
    return [
        [
            Option(cost=draw.randint(1, 50), loss=draw.lognormvariate(0, 2))
            for _ in range(draw.randint(1, options))
        ]
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_matches_trying_all_choices(seed: int) -> None:
    items = _items(6, seed)
    least = sum(min(option.cost for option in options) for options in items)
    most = sum(max(option.cost for option in options) for options in items)
    for budget in (least, (least + most) // 2, most):
        chosen, best = choose(items, budget), _by_trying_all(items, budget)
        assert chosen is not None
        assert best is not None
        assert chosen.cost <= budget
        assert chosen.loss == pytest.approx(best, rel=2 * RELATIVE_GAP)
        assert chosen.bound <= best * (1 + 1e-9)
        assert len(chosen.picks) == len(items)


def test_none_when_the_cheapest_does_not_fit() -> None:
    items = [[Option(5, 1.0), Option(7, 0.5)], [Option(4, 1.0)]]
    assert choose(items, 8) is None
    assert choose(items, 9) is not None


def test_budget_is_never_exceeded_by_rounding() -> None:
    """Costs of a real file: hundreds of gigabytes, and a budget met to the byte."""
    items = [[Option(10**10 + i, 2.0), Option(2 * 10**10 + i, 1.0)] for i in range(20)]
    budget = sum(options[0].cost for options in items) + 10**10
    chosen = choose(items, budget)
    assert chosen is not None
    assert chosen.cost == budget
    assert choose(items, budget - 1) is not None
    assert choose(items, budget - 1).cost <= budget - 1  # type: ignore[union-attr]


def test_same_answer_twice() -> None:
    items = _items(300, 5)
    budget = sum(options[0].cost for options in items)
    assert choose(items, budget + 500) == choose(items, budget + 500)
