"""A recipe as a flat mapping of its settings."""

from pydantic import BaseModel


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


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
