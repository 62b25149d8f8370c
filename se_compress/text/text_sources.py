"""The rows of a source of text: a .txt, .jsonl or .parquet file, or a data set of the Hub.

Rows are streamed in order, without a copy on disk. Lines of JSON are read here and not by Arrow,
which makes dates of texts, one type of a column and null of a key that is not there.
"""

import glob
import itertools
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from se_compress.errors import ResourceError, SeCompressError, SourceError, one_line
from se_compress.opening.hub import answer_of, bound_waiting, disk_is_full
from se_compress.recipe import DataSource
from se_compress.text.chat import CHAT_COLUMNS

_BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_ACCEPTED = "give a .txt, .jsonl or .parquet file, or the name of a data set on the Hub"
_HUB_NAME = re.compile(r"\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?")
# `datasets` tries twenty times, a minute apart, and says nothing meanwhile.
_RETRIES = {
    "STREAMING_OPEN_MAX_RETRIES": 2,
    "STREAMING_READ_MAX_RETRIES": 3,
    "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL": 20,
}
_WHOLE = 1 << 30  # bytes of a file of JSON that is not one value a line, and is read at once


@dataclass(frozen=True)
class TextSource:
    """One source of a recipe, and how messages name it.

    key    "calibration.data", with an index if there are several sources
    where  "calibration" or "validation"
    chat   rows hold messages, and a paragraph of a .txt file is one row
    """

    source: DataSource
    key: str
    where: str
    chat: bool

    def error(self, problem: str) -> SourceError:
        return SourceError(f"{self.key}: {one_line(self.source.data)} {problem}")

    def nothing(self) -> SourceError:
        return self.error(f"holds no text; {_ACCEPTED}")


def values(text: TextSource) -> Iterator[tuple[str, object]]:
    """The values of the wanted column in order, each with its place for messages."""
    column = text.source.column
    for number, row in enumerate(_rows(text), start=1):
        if column not in row:
            raise _no_column(text, row, number)
        yield f"in column {one_line(repr(column), 60)}, row {number}", row[column]


def _no_column(text: TextSource, row: Mapping[str, Any], number: int) -> SourceError:
    column = one_line(repr(text.source.column), 60)
    problem = f"has no column {column}" + (f" in row {number}" if number > 1 else "")
    names = one_line(", ".join(map(str, row)), 120) if row else "nothing"
    chat = next((name for name in CHAT_COLUMNS if name in row), None)
    hint = f"; set its column: {chat}" if chat else ""
    if chat and not text.chat:
        hint += f" and {text.where}.chat_template: true"
    return text.error(f"{problem}; it has {names}{hint}")


def _rows(text: TextSource) -> Iterator[Mapping[str, Any]]:
    if not _is_local(text):
        return _streamed(text, _hub_arguments(text))
    if Path(text.source.data).suffix.lower() == ".jsonl":
        return _json_rows(text)
    return _local_rows(text)


def _is_local(text: TextSource) -> bool:
    """Whether it is a file to be read, and not a name on the Hub. Raises what makes it neither."""
    path = Path(text.source.data)
    try:
        known = path.suffix.lower() in _BUILDERS
        if path.is_dir():
            raise text.error(f"is a directory; {_ACCEPTED}")
        if path.exists() and not known:
            raise text.error(f"is a file of another kind; {_ACCEPTED}")
        if path.exists() and not path.is_file():
            raise text.error(f"is no ordinary file; {_ACCEPTED}")
        if path.exists() and path.stat().st_size == 0:
            raise text.error(f"is empty; {_ACCEPTED}")
        if not path.exists() and (known or not _HUB_NAME.fullmatch(text.source.data)):
            raise text.error(f"does not exist; {_ACCEPTED}")
    except OSError as error:
        raise text.error(f"cannot be read: {one_line(error)}") from None
    return known


# ------------------------------------------------------------------------------------ lines of JSON


def _json_rows(text: TextSource) -> Iterator[Mapping[str, Any]]:
    path = Path(text.source.data)
    try:
        found = (v if isinstance(v, list) else [v] for v in _json_values(path))
        for number, row in enumerate(itertools.chain.from_iterable(found), start=1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is a {type(row).__name__}, not an object")
            yield row
    except RecursionError:
        raise text.error("cannot be read as .jsonl: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise text.error(f"cannot be read as .jsonl: {one_line(error)}") from None


def _json_values(path: Path) -> Iterator[object]:
    """One value of each line; of a file whose first line is none, one after the other."""
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        filled = ((i, line) for i, line in enumerate(stream, start=1) if line.strip())
        for count, (number, line) in enumerate(filled):
            try:
                value = json.loads(line, object_pairs_hook=_object)
            except json.JSONDecodeError as error:
                if count == 0 and path.stat().st_size <= _WHOLE:
                    break
                raise ValueError(f"line {number} is not JSON ({error})") from None
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            yield value
        else:
            return
    yield from _values_on_end(path.read_text(encoding="utf-8-sig"))


def _values_on_end(text: str) -> Iterator[object]:
    decoder, place = json.JSONDecoder(object_pairs_hook=_object), 0
    while rest := re.compile(r"\S").search(text, place):
        value, place = decoder.raw_decode(text, rest.start())
        yield value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{one_line(repr(twice), 60)} stands twice in one object")
    return found


# ------------------------------------------------------------------------- what `datasets` reads


def _local_rows(text: TextSource) -> Iterator[Mapping[str, Any]]:
    """Its lock file of a local source is kept out of the user's cache."""
    path = Path(text.source.data)
    builder = _BUILDERS[path.suffix.lower()]
    documents = {"sample_by": "paragraph" if text.chat else "document"}
    with _scratch() as scratch:
        arguments: dict[str, Any] = {
            "path": builder,
            "data_files": [glob.escape(str(path))],
            "split": "train",
            "cache_dir": scratch,
            **(documents if builder == "text" else {}),
        }
        yield from _streamed(text, arguments)


def _scratch() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise ResourceError(f"no temporary directory can be made: {one_line(error)}") from None


def _hub_arguments(text: TextSource) -> dict[str, Any]:
    """Of a data set that the cache holds already, that copy serves without network."""
    source = text.source
    return {"path": source.data, "name": source.config, "split": source.split}


def _streamed(text: TextSource, arguments: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        yield from load_dataset(**arguments, streaming=True)
    except Exception as error:  # datasets, pyarrow, fsspec and httpx share no base class
        raise _unreadable(text, error) from None


def _unreadable(text: TextSource, error: Exception) -> SeCompressError:
    if disk_is_full(error):
        return ResourceError(str(text.error(f"cannot be read: {one_line(error)}")))
    path = Path(text.source.data)
    if path.suffix.lower() in _BUILDERS:
        return text.error(f"cannot be read as {path.suffix}: {one_line(error)}")
    offline = "OfflineModeIsEnabled" in str(error)  # which `datasets` says itself
    answer = one_line(error) if offline else answer_of(error) or one_line(error)
    return text.error(
        f"is no file here and cannot be read as a data set on the Hub: {answer}; {_ACCEPTED}"
    )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Logs, warnings and progress bars of the libraries are off inside, and their waiting for the
    Hub has an end; afterwards all is as before."""
    import datasets

    bound_waiting()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    bars_shown = not datasets.utils.are_progress_bars_disabled()
    retries = {name: getattr(datasets.config, name) for name in _RETRIES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        _set_all(datasets.config, _RETRIES)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            _set_all(datasets.config, retries)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars_shown:
                datasets.enable_progress_bars()


def _set_all(holder: object, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(holder, name, value)
