"""For programs that run se-compress: the line of --json, the schemas, and the two examples."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from json_schemas import DIRECTORY
from jsonschema import Draft202012Validator

from se_compress.artifacts import RunResult, from_json

ROOT = Path(__file__).parents[1]
BINARIES = Path(sys.executable).parent
NUMBERS = " ".join(f"{n:05d}" for n in range(4000))
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BINARIES}:{os.environ['PATH']}",
}
FILES = ("profile", "plan", "validation")


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def compress(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(["se-compress", "r.yaml", "--device", "cpu", *arguments], cwd)


def check(name: str, text: str) -> Any:
    """What a JSON text holds, if it keeps to the schema `name`."""
    found = json.loads(text)
    schema = json.loads((DIRECTORY / f"{name}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator(schema).validate(found)
    return found


def prepare(directory: Path, model: Path, **sections: Any) -> None:
    (directory / "text.txt").write_text(NUMBERS, encoding="utf-8")
    text = {"data": "text.txt", "sequence_length": 32}
    gates = {"perplexity_increase": 1e9, "kl_divergence": 1e3, "router_agreement": 0.0}
    gates |= {"router_agreement_least": 0.0, "sink_decay": 1.0, "sink_token_error": 1e9}
    recipe = {
        "model": str(model),
        "output": "out",
        "target": "transformers",
        "calibration": {**text, "samples": 8},
        "quantization": {"method": "none"},
        "validation": {**text, **gates, "samples": 2, "seed": 1, "generation": {"tokens": 0}},
    }
    (directory / "r.yaml").write_text(yaml.safe_dump({**recipe, **sections}), encoding="utf-8")


@pytest.fixture(scope="module")
def variants(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of two variants, of which one is rejected."""
    directory = tmp_path_factory.mktemp("variants")
    hopeless = {"policy": {"zero": [{"layer": 1, "expert": 0}], "protect": "none"}}
    hopeless["validation"] = {"kl_divergence": 1e-12}
    prepare(directory, tiny_model("qwen3_moe"), variants={"plain": {}, "hopeless": hopeless})
    return directory, compress(directory, "--json")


def test_the_result_is_one_line_and_everything_else_is_on_stderr(
    variants: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    directory, done = variants
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    line = check("run-result", done.stdout)
    assert (line["outcome"], line["exit_code"], line["message"]) == ("published", 0, "")
    assert line["comparison"] == "out/comparison.json"
    found = {one["name"]: one for one in line["checkpoints"]}
    assert {name: one["published"] for name, one in found.items()} == {
        "plain": True, "hopeless": False
    }  # fmt: skip
    assert found["hopeless"]["directory"] == "out/hopeless.rejected"
    report = json.loads(
        (directory / "out/hopeless.rejected/se_compress/validation.json").read_text("utf-8")
    )
    assert found["hopeless"]["checks"] == report["checks"]
    assert "ship plain" in done.stderr
    assert from_json(RunResult, done.stdout, "stdout").checkpoints[0].name in found


def test_real_files_keep_to_their_schemas(
    variants: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    output = variants[0] / "out"
    check("comparison", (output / "comparison.json").read_text("utf-8"))
    for result in ("plain", "hopeless.rejected"):
        for name in FILES:
            check(name, (output / result / "se_compress" / f"{name}.json").read_text("utf-8"))


def test_whatever_happens_there_is_a_line(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    prepare(tmp_path, tiny_model("qwen3_moe"))
    planned = compress(tmp_path, "--dry-run", "--json")
    line = check("run-result", planned.stdout)
    assert (planned.returncode, line["outcome"], len(line["plans"])) == (0, "planned", 1)
    mistyped = compress(tmp_path, "--set", "polcy=1", "--json")
    line = check("run-result", mistyped.stdout)
    assert (mistyped.returncode, line["outcome"], line["exit_code"]) == (2, "failed", 2)
    assert mistyped.stderr == f"se-compress: {line['message']}\n"
    unknown = compress(tmp_path, "--jsno", "--json")
    assert check("run-result", unknown.stdout)["exit_code"] == unknown.returncode == 2
    missing = compress(tmp_path, "--set", "model=nowhere", "--json")
    assert check("run-result", missing.stdout)["exit_code"] == missing.returncode == 3
    strict = ["--set", "policy.zero=[{layer: 1, expert: 0}]", "--set", "policy.protect=none"]
    strict += ["--set", "validation.kl_divergence=1e-12"]
    rejected = compress(tmp_path, *strict, "--json")
    line = check("run-result", rejected.stdout)
    assert (rejected.returncode, line["outcome"], line["exit_code"]) == (4, "rejected", 4)
    assert rejected.stderr.endswith(f"se-compress: {line['message']}\n")
    assert line["checkpoints"][0]["directory"] == "out.rejected"


def test_the_example_job_for_github_actions_runs(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    prepare(tmp_path, tiny_model("qwen3_moe"))
    text = (ROOT / "recipes" / "ci" / "github-actions.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert set(workflow) == {"name", True, "env", "jobs"}  # YAML 1.1 takes `on` for true
    steps = workflow["jobs"]["compress"]["steps"]
    summary = tmp_path / "summary.md"
    environment = {**workflow["env"], "RECIPE": "r.yaml", "GITHUB_STEP_SUMMARY": str(summary)}
    ran = []
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        assert "${{" not in step.get("run", "")
        if "run" in step and step["id"] != "install":
            done = run(["bash", "-eo", "pipefail", "-c", step["run"]], tmp_path, **environment)
            assert done.returncode == 0, done.stderr
            ran.append(step["id"])
    assert ran == ["plan", "compress", "summary"]
    line = check("run-result", (tmp_path / "result.json").read_text("utf-8"))
    written = summary.read_text("utf-8")
    assert written.startswith("**published**")
    assert f"{line['checkpoints'][0]['perplexity_result']:.2f}" in written
    assert (tmp_path / "out" / "se_compress" / "report.html").exists()


READ_BACK = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name("tiny")
print(json.dumps({run.info.run_name: {"metrics": run.data.metrics, "tags": run.data.tags,
    "params": run.data.params, "files": [f.path for f in client.list_artifacts(run.info.run_id,
    "se_compress")]} for run in client.search_runs([experiment.experiment_id])}))
"""


def test_results_are_logged_with_mlflow(
    variants: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output, store = variants[0] / "out", (tmp_path / "mlruns").as_uri()
    tool = [sys.executable, str(ROOT / "tools" / "log_to_mlflow.py")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    done = run(
        [*tool, str(output), "--experiment", "tiny", "--tracking-uri", store], tmp_path, **quiet
    )
    assert done.returncode == 0, done.stderr
    read = run([sys.executable, "-W", "ignore", "-c", READ_BACK, store], tmp_path, **quiet)
    assert read.returncode == 0, read.stderr
    runs = json.loads(read.stdout)
    assert set(runs) == {"plain", "hopeless.rejected"}
    for name, logged in runs.items():
        ours = output / name / "se_compress"
        report = json.loads((ours / "validation.json").read_text("utf-8"))
        measured = {c["name"]: c["value"] for c in report["checks"] if c["value"] is not None}
        assert measured.items() <= logged["metrics"].items()
        assert logged["metrics"]["size_bytes"] == report["size_bytes"]
        assert logged["tags"]["passed"] == str(report["passed"])
        assert logged["params"]["quantization.method"] == "none"
        assert "se_compress/report.html" in logged["files"]
    nothing = run([*tool, str(tmp_path)], tmp_path, **quiet)
    assert nothing.returncode == 1
    assert nothing.stderr == f"{tmp_path}: holds no result of se-compress\n"
