"""What other budgets would buy: sizes against predicted loss."""

from se_compress.artifacts import PROJECTION_GROUPS, SOURCE_BITS, CompressionPlan, CurvePoint
from se_compress.planning.bits import with_raised
from se_compress.planning.decisions import write_plan
from se_compress.planning.knapsack import sweep
from se_compress.planning.units import ExpertBits, Task

CURVE_POINTS = 9


def cost_curve(task: Task) -> tuple[CurvePoint, ...]:
    """Points by size, the protected experts kept: all bits that the target loads, for all other
    experts alike; and with a profile and several `policy.bits`, mixtures of them at equal steps
    between the least and the most."""
    if not task.terms.widths:
        return ()
    task = with_raised(task)
    least = write_plan(task, task.least_bits)
    points = [_point(task, least, (bits,), task.uniform(bits)) for bits in task.terms.widths]
    if task.profile is not None and len(task.allowed) > 1:
        mixtures = (task.mixed(choice.picks) for choice in sweep(task.items, _budgets(task)))
        points += [_point(task, least, tuple(task.allowed), mixture) for mixture in mixtures]
    return tuple(sorted(points, key=lambda point: (point.size_bytes, len(point.widths))))


def _budgets(task: Task) -> list[int]:
    """CURVE_POINTS numbers of bytes, from all items at their cheapest to all at their dearest."""
    least, most = (sum(options[k].cost for options in task.items) for k in (0, -1))
    steps = range(CURVE_POINTS)
    return [least + (most - least) * i // (CURVE_POINTS - 1) for i in steps]


def _point(
    task: Task, least: CompressionPlan, label: tuple[int, ...], expert_bits: ExpertBits
) -> CurvePoint:
    """Sizes by what differs from the least plan, which is measured to the byte."""
    routed, of_least = (task.stored(task.routed, bits) for bits in (expert_bits, task.least_bits))
    return CurvePoint(
        label,
        8 * routed / task.weights(task.routed),
        least.size_bytes - of_least + routed,
        _loss(task, expert_bits),
    )


def _loss(task: Task, expert_bits: ExpertBits) -> float | None:
    """None without a profile, and for widths that it did not measure."""
    asked = {bits for pair in expert_bits.values() for bits in pair} - {SOURCE_BITS}
    if task.profile is None or not asked <= task.profile.widths:
        return None
    return sum(
        task.loss(((identity, group),), bits)
        for identity, pair in expert_bits.items()
        for group, bits in zip(PROJECTION_GROUPS, pair, strict=True)
    )
