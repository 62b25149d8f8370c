"""The multiple-choice knapsack: one option for each item, least loss in all, cost within a budget.

Solved as an integer programme by HiGHS, through scipy. The linear relaxation leaves at most one
item undecided between two options, so the search ends quickly even for tens of thousands of items,
and the solver's bound says how far from the optimum the answer can be.

For many budgets at once there is `sweep`: the relaxation alone, solved by hand. Its undecided item
is decided for the cheaper option, so that the answer is a little worse, and there at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

RELATIVE_GAP = 1e-5


@dataclass(frozen=True)
class Option:
    """What one choice for an item costs (any unit, as the budget) and loses."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """`picks[i]` is the index of the option taken for item i. `bound`: no choice within the budget
    loses less than that."""

    picks: tuple[int, ...]
    cost: int
    loss: float
    bound: float


def choose(items: Sequence[Sequence[Option]], budget: int) -> Choice | None:
    """The choice of least loss that costs at most `budget`; None if there is none.

    Every item needs at least one option. Equal input gives an equal answer.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    if sum(min(option.cost for option in options) for options in items) > budget:
        return None
    owner = np.array([i for i, options in enumerate(items) for _ in options])
    cost = np.array([float(option.cost) for options in items for option in options])
    loss = np.array([option.loss for options in items for option in options])
    # Losses of 1e-9 and budgets of 1e11 in one programme would drown in the solver's tolerances.
    loss_unit, cost_unit = loss.mean() or 1.0, cost.max() or 1.0
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    within = csr_matrix(cost[None] / cost_unit)
    solved = milp(
        loss / loss_unit,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(within, -np.inf, budget / cost_unit),
        ],
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": RELATIVE_GAP},
    )
    if solved.x is None:
        raise RuntimeError(f"HiGHS found no solution where there is one: {solved.message}")
    picks = _picks(items, solved.x.tolist())
    chosen = [options[pick] for options, pick in zip(items, picks, strict=True)]
    total = sum(option.cost for option in chosen)
    if total > budget:  # within the solver's tolerance of the budget, but a budget is a budget
        return choose(items, budget - max(total - budget, int(cost_unit * 1e-9) + 1))
    bound = float(solved.mip_dual_bound) * float(loss_unit)
    lost = sum(option.loss for option in chosen)
    return Choice(picks, total, lost, min(bound, lost))


def sweep(items: Sequence[Sequence[Option]], budgets: Sequence[int]) -> list[Choice]:
    """For every budget, ascending and none below the least cost, a choice within it; its loss and
    its bound lie no further apart than one item's step.

    Every item goes along the lower convex hull of its options, from cheap to dear; the steps of all
    items are taken in the order of what they save per cost.
    """
    hulls = [_hull(options) for options in items]
    steps = sorted(
        ((b.loss - a.loss) / (b.cost - a.cost), i, place)
        for i, (options, hull) in enumerate(zip(items, hulls, strict=True))
        for place, (a, b) in enumerate(pairwise(options[k] for k in hull), 1)
    )
    picks = [hull[0] for hull in hulls]
    cost = sum(options[pick].cost for options, pick in zip(items, picks, strict=True))
    loss = sum(options[pick].loss for options, pick in zip(items, picks, strict=True))
    choices, done = list[Choice](), 0
    for budget in budgets:
        while done < len(steps):
            _, i, place = steps[done]
            old, new = items[i][picks[i]], items[i][hulls[i][place]]
            if cost + new.cost - old.cost > budget:
                break
            cost, loss = cost + new.cost - old.cost, loss + new.loss - old.loss
            picks[i], done = hulls[i][place], done + 1
        saved = steps[done][0] * (budget - cost) if done < len(steps) else 0.0
        choices.append(Choice(tuple(picks), cost, loss, loss + saved))
    return choices


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull of (cost, loss), by rising cost and falling loss."""
    hull: list[int] = []
    for k in sorted(range(len(options)), key=lambda k: (options[k].cost, options[k].loss)):
        new = options[k]
        if hull and new.loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1:
            first, last = options[hull[-2]], options[hull[-1]]
            rise = (last.loss - first.loss) * (new.cost - first.cost)
            if rise < (new.loss - first.loss) * (last.cost - first.cost):
                break
            hull.pop()
        hull.append(k)
    return hull


def _picks(items: Sequence[Sequence[Option]], taken: Sequence[float]) -> tuple[int, ...]:
    picks, start = [], 0
    for options in items:
        share = taken[start : start + len(options)]
        picks.append(max(range(len(options)), key=lambda k, share=share: share[k]))  # type: ignore[misc]
        start += len(options)
    return tuple(picks)
