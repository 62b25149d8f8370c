"""What fails around the reload is told from what is wrong with the result, and tried again."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from se_compress import pipeline
from se_compress.artifacts import (
    Check,
    CompressionPlan,
    ModelSource,
    RunOptions,
    ValidationReport,
    from_json,
    to_json,
)
from se_compress.engines import reloading
from se_compress.engines.reloading import (
    RELOAD_LIMIT,
    START,
    START_ELSEWHERE,
    check_reload,
)
from se_compress.formats import UNQUANTISED
from se_compress.model.checkpoint import open_tensors
from se_compress.model.streaming import StreamedModel
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.pipeline import Outcome, Request, run
from se_compress.planning.policy import make_plan
from se_compress.reload import ELSEWHERE, fault_of_machine
from se_compress.validation import validator

TinyModel = Callable[[str], Path]
TOKENS = tiny.random_tokens(1, 24, seed=5)[0]


def wrapped(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "memory is exhausted"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
         "memory is exhausted"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "memory is exhausted"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory is exhausted"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (ValueError("Error while serializing: I/O error: No space left (os error 28)"),
         "the disk is full"),
        (RuntimeError("c++: error: /tmp/x.o: No space left on device"), "the disk is full"),
        (wrapped(ValueError("loading failed"), MemoryError()), "memory is exhausted"),
        (ImportError("FlashAttention2 has been toggled on, but\n the package"),
         "FlashAttention2 has been toggled on, but the package"),
        (ModuleNotFoundError("No module named 'triton'"), "No module named 'triton'"),
    ],
)  # fmt: skip
def test_faults_of_the_machine_are_told_from_those_of_the_result(
    error: Exception, reason: str
) -> None:
    assert fault_of_machine(error).startswith(reason)


@pytest.mark.parametrize(
    "error",
    [KeyError("model.layers.0"), RuntimeError("size mismatch for lm_head"), ValueError("bits"),
     FileNotFoundError(errno.ENOENT, "No such file"), OSError("corrupt (os error 5)")],
)  # fmt: skip
def test_faults_of_the_result_stay_faults(error: Exception) -> None:
    assert fault_of_machine(error) == ""


def ended(code: int, text: str = "") -> Check:
    return reloading._failure(subprocess.CompletedProcess([], code, "", text))


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGBUS, signal.SIGABRT, signal.SIGILL],
)
def test_a_process_that_was_ended_says_nothing_of_the_result(number: signal.Signals) -> None:
    check = ended(-number)
    assert (check.passed, check.retry) == (None, True)
    assert number.name in check.detail


@pytest.mark.parametrize("code", [-signal.SIGSEGV, -signal.SIGFPE, 1, 3])
def test_a_process_that_crashed_over_the_result_does(code: int) -> None:
    check = ended(code, "Traceback\nKeyError: 'x'\n")
    assert (check.passed, check.retry) == (False, None)
    assert "retry" not in to_json(check)


def test_not_here_and_not_now_are_two_things() -> None:
    assert (ended(77, "no memory").retry, ended(78, "never").retry) == (True, None)
    assert ended(78, "never").detail == "never"


# --------------------------------------------------------------------------------- with a process


@pytest.fixture
def source(tiny_model: TinyModel) -> ModelSource:
    return open_source(str(tiny_model("qwen3_moe")))


def reload(source: ModelSource) -> Check:
    """Of the source itself, which transformers loads."""
    model = StreamedModel(source, open_tensors(source.tensors))
    found = read_headers(source.path).values()
    return check_reload(
        model, "transformers", UNQUANTISED, source.path, found, TOKENS, RunOptions()
    )


def test_a_temporary_directory_that_cannot_be_written_is_told(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    check = reload(source)
    assert (check.passed, check.retry) == (None, True)
    assert "gone" in check.detail
    assert "No such file or directory" in check.detail


def test_vllm_itself_is_not_run_where_it_is_not(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ELSEWHERE, raising=False)
    model = StreamedModel(source, open_tensors(source.tensors))
    found = read_headers(source.path).values()
    arguments = (UNQUANTISED, source.path, found, TOKENS, RunOptions(), "vllm")
    check = check_reload(model, "vllm", *arguments)
    assert (check.passed, check.retry) == (None, True)
    assert (
        check.detail == f"vllm is not installed here, and {ELSEWHERE} names no Python that has it"
    )
    assert check_reload(model, "transformers", *arguments).passed is True


def test_a_python_that_is_not_there_is_told(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ELSEWHERE, str(tmp_path / "python"))
    model = StreamedModel(source, open_tensors(source.tensors))
    found = read_headers(source.path).values()
    check = check_reload(
        model, "vllm", UNQUANTISED, source.path, found, TOKENS, RunOptions(), "vllm"
    )
    assert (check.passed, check.retry) == (None, True)
    assert str(tmp_path / "python") in check.detail


def test_the_modules_that_load_need_nothing_of_ours_in_another_environment() -> None:
    """As in one that has vLLM and none of our dependencies: no site-packages at all."""
    home = str(Path(__file__).parents[1])
    code = START_ELSEWHERE.format("reload").replace(
        "start; sys.exit(start())", "start; print('imported')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, home], capture_output=True, text=True, check=False
    )
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize(
    ("checks", "passed", "retry"),
    [
        ((True, None), True, None),
        ((None, None), None, True),
        ((True, False), False, None),
        ((None, False), False, None),
    ],
)
def test_one_gate_stands_for_several_targets(
    checks: tuple[bool | None, ...], passed: bool | None, retry: bool | None
) -> None:
    said = [
        Check("reload", None, 0.1, one, f"said {one}", retry=True if one is None else None)
        for one in checks
    ]
    found = validator._of_all(said, ("gptqmodel", "vllm"))
    assert (found.passed, found.retry) == (passed, retry)
    assert found.detail == f"gptqmodel: said {checks[0]}; vllm: said {checks[1]}"


def test_a_config_that_wants_another_machine_s_attention_is_loaded(source: ModelSource) -> None:
    directory = source.path.parent / "with-attention"
    tiny.build(directory, "qwen3_moe")
    tiny.edit_config(directory, _attn_implementation="flash_attention_2", use_cache=False)
    check = reload(open_source(str(directory)))
    assert check.passed, check.detail


def test_a_head_of_zeros_computes_what_it_computes(source: ModelSource) -> None:
    directory = source.path.parent / "zero-head"
    tiny.build(directory, "qwen3_moe")
    head = load_file(directory / "model.safetensors")["lm_head.weight"]
    tiny.edit_weights(directory, {"lm_head.weight": torch.zeros_like(head)})
    check = reload(open_source(str(directory)))
    assert (check.value, check.passed) == (0.0, True), check.detail


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_process_that_is_killed_is_told_and_leaves_nothing(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(children(os.getpid()))

    def kill() -> None:
        while not (found := set(children(os.getpid())) - before):
            time.sleep(0.01)
        os.kill(found.pop(), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    check = reload(source)
    killer.join()
    assert (check.passed, check.retry) == (None, True)
    assert "SIGKILL, as the system does when memory is short" in check.detail
    assert not list(tmp_path.iterdir())


PARENT = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-P", "-c", sys.argv[1], sys.argv[2], "model", sys.argv[3]])
input()
"""


def test_the_process_ends_with_its_parent_and_removes_what_it_left(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    waits = START.replace(
        "start()", "(start.__globals__.update(main=lambda: time.sleep(60)), start())"
    )
    waits = f"import time; {waits}"
    home = str(Path(reloading.__file__).parent.parent)
    command = [sys.executable, "-c", PARENT, waits, home, str(scratch)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        request = f'{{"parent": {parent.pid}}}'
        (scratch / "request.json").write_text(request, encoding="utf-8")
        while not (found := children(parent.pid)):
            time.sleep(0.01)
        status = Path(f"/proc/{found[0]}/status")
        while int(status.read_text().split("SigCgt:")[1].split()[0], 16) & 1 << 14 == 0:
            time.sleep(0.01)  # until it catches SIGTERM
        parent.kill()
    for _ in range(500):
        if not status.exists() or "zombie" in status.read_text():
            break
        time.sleep(0.01)
    else:
        pytest.fail("it lives on")
    assert not scratch.exists()


# ------------------------------------------------------------------------------------- tried again


def recipe(model: Path, output: Path, text: Path) -> Request:
    loose = dict.fromkeys(("perplexity_increase", "kl_divergence", "sink_token_error"), 1e9)
    loose |= {"router_agreement": 0, "router_agreement_least": 0}
    sizes = {"data": str(text), "samples": 2, "sequence_length": 24}
    return Request(
        tiny.recipe(
            model,
            output,
            calibration=sizes,
            validation={**sizes, "seed": 1, "generation": {"tokens": 0}, **loose},
            policy={"protect": "none"},
            quantization={"method": "none"},
        ),
        "recipe",
    )


NOT_NOW = Check("reload", None, RELOAD_LIMIT, None, "no memory", retry=True)
PASSED = Check("reload", 0.001, RELOAD_LIMIT, True, "logits through transformers")
FAILED = Check("reload", 0.5, RELOAD_LIMIT, False, "logits through transformers")


@pytest.fixture
def request_of(tiny_model: TinyModel, tmp_path: Path) -> Request:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n:05d}" for n in range(1000)), encoding="utf-8")
    return recipe(tiny_model("qwen3_moe"), tmp_path / "out", text)


def outcomes(
    request: Request, monkeypatch: pytest.MonkeyPatch, *checks: Check
) -> list[tuple[Outcome, list[str]]]:
    """Of the same command, once for each answer of the reload; what else a run does is real."""
    found = []
    for check in checks:
        monkeypatch.setattr(validator, "_reload", lambda *arguments, check=check: check)
        notices: list[str] = []
        outcome = run(replace(request, notice=notices.append))
        found.append((outcome, notices))
    return found


def test_what_could_not_be_run_is_tried_again_and_nothing_else(
    request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, _), (same, again), (last, _), (final, notices) = outcomes(
        request_of, monkeypatch, NOT_NOW, NOT_NOW, PASSED, FAILED
    )
    assert not first.validation.is_final
    assert "reload" in first.validation.not_run
    assert same == first
    assert any("trying again what could not be run: reload" in text for text in again)
    assert last.validation.check("reload") == PASSED
    assert last.validation.is_final
    assert "reload" not in last.validation.not_run
    assert final == last, "a final verdict is not tried again"
    assert not any("trying again" in text for text in notices)
    ours = request_of.output / "se_compress"
    saved = from_json(ValidationReport, (ours / "validation.json").read_text("utf-8"), "")
    assert saved == last.validation


def test_a_result_that_fails_at_the_second_try_is_taken_back(
    request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, _), (second, _) = outcomes(request_of, monkeypatch, NOT_NOW, FAILED)
    assert (first.published, second.published) == (True, False)
    assert not request_of.output.exists()
    assert (request_of.output.with_name("out.rejected") / "model.safetensors").exists()


def test_plans_name_what_is_left_out(request_of: Request, tmp_path: Path) -> None:
    model = tiny.build(tmp_path / "model", "qwen3_moe")
    (model / "old.zip").write_bytes(b"x")
    recipe = request_of.recipe.model_copy(update={"model": str(model)})
    plan: CompressionPlan = pipeline.preview(replace(request_of, recipe=recipe)).plan
    assert plan.notes[-1].endswith("no loader wants stays out of the result: old.zip")
    assert make_plan(open_source(str(model)), None, recipe).notes == plan.notes[:-1]
