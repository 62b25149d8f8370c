"""Put a finished result into its place so that no moment is without one.

The result that was there and the new one change places in a single step, where the file system can
do that. Elsewhere the old one goes into the work directory first.

What is to happen is written down before, so that a run which finds it half done knows what to do:
an earlier result whose successor is not in its place is put back before anything is removed.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from se_compress.artifacts import OURS, ValidationReport, write_atomically
from se_compress.errors import RecipeError, ResourceError
from se_compress.running.manifest import FILES_FILE, sync
from se_compress.running.places import partial, rejected, shown
from se_compress.running.records import load, load_settings
from se_compress.running.run_directory import LOCK, MARK, REPLACED, RUN, STAGED, discard, remove

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def publish(staged: Path, directory: Path, work: Path) -> None:
    """Move a finished checkpoint into place.

    staged      the checkpoint, in `work`
    directory   its place; a result of ours that is there is dropped with `work`

    Raises ResourceError, with the checkpoint kept, if it cannot be moved.
    """
    mark = {"directory": directory.name, "files": _list_hash(staged)}
    write_atomically(work / MARK, json.dumps(mark))
    sync(staged)
    try:
        _put(staged, directory, work / REPLACED)
    except OSError as error:
        raise ResourceError(
            f"output {shown(directory)}: the finished result cannot be moved there "
            f"({error.strerror}); it is kept, and the same command tries again"
        ) from None
    sync(directory.parent)
    with suppress(OSError):  # the result is in its place; the next run removes what is left
        discard(work)


def _put(staged: Path, directory: Path, replaced: Path) -> None:
    if not os.path.lexists(directory):
        os.rename(staged, directory)
        return
    try:
        exchange(staged, directory)
    except OSError:  # some file systems cannot
        _put_in_two_steps(staged, directory, replaced)


def _put_in_two_steps(staged: Path, directory: Path, replaced: Path) -> None:
    try:
        os.rename(directory, replaced)
        os.rename(staged, directory)
    except BaseException:  # Ctrl-C as well
        _put_back(replaced, directory)
        raise


def _put_back(replaced: Path, directory: Path) -> None:
    if replaced.is_dir() and not os.path.lexists(directory):
        os.rename(replaced, directory)


def exchange(one: Path, other: Path) -> None:
    """Let two directories change places, in one step.

    Raises OSError where that cannot be done.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError("the C library has no renameat2")
    first, second = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_RENAME_EXCHANGE)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def recover(output: Path, notice: Callable[[str], None]) -> None:
    """Finish or undo what a run was killed at while it published.

    Called with the lock held, before anything is removed.

    Raises RecipeError if the earlier result's place is taken.
    """
    work = partial(output)
    mark = load_settings(work / MARK) or {}
    places = {place.name: place for place in (output, rejected(output))}
    directory, files = places.get(str(mark.get("directory"))), str(mark.get("files"))
    published = directory is not None and _list_hash(directory) == files
    if published or os.listdir(work) == [LOCK]:
        discard(work)
        return
    if (work / REPLACED).is_dir():
        _recover_replaced(directory, output, notice)
    if os.path.lexists(work / MARK):
        _recover_staged(work, files)


def _recover_replaced(directory: Path | None, output: Path, notice: Callable[[str], None]) -> None:
    """Put the result that was to be replaced back into its place.

    directory   where its successor was to go; None if that was not written down

    It is waste if its successor is there already, as versions before this one left it.
    """
    replaced = partial(output) / REPLACED
    report = load(ValidationReport, replaced / OURS / "validation.json")
    planned = directory is not None
    directory = directory or (output if report and report.passed else rejected(output))
    if not os.path.lexists(directory) or not any(directory.iterdir()):
        os.rename(replaced, directory)
        notice(f"the last run was ended while it replaced {directory}: the earlier result is back")
    elif planned:
        raise RecipeError(
            f"output {shown(replaced)}: is the earlier result of {shown(directory)}, where "
            "something else is now; move one of them away"
        )
    else:
        remove(replaced)


def _recover_staged(work: Path, files: str) -> None:
    """Drop the progress unless the checkpoint in it is the one that was to be published.

    files   hash of that one's list
    """
    if _list_hash(work / STAGED) != files:
        (work / RUN).unlink(missing_ok=True)
    remove(work / MARK)


def _list_hash(directory: Path) -> str | None:
    try:
        return hashlib.sha256((directory / FILES_FILE).read_bytes()).hexdigest()
    except OSError:
        return None
