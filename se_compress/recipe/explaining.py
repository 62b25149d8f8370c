"""Pydantic's errors as one line: the key's path, what stands there, and what would be accepted."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from se_compress.errors import VALUE_LENGTH, RecipeError, brief, shorten
from se_compress.recipe.sections import Recipe


def checked(data: Mapping[str, Any], prefix: str) -> Recipe:
    """The recipe in `data`. Raises RecipeError, whose message starts with `prefix`."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(prefix + _explain(error)) from None


def _explain(error: ValidationError) -> str:
    """The first problem, in one line. Unknown keys come first: they often cause the others."""
    problems = sorted(
        error.errors(), key=lambda p: (p["type"] != "extra_forbidden", -len(p["loc"]))
    )
    problem = problems[0]
    path = _path(problem)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(problem["loc"])
    if problem["type"] == "missing":
        return f"{path} is missing"
    if problem["type"] == "value_error":
        return f"{path}: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "model_type":
        first = _known_keys([part for part in problem["loc"] if isinstance(part, str)])[0]
        return (
            f"{path} is {brief(problem['input'])}: a mapping of keys is needed, such as "
            f"{{{first}: ...}}"
        )
    # A union has one problem for each of its branches.
    accepted = [_lower_first(other["msg"]) for other in problems if _path(other) == path]
    return f"{path} is {brief(problem['input'])}: {' or '.join(accepted)}"


def _path(problem: ErrorDetails) -> str:
    parts = [_shown(part) for part in problem["loc"] if _is_key(part)]
    return ".".join(parts) or "the recipe"


def _shown(part: object) -> str:
    return shorten(str(part), VALUE_LENGTH)


def _lower_first(text: str) -> str:
    return text[0].lower() + text[1:]


def _is_key(part: object) -> bool:
    """Pydantic puts the branch of a union ("literal[...]", "constrained-int") among the keys."""
    return isinstance(part, int) or not re.search(r"\[|^constrained-", str(part))


def _unknown_key(location: tuple[int | str, ...]) -> str:
    parents, last = [part for part in location[:-1] if _is_key(part)], location[-1]
    known = _known_keys([part for part in parents if isinstance(part, str)])
    near = difflib.get_close_matches(_shown(last), known, n=1, cutoff=0.5)
    path = ".".join(_shown(part) for part in [*parents, last])
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{path} is not a known key; {hint}"


def _known_keys(parents: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for parent in parents:
        if parent not in section.model_fields:
            continue  # a domain, whose keys those of `section` are, or the branch of a union
        annotation = section.model_fields[parent].annotation
        candidates = [annotation, *(a for arg in get_args(annotation) for a in _leaves(arg))]
        sections = (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
        section = next(sections, section)  # a domain may have the name of a key
    return list(section.model_fields)


def _leaves(annotation: object) -> list[object]:
    inner = get_args(annotation)
    return [annotation] if not inner else [leaf for arg in inner for leaf in _leaves(arg)]
