"""What a value of a recipe may be: names, paths, sizes, and numbers within bounds."""

import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from se_compress.artifacts.targets import DataType as DataType
from se_compress.artifacts.targets import Format as Format
from se_compress.artifacts.targets import Method as Method
from se_compress.artifacts.targets import Reloader as Reloader
from se_compress.artifacts.targets import Target as Target
from se_compress.errors import brief

Width = Literal[2, 3, 4, 5, 6, 8, 16]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# Bounds that no real recipe reaches, so that no product of two overflows anything.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
SequenceLength = Annotated[int, Field(ge=16, lt=2**31)]

PATH_BYTES = 4095  # of a path, and of a name in it: what Linux takes
NAME_BYTES = 255
LONGEST_SUFFIX = ".profile.partial"  # what we append to the name of an output
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "9GB" (10^9) or "4.5GiB" (2^30)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(match[1]) > 30:
        raise ValueError(f"{brief(text)} is not a size; write for instance 9GB or 4.5GiB")
    return round(float(match[1]) * _UNITS[match[2]])


def one_or_more(value: object, wanted: str) -> list[Any]:
    """The items of a list, or of the one that stands for it. Raises ValueError for none, with what
    is `wanted`."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise ValueError(f"at least one {wanted}")
    return items


def _bytes(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _written(text: str) -> str:
    """What every file system, terminal and UTF-8 file takes."""
    kinds = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of some, ends of lines
    strange = next((c for c in text if unicodedata.category(c) in kinds), "")
    if strange:
        raise ValueError(f"{brief(text)} holds the character {strange!r}, which no name should")
    if len(text.encode()) > PATH_BYTES:
        raise ValueError(f"{brief(text)} is longer than {PATH_BYTES} bytes")
    return text


def _place(text: str) -> str:
    if any(len(part.encode()) > NAME_BYTES for part in text.split("/")):
        raise ValueError(f"{brief(text)} holds a name longer than {NAME_BYTES} bytes")
    return text


def _output(text: str) -> str:
    """We append to the name, and write below it."""
    name, most = Path(text).name, NAME_BYTES - len(LONGEST_SUFFIX)
    if name in ("", ".."):
        raise ValueError(f"{brief(text)} is no name for a new directory")
    if len(name.encode()) > most:
        raise ValueError(f"{brief(text)} is a name of more than {most} bytes")
    if len(text.encode()) > PATH_BYTES - NAME_BYTES:
        raise ValueError(f"{brief(text)} is longer than {PATH_BYTES - NAME_BYTES} bytes")
    return text


Bytes = Annotated[int, Field(gt=0, lt=2**63), BeforeValidator(_bytes)]
Name = Annotated[str, Field(min_length=1), AfterValidator(_written)]
Place = Annotated[Name, AfterValidator(_place)]
Output = Annotated[Place, AfterValidator(_output)]
