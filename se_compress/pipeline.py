"""The one file that knows the order of things: recipe in, published or rejected checkpoint out.

Started again, a run goes on after the last finished layer. What may be reused is decided by digests
of everything that went in; a changed setting or source is named, and what depends on it is made
anew. Where it all lies is in running/run_directory.py.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from se_compress.artifacts import (
    OURS,
    CheckpointSummary,
    Comparison,
    CompressionPlan,
    CurvePoint,
    ExpertProfile,
    ModelSource,
    RunOptions,
    ValidationReport,
    digest_of,
    from_json,
    to_json,
    write_atomically,
)
from se_compress.engines.blueprint import draw_blueprint
from se_compress.errors import RecipeError, ResourceError, SeCompressError, SourceError
from se_compress.opening.auxiliary import find_auxiliary
from se_compress.opening.source import open_source
from se_compress.planning.allocate import scheme_of
from se_compress.planning.policy import cautions_of, check_plan, curve_of, make_plan, with_cautions
from se_compress.recipe import Recipe, flatten
from se_compress.recipe_file import PLAN_BYTES, read_text
from se_compress.reporting.comparison import compare, describe_variant, summarize
from se_compress.reporting.licence import licence_of
from se_compress.running.manifest import (
    FILES_FILE,
    SETTINGS_FILE,
    damages,
    is_intact,
    restore,
    write_list,
)
from se_compress.running.places import check_apart, expand, output_of, partial, rejected
from se_compress.running.preflight import (
    check_disk,
    check_memory,
    check_packages,
    check_place,
    check_positions,
    disk_shortage,
)
from se_compress.running.publishing import publish, recover
from se_compress.running.run_directory import (
    STAGED,
    check_output,
    check_output_of_variants,
    check_replaceable,
    load,
    load_settings,
    locked,
    prepare,
    profile_files,
    save,
    save_settings,
)
from se_compress.text.overlap import cautions, cautions_before

if TYPE_CHECKING:
    from se_compress.validation.validator import Original

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk: these have a message of their own
# Files of a result, beside its weights, that only the whole work makes again.
_RECORDS = ("compression", "profile", "plan", "validation")
NOT_CHEAP = (FILES_FILE, SETTINGS_FILE, *(f"{OURS}/{name}.json" for name in _RECORDS))
Notice = Callable[[str], None]
Tokens = Sequence[Sequence[int]]
Originals = dict[object, "Original"]


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    recipe_text   the recipe file, verbatim
    recipe_file   where it lies, if it is a file
    plan_file     a plan to use in place of a fresh one
    fresh         ignore saved progress and an existing result
    notice        called with a sentence when something is reused, redone or given up
    siblings      outputs of the other variants, whose profile may serve this one as well
    keep_code     the result names the model's own code (auto_map), and has its files
    """

    recipe: Recipe
    recipe_text: str
    options: RunOptions = RunOptions()
    plan_file: Path | None = None
    fresh: bool = False
    notice: Notice = lambda sentence: None
    siblings: tuple[Path, ...] = ()
    keep_code: bool = False
    recipe_file: Path | None = None

    @property
    def output(self) -> Path:
        return output_of(self.recipe.output)

    @cached_property
    def plan_text(self) -> str:
        """What is in the plan file, "" without one; read once, for it may be a pipe."""
        if self.plan_file is None:
            return ""
        return read_text(self.plan_file, PLAN_BYTES, "a plan", f"--plan {self.plan_file}")

    @property
    def profile_files(self) -> Iterator[Path]:
        for output in (self.output, *self.siblings):
            yield from profile_files(output)


@dataclass(frozen=True)
class Outcome:
    """Where the checkpoint is, and what was found out. `published` is false if it was rejected."""

    directory: Path
    published: bool
    profile: ExpertProfile
    plan: CompressionPlan
    validation: ValidationReport

    def summary(self, name: str, directory: str) -> CheckpointSummary:
        """In numbers, under a variant's name; `directory` as the reader will see it."""
        found = (self.profile, self.plan, self.validation)
        return summarize(name, directory, self.published, *found)


@dataclass(frozen=True)
class VariantsOutcome:
    """What became of each variant; `directory` holds the comparison."""

    directory: Path
    outcomes: Mapping[str, Outcome]
    comparison: Comparison


@dataclass(frozen=True)
class Preview:
    """What a dry run can tell without reading a weight; `curve` is what other budgets would buy,
    `shortage` what the disk here lacks for the run, `cautions` what is doubtful in the recipe."""

    source: ModelSource
    plan: CompressionPlan
    profile: ExpertProfile | None
    curve: tuple[CurvePoint, ...]
    shortage: str = ""
    cautions: tuple[str, ...] = ()


def preview(request: Request) -> Preview:
    """Everything up to the pre-flight that needs no weights: sizes, budget, loadability."""
    source = open_source(request.recipe.model, request.keep_code)
    found = _preview(request, source)
    return replace(found, shortage=disk_shortage([found.plan], source, request.recipe))


def preview_variants(request: Request) -> dict[str, Preview]:
    """The same for each variant, by name."""
    source = open_source(request.recipe.model, request.keep_code)
    found = {}
    for name, one in _requests(request).items():
        with _naming(name):
            found[name] = _preview(one, source)
    shortage = disk_shortage([one.plan for one in found.values()], source, request.recipe)
    return {name: replace(one, shortage=shortage) for name, one in found.items()}


def _preview(request: Request, source: ModelSource) -> Preview:
    _check_places(request, source)
    check_positions(source, request.recipe)
    profiles = filter(None, map(_load_profile, request.profile_files))
    profile = next((p for p in profiles if p.source_digest == source.digest), None)
    plan = _plan(source, profile, request)
    curve = () if request.plan_file else curve_of(source, profile, request.recipe, plan)
    return Preview(source, plan, profile, curve, cautions=cautions_before(request.recipe))


def run(request: Request) -> Outcome:
    """The whole flow. Raises SeCompressError; a rejected checkpoint is an Outcome, not an error."""
    source = open_source(request.recipe.model, request.keep_code)
    _check_places(request, source)
    check_positions(source, request.recipe)
    # What can be refused without a profile is refused now, before the hours.
    plan = _plan(source, None, request)
    _tell_of_files(source, request)
    check_packages([plan])
    check_disk([plan], source, request.recipe)
    with _told(source, request.output):
        return _run(request, source, {})


def judge_existing(request: Request, directory: Path, output: Path) -> ValidationReport:
    """Judge a checkpoint that exists against the recipe's model and gates; nothing is compressed.

    One of ours is judged by the plan in it, any other as `validator.validate` does without a plan.
    `output` gets validation.json, and of one of ours the report.
    """
    from se_compress.reporting.report import render_report
    from se_compress.text.calibrate import draw_tokens
    from se_compress.validation.validator import validate

    if not os.path.isdir(directory):
        raise SourceError(f"--validate {directory}: there is no such directory")
    check_place(output)
    source = open_source(request.recipe.model, request.keep_code)
    check_positions(source, request.recipe)
    plan_file, profile_file = (directory / OURS / f"{name}.json" for name in ("plan", "profile"))
    plan = None
    if plan_file.exists():
        text = read_text(plan_file, PLAN_BYTES, "a plan")
        plan = check_plan(from_json(CompressionPlan, text, str(plan_file)), source, str(plan_file))
    for caution in cautions_before(request.recipe):
        request.notice(caution)
    held_out = draw_tokens(request.recipe.validation, source)
    report = validate(source, plan, directory, held_out, request.recipe, request.options)
    write_atomically(output / "validation.json", to_json(report))
    profile = load(ExpertProfile, profile_file)
    if plan is not None and profile is not None:
        html = render_report(request.recipe, profile, plan, report)
        write_atomically(output / "report.html", html)
    else:
        request.notice(f"{directory} has no plan and profile of ours: it gets no report.html")
    return report


def run_variants(request: Request) -> VariantsOutcome:
    """The whole flow for each variant of the recipe, and the comparison of their results.

    One profile serves all variants that would measure the same. A rejected variant does not stop
    the others; what an error leaves behind is taken up by the next run.
    """
    source = open_source(request.recipe.model, request.keep_code)
    check_output_of_variants(request.output)
    requests = _requests(request)
    plans = []
    for name, one in requests.items():
        with _naming(name):
            _check_places(one, source)
            check_positions(source, one.recipe)
            plans.append(_plan(source, None, one))
    _tell_of_files(source, request)
    check_packages(plans)
    check_disk(plans, source, request.recipe)
    outcomes: dict[str, Outcome] = {}
    originals: Originals = {}
    for name, one in requests.items():
        with _naming(name), _told(source, one.output):
            outcomes[name] = _run(one, source, originals)
    comparison = _compare(request, outcomes)
    _write_comparison(request.output, comparison)
    return VariantsOutcome(request.output, outcomes, comparison)


def _requests(request: Request) -> dict[str, Request]:
    """A request for each variant, whose messages and progress bear its name."""
    if request.plan_file is not None:
        raise RecipeError(
            f"--plan {request.plan_file}: one plan cannot serve {len(request.recipe.variants)} "
            "variants; give it to a recipe without variants"
        )
    return {name: _request(request, name) for name in request.recipe.variants}


def _request(request: Request, name: str) -> Request:
    variants, options = request.recipe.variants, request.options
    return replace(
        request,
        recipe=variants[name],
        options=replace(
            options, progress=lambda stage, *steps: options.progress(f"{name}: {stage}", *steps)
        ),
        notice=lambda sentence: request.notice(f"{name}: {sentence}"),
        siblings=tuple(output_of(other.output) for key, other in variants.items() if key != name),
    )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors say which variant they come from."""
    try:
        yield
    except SeCompressError as error:
        raise type(error)(f"variant {name}: {error}") from None


@contextmanager
def _told(source: ModelSource, output: Path) -> Iterator[None]:
    """What the file system refuses in the middle of the work is one line, and whose fault it is."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL or not isinstance(error.filename, str | Path):
            raise
        file = Path(error.filename).absolute()
        if file.is_relative_to(source.path.absolute()):
            problem = f"{file}: cannot be read any more ({error.strerror}); the model has changed"
            raise SourceError(problem) from None
        places = (output, partial(output), rejected(output))
        if any(file.is_relative_to(place.absolute()) for place in places):
            raise ResourceError(f"output {file}: {error.strerror}; progress is kept") from None
        raise


def _run(request: Request, source: ModelSource, originals: Originals) -> Outcome:
    """`originals` is filled with the source's side of the validation, for the variants to share."""
    from se_compress.text.calibrate import draw_tokens

    recipe, output = request.recipe, request.output
    calibration = draw_tokens(recipe.calibration, source)
    held_out = draw_tokens(recipe.validation, source)
    settings = _settings(request, source, calibration, held_out)
    if partial(output).exists():
        with locked(output, request.notice):
            recover(output, request.notice)
    if not request.fresh and (finished := _finished(request, source, settings)):
        return _tried_again(request, source, held_out, finished)
    told = cautions(calibration, held_out)
    for caution in told:
        request.notice(caution)
    beside = [file.name for file in source.path.iterdir()]
    check_replaceable(output, beside)
    check_memory(source, recipe, len(calibration) * len(calibration[0]))
    with locked(output, request.notice) as work:
        prepare(output, settings, request.fresh, request.notice)
        profile = _profile(source, calibration, work, request)
        plan = _noting(_with_caution(_plan(source, profile, request), source), told)
        for caution in cautions_of(plan, source, profile):
            request.notice(caution)
        write_atomically(work / "plan.json", to_json(plan))
        check_disk([plan], source, recipe)
        staged = work / "checkpoint"
        _compress(source, plan, calibration, staged, request)
        validation = _validate(source, plan, staged, held_out, request, originals)
        _write_reports(source, staged, profile, plan, validation, request)
        save_settings(staged / SETTINGS_FILE, settings)
        write_list(staged, request.options.progress)
        check_replaceable(output, beside)  # again: hours have passed
        directory = output if validation.passed else rejected(output)
        publish(staged, directory, work)
    return Outcome(directory, validation.passed, profile, plan, validation)


def _tell_of_files(source: ModelSource, request: Request) -> None:
    for note in find_auxiliary(source.path, source.config, request.keep_code).notes:
        request.notice(note)


def _tried_again(
    request: Request,
    source: ModelSource,
    held_out: Tokens,
    finished: Outcome,
) -> Outcome:
    """A finished result; what kept a check from being run at the time may be gone by now. A result
    that fails then is taken back."""
    if finished.validation.is_final or not finished.published:
        return finished
    from se_compress.validation.validator import try_again

    directory, profile, plan = finished.directory, finished.profile, finished.plan
    request.notice(f"{directory}: trying again what could not be run: reload")
    validation = try_again(
        source, plan, directory, held_out, request.recipe, request.options, finished.validation
    )
    if validation == finished.validation:
        return finished
    _write_reports(source, directory, profile, plan, validation, request)
    write_list(directory, request.options.progress)
    if not validation.passed:
        with locked(request.output, request.notice) as work:
            staged = directory.rename(work / STAGED)
            publish(staged, rejected(request.output), work)
        directory = rejected(request.output)
    return Outcome(directory, validation.passed, profile, plan, validation)


# ------------------------------------------------------------------------------------------- stages


def _profile(source: ModelSource, tokens: Tokens, work: Path, request: Request) -> ExpertProfile:
    from se_compress.profiling.profiler import STATES_FILE, profile_digest, profile_experts

    wanted = profile_digest(source, tokens, request.recipe)
    for file in request.profile_files:
        profile = None if request.fresh else _load_profile(file)
        if profile is None and file.exists() and not request.fresh:
            request.notice(f"{file} is damaged, or of another version: not used")
        if profile is not None and profile.digest == wanted:
            request.notice(f"profile reused from {file}")
            break
    else:
        options = replace(request.options, work=work, notice=request.notice)
        profile = profile_experts(source, tokens, request.recipe, options)
    save(profile, work / "profile.json")
    (work / STATES_FILE).unlink(missing_ok=True)
    return profile


def _load_profile(file: Path) -> ExpertProfile | None:
    """None if there is none, or if it is not what was written."""
    listed = file.parent.name == OURS
    whole = not listed or is_intact(file.parent.parent, f"{OURS}/{file.name}")
    return load(ExpertProfile, file) if whole else None


def _plan(source: ModelSource, profile: ExpertProfile | None, request: Request) -> CompressionPlan:
    notes = find_auxiliary(source.path, source.config, request.keep_code).notes
    plan = _plan_of_experts(source, profile, request)
    return replace(plan, notes=tuple(dict.fromkeys((*plan.notes, *notes))))


def _plan_of_experts(
    source: ModelSource, profile: ExpertProfile | None, request: Request
) -> CompressionPlan:
    if request.plan_file is None:
        return make_plan(source, profile, request.recipe)
    plan = from_json(CompressionPlan, request.plan_text, str(request.plan_file))
    plan = check_plan(plan, source, str(request.plan_file))
    wanted = {"target": request.recipe.target}
    if plan.target == request.recipe.target:
        wanted |= asdict(scheme_of(request.recipe))
    planned = {"target": plan.target, **asdict(plan.scheme)}
    for key, value in wanted.items():
        if planned[key] != value:
            raise RecipeError(
                f"{request.plan_file}: {key} is {planned[key]}, but the recipe says {value}"
            )
    return with_cautions(plan, source, profile)


def _noting(plan: CompressionPlan, notes: Sequence[str]) -> CompressionPlan:
    """With further notes; a plan that was handed back may have them already."""
    return replace(plan, notes=tuple(dict.fromkeys((*plan.notes, *notes))))


def _with_caution(plan: CompressionPlan, source: ModelSource) -> CompressionPlan:
    """Told of a generation_config.json by the one who reads it; not needed to plan."""
    from se_compress.engines.generation import why_not_saved

    reason = why_not_saved(source.path)
    return replace(plan, notes=(*plan.notes, reason)) if reason else plan


def _compress(
    source: ModelSource,
    plan: CompressionPlan,
    tokens: Tokens,
    staged: Path,
    request: Request,
) -> None:
    from se_compress.compression.execute import compress

    options = replace(
        request.options,
        work=staged.parent,
        keep_code=request.keep_code,
        notice=request.notice,
    )
    compress(source, plan, tokens, request.recipe, staged, options)


def _validate(
    source: ModelSource,
    plan: CompressionPlan,
    staged: Path,
    tokens: Tokens,
    request: Request,
    originals: Originals,
) -> ValidationReport:
    from se_compress.validation.validator import Original, validate

    recipe, options = request.recipe, request.options
    alike = (recipe.compute_dtype, recipe.validation.generation)
    if alike not in originals:
        originals[alike] = Original(source, tokens, recipe, options)
    return validate(source, plan, staged, tokens, recipe, options, original=originals[alike])


def _write_reports(
    source: ModelSource,
    staged: Path,
    profile: ExpertProfile,
    plan: CompressionPlan,
    validation: ValidationReport,
    request: Request,
) -> None:
    from se_compress.reporting.report import render_model_card, render_report

    files = {
        f"{OURS}/recipe.yaml": request.recipe_text,
        f"{OURS}/profile.json": to_json(profile),
        f"{OURS}/plan.json": to_json(plan),
        f"{OURS}/validation.json": to_json(validation),
        f"{OURS}/report.html": render_report(request.recipe, profile, plan, validation),
        "README.md": render_model_card(
            request.recipe, licence_of(source.path), profile, plan, validation
        ),
    }
    for name, text in files.items():
        write_atomically(staged / name, text)


def _compare(request: Request, outcomes: Mapping[str, Outcome]) -> Comparison:
    variants = [
        describe_variant(
            outcome.summary(name, outcome.directory.name),
            request.recipe,
            request.recipe.variants[name],
            outcome.plan,
            outcome.validation,
        )
        for name, outcome in outcomes.items()
    ]
    profile = next(iter(outcomes.values())).profile
    tokens = max(outcome.validation.tokens for outcome in outcomes.values())
    return compare(request.recipe, profile, tokens, variants)


def _write_comparison(output: Path, comparison: Comparison) -> None:
    from se_compress.reporting.comparison_page import render_comparison

    write_atomically(output / "comparison.json", to_json(comparison))
    write_atomically(output / "comparison.html", render_comparison(comparison))


# ------------------------------------------------------------------------------------------- resume


def _settings(
    request: Request, source: ModelSource, calibration: Tokens, held_out: Tokens
) -> dict[str, object]:
    """Everything that decides the result, by name, so that a change can be named."""
    settings = {k: v for k, v in flatten(request.recipe).items() if k not in ("output", "model")}
    return settings | {
        "the version of se-compress": version("se-compress"),
        "the model's files": source.digest,
        "the calibration text": digest_of(calibration),
        "the validation text": digest_of(held_out),
        "the plan file": digest_of(request.plan_text),
        "--keep-remote-code": request.keep_code,
    }


def _finished(
    request: Request, source: ModelSource, settings: Mapping[str, object]
) -> Outcome | None:
    """A result that was made from exactly these settings, and is whole: one that passed under its
    name, one that did not under that of rejected ones."""
    for directory in (request.output, rejected(request.output)):
        if load_settings(directory / SETTINGS_FILE) != settings:
            continue
        found = _read_outcome(directory, directory == request.output, source, request)
        if isinstance(found, Outcome):
            passed = found.validation.passed
            request.notice(
                f"{directory} is up to date: nothing in the recipe, the model or the data changed"
                + ("" if passed else " (--fresh makes it again)")
            )
            return found
        request.notice(f"{directory}: {found}: made again")
    return None


def _read_outcome(
    directory: Path, passed: bool, source: ModelSource, request: Request
) -> Outcome | str:
    """A result as it lies there, or what is wrong with it and cannot be mended at once."""
    ours = directory / OURS
    damaged = damages(directory, request.options.progress)
    problems = list(damaged.values())
    problem = "".join(problems[:1]) + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
    if any(name in NOT_CHEAP or name.endswith(".safetensors") for name in damaged):
        return problem
    profile = load(ExpertProfile, ours / "profile.json")
    plan = load(CompressionPlan, ours / "plan.json")
    validation = load(ValidationReport, ours / "validation.json")
    if profile is None or plan is None or validation is None:
        return "its reports cannot be read"
    if validation.passed != passed:
        return "holds a result that " + ("did not pass" if passed else "passed")
    found = Outcome(directory, passed, profile, plan, validation)
    if damaged and not _restore(found, damaged, source, request):
        return problem
    if damaged:
        request.notice(f"{directory}: {problem}: made again")
    return found


def _restore(
    found: Outcome, damaged: Mapping[str, str], source: ModelSource, request: Request
) -> bool:
    """Make again what costs nothing: config, copies of the source's files, reports. False if they
    do not come out as they were."""
    from se_compress.engines.export import export_config

    blueprint = draw_blueprint(source, found.plan)
    with TemporaryDirectory() as scratch:
        export_config(blueprint, Path(scratch), request.keep_code)
        _write_reports(source, Path(scratch), found.profile, found.plan, found.validation, request)
        return restore(found.directory, damaged.keys(), Path(scratch))


def _check_places(request: Request, source: ModelSource) -> None:
    """The output can be written, and nothing that is read lies where it is replaced."""
    recipe, output = request.recipe, request.output
    files = {"--plan": request.plan_file, "the recipe": request.recipe_file}
    texts = {"calibration": recipe.calibration, "validation": recipe.validation}
    for word, text in texts.items():
        for number, one in enumerate(text.data):
            files[f"{word}.data {number + 1}"] = Path(expand(one.data))
    check_apart(
        (output, partial(output), rejected(output)),
        source.path,
        {info.file for info in source.tensors.values()},
        {word: file for word, file in files.items() if file is not None},
    )
    check_output(output)
