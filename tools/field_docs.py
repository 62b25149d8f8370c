"""What the docstring of a class says of its fields: the source of every reference that we generate.

A field has a line of its own below the first paragraph, the name (or several, or a pattern such as
`peak_*`) and two spaces before the description, which goes on in lines that are indented:

    tokens      calibration tokens behind its Hessian
    low, high   95 % interval of the value over the held-out sequences, for the checks
                that have one
"""

import fnmatch
import inspect
import re
from collections.abc import Iterable

_ENTRY = re.compile(r"(\w[\w*]*(?:, \w[\w*]*)*) {2,}(\S.*)")


def summary_of(kind: type) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def field_docs(kind: type, fields: Iterable[str]) -> dict[str, str]:
    """Field -> its description, if the class has one for it, or a class that it extends."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        entries = _entries(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
        for pattern, text in entries:
            found |= dict.fromkeys(fnmatch.filter(fields, pattern), text)
    return found


def _entries(doc: str) -> list[tuple[str, str]]:
    """(name or pattern, description) of every line that describes fields."""
    found: list[tuple[list[str], list[str]]] = []
    for line in doc.splitlines():
        if entry := _ENTRY.fullmatch(line):
            found.append((entry[1].split(", "), [entry[2]]))
        elif found and line.startswith("  "):
            found[-1][1].append(line.strip())
    return [(name, " ".join(lines)) for names, lines in found for name in names]
