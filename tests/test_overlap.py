"""Held-out text that calibration has seen is told, wherever it comes from."""

import random
from pathlib import Path

import pytest
import tiny

from se_compress.recipe import Recipe
from se_compress.text.overlap import (
    RUN,
    cautions,
    cautions_before,
    common_sources,
    missing_text,
    share_seen,
)


def recipe(calibration: object, validation: object) -> Recipe:
    return tiny.recipe("m", calibration={"data": calibration}, validation={"data": validation})


def text(count: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(10**6) for _ in range(length)] for _ in range(count)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one text")
    Path("copy.txt").write_text("one text")
    Path("same-size.txt").write_text("two text")
    Path("link.txt").symlink_to("a.txt")


@pytest.mark.parametrize(
    ("calibration", "validation", "common"),
    [
        ("a.txt", "a.txt", ("a.txt",)),
        ("a.txt", "./a.txt", ("./a.txt",)),
        ("a.txt", "link.txt", ("link.txt",)),
        ("a.txt", "copy.txt", ("copy.txt",)),
        (["x/y", "a.txt"], ["same-size.txt", "copy.txt"], ("copy.txt",)),
        ("x/y", "x/y", ("x/y",)),
        ("a.txt", "same-size.txt", ()),
        ("x/y", {"data": "x/y", "split": "test"}, ()),
        ({"data": "x/y", "config": "a"}, {"data": "x/y", "config": "b"}, ()),
        ("missing.txt", "other.txt", ()),
    ],
)
@pytest.mark.usefixtures("files")
def test_one_source_under_two_names(
    calibration: object, validation: object, common: tuple[str, ...]
) -> None:
    found = recipe(calibration, validation)
    assert common_sources(found) == common
    assert bool(cautions_before(found)) == bool(common)


@pytest.mark.usefixtures("files")
def test_a_file_that_is_not_there_is_told() -> None:
    assert missing_text(recipe(["a.txt", "x/y"], {"prose": "copy.txt", "code": "link.txt"})) == ()
    calibration, held_out = missing_text(recipe(["a.txt", "no.txt"], {"code": "no.jsonl"}))
    assert calibration.startswith("calibration.data: no.txt does not exist; a run stops there")
    assert held_out.startswith("validation.data: no.jsonl does not exist")


def test_what_is_drawn_twice_is_measured() -> None:
    seen, held_out = text(8, 64, 0), text(4, 64, 1)
    assert share_seen(seen, held_out) == 0
    assert share_seen(seen, seen[:4]) == 1
    assert share_seen(seen, [*held_out[:3], seen[5]]) == 0.25
    shifted = [seen[0][5:] + held_out[0][:5]]
    assert share_seen(seen, shifted) == 0.75, "wherever it begins"
    assert share_seen(seen, [seen[0][: RUN - 1] + held_out[0]]) == 0, "a phrase is none"


def test_it_is_told_with_its_share() -> None:
    seen, held_out = text(8, 64, 0), text(3, 64, 1)
    assert cautions(seen, held_out) == ()
    (told,) = cautions(seen, [*held_out, seen[3]])
    assert told.startswith("caution: calibration saw 25 % of the held-out text")
    assert cautions(seen, [*text(400, 64, 2), seen[3]]) == (), "as much as any two texts share"
