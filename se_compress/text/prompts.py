"""Beginnings of held-out text for a model to go on with, as they are or as a user's message."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from se_compress.artifacts import ModelSource
from se_compress.errors import SourceError
from se_compress.recipe import Validation
from se_compress.text.calibrate import TODAY, prefix_of
from se_compress.text.chat import Template, Unreadable
from se_compress.text.tokenizer import load_tokenizer

Tokens = Sequence[Sequence[int]]
_MARK = "se-compress-puts-the-message-here"


@dataclass(frozen=True)
class Frame:
    """Token ids of a chat template around the message of a user, up to where the answer begins.

    prefix   what the tokenizer puts in front of any text
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    prefix: tuple[int, ...]

    def around(self, sequence: Sequence[int], length: int) -> tuple[int, ...]:
        """The first `length` tokens of a sequence as a message."""
        size = len(self.prefix)
        own = size if tuple(sequence[:size]) == self.prefix else 0
        return (*self.before, *sequence[own : own + length], *self.after)


def prompts_of(
    texts: Mapping[str, Tokens], validation: Validation, model_path: Path
) -> dict[str, list[tuple[int, ...]]]:
    """`validation.generation.prompts` beginnings of each text, spread over its sequences.

    With `generation.chat_template` they become messages of a user, but those of text that is a chat
    already stay as they are: each begins a conversation.
    """
    wanted = validation.generation
    frame = frame_of(model_path) if wanted.chat_template else None
    found = {}
    for name, text in texts.items():
        section = validation.of(name)
        framed = frame if not all(map(section.is_chat, section.data)) else None
        chosen = text[:: max(1, len(text) // wanted.prompts)][: wanted.prompts]
        found[name] = [
            framed.around(sequence, wanted.prompt_tokens)
            if framed
            else tuple(sequence[: wanted.prompt_tokens])
            for sequence in chosen
        ]
    return found


def frame_of(model_path: Path) -> Frame:
    """Raises SourceError if the tokenizer has no chat template, or one that leaves out what a user
    says."""
    key = "validation.generation.chat_template"
    tokenizer = load_tokenizer(model_path)
    if not tokenizer.chat_template:
        raise SourceError(f"{key} is true, but the tokenizer in {model_path} has no chat template")
    render = partial(
        tokenizer.apply_chat_template,
        tokenize=False,
        add_generation_prompt=True,
        strftime_now=TODAY.strftime,
    )
    try:
        with Template(render) as template:
            written = template.write([{"role": "user", "content": _MARK}])
    except Unreadable as problem:
        raise SourceError(f"{key}: {model_path}: a message {problem}") from None
    before, mark, after = written.partition(_MARK)
    if not mark:
        raise SourceError(f"{key}: the template in {model_path} leaves out what a user says")
    ids = [
        tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after)
    ]
    prefix = prefix_of(tokenizer)
    begins = () if ids[0][: len(prefix)] == prefix else prefix
    return Frame((*begins, *ids[0]), ids[1], prefix)


def end_tokens(source: ModelSource) -> frozenset[int]:
    """Tokens that end a text: those of generation_config.json, else those of config.json. Of a
    generation_config.json that cannot be read `engines/generation.py` tells."""
    try:
        settings = json.loads((source.path / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        settings = None
    ours = settings if isinstance(settings, dict) else {}
    found = ours.get("eos_token_id", source.text.get("eos_token_id"))
    items = found if isinstance(found, list) else [found]
    return frozenset(item for item in items if isinstance(item, int))
