"""What a run saves while it works: its settings, and records that carry a hash of themselves.

A record that was damaged is as good as none. So is one that another version of the tool wrote.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from se_compress.artifacts import Artifact, from_json, to_json, write_atomically
from se_compress.errors import SeCompressError

Settings = Mapping[str, object]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a result, by name, so that a change can be named.

    unspoken   names of those whose values say nothing to a reader, such as digests: of them a
               change is told without the values
    """

    by_name: Settings
    unspoken: frozenset[str] = frozenset()

    def changes_since(self, last: Settings) -> Iterator[str]:
        """What differs from the settings of another run, in words."""
        for name, value in self.by_name.items():
            if last.get(name) != value:
                values = "" if name in self.unspoken else f": {last.get(name)} -> {value}"
                yield f"{name} changed{values}"


def load_settings(file: Path) -> Settings | None:
    """Saved settings. None if there are none that can be read."""
    try:
        if not file.is_file():
            return None
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def save_settings(file: Path, settings: Settings) -> None:
    write_atomically(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------- one record

_RECORD = '"record": '


def save(artifact: object, file: Path) -> None:
    """Save an artefact with a hash of it. The file is still JSON."""
    record = to_json(artifact)
    write_atomically(file, f'{{"sha256": "{_hash(file, record)}",\n{_RECORD}{record}}}\n')


def load(kind: type[Artifact], file: Path) -> Artifact | None:
    """A saved artefact, with a hash or as it is in a result.

    None if there is none, if it was damaged, or if an older version of the tool wrote it.
    """
    try:
        if not file.is_file():
            return None
        text = file.read_text(encoding="utf-8")
        return from_json(kind, _opened(file, text), str(file))
    except (OSError, ValueError, ArithmeticError, RecursionError, SeCompressError):
        return None


def _opened(file: Path, text: str) -> str:
    """The record in a text that `save` wrote. Another text as it is. Raises ValueError."""
    head, _, rest = text.partition("\n")
    if not head.startswith('{"sha256"'):
        return text
    record = rest.removeprefix(_RECORD).removesuffix("}\n")
    if head != f'{{"sha256": "{_hash(file, record)}",':
        raise ValueError("is not what was saved")
    return record


def _hash(file: Path, record: str) -> str:
    """Hash of a record and of its file's name, as one layer's record is not another's."""
    return hashlib.sha256(f"{file.name}\n{record}".encode()).hexdigest()


def load_layers(kind: type[Artifact], files: Sequence[Path], notice: Notice) -> list[Artifact]:
    """The records of finished layers.

    None at all, and a word to the user, if one of them cannot be read.
    """
    records = []
    for file in files:
        record = load(kind, file)
        if record is None:
            notice(f"{file} is missing or damaged: its stage starts again")
            return []
        records.append(record)
    return records
