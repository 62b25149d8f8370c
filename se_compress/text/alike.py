"""Does a result read text as its source does? The tokenizer and the chat templates beside them.

No other gate sees a wrong template: they judge both models on the same token ids, while people give
the result text. Files that are equal byte for byte read alike. Where one differs (other tools save
a tokenizer anew), what counts is what both make of the same text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from se_compress.artifacts import GATES, Check, ModelSource
from se_compress.errors import SourceError
from se_compress.opening.auxiliary import copied_text, find_auxiliary, reads_text
from se_compress.text.calibrate import TODAY
from se_compress.text.chat import Message, Template, Unreadable
from se_compress.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GATE = GATES["text_alike"]
TEXTS = (
    "It is 12 degrees in Zürich, and 3.5 % of 1,024 is 35.84.\n\n\tdef f(x): return x**2\n",
    " Two  spaces, a tab\there, CAPITALS, don't, naïve, 東京, Ελλάδα, привет, 🙂.",
)
_QUESTION: Message = {"role": "user", "content": "What is 2 + 2?"}
_ANSWER: Message = {"role": "assistant", "content": "4."}
CHATS: Mapping[str, list[Message]] = {
    "a question": [_QUESTION],
    "a conversation": [_QUESTION, _ANSWER, _QUESTION],
    "a conversation with a system message": [{"role": "system", "content": "Be brief."}, _QUESTION],
}


def text_check(source: ModelSource, directory: Path) -> Check:
    """`text_alike` of the result in `directory`; not run for a source whose own tokenizer cannot be
    used, unless the files are equal."""
    try:
        others = _other_files(source, directory)
        if not others:
            return GATE.judge(1.0, GATE.limit, "the source's own files")
        ours = load_tokenizer(source.path)
    except SourceError as error:
        return Check(GATE.name, None, GATE.limit, None, str(error))
    try:
        theirs = load_tokenizer(directory)
    except SourceError as error:
        return GATE.judge(0.0, GATE.limit, str(error))
    pairs = list(_samples(ours, theirs))
    unlike = [what for what, alike in pairs if not alike]
    detail = f"other than the source's: {', '.join(others)}"
    if unlike:
        detail += f"; not read as the source reads it: {', '.join(unlike)}"
    return GATE.judge(1.0 - len(unlike) / len(pairs), GATE.limit, detail)


def _other_files(source: ModelSource, directory: Path) -> list[str]:
    """Files of the tokenizer and templates that are missing in the result, or others there."""
    files = find_auxiliary(source.path, source.config).files
    return [
        name
        for name, file in files.items()
        if reads_text(name) and not _same(name, file, directory / name)
    ]


def _same(name: str, file: Path, other: Path) -> bool:
    """Whether a file is the source's, with or without the code that it names."""
    if not other.is_file():
        return False
    found, text = other.read_bytes(), copied_text(name, file, keep_code=False)
    return found == file.read_bytes() or (text is not None and found == text.encode())


# ------------------------------------------------------------------------------- what both make of


def _samples(
    ours: "PreTrainedTokenizerBase", theirs: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, bool]]:
    """What was put to both tokenizers, and whether they agree on it."""
    yield "the vocabulary", ours.get_vocab() == theirs.get_vocab()
    yield "plain text", all(ours(text)["input_ids"] == theirs(text)["input_ids"] for text in TEXTS)
    first, second = _Chats(ours), _Chats(theirs)
    for what, messages in CHATS.items():
        yield what, first.of(messages) == second.of(messages)


@dataclass(frozen=True)
class _Chats:
    """A tokenizer's conversations."""

    tokenizer: "PreTrainedTokenizerBase"

    def of(self, messages: list[Message]) -> tuple[Any, ...]:
        """Token ids of a conversation, with the beginning of an answer and without; what a template
        refuses is empty, and so is all without a template."""
        if not self.tokenizer.chat_template:
            return ()
        return tuple(self._written(messages, begun) for begun in (False, True))

    def _written(self, messages: list[Message], begun: bool) -> tuple[int, ...]:
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=begun,
            strftime_now=TODAY.strftime,
        )
        try:
            with Template(render) as template:
                text = template.write(messages)
        except Unreadable:
            return ()
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
