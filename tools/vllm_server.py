"""A server of the OpenAI protocol, started and asked: what tools/vllm_check.py compares.

The protocol as vLLM speaks it: POST /v1/completions with `prompt` a list of token ids, `echo` and
`logprobs` for the log-probability of each of them, `return_token_ids` for the ids of a
continuation.
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any

GREEDY = 16  # tokens that a continuation starts from, and that it gets
START_SECONDS = 600.0


@dataclass(frozen=True)
class Answers:
    """What one model says of one text.

    logprobs  of each token but the first, given those before it
    greedy    ids that follow the first GREEDY tokens
    speed     tokens per second of the continuation; 0 where nobody asked
    """

    logprobs: Sequence[float]
    greedy: Sequence[int]
    speed: float

    def beside(self, exact: "Answers") -> str:
        """How far these are from another model's, in a sentence."""
        if any(value != value for value in self.logprobs):
            return f"{sum(value != value for value in self.logprobs)} log-probabilities are NaN"
        pairs = zip(self.logprobs, exact.logprobs, strict=True)
        away = sorted(abs(one - other) for one, other in pairs)
        alike = 0
        for one, other in zip(self.greedy, exact.greedy, strict=False):
            if one != other:
                break
            alike += 1
        return (
            f"log-probabilities {away[len(away) // 2]:.4f} away in the median, "
            f"{away[int(0.99 * (len(away) - 1))]:.4f} at the 99th percentile; {alike} of "
            f"{len(exact.greedy)} greedy tokens alike"
            + (f"; {self.speed:.1f} tokens per second" if self.speed else "")
        )


class Server:
    """A process that listens on a free port of this machine, until it is left."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = int(taken.getsockname()[1])
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self._environment = dict(environment)
        self._output: IO[bytes] = TemporaryFile()

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=self._output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._output.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def last_error(self) -> str:
        """The last line of its output that names an error."""
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        named = [line.strip() for line in lines if "Error: " in line]
        return (named or lines or ["it said nothing"])[-1][-200:]

    def resident_bytes(self) -> int:
        """Memory of the process and of those it started."""
        return sum(map(_resident, _family(self.process.pid)))


def _family(process: int) -> list[int]:
    file = Path(f"/proc/{process}/task/{process}/children")
    children = file.read_text().split() if file.exists() else []
    return [process, *(one for child in children for one in _family(int(child)))]


def _resident(process: int) -> int:
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def wait_for(server: Server, seconds: float = START_SECONDS) -> str:
    """Wait until it answers; why it does not, or "" if it does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            return server.last_error()
        try:
            urllib.request.urlopen(f"{server.address}/health", timeout=5).close()
            return ""
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(1.0)
    return f"no answer within {seconds:.0f} seconds"


def ask_all(address: str, model: str, tokens: Sequence[int]) -> Answers:
    """The log-probabilities of a text and the greedy continuation of its beginning."""
    read = ask(address, model, tokens, max_tokens=1, echo=True, logprobs=1)
    logprobs = read["logprobs"]["token_logprobs"][1 : len(tokens)]
    started = time.perf_counter()
    made = ask(address, model, tokens[:GREEDY], max_tokens=GREEDY, ignore_eos=True)
    seconds = time.perf_counter() - started
    ids = made["token_ids"]
    numbers = [float("nan") if value is None else float(value) for value in logprobs]
    return Answers(numbers, ids, len(ids) / seconds)


def ask(address: str, model: str, tokens: Sequence[int], **wanted: Any) -> dict[str, Any]:
    """The first choice of a completion."""
    body = {"model": model, "prompt": list(tokens), "temperature": 0.0, "return_token_ids": True}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps({**body, **wanted}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        choice: dict[str, Any] = json.load(answer)["choices"][0]
    return choice
