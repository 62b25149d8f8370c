"""benchmarks/gpu.py where there is no GPU: every part on a CPU, and what it says of failures."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import gpu


def test_the_gpu_script_runs_every_part_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "RESULTS.md"
    given = ["gpu.py", "--device", "cpu", "--small", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*given, "--results", str(file)])
    monkeypatch.setattr(gpu, "BUDGETS", dict.fromkeys(gpu.BUDGETS, 400.0))
    monkeypatch.setattr(gpu, "TOTAL", 2000.0)
    assert gpu.main() == 0
    told = dict(
        re.findall(r"^### (\w+)\n\n(.*?)(?=\n### |<!-- end)", file.read_text(), re.S | re.M)
    )
    assert list(told) == list(gpu.PARTS)
    assert told["twins"].startswith("All 21 agree.")
    steps = re.findall(r"^\| (\w+) \| (\d+\.\d+) \|", told["layer"], re.M)
    assert [step for step, _ in steps] == ["profile", "sensitivity", "compress", "validate"]
    assert "Sizes as small as these say nothing of the goal." in told["layer"]
    assert told["equality"].startswith("Two runs, 3 files of weights and settings: the same")
    assert "direction of the worst matrix 0.99" in told["nf4"]
    assert told["vllm"].strip() == "*not run: the CPU has no kernels for these widths*"
    assert "48 layers of Qwen3-30B-A3B in 300 s" in file.read_text()


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path: Path) -> None:
    run = gpu.Run("cpu", True, tmp_path, tmp_path / "RESULTS.md")
    failed = gpu.run_part(run, "equality", 300.0)
    assert failed.why == "failed: RuntimeError: the part `layer` made nothing to compare with"
    stopped = gpu.run_part(run, "twins", 0.1)
    assert (stopped.rows, stopped.why) == ([], "stopped after 0 s, its budget")
    run.found.update(equality=failed, twins=stopped)
    text = gpu.section(run)
    assert "*failed: RuntimeError" in text
    assert "### layer\n\n*not run*: it was not asked for" in text


def test_the_gpu_script_says_what_is_wrong() -> None:
    agree = [
        {"what": "one", "found": "x", "right": True},
        {"what": "two", "found": "y", "right": False},
    ]
    assert gpu._of_twins(agree)[0] == "WRONG: two."
    assert gpu._of_equality([{"files": 3, "differing": ["a"]}])[0].startswith("WRONG: a differ")
    whole = {"tokens": 131072, "failed": []}
    steps = {"profile": 2.0, "sensitivity": 0.03, "compress": 2.0, "validate": 1.0}
    text = gpu._verdict(steps, whole, False)  # 48 x 5 s, and 1,224 / 3 x 0.03
    assert text.startswith("48 such layers take 252 s on 131,072 calibration tokens, 12 of them")
    assert "The goal is reached" in text
    assert "The goal is not reached" in gpu._verdict({**steps, "compress": 4.0}, whole, False)
