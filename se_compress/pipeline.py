"""The one file that knows the order of things: recipe in, published or rejected checkpoint out.

    OUTPUT.partial/    progress: run.json, profile.json, plan.json, saved states, and checkpoint/
    OUTPUT/            only ever a checkpoint that passed its gates; renamed into place in one step
    OUTPUT.rejected/   one that did not, with its report

Started again, a run goes on after the last finished layer. What may be reused is decided by digests
of everything that went in; a changed setting or source is named, and what depends on it is made
anew.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from se_compress.artifacts import (
    Artifact,
    CompressionPlan,
    ExpertProfile,
    LayerRecord,
    ModelSource,
    RunOptions,
    TensorInfo,
    ValidationReport,
    digest_of,
    from_json,
    to_json,
    write_atomically,
)
from se_compress.errors import RecipeError, ResourceError, SeCompressError
from se_compress.headers import lay_out
from se_compress.policy import check_plan, make_plan, scheme_of
from se_compress.recipe import Recipe, flatten
from se_compress.source import open_source
from se_compress.targets import result_slots

OURS = "se_compress"
MAX_SHARD_BYTES = 5 * 10**9

Notice = Callable[[str], None]
Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    recipe_text   the recipe file, verbatim
    plan_file     a plan to use in place of a fresh one
    fresh         ignore saved progress and an existing result
    notice        called with a sentence when something is reused, redone or given up
    """

    recipe: Recipe
    recipe_text: str
    options: RunOptions = RunOptions()
    plan_file: Path | None = None
    fresh: bool = False
    notice: Notice = lambda sentence: None


@dataclass(frozen=True)
class Outcome:
    """Where the checkpoint is, and what was found out. `published` is false if it was rejected."""

    directory: Path
    published: bool
    profile: ExpertProfile
    plan: CompressionPlan
    validation: ValidationReport


@dataclass(frozen=True)
class Preview:
    """What a dry run can tell without reading a weight."""

    source: ModelSource
    plan: CompressionPlan
    profile: ExpertProfile | None


def preview(request: Request) -> Preview:
    """Everything up to the pre-flight that needs no weights: sizes, budget, loadability."""
    source = open_source(request.recipe.model)
    output = Path(request.recipe.output)
    _check_output(output)
    profiles = filter(None, (_load(ExpertProfile, file) for file in _profile_files(output)))
    profile = next((p for p in profiles if p.source_digest == source.digest), None)
    plan = _plan(source, profile, request)
    _check_disk(plan, source, request.recipe)
    return Preview(source, plan, profile)


def run(request: Request) -> Outcome:
    """The whole flow. Raises SeCompressError; a rejected checkpoint is an Outcome, not an error."""
    from se_compress.calibrate import draw_sequences

    recipe, output = request.recipe, Path(request.recipe.output)
    source = open_source(recipe.model)
    _check_output(output)
    # What can be refused without a profile is refused now, before the hours.
    _check_disk(_plan(source, None, request), source, recipe)
    calibration = draw_sequences(recipe.calibration, source.path, "calibration")
    held_out = draw_sequences(recipe.validation, source.path, "validation")
    settings = _settings(request, source, calibration, held_out)
    if not request.fresh and (finished := _finished(output, settings)):
        request.notice(
            f"{output} is up to date: nothing in the recipe, the model or the data changed"
        )
        return finished
    _check_memory(source, recipe, len(calibration) * len(calibration[0]))
    with _locked(_partial(output)) as work:
        _prepare(work, settings, request)
        profile = _profile(source, calibration, work, output, request)
        plan = _plan(source, profile, request)
        write_atomically(work / "plan.json", to_json(plan))
        _check_disk(plan, source, recipe)
        staged = work / "checkpoint"
        layout = lay_out(result_slots(source, plan), staged, MAX_SHARD_BYTES)
        records = _compress(source, plan, calibration, layout, work, request)
        validation = _validate(source, plan, staged, held_out, records, request)
        _write_reports(source, staged, profile, plan, validation, request)
        write_atomically(staged / OURS / "run.json", _pretty(settings))
        published = validation.passed
        directory = output if published else _rejected(output)
        _publish(staged, directory, work)
        shutil.rmtree(work, ignore_errors=True)
    return Outcome(directory, published, profile, plan, validation)


# ------------------------------------------------------------------------------------------- stages


def _profile(
    source: ModelSource, tokens: Tokens, work: Path, output: Path, request: Request
) -> ExpertProfile:
    from se_compress.profiler import STATES_FILE, profile_digest, profile_experts

    wanted = profile_digest(source, tokens, request.recipe)
    for file in _profile_files(output):
        profile = None if request.fresh else _load(ExpertProfile, file)
        if profile is not None and profile.digest == wanted:
            request.notice(f"profile reused from {file}")
            break
    else:
        profile = profile_experts(source, tokens, request.recipe, _with_work(request, work))
    write_atomically(work / "profile.json", to_json(profile))
    (work / STATES_FILE).unlink(missing_ok=True)
    return profile


def _plan(source: ModelSource, profile: ExpertProfile | None, request: Request) -> CompressionPlan:
    if request.plan_file is None:
        return make_plan(source, profile, request.recipe)
    try:
        text = request.plan_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"--plan {request.plan_file}: cannot be read ({reason})") from None
    plan = from_json(CompressionPlan, text, str(request.plan_file))
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
    return plan


def _compress(
    source: ModelSource,
    plan: CompressionPlan,
    tokens: Tokens,
    layout: dict[str, TensorInfo],
    work: Path,
    request: Request,
) -> tuple[LayerRecord, ...]:
    from se_compress.checkpoint import allocate
    from se_compress.execute import compress
    from se_compress.export import export_config

    (work / "checkpoint").mkdir(exist_ok=True)
    allocate(layout)
    options = _with_work(request, work)
    records = compress(source, plan, tokens, request.recipe, layout, options)
    export_config(source, plan, work / "checkpoint")
    return records


def _validate(
    source: ModelSource,
    plan: CompressionPlan,
    staged: Path,
    tokens: Tokens,
    records: Sequence[LayerRecord],
    request: Request,
) -> ValidationReport:
    from se_compress.validator import validate

    return validate(source, plan, staged, tokens, records, request.recipe, request.options)


def _write_reports(
    source: ModelSource,
    staged: Path,
    profile: ExpertProfile,
    plan: CompressionPlan,
    validation: ValidationReport,
    request: Request,
) -> None:
    from se_compress.report import render_model_card, render_report

    files = {
        f"{OURS}/recipe.yaml": request.recipe_text,
        f"{OURS}/profile.json": to_json(profile),
        f"{OURS}/plan.json": to_json(plan),
        f"{OURS}/validation.json": to_json(validation),
        f"{OURS}/report.html": render_report(request.recipe, profile, plan, validation),
        "README.md": render_model_card(request.recipe, _licence(source), profile, plan, validation),
    }
    for name, text in files.items():
        write_atomically(staged / name, text)


def _licence(source: ModelSource) -> str | None:
    """`license:` of the source's model card, if it has one."""
    import yaml

    card = source.path / "README.md"
    if not card.exists():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return str(licence) if licence else None


# ------------------------------------------------------------------------------------------- resume


def _settings(
    request: Request, source: ModelSource, calibration: Tokens, held_out: Tokens
) -> dict[str, object]:
    """Everything that decides the result, by name, so that a change can be named."""
    settings = {k: v for k, v in flatten(request.recipe).items() if k not in ("output", "model")}
    plan = request.plan_file.read_text(encoding="utf-8") if request.plan_file else ""
    return settings | {
        "the version of se-compress": version("se-compress"),
        "the model's files": source.digest,
        "the calibration text": digest_of(calibration),
        "the validation text": digest_of(held_out),
        "the plan file": digest_of(plan),
    }


def _finished(output: Path, settings: dict[str, object]) -> Outcome | None:
    """The published result, if it was made from exactly these settings and is whole."""
    ours = output / OURS
    if _load_settings(ours / "run.json") != settings:
        return None
    profile = _load(ExpertProfile, ours / "profile.json")
    plan = _load(CompressionPlan, ours / "plan.json")
    validation = _load(ValidationReport, ours / "validation.json")
    if profile is None or plan is None or validation is None:
        return None
    return Outcome(output, True, profile, plan, validation)


def _prepare(work: Path, settings: dict[str, object], request: Request) -> None:
    """Keep the saved progress if it was made from these settings, otherwise drop it (the finished
    profile has a digest of its own and may survive); name what changed since the last run."""
    output = Path(request.recipe.output)
    saved = _load_settings(work / "run.json")
    last = saved or _load_settings(output / OURS / "run.json")
    last = last or _load_settings(_rejected(output) / OURS / "run.json") or settings
    for key in settings:
        if last.get(key) != settings[key]:
            change = f": {last.get(key)} -> {settings[key]}" if "the " not in key else ""
            request.notice(f"{key} changed{change}")
    if saved != settings or request.fresh:
        for entry in work.iterdir():
            if entry.name == "profile.json" and not request.fresh:
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
    elif any(work.glob("*-states.safetensors")):
        request.notice(f"continuing from {work}")
    write_atomically(work / "run.json", _pretty(settings))


def _load_settings(file: Path) -> dict[str, object] | None:
    try:
        settings: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings


def _load(kind: type[Artifact], file: Path) -> Artifact | None:
    """A saved artefact; None if there is none or if an older version of the tool wrote it."""
    try:
        return from_json(kind, file.read_text(encoding="utf-8"), str(file))
    except (OSError, SeCompressError):
        return None


def _with_work(request: Request, work: Path) -> RunOptions:
    from dataclasses import replace

    return replace(request.options, work=work)


def _pretty(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------- directories


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _rejected(output: Path) -> Path:
    return output.with_name(output.name + ".rejected")


def _profile_files(output: Path) -> list[Path]:
    """Where a profile may be, the latest first."""
    finished = [directory / OURS / "profile.json" for directory in (output, _rejected(output))]
    return [_partial(output) / "profile.json", *finished]


def _check_output(output: Path) -> None:
    """An output that exists must be one of ours: nothing else is ever overwritten."""
    marks = {output: f"{OURS}/run.json", _rejected(output): f"{OURS}/run.json"}
    marks |= {_partial(output): "lock"}
    for directory, mark in marks.items():
        if not directory.exists():
            continue
        if not directory.is_dir():
            raise RecipeError(f"output {directory} exists and is not a directory")
        if any(directory.iterdir()) and not (directory / mark).exists():
            raise RecipeError(
                f"output {directory} exists and was not made by se-compress; "
                "choose another name or move it away"
            )


@contextmanager
def _locked(work: Path) -> Iterator[Path]:
    """The work directory, held by this process alone."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise RecipeError(f"output {work}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"output {work}: another se-compress is working on it") from None
        yield work


def _publish(staged: Path, directory: Path, work: Path) -> None:
    """Rename a finished checkpoint into place; what was there (ours) is dropped with `work`."""
    if directory.exists():
        shutil.rmtree(work / "replaced", ignore_errors=True)
        directory.rename(work / "replaced")
    staged.rename(directory)


# -------------------------------------------------------------------------------------- pre-flight


def _check_disk(plan: CompressionPlan, source: ModelSource, recipe: Recipe) -> None:
    output = Path(recipe.output)
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    tokens = recipe.calibration.samples * recipe.calibration.sequence_length
    # Two streams of hidden states, the last ones and those that are being written.
    states = 4 * tokens * int(source.config["hidden_size"]) * _item_bytes(recipe)
    there = sum(f.stat().st_size for f in _partial(output).glob("**/*.safetensors"))
    free = shutil.disk_usage(parent).free + there
    if plan.size_bytes + states > free:
        raise ResourceError(
            f"{parent}: the result takes {plan.size_bytes / 1e6:.1f} MB and saved progress "
            f"{states / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free"
        )


def _item_bytes(recipe: Recipe) -> int:
    return 4 if recipe.compute_dtype == "float32" else 2


def _check_memory(source: ModelSource, recipe: Recipe, tokens: int) -> None:
    import psutil

    item_bytes = _item_bytes(recipe)
    weights: dict[int | None, int] = {}
    for info in source.tensors.values():
        count = 1
        for extent in info.shape:
            count *= extent
        weights[info.layer] = weights.get(info.layer, 0) + count
    layer = max(count for index, count in weights.items() if index is not None) * item_bytes
    # Both streams before and after a layer, and the kept input of its experts.
    hidden = 6 * tokens * int(source.config["hidden_size"]) * item_bytes
    needed = layer + hidden
    available = psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"the largest layer takes {layer / 1e9:.1f} GB and the hidden states of {tokens} "
            f"calibration tokens {hidden / 1e9:.1f} GB, but {available / 1e9:.1f} GB of memory are "
            "available; lower calibration.samples or set compute_dtype: bfloat16"
        )
