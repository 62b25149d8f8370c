"""The work directory: one run at a time, also where nothing can be locked."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from se_compress.errors import RecipeError
from se_compress.running.run_directory import check_output, discard, locked


def test_the_work_directory_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path / "out", pytest.fail):
        with pytest.raises(
            RecipeError, match=r"out\.partial: another se-compress is working on it"
        ):
            with locked(tmp_path / "out", pytest.fail):
                pytest.fail("two at once")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_nothing_can_be_locked_it_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(handle: object, operation: int) -> None:
        raise OSError(number, "no flock here")

    monkeypatch.setattr(fcntl, "flock", fails)
    said: list[str] = []
    with locked(tmp_path / "out", said.append) as work:
        assert (work / "lock").exists()
    assert said == [
        f"{work}: this file system has no locks (no flock here); "
        "see to it that no other run has this output"
    ]


def test_a_lock_that_was_removed_by_its_holder_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the run that held the directory ends and removes it."""
    output, flock = tmp_path / "out", fcntl.flock

    def ends(handle: int, operation: int) -> None:
        discard(tmp_path / "out.partial")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", ends)
    with pytest.raises(RecipeError, match="another se-compress"), locked(output, pytest.fail):
        pytest.fail("nothing holds it")


@pytest.mark.parametrize("left", [0, 1, 2, 3, 4, 5])
def test_a_directory_that_was_being_removed_is_still_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    output = tmp_path / "out"
    with locked(output, pytest.fail) as work:
        for name in ("run.json", "plan.json", "profile.json", "checkpoint/model.safetensors"):
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).touch()
    steps = iter(range(left))
    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, stopping(getattr(os, name), steps))
    with pytest.raises(StopIteration):
        discard(work)
    monkeypatch.undo()
    check_output(output)
    assert work.exists()


def stopping(change: Callable[..., Any], steps: Iterator[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        next(steps)
        return change(*arguments, **named)

    return call


@pytest.mark.parametrize("mark", ["lock", "run.json"])
def test_either_mark_makes_a_work_directory_ours(tmp_path: Path, mark: str) -> None:
    work = tmp_path / "out.partial"
    (work / "checkpoint").mkdir(parents=True)
    with pytest.raises(RecipeError, match="was not made by se-compress"):
        check_output(tmp_path / "out")
    (work / mark).write_text('{"the version of se-compress": "1"}', encoding="utf-8")
    check_output(tmp_path / "out")
