"""--mlflow against a local store: a run for each command and each variant, and for failed ones."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_automation import compress, prepare, run

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
READ_BACK = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name("se-compress")
runs = client.search_runs([experiment.experiment_id])
print(json.dumps([{"name": run.info.run_name, "status": run.info.status, "id": run.info.run_id,
    "metrics": run.data.metrics, "tags": run.data.tags, "params": run.data.params,
    "files": [f.path for d in ("se_compress", "profiles", "")
              for f in client.list_artifacts(run.info.run_id, d) if not f.is_dir]}
    for run in runs]))
"""


def logged(store: str, cwd: Path) -> dict[str, dict[str, Any]]:
    read = run([sys.executable, "-W", "ignore", "-c", READ_BACK, store], cwd, **QUIET)
    assert read.returncode == 0, read.stderr
    return {one["name"]: one for one in json.loads(read.stdout)}


@pytest.fixture(autouse=True)
def quiet_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUIET.items():
        monkeypatch.setitem(compress.__globals__["ENVIRONMENT"], name, value)


def test_a_run_and_its_variants(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    hopeless = {"policy": {"zero": [{"layer": 1, "expert": 0}], "protect": "none"}}
    hopeless["validation"] = {"kl_divergence": 1e-12}
    prepare(tmp_path, tiny_model("qwen3_moe"), variants={"plain": {}, "hopeless": hopeless})
    store = (tmp_path / "mlruns").as_uri()
    done = compress(tmp_path, "--mlflow", store)
    assert done.returncode == 0, done.stderr
    runs = logged(store, tmp_path)
    assert set(runs) == {"out", "plain", "hopeless"}
    assert {one["status"] for one in runs.values()} == {"FINISHED"}
    whole = runs["out"]
    assert (whole["tags"]["published"], whole["tags"]["ship"]) == ("True", "plain")
    assert whole["params"]["quantization.method"] == "none"
    assert {"se_compress/recipe-resolved.yaml", "comparison.html"} <= set(whole["files"])
    for name, directory in (("plain", "out/plain"), ("hopeless", "out/hopeless.rejected")):
        ours = tmp_path / directory / "se_compress"
        report = json.loads((ours / "validation.json").read_text("utf-8"))
        measured = {c["name"]: c["value"] for c in report["checks"] if c["value"] is not None}
        assert measured.items() <= runs[name]["metrics"].items()
        assert runs[name]["tags"]["passed"] == str(report["passed"])
        assert runs[name]["tags"]["outcome"] == ("published" if report["passed"] else "rejected")
        assert runs[name]["tags"]["mlflow.parentRunId"] == whole["id"]
        assert {"se_compress/report.html", "se_compress/run.json"} <= set(runs[name]["files"])


def test_runs_that_end_otherwise(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    prepare(tmp_path, tiny_model("qwen3_moe"))
    store = (tmp_path / "mlruns").as_uri()
    failed = compress(tmp_path, "--mlflow", store, "--set", "model=nowhere", "--output", "lost")
    assert failed.returncode == 3
    profiled = compress(tmp_path, "--mlflow", store, "--profile", "--set", "output=seen")
    assert profiled.returncode == 0, profiled.stderr
    runs = logged(store, tmp_path)
    lost = runs["lost"]
    assert (lost["status"], lost["tags"]["exit_code"]) == ("FAILED", "3")
    assert "nowhere" in lost["tags"]["error"]
    assert lost["params"]["model"] == "nowhere"
    assert "se_compress/recipe-resolved.yaml" in lost["files"]
    seen = runs["seen"]
    assert (seen["status"], seen["tags"]["outcome"]) == ("FINISHED", "profiled")
    assert seen["metrics"]["super_experts"] == 0
    assert {"profiles/profile.json", "profiles/profile.html"} <= set(seen["files"])


def test_a_store_that_is_not_there_is_told_before_the_work(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    prepare(tmp_path, tiny_model("qwen3_moe"))
    nobody = compress(tmp_path, "--mlflow", "http://127.0.0.1:9")
    assert nobody.returncode == 5
    assert nobody.stderr.startswith("se-compress: --mlflow http://127.0.0.1:9: cannot be used (")
    assert not (tmp_path / "out").exists()
    unknown = compress(tmp_path, "--mlflow", "nowhere://it")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("se-compress: --mlflow nowhere://it: cannot be used (MLflow ")
    assert "http, https here; a database such as sqlite needs all of it" in unknown.stderr
    refused = compress(tmp_path, "--mlflow", "x", "--dry-run")
    assert refused.returncode == 2
    assert "go with neither --dry-run nor --validate" in refused.stderr
