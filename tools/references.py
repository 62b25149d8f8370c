"""Write the references of all recipe keys (recipes/README.md), of all result files
(recipes/RESULT.md) and of the targets (recipes/TARGETS.md, README.md) from the models of
`se_compress/recipe`, the dataclasses of the artefacts and the table of targets.
What stands outside of the two markers is written by hand. Run it after a change there:

    python tools/references.py
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from field_docs import field_docs, summary_of
from json_schemas import ROOTS
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from targets_table import full_table, short_table

from se_compress import recipe as recipes
from se_compress.recipe import Recipe
from se_compress.running.manifest import ResultFiles

DIRECTORY = Path(__file__).parents[1] / "recipes"
BEGIN = "<!-- made by tools/references.py, from here -->"
END = "<!-- to here -->"
# Bounds that only keep products from overflowing are no part of the reference.
LEAST_OVERFLOW = 2**31
# Annotated types that mean more than their bounds say.
NAMED: Mapping[Any, str] = {
    recipes.Bytes: "bytes, or a text such as `9GB` or `4.5GiB`",
    recipes.Place: "a path or a name",
    recipes.Output: "a path",
    recipes.Name: "a name",
}
PLAIN: Mapping[Any, str] = {
    str: "text",
    bool: "`true` or `false`",
    int: "a whole number",
    float: "a number",
}
# Heading -> the dataclass behind it. `--json` prints a line, the others are files.
RESULTS: Mapping[str, type] = {
    **{f"{name}.json": kind for name, kind in ROOTS.items() if name != "run-result"},
    "files.json": ResultFiles,
    "The line of --json": ROOTS["run-result"],
}


class MissingError(Exception):
    """A key or a field that nothing is said of; names where it belongs."""


def reference_of_recipes() -> str:
    """All keys, a table for each section; one that stands at several places has one for all."""
    sections: dict[type[BaseModel], list[str]] = {}
    _find_sections("", Recipe, sections)
    return "\n".join(line for kind, paths in sections.items() for line in _section(paths, kind))


def reference_of_results() -> str:
    """All files, a table for each kind of object in them; one that is told already is not again."""
    told: set[type] = set()
    return "\n".join(line for name, kind in RESULTS.items() for line in _file(name, kind, told))


def _find_sections(
    path: str, section: type[BaseModel], found: dict[type[BaseModel], list[str]]
) -> None:
    """Every section with the paths at which it stands, in the order of the recipe."""
    found.setdefault(section, []).append(path)
    for name, hint in typing.get_type_hints(section).items():
        for inner in _kinds_in(hint, _is_section):
            _find_sections(f"{path}.{name}".removeprefix("."), inner, found)


def _section(paths: list[str], section: type[BaseModel]) -> Iterator[str]:
    """The table of a section."""
    hints = typing.get_type_hints(section, include_extras=True)
    told = _told(section, section.model_fields)
    places = ", ".join(f"`{path}`" for path in paths if path)
    yield f"### {places or 'The recipe'}\n\n{_prose(summary_of(section))}\n"
    yield "| key | accepted | default | |\n|---|---|---|---|"
    for name, field in section.model_fields.items():
        accepted = _accepted(hints[name])
        yield f"| `{name}` | {accepted} | {_default(field)} | {_cell(told[name])} |"
    yield ""


def _told(kind: type, fields: Iterable[str]) -> dict[str, str]:
    """Field -> description. Raises MissingError if one has none."""
    found = field_docs(kind, fields)
    if missing := [name for name in fields if name not in found]:
        raise MissingError(f"the docstring of {kind.__name__} does not tell {', '.join(missing)}")
    return found


def _accepted(kind: Any) -> str:
    """What may stand in a recipe for a type, in words."""
    if kind in NAMED:
        return NAMED[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _accepted(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (typing.Union, UnionType):
        parts = [_accepted(part) for part in arguments if part is not NoneType]
        return (", or " if any("," in part for part in parts) else " or ").join(parts)
    if origin is tuple:
        return f"a list of: {_accepted(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of names to: {_accepted(arguments[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a recipe" if kind is Recipe else "keys, see below"
    return PLAIN[kind]


def _bounds(metadata: tuple[Any, ...]) -> str:
    """What a number keeps to, such as ", at least 0, below 1"."""
    limits = [limit for item in metadata for limit in getattr(item, "metadata", (item,))]
    words = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    found = [(word, getattr(limit, kind.__name__.lower())) for limit in limits
             for kind, word in words.items() if isinstance(limit, kind)]  # fmt: skip
    return "".join(f", {word} {value:g}" for word, value in found if value < LEAST_OVERFLOW)


def _default(field: FieldInfo) -> str:
    """In YAML; of a section whose keys have defaults, that it may be left out."""
    value = field.default
    if value is PydanticUndefined:
        return "needed"
    if isinstance(value, BaseModel):
        return "as below"
    if value is None or value in ("", ()) or value == {}:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _is_section(kind: Any) -> bool:
    """A variant is the whole recipe again."""
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Recipe


def _kinds_in(kind: Any, wanted: Callable[[Any], bool]) -> Iterator[type]:
    """The classes that a type is made of, of those that are wanted."""
    if wanted(kind):
        yield kind
    for argument in typing.get_args(kind):
        yield from _kinds_in(argument, wanted)


def _file(name: str, kind: type, told: set[type]) -> Iterator[str]:
    yield f"## {name}\n"
    yield from _object(kind, told)


def _object(kind: type, told: set[type]) -> Iterator[str]:
    """The table of a dataclass, then those of the dataclasses that it holds."""
    told.add(kind)
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    descriptions = _told(kind, [field.name for field in fields])
    yield f"### {kind.__name__}\n\n{_prose(summary_of(kind))}\n"
    yield "| field | value | |\n|---|---|---|"
    for field in fields:
        value = _value(hints[field.name])
        yield f"| `{field.name}` | {value} | {_cell(descriptions[field.name])} |"
    yield ""
    for field in fields:
        for inner in _kinds_in(hints[field.name], dataclasses.is_dataclass):
            if inner not in told:
                yield from _object(inner, told)


def _value(kind: Any) -> str:
    """What stands in a result's file for a type, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        return f"list of {_value(arguments[0])}"
    if origin is Mapping:
        return f"mapping: {_value(arguments[0])} to {_value(arguments[1])}"
    if origin in (typing.Union, UnionType):
        return " or ".join(_value(argument) for argument in arguments)
    return "`null`" if kind is NoneType else PLAIN[kind].removeprefix("a ")


def _cell(text: str) -> str:
    return _prose(text).replace("|", r"\|")


def _prose(text: str) -> str:
    """Nothing that Markdown would take for a tag."""
    return text.replace("<", "&lt;")


PAGES: Mapping[str, Callable[[], str]] = {
    "README.md": reference_of_recipes,
    "RESULT.md": reference_of_results,
    "TARGETS.md": full_table,
    "../README.md": short_table,
}


def text_of(name: str) -> str:
    """A page with its reference as it should be; the rest as it stands."""
    page = (DIRECTORY / name).read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n\n{PAGES[name]().strip()}\n\n{END}{tail}"


def main() -> None:
    for name in PAGES:
        (DIRECTORY / name).write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
