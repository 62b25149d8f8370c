"""Log results of se-compress with MLflow: parameters, metrics, and the reports as artefacts.

    python tools/log_to_mlflow.py out/quickstart --experiment smollm2-moe
    python tools/log_to_mlflow.py out/protected-vs-naive --tracking-uri sqlite:///mlflow.db

DIRECTORY is a finished result, or the output of a recipe with variants: then each variant is a run.
Weights are not logged. Needs `mlflow` or `mlflow-skinny`, which se-compress itself does not.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow

OURS = "se_compress"
REPORTS = ("report.html", "validation.json", "plan.json", "recipe.yaml")


def results_in(directory: Path) -> list[Path]:
    """The result itself, or the results of all variants."""
    if (directory / OURS / "validation.json").exists():
        return [directory]
    found = sorted(file.parents[1] for file in directory.glob(f"*/{OURS}/validation.json"))
    if not found:
        raise SystemExit(f"{directory}: holds no result of se-compress")
    return found


def metrics_of(validation: dict[str, Any], plan: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number that a person would compare; checks that were not run have none."""
    for check in validation["checks"]:
        if check["value"] is not None:
            yield check["name"], check["value"]
    for key in ("perplexity_source", "perplexity_result", "size_bytes", "source_size_bytes"):
        yield key, validation[key]
    yield "bits_per_weight", plan["bits_per_weight"]


def log_result(result: Path) -> str:
    """One MLflow run for one result; returns the run's id."""
    ours = result / OURS
    validation = json.loads((ours / "validation.json").read_text(encoding="utf-8"))
    plan = json.loads((ours / "plan.json").read_text(encoding="utf-8"))
    settings = json.loads((ours / "run.json").read_text(encoding="utf-8"))
    with mlflow.start_run(run_name=result.name) as run:
        mlflow.log_params({key.replace("'", ""): str(value) for key, value in settings.items()})
        mlflow.log_metrics(dict(metrics_of(validation, plan)))
        mlflow.set_tags({"passed": str(validation["passed"]), "target": plan["target"]})
        for name in REPORTS:
            mlflow.log_artifact(str(ours / name), OURS)
    return str(run.info.run_id)


def main() -> None:
    parser = argparse.ArgumentParser(description="Log results of se-compress with MLflow.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experiment", default="se-compress")
    parser.add_argument("--tracking-uri", help="default: what MLFLOW_TRACKING_URI says")
    arguments = parser.parse_args()
    results = results_in(arguments.directory)
    if arguments.tracking_uri:
        mlflow.set_tracking_uri(arguments.tracking_uri)
    mlflow.set_experiment(arguments.experiment)
    for result in results:
        print(f"{result}: run {log_result(result)}")


if __name__ == "__main__":
    main()
