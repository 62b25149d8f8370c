"""Variants: several results of one recipe, each the whole recipe with its own keys merged in."""

import re
from collections.abc import Mapping
from typing import Any

from se_compress.errors import VALUE_LENGTH, RecipeError, brief, shorten
from se_compress.recipe.explaining import checked
from se_compress.recipe.sections import Recipe
from se_compress.recipe.texts import TextSection

_VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
# A variant may change anything else, the limits of its gates included.
_COMMON_KEYS = ("output", "variants", "require")


def read_variants(common: Mapping[str, Any], given: object, where: str) -> dict[str, Recipe]:
    """Each variant's whole recipe: its own keys merged into the common ones."""
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: variants is {brief(given)}: a mapping of names is needed")
    variants = {}
    for name, changes in given.items():
        _check_variant(name, {} if changes is None else changes, where)
        merged = _merged(common, {**(changes or {}), "output": f"{common['output']}/{name}"})
        prefix = f"{where}: variants.{name}."
        variants[name] = checked({k: v for k, v in merged.items() if k != "require"}, prefix)
    return variants


def _check_variant(name: object, changes: object, where: str) -> None:
    """The name becomes a directory's; what all results are compared by is common to them."""
    if not isinstance(name, str) or not _VARIANT_NAME.fullmatch(name):
        raise RecipeError(
            f"{where}: variants.{shorten(str(name), VALUE_LENGTH)}: a name is made of letters, "
            "digits, _ and -, such as naive"
        )
    if not isinstance(changes, Mapping):
        raise RecipeError(
            f"{where}: variants.{name} is {brief(changes)}: a mapping of keys is needed"
        )
    text = changes.get("validation")
    fixed = [key for key in _COMMON_KEYS if key in changes]
    fixed += [f"validation.{key}" for key in TextSection.model_fields if isinstance(text, Mapping)
              and key in text]  # fmt: skip
    if fixed:
        raise RecipeError(
            f"{where}: variants.{name}.{fixed[0]}: it is the same for all variants, so that they "
            "can be compared; set it outside of variants"
        )


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; any other value replaces the old one."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        merged[key] = value
    return merged
