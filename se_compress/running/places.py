"""What the paths of a recipe mean, and whether a result can be put where its output says.

Everything is asked before the work, and nothing is written.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from se_compress.errors import RecipeError

MOUNTS = Path("/proc/self/mountinfo")
SHOWN_CHARACTERS = 120
Identity = tuple[int, int]  # device and inode: equal for one directory, whatever its name


def expand(text: str) -> str:
    """A path as the shell reads it: `~` and `~user` at its beginning are home directories."""
    return os.path.expanduser(text)


def output_of(text: str) -> Path:
    """The directory that `output` of a recipe means.

    Where it is a link, the result lies behind it. What is beside the output lies beside that.

    Raises RecipeError.
    """
    path = Path(expand(text))
    try:
        if "\0" in text:
            raise ValueError("a NUL in it")
        if path.is_symlink() or path.name in ("", ".."):
            path = path.resolve()
    except RuntimeError:
        raise RecipeError(f"output {shown(path)}: is a link that leads to itself") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"output {shown(path)}: cannot be used ({_reason(error)})") from None
    if not path.name:
        raise RecipeError(f"output {shown(path)}: is no place for a result; name a directory in it")
    return path


def partial(output: Path) -> Path:
    """Where the progress of an unfinished run is."""
    return output.with_name(output.name + ".partial")


def rejected(output: Path) -> Path:
    """Where a result goes that did not pass its gates."""
    return output.with_name(output.name + ".rejected")


def profiled(output: Path) -> Path:
    """Where a profile goes that is made alone, without a result."""
    return output.with_name(output.name + ".profile")


def shown(path: Path | str) -> str:
    """A path for a message, shortened if nobody would read it whole."""
    text = str(path)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 4] + " ..."


def _reason(error: OSError | ValueError) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)


def check_directory(directory: Path) -> None:
    """`directory` can be made, and be renamed away if it is there. Raises RecipeError."""
    try:
        _check_directory(directory)
    except OSError as error:
        raise RecipeError(f"output {shown(directory)}: cannot be used ({error.strerror})") from None


def _check_directory(directory: Path) -> None:
    """What `check_directory` does, but that the system's own errors pass."""
    if not os.path.lexists(directory):
        _check_ancestor(directory)
        return
    if not directory.is_dir():
        raise RecipeError(f"output {shown(directory)} exists and is not a directory")
    if directory.is_symlink():
        raise RecipeError(f"output {shown(directory)}: is a link; it has to lie beside the output")
    if _is_mount(directory):
        raise RecipeError(
            f"output {shown(directory)}: is a mount point, which no finished result can be renamed "
            "to; name a directory in it"
        )
    here = Path.cwd()
    if _identity(directory) in _chain(here):
        raise RecipeError(
            f"output {shown(directory)}: is or holds the current directory, and would be replaced "
            "under it; name a directory in it, or start from elsewhere"
        )
    _check_writable(directory)
    _check_writable(directory.absolute().parent)


def _check_ancestor(directory: Path) -> None:
    """The nearest directory above that exists takes new ones, of such a name."""
    parent = directory.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise RecipeError(
            f"output {shown(directory)}: cannot be written ({shown(parent)} is not a directory)"
        )
    longest = os.pathconf(parent, "PC_NAME_MAX")
    names = directory.absolute().relative_to(parent).parts
    if any(len(os.fsencode(name)) > longest for name in names):
        raise RecipeError(
            f"output {shown(directory)}: is longer than the {longest} bytes of a name"
        )
    _check_writable(parent)


def _check_writable(directory: Path) -> None:
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise RecipeError(f"output {shown(directory)}: cannot be written, no permission")


def _is_mount(directory: Path) -> bool:
    """Whether a file system is mounted there.

    Also true for a directory bound from the same file system, where the system tells of it.
    """
    if os.path.ismount(directory):
        return True
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # no Linux
        return False
    points = (re.sub(r"\\(\d{3})", _octal, line.split(" ")[4]) for line in lines)
    return str(directory.resolve()) in points


def _octal(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))


# ------------------------------------------------------------------------------------ what is read


def check_apart(
    directories: Iterable[Path], model: Path, shards: Iterable[str], files: Mapping[str, Path]
) -> None:
    """None of the directories of an output touches what is read.

    One that is, holds or lies in the model, or holds a file that is read, would replace it by its
    own result.

    shards   the model's weights, which may lie elsewhere, behind links
    files    what else is read, by the word that it is given with

    Raises RecipeError.
    """
    model_chain, there = _chain(model), _identity(model)
    holders = {Path(os.path.realpath(shard)).parent for shard in shards}
    weights = {identity for holder in holders for identity in _chain(holder)}
    for directory in directories:
        own = _identity(directory)
        if there in _chain(directory) or (own and own in {*model_chain, *weights}):
            raise RecipeError(
                f"output {shown(directory)}: is, holds or lies in the model ({shown(model)}), "
                "which is never written to; choose another output"
            )
        for word, file in files.items():
            there_is_one = os.path.exists(file)  # it may be a name on the Hub
            if own and there_is_one and own in _chain(Path(os.path.realpath(file)).parent):
                raise RecipeError(
                    f"output {shown(directory)}: holds {word} {shown(file)}, and is replaced by "
                    "the result; move it elsewhere or choose another output"
                )


def _identity(path: Path) -> Identity | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # is not there
        return None
    return status.st_dev, status.st_ino


def _chain(path: Path) -> set[Identity]:
    """Identities of a path and all that it lies in, as far as they exist."""
    return set(filter(None, map(_identity, _upwards(Path(os.path.realpath(path))))))


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents
