"""The gate `reload`: does the target engine load the result, and compute what was validated here?

The engine runs in a process of its own (reload.py), in a directory that is laid bare (bare.py),
without the network and without the current directory among the places that modules come from.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from se_compress.artifacts import GATES, Check, RunOptions, TensorInfo
from se_compress.artifacts.targets import ENGINES
from se_compress.engines.bare import lay_bare
from se_compress.errors import CANNOT_RUN_EXIT_CODE, NOT_RUN_EXIT_CODE
from se_compress.model.streaming import StreamedModel
from se_compress.reload import ELSEWHERE, START_ELSEWHERE

RELOAD_LIMIT = GATES["reload"].limit
RELOAD_TOKENS = 64
# The package itself may be found through the current directory: it comes behind all others then.
START = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from se_compress.reload import start; sys.exit(start())"
)
# What ends a process is the machine (memory first of all) or a person, but for these: a program
# does them to itself, over a file that it cannot make sense of.
ITS_OWN_FAULT = (signal.SIGSEGV, signal.SIGFPE)


def check_reload(
    result: StreamedModel,
    target: str,
    form: str,
    directory: Path,
    tensors: Iterable[TensorInfo],
    tokens: Sequence[int],
    options: RunOptions,
    engine: str = "auto",
) -> Check:
    """Load the checkpoint in `directory`, which holds `tensors` in the format `form`, as a user
    would.

    engine  `validation.reload.engine`: where it is the target itself, that loads it

    What keeps this machine from trying is no fault of the result: the check is not run, and asks
    for another try where one may go better (`Check.retry`).
    """
    itself = ENGINES[target].itself
    loader = itself if itself and itself == engine else ENGINES[target].loader
    options.progress("reload", 0, 1)
    tokens = tokens[:RELOAD_TOKENS]
    try:
        with tempfile.TemporaryDirectory(prefix="se-compress-reload-") as scratch:
            bare = Path(scratch) / "model"
            bare.mkdir()
            lay_bare(directory, tensors, bare)
            request = {"tokens": list(tokens), "target": target, "format": form, "loader": loader}
            found = _ask_engine(request, Path(scratch))
    except OSError as error:
        where = error.filename or tempfile.tempdir or "the temporary directory"
        found = _not_run(f"{where}: {error.strerror}")
    options.progress("reload", 1, 1)
    return found if isinstance(found, Check) else _compare(result, target, loader, tokens, found)


def _ask_engine(request: Mapping[str, object], scratch: Path) -> Tensor | Check:
    """Logits [1, T, vocabulary] of the model that lies in `scratch`, or why there are none."""
    text = json.dumps({**request, "parent": os.getpid()})
    (scratch / "request.json").write_text(text)
    home, start, python = Path(__file__).parent.parent, START, sys.executable
    if request["loader"] == ENGINES[str(request["target"])].itself and os.environ.get(ELSEWHERE):
        home, python = home.parent, os.environ[ELSEWHERE]
        start = START_ELSEWHERE.format("reload")
    process = subprocess.run(
        [python, "-P", "-c", start, str(home), str(scratch / "model"), str(scratch)],
        env={**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if process.returncode != 0:
        return _failure(process)
    from safetensors.torch import load_file

    return load_file(scratch / "logits.safetensors")["logits"].clone()


def _compare(
    result: StreamedModel, target: str, loader: str, tokens: Sequence[int], logits: Tensor
) -> Check:
    states = result.embed([torch.tensor([list(tokens)])])
    for layer in range(result.source.layer_count):
        states = result.run_layer(layer, result.load_layer(layer), states)
    expected = next(result.logits(states)).cpu()
    engine = ENGINES[target]
    if loader == engine.itself:  # it gives log-probabilities: logits but for a constant
        expected, logits = (each - each.mean(-1, keepdim=True) for each in (expected, logits))
    length = expected.norm(dim=-1).clamp_min(1e-30)  # a head of zeros: nothing over nothing is NaN
    error = float(((logits - expected).norm(dim=-1) / length).median())
    if loader != engine.itself and engine.stands_in and error <= RELOAD_LIMIT:
        detail = f"not run in {target}; transformers in its place computes the same logits"
        return Check("reload", error, RELOAD_LIMIT, None, detail)
    detail = f"logits through {loader}"
    return Check("reload", error, RELOAD_LIMIT, error <= RELOAD_LIMIT, detail)


def _failure(process: "subprocess.CompletedProcess[str]") -> Check:
    code = process.returncode
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    last = lines[-1].strip()[:300] if lines else f"exit code {code}"
    if code in (NOT_RUN_EXIT_CODE, CANNOT_RUN_EXIT_CODE):
        return _not_run(last, again=code == NOT_RUN_EXIT_CODE)
    if code < 0 and -code not in ITS_OWN_FAULT:
        name = signal.Signals(-code).name
        memory = ", as the system does when memory is short" if -code == signal.SIGKILL else ""
        return _not_run(f"the process that loads it was ended by {name}{memory}")
    if code < 0:
        last = f"the process that loads it died of {signal.Signals(-code).name}"
    return Check("reload", None, RELOAD_LIMIT, False, f"loading failed: {last}")


def _not_run(reason: str, again: bool = True) -> Check:
    return Check("reload", None, RELOAD_LIMIT, None, reason, retry=again or None)
