"""MLflow: what a run was asked for, what it measured and what came of it, of failed runs too.

A run of the command is a run of MLflow, made before the work; with variants each has one of its own
below it. Weights are not logged. Needs the extra `mlflow`, which is imported here alone.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from se_compress import signals
from se_compress.artifacts import OURS, ExpertProfile
from se_compress.errors import RecipeError, ResourceError, shorten
from se_compress.recipe import Recipe, flatten, resolved
from se_compress.request import Notice, Outcome, Profiled, VariantsOutcome

Report = Callable[[Outcome | VariantsOutcome | Profiled], None]

EXPERIMENT = "se-compress"
REPORTS = (
    "report.html", "validation.json", "plan.json", "profile.json", "recipe.yaml",
    "recipe-resolved.yaml", "run.json",
)  # fmt: skip
PARAMS_AT_ONCE, PARAM_LENGTH = 100, 6000  # what MLflow takes
MESSAGE_LENGTH = 5000
# Unless the user says otherwise: a server that is not there is told of within seconds.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


@contextmanager
def tracked(uri: str | None, recipe: Recipe, notice: Notice) -> Iterator[Report]:
    """A run of MLflow around the work; without a URI there is none. What is yielded takes the
    outcome; a failure to log it is told to `notice` and undoes nothing."""
    if uri is None:
        yield lambda outcome: None
        return
    tracker = begin(uri, recipe)
    try:
        yield lambda outcome: _surely(lambda: end(tracker, outcome), notice)
    except BaseException as error:
        killed = not isinstance(error, Exception) or signals.stopped.is_set()
        code, message = getattr(error, "exit_code", 1), str(error) or type(error).__name__
        _surely(lambda: fail(tracker, message, code, killed), notice)
        raise


def _surely(log: Callable[[], None], notice: Notice) -> None:
    from mlflow.exceptions import MlflowException

    try:
        log()
    except (MlflowException, OSError) as error:
        notice(f"MLflow: not all was logged ({shorten(' '.join(str(error).split()), 200)})")


@dataclass(frozen=True)
class Tracker:
    """A run of MLflow that is going on.

    client      mlflow.MlflowClient
    experiment  its id
    run         the run's id
    """

    client: Any
    experiment: str
    run: str


def begin(uri: str, recipe: Recipe) -> Tracker:
    """Begin a run with the recipe's settings as parameters.

    Raises RecipeError without the extra and for a URI that MLflow does not take, ResourceError if
    the server cannot be reached.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise RecipeError("--mlflow needs the extra: pip install 'se-compress[mlflow]'") from None
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=uri)
        tracker = begin_in(client, experiment_id(client), Path(recipe.output).name)
        _log_params(tracker, flatten(recipe))
        client.log_text(tracker.run, resolved(recipe), f"{OURS}/recipe-resolved.yaml")
    except (MlflowException, OSError) as error:
        raise _unusable(uri, error) from None
    return tracker


def _unusable(uri: str, error: Exception) -> RecipeError | ResourceError:
    """What is wrong with a URI, or with what it leads to."""
    reason = shorten(" ".join(str(error).split()), 200)
    if schemes := getattr(error, "supported_uri_schemes", None):
        reason = (
            f"MLflow takes {', '.join(filter(None, schemes))} here; a database such as sqlite "
            "needs all of it: pip install mlflow"
        )
    wrong = getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
    return (RecipeError if wrong else ResourceError)(f"--mlflow {uri}: cannot be used ({reason})")


def experiment_id(client: Any, name: str = "") -> str:
    """Of the experiment `name`, or of MLFLOW_EXPERIMENT_NAME; made if it is not there."""
    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def begin_in(client: Any, experiment: str, name: str, parent: str = "") -> Tracker:
    tags = {"mlflow.parentRunId": parent} if parent else {}
    run = client.create_run(experiment, run_name=name, tags=tags)
    return Tracker(client, experiment, run.info.run_id)


def end(tracker: Tracker, outcome: Outcome | VariantsOutcome | Profiled) -> None:
    """What came of it. The checkpoints of variants are runs below this one."""
    if isinstance(outcome, VariantsOutcome):
        for name, one in outcome.outcomes.items():
            below = begin_in(tracker.client, tracker.experiment, name, tracker.run)
            end(below, one)
        _tag(tracker, published=outcome.published, ship=outcome.comparison.recommended or "none")
        _log_files(tracker, outcome.directory, ("comparison.json", "comparison.html"), "")
    elif isinstance(outcome, Outcome):
        log_outcome(tracker, outcome.directory)
    else:
        _log_profiles(tracker, outcome)
    tracker.client.set_terminated(tracker.run, "FINISHED")


def fail(tracker: Tracker, message: str, code: int, killed: bool) -> None:
    """It ended without a result."""
    _tag(tracker, error=shorten(message, MESSAGE_LENGTH), exit_code=code)
    tracker.client.set_terminated(tracker.run, "KILLED" if killed else "FAILED")


def log_outcome(tracker: Tracker, directory: Path) -> None:
    """Metrics, settings and reports of a result that lies in `directory`."""
    ours = directory / OURS
    validation = json.loads((ours / "validation.json").read_text(encoding="utf-8"))
    plan = json.loads((ours / "plan.json").read_text(encoding="utf-8"))
    settings = json.loads((ours / "run.json").read_text(encoding="utf-8"))
    _log_params(tracker, settings)
    _log_metrics(tracker, dict(metrics_of(validation, plan)))
    passed = validation["passed"]
    _tag(tracker, passed=passed, outcome="published" if passed else "rejected",
         target=plan["target"], rescued=len(plan.get("rescued", ())))  # fmt: skip
    _log_files(tracker, ours, REPORTS, OURS)


def metrics_of(
    validation: Mapping[str, Any], plan: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    """Every number that a person would compare; checks that were not run have none."""
    for check in validation["checks"]:
        if check["value"] is not None:
            yield check["name"], float(check["value"])
    for key in ("perplexity_source", "perplexity_result", "size_bytes", "source_size_bytes"):
        yield key, float(validation[key])
    yield "bits_per_weight", plan["bits_per_weight"]


def _log_profiles(tracker: Tracker, found: Profiled) -> None:
    for name, profile in found.profiles.items():
        prefix = f"{name}/" if name else ""
        _log_metrics(tracker, dict(_metrics_of_profile(profile, prefix)))
        files = ("profile.json", "profile.html")
        _log_files(tracker, found.directory / name, files, f"profiles/{name}".rstrip("/"))
    _log_files(tracker, found.directory, ("stability.json", "stability.html"), "profiles")
    _tag(tracker, outcome="profiled")


def _metrics_of_profile(profile: ExpertProfile, prefix: str) -> Iterator[tuple[str, float]]:
    yield f"{prefix}super_experts", float(len(profile.super_experts))
    yield f"{prefix}massive_activation", max(layer.peak for layer in profile.layers)
    for one in profile.super_experts:
        yield f"{prefix}peak/layer {one.layer} expert {one.expert}", one.peak


def _log_params(tracker: Tracker, settings: Mapping[str, object]) -> None:
    from mlflow.entities import Param

    known = tracker.client.get_run(tracker.run).data.params
    params = [
        Param(key, str(value)[:PARAM_LENGTH])
        for key, value in ((name.replace("'", ""), value) for name, value in settings.items())
        if key not in known
    ]
    for at in range(0, len(params), PARAMS_AT_ONCE):
        tracker.client.log_batch(tracker.run, params=params[at : at + PARAMS_AT_ONCE])


def _log_metrics(tracker: Tracker, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        tracker.client.log_metric(tracker.run, name, value)


def _log_files(tracker: Tracker, directory: Path, names: tuple[str, ...], place: str) -> None:
    for name in names:
        if (directory / name).exists():
            tracker.client.log_artifact(tracker.run, str(directory / name), place or None)


def _tag(tracker: Tracker, **tags: object) -> None:
    for name, value in tags.items():
        tracker.client.set_tag(tracker.run, name, str(value))
