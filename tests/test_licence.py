"""The licence in a model's card: the card is anybody's text, and is read after all the work."""

import os
from pathlib import Path

import pytest

from se_compress.errors import printable
from se_compress.reporting.licence import licence_of

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)


def licence(directory: Path, front: str) -> str | None:
    (directory / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
    return licence_of(directory)


@pytest.mark.parametrize(
    ("front", "wanted"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license:\n- mit", "mit"),
        ("license: 2.0", "2.0"),
        ("date: 2025-13-45\nlicense: mit", "mit"),
        ("license: 2025-13-45", "2025-13-45"),
        ('license: "a\\nb"', "a b"),
        ("language: en", None),
        ("license:", None),
        ("license: []", None),
    ],
)
def test_the_licence_is_read(tmp_path: Path, front: str, wanted: str | None) -> None:
    assert licence(tmp_path, front) == wanted


@pytest.mark.parametrize(
    "front",
    [
        "a: " + "[" * 3000,
        "a: " + "{b: " * 3000,
        f"{BOMB}\nlicense: *a11",
        "license: &a [*a]",
        "license: {name: mit}",
        "license: [[mit]]",
        "license: 0x_",
        "license: " + "9" * 5000,
        "n: !!int abc\nlicense: mit",
        "license: !!python/name:os.system x",
        "? [a]\n: b",
        "license: mit\nlicense: gpl",
        "- license: mit",
        "\x00",
    ],
)
def test_a_card_that_cannot_be_read_names_none(tmp_path: Path, front: str) -> None:
    assert licence(tmp_path, front) is None


@pytest.mark.parametrize("text", ["m" * 100_000, "\\ud800", "\\e[31m", "\\u202egpl", "a\\0b"])
def test_a_licence_is_one_short_printable_line(tmp_path: Path, text: str) -> None:
    found = licence(tmp_path, f'license: "{text}"')
    assert found is not None
    assert len(found) <= 200
    assert printable(found) == found
    found.encode()


def test_a_card_that_is_no_text_file_names_none(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert licence_of(tmp_path) is None
    card.mkdir()
    assert licence_of(tmp_path) is None
    card.rmdir()
    os.mkfifo(card)
    assert licence_of(tmp_path) is None
    card.unlink()
    card.write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n\xff\xfe")
    assert licence_of(tmp_path) == "mit"
