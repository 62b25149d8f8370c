"""Text that a user hands over, and the YAML in it: read once, bounded in every direction.

Whatever stands in a file ends in plain Python values or in one `RecipeError` with a line number.
PyYAML alone fails with other errors, or never ends, on scalars that only look like numbers, nesting
without end and aliases that double from line to line; of a key given twice it keeps the last.
"""

import os
import re
import stat
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import BinaryIO

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from se_compress.errors import RecipeError, brief

RECIPE_BYTES = 2**20
PLAN_BYTES = 2**28
# Values and characters, aliases written out: no file without aliases can reach it.
_CONTENT = 2 * RECIPE_BYTES
_DEPTH = 40
_NUMBER_LENGTH = 400  # no number that is meant is longer, and Python converts no 5,000 digits
_TAG = "tag:yaml.org,2002:"
_AS_TEXT = ("timestamp", "value")


def read_text(path: Path, most: int, what: str, where: str = "") -> str:
    """The text of a file, or of an open pipe such as /dev/stdin, which can be read only once.

    most   bytes that are read at most
    what   "a recipe", for the messages
    where  begins them; the path unless given

    Raises RecipeError. Named pipes and devices are refused: they may never end, or never begin.
    """
    where = where or str(path)
    try:
        with _opened(path) as file:
            data = file.read(most + 1)
        text = data[:most].decode("utf-8") if len(data) <= most else None
    except UnicodeDecodeError:
        raise RecipeError(f"{where}: cannot be read (not UTF-8)") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"{where}: cannot be read ({reason})") from None
    if text is None:
        raise RecipeError(f"{where}: is larger than {most >> 20} MiB, so it is not {what}")
    return text


def _opened(path: Path) -> BinaryIO:
    # Without O_NONBLOCK, opening a named pipe waits for somebody who writes.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check_kind(os.fstat(number).st_mode, path)
        os.set_blocking(number, True)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def _check_kind(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise ValueError("it is a directory")
    # A pipe of the shell leads to no file (/proc/9/fd/pipe:[123]); a named one does.
    if stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and not os.path.exists(os.path.realpath(path))):
        return
    raise ValueError("it is a named pipe" if stat.S_ISFIFO(mode) else "it is a device, no file")


class _Loader(yaml.SafeLoader):
    """Composes nodes only as deep as a recipe can be.

    It reads 1e-3 as the number that everyone takes it for (YAML 1.1 wants 1.0e-3), and dates and a
    lone = as text: no key of a recipe is a date, but an output may be called by one.
    """

    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self.depth += 1
        if self.depth > _DEPTH:
            mark = self.get_mark()
            raise ConstructorError(None, None, f"nested deeper than {_DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_TAG) not in _AS_TEXT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> object:
    """Mappings with text as keys, lists, text, numbers, booleans and None; each alias is a copy.

    Raises ValueError with one line that says what is wrong, and in which line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Builder(loader).value(node, 0)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_explain(error)) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _explain(error: yaml.MarkedYAMLError) -> str:
    context = f"{error.context}: " if error.context else ""
    mark = error.problem_mark or error.context_mark
    return f"{context}{error.problem}" + (f" (line {mark.line + 1})" if mark else "")


class _Builder:
    """Makes values of nodes, and counts what they hold."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.loader = loader
        self.content = 0

    def value(self, node: Node, depth: int) -> object:
        self.content += 1 + (len(node.value) if isinstance(node, ScalarNode) else 0)
        if self.content > _CONTENT or depth > _DEPTH:
            raise _refusal(node, "aliases make it larger than a recipe can be")
        if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
            return self.mapping(node, depth)
        if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, depth + 1) for item in node.value]
        return self.scalar(node)

    def mapping(self, node: MappingNode, depth: int) -> dict[str, object]:
        own: dict[str, object] = {}
        merged: dict[str, object] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                for base in self.bases(value_node, depth):
                    merged = base | merged  # of several the first counts, as YAML has it
                continue
            key = self.key(key_node)
            if key in own:
                raise _refusal(key_node, f"the key {brief(key)} is given twice")
            own[key] = self.value(value_node, depth + 1)
        return merged | own

    def bases(self, node: Node, depth: int) -> Iterator[dict[str, object]]:
        """The mappings that `<<` merges in."""
        value = self.value(node, depth + 1)
        for base in value if isinstance(value, list) else [value]:
            if not isinstance(base, dict):
                raise _refusal(node, "<< takes a mapping or a list of mappings")
            yield base

    def key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            raise _refusal(node, "a key is text, not a list or a mapping")
        key = self.value(node, 0)
        if not isinstance(key, str):
            raise _refusal(
                node, f"the key {brief(node.value)} is read as {brief(key)}; put it in quotes"
            )
        return key

    def scalar(self, node: Node) -> object:
        """Text, a number, a boolean or None."""
        kinds = ("null", "bool", "int", "float", "str")
        if not isinstance(node, ScalarNode) or node.tag.removeprefix(_TAG) not in kinds:
            raise _refusal(node, f"could not determine a constructor for the tag {node.tag!r}")
        kind = node.tag.removeprefix(_TAG)
        if kind in ("int", "float") and len(node.value) > _NUMBER_LENGTH:
            raise _refusal(node, f"a number of {len(node.value):,} characters")
        try:
            value: Hashable = self.loader.construct_object(node)
        except (ValueError, KeyError, IndexError):
            what = {"int": "an integer", "bool": "true or false"}.get(kind, "a number")
            hint = "; in quotes it is text" if kind != "bool" else ""
            raise _refusal(node, f"{brief(node.value)} is not {what}{hint}") from None
        return value


def _refusal(node: Node, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)
