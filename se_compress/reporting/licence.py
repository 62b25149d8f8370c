"""The licence that a model's card names, which the card of its result passes on."""

from pathlib import Path

from se_compress.errors import one_line
from se_compress.recipe_file import parse_yaml

CARD = "README.md"
_CARD_CHARACTERS = 2**20  # what describes a model stands at the beginning of its card
_LICENCE_CHARACTERS = 200


def licence_of(model: Path) -> str | None:
    """`license` of the card beside the weights in one line, several with commas; None if the card
    names none, or if it cannot be read: it is anybody's text, and the weights could be."""
    try:
        front = parse_yaml(_front_matter(model / CARD))
    except (OSError, ValueError):
        return None
    named = front.get("license") if isinstance(front, dict) else None
    licences = [one for one in (named if isinstance(named, list) else [named]) if one]
    if not all(isinstance(one, str | int | float) for one in licences):
        return None
    return one_line(", ".join(map(str, licences)), _LICENCE_CHARACTERS) if licences else None


def _front_matter(card: Path) -> str:
    """The YAML between two lines of dashes at the beginning; "" without them."""
    if not card.is_file():  # opening a pipe would wait for ever
        return ""
    with card.open(encoding="utf-8-sig", errors="replace") as file:
        text = file.read(_CARD_CHARACTERS)
    before, *parts = text.split("---\n", 2)
    return parts[0] if len(parts) == 2 and not before.strip() else ""
