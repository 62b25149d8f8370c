"""The list of the files that a result consists of, each with its size and hash.

By it a file that is missing or differs is seen. What somebody put beside them is known to be no
part of the result.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from se_compress.artifacts import OURS, from_json, to_json, write_atomically
from se_compress.errors import SeCompressError
from se_compress.opening.headers import INDEX_FILE

FILES_FILE = f"{OURS}/files.json"
SETTINGS_FILE = f"{OURS}/run.json"
# Of a result without a list, as versions before this one made them.
_REPORTS = (
    "recipe.yaml",
    "profile.json",
    "plan.json",
    "compression.json",
    "validation.json",
    "report.html",
)
_KNOWN = {
    "config.json", "quantize_config.json", "README.md", INDEX_FILE, FILES_FILE, SETTINGS_FILE,
    *(f"{OURS}/{name}" for name in (*_REPORTS, "recipe-resolved.yaml")),
}  # fmt: skip
# What each result has beside its weights: a list without them is not the one that was written.
_ALWAYS = {"config.json", SETTINGS_FILE, *(f"{OURS}/{name}" for name in _REPORTS)}
# What engines take for a part of the checkpoint, whoever put it there.
_LOADED = re.compile(
    r"[^/]+\.safetensors(\.index\.json)?|adapter_config\.json|(hf_)?quant\w*_config\.json"
)
WRITING = ".writing"  # of a file that is being replaced: a kill may leave one

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ResultFile:
    """A file of a result.

    name        its path in the result's directory
    size_bytes  of the file
    sha256      of its bytes, in hex
    """

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ResultFiles:
    """All files of a result but the list itself.

    files  in the order of their names
    """

    files: tuple[ResultFile, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.files)


def write_list(directory: Path, progress: Progress) -> None:
    """List all files that are in `directory`, once the disk has them."""
    names = sorted(set(_entries(directory)) - {FILES_FILE})
    files = []
    for done, name in enumerate(names):
        progress("hash", done, len(names))
        sync(directory / name)
        files.append(_describe(directory, name))
    progress("hash", len(names), len(names))
    write_atomically(directory / FILES_FILE, to_json(ResultFiles(tuple(files))))


def read_list(directory: Path) -> ResultFiles | None:
    """The list in a result's directory. None if there is none that can be read."""
    file = directory / FILES_FILE
    try:
        if not file.is_file():
            return None
        listed = from_json(ResultFiles, file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError, ArithmeticError, RecursionError, SeCompressError):
        return None
    return listed if _is_whole(listed.names) else None


def _is_whole(names: frozenset[str]) -> bool:
    """Whether a list can be that of a result, and of nothing beside it."""
    inside = not any(os.path.isabs(name) or ".." in Path(name).parts for name in names)
    return inside and names >= _ALWAYS and any(n.endswith(".safetensors") for n in names)


def damages(directory: Path, progress: Progress) -> dict[str, str]:
    """What is wrong with the files of a result, by name. Empty if all is as it was written."""
    listed = read_list(directory)
    if listed is None:
        return {FILES_FILE: f"there is no list of what was written ({FILES_FILE})"}
    found = {}
    for done, file in enumerate(listed.files):
        progress("verify", done, len(listed.files))
        if damage := _damage(directory, file):
            found[file.name] = f"{file.name} {damage}"
    progress("verify", len(listed.files), len(listed.files))
    added = filter(_LOADED.fullmatch, foreign(directory, ()))
    return found | {name: f"{name} was added, and engines would load it" for name in added}


def _damage(directory: Path, file: ResultFile) -> str:
    """What is wrong with one file, to follow its name. "" if it is as listed."""
    path = directory / file.name
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != file.size_bytes:
            return f"has {size} bytes, not the {file.size_bytes} that were written"
        same = _describe(directory, file.name) == file
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if same else "differs from what was written"


def restore(directory: Path, names: Collection[str], copies: Path) -> bool:
    """Put files that were made once more into their places.

    names    of the files, in the result's directory
    copies   directory that holds them under the same names

    Returns False, with nothing touched, if they are not what was listed.
    """
    listed = read_list(directory)
    wanted = [file for file in listed.files if file.name in names] if listed else []
    if len(wanted) != len(names) or any(_damage(copies, file) for file in wanted):
        return False
    for file in wanted:
        target = directory / file.name
        if target.is_dir() and not target.is_symlink():
            return False
        writing = target.with_name(target.name + WRITING)
        shutil.copyfile(copies / file.name, writing)
        sync(writing)
        writing.replace(target)
    return True


def is_intact(directory: Path, name: str) -> bool:
    """Whether one file is as listed. True if nothing is known of it."""
    listed = read_list(directory)
    files = [file for file in listed.files if file.name == name] if listed else []
    return not any(_damage(directory, file) for file in files)


def foreign(directory: Path, sources_files: Collection[str]) -> list[str]:
    """Names in a result's directory that are no part of it.

    sources_files   names of the source's files: without a list, files of such a name are taken for
                    copies of them
    """
    if not directory.is_dir():
        return []
    listed = read_list(directory)
    known = (
        {*listed.names, FILES_FILE} if listed else {*_KNOWN, *sources_files, *_shards(directory)}
    )
    return sorted(n for n in _entries(directory) if n.removesuffix(WRITING) not in known)


def _shards(directory: Path) -> set[str]:
    """The weight files of a result without a list."""
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        return {str(shard) for shard in index["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {"model.safetensors"}


def _entries(directory: Path) -> Iterator[str]:
    """All that lies in a directory, at any depth: files, links and empty directories."""
    for at, directories, files in os.walk(directory):
        links = [name for name in directories if os.path.islink(os.path.join(at, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(at, name), directory)
        if not directories and not files and Path(at) != directory:
            yield os.path.relpath(at, directory)


def _describe(directory: Path, name: str) -> ResultFile:
    with (directory / name).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return ResultFile(name, os.fstat(stream.fileno()).st_size, digest)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a directory, before anything rests on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
