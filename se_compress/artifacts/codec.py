"""Artefacts to JSON and back: deterministic out, strict in. Standard library only."""

import dataclasses
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from se_compress.errors import RecipeError

Artifact = TypeVar("Artifact")

# JSON has no such numbers: they are written as these strings.
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def to_json(artifact: object) -> str:
    """Deterministic JSON: fields in the order of the dataclass, one record of a list per line."""
    plain = _plain(artifact)
    if not isinstance(plain, dict):
        raise TypeError(f"{type(artifact).__name__} is not an artefact")
    lines = []
    for key, value in plain.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join("    " + _dump(row) for row in value)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {_dump(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def to_json_line(artifact: object) -> str:
    """The same in a single line of ASCII."""
    return json.dumps(_plain(artifact), allow_nan=False)


def from_json(kind: type[Artifact], text: str, where: str) -> Artifact:
    """The inverse of `to_json`, strict: an unknown, missing or mistyped field is a `RecipeError`
    that names `where` and the field."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}: not JSON ({error.msg}, line {error.lineno})") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deep") from None
    except ValueError:  # Python converts no 5,000 digits
        raise RecipeError(f"{where}: holds a number of thousands of digits") from None
    value: Artifact = _decode(kind, data, where)
    return value


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".writing")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def digest_of(*parts: object) -> str:
    """A short digest of JSON-able values, equal for equal values on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _dump(plain: Any) -> str:
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        present = {
            f.name: getattr(value, f.name)
            for f in dataclasses.fields(value)
            if "unless_none" not in f.metadata or getattr(value, f.name) is not None
        }
        return {name: _plain(item) for name, item in present.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, data, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is Mapping and isinstance(data, dict):
        key_kind, value_kind = arguments
        if key_kind is int and not all(key.isdecimal() for key in data):
            raise RecipeError(f"{where} has the keys {', '.join(data)}, but numbers are expected")
        return {key_kind(k): _decode(value_kind, v, f"{where}.{k}") for k, v in data.items()}
    if origin is Literal and data in arguments:
        return data
    number = isinstance(data, int | float) and not isinstance(data, bool)
    if kind is float and (number or data in NOT_FINITE):
        try:
            return float(data)
        except OverflowError:
            raise _mistyped(data, (kind,), where) from None
    if isinstance(kind, type) and type(data) is kind:
        return _writable(data, where) if isinstance(data, str) else data
    raise _mistyped(data, (kind,), where)


def _writable(text: str, where: str) -> str:
    """JSON can escape half of a surrogate pair, which no file can hold as text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"{where} holds half of a surrogate pair, which is no text") from None
    return text


def _mistyped(data: Any, kinds: tuple[Any, ...], where: str) -> RecipeError:
    expected = " or ".join(map(_describe, kinds))
    return RecipeError(f"{where} is {json.dumps(data)[:60]}, but {expected} is expected")


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is {json.dumps(data)[:60]}, but an object is expected")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in data:
        if name not in fields:
            raise RecipeError(f"{where}.{name} is unknown; known are {', '.join(fields)}")
    for name, known in fields.items():
        optional = not (
            known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        )
        if name not in data and not optional:
            raise RecipeError(f"{where}.{name} is missing")
    return kind(**{k: _decode(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def _decode_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return _decode(kinds[0], data, where)
    for kind in kinds:
        try:
            return _decode(kind, data, where)
        except RecipeError:
            continue
    raise _mistyped(data, kinds, where)


def _describe(kind: Any) -> str:
    """A kind of value in plain words."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " or ".join(json.dumps(a) for a in typing.get_args(kind))
    if origin is tuple:
        return "a list"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, "an object")
