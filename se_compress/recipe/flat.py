"""A recipe as a flat mapping of its settings."""

from collections.abc import Mapping

import yaml
from pydantic import BaseModel

from se_compress.recipe.sections import Recipe


def flatten(recipe: BaseModel, prefix: str = "") -> dict[str, object]:
    """`{"policy.bits": [4], ...}` without variants, so that a changed setting can be named."""
    flat: dict[str, object] = {}
    for name in type(recipe).model_fields:
        if name in ("variants", "require"):
            continue
        value = getattr(recipe, name)
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _plain(value)
    return flat


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default and every override filled in, without variants: it
    reads back as an equal one."""
    settings = recipe.model_dump(mode="json", exclude={"variants", "require"})
    for key in recipe.quantization.foreign_keys:
        del settings["quantization"][key]
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
