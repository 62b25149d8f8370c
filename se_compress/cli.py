"""The command line: arguments, progress with ETA, one table at the end, and the exit code."""

import errno
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
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

from se_compress import __version__
from se_compress.artifacts import Check, RunOptions, ValidationReport
from se_compress.errors import (
    INTERRUPTED_EXIT_CODE,
    RecipeError,
    ResourceError,
    SeCompressError,
    ValidationFailed,
)
from se_compress.pipeline import Outcome, Preview, Request, preview, run
from se_compress.recipe import load_recipe

_interrupted = threading.Event()
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"se-compress {__version__}")
        raise typer.Exit


@app.command()
def _command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")],
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write here, not to the recipe's output.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one key; repeatable."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use this plan.json, edited or not.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Sizes, budget and loadability; reads no weights.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore saved progress.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result line only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Let the libraries' own messages through.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Compress a Mixture-of-Experts checkpoint while its super experts stay provably intact.

    Exit codes: 0 exported, all gates passed; 2 bad command line or recipe; 3 model or data cannot
    be read; 4 a gate failed, nothing was published; 5 not enough memory or disk; 130 interrupted,
    progress is kept.
    """
    overrides = [*(settings or []), *([f"output={output}"] if output else [])]
    checked = load_recipe(recipe, overrides)
    screen = _Screen(quiet)
    request = Request(
        recipe=checked,
        recipe_text=recipe.read_text(encoding="utf-8"),
        plan_file=plan,
        fresh=fresh,
        notice=screen.notice,
    )
    if dry_run:
        screen.show_preview(preview(request))
        return
    with _hushed(verbose), screen.progress() as progress:
        options = RunOptions(device=_device(device), progress=progress)
        outcome = run(Request(**{**vars(request), "options": options}))
    screen.show_outcome(outcome)
    if not outcome.published:
        raise ValidationFailed(_why_rejected(outcome))


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Python drops an exception that is raised in a destructor or a callback, wherever the signal
    # happens to arrive: the next report of progress raises it again.
    _interrupted.set()
    raise KeyboardInterrupt


def _hide_interrupt(lost: "sys.UnraisableHookArgs") -> None:
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)


def main() -> None:
    """Run the command and exit with the contract's code; every foreseen error is one line."""
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _hide_interrupt
    # Spinning OpenMP threads waste most of their time when cores are shared with other work; this
    # has to be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False)
        if code == INTERRUPTED_EXIT_CODE:  # what typer makes of it
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except SeCompressError as error:
        _exit_with(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _exit_with(
            "interrupted; the same command continues where it stopped", INTERRUPTED_EXIT_CODE
        )
    except Exception as error:
        foreseen = _foreseen(error)
        if foreseen is None:
            raise
        _exit_with(str(foreseen), foreseen.exit_code)


def _exit_with(message: str, code: int) -> None:
    print(f"se-compress: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _foreseen(error: Exception) -> SeCompressError | None:
    """What a library's error means to the user; None if it is a bug."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or re.search(rf"\(os error ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\)", text):
        return ResourceError(f"the disk is full ({text}); progress is kept")
    exhausted = "can't allocate memory" in text or "CUDA out of memory" in text
    if isinstance(error, MemoryError) or exhausted:
        return ResourceError("memory is exhausted; lower calibration.samples; progress is kept")
    # Typer's usage errors have no public base class, but they all can say what is wrong.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        return RecipeError(f"{format_message()} (--help tells what is accepted)")
    return None


def _device(name: str) -> str:
    if name == "cpu":
        return name
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if match is None:
        raise RecipeError(f"--device {name}: accepted are auto, cpu, cuda and cuda:N")
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if count else "cpu"
    if int(match[1] or 0) >= count:
        raise RecipeError(f"--device {name}: torch sees {count} CUDA devices")
    return name


@contextmanager
def _hushed(verbose: bool) -> Iterator[None]:
    """Keep the libraries' warnings and progress bars off the terminal."""
    if verbose:
        yield
        return
    import logging

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@dataclass
class _Screen:
    """What the user sees: notices and progress on stderr, the result on stdout."""

    quiet: bool
    out: Console = field(default_factory=lambda: Console(highlight=False))
    err: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def notice(self, sentence: str) -> None:
        if not self.quiet:
            self.err.print(sentence, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        bars = Progress(
            TextColumn("{task.description:<10}"),
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
            if _interrupted.is_set():
                raise KeyboardInterrupt
            bars.start()  # not before: it leaves an empty line behind if nothing was ever shown
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        try:
            yield report
        finally:
            bars.stop()

    def show_preview(self, found: Preview) -> None:
        plan, source = found.plan, found.source
        table = Table(title=f"{source.name}: what the plan would make", title_justify="left")
        table.add_column("")
        table.add_column("source", justify="right")
        table.add_column("result", justify="right")
        table.add_row("size", _size(source.size_bytes), _size(plan.size_bytes))
        table.add_row("bits per expert weight", "16", f"{plan.bits_per_weight:.3f}")
        counts: dict[str, int] = {}
        for decision in plan.experts:
            key = f"experts at {decision.bits} bits"
            counts[key] = counts.get(key, 0) + 1
        for key, count in counts.items():
            table.add_row(key, "", str(count))
        known = (
            "not profiled yet" if found.profile is None else str(len(found.profile.super_experts))
        )
        table.add_row("super experts", known, "")
        if not self.quiet:
            self.out.print(table)
            for note in plan.notes:
                self.out.print(f"note: {note}", markup=False, soft_wrap=True)
        self.out.print(
            f"dry run: {_size(source.size_bytes)} -> {_size(plan.size_bytes)}, "
            f"{plan.bits_per_weight:.3f} bits per expert weight, target {plan.target} can load it",
            soft_wrap=True,
        )

    def show_outcome(self, outcome: Outcome) -> None:
        validation = outcome.validation
        if not self.quiet:
            self.out.print(_gates(validation))
        self.out.print(_result_line(outcome), markup=False, soft_wrap=True)


def _gates(validation: ValidationReport) -> Table:
    table = Table(title="gates", title_justify="left")
    for name, justify in (("gate", "left"), ("value", "right"), ("limit", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("verdict")
    for check in validation.checks:
        table.add_row(check.name, _number(check.value), _number(check.limit), _verdict(check))
    return table


def _verdict(check: Check) -> str:
    word = {True: "passed", False: "FAILED", None: "not run"}[check.passed]
    return word if check.passed else f"{word}: {check.detail}" if check.detail else word


def _result_line(outcome: Outcome) -> str:
    validation, plan = outcome.validation, outcome.plan
    return (
        f"{outcome.directory}: {'passed' if outcome.published else 'REJECTED'}, "
        f"{_size(validation.source_size_bytes)} -> {_size(validation.size_bytes)}, "
        f"{plan.bits_per_weight:.2f} bits per expert weight, "
        f"perplexity {validation.perplexity_source:.2f} -> {validation.perplexity_result:.2f}"
    )


def _why_rejected(outcome: Outcome) -> str:
    failed = [
        f"{check.name} is {_number(check.value)}, limit {_number(check.limit)}"
        + (f" ({check.detail})" if check.detail else "")
        for check in outcome.validation.checks
        if check.passed is False
    ]
    return f"nothing was published; {'; '.join(failed)}; report in {outcome.directory}/se_compress"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
