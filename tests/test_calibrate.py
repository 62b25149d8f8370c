"""Sequences are what the recipe asks for, drawn alike everywhere, and each refusal is one line.

The tokenizer is real and small: byte-level BPE with a handful of merges, so that most characters
are one token and the expected ids do not depend on how some library trains.
"""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets.arrow_writer import ArrowWriter
from tiny import BOS, EOS, VOCABULARY, save_tokenizer
from transformers import AutoTokenizer

from se_compress.artifacts import digest_of
from se_compress.errors import RecipeError, ResourceError, SourceError
from se_compress.opening.source import open_source
from se_compress.recipe import Calibration, Validation
from se_compress.text.calibrate import draw_sequences, vocabulary_of

TinyModel = Callable[[str], Path]
SPACES = 16  # characters of the longest token, a run of spaces
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
NUMBERS = " ".join(f"{n:05d}" for n in range(2000))  # every piece stands in one place only
CHAT = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("bos"), bos=True)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("chat"), bos=True, template="<s>" + TEMPLATE)


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    return write(tmp_path / "numbers.txt", NUMBERS)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def draw(
    model: Path, data: object, samples: int = 4, length: int = 16, **settings: object
) -> tuple[tuple[int, ...], ...]:
    if isinstance(data, Path):
        data = str(data)
    text = {"data": data, "samples": samples, "sequence_length": length, **settings}
    return draw_sequences(Calibration.model_validate(text), model, "calibration")


def decoded(model: Path, sequences: tuple[tuple[int, ...], ...]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode(list(ids)) for ids in sequences]


def refusal(model: Path, data: object, **settings: object) -> str:
    with pytest.raises(SourceError) as caught:
        draw(model, data, **settings)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------ what is drawn


def test_shape_and_type(plain: Path, numbers: Path) -> None:
    sequences = draw(plain, numbers, samples=7, length=33)
    assert [len(ids) for ids in sequences] == [33] * 7
    assert type(sequences) is tuple
    assert {type(ids) for ids in sequences} == {tuple}
    assert {type(i) for ids in sequences for i in ids} == {int}


def test_held_out_text_is_drawn_alike(plain: Path, numbers: Path) -> None:
    text = Validation(data=[str(numbers)], samples=4, sequence_length=16)  # type: ignore[arg-type]
    assert draw_sequences(text, plain, "validation") == draw(plain, numbers)


def test_the_seed_gives_the_same_tokens_everywhere(with_bos: Path, tmp_path: Path) -> None:
    text = "".join(f"In the {n}th year the café \N{SNOWMAN} lost {n * n}.\n\n" for n in range(400))
    sequences = draw(with_bos, write(tmp_path / "a.txt", text), samples=8, length=32, seed=3)
    assert decoded(with_bos, sequences)[0] == "<s>☃ lost 961.\n\nIn the 32th year the ca"
    assert digest_of(sequences) == "acaebdedcbb7f7dc"
    moved = write(tmp_path / "b.txt", text)
    assert draw(with_bos, moved, samples=8, length=32, seed=3) == sequences
    assert draw(with_bos, moved, samples=8, length=32, seed=4) != sequences


@pytest.mark.parametrize("length", [16, 17, 100, 2999])
@pytest.mark.parametrize("samples", [1, 3, 4])
def test_sequences_are_pieces_in_order_without_overlap(
    plain: Path, numbers: Path, samples: int, length: int
) -> None:
    end = 0
    for piece in decoded(plain, draw(plain, numbers, samples=samples, length=length, seed=length)):
        begin = NUMBERS.index(piece, end)
        end = begin + len(piece)


def test_a_sequence_begins_at_a_word(plain: Path, numbers: Path) -> None:
    for seed in range(5):
        pieces = decoded(plain, draw(plain, numbers, samples=20, seed=seed))
        assert all(re.match(r" ?\d{5}( |$)", piece) for piece in pieces)


def test_every_part_of_the_text_is_visited(plain: Path, numbers: Path) -> None:
    pieces = decoded(plain, draw(plain, numbers, samples=20))
    strata = [NUMBERS.index(piece) * 20 // len(NUMBERS) for piece in pieces]
    assert strata == list(range(20))


def test_a_character_of_several_tokens_is_not_cut_in_front(plain: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\N{SNOWMAN} \N{CLOUD} \N{UMBRELLA} " * 300)
    for piece in decoded(plain, draw(plain, path, samples=40)):
        assert not piece.startswith("\N{REPLACEMENT CHARACTER}")


# ------------------------------------------------------------------------------- too little text


def test_text_that_just_suffices_is_used_up(with_bos: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", NUMBERS[: 4 * 15])  # each of the four brings its own BOS
    pieces = decoded(with_bos, draw(with_bos, path))
    assert "".join(piece.removeprefix("<s>") for piece in pieces) == NUMBERS[: 4 * 15]


def test_one_token_less_does_not_suffice(with_bos: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", NUMBERS[: 4 * 15 - 1])
    assert refusal(with_bos, path) == (
        f"calibration.data: {path} has about 59 tokens, but 4 sequences of 16 take 60 of it; "
        "lower calibration.samples or calibration.sequence_length, or give more text"
    )


@pytest.mark.parametrize(("ahead", "fits"), [(15, True), (16, False), (20, False)])
def test_a_sequence_has_room_for_text(
    numbers: Path, tmp_path: Path, ahead: int, fits: bool
) -> None:
    model = save_tokenizer(tmp_path / "model", bos=True)
    file = model / "tokenizer.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    single = settings["post_processor"]["single"]
    settings["post_processor"]["single"] = [single[0]] * ahead + single[1:]
    write(file, json.dumps(settings))
    if fits:
        assert {len(sequence) for sequence in draw(model, numbers)} == {16}
    else:
        assert refusal(model, numbers) == (
            "calibration.sequence_length is 16, but the tokenizer puts "
            f"{ahead} tokens in front of a text; raise it"
        )


def test_shorter_than_one_sequence(plain: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "too short")
    assert refusal(plain, path, samples=1) == (
        f"calibration.data: {path} has 9 tokens, shorter than one sequence of 16; "
        "lower calibration.sequence_length or give more text"
    )


def test_uneven_text_is_divided_by_tokens(plain: Path, tmp_path: Path) -> None:
    words = NUMBERS[:100]
    path = write(tmp_path / "a.txt", " " * SPACES * 40 + words)  # a stratum of spaces: 10 tokens
    pieces = decoded(plain, draw(plain, path, samples=4, length=30))
    assert pieces[0] == " " * SPACES * 30
    assert pieces[-1] in words


def test_a_window_grows_until_it_holds_a_sequence(plain: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", " " * SPACES * 400 + "end")
    assert decoded(plain, draw(plain, path, samples=1))[0].startswith(" " * SPACES * 10)


# --------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_special_tokens(tmp_path: Path, numbers: Path, bos: bool, eos: bool) -> None:
    model = save_tokenizer(tmp_path / "model", bos=bos, eos=eos)
    for ids in draw(model, numbers):
        assert len(ids) == 16
        assert (ids[0] == BOS) is bos
        assert not {BOS, EOS} & set(ids[1:])


# ----------------------------------------------------------------------------------------- sources


def test_formats_agree(plain: Path, tmp_path: Path) -> None:
    documents = ["One  two\n\nthree", NUMBERS[:300], NUMBERS[300:900]]
    rows: list[dict[str, object]] = [{"id": i, "text": d} for i, d in enumerate(documents)]
    paths = (
        write(tmp_path / "a.TXT", "\ufeff" + "\n\n".join(documents)),
        write_jsonl(
            tmp_path / "a[1]*.jsonl", [*rows[:1], {"text": None}, {"text": " "}, *rows[1:]]
        ),
        tmp_path / "a.parquet",
    )
    write_jsonl(tmp_path / "a1.jsonl", [{"text": "not this one"}])
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), paths[2])
    text, lines, table = (draw(plain, path, samples=20, length=40) for path in paths)
    assert text == lines == table
    assert decoded(plain, text)[0].endswith("  two\n\nthree\n\n00000 00001 00002 00003 0000")


def test_column(plain: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "body": NUMBERS}])
    source = {"data": str(path), "column": "body"}
    assert all(piece in NUMBERS for piece in decoded(plain, draw(plain, source)))


def test_sources_take_turns(plain: Path, tmp_path: Path) -> None:
    letters = ["a", "b", "c"]
    paths = [str(write(tmp_path / f"{letter}.txt", letter * 999)) for letter in letters]
    pieces = decoded(plain, draw(plain, paths, samples=8))
    assert [piece[0] for piece in pieces] == [*letters, *letters, "a", "b"]


def test_sources_of_the_same_text_are_drawn_apart(plain: Path, numbers: Path) -> None:
    first, second = draw(plain, [str(numbers)] * 2, samples=2)
    assert first != second


def test_reading_stops_at_the_limit(plain: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": NUMBERS[: 64 * 16]}, {"text": 1}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert draw(plain, path, samples=1)
    assert "has a int in column 'text', row 2" in refusal(plain, path, samples=2)


def test_fewer_samples_than_sources(plain: Path, numbers: Path) -> None:
    with pytest.raises(RecipeError, match=r"calibration\.samples is 1, but .* lists 2 sources"):
        draw(plain, [str(numbers)] * 2, samples=1)


# ----------------------------------------------------------------------------------- chat template


def test_conversations_begin_sequences(chatty: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": CHAT}] * 20)
    sequences = draw(chatty, path, samples=6, length=43, chat_template=True)
    assert decoded(chatty, sequences) == ["<s><user> Hello there\n<assistant> Good day\n<user"] * 6
    assert all(ids.count(BOS) == 1 for ids in sequences)


def test_plain_rows_become_messages_of_the_user(chatty: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "Hello there"}, {"text": ""}] * 20
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    pieces = decoded(chatty, draw(chatty, path, length=22, chat_template=True))
    assert pieces == ["<s><user> Hello there\n<user"] * 4


def test_paragraphs_become_messages_of_the_user(chatty: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "Hello there\n\n" * 20)
    pieces = decoded(chatty, draw(chatty, path, length=22, chat_template=True))
    assert pieces == ["<s><user> Hello there\n<user"] * 4


def test_a_conversation_longer_than_its_stratum_is_entered_at_a_word(
    chatty: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": NUMBERS}])
    pieces = decoded(chatty, draw(chatty, path, chat_template=True))
    assert all(re.match(r"<s> ?\d{5} ", piece) for piece in pieces[1:])


def test_a_template_that_writes_the_date_is_told_a_fixed_one(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}.\n\n"
    model = save_tokenizer(tmp_path / "model", template=template)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "Hello there"}] * 9)
    pieces = decoded(model, draw(model, path, samples=1, length=24, chat_template=True))
    assert pieces == ["01 Jan 2025: Hello there.\n0"]


def test_no_chat_template(plain: Path, numbers: Path) -> None:
    assert refusal(plain, numbers, chat_template=True) == (
        f"calibration.chat_template is true, but the tokenizer in {plain} has no chat template"
    )


def test_messages_that_the_template_refuses(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    model = save_tokenizer(tmp_path / "model", template=template)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": CHAT}])
    assert refusal(model, path, chat_template=True) == (
        f"calibration.data: {path} has messages in column 'text', row 1, that the chat template "
        "refuses: roles must alternate"
    )


def test_rows_that_are_no_messages(chatty: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": [{"speaker": "user", "line": "Hello"}]}])
    assert "has a list in column 'text', row 1, where text or a list of {role, content}" in refusal(
        chatty, path, chat_template=True
    )


def test_messages_without_the_setting(chatty: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": CHAT}])
    assert refusal(chatty, path).endswith("set calibration.chat_template: true")


CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Bern"}}}
OTHER = {"type": "function", "function": {"name": "g", "arguments": {"day": "2026-11-27"}}}
TALKS: list[list[dict[str, object]]] = [
    [CHAT[0], {"role": "assistant", "tool_calls": [CALL]}],  # type: ignore[list-item]
    [{"role": "assistant", "tool_calls": [OTHER]}, {"role": "tool", "content": "Rain"}],
]
CALLS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ m.tool_calls|tojson if m.tool_calls }}"
    "\n{% endfor %}"
)


def test_tool_calls_without_content_are_read_alike_from_every_format(tmp_path: Path) -> None:
    """Arrow gives each call the arguments of the other one, as nulls."""
    model = save_tokenizer(tmp_path / "model", template=CALLS)
    rows: list[dict[str, object]] = [{"text": talk} for talk in TALKS]
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), table)
    text = write_jsonl(tmp_path / "b.jsonl", [{"text": json.dumps(talk)} for talk in TALKS])
    drawn = [
        draw(model, path, samples=1, length=210, chat_template=True)
        for path in (lines, table, text)
    ]
    assert drawn[0] == drawn[2]
    (written,) = decoded(model, drawn[0])
    assert written.startswith("<user> Hello there\n<assistant> ")
    assert '"arguments": {"city": "Bern"}}}]' in written
    (from_arrow,) = decoded(model, drawn[1])
    assert "null" not in from_arrow
    assert '"city": "Bern"' in from_arrow


def test_sharegpt_and_parts_are_read_as_messages_are(chatty: Path, tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Good day"}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    drawn = set()
    for i, talk in enumerate((CHAT, shared, parts, {"messages": CHAT}, json.dumps(shared))):
        path = write_jsonl(tmp_path / f"{i}.jsonl", [{"text": talk}] * 20)
        drawn.add(draw(chatty, path, length=22, chat_template=True))
        table = tmp_path / f"{i}.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist([{"text": talk}] * 20), table)
        drawn.add(draw(chatty, table, length=22, chat_template=True))
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ([], "has a list in column 'text', row 5, where at least one message is expected"),
        ([{"role": "user"}], "row 5, whose message 1 (user) has no content"),
        ([{"from": "martian", "value": "x"}], "row 5, whose message 1 is from 'martian'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "row 5, whose message 1 has a part"),
        ([{"role": "odd", "content": "x"}], "row 5, that the chat template refuses: no odd here"),
        (5, "has a int in column 'text', row 5, where text or a list of {role, content}"),
    ],
)
def test_one_bad_row_among_many_is_told(tmp_path: Path, bad: object, problem: str) -> None:
    template = "{% if messages[0].role == 'odd' %}{{ raise_exception('no odd here') }}{% endif %}"
    model = save_tokenizer(tmp_path / "model", template=template + TEMPLATE)
    rows: list[dict[str, object]] = [{"text": CHAT}] * 4 + [{"text": bad}] + [{"text": CHAT}] * 4
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert problem in refusal(model, path, samples=9, length=64, chat_template=True)


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_chat_in_another_column_is_pointed_at(chatty: Path, tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, name: CHAT}] * 20)
    assert refusal(chatty, path).endswith(
        f"has no column 'text'; it has id, {name}; set its column: {name} and "
        "calibration.chat_template: true"
    )
    assert refusal(chatty, path, chat_template=True).endswith(f"; set its column: {name}")
    source = {"data": str(path), "column": name}
    assert draw(chatty, source, length=22, chat_template=True)


# --------------------------------------------------------------------------------- unknown tokens


def test_a_token_beyond_the_embedding(plain: Path, tmp_path: Path) -> None:
    model = shutil.copytree(plain, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|x{i}|>" for i in range(60)])
    tokenizer.save_pretrained(model)
    identity = tokenizer.convert_tokens_to_ids("<|x59|>")
    source = write(tmp_path / "a.txt", (NUMBERS[:40] + "<|x59|>") * 20)
    text = Calibration(data=[str(source)], samples=2, sequence_length=64)  # type: ignore[arg-type]
    for where in ("calibration", "validation"):
        with pytest.raises(SourceError) as caught:
            draw_sequences(text, model, where, identity)
        assert f"{where}.data: {source} has the token '<|x59|>' of id {identity}, but the" in str(
            caught.value
        )
        assert f"embedding has {identity} rows" in str(caught.value)
    assert draw_sequences(text, model, "calibration", identity + 1)
    unused = write(tmp_path / "b.txt", NUMBERS)
    assert draw_sequences(text.model_copy(update={"data": draw_source(unused)}), model, "v", 288)


def draw_source(path: Path) -> object:
    return Calibration(data=[str(path)], samples=2, sequence_length=64).data  # type: ignore[arg-type]


def test_a_bos_beyond_the_embedding(with_bos: Path, numbers: Path) -> None:
    text = Calibration(data=[str(numbers)], samples=2, sequence_length=64)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"has the token '<s>' of id 0, but .* has 0 rows"):
        draw_sequences(text, with_bos, "calibration", 0)


def test_the_vocabulary_is_the_rows_of_the_embedding(tiny_model: TinyModel) -> None:
    for name in ("mixtral", "deepseek_v3-next-token"):
        assert vocabulary_of(open_source(str(tiny_model(name)))) == VOCABULARY


# ---------------------------------------------------------------------------------- JSON of rows


@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "A"}, {"text": "B"}]',
        '[\n {"text": "A"},\n {"text": "B"}\n]\n',
        '{\n "text": "A"\n}\n{\n "text": "B"\n}\n',
        '{"text": "A"}{"text": "B"}\n',
        '\ufeff{"text": "A"}\n\n  \n{"text": "B"}',
        '{"text": "A"}\r\n{"text": "B"}\r\n',
        '{"text": "A", "n": 1}\n{"text": "B", "n": "one", "m": [1, "x", null]}\n',
        '{"text": "A", "n": NaN}\n{"text": "B", "n": 123456789012345678901234567890}\n',
        '{"text": null}\n{"text": " "}\n{"text": "A"}\n{"text": "B"}\n',
    ],
)
def test_json_as_people_write_it(plain: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.replace("A", NUMBERS[:50]).replace("B", NUMBERS[50:99]).encode())
    assert decoded(plain, draw(plain, path, samples=1, length=101)) == [
        f"{NUMBERS[:50]}\n\n{NUMBERS[50:99]}"
    ]


def test_a_text_that_looks_like_a_date_is_a_text(plain: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "2026-11-27"}] * 20)
    assert "2026-11-27" in decoded(plain, draw(plain, path, samples=1, length=40))[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"text": "a", "text": "b"}', "line 1: 'text' stands twice in one object"),
        ('{"text": "a\\ud800"}', "has half a character (a lone surrogate) in column 'text', row 1"),
        ("[1]\n[2]\n", "row 1 is a int, not an object"),
        ('{"text": "a"}\n"abc"\n', "row 2 is a str, not an object"),
        ('null\n{"text": "a"}\n', "row 1 is a NoneType, not an object"),
        ('{"text": "a"}\n{"text": 1}\n', "has a int in column 'text', row 2"),
        (
            '{"text": "a"}\n{"messages": []}\n',
            "has no column 'text' in row 2; it has messages; set",
        ),
        ('{"text": "a"}\n{}\n', "has no column 'text' in row 2; it has nothing"),
        ('{"text": "a"}\n{"text": "b"\n', "cannot be read as .jsonl: line 2 is not JSON"),
        ("{" * 5000, "cannot be read as .jsonl: "),
        ("[" * 500_000, "cannot be read as .jsonl: "),
        ('{"text": ' + "9" * 5000 + "}", "cannot be read as .jsonl: "),
        (
            '{"text": {"a": 1}}',
            "has a dict in column 'text', row 1, where text is expected; for chat",
        ),
        ('{"' + "k" * 9000 + '": 1}', "has no column 'text'; it has kkk"),
        ("\0\0\0", "cannot be read as .jsonl: "),
        ("PK\x03\x04", "cannot be read as .jsonl: "),
    ],
)
def test_json_that_is_told(plain: Path, tmp_path: Path, text: str, problem: str) -> None:
    message = refusal(plain, write(tmp_path / "a.jsonl", text))
    assert problem in message
    assert len(message) - len(str(tmp_path)) < 400


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_hostile_bytes_end_in_one_line(plain: Path, tmp_path: Path, name: str) -> None:
    good = tmp_path / "good.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"text": NUMBERS}]), good)
    random, whole = Random(0), good.read_bytes()
    for case in range(20):
        content = bytearray(whole[: random.randrange(1, len(whole))] if case % 2 else whole)
        for _ in range(random.randrange(1, 40)):
            content[random.randrange(len(content))] = random.randrange(256)
        (tmp_path / name).write_bytes(content)
        message = outcome(plain, tmp_path / name)
        assert "\n" not in message
        assert len(message) - len(str(tmp_path)) < 400


def outcome(model: Path, data: Path) -> str:
    """How drawing ended: the message of a refusal, or nothing."""
    try:
        draw(model, data)
    except SourceError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_a_place_for_temporary_files_that_is_gone_is_no_fault_of_the_text(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"text": NUMBERS}]), tmp_path / "a.parquet")
    write(tmp_path / "a.txt", NUMBERS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ResourceError, match="no temporary directory can be made"):
        draw(plain, tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pipe_is_no_file(plain: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert " is no ordinary file; give" in refusal(plain, tmp_path / name)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["gone.txt", "a/b/gone", "./gone", "gone.PARQUET"])
def test_missing_file(plain: Path, name: str) -> None:
    assert refusal(plain, name) == (
        f"calibration.data: {name} does not exist; give a .txt, .jsonl or .parquet file, or the "
        "name of a data set on the Hub"
    )


def test_the_source_at_fault_is_named(plain: Path, numbers: Path) -> None:
    assert refusal(plain, [str(numbers), "gone.txt"]).startswith("calibration.data[1]: gone.txt")


def test_not_a_text_file(plain: Path, tmp_path: Path) -> None:
    assert " is a directory; give a .txt" in refusal(plain, tmp_path)
    other = write(tmp_path / "a.csv", "text\nhello\n")
    assert f"{other} is a file of another kind; give a .txt" in refusal(plain, other)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    message = refusal(plain, tmp_path / "binary.txt")
    assert "cannot be read as .txt: 'utf-8' codec" in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_empty_file(plain: Path, tmp_path: Path, name: str) -> None:
    assert " is empty; give" in refusal(plain, write(tmp_path / name, ""))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_blank_file(plain: Path, tmp_path: Path, name: str) -> None:
    assert " holds no text; give" in refusal(plain, write(tmp_path / name, "\n\n"))


def test_missing_column(plain: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "body": "x"}])
    assert refusal(plain, path).endswith(f"{path} has no column 'text'; it has id, body")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("text", ["nonsense", '{"text": "one"}\n{"text":\n'])
def test_invalid_file_prints_nothing(
    plain: Path, tmp_path: Path, name: str, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, text)
    assert f"{path} cannot be read as {path.suffix}: " in refusal(plain, path)
    assert capfd.readouterr() == ("", "")


def test_missing_tokenizer(tmp_path: Path, numbers: Path) -> None:
    write(tmp_path / "config.json", '{"model_type": "mixtral"}')
    assert refusal(tmp_path, numbers) == f"{tmp_path}: there is no tokenizer.json in it"
    gone = tmp_path / "gone"
    assert refusal(gone, numbers) == f"{gone}: there is no tokenizer.json in it"


@pytest.mark.parametrize("text", ["{", '{"version": "1.0"}', "{}"])
def test_broken_tokenizer(plain: Path, tmp_path: Path, numbers: Path, text: str) -> None:
    model = shutil.copytree(plain, tmp_path / "model")
    write(model / "tokenizer.json", text)
    assert f"{model}: unusable tokenizer: " in refusal(model, numbers)


# ----------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The libraries' own offline mode, with an empty cache of data sets."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture
def hub_name(offline_cache: Path) -> str:
    """A data set as `datasets` keeps it after a download: user/name, config "long", split "dev"."""
    directory = offline_cache / "user___name" / "long" / "0.0.0" / "abc123"
    directory.mkdir(parents=True)
    features = datasets.Features({"body": datasets.Value("string")})
    with ArrowWriter(path=str(directory / "name-dev.arrow"), features=features) as writer:
        writer.write({"body": NUMBERS[:3000]})
        writer.write({"body": NUMBERS[3000:]})
        rows, size = writer.finalize()
    split = {"name": "dev", "num_bytes": size, "num_examples": rows, "dataset_name": "name"}
    datasets.DatasetInfo(
        features=features,
        builder_name="parquet",
        dataset_name="name",
        config_name="long",
        version="0.0.0",
        splits=datasets.SplitDict.from_split_dict({"dev": split}),
    ).write_to_directory(str(directory))
    return "user/name"


def test_hub_name_with_config_split_and_column(
    plain: Path, hub_name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = {"data": hub_name, "config": "long", "split": "dev", "column": "body"}
    same = write(tmp_path / "a.txt", NUMBERS[:3000] + "\n\n" + NUMBERS[3000:])
    assert draw(plain, source, samples=32) == draw(plain, same, samples=32)
    assert capfd.readouterr() == ("", "")


def test_hub_names_that_do_not_fit(plain: Path, hub_name: str) -> None:
    source = {"data": hub_name, "config": "long", "split": "dev", "column": "body"}
    assert "has no column 'text'; it has body" in refusal(plain, {**source, "column": "text"})
    assert "Bad split: train. Available splits: ['dev']" in refusal(
        plain, {**source, "split": "train"}
    )
    assert "config 'short' Available configs in the cache: ['long']" in refusal(
        plain, {**source, "config": "short"}
    )


@pytest.mark.parametrize("name", ["no/such", "text-file.tsv"])
def test_unreachable_hub(plain: Path, offline_cache: Path, name: str) -> None:
    assert refusal(plain, name) == (
        f"calibration.data: {name} is no file here and cannot be read as a data set on the Hub: "
        f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled); give a .txt, .jsonl or "
        ".parquet file, or the name of a data set on the Hub"
    )


# ----------------------------------------------------------------------------------------- manners


def test_nothing_is_printed_cached_or_left_changed(
    chatty: Path, offline_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": NUMBERS}])
    level = logging.getLogger("datasets").level
    draw(chatty, path, samples=2, length=900)  # longer than model_max_length
    assert capfd.readouterr() == ("", "")
    assert not offline_cache.exists()
    assert logging.getLogger("datasets").level == level
    assert not datasets.utils.are_progress_bars_disabled()
