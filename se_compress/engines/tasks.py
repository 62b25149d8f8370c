"""Tasks of lm_eval in a process of their own (evaluate.py), without the network."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from se_compress.artifacts import TensorInfo, digest_of
from se_compress.artifacts.targets import OF_LM_EVAL
from se_compress.engines.bare import lay_bare
from se_compress.recipe import Tasks
from se_compress.reload import ELSEWHERE, START_ELSEWHERE, is_elsewhere
from se_compress.running.places import expand

START = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from se_compress.evaluate import start; sys.exit(start())"
)
# Task -> which samples are right, by their id, and by which metric.
Answers = Mapping[str, Mapping[str, Any]]


def why_no_task(tasks: Tasks) -> str:
    """Why the tasks cannot be run on any model here; "" if they can: lm_eval knows them."""
    if tasks.include is not None and not Path(expand(tasks.include)).is_dir():
        return f"include is {tasks.include}, which is no directory"
    found = _ask(tasks, {"model": None})
    return found if isinstance(found, str) else ""


def digest_of_files(include: str) -> str:
    """Of the tasks in a directory and of what lies beside them."""
    files = sorted(path for path in Path(expand(include)).rglob("*") if path.is_file())
    return digest_of([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])


def engine_itself(tasks: Tasks) -> str | None:
    """The engine that is asked by name; None where `reload` loads the model."""
    return tasks.backend if tasks.backend in OF_LM_EVAL else None


def answers_of_source(tasks: Tasks, model: Path) -> Answers | str:
    """What the source gets right, through transformers or through an engine that the recipe names;
    a sentence if it cannot be run here."""
    return _ask(
        tasks,
        {
            "model": str(model.absolute()),
            "tokenizer": str(model.absolute()),
            "target": "transformers",
            "format": "source",
        },
    )


def answers_of_result(
    tasks: Tasks,
    directory: Path,
    tensors: Iterable[TensorInfo],
    tokenizer: Path,
    target: str,
    form: str,
) -> Answers | str:
    """What the result in `directory`, which holds `tensors` in the format `form`, gets right."""
    with tempfile.TemporaryDirectory(prefix="se-compress-tasks-") as scratch:
        lay_bare(directory, tensors, Path(scratch))
        return _ask(
            tasks,
            {
                "model": scratch,
                "tokenizer": str(tokenizer.absolute()),
                "target": target,
                "format": form,
            },
        )


def _ask(tasks: Tasks, about: Mapping[str, object]) -> Answers | str:
    home = str(Path(__file__).parents[2])
    include = None if tasks.include is None else str(Path(expand(tasks.include)).absolute())
    with tempfile.TemporaryDirectory(prefix="se-compress-tasks-") as scratch:
        answer, file = Path(scratch) / "answer.json", Path(scratch) / "request.json"
        request = {
            **about,
            "engine": engine_itself(tasks),
            "names": tasks.names,
            "limit": tasks.limit,
            "include": include,
            "answer": str(answer),
            "parent": os.getpid(),
        }
        file.write_text(json.dumps(request), encoding="utf-8")
        python, start = sys.executable, START
        if is_elsewhere(tasks.backend) and os.environ.get(ELSEWHERE):
            python, start = os.environ[ELSEWHERE], START_ELSEWHERE.format("evaluate")
        process = subprocess.run(
            [python, "-P", "-c", start, home, str(file)],
            env={
                **os.environ,
                "PYTHONSAFEPATH": "1",
                "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
                "HF_DATASETS_CACHE": str(Path(scratch) / "cache"),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if process.returncode == 0:
            found: Answers = json.loads(answer.read_text(encoding="utf-8"))
            return found
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"exit code {process.returncode}"
