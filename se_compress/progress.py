"""The directories of a run: what is kept of an unfinished one, what may be reused, what is ours.

    OUTPUT.partial/    progress: run.json, profile.json, plan.json, saved states, and checkpoint/
    OUTPUT/            only ever a checkpoint that passed its gates; renamed into place in one step
    OUTPUT.rejected/   one that did not, with its report

With variants OUTPUT holds such three directories for each of them, and the comparison.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from se_compress.artifacts import OURS, Artifact, from_json, write_atomically
from se_compress.errors import RecipeError, SeCompressError

SETTINGS_FILE = f"{OURS}/run.json"
COMPARISON = "comparison."

Settings = Mapping[str, object]


def partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def rejected(output: Path) -> Path:
    return output.with_name(output.name + ".rejected")


def profile_files(output: Path) -> list[Path]:
    """Where a profile may be, the latest first."""
    finished = [directory / OURS / "profile.json" for directory in (output, rejected(output))]
    return [partial(output) / "profile.json", *finished]


def check_output(output: Path) -> None:
    """An output that exists must be one of ours: nothing else is ever overwritten."""
    marks = {output: SETTINGS_FILE, rejected(output): SETTINGS_FILE, partial(output): "lock"}
    for directory, mark in marks.items():
        if not directory.exists():
            continue
        if not directory.is_dir():
            raise RecipeError(f"output {directory} exists and is not a directory")
        if any(directory.iterdir()) and not (directory / mark).exists():
            raise _not_ours(directory)


def check_output_of_variants(output: Path) -> None:
    """The same for the directory of all variants, which holds results and their comparison only."""
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output {output} exists and is not a directory")
    for entry in output.iterdir() if output.exists() else ():
        if entry.name.startswith(COMPARISON) and entry.is_file():
            continue
        mark = "lock" if entry.suffix == ".partial" else SETTINGS_FILE
        empty = entry.is_dir() and not any(entry.iterdir())
        if not empty and not (entry / mark).exists():
            raise _not_ours(output)


def _not_ours(directory: Path) -> RecipeError:
    return RecipeError(
        f"output {directory} exists and was not made by se-compress; "
        "choose another name or move it away"
    )


@contextmanager
def locked(output: Path) -> Iterator[Path]:
    """The work directory, held by this process alone."""
    work = partial(output)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise RecipeError(f"output {work}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"output {work}: another se-compress is working on it") from None
        yield work


def prepare(output: Path, settings: Settings, fresh: bool, notice: Callable[[str], None]) -> None:
    """Keep the saved progress if it was made from these settings, otherwise drop it (the finished
    profile has a digest of its own and may survive); name what changed since the last run."""
    work = partial(output)
    saved = load_settings(work / "run.json")
    last = saved or load_settings(output / SETTINGS_FILE)
    last = last or load_settings(rejected(output) / SETTINGS_FILE) or settings
    for key in settings:
        if last.get(key) != settings[key]:
            change = f": {last.get(key)} -> {settings[key]}" if "the " not in key else ""
            notice(f"{key} changed{change}")
    if saved != settings or fresh:
        _clear(work, () if fresh else ("profile.json",))
    elif any(work.glob("*-states.safetensors")):
        notice(f"continuing from {work}")
    save_settings(work / "run.json", settings)


def _clear(work: Path, kept: tuple[str, ...]) -> None:
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in ("lock", *kept):
            entry.unlink()


def load_settings(file: Path) -> Settings | None:
    try:
        settings: Settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings


def save_settings(file: Path, settings: Settings) -> None:
    write_atomically(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def load(kind: type[Artifact], file: Path) -> Artifact | None:
    """A saved artefact; None if there is none or if an older version of the tool wrote it."""
    try:
        return from_json(kind, file.read_text(encoding="utf-8"), str(file))
    except (OSError, SeCompressError):
        return None


def publish(staged: Path, directory: Path, work: Path) -> None:
    """Rename a finished checkpoint into place; what was there (ours) is dropped with `work`."""
    if directory.exists():
        shutil.rmtree(work / "replaced", ignore_errors=True)
        directory.rename(work / "replaced")
    staged.rename(directory)
    shutil.rmtree(work, ignore_errors=True)
