"""Calibration and held-out text: the sources of a recipe become sequences of token ids.

The documents of a source are joined into one text, and the text is divided into as many equal
strata, by characters, as sequences are wanted of it. In each stratum the seed draws a window and
a start among the window's tokens; the start moves to the nearest word that begins where a whole
sequence still fits (with a chat template: to the nearest conversation). So the sequences cover the
whole text, cannot overlap, and only windows are tokenised, however long the text is. A stratum with
too few tokens means that the text is short or very uneven: then all of it is tokenised and divided
by tokens instead, which fails only where the text really is too short.

A sequence begins with what the model's tokenizer puts in front of a text (BOS, or nothing) and is
otherwise an uninterrupted piece of the source: no BOS or EOS is added further in or at the end.

Only the seed, the text and the tokenizer decide: `random.Random.random` is the same on every
machine, sources are read in the recipe's order, and chat templates are shown a clock that stands.
"""

import glob
import itertools
import logging
import re
import tempfile
import textwrap
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from se_compress.errors import RecipeError, SourceError
from se_compress.recipe import Calibration, DataSource, Validation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_LIMIT = 64  # characters read of a data set per token wanted of it; text has 3 to 5 per token
_WINDOW = 8  # characters tokenised at first per token of a sequence; doubled until they suffice
_BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_ACCEPTED = "give a .txt, .jsonl or .parquet file, or the name of a data set on the Hub"
_HUB_NAME = re.compile(r"\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?")
_SPACE = re.compile(r"\s")
_TODAY = date(2025, 1, 1)  # what a chat template that writes the date is told


def draw_sequences(
    text: Calibration | Validation, model_path: Path, where: str
) -> tuple[tuple[int, ...], ...]:
    """`text.samples` sequences of exactly `text.sequence_length` token ids, equal for equal input.

    model_path  directory with the model's tokenizer; no network and no remote code is used for it
    where       the recipe's section, "calibration" or "validation"; begins every message

    The sources take turns, the first one first, so any number of leading sequences is spread evenly
    over them. Documents of a source are joined by a blank line. A .txt file is one document and is
    read whole. Of .jsonl, .parquet and the Hub, rows are streamed in order, without a copy on disk,
    until they hold READ_LIMIT characters per wanted token; the rest is not looked at.

    With `text.chat_template`, a row's messages are written by the tokenizer's template and follow
    each other without a blank line; plain text (of a .txt file: each paragraph) becomes one message
    of the user.

    Raises SourceError if a source or the tokenizer cannot be used, RecipeError if `text.samples` is
    less than the number of sources. Prints nothing.
    """
    sources = len(text.data)
    if text.samples < sources:
        raise RecipeError(
            f"{where}.samples is {text.samples}, but {where}.data lists {sources} sources; "
            "ask for at least one sample of each"
        )
    with _silence():
        tokenizer = _load_tokenizer(model_path, text, where)
        prefix = _prefix(tokenizer)
        drawn = [_draw(_demand(text, i, where, tokenizer, prefix)) for i in range(sources)]
    turns = itertools.zip_longest(*drawn)
    return tuple(sequence for turn in turns for sequence in turn if sequence is not None)


@dataclass(frozen=True)
class _Demand:
    """What one source is asked for, and how messages name it.

    key     "calibration.data", with an index if there are several sources
    seed    differs from source to source
    prefix  ids in front of every sequence
    """

    source: DataSource
    key: str
    where: str
    count: int
    length: int
    seed: str
    chat: bool
    tokenizer: "PreTrainedTokenizerBase"
    prefix: tuple[int, ...]

    def error(self, problem: str) -> SourceError:
        return SourceError(f"{self.key}: {self.source.data} {problem}")


def _demand(
    text: Calibration | Validation,
    position: int,
    where: str,
    tokenizer: "PreTrainedTokenizerBase",
    prefix: tuple[int, ...],
) -> _Demand:
    several = len(text.data) > 1
    return _Demand(
        source=text.data[position],
        key=f"{where}.data[{position}]" if several else f"{where}.data",
        where=where,
        count=len(range(position, text.samples, len(text.data))),
        length=text.sequence_length,
        seed=f"{text.seed}:{position}",
        chat=text.chat_template,
        tokenizer=tokenizer,
        prefix=prefix,
    )


# ---------------------------------------------------------------------------------- the tokenizer


def _load_tokenizer(
    model_path: Path, text: Calibration | Validation, where: str
) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises bare Exceptions
        if not any(model_path.glob("tokenizer*")):
            raise SourceError(f"{model_path}: there is no tokenizer.json in it") from None
        raise SourceError(f"{model_path}: unusable tokenizer: {_cause(error)}") from None
    if text.chat_template and not tokenizer.chat_template:
        raise SourceError(
            f"{where}.chat_template is true, but the tokenizer in {model_path} has no chat template"
        )
    return tokenizer


def _prefix(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """What the tokenizer puts in front of a text: usually BOS or nothing."""
    plain = tokenizer("text", add_special_tokens=False)["input_ids"]
    full = tokenizer("text")["input_ids"]
    places = range(len(full) - len(plain) + 1)
    return tuple(full[: next((i for i in places if full[i : i + len(plain)] == plain), 0)])


# ------------------------------------------------------------------------------------ the drawing


@dataclass(frozen=True)
class _Corpus:
    """All text of a source; `conversations` are the offsets at which one begins (else empty)."""

    text: str
    conversations: frozenset[int]


@dataclass(frozen=True)
class _Tokens:
    """Tokens of a piece of text. `starts` holds the indices at which a sequence had better begin:
    those of conversations, then those of words; the first kind within reach is taken."""

    ids: Sequence[int]
    starts: tuple[Sequence[int], ...]

    def pick(self, low: int, high: int, length: int, share: float) -> tuple[int, ...]:
        """`length` ids from [low, high); `share` in [0, 1) says where in the room that is left."""
        last = high - length
        drawn = low + int(share * (last - low + 1))
        reachable = (k[bisect_left(k, low) : bisect_right(k, last)] for k in self.starts)
        nearest = next(filter(None, reachable), [drawn])
        start = min(nearest, key=lambda index: abs(index - drawn))
        return tuple(self.ids[start : start + length])


def _draw(demand: _Demand) -> list[tuple[int, ...]]:
    corpus, length = _read(demand), demand.length - len(demand.prefix)
    bodies = _from_strata(demand, corpus, length) or _from_whole(demand, corpus, length)
    return [demand.prefix + body for body in bodies]


def _from_strata(demand: _Demand, corpus: _Corpus, length: int) -> list[tuple[int, ...]] | None:
    """One sequence of each stratum of characters; None if one of them holds too few tokens."""
    random, size, bodies = Random(demand.seed), len(corpus.text), []
    for index in range(demand.count):
        low, high = size * index // demand.count, size * (index + 1) // demand.count
        window, share = random.random(), random.random()
        tokens = _tokens_of_window(demand, corpus, (low, high), length, window)
        if tokens is None:
            return None
        bodies.append(tokens.pick(0, len(tokens.ids), length, share))
    return bodies


def _tokens_of_window(
    demand: _Demand, corpus: _Corpus, stratum: tuple[int, int], least: int, share: float
) -> _Tokens | None:
    """A window with at least `least` tokens; `share` in [0, 1) says where in the stratum."""
    (low, high), width = stratum, _WINDOW * least
    while True:
        begin = low + int(share * (max(high - low - width, 0) + 1))
        tokens = _encode(demand, corpus, begin, min(begin + width, high))
        if len(tokens.ids) >= least:
            return tokens
        if width >= high - low:
            return None
        width *= 2


def _from_whole(demand: _Demand, corpus: _Corpus, length: int) -> list[tuple[int, ...]]:
    """One sequence of each stratum of tokens, exact to the last token of the text."""
    tokens = _encode(demand, corpus, 0, len(corpus.text))
    size, count, random = len(tokens.ids), demand.count, Random(demand.seed)
    if size < count * length:
        raise _too_short(demand, size, length)
    return [
        tokens.pick(size * i // count, size * (i + 1) // count, length, random.random())
        for i in range(count)
    ]


def _too_short(demand: _Demand, size: int, length: int) -> SourceError:
    key = f"{demand.where}.sequence_length"
    if size < length:
        return demand.error(
            f"has {size} tokens, shorter than one sequence of {demand.length}; "
            f"lower {key} or give more text"
        )
    return demand.error(
        f"has about {size} tokens, but {demand.count} sequences of {demand.length} take "
        f"{demand.count * length} of it; lower {demand.where}.samples or {key}, or give more text"
    )


def _encode(demand: _Demand, corpus: _Corpus, begin: int, end: int) -> _Tokens:
    """Tokens of `corpus.text[begin:end]`, none added. A tokenizer in pure Python has no offsets:
    then sequences begin where they were drawn."""
    fast = demand.tokenizer.is_fast
    encoding = demand.tokenizer(
        corpus.text[begin:end],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=fast,
        verbose=False,  # else it warns of a text that is longer than the model's context
    )
    places = [begin + offset for offset, _ in encoding["offset_mapping"]] if fast else []
    conversations = [i for i, place in enumerate(places) if place in corpus.conversations]
    words = [
        i  # not inside a character that takes several tokens: those share their place
        for i, (before, place) in enumerate(zip([-1, *places], places, strict=False))
        if place != before and _is_word_start(corpus.text, place)
    ]
    return _Tokens(encoding["input_ids"], (conversations, words))


def _is_word_start(text: str, place: int) -> bool:
    return place == 0 or _SPACE.search(text, place - 1, place + 1) is not None


# ------------------------------------------------------------------------------------ the reading


def _read(demand: _Demand) -> _Corpus:
    """The documents of a source in order, joined; see `draw_sequences` for how many."""
    documents: list[str] = []
    wanted = READ_LIMIT * demand.count * demand.length
    for number, value in enumerate(_values(demand), start=1):
        document = _document(demand, value, f"in column {demand.source.column!r}, row {number}")
        if document.strip():
            documents.append(document)
            wanted -= len(document)
        if wanted <= 0:
            break
    if not documents:
        raise demand.error(f"holds no text; {_ACCEPTED}")
    if not demand.chat:
        return _Corpus("\n\n".join(documents), frozenset())
    begins = itertools.accumulate((len(d) for d in documents), initial=0)
    return _Corpus("".join(documents), frozenset(begins))


def _document(demand: _Demand, value: object, at: str) -> str:
    """The text of one row; "" for a row without any."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    if demand.chat:
        return _conversation(demand, value, at)
    if not isinstance(value, str):
        hint = f"; for chat messages, set {demand.where}.chat_template: true"
        raise demand.error(
            f"has a {type(value).__name__} {at}, where text is expected"
            + (hint if isinstance(value, list) else "")
        )
    return value.removeprefix("\ufeff")


def _conversation(demand: _Demand, value: object, at: str) -> str:
    """What the template makes of a row, less the prefix: every sequence begins with that anyway."""
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise demand.error(
            f"has a {type(value).__name__} {at}, where text or a list of {{role, content}} "
            "messages is expected"
        )
    present = [{k: v for k, v in m.items() if v is not None} for m in messages]
    try:
        rendered = demand.tokenizer.apply_chat_template(
            present, tokenize=False, strftime_now=_TODAY.strftime
        )
    except (TemplateError, TypeError, ValueError) as error:
        refusal = f"has messages {at}, that the chat template refuses: {_cause(error)}"
        raise demand.error(refusal) from None
    return str(rendered).removeprefix(str(demand.tokenizer.decode(list(demand.prefix))))


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _values(demand: _Demand) -> Iterator[object]:
    column = demand.source.column
    for row in _rows(demand):
        if column not in row:
            raise demand.error(f"has no column {column!r}; it has {', '.join(row)}")
        yield row[column]


def _rows(demand: _Demand) -> Iterator[Mapping[str, Any]]:
    """Rows as the `datasets` library streams them. Its lock file of a local source is kept out of
    the user's cache; of a data set that the cache holds already, that copy serves without network.
    """
    from datasets import load_dataset

    local = _is_local(demand)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = _local_arguments(demand, scratch) if local else _hub_arguments(demand)
        try:
            yield from load_dataset(**arguments, streaming=True)
        except Exception as error:  # datasets, pyarrow, fsspec and httpx share no base class
            raise _unreadable(demand, local, _cause(error)) from None


def _unreadable(demand: _Demand, local: bool, cause: str) -> SourceError:
    if local:
        return demand.error(f"cannot be read as {Path(demand.source.data).suffix}: {cause}")
    return demand.error(
        f"is no file here and cannot be read as a data set on the Hub: {cause}; {_ACCEPTED}"
    )


def _is_local(demand: _Demand) -> bool:
    """Whether it is a file to be read, and not a name on the Hub. Raises what makes it neither."""
    path = Path(demand.source.data)
    try:
        known = path.suffix.lower() in _BUILDERS
        if path.is_dir():
            raise demand.error(f"is a directory; {_ACCEPTED}")
        if path.exists() and not known:
            raise demand.error(f"is a file of another kind; {_ACCEPTED}")
        if path.exists() and path.stat().st_size == 0:
            raise demand.error(f"is empty; {_ACCEPTED}")
        if not path.exists() and (known or not _HUB_NAME.fullmatch(demand.source.data)):
            raise demand.error(f"does not exist; {_ACCEPTED}")
    except OSError as error:
        raise demand.error(f"cannot be read: {_cause(error)}") from None
    return known


def _local_arguments(demand: _Demand, scratch: str) -> dict[str, Any]:
    path = Path(demand.source.data)
    builder = _BUILDERS[path.suffix.lower()]
    documents = {"sample_by": "paragraph" if demand.chat else "document"}
    return {
        "path": builder,
        "data_files": [glob.escape(str(path))],
        "split": "train",
        "cache_dir": scratch,
        **(documents if builder == "text" else {}),
    }


def _hub_arguments(demand: _Demand) -> dict[str, Any]:
    source = demand.source
    return {"path": source.data, "name": source.config, "split": source.split}


# ------------------------------------------------------------------------------------ the manners


@contextmanager
def _silence() -> Iterator[None]:
    """Logs, warnings and progress bars of the libraries are off inside, afterwards as before."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    bars_shown = not datasets.utils.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars_shown:
                datasets.enable_progress_bars()


def _cause(error: Exception) -> str:
    """The message of a library's error in one line of moderate length."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
