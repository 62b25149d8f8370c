"""Run tasks of lm_eval on one model and write down what it got right: `python -m
se_compress.evaluate REQUEST`. A process of its own, as the engines patch what they import.

REQUEST is a JSON file: {"model": directory, "tokenizer": directory, "format": ..., "target": ...,
"names": [...], "limit": ..., "include": directory or null, "answer": file, "parent": process id}.
The model is loaded as `reload` loads it; with an "engine" (OF_LM_EVAL), lm_eval's class for that
loads it. `answer` gets {task: {"metric": ..., "right": {id: true or false}}}, from lm_eval's own
samples. Without "model" the names are looked up, and nothing is run.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from se_compress.artifacts.targets import OF_LM_EVAL
from se_compress.errors import CANNOT_RUN_EXIT_CODE, NOT_RUN_EXIT_CODE
from se_compress.formats import FORMATS
from se_compress.reload import (
    ELSEWHERE,
    end_with_parent,
    fault_of_machine,
    is_elsewhere,
    load_with_engine,
    settings_of,
)

# The metrics that say of one sample whether it is right, the better one first.
METRICS = ("acc", "exact_match")
LONGEST = 2048  # tokens of a question with its answer


def start() -> int:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    end_with_parent(request["parent"], Path(sys.argv[1]).parent)
    if importlib.util.find_spec("lm_eval") is None:
        return _cannot("lm_eval is not installed (pip install 'se-compress[eval]')")
    try:
        found = _run(request)
    except Exception as error:
        if reason := fault_of_machine(error):
            print(reason, file=sys.stderr)
            return NOT_RUN_EXIT_CODE
        raise
    if isinstance(found, str):
        return _cannot(found)
    Path(request["answer"]).write_text(json.dumps(found), encoding="utf-8")
    return 0


def _cannot(reason: str) -> int:
    print(reason, file=sys.stderr)
    return CANNOT_RUN_EXIT_CODE


def _run(request: Mapping[str, Any]) -> dict[str, Any] | str:
    """What each task says, or why none can be run."""
    if request["include"]:
        os.chdir(request["include"])  # where a task looks for data that lies beside it
    manager, unknown = _find(request["names"], request["include"])
    if unknown:
        return f"lm_eval knows no task {', '.join(unknown)}"
    if not request["model"]:
        return {}
    return _evaluate(request, manager)


def _find(names: Sequence[str], include: str | None) -> tuple[Any, list[str]]:
    """A manager of tasks that knows all of them, or which it does not. Its own thousands of tasks
    take it half a minute, so it looks for them only if they are needed."""
    from lm_eval.tasks import TaskManager

    manager, unknown = None, list(names)
    for defaults in (False, True) if include else (True,):
        if unknown:
            manager = TaskManager(include_path=include, include_defaults=defaults)
            unknown = [name for name in names if name not in manager.all_tasks]
    return manager, unknown


def _evaluate(request: Mapping[str, Any], manager: Any) -> dict[str, Any] | str:
    import lm_eval

    if reason := _why_no_engine(request["engine"]):
        return reason
    model = _engine(request) if request["engine"] else _loaded(request)
    if isinstance(model, str):
        return model
    found = lm_eval.simple_evaluate(
        **model,
        tasks=list(request["names"]),
        limit=request["limit"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    answers = {}
    for task, samples in found["samples"].items():
        metric = next((name for name in METRICS if name in samples[0]), None)
        if metric is None:
            return f"task {task} has no metric that says of a sample whether it is right"
        right = {str(one["doc_id"]): float(one[metric]) > 0.5 for one in samples}
        answers[task] = {"metric": metric, "right": right}
    return answers


def _loaded(request: Mapping[str, Any]) -> dict[str, Any] | str:
    """The model as `reload` loads it, for lm_eval, or why that cannot be."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        request["tokenizer"], local_files_only=True, trust_remote_code=False
    )
    model = load_with_engine(request["model"], request["target"], request["format"])
    if isinstance(model, str):
        return model
    return {"model": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)}


# ------------------------------------------------------------------------- engines of lm_eval's own


def _engine(request: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    return engine_of(request, torch.cuda.is_available())


def engine_of(request: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """The name of the engine's class in lm_eval, and what that is given."""
    engine = OF_LM_EVAL[request["engine"]]
    given = {"pretrained": request["model"], "trust_remote_code": False, **engine.given}
    given[engine.tokenizer] = request["tokenizer"]
    if engine.longest:
        given[engine.longest] = _length(request["model"])
    given |= settings_of(request["engine"], FORMATS.get(request["format"]), on_gpu)
    return {"model": request["engine"], "model_args": given}


def _length(directory: str) -> int:
    """LONGEST, or fewer where the model has no more."""
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return min(LONGEST, int(config.get("max_position_embeddings") or LONGEST))


def _why_no_engine(engine: str | None) -> str:
    """Why an engine cannot be asked here; "" if it can, or if none is wanted."""
    if not engine:
        return ""
    if importlib.util.find_spec(engine) is None:
        elsewhere = f", and {ELSEWHERE} names no Python that has it"
        return f"not run here: {engine} is not installed{elsewhere if is_elsewhere(engine) else ''}"
    import torch

    if OF_LM_EVAL[engine].on_cuda and not torch.cuda.is_available():
        return f"not run here: lm_eval runs {engine} on CUDA only"
    return ""


if __name__ == "__main__":
    sys.exit(start())
