"""Publishing, killed at every single step: a good result is under its name, or comes back there."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from artefacts_example import example_validation, failed_validation

from se_compress.artifacts import ValidationReport, to_json
from se_compress.errors import RecipeError, ResourceError
from se_compress.running import publishing
from se_compress.running.manifest import FILES_FILE, damages, write_list
from se_compress.running.places import partial, rejected
from se_compress.running.publishing import publish, recover
from se_compress.running.records import RunSettings, load_settings, save_settings
from se_compress.running.run_directory import check_output, check_replaceable, locked, prepare

SETTINGS = {"the version of se-compress": "1", "seed": 0}
OTHERS = {**SETTINGS, "seed": 1}
PASSED = replace(example_validation(), passed=True)
FAILED = replace(failed_validation(), passed=False)


class Killed(BaseException):
    """Stands for SIGKILL: after it, nothing of the run is done any more."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The process changes nothing on disk from the step-th change on; yields what it did."""
    done: list[str] = []

    def counted(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if len(done) == step:
                raise Killed
            done.append(f"{name} {arguments[0]}")
            return change(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        patch.setattr(publishing, "exchange", counted("exchange", publishing.exchange))
        yield done


def cannot_exchange(one: Path, other: Path) -> None:
    raise OSError(errno.EINVAL, "not on this file system")


def exchange_step(output: Path) -> int:
    """How many changes a run makes before the results change places."""
    elsewhere = output.with_name("rehearsal") / "out"
    make_result(elsewhere, "earlier", PASSED)
    with pytest.MonkeyPatch.context() as patch, killed_at(10**6, patch) as steps:
        work_on(elsewhere, "new", PASSED)
    return next(i for i, step in enumerate(steps) if step.startswith("exchange"))


ALWAYS = (
    "model.safetensors", "config.json", "se_compress/recipe.yaml", "se_compress/profile.json",
    "se_compress/plan.json", "se_compress/compression.json", "se_compress/report.html",
)  # fmt: skip


def make_result(directory: Path, word: str, report: ValidationReport, **settings: Any) -> None:
    (directory / "se_compress").mkdir(parents=True)
    for name in ALWAYS:
        (directory / name).touch()
    (directory / "config.json").write_text(word, encoding="utf-8")
    (directory / "se_compress" / "validation.json").write_text(to_json(report), encoding="utf-8")
    save_settings(directory / "se_compress" / "run.json", {**SETTINGS, **settings})
    write_list(directory, lambda *step: None)


def work_on(output: Path, word: str, report: ValidationReport) -> None:
    """A run as far as it is not the model's: it begins, makes its result and publishes it."""
    with locked(output, pytest.fail) as work:
        prepare(output, RunSettings(SETTINGS), fresh=True, notice=lambda sentence: None)
        (work / "profile.json").write_text("{}", encoding="utf-8")
        (work / "compress-states.safetensors").write_text("states", encoding="utf-8")
        make_result(work / "checkpoint", word, report)
        place = output if report.passed else rejected(output)
        publish(work / "checkpoint", place, work)


def content(directory: Path) -> str:
    assert not damages(directory, lambda *step: None)
    return (directory / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("report", [PASSED, FAILED], ids=["published", "rejected"])
@pytest.mark.parametrize("earlier", [True, False])
def test_no_kill_loses_a_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exchanges: bool,
    report: ValidationReport,
    earlier: bool,
) -> None:
    if not exchanges:
        monkeypatch.setattr(publishing, "exchange", cannot_exchange)
    for step in range(1000):
        output = tmp_path / str(step) / "out"
        place = output if report.passed else rejected(output)
        if earlier:
            make_result(place, "earlier", report)
        finished = False
        with killed_at(step, monkeypatch):
            try:
                work_on(output, "new", report)
                finished = True
            except Killed:
                pass
        assert_recovers(output, place, earlier, finished)
        if finished:
            assert step > 10
            return
    pytest.fail("it never ends")


def assert_recovers(output: Path, place: Path, earlier: bool, finished: bool) -> None:
    """What the next run sees, with other settings: it drops all progress, and not the result."""
    check_output(output)
    if partial(output).exists():
        with locked(output, pytest.fail):
            recover(output, lambda sentence: None)
    found = content(place) if place.exists() else None
    assert found == "new" if finished else found in ("earlier" if earlier else None, "new")
    if not partial(output).exists():
        return
    with locked(output, pytest.fail) as work:
        assert_trustworthy(work, found)
        prepare(output, RunSettings(OTHERS), fresh=False, notice=lambda sentence: None)
        assert not (work / "checkpoint").exists()
        assert not (work / "replaced").exists()
    assert (content(place) if place.exists() else None) == found


def assert_trustworthy(work: Path, found: str | None) -> None:
    """Progress that would be continued from holds no checkpoint of another run."""
    if load_settings(work / "run.json") and (work / "checkpoint" / FILES_FILE).exists():
        assert found != "new"
        assert content(work / "checkpoint") == "new"


def test_a_kill_while_a_kill_is_recovered_from_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "exchange", cannot_exchange)
    at = exchange_step(tmp_path)
    for first in range(at, at + 6):
        for second in range(8):
            output = tmp_path / f"{first}-{second}" / "out"
            make_result(output, "earlier", PASSED)
            for step, act in ((first, work_again), (second, recover_again)):
                with killed_at(step, monkeypatch):
                    try:
                        act(output)
                    except Killed:
                        pass
            assert_recovers(output, output, earlier=True, finished=False)
            shutil.rmtree(output.parent)


def work_again(output: Path) -> None:
    work_on(output, "new", PASSED)


def recover_again(output: Path) -> None:
    if partial(output).exists():
        with locked(output, pytest.fail):
            recover(output, lambda sentence: None)


DIES = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_publishing as t
from pathlib import Path
from se_compress.running import publishing
if sys.argv[3] == "no": publishing.exchange = t.cannot_exchange
ours, step = os.rename, int(sys.argv[4])
def rename(*arguments, **named):
    global step
    ours(*arguments, **named)
    step -= 1
    if step < 0: os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
t.work_on(Path(sys.argv[2]), "new", t.PASSED)
"""


@pytest.mark.parametrize(("exchanges", "step"), [("no", 0), ("no", 1)])
def test_a_true_kill_between_the_renames(tmp_path: Path, exchanges: str, step: int) -> None:
    output = tmp_path / "out"
    make_result(output, "earlier", PASSED)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", DIES, here, str(output), exchanges, str(step)]
    died = subprocess.run(command, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert output.exists() == (step == 1)
    assert_recovers(output, output, earlier=True, finished=step == 1)


def test_two_directories_change_places(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    publishing.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()


@pytest.mark.parametrize("exception", [KeyboardInterrupt, OSError])
def test_what_ends_it_between_the_renames_puts_the_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exception: type[BaseException]
) -> None:
    output = tmp_path / "out"
    make_result(output, "earlier", PASSED)
    monkeypatch.setattr(publishing, "exchange", cannot_exchange)
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if source.name == "checkpoint":
            raise exception(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises((KeyboardInterrupt, ResourceError)):
        work_on(output, "new", PASSED)
    assert content(output) == "earlier"
    assert content(partial(output) / "checkpoint") == "new"
    monkeypatch.undo()
    assert_recovers(output, output, earlier=True, finished=False)


def test_the_earlier_result_is_not_put_upon_something_else(tmp_path: Path) -> None:
    output = tmp_path / "out"
    make_result(output, "earlier", PASSED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "exchange", cannot_exchange)
        with killed_at(exchange_step(output) + 2, patch), pytest.raises(Killed):
            work_on(output, "new", PASSED)
    assert not output.exists()
    make_result(output, "somebody's", PASSED)
    with locked(output, pytest.fail), pytest.raises(RecipeError, match="something else is now"):
        recover(output, pytest.fail)
    assert content(output) == "somebody's"
    assert content(partial(output) / "replaced") == "earlier"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"directory": ["a"]}', '{"directory": "../x"}', "\x80"]
)
def test_a_damaged_mark_lets_nothing_be_continued_from(tmp_path: Path, text: str) -> None:
    output = tmp_path / "out"
    make_result(output, "new", PASSED)
    with locked(output, pytest.fail) as work:
        save_settings(work / "run.json", SETTINGS)
        make_result(work / "checkpoint", "earlier", PASSED)
        (work / "publishing.json").write_text(text, encoding="latin-1")
        recover(output, pytest.fail)
        assert load_settings(work / "run.json") is None
    assert content(output) == "new"


# ------------------------------------------------------------------------------ what is not ours


@pytest.mark.parametrize("where", ["out", "out.rejected"])
@pytest.mark.parametrize("name", ["notes.md", "deep/down/eval.json", "se_compress/mine", ".cache/"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_file_that_somebody_put_into_a_result_is_named(
    tmp_path: Path, where: str, name: str, listed: bool
) -> None:
    output = tmp_path / "out"
    make_result(tmp_path / where, "x", PASSED if where == "out" else FAILED)
    (tmp_path / where / "model.safetensors").touch()
    (tmp_path / where / "tokenizer.json").touch()
    write_list(tmp_path / where, lambda *step: None)
    if not listed:
        (tmp_path / where / FILES_FILE).unlink()
    check_replaceable(output, ["tokenizer.json"])
    mine = tmp_path / where / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.mkdir() if name.endswith("/") else mine.touch()
    with pytest.raises(RecipeError, match=f"holds {name.rstrip('/')}, which se-compress did not"):
        check_replaceable(output, ["tokenizer.json"])


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.index.json", "model-00002-of-00002.safetensors", "adapter_config.json",
     "adapter_model.safetensors", "quantize_config.json", "quant_config.json",
     "hf_quant_config.json"],
)  # fmt: skip
def test_what_engines_would_load_as_well_is_damage(tmp_path: Path, name: str) -> None:
    make_result(tmp_path / "out", "x", PASSED)
    (tmp_path / "out" / name).write_text('{"weight_map": {}}', encoding="utf-8")
    assert damages(tmp_path / "out", lambda *step: None) == {
        name: f"{name} was added, and engines would load it"
    }
    with pytest.raises(RecipeError, match=f"holds {name}, which se-compress did not"):
        check_replaceable(tmp_path / "out", [])


@pytest.mark.parametrize("name", ["notes.md", "eval/results.json", "logs/x.safetensors"])
def test_what_nobody_loads_is_no_damage(tmp_path: Path, name: str) -> None:
    make_result(tmp_path / "out", "x", PASSED)
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).touch()
    assert not damages(tmp_path / "out", lambda *step: None)


@pytest.mark.parametrize(
    ("dropped", "added"),
    [
        *((name, "") for name in (*ALWAYS, "se_compress/run.json", "se_compress/validation.json")),
        *(("", name) for name in ("../x", "/etc/hostname", "se_compress/../../x")),
    ],
)
def test_a_list_that_leaves_out_or_leads_out_is_none(
    tmp_path: Path, dropped: str, added: str
) -> None:
    make_result(tmp_path / "out", "x", PASSED)
    file = tmp_path / "out" / FILES_FILE
    listed = json.loads(file.read_text(encoding="utf-8"))["files"]
    kept = [one for one in listed if one["name"] != dropped]
    extra = [{"name": added, "size_bytes": 0, "sha256": ""}] if added else []
    file.write_text(json.dumps({"files": kept + extra}), encoding="utf-8")
    assert list(damages(tmp_path / "out", lambda *step: None)) == [FILES_FILE]


def test_a_result_that_passed_is_not_replaced_by_a_rejected_one(tmp_path: Path) -> None:
    make_result(tmp_path / "out.rejected", "good", PASSED)
    with pytest.raises(RecipeError, match=r"out\.rejected: holds a result that passed"):
        check_replaceable(tmp_path / "out", [])


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoint.bak", "lock.txt", ".git/config"])
def test_a_file_that_somebody_put_into_the_progress_is_named(tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    with locked(output, pytest.fail) as work:
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).touch()
    with pytest.raises(
        RecipeError, match=rf"holds {name.split('/')[0]}, which se-compress did not"
    ):
        check_output(output)


def test_what_comes_into_the_progress_meanwhile_is_left(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with locked(output, pytest.fail) as work:
        make_result(work / "checkpoint", "new", PASSED)
        (work / "thesis.tex").touch()
        publish(work / "checkpoint", output, work)
    assert sorted(os.listdir(work)) == ["lock", "thesis.tex"]
    assert content(output) == "new"


def test_what_cannot_be_removed_does_not_undo_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    make_result(output, "earlier", PASSED)

    def fails(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(os, "rmdir", fails)
    monkeypatch.setattr(shutil, "rmtree", fails)
    work_on(output, "new", PASSED)
    monkeypatch.undo()
    assert content(output) == "new"
    assert_recovers(output, output, earlier=True, finished=True)
    assert not partial(output).exists()
