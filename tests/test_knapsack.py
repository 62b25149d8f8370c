"""The solver against an exhaustive twin, and at the size of the largest models."""

import itertools
import random
import time

import pytest

from se_compress.planning.knapsack import RELATIVE_GAP, Option, choose, sweep


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


@pytest.mark.parametrize("seed", range(6))
def test_a_sweep_is_within_the_budgets_and_a_step_from_the_best(seed: int) -> None:
    items = _items(7, seed)
    least = sum(min(option.cost for option in options) for options in items)
    most = sum(max(option.cost for option in options) for options in items)
    budgets = [least + (most - least) * i // 10 for i in range(11)]
    step = max(max(o.loss for o in options) for options in items)
    for budget, choice in zip(budgets, sweep(items, budgets), strict=True):
        picked = [options[k] for options, k in zip(items, choice.picks, strict=True)]
        assert choice.cost == sum(option.cost for option in picked) <= budget
        assert choice.loss == pytest.approx(sum(option.loss for option in picked))
        best = _by_trying_all(items, budget)
        assert best is not None
        assert choice.bound <= best * (1 + 1e-9) + 1e-12
        assert best <= choice.loss * (1 + 1e-9)
        assert choice.loss - choice.bound <= step
        exact = choose(items, choice.cost)  # at just what it costs, nothing is better
        assert exact is not None
        assert choice.loss == pytest.approx(exact.loss, rel=2 * RELATIVE_GAP)


def test_a_sweep_ends_with_the_least_loss() -> None:
    items = _items(50, 1)
    most = sum(max(option.cost for option in options) for options in items)
    [choice] = sweep(items, [most])
    assert choice.loss == pytest.approx(sum(min(o.loss for o in options) for options in items))
    assert choice.bound == choice.loss


def test_the_largest_models_take_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """61 layers of 257 experts at five widths; the time is printed, not judged."""
    draw = random.Random(0)
    items = [
        [
            Option(cost=11_010_048 * bits, loss=need * 4.0**-bits * draw.uniform(0.7, 1.3))
            for bits in (2, 3, 4, 8, 16)
        ]
        for need in (draw.lognormvariate(0, 1.5) for _ in range(61 * 257))
    ]
    budget = 61 * 257 * 11_010_048 * 16 // 5
    started = time.perf_counter()
    chosen = choose(items, budget)
    seconds = time.perf_counter() - started
    assert chosen is not None
    assert chosen.cost <= budget
    assert chosen.loss <= chosen.bound * (1 + 2 * RELATIVE_GAP)
    with capsys.disabled():
        print(f"\n{len(items)} experts at 5 widths: {seconds:.1f} s")
