"""Read a recipe: YAML and overrides in, a checked `Recipe` out.

Unknown keys are refused with the nearest known one, and every message names the key's path.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from se_compress.errors import VALUE_LENGTH, RecipeError, shorten
from se_compress.recipe.explaining import checked
from se_compress.recipe.sections import Recipe
from se_compress.recipe.variants import read_variants
from se_compress.recipe_file import RECIPE_BYTES, parse_yaml, read_text


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. `overrides` are `key.path=value` with the value in YAML.

    Raises RecipeError naming the file, the key and what would be accepted.
    """
    return recipe_of(read_recipe(path), str(path), overrides)


def read_recipe(path: Path) -> str:
    """The text of a recipe, from a file or a pipe. Raises RecipeError."""
    if not os.path.lexists(path):
        raise RecipeError(f"{path}: there is no such recipe")
    return read_text(path, RECIPE_BYTES, "a recipe")


def recipe_of(
    text: str, where: str, overrides: Sequence[str] = (), output: str | None = None
) -> Recipe:
    """Check a recipe's text. `where` begins every message; `output`, taken as it is and not as
    YAML, replaces the recipe's. Raises RecipeError."""
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{where}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys, such as `model: path`")
    for override in overrides:
        _apply_override(data, override)
    if output is not None:
        data["output"] = output
    return parse_recipe(data, where)


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe that has been read already; `where` begins every message."""
    common = {key: value for key, value in data.items() if key != "variants"}
    recipe = checked(common, f"{where}: ")
    variants = read_variants(common, data.get("variants", {}), where)
    for name in recipe.require:
        if name not in variants:
            known = f"known are {', '.join(variants)}" if variants else "there are none"
            raise RecipeError(
                f"{where}: require names {shorten(name, VALUE_LENGTH)}, which is not a variant; "
                f"{known}"
            )
    return recipe.model_copy(update={"variants": variants})


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    shown = f"--set {shorten(override, VALUE_LENGTH)}"
    if not separator or not all(key.split(".")):
        raise RecipeError(f"{shown}: write it as key.path=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{shown}: {error}") from None
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}  # `name:` without a value, as variants may be written
        data = data[parent]
        if not isinstance(data, dict):
            raise RecipeError(
                f"{shown}: {shorten(parent, VALUE_LENGTH)} holds a value, not further keys"
            )
    data[last] = value
