"""The command line: arguments, progress with ETA, one table at the end, and the exit code."""

import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
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

from se_compress import __version__, signals
from se_compress.artifacts import (
    Check,
    Comparison,
    CurvePoint,
    PlanSummary,
    RunOptions,
    RunResult,
    ValidationReport,
    to_json_line,
)
from se_compress.errors import (
    INTERRUPTED_EXIT_CODE,
    RecipeError,
    ResourceError,
    SeCompressError,
    ValidationFailed,
)
from se_compress.pipeline import (
    Outcome,
    Preview,
    Request,
    VariantsOutcome,
    judge_existing,
    preview,
    preview_variants,
    run,
    run_variants,
)
from se_compress.recipe import load_recipe

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
    validate: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Judge this checkpoint by the recipe; compress nothing."),
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
    json: Annotated[
        bool, typer.Option("--json", help="On stdout one line of JSON, the rest on stderr.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Compress a Mixture-of-Experts checkpoint while its super experts stay provably intact.

    Exit codes: 0 exported, all gates passed; 2 bad command line or recipe; 3 model or data cannot
    be read; 4 a gate failed, nothing was published; 5 not enough memory or disk; 130 interrupted,
    143 terminated (SIGTERM), 129 hung up (SIGHUP): progress is kept.
    """
    overrides = [*(settings or []), *([f"output={output}"] if output else [])]
    checked = load_recipe(recipe, overrides)
    screen = _Screen(quiet, out=Console(stderr=json, highlight=False))
    request = Request(
        recipe=checked,
        recipe_text=recipe.read_text(encoding="utf-8"),
        plan_file=plan,
        fresh=fresh,
        notice=screen.notice,
        recipe_file=recipe,
    )
    if validate is not None and (plan is not None or dry_run):
        raise RecipeError("--validate: goes with neither --plan nor --dry-run")
    if dry_run:
        result = _plan_only(request, screen)
    elif validate is not None:
        with _hushed(verbose), screen.progress() as progress:
            options = RunOptions(device=_device(device), progress=progress)
            place = Path(output) if output else validate.with_name(f"{validate.name}.validation")
            report = judge_existing(replace(request, options=options), validate, place)
        result = _finish_validation(report, validate, place, screen)
    else:
        with _hushed(verbose), screen.progress() as progress:
            options = RunOptions(device=_device(device), progress=progress)
            request = replace(request, options=options)
            outcome = run_variants(request) if checked.variants else run(request)
        result = _finish(outcome, screen)
    if result.message:
        raise _Rejected(result)
    if json:
        print(to_json_line(result))


class _Rejected(ValidationFailed):
    """Carries what `--json` tells of a rejected result."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(result.message)
        self.result = result


def _plan_only(request: Request, screen: "_Screen") -> RunResult:
    variants = request.recipe.variants
    found = preview_variants(request) if variants else {"": preview(request)}
    plans = []
    for name, one in found.items():
        screen.show_preview(name, one)
        plan = one.plan
        plans.append(
            PlanSummary(
                name=name,
                target=plan.target,
                method=plan.scheme.method,
                size_bytes=plan.size_bytes,
                source_size_bytes=plan.source_size_bytes,
                bits_per_weight=plan.bits_per_weight,
                curve=one.curve,
            )
        )
    return RunResult("planned", 0, plans=tuple(plans))


def _finish(outcome: Outcome | VariantsOutcome, screen: "_Screen") -> RunResult:
    """Show what came out, and put it into one record."""
    if isinstance(outcome, Outcome):
        screen.show_outcome(outcome)
        message = "" if outcome.published else _why_rejected(outcome)
        checkpoints, comparison = [outcome.summary("", str(outcome.directory))], None
    else:
        screen.show_comparison(outcome)
        message = _why_variants_rejected(outcome)
        checkpoints = [
            one.summary(name, str(one.directory)) for name, one in outcome.outcomes.items()
        ]
        comparison = str(outcome.directory / "comparison.json")
    return RunResult(
        outcome="rejected" if message else "published",
        exit_code=ValidationFailed.exit_code if message else 0,
        message=message,
        comparison=comparison,
        checkpoints=tuple(checkpoints),
    )


def _finish_validation(
    report: ValidationReport, directory: Path, place: Path, screen: "_Screen"
) -> RunResult:
    screen.show_validation(report, directory, place)
    failed = f"{directory}: {_failed_gates(report)}; report in {place}"
    return RunResult(
        outcome="validated" if report.passed else "rejected",
        exit_code=0 if report.passed else ValidationFailed.exit_code,
        message="" if report.passed else failed,
        validation=str(place / "validation.json"),
    )


def main() -> None:
    """Run the command and exit with the contract's code; every foreseen error is one line."""
    signals.listen()
    # Spinning OpenMP threads waste most of their time when cores are shared with other work; this
    # has to be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False)
        if code == INTERRUPTED_EXIT_CODE:  # what typer makes of it
            raise KeyboardInterrupt
        signals.ignore()  # it is done
        sys.exit(code or 0)
    except _Rejected as error:
        _exit_with(str(error), error.exit_code, error.result)
    except (KeyboardInterrupt, typer.Abort):
        _exit_with(*signals.reason())
    except Exception as error:
        if signals.stopped.is_set():  # and what it raised was taken for something else
            _exit_with(*signals.reason())
        foreseen = error if isinstance(error, SeCompressError) else _foreseen(error)
        if foreseen is None:
            raise
        _exit_with(str(foreseen), foreseen.exit_code)


def _exit_with(message: str, code: int, result: RunResult | None = None) -> None:
    signals.ignore()
    message = " ".join(message.split())
    print(f"se-compress: {message}", file=sys.stderr)
    if "--json" in sys.argv[1:]:  # also where the command line itself could not be read
        print(to_json_line(result or RunResult("failed", code, message)))
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
            if signals.stopped.is_set():
                raise KeyboardInterrupt
            bars.start()  # not before: it leaves an empty line behind if nothing was ever shown
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        try:
            yield report
        finally:
            bars.stop()

    def show_preview(self, name: str, found: Preview) -> None:
        plan, source = found.plan, found.source
        title = f"{source.name}: what the plan would make" + (f" of {name}" if name else "")
        table = Table(title=title, title_justify="left")
        table.add_column("")
        table.add_column("source", justify="right")
        table.add_column("result", justify="right")
        table.add_row("size", _size(source.size_bytes), _size(plan.size_bytes))
        table.add_row("bits per expert weight", "16", f"{plan.bits_per_weight:.3f}")
        counts: dict[str, int] = {}
        for decision in plan.experts:
            key = f"experts at {decision.bits} bits"
            if decision.down_bits is not None:
                key += f", down_proj at {decision.down_bits}"
            counts[key] = counts.get(key, 0) + 1
        for key, count in counts.items():
            table.add_row(key, "", str(count))
        known = (
            "not profiled yet" if found.profile is None else str(len(found.profile.super_experts))
        )
        table.add_row("super experts", known, "")
        if not self.quiet:
            self.out.print(table)
            if found.curve:
                self.out.print(_curve(found.curve))
            for note in plan.notes:
                self.out.print(f"note: {note}", markup=False, soft_wrap=True)
        self.out.print(
            f"{name or 'dry run'}: {_size(source.size_bytes)} -> {_size(plan.size_bytes)}, "
            f"{plan.bits_per_weight:.3f} bits per expert weight, target {plan.target} can load it",
            markup=False,
            soft_wrap=True,
        )

    def show_outcome(self, outcome: Outcome) -> None:
        validation = outcome.validation
        if not self.quiet:
            self.out.print(_gates(validation))
        self.out.print(_result_line(outcome), markup=False, soft_wrap=True)

    def show_validation(self, report: ValidationReport, directory: Path, place: Path) -> None:
        if not self.quiet:
            self.out.print(_gates(report))
        verdict = "passed" if report.passed else "REJECTED"
        self.out.print(f"{directory}: {verdict}; see {place}", markup=False, soft_wrap=True)

    def show_comparison(self, outcome: VariantsOutcome) -> None:
        if not self.quiet:
            self.out.print(_comparison(outcome.comparison))
        for one in outcome.outcomes.values():
            self.out.print(_result_line(one), markup=False, soft_wrap=True)
        advice = outcome.comparison.recommended
        self.out.print(
            f"{outcome.directory}/comparison.html: "
            + (f"ship {advice}" if advice else "nothing to ship, no variant passed its gates"),
            markup=False,
            soft_wrap=True,
        )


def _comparison(comparison: Comparison) -> Table:
    table = Table(title="variants", title_justify="left")
    table.add_column("variant")
    for name in ("size", "bits", "KL divergence", "perplexity"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_row("source", _size(comparison.size_bytes), "16", "", _number(comparison.perplexity))
    for variant in comparison.variants:
        one = variant.checkpoint
        check = one.by_name.get("kl_divergence")
        table.add_row(
            one.name,
            _size(one.size_bytes),
            f"{one.bits_per_weight:.2f}",
            _number(check.value if check else None),
            _number(one.perplexity_result),
            "passed" if one.published else "REJECTED",
        )
    return table


def _curve(points: Sequence[CurvePoint]) -> Table:
    """What other budgets would buy, the cheapest first."""
    table = Table(title="other budgets, protection as it is", title_justify="left")
    table.add_column("widths")
    for name in ("size", "bits per expert weight", "predicted loss"):
        table.add_column(name, justify="right")
    for point in points:
        widths = ", ".join(map(str, point.widths))
        label = f"{widths} mixed" if len(point.widths) > 1 else f"{widths} for all"
        bits = f"{point.bits_per_weight:.3f}"
        table.add_row(label, _size(point.size_bytes), bits, _number(point.predicted_loss))
    return table


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
    measured = f"{validation.perplexity_source:.2f} -> {validation.perplexity_result:.2f}"
    return (
        f"{outcome.directory}: {'passed' if outcome.published else 'REJECTED'}, "
        f"{_size(validation.source_size_bytes)} -> {_size(validation.size_bytes)}, "
        f"{plan.bits_per_weight:.2f} bits per expert weight, "
        f"perplexity {measured if validation.tokens else 'not measured'}"
    )


def _why_rejected(outcome: Outcome) -> str:
    failed = _failed_gates(outcome.validation)
    return f"nothing was published; {failed}; report in {outcome.directory}/se_compress"


def _failed_gates(validation: ValidationReport) -> str:
    return "; ".join(
        f"{check.name} is {_number(check.value)}, limit {_number(check.limit)}"
        + (f" ({check.detail})" if check.detail else "")
        for check in validation.checks
        if check.passed is False
    )


def _why_variants_rejected(outcome: VariantsOutcome) -> str:
    """ "" if nothing that has to pass was rejected."""
    if outcome.comparison.passed:
        return ""
    report = f"see {outcome.directory}/comparison.html"
    if outcome.comparison.recommended is None:
        return (
            f"nothing was published; all {len(outcome.outcomes)} variants were rejected; {report}"
        )
    failed = [
        f"variant {name} was rejected: {_failed_gates(outcome.outcomes[name].validation)}"
        for name in outcome.comparison.required
        if not outcome.outcomes[name].published
    ]
    return f"{'; '.join(failed)}; require names it, the others are published; {report}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
