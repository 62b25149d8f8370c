"""What every timed process does alike; each runs in a process of its own, one tool a process.

    python WORKER.py JOB.json REPORT.json

The clock starts when the tool, torch, transformers and the model's own modelling code have been
imported, and stops when the last byte of the checkpoint has been written: loading the model,
running the calibration tokens, quantising, packing and saving are all in it.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """The same for all tools.

    tokens  calibration sequences of equal length, ids
    skip    regular expressions of modules that stay as they are, beside router and head
    routed  llm-compressor only: tokens go to their own experts alone, not to all of them
    refine, distill  se-compress only: steps of refining and of distilling, 0 for none
    tuned   auto-round only: steps of tuning for each block, 0 to round alone
    """

    model: str
    output: str
    tokens: list[list[int]]
    bits: int
    group_size: int
    symmetric: bool
    skip: list[str]
    routed: bool = False
    refine: int = 0
    distill: int = 0
    tuned: int = 0


def main(quantize: Callable[[Job], str | None]) -> None:
    """Time `quantize` on the job that the command line names."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    _import_modelling_code(job.model)
    before = _peak_bytes()
    started, used = time.perf_counter(), time.process_time()
    version = quantize(job)
    report = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": _peak_bytes(),
        "peak_bytes_imports": before,
        "version": version,
    }
    Path(sys.argv[2]).write_text(json.dumps(report), encoding="utf-8")


def _import_modelling_code(model: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    print("modelling code:", AutoModelForCausalLM._model_mapping[type(config)].__name__)


def _peak_bytes() -> int:
    """Largest resident set since the interpreter started. Not getrusage: what it says begins with
    the size that the parent process had when it forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kibibytes,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return int(kibibytes) * 1024
