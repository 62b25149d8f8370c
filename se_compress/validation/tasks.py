"""The gate on tasks: which answers of lm_eval's questions change between source and result.

An average hides flips: a result that loses ten answers and gains ten is not the source. But it is
no worse than that either, and what is judged is whether it lost more than it gained by more than
chance: the exact test of McNemar on the pairs that differ.
"""

from collections.abc import Mapping
from typing import Any

from scipy.stats import binomtest

from se_compress.artifacts import Check, TaskReport
from se_compress.engines.tasks import Answers
from se_compress.recipe import Validation
from se_compress.validation.checks import judged, not_judged

GATE = "task_flips"


def compare_answers(source: Answers, result: Answers) -> tuple[TaskReport, ...]:
    """Each task of both, over the samples that both answered."""
    return tuple(_compare(name, source[name], result[name]) for name in source if name in result)


def _compare(name: str, source: Mapping[str, Any], result: Mapping[str, Any]) -> TaskReport:
    both = sorted(source["right"].keys() & result["right"].keys())
    pairs = [(bool(source["right"][at]), bool(result["right"][at])) for at in both]
    gained = sum(new and not old for old, new in pairs)
    lost = sum(old and not new for old, new in pairs)
    return TaskReport(
        name=name,
        metric=str(source["metric"]),
        samples=len(pairs),
        source=sum(old for old, _ in pairs) / max(len(pairs), 1),
        result=sum(new for _, new in pairs) / max(len(pairs), 1),
        gained=gained,
        lost=lost,
        p_value=lost_by_chance(gained, lost),
    )


def lost_by_chance(gained: int, lost: int) -> float:
    """How likely it is that of all changes as many or more are losses, were each as likely."""
    changes = gained + lost
    if not changes:
        return 1.0
    return float(binomtest(lost, changes, 0.5, alternative="greater").pvalue)


def task_check(reports: tuple[TaskReport, ...], validation: Validation) -> Check:
    """Bonferroni's correction: the least p-value of several tasks is small by chance alone."""
    worst = min(reports, key=lambda one: one.p_value)
    value = min(1.0, worst.p_value * len(reports))
    detail = (
        f"{worst.name}: {worst.lost} answers lost, {worst.gained} gained of {worst.samples}; "
        f"right {worst.source:.1%} -> {worst.result:.1%}"
    )
    return judged(validation, GATE, value, detail)


def answered(
    source: Answers | str, result: Answers | str, validation: Validation
) -> tuple[tuple[TaskReport, ...], Check]:
    """The tasks and their check; a sentence in the place of answers says why there are none."""
    for whose, found in (("source", source), ("result", result)):
        if isinstance(found, str):
            return (), not_judged(validation, GATE, f"{whose}: {found}")
    assert not isinstance(source, str)
    assert not isinstance(result, str)
    reports = compare_answers(source, result)
    if not any(one.samples for one in reports):
        return (), not_judged(validation, GATE, "no question was answered by both")
    return reports, task_check(reports, validation)
