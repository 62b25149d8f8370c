"""What it costs that a target takes one width per layer or model, as far as bytes tell: before the
first profile nothing is known of losses, nor which experts are super experts. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from se_compress.artifacts import ExpertId
from se_compress.planning.protection import ALL_BUT
from se_compress.planning.units import Task, Unit, unit_of


def bytes_of_granularity(task: Task) -> str:
    """A sentence on the bytes of a layer beside those that a finer target would change alone; ""
    where the target is as fine, or nothing hangs on it."""
    terms = task.terms
    coarse = terms.rules.granularity
    if not terms.rules.widths or coarse == "projection" or not task.routed:
        return ""
    told = [*_of_lifting(task), *_of_steps(task)]
    if not told:
        return ""
    return (
        f"one width per {coarse}: {'; '.join(told)}; what that costs in quality is known after "
        + ("the first profile")
    )


def _of_lifting(task: Task) -> Iterator[str]:
    """What keeping one expert takes, where its whole layer is kept with it."""
    policy, kept = task.terms.policy, task.terms.policy.protected_bits
    by_name = isinstance(policy.protect, str)
    if (
        policy.protect in ("none", ALL_BUT)
        or set(policy.bits) == {kept}
        or kept <= min(policy.bits)
    ):
        return
    if task.terms.rules.granularity != "layer" or not (by_name or task.protected):
        return
    layer, alone = _first_layer(task)
    least = min(policy.bits)
    more, finer = (
        task.cost(unit_of(some), kept) - task.cost(unit_of(some), least) for some in (layer, alone)
    )
    which = "a super expert" if policy.protect == "super-experts" else "a protected expert"
    share = 8 * more / task.weights(task.routed)
    yield (
        f"a layer with {which} is lifted from {least} to {kept} bits as a whole, "
        f"{_megabytes(more)} or {share:.3f} bits per expert weight for each such layer, where the "
        f"expert alone would take {_megabytes(finer)}"
    )


def _first_layer(task: Task) -> tuple[Sequence[ExpertId], Sequence[ExpertId]]:
    """The routed experts of one layer, and one of them: of a protected one's, if any is known."""
    known = sorted(i for i in task.protected if i.expert != "shared")
    alone = known[0] if known else task.routed[0]
    return [i for i in task.routed if i.layer == alone.layer], [alone]


def _of_steps(task: Task) -> Iterator[str]:
    """The least change of a mixture, beside that of a width for each projection group."""
    widths = sorted(task.terms.policy.bits)
    if len(widths) < 2 or not task.units:
        return
    step = _least_step(task, task.units, widths)
    finest = replace(task.terms.rules, granularity="projection")
    fine = replace(task, terms=replace(task.terms, rules=finest))
    yield (
        f"a mixture changes in steps of {_megabytes(step)} at least, with a width for each "
        f"projection group of {_megabytes(_least_step(task, fine.units, widths))}"
    )


def _least_step(task: Task, units: Sequence[Unit], widths: Sequence[int]) -> int:
    return min(
        task.cost(unit, more) - task.cost(unit, fewer)
        for unit in (units[0], units[-1])
        for fewer, more in pairwise(widths)
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count:,} bytes"
