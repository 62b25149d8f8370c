"""Tasks of lm_eval on source and result: the answers are its own, and flips are what is judged."""

import ast
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from se_compress import evaluate
from se_compress.artifacts import GATES, RunOptions, ValidationReport
from se_compress.engines.tasks import answers_of_source, digest_of_files, why_no_task
from se_compress.errors import RecipeError, SourceError
from se_compress.opening.source import open_source
from se_compress.pipeline import Request, judge_existing, run
from se_compress.recipe import Tasks, load_recipe
from se_compress.text.tokenizer import load_tokenizer
from se_compress.validation import validator
from se_compress.validation.tasks import answered, compare_answers, lost_by_chance

pytest.importorskip("lm_eval")
TinyModel = Callable[[str], Path]
ROOT = Path(__file__).parents[1]
CLOZE = str(ROOT / "recipes" / "tasks")
QUESTIONS = 6


def cloze(**more: Any) -> Tasks:
    settings = {"names": "se_compress_cloze", "limit": QUESTIONS, "include": CLOZE, **more}
    return Tasks.model_validate(settings)


def by_hand(directory: Path) -> dict[str, bool]:
    """Which questions a plain model has right: the likeliest of the endings, by their sum."""
    model = tiny.plain_model(directory)
    tokenizer = load_tokenizer(directory)
    rows = (ROOT / "recipes" / "tasks" / "cloze.jsonl").read_text("utf-8").splitlines()
    found = {}
    for at, row in enumerate(map(json.loads, rows[:QUESTIONS])):
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["text"])["input_ids"]
            whole = tokenizer(f"{row['text']} {choice}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
            ending = range(len(context), len(whole))
            scores.append(sum(float(logs[i - 1, whole[i]]) for i in ending))
        found[str(at)] = scores.index(max(scores)) == row["answer"]
    return found


def test_the_answers_are_those_of_a_plain_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "model"  # long enough for the sentences
    shutil.copytree(tiny_model("qwen3_moe"), path)
    tiny.edit_config(path, max_position_embeddings=1024)
    found = answers_of_source(cloze(), path)
    assert not isinstance(found, str), found
    assert found["se_compress_cloze"]["metric"] == "acc"
    assert found["se_compress_cloze"]["right"] == by_hand(path)


def test_what_lm_eval_does_not_know_is_told_before_the_work(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    assert why_no_task(cloze()) == ""
    text = tmp_path / "text.txt"
    text.write_text("word " * 3000, encoding="utf-8")
    recipe = {
        "model": str(tiny_model("qwen3_moe")),
        "output": str(tmp_path / "out"),
        "quantization": {"method": "none"},
        "calibration": {"data": str(text), "samples": 2, "sequence_length": 32},
        "validation": {"data": str(text), "sequence_length": 32, "tasks": {"names": ["x_y"]}},
    }
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^validation.tasks: lm_eval knows no task x_y$"):
        run(Request(load_recipe(file), file.read_text("utf-8")))


def test_messages_to_a_model_without_a_chat_template_are_refused_before_the_work(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 3000, encoding="utf-8")
    held_out = {"data": str(text), "sequence_length": 32, "generation": {"chat_template": True}}
    recipe = {
        "model": str(tiny_model("qwen3_moe")),
        "output": str(tmp_path / "out"),
        "quantization": {"method": "none"},
        "calibration": {"data": str(text), "samples": 2, "sequence_length": 32},
        "validation": held_out,
    }
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    seen: list[str] = []
    options = RunOptions(progress=lambda stage, done, total: seen.append(stage))
    request = Request(load_recipe(file), file.read_text("utf-8"), options)
    with pytest.raises(SourceError, match=r"^validation.generation.chat_template is true, but the"):
        run(request)
    with pytest.raises(SourceError, match=r"^validation.generation.chat_template is true, but the"):
        judge_existing(request, tiny_model("qwen3_moe"), tmp_path / "judged")
    assert seen == []


def test_a_directory_of_tasks_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert why_no_task(cloze(include=str(tmp_path / "nowhere"))) == (
        f"include is {tmp_path}/nowhere, which is no directory"
    )


def test_backends_are_listed_in_one_line() -> None:
    with pytest.raises(RecipeError) as refused:
        tiny.recipe("m", validation={"data": "x", "tasks": {"names": "t", "backend": "vlm"}})
    assert str(refused.value).endswith(
        "validation.tasks.backend is 'vlm': input should be 'auto', 'transformers', 'gptqmodel', "
        "'vllm' or 'sglang'"
    )


@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (0, 5), (5, 0), (3, 9), (10, 10), (1, 4), (20, 41)]
)
def test_the_exact_test_is_a_sum_of_coin_flips(gained: int, lost: int) -> None:
    changes = gained + lost
    expected = sum(math.comb(changes, k) for k in range(lost, changes + 1)) / 2**changes
    assert lost_by_chance(gained, lost) == pytest.approx(expected)


def answers(*right: int, task: str = "t") -> dict[str, Any]:
    named = {str(at): bool(one) for at, one in enumerate(right)}
    return {task: {"metric": "acc", "right": named}}


def judged_tasks(source: Any, result: Any, **limits: Any) -> Any:
    text = {"data": "x.txt", "tasks": {"names": "t"}, **limits}
    return answered(source, result, tiny.recipe("m", validation=text).validation)


def test_flips_are_judged_and_not_averages() -> None:
    old = answers(*[1] * 10, *[0] * 10)
    same_average = answers(*[0] * 10, *[1] * 10)
    (report,), check = judged_tasks(old, same_average)
    assert (report.source, report.result) == (0.5, 0.5)
    assert (report.gained, report.lost, report.samples) == (10, 10, 20)
    assert check.passed
    five_lost, four_lost = answers(*[0] * 5, *[1] * 5, *[0] * 10), answers(0, 0, 0, 0, *[1] * 16)
    _, check = judged_tasks(old, five_lost)
    assert (check.value, check.passed) == (pytest.approx(1 / 32), False)
    assert check.detail == "t: 5 answers lost, 0 gained of 20; right 50.0% -> 25.0%"
    assert judged_tasks(old, five_lost, task_flips=0.01)[1].passed
    assert judged_tasks(old, four_lost)[1].passed, "as many gained and more"


def test_several_tasks_are_held_to_the_least_of_them_times_their_number() -> None:
    old, new = answers(*[1] * 5), answers(*[0] * 5)
    quiet = answers(1, 1, task="u")
    _, check = judged_tasks({**old, **quiet}, {**new, **quiet})
    assert check.value == pytest.approx(2 / 32)
    assert check.passed


def test_what_could_not_be_answered_is_not_run() -> None:
    reports, check = judged_tasks(answers(1), "memory is exhausted")
    assert (reports, check.passed) == ((), None)
    assert check.detail == "result: memory is exhausted"
    assert judged_tasks("no", answers(1))[1].detail == "source: no"
    reports, check = judged_tasks(answers(1), answers(1, task="v"))
    assert (reports, check.passed) == ((), None)
    assert compare_answers(answers(1, 0), answers(1))[0].samples == 1


def test_a_limit_without_tasks_is_refused() -> None:
    with pytest.raises(RecipeError, match="task_flips is the limit of tasks, which are not given"):
        tiny.recipe("m", validation={"data": "x", "task_flips": 0.1})
    assert GATES["task_flips"].optional


def test_a_report_tells_the_tasks(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_model("olmoe"), path)
    tiny.edit_config(path, max_position_embeddings=1024)
    text = {
        "data": "x.txt",
        "generation": {"tokens": 0},
        "tasks": {"names": "se_compress_cloze", "limit": 2, "include": CLOZE},
    }
    source, recipe = open_source(str(path)), tiny.recipe(path, validation=text)
    tokens = tiny.random_tokens(5, 24)
    report: ValidationReport = validator.validate(source, None, path, tokens, recipe, reload=False)
    assert report.check("task_flips").value == 1.0
    assert report.check("task_flips").passed
    assert report.check("task_flips").detail.endswith("; result through transformers")
    (task,) = report.tasks
    assert (task.samples, task.gained, task.lost, task.source) == (2, 0, 0, task.result)


def test_other_questions_are_another_setting(tmp_path: Path) -> None:
    shutil.copytree(CLOZE, tmp_path / "tasks")
    before = digest_of_files(str(tmp_path / "tasks"))
    assert before == digest_of_files(CLOZE)
    with (tmp_path / "tasks" / "cloze.jsonl").open("a", encoding="utf-8") as file:
        file.write("{}\n")
    assert digest_of_files(str(tmp_path / "tasks")) != before


def request_for(engine: str, directory: Path, form: str = "gptq") -> dict[str, Any]:
    return {"model": str(directory), "tokenizer": "t", "engine": engine, "format": form}


@pytest.mark.parametrize(("engine", "module"), [("vllm", "vllm"), ("sglang", "sglang")])
def test_an_engine_is_given_what_lm_eval_s_class_for_it_takes(
    tiny_model: TinyModel, engine: str, module: str
) -> None:
    path = tiny_model("qwen3_moe")
    made = evaluate.engine_of(request_for(engine, path), on_gpu=True)
    assert made["model"] == engine
    source = Path(str(importlib.util.find_spec("lm_eval").origin)).parent  # type: ignore[union-attr]
    tree = ast.parse((source / "models" / f"{module}_causallms.py").read_text("utf-8"))
    taken = next(
        {argument.arg for argument in node.args.args}
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    # What lm_eval's class does not name goes to vLLM itself.
    own = {"enforce_eager"} if engine == "vllm" else set()
    assert set(made["model_args"]) - own <= taken
    assert made["model_args"]["pretrained"] == str(path)
    assert made["model_args"]["trust_remote_code"] is False
    assert made["model_args"]["dtype"] == "bfloat16"


def test_vllm_is_told_of_packed_files_and_of_a_cpu(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3_moe")
    packed = evaluate.engine_of(request_for("vllm", path), on_gpu=True)["model_args"]
    plain = evaluate.engine_of(request_for("vllm", path, "source"), on_gpu=True)["model_args"]
    on_cpu = evaluate.engine_of(request_for("vllm", path, "source"), on_gpu=False)["model_args"]
    assert packed["quantization"] == "humming"
    assert "quantization" not in plain
    assert "compilation_config" in on_cpu
    length = json.loads((path / "config.json").read_text())["max_position_embeddings"]
    assert packed["max_model_len"] == min(length, 2048)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_that_is_not_here_is_not_run(tiny_model: TinyModel, engine: str) -> None:
    """And nothing stands in for it."""
    if importlib.util.find_spec(engine):
        pytest.skip(f"{engine} is installed")
    found = answers_of_source(cloze(backend=engine), tiny_model("qwen3_moe"))
    assert isinstance(found, str)
    assert found.startswith(f"not run here: {engine} is not installed")


def test_vllm_of_another_environment_is_asked_there(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho asked > {tmp_path}/asked\nexec "{sys.executable}" "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("SE_COMPRESS_VLLM_PYTHON", str(other))
    found = answers_of_source(cloze(backend="vllm"), tiny_model("qwen3_moe"))
    assert (tmp_path / "asked").exists()
    if not importlib.util.find_spec("vllm"):
        assert "vllm is not installed" in found
