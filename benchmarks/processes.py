"""se-compress as a process: how it is started, with ranks or without, and what it takes meanwhile.

A process may be warm: forked from one that has imported the libraries already, which takes most of
the time of a short run. Its ranks then get from here what torchrun would tell them.

Memory is anonymous memory: what the process wrote itself (RssAnon and RssShmem), not the pages of
files that it reads, which the kernel drops when it needs them. Children count, and so do ranks.
"""

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    ours = [str(ROOT), str(ROOT / "benchmarks")]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(dict.fromkeys(filter(None, [*ours, *given])))
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
        cwd=ROOT,  # where nothing else is called se_compress
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
    """Bytes of anonymous memory of a process and its descendants.

    A child that has begun no program of its own yet has its parent's memory: once is enough.
    """
    programs = {one: _program(one) for one in _family(pid)}
    return sum(
        _anonymous(one)
        for one, program in programs.items()
        if one == pid or program != programs.get(_parent(one))
    )


def _family(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _program(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _anonymous(pid: int) -> int:
    """0 for a process that has gone."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        return sum(int(kb) * 1024 for kb in re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", text))
    return 0


# ------------------------------------------------------------------------- processes to be killed


@dataclass
class Group:
    """The processes of one run, and what they say on stderr.

    pids  those that work: the ranks, or torchrun's process, below which they are
    wait  waits so many seconds (None: for ever); the exit code, or None while one of them works
    said  their lines
    """

    pids: list[int]
    wait: Callable[[float | None], int | None]
    said: Iterator[str]

    def kill(self, number: int | None = None) -> None:
        """SIGKILL to one of the ranks, or (None) to all processes."""
        if number is None:
            for pid in self.pids:
                for end in (os.kill, os.killpg):  # it leads a group soon after its start
                    with suppress(ProcessLookupError):
                        end(pid, signal.SIGKILL)
        else:
            ranks = self.pids if len(self.pids) > 1 else members(self.pids[0])
            with suppress(ProcessLookupError):
                os.kill(ranks[number % len(ranks)], signal.SIGKILL)


def ended(group: Group, until: Callable[[], bool] | None = None) -> tuple[int, str]:
    """Let a run go on to its end: its exit code and the last line.

    until  looked at again and again; once it is true, one of the ranks is killed
    """
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(group.said), daemon=True)
    reader.start()
    while (code := group.wait(EVERY)) is None:
        if until is not None and until():
            group.kill(-1)
            until = None
    group.kill()
    reader.join(timeout=30)
    return code, "".join(said[-1:]).strip()


def start(ranks: int, file: Path, warm: bool, *words: str) -> Group:
    """Start a run. 0 ranks: one process that knows nothing of ranks."""
    return _start_warm(ranks, file, words) if warm else _start_cold(ranks, file, words)


def _start_cold(ranks: int, file: Path, words: Sequence[str]) -> Group:
    process = subprocess.Popen(
        command(ranks, file, *words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(1),
        cwd=ROOT,
        start_new_session=True,
    )

    def wait(seconds: float | None) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        return None

    def said() -> Iterator[str]:
        assert process.stderr is not None
        with process.stderr as lines:
            yield from lines

    return Group([process.pid], wait, said())


def _start_warm(ranks: int, file: Path, words: Sequence[str]) -> Group:
    import warm

    # The forkserver finds modules by the environment alone.
    os.environ |= environment(1) | {"HF_HUB_OFFLINE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    pipe = Path(tempfile.mkdtemp(prefix="se-compress-run-")) / "stderr"
    os.mkfifo(pipe)
    argv = ["se-compress", str(file), "--device", "cpu", *words]
    told = _told_by_torchrun(ranks)
    started = [context.Process(target=warm.run, args=(argv, one, str(pipe))) for one in told]
    for process in started:
        process.start()

    def wait(seconds: float | None) -> int | None:
        until = None if seconds is None else time.monotonic() + seconds
        for process in started:
            process.join(None if until is None else max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in started]
        return None if None in codes else next(filter(None, codes), 0)

    def said() -> Iterator[str]:
        with pipe.open(encoding="utf-8", errors="replace") as lines:
            yield from lines
        shutil.rmtree(pipe.parent)

    return Group([process.pid or 0 for process in started], wait, said())


def _told_by_torchrun(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank; of a process that is not one for 0."""
    if not ranks:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def members(pid: int) -> list[int]:
    """The processes that do the work: the ranks below torchrun, or the process itself."""
    return [one for one in _family(pid) if _runs_se_compress(one)] or [pid]


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
