"""The one file that knows the order of things: recipe in, published or rejected checkpoint out.

Read `_run`: it names every stage, in order. Started again, a run goes on after the last finished
layer. What may be reused is decided in reuse.py, by digests of everything that went in; a changed
setting or source is named, and what depends on it is made anew. Where it all lies is in
running/run_directory.py.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from se_compress.artifacts import (
    OURS,
    SOURCE_BITS,
    CompressionPlan,
    ExpertProfile,
    ModelSource,
    ValidationReport,
    from_json,
    surprise,
    to_json,
    write_atomically,
)
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.distilling import parts_to_distill
from se_compress.engines.serving import serving_of
from se_compress.engines.targets import check_installed
from se_compress.engines.tasks import why_no_task
from se_compress.errors import RecipeError, SourceError
from se_compress.opening.auxiliary import find_auxiliary
from se_compress.opening.source import open_source
from se_compress.planning.check import check_plan
from se_compress.planning.policy import (
    cautions_of,
    curve_of,
    make_plan,
    price_of_granularity,
    task_of,
)
from se_compress.planning.terms import terms_of
from se_compress.recipe import Recipe, Validation
from se_compress.recipe_file import PLAN_BYTES, read_text
from se_compress.reporting.comparison import compare_outcomes
from se_compress.reporting.files import write_comparison, write_reports
from se_compress.request import Notice, Outcome, Preview, Request, VariantsOutcome, naming
from se_compress.reuse import find_finished, find_profile, load_profile, settings_of, try_again
from se_compress.running.faults import telling_whose
from se_compress.running.manifest import SETTINGS_FILE, write_list
from se_compress.running.places import partial
from se_compress.running.preflight import (
    check_disk,
    check_memory,
    check_place,
    check_places,
    check_positions,
    disk_shortage,
    memory_sentence,
)
from se_compress.running.publishing import publish, recover
from se_compress.running.records import load, save, save_settings
from se_compress.running.run_directory import (
    STAGED,
    check_output_of_variants,
    check_replaceable,
    locked,
    prepare,
)
from se_compress.text.overlap import (
    cautions,
    cautions_before,
    domain_cautions,
    missing_text,
    text_records,
)

if TYPE_CHECKING:
    from se_compress.validation.validator import Original

# The source's side of the validation, by what has to be alike for results to share it.
Originals = dict[object, "Original"]


def run(request: Request) -> Outcome:
    """The whole flow. Raises SeCompressError; a rejected checkpoint is an Outcome, not an error."""
    source = open_source(request.recipe.model, request.keep_code, request.notice)
    _check_before({"": request}, source, request)
    with telling_whose(source.path, request.output):
        return _run(request, source, {})


def run_variants(request: Request) -> VariantsOutcome:
    """The whole flow for each variant of the recipe, and the comparison of their results.

    One profile serves all variants that would measure the same. A rejected variant does not stop
    the others; what an error leaves behind is taken up by the next run.
    """
    _check_one_model(request.recipe)
    source = open_source(request.recipe.model, request.keep_code, request.notice)
    check_output_of_variants(request.output)
    requests = request.by_variant()
    _check_before(requests, source, request)
    outcomes: dict[str, Outcome] = {}
    originals: Originals = {}
    for name, one in requests.items():
        with naming(name), telling_whose(source.path, one.output):
            outcomes[name] = _run(one, source, originals)
    comparison = compare_outcomes(request.recipe, outcomes)
    write_comparison(request.output, comparison)
    return VariantsOutcome(request.output, outcomes, comparison)


def _run(request: Request, source: ModelSource, originals: Originals) -> Outcome:
    """One checkpoint, from the drawing of the text to its place.

    originals   filled here, for the variants to share
    """
    from se_compress.compression.execute import compress
    from se_compress.engines.generation import why_not_saved
    from se_compress.model.binding import check_source
    from se_compress.profiling.profiler import STATES_FILE, profile_digest, profile_experts
    from se_compress.text.calibrate import draw_domains, draw_tokens
    from se_compress.validation.validator import Original, validate

    recipe, output = request.recipe, request.output
    calibration = draw_tokens(recipe.calibration, source)
    held_out = draw_domains(recipe.validation, source)

    settings = settings_of(request, source.digest, calibration, held_out)
    if partial(output).exists():
        with locked(output, request.notice):
            recover(output, request.notice)
    if not request.fresh and (finished := find_finished(request, source, settings)):
        return try_again(finished, source, held_out, request)

    check_source(source)
    doubts = cautions(calibration, held_out)
    _tell(doubts, request.notice)
    beside = [file.name for file in source.path.iterdir()]
    check_replaceable(output, beside)
    token_count = len(calibration) * len(calibration[0])
    request.notice(check_memory(source, recipe, token_count, request.options.on_disk))
    with locked(output, request.notice) as work:
        prepare(output, settings, request.fresh, request.notice)
        options, staged = request.options_in(work), work / STAGED

        profile = find_profile(profile_digest(source, calibration, recipe), request)
        profile = profile or profile_experts(source, calibration, recipe, options)
        save(profile, work / "profile.json")
        (work / STATES_FILE).unlink(missing_ok=True)

        plan = _plan(source, profile, request)
        unexpected = filter(None, [surprise(profile, recipe.super_experts.expected_ids)])
        said = (*unexpected, *cautions_of(plan, source, profile))
        plan = plan.noting((*filter(None, [why_not_saved(source.path)]), *doubts, *said))
        narrow = domain_cautions(plan, recipe)
        _tell((*said, *narrow), request.notice)
        write_atomically(work / "plan.json", to_json(plan))
        check_disk([plan], source, recipe)

        compress(source, plan, calibration, recipe, staged, options)

        alike = (recipe.compute_dtype, recipe.validation.generation)
        if alike not in originals:
            originals[alike] = Original(source, held_out, recipe, request.options)
        validation = validate(
            source, plan, staged, held_out, recipe, request.options, original=originals[alike]
        )
        texts = text_records(recipe, calibration, held_out)
        validation = replace(validation, texts=texts, cautions=(*doubts, *narrow))

        outcome = Outcome(request.place_of(validation), profile, plan, validation)
        write_reports(staged, outcome, request, source.path)
        save_settings(staged / SETTINGS_FILE, settings.by_name)
        write_list(staged, request.options.progress)
        check_replaceable(output, beside)  # again: hours have passed
        publish(staged, outcome.directory, work)
    return outcome


def preview(request: Request) -> Preview:
    """Everything up to the pre-flight that needs no weights: sizes, budget, loadability."""
    return _previews({"": request}, request)[""]


def preview_variants(request: Request) -> dict[str, Preview]:
    """The same for each variant, by name."""
    _check_one_model(request.recipe)
    return _previews(request.by_variant(), request)


def judge_existing(request: Request, directory: Path, output: Path) -> ValidationReport:
    """Judge a checkpoint that exists against the recipe's model and gates; nothing is compressed.

    One of ours is judged by the plan in it, any other as `validator.validate` does without a plan.
    `output` gets validation.json, and of one of ours the report.
    """
    from se_compress.reporting.report import render_report
    from se_compress.text.calibrate import draw_domains
    from se_compress.validation.validator import validate

    if not os.path.isdir(directory):
        raise SourceError(f"--validate {directory}: there is no such directory")
    check_place(output)
    source = open_source(request.recipe.model, request.keep_code, request.notice)
    check_positions(source, request.recipe)
    _check_questions([request.recipe.validation], source)
    plan = _plan_in(directory)
    if plan is not None:
        plan = check_plan(plan, source, str(directory / OURS / "plan.json"))
    _tell(cautions_before(request.recipe), request.notice)
    held_out = draw_domains(request.recipe.validation, source)
    report = validate(source, plan, directory, held_out, request.recipe, request.options)
    if plan is not None and (narrow := domain_cautions(plan, request.recipe)):
        _tell(narrow, request.notice)
        report = replace(report, cautions=narrow)
    write_atomically(output / "validation.json", to_json(report))
    profile = load(ExpertProfile, directory / OURS / "profile.json")
    if plan is not None and profile is not None:
        html = render_report(request.recipe, profile, plan, report)
        write_atomically(output / "report.html", html)
    else:
        request.notice(f"{directory} has no plan and profile of ours: it gets no report.html")
    return report


# --------------------------------------------------------------------------------- before the hours


def _check_before(requests: Mapping[str, Request], source: ModelSource, whole: Request) -> None:
    """What can be refused without a profile is refused now.

    requests   of each variant, by name; a single one is called ""
    whole      the request that they are made of
    """
    plans = []
    for name, one in requests.items():
        with naming(name):
            _check_request(one, source)
            plans.append(_plan(source, None, one))
            check_installed(plans[-1].scheme)
    _check_questions([one.recipe.validation for one in requests.values()], source)
    _tell(find_auxiliary(source.path, source.config, whole.keep_code).notes, whole.notice)
    check_disk(plans, source, whole.recipe)


def _check_questions(sections: Sequence[Validation], source: ModelSource) -> None:
    """Raises RecipeError for tasks that cannot be run, SourceError for answers to messages of a
    model that takes none."""
    from se_compress.text.prompts import frame_of

    for tasks in {one.tasks for one in sections}:
        if tasks and (reason := why_no_task(tasks)):
            raise RecipeError(f"validation.tasks: {reason}")
    if any(one.generation.tokens and one.generation.chat_template for one in sections):
        frame_of(source.path)


def _check_one_model(recipe: Recipe) -> None:
    """Results of several models cannot be compared. Raises RecipeError."""
    for name, variant in recipe.variants.items():
        if variant.model != recipe.model:
            raise RecipeError(
                f"variants.{name}.model: results are compared with one source, so it is the same "
                "for all variants; only --profile takes several models"
            )


def _previews(requests: Mapping[str, Request], whole: Request) -> dict[str, Preview]:
    """A preview of each request, all with what the disk lacks for all of them."""
    source = open_source(whole.recipe.model, whole.keep_code, whole.notice)
    found = {}
    for name, one in requests.items():
        with naming(name):
            _check_request(one, source)
            found[name] = _preview(one, source)
    shortage = disk_shortage([one.plan for one in found.values()], source, whole.recipe)
    return {name: replace(one, shortage=shortage) for name, one in found.items()}


def _preview(request: Request, source: ModelSource) -> Preview:
    profiles = filter(None, map(load_profile, request.profile_files))
    wanted = {*request.recipe.policy.bits} - {SOURCE_BITS}
    fitting = (p for p in profiles if p.source_digest == source.digest and wanted <= p.widths)
    profile = next(fitting, None)
    plan = _plan(source, profile, request)
    recipe = request.recipe
    cautions = (
        *missing_text(recipe), *cautions_before(recipe), *domain_cautions(plan, recipe)
    )  # fmt: skip
    serving = tuple(one.sentence for one in serving_of(plan, request.recipe.output))
    text = request.recipe.calibration
    token_count = text.samples * text.sequence_length
    memory = memory_sentence(source, request.recipe, token_count, request.options.on_disk)
    found = Preview(source, plan, profile, (), "", cautions, serving, "", memory)
    if request.plan_file:
        return found
    task = task_of(source, profile, request.recipe)
    return replace(found, curve=curve_of(task, plan), finest=price_of_granularity(task, plan))


def _check_request(request: Request, source: ModelSource) -> None:
    files = {"--plan": request.plan_file, "the recipe": request.recipe_file}
    check_places(source, request.recipe, files)
    check_positions(source, request.recipe)


# --------------------------------------------------------------------------------------------- plan


def _plan(source: ModelSource, profile: ExpertProfile | None, request: Request) -> CompressionPlan:
    """The plan, made or handed in, with notes on the files that lie beside the weights. Raises
    RecipeError if it leaves nothing of what the recipe wants distilled."""
    plan, name = request.plan, str(request.plan_file)
    if plan is None:
        plan = make_plan(source, profile, request.recipe)
    else:
        plan = check_plan(plan, source, name)
        _check_agrees(plan, source, request.recipe, name)
        plan = plan.noting(cautions_of(plan, source, profile))
    if rule := request.recipe.distill:
        parts_to_distill(draw_blueprint(source, plan), rule)
    return plan.noting(find_auxiliary(source.path, source.config, request.keep_code).notes)


def _check_agrees(plan: CompressionPlan, source: ModelSource, recipe: Recipe, name: str) -> None:
    """Target and scheme of a plan that is handed in are the recipe's. Raises RecipeError."""
    wanted = {"target": recipe.target}
    if plan.target == recipe.target:
        wanted |= asdict(terms_of(recipe, source).scheme)
    planned = {"target": plan.target, **asdict(plan.scheme)}
    for key, value in wanted.items():
        if planned[key] != value:
            raise RecipeError(f"{name}: {key} is {planned[key]}, but the recipe says {value}")


def _plan_in(directory: Path) -> CompressionPlan | None:
    """The plan that a checkpoint of ours was made by. None in any other."""
    file = directory / OURS / "plan.json"
    if not file.exists():
        return None
    return from_json(CompressionPlan, read_text(file, PLAN_BYTES, "a plan"), str(file))


def _tell(sentences: Iterable[str], notice: Notice) -> None:
    for sentence in sentences:
        notice(sentence)
