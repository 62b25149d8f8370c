"""What the user sees: progress with ETA, notices, tables and the line that says what came out."""

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from se_compress.artifacts import ValidationReport
from se_compress.artifacts.targets import spoken
from se_compress.errors import printable
from se_compress.request import Outcome, Preview, Profiled, VariantsOutcome
from se_compress.running.preflight import in_units
from se_compress.tables import (
    comparison_table,
    curve_table,
    domains_table,
    gates_table,
    result_line,
    super_experts_table,
    what_to_ship,
)

# Seconds between two lines of progress of a stage, where there is no terminal.
LOG_EVERY = 10.0
# A narrower terminal breaks the lines of a table, which can be read; rich would cut its numbers,
# and print nothing at all where COLUMNS is 0, as some schedulers and containers have it.
LEAST_WIDTH = 60


def surviving(stream: TextIO | None, write: Callable[[], None]) -> bool:
    """Call `write`, which prints to `stream`; false if that is full. A reader that has gone
    (`| head`) has what it wanted."""
    try:
        write()
        if stream is not None:
            stream.flush()
    except OSError as error:
        _let_go(stream)
        if error.errno == errno.EPIPE:
            return True
        if stream is not sys.stderr:
            reason = f"se-compress: stdout cannot be written ({error.strerror})"
            surviving(sys.stderr, lambda: print(reason, file=sys.stderr))
        return False
    return True


def _let_go(stream: TextIO | None) -> None:
    """What is left in the buffer goes nowhere: Python's own flush at exit would fail again."""
    if stream is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Console(Console):
    """Shows text as it is: names of models, files and tensors are neither markup nor emoji, and
    steer no terminal."""

    def __init__(self, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        self.width = max(self.width, LEAST_WIDTH)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """rich would end the process here, with an exit code that says nothing of the result."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@dataclass
class Screen:
    """What the user sees: notices and progress on stderr, the result on stdout."""

    quiet: bool
    out: Console
    err: Console

    @classmethod
    def of(cls, quiet: bool, json: bool) -> "Screen":
        """With `json`, stdout is left to the one line that a program reads."""
        return cls(quiet, out=_Console(stderr=json), err=_Console(stderr=True))

    def notice(self, sentence: str) -> None:
        if not self.quiet:
            surviving(sys.stderr, lambda: self.err.print(sentence, soft_wrap=True))

    @contextmanager
    def progress(self, stop: threading.Event) -> Iterator[Callable[[str, int, int], None]]:
        """What stages call at each step. Raises KeyboardInterrupt there once `stop` is set."""
        lines = _LogLines(self.notice)
        bars = Progress(
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.err,
            disable=self.quiet or not self.err.is_terminal,
        )
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            if not self.err.is_terminal:
                lines.report(stage, done, total)
                return
            bars.start()  # not before: it leaves an empty line behind if nothing was ever shown
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        try:
            yield report
        finally:
            bars.stop()

    def show_previews(self, previews: Mapping[str, Preview]) -> None:
        for name, one in previews.items():
            self.show_preview(name, one)

    def show_result(self, outcome: Outcome | VariantsOutcome) -> None:
        if isinstance(outcome, Outcome):
            self.show_outcome(outcome)
        else:
            self.show_comparison(outcome)

    def show_preview(self, name: str, found: Preview) -> None:
        plan, source = found.plan, found.source
        title = f"{source.name}: what the plan would make" + (f" of {name}" if name else "")
        table = Table(title=title, title_justify="left")
        table.add_column("")
        table.add_column("source", justify="right")
        table.add_column("result", justify="right")
        table.add_row("size", in_units(source.size_bytes), in_units(plan.size_bytes))
        table.add_row("bits per expert weight", "16", f"{plan.bits_per_weight:.3f}")
        counts: dict[str, int] = {}
        for decision in plan.experts:
            pruned = decision.bits is None
            key = "experts pruned" if pruned else f"experts at {decision.bits} bits"
            if decision.down_bits is not None:
                key += f", down_proj at {decision.down_bits}"
            counts[key] = counts.get(key, 0) + 1
        for key, count in counts.items():
            table.add_row(key, "", str(count))
        known = (
            "not profiled yet" if found.profile is None else str(len(found.profile.super_experts))
        )
        table.add_row("super experts", known, "")
        if found.profile is not None:
            saved = f"{len(plan.rescued)} of {len(plan.protected)}"
            table.add_row("protected, and rescued by it", "", saved)
        if not self.quiet:
            self.out.print(table)
            if found.curve:
                self.out.print(curve_table(found.curve))
            for line in filter(None, (*found.serving, found.finest, found.memory)):
                self.out.print(line, soft_wrap=True)
            for note in (*plan.notes, *found.cautions):
                self.out.print(f"note: {note}", soft_wrap=True)
        self.out.print(
            f"{name or 'dry run'}: {in_units(source.size_bytes)} -> {in_units(plan.size_bytes)}, "
            f"{plan.bits_per_weight:.3f} bits per expert weight, target {spoken(plan.target)} can "
            "load it" + (f"; {found.shortage}" if found.shortage else ""),
            soft_wrap=True,
        )

    def show_profiles(self, found: Profiled) -> None:
        for name, profile in found.profiles.items():
            if not self.quiet:
                if profile.super_experts:
                    self.out.print(super_experts_table(profile, name))
                for note in profile.notes:
                    self.out.print(f"note: {note}", soft_wrap=True)
            one = profile.super_experts
            listed = f": {', '.join(str(expert.id) for expert in one)}" if one else ""
            self.out.print(
                f"{name or profile.model}: {len(one)} super expert{'' if len(one) == 1 else 's'}"
                f"{listed}; see {found.file(name).with_suffix('.html')}",
                soft_wrap=True,
            )
        if len(found.profiles) > 1:
            self.out.print(
                f"what they have in common: see {found.directory / 'stability.html'}",
                soft_wrap=True,
            )

    def show_outcome(self, outcome: Outcome) -> None:
        validation = outcome.validation
        if not self.quiet:
            self._print_gates(validation)
        self.out.print(result_line(outcome), soft_wrap=True)

    def show_validation(self, report: ValidationReport, directory: Path, place: Path) -> None:
        if not self.quiet:
            self._print_gates(report)
        verdict = "passed" if report.passed else "REJECTED"
        self.out.print(f"{directory}: {verdict}; see {place}", soft_wrap=True)

    def _print_gates(self, report: ValidationReport) -> None:
        self.out.print(gates_table(report))
        if report.domains:
            self.out.print(domains_table(report))

    def show_comparison(self, outcome: VariantsOutcome) -> None:
        if not self.quiet:
            self.out.print(comparison_table(outcome.comparison))
        for one in outcome.outcomes.values():
            self.out.print(result_line(one), soft_wrap=True)
        advice = what_to_ship(outcome.comparison)
        self.out.print(f"{outcome.directory}/comparison.html: {advice}", soft_wrap=True)


@dataclass
class _Stage:
    """`begun`, `told`: when it was first and last heard of; `first`: the step it began with."""

    begun: float
    told: float
    first: int
    last: int


@dataclass
class _LogLines:
    """Progress for a log: a line as a stage begins and ends, and every few seconds between."""

    write: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    stages: dict[str, _Stage] = field(default_factory=dict)

    def report(self, name: str, done: int, total: int) -> None:
        now = self.clock()
        stage = self.stages.get(name)
        if stage is None or done < stage.last:
            self.stages[name] = _Stage(now, now, done, done)
            self.write(f"{name}: {done}/{total} begins, memory {in_units(_resident())}")
            return
        again, stage.last = done == stage.last, done
        if again or (done < total and now < stage.told + LOG_EVERY):
            return
        stage.told = now
        elapsed = now - stage.begun
        ahead = elapsed / max(done - stage.first, 1) * (total - done)
        rest = f", ETA {_clock(ahead)}" if done < total else ", done"
        spent = f"elapsed {_clock(elapsed)}, memory {in_units(_resident())}"
        self.write(f"{name}: {done}/{total}{rest}, {spent}")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _resident() -> int:
    """Bytes of memory that this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)
