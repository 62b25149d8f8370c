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

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from se_compress.artifacts import ModelSource
from se_compress.errors import RecipeError, SourceError, one_line
from se_compress.recipe import Calibration, Validation
from se_compress.running.places import expand
from se_compress.text.chat import Template, Unreadable, as_messages, looks_like_chat
from se_compress.text.text_sources import TextSource, quiet_libraries, values
from se_compress.text.tokenizer import load_tokenizer
from se_compress.text.turns import in_turns, shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_LIMIT = 64  # characters read of a data set per token wanted of it; text has 3 to 5 per token
Tokens = tuple[tuple[int, ...], ...]
HeldOut = Tokens | dict[str, Tokens]
_WINDOW = 8  # characters tokenised at first per token of a sequence; doubled until they suffice
_SPACE = re.compile(r"\s")
TODAY = date(2025, 1, 1)  # what a chat template that writes the date is told


def draw_tokens(text: Calibration | Validation, source: ModelSource) -> Tokens:
    """Sequences of token ids for a model, as a section of a recipe asks for them, see
    `draw_sequences`."""
    where = "calibration" if isinstance(text, Calibration) else "validation"
    data = tuple(one.model_copy(update={"data": expand(one.data)}) for one in text.data)
    at_home = text.model_copy(update={"data": data})
    return draw_sequences(at_home, source.path, where, vocabulary_of(source))


def draw_domains(text: Validation, source: ModelSource) -> HeldOut:
    """Held-out text: of each domain, by its name, or all of it if the recipe names none."""
    if not text.domain_names:
        return draw_tokens(text, source)
    return {name: draw_tokens(text.of(name), source) for name in text.domain_names}


def draw_sequences(
    text: Calibration | Validation, model_path: Path, where: str, vocabulary: int | None = None
) -> Tokens:
    """`text.samples` sequences of exactly `text.sequence_length` token ids, equal for equal input.

    model_path  directory with the model's tokenizer; no network and no remote code is used for it
    where       the recipe's section, "calibration" or "validation"; begins every message
    vocabulary  rows of the model's embedding (see `vocabulary_of`): a text with a token beyond them
                is refused. None takes any token, for a tokenizer without its model

    The sources share the samples by their weights, but each gives one at least. They take turns,
    the first one first, so any number of leading sequences is spread evenly over them. Documents of
    a source are joined by a blank line. A .txt file is one document and is read whole. Of .jsonl,
    .parquet and the Hub, rows are streamed in order, without a copy on disk, until they hold
    READ_LIMIT characters per wanted token; the rest is not looked at.

    With `chat_template`, of the section or of a source, a row's messages are written by the
    tokenizer's template and follow each other without a blank line; plain text (of a .txt file:
    each paragraph) becomes one message of the user.

    Raises SourceError if a source or the tokenizer cannot be used, RecipeError if `text.samples` is
    less than the number of sources. Prints nothing.
    """
    sources = len(text.data)
    if text.samples < sources:
        raise RecipeError(
            f"{where}.samples is {text.samples}, but {where}.data lists {sources} sources; "
            "ask for at least one sample of each"
        )
    with quiet_libraries():
        tokenizer = load_tokenizer(model_path)
        if any(map(text.is_chat, text.data)) and not tokenizer.chat_template:
            raise SourceError(
                f"{where}.chat_template is true, but the tokenizer in {model_path} has no chat "
                "template"
            )
        lexicon = _Lexicon(tokenizer, prefix_of(tokenizer), vocabulary)
        counts = shares(text.samples, [source.weight for source in text.data])
        demands = (_demand(text, i, n, where, lexicon) for i, n in enumerate(counts))
        drawn = [_draw(demand) for demand in demands]
    return tuple(in_turns(drawn))


def vocabulary_of(source: ModelSource) -> int:
    """Rows of a model's embedding: how many token ids it knows, from 0 on."""
    rows = [
        info.shape[0]
        for info in source.tensors.values()
        if info.kind == "embedding" and info.name.endswith("embed_tokens.weight")
    ]
    return min(rows) if rows else int(source.text["vocab_size"])


@dataclass(frozen=True)
class _Lexicon:
    """A tokenizer, the ids that it puts in front of a text, and the rows of the embedding."""

    tokenizer: "PreTrainedTokenizerBase"
    prefix: tuple[int, ...]
    vocabulary: int | None


@dataclass(frozen=True)
class _Demand:
    """What one source is asked for; `seed` differs from source to source."""

    text: TextSource
    count: int
    length: int
    seed: str
    lexicon: _Lexicon

    def error(self, problem: str) -> SourceError:
        return self.text.error(problem)


def _demand(
    text: Calibration | Validation, position: int, count: int, where: str, lexicon: _Lexicon
) -> _Demand:
    several = len(text.data) > 1
    return _Demand(
        text=TextSource(
            source=text.data[position],
            key=f"{where}.data[{position}]" if several else f"{where}.data",
            where=where,
            chat=text.is_chat(text.data[position]),
        ),
        count=count,
        length=text.sequence_length,
        seed=f"{text.seed}:{position}",
        lexicon=lexicon,
    )


def prefix_of(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
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
    prefix = demand.lexicon.prefix
    _check_known(demand, prefix)
    length = demand.length - len(prefix)
    if length < 1:
        raise SourceError(
            f"{demand.text.where}.sequence_length is {demand.length}, but the tokenizer puts "
            f"{len(prefix)} tokens in front of a text; raise it"
        )
    corpus = _read(demand)
    bodies = _from_strata(demand, corpus, length) or _from_whole(demand, corpus, length)
    return [prefix + body for body in bodies]


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
    key = f"{demand.text.where}.sequence_length"
    if size < length:
        return demand.error(
            f"has {size} tokens, shorter than one sequence of {demand.length}; "
            f"lower {key} or give more text"
        )
    return demand.error(
        f"has about {size} tokens, but {demand.count} sequences of {demand.length} take "
        f"{demand.count * length} of it; lower {demand.text.where}.samples or {key}, or give more "
        "text"
    )


def _encode(demand: _Demand, corpus: _Corpus, begin: int, end: int) -> _Tokens:
    """Tokens of `corpus.text[begin:end]`, none added. A tokenizer in pure Python has no offsets:
    then sequences begin where they were drawn."""
    fast = demand.lexicon.tokenizer.is_fast
    encoding = demand.lexicon.tokenizer(
        corpus.text[begin:end],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=fast,
        verbose=False,  # else it warns of a text that is longer than the model's context
    )
    _check_known(demand, encoding["input_ids"])
    places = [begin + offset for offset, _ in encoding["offset_mapping"]] if fast else []
    conversations = [i for i, place in enumerate(places) if place in corpus.conversations]
    words = [
        i  # not inside a character that takes several tokens: those share their place
        for i, (before, place) in enumerate(zip([-1, *places], places, strict=False))
        if place != before and _is_word_start(corpus.text, place)
    ]
    return _Tokens(encoding["input_ids"], (conversations, words))


def _check_known(demand: _Demand, ids: Sequence[int]) -> None:
    """Refuse a token that the embedding has no row for: a tokenizer may have been added to."""
    lexicon = demand.lexicon
    most = max(ids, default=0)
    if lexicon.vocabulary is None or most < lexicon.vocabulary:
        return
    token = one_line(repr(lexicon.tokenizer.convert_ids_to_tokens(most)), 60)
    raise demand.error(
        f"has the token {token} of id {most}, but the model's embedding has {lexicon.vocabulary} "
        "rows; take it out of the text, or give a model that was resized for its tokenizer"
    )


def _is_word_start(text: str, place: int) -> bool:
    return place == 0 or _SPACE.search(text, place - 1, place + 1) is not None


# ------------------------------------------------------------------------------------ the reading


def _read(demand: _Demand) -> _Corpus:
    """The documents of a source in order, joined; see `draw_sequences` for how many."""
    documents: list[str] = []
    wanted = READ_LIMIT * demand.count * demand.length
    with _reader(demand) as read:
        for at, value in values(demand.text):
            document = read(value, at)
            if document.strip():
                documents.append(document)
                wanted -= len(document)
            if wanted <= 0:
                break
    if not documents:
        raise demand.text.nothing()
    if not demand.text.chat:
        return _Corpus("\n\n".join(documents), frozenset())
    begins = itertools.accumulate((len(d) for d in documents), initial=0)
    return _Corpus("".join(documents), frozenset(begins))


@contextmanager
def _reader(demand: _Demand) -> Iterator[Callable[[object, str], str]]:
    """Makes a document of a row's value; "" of one without any text."""
    if not demand.text.chat:
        yield partial(_document, demand)
        return
    tokenizer, prefix = demand.lexicon.tokenizer, list(demand.lexicon.prefix)
    write = partial(tokenizer.apply_chat_template, tokenize=False, strftime_now=TODAY.strftime)
    with Template(write) as template:
        yield partial(_conversation, demand, template, str(tokenizer.decode(prefix)))


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _document(demand: _Demand, value: object, at: str) -> str:
    if _is_blank(value):
        return ""
    if not isinstance(value, str):
        hint = f"; for chat messages, set {demand.text.where}.chat_template: true"
        raise demand.error(
            f"has a {type(value).__name__} {at}, where text is expected"
            + (hint if looks_like_chat(value) else "")
        )
    return _checked(demand, value.removeprefix("\ufeff"), at)


def _conversation(demand: _Demand, template: Template, prefix: str, value: object, at: str) -> str:
    """What the template makes of a row, less the prefix: every sequence begins with that anyway."""
    if _is_blank(value):
        return ""
    try:
        messages = as_messages(value)
    except Unreadable as problem:
        raise demand.error(f"has a {type(value).__name__} {at}, {problem}") from None
    try:
        written = template.write(messages)
    except Unreadable as problem:
        raise demand.error(f"has messages {at}, {problem}") from None
    return _checked(demand, written, at).removeprefix(prefix)


def _checked(demand: _Demand, document: str, at: str) -> str:
    try:
        document.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair
        raise demand.error(f"has half a character (a lone surrogate) {at}") from None
    return document
