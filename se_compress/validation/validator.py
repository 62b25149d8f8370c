"""Compare what was written with what it was made from, on text that neither has been fitted to.

Everything is read back from disk. Source and result run side by side, one layer of each in memory.
The gates are defined in `artifacts/gates.py`, the measures behind them in `model/measures.py`.

Perplexity and KL divergence come with a 95 % interval: wholly within the limit is a pass, wholly
beyond it a failure, and in between the value decides and the detail says that the sample is too
small to tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from se_compress.artifacts import (
    ALONE,
    Check,
    CompressionPlan,
    DomainReport,
    ModelSource,
    RunOptions,
    TaskReport,
    ValidationReport,
)
from se_compress.artifacts.targets import targets_of
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.reloading import RELOAD_LIMIT, check_reload
from se_compress.engines.tasks import answers_of_result, engine_itself
from se_compress.model.checkpoint import Reader
from se_compress.model.streaming import StreamedModel
from se_compress.model.surgery import Shrunk
from se_compress.recipe import Recipe, Validation
from se_compress.reload import loader_of
from se_compress.running.ranks import call
from se_compress.text.alike import text_check
from se_compress.text.tokenizer import decoder_of
from se_compress.validation.checks import (
    massive_checks,
    prediction_checks,
    router_checks,
    sink_check,
    worst_of,
)
from se_compress.validation.continuations import continue_both
from se_compress.validation.predictions import Decode, tail_of
from se_compress.validation.side_by_side import Compared, Original, Tokens, compare, stream
from se_compress.validation.stored import (
    OnDisk,
    Stored,
    Unusable,
    find_checkpoint,
    foreign,
    planned,
)
from se_compress.validation.tasks import answered
from se_compress.validation.verdict import NOTHING, Judged, alone, report_on
from se_compress.validation.weights import weight_checks

__all__ = ["Original", "judge", "try_again", "validate"]


def validate(
    source: ModelSource,
    plan: CompressionPlan | None,
    directory: Path,
    tokens: Tokens | Mapping[str, Tokens],
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    *,
    original: Original | None = None,
    reload: bool = True,
) -> ValidationReport:
    """Judge the checkpoint in `directory`, made from `source` by `plan`.

    plan      None for a checkpoint that somebody else made of the source, in a format
              that `stored.foreign` reads. Every tensor has to be there, but may have changed
    tokens    held-out sequences of token ids, all of one length; of several domains, those of each
              by its name, with the limits that the recipe sets for it
    original  the source's side, if several results are judged on the same tokens
    reload    whether its engine is to load it; without that, the check is not run

    What `compress` left in the directory goes into the report. If it stopped early, the result is
    not whole, and the gate that stopped it is all that is reported.

    Raises SourceError if the checkpoint cannot be read.
    """
    on_disk = find_checkpoint(directory)
    last = on_disk.records[-1] if on_disk.records else None
    if last and last.failed:
        reason = f"compressing stopped after layer {last.layer}"
        return report_on(source, alone(last.failed, reason), NOTHING, on_disk)
    stored = _made_sense_of(source, plan, on_disk)
    if not stored.complete:
        reason = "a result with tensors missing cannot be run"
        return report_on(source, alone(stored.accounted, reason), NOTHING, on_disk)
    original = original or Original(source, tokens, recipe, options)
    call(options.ranks, _compare_too, source, plan, directory, tokens, recipe, options)
    try:
        return _judge_stored(stored, original, recipe, options, reload)
    except Unusable as error:
        reason = "a tensor of the result cannot be used"
        return report_on(source, alone(stored.not_usable(error), reason), NOTHING, on_disk)


def _made_sense_of(source: ModelSource, plan: CompressionPlan | None, on_disk: OnDisk) -> Stored:
    return planned(draw_blueprint(source, plan), on_disk) if plan else foreign(source, on_disk)


def _compare_too(
    source: ModelSource,
    plan: CompressionPlan | None,
    directory: Path,
    tokens: Tokens | Mapping[str, Tokens],
    recipe: Recipe,
    options: RunOptions,
) -> None:
    """What other ranks than 0 do for `validate`: their part of running both models."""
    on_disk = find_checkpoint(directory)
    stored = _made_sense_of(source, plan, on_disk)
    result = stream(stored.source, stored.read, recipe, options)
    compare(Original(source, tokens, recipe, options), result, stored.small, options)


def _judge_stored(
    stored: Stored,
    original: Original,
    recipe: Recipe,
    options: RunOptions,
    reload: bool,
) -> ValidationReport:
    """All gates of a checkpoint that is whole. Raises Unusable."""
    result = stream(stored.source, stored.read, recipe, options)
    judged = _judge_behaviour(original, result, stored.small, recipe.validation, options)
    reloaded = Check("reload", None, RELOAD_LIMIT, None, "left out by the caller")
    if reload:
        engine = recipe.validation.reload.engine
        reloaded = _reload(stored, original.tokens, recipe, options, engine)
    weights = weight_checks(
        stored.changed, stored.intended, stored.read, recipe.validation, options
    )
    tasks, answers = _tasks(original, stored, recipe.validation, options)
    source = original.model.source
    text = text_check(source, stored.on_disk.directory)
    checks = [*judged.checks, *answers, *weights, stored.accounted, text, reloaded]
    return report_on(source, checks, replace(judged, tasks=tasks), stored.on_disk)


def _tasks(
    original: Original, stored: Stored, validation: Validation, options: RunOptions
) -> tuple[tuple[TaskReport, ...], tuple[Check, ...]]:
    """Tasks of lm_eval on both models, each in a process of its own. Nothing without tasks."""
    tasks = validation.tasks
    if tasks is None:
        return (), ()
    options.progress("tasks", 0, 2)
    source = original.answers(tasks)
    options.progress("tasks", 1, 2)
    named = None if tasks.backend == "auto" else tasks.backend
    target = named or targets_of(stored.target)[0]
    where, path = stored.on_disk, original.model.source.path
    tensors = where.tensors.values()
    result = answers_of_result(tasks, where.directory, tensors, path, target, stored.form)
    options.progress("tasks", 2, 2)
    reports, check = answered(source, result, validation)
    through = engine_itself(tasks) or loader_of(target, stored.form)
    detail = f"{check.detail}; result through {through}" if reports else check.detail
    return reports, (replace(check, detail=detail),)


def try_again(
    source: ModelSource,
    plan: CompressionPlan,
    directory: Path,
    tokens: Tokens | Mapping[str, Tokens],
    recipe: Recipe,
    options: RunOptions,
    report: ValidationReport,
) -> ValidationReport:
    """The report on a result with its reload checked once more, and all else as it was."""
    stored = planned(draw_blueprint(source, plan), find_checkpoint(directory))
    texts = list(tokens.values()) if isinstance(tokens, Mapping) else [tokens]
    engine = recipe.validation.reload.engine
    again = _reload(stored, texts[0], recipe, options, engine)
    checks = tuple(again if check.name == again.name else check for check in report.checks)
    return replace(
        report,
        passed=all(check.passed is not False for check in checks),
        checks=checks,
        not_run=tuple(check.name for check in checks if check.passed is None),
    )


def judge(
    original: Original,
    read: Reader,
    recipe: Recipe,
    options: RunOptions,
    intended: Reader | None = None,
    run_as: ModelSource | None = None,
) -> Judged:
    """Every gate that behaviour and weights of a model decide, and the former by domain. `read`
    gives its tensors by the names of the source, `intended` what they were made from, if that is
    not the source; `run_as` is the source with another config, if the model has one. Nothing has to
    be on disk."""
    source = original.model.source
    result = stream(run_as or source, read, recipe, options)
    judged = _judge_behaviour(original, result, None, recipe.validation, options)
    intended = intended or original.model.read
    weights = weight_checks(source.tensors.values(), intended, read, recipe.validation, options)
    return replace(judged, checks=(*judged.checks, *weights))


def _judge_behaviour(
    original: Original,
    result: StreamedModel,
    small: Shrunk | None,
    validation: Validation,
    options: RunOptions,
) -> Judged:
    """Every gate of each domain by the domain's limits; of each gate, the worst domain decides."""
    decode = decoder_of(original.model.source.path)
    whole, each = compare(original, result, small, options)
    continuations, repetition = continue_both(original, result, validation, options, decode)
    checks = {
        name: (*_checks_of(compared, validation.of(name)), *repetition[name])
        for name, compared in each.items()
    }
    named = {name: compared for name, compared in each.items() if name}
    return Judged(
        checks=worst_of(checks) if named else checks[""],
        compared=whole,
        tail=tail_of(whole.predictions, original.tokens, decode),
        continuations=continuations,
        domains=tuple(
            _domain_report(name, one, checks[name], original.texts[name], decode)
            for name, one in named.items()
        ),
    )


def _checks_of(compared: Compared, validation: Validation) -> tuple[Check, ...]:
    return (
        *prediction_checks(compared.predictions, validation),
        *massive_checks(compared.layers, validation),
        sink_check(compared, validation),
        *router_checks(compared.layers, validation),
    )


def _domain_report(
    name: str, compared: Compared, checks: tuple[Check, ...], tokens: Tokens, decode: Decode
) -> DomainReport:
    source, result = compared.predictions.perplexities
    return DomainReport(
        name=name,
        checks=checks,
        perplexity_source=source,
        perplexity_result=result,
        tokens=int(compared.predictions.tokens.sum()),
        tail=tail_of(compared.predictions, tokens, decode),
    )


def _reload(
    stored: Stored,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    options: RunOptions,
    engine: str,
) -> Check:
    """On the first held-out sequence, in a process of its own: engines patch what they import."""
    result = stream(stored.source, stored.read, recipe, replace(options, ranks=ALONE))
    where, tensors = stored.on_disk.directory, stored.on_disk.tensors.values()
    checks = [
        check_reload(result, target, stored.form, where, tensors, tokens[0], options, engine)
        for target in targets_of(stored.target)
    ]
    return checks[0] if len(checks) == 1 else _of_all(checks, targets_of(stored.target))


def _of_all(checks: Sequence[Check], targets: Sequence[str]) -> Check:
    """One check of several targets: the worst, with what each said."""
    grades = [(check.passed is not False, check.passed is None) for check in checks]
    worst = checks[grades.index(min(grades))]
    said = (f"{target}: {check.detail}" for target, check in zip(targets, checks, strict=True))
    again = next((check.retry for check in checks if check.retry), None)
    return replace(worst, detail="; ".join(said), retry=again if worst.passed is None else None)
