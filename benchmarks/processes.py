"""se-compress as a process: how it is started, with ranks or without, and what it takes meanwhile.

Memory is anonymous memory: what the process wrote itself (RssAnon and RssShmem), not the pages of
files that it reads, which the kernel drops when it needs them. Children count, and so do ranks.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
EVERY = 0.02  # seconds between two looks at the memory
_STAGE = re.compile(r"(\w[\w ]*): \d+/\d+")


def command(ranks: int, recipe: Path, *words: str) -> list[str]:
    """The command line of a run. 0 ranks: one process, started without torchrun."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", "se_compress", str(recipe), "--device", "cpu", *words]


def environment(threads: int) -> dict[str, str]:
    """Of a run with so many threads in each process, on the code beside this file."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


@dataclass
class Seen:
    """What a process did.

    code       its exit code, minus the number of the signal that ended it
    seconds    from its start to its end
    peak       bytes of anonymous memory, of it and its children together, at the most
    by_stage   the same by the stage that its lines of progress named last; "start" before any
    spent      seconds by that stage
    said       its lines on stderr
    too_much   it was ended because it took more than it was allowed
    """

    code: int = 0
    seconds: float = 0.0
    peak: int = 0
    by_stage: dict[str, int] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    too_much: bool = False


def watched(words: Sequence[str], most: int | None = None, threads: int = 1) -> Seen:
    """Run a command to its end, and see what it takes.

    most  bytes of anonymous memory at which it is killed
    """
    started = time.monotonic()
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(threads),
        start_new_session=True,
    )
    seen = Seen()
    stage = ["start"]
    reader = threading.Thread(target=_read, args=(process, seen, stage), daemon=True)
    reader.start()
    last = started
    while process.poll() is None:
        now, size = time.monotonic(), anonymous(process.pid)
        seen.peak = max(seen.peak, size)
        seen.by_stage[stage[0]] = max(seen.by_stage.get(stage[0], 0), size)
        seen.spent[stage[0]] = seen.spent.get(stage[0], 0.0) + now - last
        last = now
        if most is not None and size > most:
            seen.too_much = True
            kill_all(process)
        time.sleep(EVERY)
    seen.code, seen.seconds = process.wait(), time.monotonic() - started
    reader.join(timeout=10)
    return seen


def _read(process: subprocess.Popen[str], seen: Seen, stage: list[str]) -> None:
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            seen.said.append(line.rstrip("\n"))
            stage[0] = stage_of(line) or stage[0]


def stage_of(line: str) -> str:
    """The stage that a line of progress is of. "" for another line."""
    match = _STAGE.match(line)
    return match[1] if match else ""


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a process that leads a session, and to all in it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and its descendants."""
    return sum(_anonymous(one) for one in _family(pid))


def _family(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _anonymous(pid: int) -> int:
    """0 for a process that has gone."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        return sum(int(kb) * 1024 for kb in re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", text))
    return 0


def members(process: subprocess.Popen[str]) -> list[int]:
    """The processes that do the work: the ranks below torchrun, or the process itself."""
    found = [pid for pid in _family(process.pid) if _runs_se_compress(pid)]
    return found or [process.pid]


def _runs_se_compress(pid: int) -> bool:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"se_compress" in words and b"torch.distributed.run" not in words
    return False


def hashes(result: Path) -> dict[str, str]:
    """SHA-256 of what is equal in equal results, by file: all but times and what holds them.

    Report, card and the records of a run say when and how long.
    """
    ours = [result / "se_compress" / name for name in ("profile.json", "plan.json")]
    files = [file for file in result.iterdir() if file.is_file() and file.name != "README.md"]
    return {str(file.relative_to(result)): _sha256(file) for file in sorted([*files, *ours])}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------ recipes

TEXT = ROOT / "tools" / "reference" / "text"
CORPORA = ("austen", "factbook")
# What a random model breaks without harm: no gate decides anything here.
NO_LIMITS = {
    "perplexity_increase": 1e9,
    "kl_divergence": 1e3,
    "massive_activation_ratio": 0.0,
    "sink_token_error": 1e9,
    "router_agreement": 0.0,
    "router_agreement_least": 0.0,
    "sink_decay": 1.0,
    "repetition": 10.0,
    "loops": 10.0,
}


def recipe_of(
    model: Path, output: Path, samples: int, length: int, **sections: Any
) -> dict[str, Any]:
    """A recipe in which nothing is rejected; `sections` replace or add keys of the first level."""
    text = {"sequence_length": length}
    parts = ("calibration", "held-out")
    data = {part: [str(TEXT / f"{one}-{part}.txt") for one in CORPORA] for part in parts}
    return {
        "model": str(model),
        "output": str(output),
        "calibration": {**text, "data": data["calibration"], "samples": samples},
        "validation": {
            **text,
            "data": data["held-out"],
            "samples": 4,
            # Two tokens: each of them takes all layers once more.
            "generation": {"prompts": 1, "prompt_tokens": 16, "tokens": 2},
            # which is not installed: loading the result takes longer than all the rest
            "reload": {"engine": "vllm"},
            **NO_LIMITS,
        },
        "target": "vllm",
        **sections,
    }


def write_recipe(file: Path, recipe: Mapping[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    return file
