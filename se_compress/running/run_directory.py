"""The directories of a run: what is kept of an unfinished one, what may be reused, what is ours.

    OUTPUT.partial/    progress: run.json, profile.json, plan.json, saved states, and checkpoint/
    OUTPUT/            only ever a checkpoint that passed its gates; renamed into place in one step
    OUTPUT.rejected/   one that did not, with its report

With variants OUTPUT holds such three directories for each of them, and the comparison.

Progress that was damaged is dropped, named and made again (records.py).
"""

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from se_compress.artifacts import OURS, ValidationReport
from se_compress.errors import RecipeError
from se_compress.running.manifest import FILES_FILE, SETTINGS_FILE, foreign
from se_compress.running.places import check_directory, partial, rejected, shown
from se_compress.running.records import RunSettings, load, load_settings, save_settings

COMPARISON = "comparison."
LOCK, RUN = "lock", "run.json"
STAGED, REPLACED, MARK = "checkpoint", "replaced", "publishing.json"
VERSION_KEY = "the version of se-compress"
_DIRECTORIES = (STAGED, REPLACED)
_FILES = re.compile(
    rf"({LOCK}|{RUN}|profile\.json|plan\.json|{MARK}|(profile|compress)-states\.safetensors"
    r"|(profile|compress)-layer-\d+\.json)(\.writing)?"
)
LISTED_NAMES = 3

Notice = Callable[[str], None]


def profile_files(output: Path) -> list[Path]:
    """Where a profile may be, the latest first."""
    finished = [directory / OURS / "profile.json" for directory in (output, rejected(output))]
    return [partial(output) / "profile.json", *finished]


# ------------------------------------------------------------------------------------ what is ours


def check_output(output: Path) -> None:
    """A result can be put there, and what is there is ours.

    Nothing else is ever overwritten.

    Raises RecipeError.
    """
    for directory in (output, rejected(output), partial(output)):
        check_directory(directory)
        if os.path.lexists(directory) and not _is_ours(directory, directory == partial(output)):
            raise _not_ours(directory)
    strangers = strangers_in(partial(output))
    if strangers:
        raise _holds(partial(output), strangers)


def check_output_of_variants(output: Path) -> None:
    """The same for the directory of all variants.

    It holds results and their comparison only.
    """
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output {shown(output)} exists and is not a directory")
    for entry in output.iterdir() if output.exists() else ():
        if entry.name.startswith(COMPARISON) and entry.is_file():
            continue
        if not _is_ours(entry, entry.suffix == ".partial"):
            raise _not_ours(output)


def check_replaceable(output: Path, sources_files: Collection[str]) -> None:
    """Nothing would be lost if new results took the place of those that are there.

    sources_files   names of the files beside the model's weights: copies of them are no loss

    Raises RecipeError.
    """
    for directory in (output, rejected(output)):
        names = foreign(directory, sources_files)
        if names:
            raise _holds(directory, names)
    apart = load(ValidationReport, rejected(output) / OURS / "validation.json")
    if apart is not None and apart.passed:
        raise RecipeError(
            f"output {shown(rejected(output))}: holds a result that passed its gates, and a "
            "rejected one would replace it; move it away or choose another output"
        )


def _is_ours(directory: Path, work: bool) -> bool:
    """Whether a directory was made by us. True for an empty one, too.

    work   whether it is to hold progress rather than a result
    """
    if not directory.is_dir():
        return False
    if not any(directory.iterdir()):
        return True
    if work:
        known = load_settings(directory / RUN) or {}
        return os.path.lexists(directory / LOCK) or VERSION_KEY in known
    return any(os.path.lexists(directory / mark) for mark in (SETTINGS_FILE, FILES_FILE))


def _not_ours(directory: Path) -> RecipeError:
    return RecipeError(
        f"output {shown(directory)} exists and was not made by se-compress; "
        "choose another name or move it away"
    )


def _holds(directory: Path, names: list[str]) -> RecipeError:
    listed = ", ".join(shown(name) for name in names[:LISTED_NAMES])
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return RecipeError(
        f"output {shown(directory)}: holds {listed}{more}, which se-compress did not write and "
        "would remove; move that away or choose another output"
    )


def strangers_in(work: Path) -> list[str]:
    """Names in a work directory that are none of ours."""
    if not work.is_dir():
        return []
    return sorted(entry.name for entry in work.iterdir() if _kind_of(entry) is None)


def _kind_of(entry: Path) -> str | None:
    """What an entry of a work directory is meant to be, whatever it is. None if it is not ours.

    A directory with something in it is never taken for a damaged file.
    """
    if entry.name in _DIRECTORIES:
        return "directory"
    filled = entry.is_dir() and not entry.is_symlink() and any(entry.iterdir())
    return "file" if _FILES.fullmatch(entry.name) and not filled else None


def mend(work: Path, notice: Notice) -> None:
    """Remove what cannot be progress of ours.

    That is a directory or a link in place of a file, or a file in place of a directory.
    """
    for entry in work.iterdir():
        kind, mode = _kind_of(entry), entry.lstat().st_mode
        if kind is None or (stat.S_ISDIR if kind == "directory" else stat.S_ISREG)(mode):
            continue
        notice(f"{entry} is not a {kind}: removed")
        remove(entry)
    for entry in (work / STAGED).iterdir() if (work / STAGED).is_dir() else ():
        if entry.name != OURS and not stat.S_ISREG(entry.lstat().st_mode):
            notice(f"{entry} is not a file: removed")
            remove(entry)


def remove(entry: Path) -> None:
    """Remove a file, a link or a whole directory."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- one run at once


@contextmanager
def locked(output: Path, notice: Notice) -> Iterator[Path]:
    """The work directory, held by this process alone. Raises RecipeError."""
    work = partial(output)
    with _open_lock(work) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(work) from None
        except OSError as error:
            notice(
                f"{work}: this file system has no locks ({error.strerror}); "
                "see to it that no other run has this output"
            )
        if not _is_still(lock, work / LOCK):  # the run that held it has removed it
            raise _busy(work)
        yield work


def _open_lock(work: Path) -> TextIO:
    file = work / LOCK
    try:
        work.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
            remove(file)  # opening a pipe would wait for ever
        return file.open("w")
    except OSError as error:
        raise RecipeError(f"output {shown(work)}: cannot be written ({error.strerror})") from None


def _is_still(lock: TextIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except OSError:
        return False


def _busy(work: Path) -> RecipeError:
    return RecipeError(f"output {shown(work)}: another se-compress is working on it")


# ------------------------------------------------------------------------------- begin, and go on


def prepare(output: Path, settings: RunSettings, fresh: bool, notice: Notice) -> None:
    """Keep the saved progress if it was made from these settings, otherwise drop it.

    The finished profile has a digest of its own and may survive. What changed since the last run is
    named.
    """
    work = partial(output)
    mend(work, notice)
    saved = load_settings(work / RUN)
    if saved is None and (work / RUN).exists():
        notice(f"{work / RUN} cannot be read: the progress beside it is dropped")
    last = saved or load_settings(output / SETTINGS_FILE)
    last = last or load_settings(rejected(output) / SETTINGS_FILE) or settings.by_name
    for change in settings.changes_since(last):
        notice(change)
    if saved != settings.by_name or fresh:
        clear(work, (LOCK,) if fresh else (LOCK, "profile.json"))
    elif any(work.glob("*-states.safetensors")):
        notice(f"continuing from {work}")
    save_settings(work / RUN, settings.by_name)


def clear(work: Path, kept: Collection[str]) -> None:
    """Remove what is ours, but for the names in `kept`.

    The settings go first: without them, nothing that a kill may leave of the rest is continued
    from. Last goes what says that a result has been published.
    """
    (work / RUN).unlink(missing_ok=True)
    for entry in sorted(work.iterdir(), key=lambda entry: entry.name == MARK):
        if entry.name not in kept and _kind_of(entry):
            remove(entry)


def discard(work: Path) -> None:
    """Remove the work directory.

    Its lock goes last, as it is what makes the directory ours.
    """
    clear(work, (LOCK,))
    if [entry.name for entry in work.iterdir()] == [LOCK]:
        (work / LOCK).unlink()
        work.rmdir()
