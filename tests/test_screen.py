"""What the user sees: lines for a log, names that steer no terminal, and a stdout that is gone."""

import io
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from artefacts_example import example_comparison, example_validation
from rich.console import Console

from se_compress.artifacts import Check
from se_compress.pipeline import VariantsOutcome
from se_compress.screen import LOG_EVERY, Screen, _LogLines, surviving

EVIL = "\x1b]0;owned\x07\x1b[31m[red]x[/red] [/] :smile: \u202e\udcff"


def log(*calls: tuple[float, str, int, int]) -> list[str]:
    """The lines that these calls of progress make; the first of each is the time."""
    lines: list[str] = []
    now = [0.0]
    reporter = _LogLines(lines.append, clock=lambda: now[0])
    for at, stage, done, total in calls:
        now[0] = at
        reporter.report(stage, done, total)
    return [re.sub(r"[\d.]+ [MG]B", "SIZE", line) for line in lines]


def test_a_stage_has_a_line_as_it_begins_and_ends_and_every_few_seconds() -> None:
    steps = [(float(3 * step), "profile", step, 12) for step in range(13)]
    assert log(*steps) == [
        "profile: 0/12 begins, memory SIZE",
        "profile: 4/12, ETA 0:00:24, elapsed 0:00:12, memory SIZE",
        "profile: 8/12, ETA 0:00:12, elapsed 0:00:24, memory SIZE",
        "profile: 12/12, done, elapsed 0:00:36, memory SIZE",
    ]


def test_slow_steps_have_a_line_each_and_fast_ones_do_not_flood() -> None:
    slow = log(*((3600.0 * step, "compress", step, 3) for step in range(4)))
    assert len(slow) == 4
    assert slow[1] == "compress: 1/3, ETA 2:00:00, elapsed 1:00:00, memory SIZE"
    fast = log(*((0.001 * step, "compress", step, 5000) for step in range(5001)))
    assert len(fast) == 2
    assert LOG_EVERY >= 2


def test_a_run_that_continues_reckons_from_where_it_began() -> None:
    lines = log((0.0, "compress", 90, 100), (60.0, "compress", 92, 100))
    assert lines[1] == "compress: 92/100, ETA 0:04:00, elapsed 0:01:00, memory SIZE"


def test_stages_of_variants_and_repeated_stages_begin_anew() -> None:
    lines = log(
        (0.0, "a: compress", 0, 1),
        (1.0, "a: compress", 1, 1),
        (1.0, "a: compress", 1, 1),
        (2.0, "b: compress", 0, 1),
        (9.0, "a: compress", 0, 1),
    )
    assert [line.partition(",")[0] for line in lines] == [
        "a: compress: 0/1 begins", "a: compress: 1/1", "b: compress: 0/1 begins",
        "a: compress: 0/1 begins",
    ]  # fmt: skip


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, lines in ((True, 0), (False, 2)):
        with Screen.of(quiet, json=False).progress(threading.Event()) as report:
            report("profile", 0, 1)
            report("profile", 1, 1)
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", lines)


def test_a_terminal_has_bars_and_no_lines() -> None:
    screen = Screen.of(quiet=False, json=False)
    screen.err = Console(file=io.StringIO(), force_terminal=True, width=100)
    with screen.progress(threading.Event()) as report:
        report("profile", 0, 1)
        report("profile", 1, 1)
    shown = screen.err.file.getvalue()  # type: ignore[attr-defined]
    assert "1/1" in shown
    assert "memory" not in shown


def test_names_are_shown_as_they_are_and_steer_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = Check("kl_divergence", 0.5, 0.1, False, EVIL)
    report = replace(example_validation(), checks=(check,))
    comparison = example_comparison()
    screen = Screen.of(quiet=False, json=False)
    screen.notice(EVIL)
    screen.show_validation(report, Path(EVIL), Path(EVIL))
    screen.show_comparison(VariantsOutcome(Path(EVIL), {}, comparison))
    out, err = capsys.readouterr()
    assert "[red]x[/red] [/] :smile:" in err
    assert r"\x1b]0;owned\x07" in err
    assert r"\x1b]0;owned\x07" in out
    for text in (out, err):
        assert not {"\x1b", "\x07", "\u202e", "\udcff"} & set(text)


# --------------------------------------------------------------------------- a stdout that is gone

TELL = """
import sys
from se_compress import cli
from se_compress.artifacts import RunResult
sys.argv = ["se-compress", "r.yaml", *sys.argv[1:]]
def command(*arguments, **options):
    result, json = RunResult(OUTCOME), "--json" in sys.argv
    screen = cli.Screen.of(False, json)
    return cli._tell(result, lambda: screen.out.print("x" * 100_000), json)
cli.typer.main.get_command = lambda app: type("Command", (), {"main": command, "params": []})()
cli.main()
"""


@pytest.mark.parametrize("flags", ["", "--json"])
@pytest.mark.parametrize("gone", ["| head -c 1 > /dev/null", "> /dev/full", ">&-"])
@pytest.mark.parametrize(
    ("outcome", "code"),
    [('"published", 0', 0), ('"rejected", 4, "gate"', 4), ('"validated", 0', 0)],
)
def test_the_result_decides_the_exit_code(outcome: str, code: int, gone: str, flags: str) -> None:
    done = shell(TELL.replace("OUTCOME", outcome), f"{flags} {gone}")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if "full" in gone:
        assert "se-compress: stdout cannot be written (No space left on device)" in done.stderr


def test_a_plan_that_cannot_be_written_is_none() -> None:
    done = shell(TELL.replace("OUTCOME", '"planned", 0'), "> /dev/full")
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1] == (
        "se-compress: the plan cannot be written to stdout: its disk is full"
    )
    assert shell(TELL.replace("OUTCOME", '"planned", 0'), "| true").returncode == 0


def shell(code: str, redirection: str) -> "subprocess.CompletedProcess[str]":
    script = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", script, sys.executable, code], capture_output=True, text=True, check=False
    )


def test_a_log_that_is_gone_does_not_end_the_run() -> None:
    code = (
        "import time\nfrom se_compress.screen import Screen\n"
        "screen = Screen.of(False, False)\n"
        "for _ in range(3):\n    screen.notice('x' * 100000)\n    time.sleep(0.1)\n"
        "print('published')"
    )
    script = '"$0" -c "$1" 2> >(true); echo $?'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, code], capture_output=True, text=True, check=False
    )
    assert done.stdout == "published\n0\n"
    full = subprocess.run(
        ["bash", "-c", script.replace(">(true)", "/dev/full"), sys.executable, code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert full.stdout == "published\n0\n"


def test_another_error_is_not_taken_for_a_full_stdout() -> None:
    def broken() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        surviving(sys.stdout, broken)


@pytest.mark.parametrize("columns", ["0", "1", "20", "-1", "x"])
def test_no_width_of_a_terminal_cuts_or_hides_a_number(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    report = example_validation()
    Screen.of(quiet=False, json=False).show_validation(report, Path("out"), Path("place"))
    shown = capsys.readouterr().out
    assert "out: passed; see place" in shown
    for check in report.checks:
        assert check.value is None or f"{check.value:.4g}" in shown
        assert check.limit is None or f"{check.limit:.4g}" in shown
