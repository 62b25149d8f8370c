"""generation_config.json, which is copied as it is, as transformers reads it."""

import json
from pathlib import Path

FILE = "generation_config.json"


def why_not_saved(path: Path) -> str:
    """A sentence on a model's generation_config.json that transformers reads and will not write
    again, so that whoever loads the result cannot save it; "" where there is nothing to tell."""
    from transformers import GenerationConfig

    if not (path / FILE).is_file():
        return ""
    try:
        settings = json.loads((path / FILE).read_text(encoding="utf-8"))
        GenerationConfig.from_dict(settings).validate(strict=True)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"{FILE} is copied as it is, and transformers will not save it again: {reason}"
    return ""
