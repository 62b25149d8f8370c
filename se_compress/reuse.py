"""What of earlier runs serves this one: a finished result, or the profile in one.

A result is taken as it is if it was made from exactly these settings and is whole. Files that cost
nothing are made again in their places. A check that could not be run at the time is tried again.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from se_compress.artifacts import (
    OURS,
    CompressionPlan,
    ExpertProfile,
    ModelSource,
    ValidationReport,
    digest_of,
)
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.tasks import digest_of_files
from se_compress.recipe import flatten
from se_compress.reporting.files import write_reports
from se_compress.request import Outcome, Request
from se_compress.running.manifest import (
    FILES_FILE,
    SETTINGS_FILE,
    damages,
    is_intact,
    restore,
    write_list,
)
from se_compress.running.places import rejected
from se_compress.running.publishing import publish
from se_compress.running.records import RunSettings, load, load_settings
from se_compress.running.run_directory import STAGED, VERSION_KEY, locked

# Files of a result, beside its weights, that only the whole work makes again.
_RECORDS = ("compression", "profile", "plan", "validation")
NOT_CHEAP = (FILES_FILE, SETTINGS_FILE, *(f"{OURS}/{name}.json" for name in _RECORDS))
Tokens = Sequence[Sequence[int]]


def settings_of(
    request: Request,
    source_digest: str,
    calibration: Tokens,
    held_out: Tokens | Mapping[str, Tokens],
) -> RunSettings:
    """Everything that decides the result of a run."""
    recipe = {k: v for k, v in flatten(request.recipe).items() if k not in ("output", "model")}
    unspoken = {
        VERSION_KEY: version("se-compress"),
        "the model's files": source_digest,
        "the calibration text": digest_of(calibration),
        "the validation text": digest_of(held_out),
        "the plan file": digest_of(request.plan_text),
    }
    if (tasks := request.recipe.validation.tasks) and tasks.include:
        unspoken["the files of the tasks"] = digest_of_files(tasks.include)
    by_name = {**recipe, **unspoken, "--keep-remote-code": request.keep_code}
    return RunSettings(by_name, frozenset(unspoken))


# ------------------------------------------------------------------------------------------ profile


def find_profile(wanted: str, request: Request) -> ExpertProfile | None:
    """A saved profile with the digest `wanted`. None if it has to be measured."""
    for file in () if request.fresh else request.profile_files:
        profile = load_profile(file)
        if profile is None and file.exists():
            request.notice(f"{file} is damaged, or of another version: not used")
        if profile is not None and profile.digest == wanted:
            request.notice(f"profile reused from {file}")
            return profile
    return None


def load_profile(file: Path) -> ExpertProfile | None:
    """None if there is none, or if it is not what was written."""
    listed = file.parent.name == OURS
    whole = not listed or is_intact(file.parent.parent, f"{OURS}/{file.name}")
    return load(ExpertProfile, file) if whole else None


# ------------------------------------------------------------------------------------------- result


def find_finished(request: Request, source: ModelSource, settings: RunSettings) -> Outcome | None:
    """A whole result of exactly these settings.

    One that passed lies under its name, one that did not under that of rejected ones.
    """
    for directory in (request.output, rejected(request.output)):
        if load_settings(directory / SETTINGS_FILE) != settings.by_name:
            continue
        damaged = damages(directory, request.options.progress)
        found = _read_outcome(directory, damaged, request)
        if isinstance(found, Outcome) and damaged:
            found = _mended(found, damaged, source, request)
        if isinstance(found, Outcome):
            _tell_up_to_date(found, request)
            return found
        request.notice(f"{directory}: {found}: made again")
    return None


def _tell_up_to_date(found: Outcome, request: Request) -> None:
    request.notice(
        f"{found.directory} is up to date: nothing in the recipe, the model or the data changed"
        + ("" if found.published else " (--fresh makes it again)")
    )


def _read_outcome(directory: Path, damaged: Mapping[str, str], request: Request) -> Outcome | str:
    """A result as it lies there, or what is wrong with it that only the whole work mends."""
    if any(name in NOT_CHEAP or name.endswith(".safetensors") for name in damaged):
        return _problem(damaged)
    ours = directory / OURS
    profile = load(ExpertProfile, ours / "profile.json")
    plan = load(CompressionPlan, ours / "plan.json")
    validation = load(ValidationReport, ours / "validation.json")
    if profile is None or plan is None or validation is None:
        return "its reports cannot be read"
    if request.place_of(validation) != directory:
        return "holds a result that " + ("passed" if validation.passed else "did not pass")
    return Outcome(directory, profile, plan, validation)


def _problem(damaged: Mapping[str, str]) -> str:
    """The first of the damages, and how many more there are."""
    first, *more = damaged.values()
    return first + (f" (and {len(more)} more)" if more else "")


def _mended(
    found: Outcome, damaged: Mapping[str, str], source: ModelSource, request: Request
) -> Outcome | str:
    """The result with its config, copies of the source's files and reports made again.

    The problem instead if they do not come out as they were.
    """
    from se_compress.engines.export import checked_settings, export_config

    blueprint = draw_blueprint(source, found.plan)
    with TemporaryDirectory() as scratch:
        copies = Path(scratch)
        export_config(blueprint, checked_settings(blueprint), copies, request.keep_code)
        write_reports(copies, found, request, source.path)
        if not restore(found.directory, damaged.keys(), copies):
            return _problem(damaged)
    request.notice(f"{found.directory}: {_problem(damaged)}: made again")
    return found


def try_again(
    finished: Outcome,
    source: ModelSource,
    held_out: Tokens | Mapping[str, Tokens],
    request: Request,
) -> Outcome:
    """The finished result, with the check repeated that could not be run at the time.

    What kept it from being run may be gone by now. A result that fails then is taken back.
    """
    if finished.validation.is_final or not finished.published:
        return finished
    from se_compress.validation import validator

    directory, plan = finished.directory, finished.plan
    request.notice(f"{directory}: trying again what could not be run: reload")
    validation = validator.try_again(
        source, plan, directory, held_out, request.recipe, request.options, finished.validation
    )
    if validation == finished.validation:
        return finished
    again = Outcome(request.place_of(validation), finished.profile, plan, validation)
    write_reports(directory, again, request, source.path)
    write_list(directory, request.options.progress)
    if not again.published:
        with locked(request.output, request.notice) as work:
            publish(directory.rename(work / STAGED), again.directory, work)
    return again
