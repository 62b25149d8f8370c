"""A result is given text through its own tokenizer and chat template: those of the source."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from se_compress.artifacts import Check, ModelSource
from se_compress.opening.source import open_source
from se_compress.text.alike import text_check

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def pair(tiny_model: Callable[[str], Path], tmp_path: Path) -> tuple[ModelSource, Path]:
    """A source with a chat template, and a directory with the files of its tokenizer."""
    path, result = tmp_path / "source", tmp_path / "result"
    shutil.copytree(tiny_model("qwen3_moe"), path)
    tiny.save_tokenizer(path, template=TEMPLATE)
    shutil.copytree(path, result)
    return open_source(str(path)), result


def checked(pair: tuple[ModelSource, Path]) -> Check:
    return text_check(*pair)


def test_equal_files_read_alike_whatever_lies_beside_them(pair: tuple[ModelSource, Path]) -> None:
    (pair[1] / "notes.txt").write_text("of mine")
    check = checked(pair)
    assert (check.value, check.passed, check.detail) == (1.0, True, "the source's own files")


def test_another_chat_template_fails(pair: tuple[ModelSource, Path]) -> None:
    (pair[1] / "chat_template.jinja").write_text(
        "{% for m in messages %}[INST]{{ m.content }}{% endfor %}"
    )
    check = checked(pair)
    assert check.passed is False
    assert check.value == pytest.approx(2 / 5)
    assert check.detail == (
        "other than the source's: chat_template.jinja; not read as the source reads it: a "
        "question, a conversation, a conversation with a system message"
    )


def test_a_lost_chat_template_fails(pair: tuple[ModelSource, Path]) -> None:
    (pair[1] / "chat_template.jinja").unlink()
    assert checked(pair).passed is False


def test_a_template_that_ends_elsewhere_fails(pair: tuple[ModelSource, Path]) -> None:
    """Only the beginning of the answer is lost."""
    file = pair[1] / "chat_template.jinja"
    file.write_text(TEMPLATE.replace("<assistant>{% endif %}", "{% endif %}"))
    assert checked(pair).passed is False


def test_a_template_written_otherwise_passes_by_what_it_makes(
    pair: tuple[ModelSource, Path],
) -> None:
    (pair[1] / "chat_template.jinja").write_text("{# the same #}" + TEMPLATE)
    check = checked(pair)
    assert check.passed
    assert check.detail == "other than the source's: chat_template.jinja"


def test_a_tokenizer_with_one_word_more_fails(pair: tuple[ModelSource, Path]) -> None:
    file = pair[1] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["zzz"] = len(words)
    file.write_text(json.dumps(tokenizer))
    check = checked(pair)
    assert check.passed is False
    assert "the vocabulary" in check.detail


def test_a_tokenizer_that_puts_a_token_in_front_fails(pair: tuple[ModelSource, Path]) -> None:
    tiny.save_tokenizer(pair[1], bos=True, template=TEMPLATE)
    check = checked(pair)
    assert check.passed is False
    assert "plain text" in check.detail


def test_no_tokenizer_fails_with_what_is_missing(pair: tuple[ModelSource, Path]) -> None:
    for file in pair[1].glob("tokenizer*"):
        file.unlink()
    check = checked(pair)
    assert (check.value, check.passed) == (0.0, False)
    assert "there is no tokenizer.json in it" in check.detail


def test_a_source_without_a_tokenizer_is_not_judged(pair: tuple[ModelSource, Path]) -> None:
    for file in pair[0].path.glob("tokenizer*"):
        file.unlink()
    (pair[1] / "chat_template.jinja").write_text("other")
    check = checked(pair)
    assert check.passed is None
    assert "there is no tokenizer.json in it" in check.detail


def test_a_chat_template_that_raises_fails(pair: tuple[ModelSource, Path]) -> None:
    (pair[1] / "chat_template.jinja").write_text("{{ 1 // 0 }}")
    assert checked(pair).passed is False
