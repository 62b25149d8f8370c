"""The command line: arguments, signals and the exit code. What is shown is in screen.py."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from se_compress import __version__, run_result, signals
from se_compress.artifacts import ALONE, RunOptions, RunResult, to_json_line
from se_compress.errors import (
    INTERRUPTED_EXIT_CODE,
    MESSAGE_LENGTH,
    RecipeError,
    ResourceError,
    SeCompressError,
    printable,
    shorten,
)
from se_compress.pipeline import (
    judge_existing,
    preview,
    preview_variants,
    run,
    run_variants,
)
from se_compress.profile_mode import profile_only
from se_compress.recipe import read_recipe, recipe_of
from se_compress.request import Outcome, Request
from se_compress.running.faults import foreseen
from se_compress.running.memory import give_back_at_once
from se_compress.running.places import profiled
from se_compress.running.ranks import RankLost, dismiss, follow, join, leads, local_device
from se_compress.screen import Screen, surviving
from se_compress.tracking import tracked
from se_compress.uploading import check_hub, push

# What takes seconds to import, and every rank needs: while rank 0 reads the recipe and the source.
NEEDED_BY_STAGES = (
    "se_compress.profiling.profiler",
    "se_compress.compression.execute",
    "se_compress.validation.validator",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _show_version(asked: bool) -> None:
    if asked:
        surviving(sys.stdout, lambda: print(f"se-compress {__version__}"))
        raise typer.Exit


def _show_help(context: typer.Context, asked: bool) -> None:
    if asked:
        surviving(sys.stdout, lambda: print(context.get_help()))
        raise typer.Exit


@app.command(add_help_option=False)
def _command(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")],
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write here, not to the recipe's output.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one key; repeatable."),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(metavar="FILE", help="Use this plan.json, edited or not.")
    ] = None,
    validate: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Judge this checkpoint by the recipe; compress nothing."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Find the super experts; compress nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Sizes, budget and loadability; reads no weights.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore saved progress.")] = False,
    keep_remote_code: Annotated[
        bool,
        typer.Option("--keep-remote-code", help="The result keeps auto_map and the code it names."),
    ] = False,
    mlflow: Annotated[
        str | None, typer.Option(metavar="URI", help="Log the run there; needs the extra mlflow.")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload a result that passed (private if new)."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    hidden_states: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep hidden states in files there, not in memory."),
    ] = None,
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
    help: Annotated[
        bool,
        typer.Option(
            "--help", callback=_show_help, is_eager=True, help="Show this message and exit."
        ),
    ] = False,
) -> int:
    """Compress a Mixture-of-Experts checkpoint while its super experts stay provably intact.

    Exit codes: 0 exported, all gates passed (or planned, or profiled); 2 bad command line or
    recipe; 3 model or data cannot be read; 4 a gate failed, nothing was published; 5 not enough
    memory or disk; 130 interrupted, 143 terminated (SIGTERM), 129 hung up (SIGHUP): progress is
    kept.
    """
    _check_here()
    recipe_file = _path("RECIPE", recipe)
    text = read_recipe(recipe_file)
    elsewhere = validate is not None or profile  # --output is then where the verdict goes
    checked = recipe_of(text, recipe, settings or (), None if elsewhere else output)
    screen, states_in = Screen.of(quiet, json), _directory("--hidden-states", hidden_states)
    request = Request(
        recipe=checked,
        recipe_text=text,
        plan_file=None if plan is None else _path("--plan", plan),
        fresh=fresh,
        notice=screen.notice,
        keep_code=keep_remote_code,
        recipe_file=recipe_file,
        options=RunOptions(states_in=states_in),
    )
    if validate is not None and (plan is not None or dry_run):
        raise RecipeError("--validate: goes with neither --plan nor --dry-run")
    if profile and (plan is not None or dry_run or validate is not None):
        raise RecipeError("--profile: goes with none of --plan, --dry-run and --validate")
    if (mlflow or push_to_hub) and (dry_run or validate is not None):
        raise RecipeError("--mlflow, --push-to-hub: go with neither --dry-run nor --validate")
    if push_to_hub and (profile or checked.variants):
        raise RecipeError("--push-to-hub: takes one result, so neither --profile nor variants")
    if dry_run:
        previews = preview_variants(request) if checked.variants else {"": preview(request)}
        result, show = run_result.planned(previews), partial(screen.show_previews, previews)
    elif validate is not None:
        judged = _path("--validate", validate)
        place = _beside(judged) if output is None else _path("--output", output)
        with _hushed(verbose), screen.progress(signals.stopped) as progress:
            options = _options(device, states_in, progress)
            report = judge_existing(replace(request, options=options), judged, place)
        result = run_result.validated(report, judged, place)
        show = partial(screen.show_validation, report, judged, place)
    elif profile:
        place = profiled(request.output) if output is None else _path("--output", output)
        with (
            _hushed(verbose),
            tracked(mlflow, checked, screen.notice) as log,
            screen.progress(signals.stopped) as progress,
        ):
            options = _options(device, states_in, progress)
            measured = profile_only(replace(request, options=options), place)
            log(measured)
        result, show = run_result.profiled(measured), partial(screen.show_profiles, measured)
    else:
        if push_to_hub:
            check_hub(push_to_hub)
        with (
            _hushed(verbose),
            tracked(mlflow, checked, screen.notice) as log,
            screen.progress(signals.stopped) as progress,
        ):
            options = _options(device, states_in, progress)
            request = replace(request, options=options)
            outcome = run_variants(request) if checked.variants else run(request)
            log(outcome)
        if push_to_hub and isinstance(outcome, Outcome) and outcome.published:
            with _hushed(verbose):
                screen.notice(f"uploaded to {push(outcome, push_to_hub)}")
        result, show = run_result.finished(outcome), partial(screen.show_result, outcome)
    return _tell(result, show, json)


def _check_here() -> None:
    """No path means anything in a directory that has been removed. Raises RecipeError."""
    try:
        os.getcwd()
    except OSError as error:
        raise RecipeError(
            f"the current directory is gone ({error.strerror}); start from one that is there"
        ) from None


def _options(
    device: str, states_in: Path | None, progress: Callable[[str, int, int], None]
) -> RunOptions:
    ranks, found = join(), _device(device)
    here = local_device(found) if ranks.count > 1 else found
    if states_in is not None:
        if here != "cpu":
            raise RecipeError("--hidden-states: goes with --device cpu only")
        give_back_at_once()
    return RunOptions(device=here, progress=progress, ranks=ranks, states_in=states_in)


def _directory(name: str, text: str | None) -> Path | None:
    """A directory that files can be made in. Raises RecipeError."""
    if text is None:
        return None
    path = _path(name, text)
    if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
        raise RecipeError(f"{name} {path}: a directory that can be written to is needed")
    return path


def _path(name: str, text: str) -> Path:
    if not text:
        raise RecipeError(f"{name} is '': a path is needed")
    return Path(text)


def _beside(directory: Path) -> Path:
    """Directory for the verdict on a checkpoint, unless told."""
    named = directory if directory.name not in ("", "..") else directory.resolve()
    if not named.name:
        raise RecipeError(f"--validate {directory}: give --output DIR for the verdict as well")
    return named.with_name(f"{named.name}.validation")


def _tell(result: RunResult, show: Callable[[], None], json: bool) -> int:
    """Show what came out, and return the exit code of the process.

    A stdout that takes no more does not undo what was made: its exit code stays.
    """
    told = surviving(sys.stderr if json else sys.stdout, show)
    if result.exit_code:
        signals.ignore()  # it is done
        _print_message(result.message)
    if json:
        told = surviving(sys.stdout, lambda: print(to_json_line(result)))
    if not told and result.outcome == "planned":
        raise ResourceError("the plan cannot be written to stdout: its disk is full")
    return result.exit_code


def main() -> None:
    """Run the command and exit with the contract's code.

    Every foreseen error is one line.
    """
    for stream in (sys.stdout, sys.stderr):  # names need not be of the terminal's encoding
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signals.listen(_tell_failure)
    # Spinning OpenMP threads waste most of their time when cores are shared with other work; this
    # has to be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = typer.main.get_command(app)
    ranks = ALONE
    try:
        ranks = join()
        if ranks.rank:
            with _hushed(verbose=False):
                for name in NEEDED_BY_STAGES:
                    import_module(name)
                sys.exit(follow(ranks))
        code = command.main(standalone_mode=False)
        if code == INTERRUPTED_EXIT_CODE:  # what typer makes of it
            raise KeyboardInterrupt
        signals.ignore()  # it is done
        dismiss(ranks, code or 0)
        sys.exit(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        _fail(*signals.reason())
    except Exception as error:
        if signals.stopped.is_set():  # and what it raised was taken for something else
            _fail(*signals.reason())
        known = error if isinstance(error, SeCompressError) else _usage_error(error)
        known = known or foreseen(error)
        code = known.exit_code if known else SeCompressError.exit_code
        if not isinstance(known, RankLost):
            dismiss(ranks, code)
        if known is None:
            raise
        _fail(str(known), code)


def _usage_error(error: Exception) -> RecipeError | None:
    """What is wrong with the command line. None if the error is not typer's.

    Its usage errors have no public base class, but all can say what is wrong.
    """
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    return RecipeError(f"{format_message()} (--help tells what is accepted)")


def _fail(message: str, code: int) -> NoReturn:
    """End the process without a result."""
    signals.ignore()
    _tell_failure(message, code)
    sys.exit(code)


def _tell_failure(message: str, code: int) -> None:
    if not leads():
        return
    message = _print_message(message)
    if _wants_json(sys.argv[1:]):
        line = to_json_line(RunResult("failed", code, message))
        surviving(sys.stdout, lambda: print(line))


def _print_message(message: str) -> str:
    """Print the line on stderr that goes with an exit code, and return it."""
    message = shorten(printable(" ".join(message.split())), 4 * MESSAGE_LENGTH)
    surviving(sys.stderr, lambda: print(f"se-compress: {message}", file=sys.stderr))
    return message


def _wants_json(words: Sequence[str]) -> bool:
    """Whether --json stands among the words as a flag, also where they cannot be parsed.

    What follows a flag with a value is the value, whatever it looks like.
    """
    options = typer.main.get_command(app).params
    valued = {name for option in options if not getattr(option, "is_flag", True)
              for name in option.opts}  # fmt: skip
    rest = iter(words)
    for word in rest:
        if word in ("--", "--json"):
            return word == "--json"
        if word in valued:
            next(rest, None)
    return False


def _device(name: str) -> str:
    """The device that is meant, as torch names it. Raises RecipeError if it is not there."""
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
