"""Log finished results of se-compress with MLflow, as `--mlflow` does while it runs:

    python tools/log_to_mlflow.py out/quickstart --experiment smollm2-moe
    python tools/log_to_mlflow.py out/protected-vs-naive --tracking-uri sqlite:///mlflow.db

DIRECTORY is a finished result, or the output of a recipe with variants: then each variant is a run.
Weights are not logged. Needs the extra `mlflow`.
"""

import argparse
from pathlib import Path

from mlflow import MlflowClient

from se_compress.artifacts import OURS
from se_compress.tracking import begin_in, experiment_id, log_outcome


def results_in(directory: Path) -> list[Path]:
    """The result itself, or the results of all variants."""
    if (directory / OURS / "validation.json").exists():
        return [directory]
    found = sorted(file.parents[1] for file in directory.glob(f"*/{OURS}/validation.json"))
    if not found:
        raise SystemExit(f"{directory}: holds no result of se-compress")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Log results of se-compress with MLflow.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experiment", default="se-compress")
    parser.add_argument("--tracking-uri", help="default: what MLFLOW_TRACKING_URI says")
    arguments = parser.parse_args()
    results = results_in(arguments.directory)
    client = MlflowClient(tracking_uri=arguments.tracking_uri)
    experiment = experiment_id(client, arguments.experiment)
    for result in results:
        tracker = begin_in(client, experiment, result.name)
        log_outcome(tracker, result)
        client.set_terminated(tracker.run, "FINISHED")
        print(f"{result}: run {tracker.run}")


if __name__ == "__main__":
    main()
