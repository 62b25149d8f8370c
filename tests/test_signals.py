"""SIGINT, SIGTERM and SIGHUP end a run in order, once each, and with codes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from se_compress import signals

# A command that waits in the middle, as main() runs it: `sleep` stands for the work, with a child
# and a scratch directory as the loading of a result has them.
WORKS = """
import hashlib, os, signal, subprocess, sys, tempfile, threading, time
from se_compress import cli, pipeline
# Whoever runs these tests may ignore SIGHUP, and children inherit that.
nohup = sys.argv.pop(1) == "nohup"
signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
def work(*arguments):
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        print(scratch, flush=True)
        how = os.environ["HOW"]
        if how == "child":
            subprocess.run(["sleep", "1000"], capture_output=True, check=False)
        elif how == "converted":
            try: time.sleep(1000)
            except BaseException: raise RuntimeError("something from C") from None
        elif how == "cleans slowly":
            try: time.sleep(1000)
            finally: time.sleep(0.6)
        elif how == "never ends":
            try: time.sleep(1000)
            finally: threading.Event().wait()  # as a thread of a library may be waited for
        elif how == "forks":
            for _ in range(2):
                if not (child := os.fork()):
                    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
                    while True: signal.pause()
                time.sleep(0.1)
                os.kill(child, signal.SIGTERM)
                os.waitpid(child, 0)
                time.sleep(1.2)
        elif how == "in C":
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # a call that gives way to no handler
        time.sleep(2)
cli.run = work
cli.main()
"""
RECIPE = """
model: m
output: out
target: transformers
calibration: {data: text.txt}
validation: {data: text.txt}
"""


def start(place: Path, how: str, *words: str, nohup: str = "") -> subprocess.Popen[str]:
    (place / "r.yaml").write_text(RECIPE, encoding="utf-8")
    started = subprocess.Popen(
        [sys.executable, "-c", WORKS, nohup or "plain", "r.yaml", "--device", "cpu", *words],
        cwd=place,
        env={**os.environ, "HOW": how},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout
    started.stdout.readline()  # it works now
    time.sleep(0.1)
    return started


@pytest.mark.parametrize(
    ("number", "word"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up")],
)
@pytest.mark.parametrize("how", ["child", "converted"])
def test_a_signal_ends_it_in_order(
    tmp_path: Path, number: signal.Signals, word: str, how: str
) -> None:
    started = start(tmp_path, how, "--json")
    started.send_signal(number)
    out, err = started.communicate(timeout=30)
    message = f"{word}; the same command continues where it stopped"
    assert (started.returncode, err) == (128 + number, f"se-compress: {message}\n")
    assert f'"exit_code": {128 + number}, "message": "{message}"' in out
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.yaml"]


def test_a_child_does_not_outlive_it(tmp_path: Path) -> None:
    started = start(tmp_path, "child")
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert children
    started.terminate()
    started.communicate(timeout=30)
    # the kernel ends them; whoever inherits them has to take note before they leave /proc
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM] * 3, [signal.SIGHUP, signal.SIGTERM]])
def test_several_signals_are_one_request(tmp_path: Path, numbers: list[signal.Signals]) -> None:
    started = start(tmp_path, "cleans slowly")
    for number in numbers:
        started.send_signal(number)
        time.sleep(0.2)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 128 + numbers[0]
    assert len(err.splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("how", ["never ends", "in C"])
def test_a_second_request_ends_it_at_once(tmp_path: Path, how: str) -> None:
    """Whatever it is doing: the first has it clean up, or waits for what gives way to no signal."""
    started = start(tmp_path, how, "--json")
    started.terminate()
    time.sleep(signals.ONE_REQUEST_SECONDS + 0.2)
    assert started.poll() is None
    started.terminate()
    out, err = started.communicate(timeout=10)
    message = "terminated; the same command continues where it stopped"
    assert (started.returncode, err) == (143, f"se-compress: {message}\n")
    assert f'"exit_code": 143, "message": "{message}"' in out


def test_what_ends_a_child_is_no_request_to_this_process(tmp_path: Path) -> None:
    """A fork of it, as the chat template's is, has its pipe too."""
    started = start(tmp_path, "forks")
    _, err = started.communicate(timeout=30)
    assert started.returncode == 1, err  # it came to the end of what stands for the work
    assert "terminated" not in err


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    started = start(tmp_path, "waits", nohup="nohup")
    started.send_signal(signal.SIGHUP)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 1  # it came to the end of what stands for the work
    assert "hung up" not in err
