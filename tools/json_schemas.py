"""Write the JSON Schemas (draft 2020-12) of the files that se-compress writes and of what `--json`
prints, from the dataclasses of `se_compress/artifacts`. Run it after a change there:

    python tools/json_schemas.py
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from field_docs import field_docs, summary_of

from se_compress.artifacts import (
    GATES,
    NOT_FINITE,
    Check,
    Comparison,
    Compressed,
    CompressionPlan,
    ExpertProfile,
    RunResult,
    StabilityStudy,
    ValidationReport,
)

DIRECTORY = Path(__file__).parents[1] / "se_compress" / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
ROOTS: Mapping[str, type] = {
    "profile": ExpertProfile,
    "plan": CompressionPlan,
    "compression": Compressed,
    "validation": ValidationReport,
    "comparison": Comparison,
    "stability": StabilityStudy,
    "run-result": RunResult,
}
PLAIN = {str: "string", bool: "boolean", int: "integer", type(None): "null"}


def schema_of(root: type) -> dict[str, Any]:
    """The schema of one artefact; the dataclasses that it holds are in `$defs`."""
    definitions: dict[str, Any] = {}
    _define(root, definitions)
    own = definitions.pop(root.__name__)
    return {"$schema": DIALECT, "title": root.__name__, **own} | (
        {"$defs": dict(sorted(definitions.items()))} if definitions else {}
    )


def _define(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """A reference to the definition of a dataclass, which is made if it is not there."""
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # in case it holds itself
        hints = typing.get_type_hints(kind)
        fields = dataclasses.fields(kind)
        told = field_docs(kind, [field.name for field in fields])
        if kind is Check:
            told["name"] = f"of the gate: {', '.join(GATES)}"
        definitions[kind.__name__] = {
            "description": summary_of(kind),
            "type": "object",
            "properties": {
                field.name: {"description": told[field.name]}
                | _schema(hints[field.name], definitions)
                for field in fields
            },
            "required": [field.name for field in fields if "unless_none" not in field.metadata],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _define(kind, definitions)
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is Mapping:
        keys = {"propertyNames": {"pattern": "^[0-9]+$"}} if arguments[0] is int else {}
        values = _schema(arguments[1], definitions)
        return {"type": "object", **keys, "additionalProperties": values}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    if kind is float:
        definitions["Real"] = {"anyOf": [{"type": "number"}, {"enum": list(NOT_FINITE)}]}
        return {"$ref": "#/$defs/Real"}
    return {"type": PLAIN[kind]}


def text_of(root: type) -> str:
    return json.dumps(schema_of(root), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for name, root in ROOTS.items():
        (DIRECTORY / f"{name}.schema.json").write_text(text_of(root), encoding="utf-8")


if __name__ == "__main__":
    main()
