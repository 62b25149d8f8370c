"""Damaged progress heals: what cannot be read is named and made again, to the same bytes."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import (
    WEIGHTS,
    Stop,
    TinyModel,
    Workplace,
    assert_as_uninterrupted,
    no_engine,
    published,
    stop_at,
)

from se_compress.artifacts import LayerRecord, from_json, to_json

__all__ = ["no_engine", "published"]  # fixtures
STATES = "compress-states.safetensors"
RECORD = "compress-layer-00001.json"


@pytest.fixture(scope="module")
def half_done(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped behind two compressed layers. Not to be changed."""
    directory = tmp_path_factory.mktemp("half") / "place"
    directory.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        no_engine.__wrapped__(patch)  # type: ignore[attr-defined]
        with pytest.raises(Stop):
            Workplace(directory, tiny_model("qwen2_moe")).run(options=stop_at("compress", 2))
    return directory


@pytest.fixture
def stopped(half_done: Path, tiny_model: TinyModel) -> Iterator[Workplace]:
    """The same under the same name, to be changed: settings hold the paths of texts."""
    kept = half_done.with_name("kept")
    shutil.copytree(half_done, kept)
    yield Workplace(half_done, tiny_model("qwen2_moe"))
    shutil.rmtree(half_done)
    kept.rename(half_done)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(file: Path) -> None:
    """One bit far behind, in the middle of data."""
    data = bytearray(file.read_bytes())
    data[-len(data) // 3] ^= 1
    file.write_bytes(data)


def binary(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00" * 20)


def nested(file: Path) -> None:
    file.write_text("[" * 100_000, encoding="utf-8")


def huge_number(file: Path) -> None:
    file.write_text('{"layer": ' + "9" * 5000 + "}", encoding="utf-8")


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def gone(file: Path) -> None:
    file.unlink()


def not_finite(file: Path) -> None:
    """A file that is whole, but holds NaN."""
    tensors = load_file(file)
    next(t for t in tensors.values() if t.is_floating_point())[0] = float("nan")
    save_file(tensors, file, metadata={"layer": "1"})


def another_layer(file: Path) -> None:
    shutil.copyfile(file.with_name("compress-layer-00000.json"), file)


def edited(file: Path) -> None:
    """Valid JSON with another number."""
    saved = json.loads(file.read_text(encoding="utf-8"))["record"]
    record = from_json(LayerRecord, json.dumps(saved), "record")
    file.write_text(to_json(record).replace('"layer": 1', '"layer": 0', 1), encoding="utf-8")
    edited_sum = file.read_text(encoding="utf-8")
    file.write_text(f'{{"sha256": "0",\n"record": {edited_sum}}}\n', encoding="utf-8")


CASES = [
    *((STATES, damage) for damage in (cut, empty, flip, binary, directory, pipe, not_finite)),
    *((RECORD, damage) for damage in (cut, empty, binary, nested, huge_number, directory, gone)),
    *((RECORD, damage) for damage in (flip, another_layer, edited, dangling)),
    *((f"checkpoint/{WEIGHTS}", damage) for damage in (cut, empty, binary, directory, gone, pipe)),
]


# What the progress rests on: all of it is made again.
LOST = [
    *(("run.json", damage) for damage in (cut, binary, nested, directory)),
    *(("profile.json", damage) for damage in (cut, flip, nested, pipe)),
]


@pytest.mark.parametrize(("name", "damage"), [*CASES, *LOST])
def test_a_damaged_file_is_named_and_made_again(
    stopped: Workplace, published: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(stopped.partial / name)
    assert stopped.run().published
    assert any(name in sentence for sentence in stopped.said), stopped.said
    assert_as_uninterrupted(stopped, published)


UNREAD = [("plan.json", directory), ("plan.json", pipe), ("plan.json", binary)]
LOCKS = [("lock", directory), ("lock", pipe), ("lock", dangling), ("lock", binary)]


@pytest.mark.parametrize(("name", "damage"), [*UNREAD, *LOCKS])
def test_what_is_not_needed_stops_nobody(
    stopped: Workplace, published: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(stopped.partial / name)
    assert stopped.run().published
    assert_as_uninterrupted(stopped, published)


@pytest.mark.parametrize("text", ["[]", "1", '"x"', "null"])
def test_settings_of_another_kind_drop_the_progress(
    stopped: Workplace, published: Path, text: str
) -> None:
    (stopped.partial / "run.json").write_text(text, encoding="utf-8")
    assert stopped.run().published
    assert f"{stopped.partial / 'run.json'} cannot be read" in stopped.said[0]
    assert_as_uninterrupted(stopped, published)


def test_a_directory_in_place_of_a_file_of_the_checkpoint_goes(
    stopped: Workplace, published: Path
) -> None:
    (stopped.partial / "checkpoint" / "config.json").mkdir()
    (stopped.partial / "checkpoint" / "README.md").symlink_to("nowhere")
    assert stopped.run().published
    assert_as_uninterrupted(stopped, published)


def test_what_is_whole_is_continued_from(stopped: Workplace, published: Path) -> None:
    record = stopped.partial / RECORD
    assert json.loads(record.read_text(encoding="utf-8"))["record"]["layer"] == 1
    assert torch.isfinite(next(iter(load_file(stopped.partial / STATES).values()))).all()
    assert stopped.run().published
    assert f"continuing from {stopped.partial}" in stopped.said
    assert not any("again" in sentence for sentence in stopped.said)
    assert_as_uninterrupted(stopped, published)
