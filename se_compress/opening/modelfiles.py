"""The files of a model's directory, looked at before they are read. Standard library only.

What a name in a directory stands for is not known until one looks: a link to nowhere, a Git LFS
pointer, a pipe that never ends, a file of somebody else's. Each is one SourceError here.
"""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from se_compress.errors import SourceError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What serde_json, with which the safetensors library reads, takes too.
DEEPEST_JSON = 120


def shown(value: object, limit: int = 100) -> str:
    """A name or value in a file, for a message: one printable line, `limit` characters at most."""
    if isinstance(value, str):
        text = value[: limit + 1]
        text = text if text.isprintable() else ascii(text)[1:-1]
    else:
        text = _repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _repr(value: object) -> str:
    """The repr of a JSON value; of a large one only what it is."""
    if isinstance(value, (dict, list)) and (len(value) > 20 or nesting(value) > 3):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)} entries"
    if isinstance(value, int) and value.bit_length() > 400:
        return f"an integer of {value.bit_length()} bits"
    return ascii(value)


def quoted(value: object) -> str:
    """A value of a config, for a message: words stand in quotes."""
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def check_file(file: Path) -> int:
    """The size of a regular file in bytes. Raises SourceError for anything else: none at all, a
    link to nowhere, a directory, a device, a Git LFS pointer."""
    try:
        status = os.stat(file)
    except OSError as error:
        if os.path.islink(file):
            raise SourceError(
                f"{file}: is a link to nowhere ({shown(os.readlink(file))}); put the file there"
            ) from None
        if isinstance(error, FileNotFoundError):
            raise SourceError(f"{file}: is missing") from None
        raise SourceError(f"{file}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "device or pipe"
        raise SourceError(f"{file}: is a {kind}, not a file")
    if status.st_size < 1024 and _begins_with(file, _LFS_POINTER):
        raise SourceError(
            f"{file}: is a Git LFS pointer, not the file that it stands for; fetch it with "
            "'git lfs pull' or 'hf download'"
        )
    return status.st_size


def _begins_with(file: Path, start: bytes) -> bool:
    with open_file(file) as stream:
        return stream.read(len(start)) == start


def open_file(file: Path) -> BinaryIO:
    """A binary stream. Raises SourceError if the file may not be opened."""
    try:
        return file.open("rb")
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror})") from None


def check_place(file: Path, directory: Path) -> None:
    """Raises SourceError if a file of a model lies outside the model's directory. A link of the
    Hub's cache is the one exception: from snapshots/<commit> into the blobs of the same model."""
    home, real = os.path.realpath(directory), os.path.realpath(file)
    places = [home]
    parent, kind = os.path.split(os.path.dirname(home))
    if kind == "snapshots":
        places.append(os.path.join(parent, "blobs"))
    if not any(real.startswith(place.rstrip(os.sep) + os.sep) for place in places):
        raise SourceError(
            f"{shown(str(file), 200)}: leads out of the model's directory; a model's files lie in "
            "it, or in the blobs of the Hub's cache"
        )


def read_json(file: Path, largest: int) -> Any:
    """A JSON file of at most `largest` bytes. Raises SourceError if it is none, if an object names
    a key twice, or if it is nested without end."""
    if check_file(file) > largest:
        raise SourceError(f"{file}: is larger than {largest // 2**20} MB, the most that is read")
    with open_file(file) as stream:
        data = stream.read(largest + 1)
    try:
        return parse_json(data)
    except ValueError as error:
        raise SourceError(f"{file}: is not JSON ({shown(str(error), 150)})") from None


def parse_json(data: bytes) -> Any:
    """JSON as its standard has it, in UTF-8; NaN and infinities are taken, as Python writes them.
    Raises ValueError."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested without end") from None
    if nesting(value) > DEEPEST_JSON:
        raise ValueError("nested without end")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys differ. Raises ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(twice)} stands in it twice")
    return found


def nesting(value: object) -> int:
    """How deep lists and mappings stand in each other: 0 for a word or a number."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [
            inner for item in level for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth
