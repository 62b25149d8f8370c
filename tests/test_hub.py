"""What the Hub answers, and what its cache holds, is told as it is. The Hub is a server of our own
on this machine, asked by the real libraries."""

import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import huggingface_hub.constants
import pytest
from tiny import save_tokenizer

from se_compress.errors import SourceError, one_line
from se_compress.opening import hub
from se_compress.opening.hub import locate
from se_compress.opening.source import open_source
from se_compress.recipe import Calibration
from se_compress.text.calibrate import draw_sequences

TinyModel = Callable[[str], Path]
COMMIT = "a" * 40


class Answers:
    """What the server says to everything: status 0 is silence."""

    status = 404
    headers: dict[str, str] = {}  # noqa: RUF012
    body = b""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answers]]:
    class Said(Answers):
        pass

    closed = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

        def answer(self) -> None:
            if Said.status == 0:
                closed.wait(20)
                return
            self.send_response(Said.status)
            for name, value in Said.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(Said.body)))
            self.end_headers()
            self.wfile.write(Said.body if self.command == "GET" else b"")

        do_GET = do_HEAD = answer

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{httpd.server_address[1]}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    set_cache(tmp_path, monkeypatch, offline=False)
    yield Said
    closed.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def set_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "hub"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine without network."""
    return set_cache(tmp_path, monkeypatch, offline=True)


def refusal(name: str) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(name)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 450
    return message


def data_refusal(tmp_path: Path) -> str:
    text: dict[str, Any] = {"data": "owner/name", "samples": 2, "sequence_length": 16}
    model = save_tokenizer(tmp_path / "model")
    with pytest.raises(SourceError) as caught:
        draw_sequences(Calibration.model_validate(text), model, "calibration")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 450
    return message


# ------------------------------------------------------------------------------- what it answers


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (400, {}, ["400"]),
        (401, {}, ["401", "private", "log in"]),
        (403, {}, ["403", "log in"]),
        (403, {"X-Error-Code": "GatedRepo"}, ["403", "accept its conditions", "log in"]),
        (401, {"X-Error-Code": "GatedRepo"}, ["401", "accept its conditions", "log in"]),
        (403, {"X-Error-Message": "This one is disabled."}, ["403", "This one is disabled."]),
        (404, {}, ["404", "check the name"]),
        (404, {"X-Error-Code": "RepoNotFound"}, ["404", "check the name"]),
        (404, {"X-Error-Code": "RevisionNotFound"}, ["404", "no such revision", "branch"]),
        (410, {}, ["410"]),
        (429, {}, ["429", "wait"]),
        (500, {}, ["500", "try again later"]),
        (502, {}, ["502", "try again later"]),
        (503, {}, ["503", "try again later"]),
        (403, {"X-Error-Message": "a " * 400 + "the end."}, ["403", "the end."]),
    ],
)
def test_a_refused_model(
    server: type[Answers], status: int, headers: dict[str, str], words: list[str]
) -> None:
    server.status, server.headers = status, headers
    message = refusal("owner/name@v1")
    assert message.startswith("owner/name@v1: there is no such directory, and as a Hub id: the Hub")
    assert all(word in message for word in words)
    assert "cannot be reached" not in message


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refused_data_set(server: type[Answers], tmp_path: Path, status: int) -> None:
    server.status = status
    message = data_refusal(tmp_path)
    assert f"as a data set on the Hub: the Hub answers {status}" in message
    assert "cannot be reached" not in message


def test_a_gated_data_set(server: type[Answers], tmp_path: Path) -> None:
    server.status, server.headers = 403, {"X-Error-Code": "GatedRepo"}
    assert "is a gated dataset on the Hub" in data_refusal(tmp_path)


@pytest.mark.parametrize("body", [b"<html>Log in</html>", b"{}", b"[]", b"null", b'{"id": "x"}'])
def test_something_else_answers_in_its_place(server: type[Answers], body: bytes) -> None:
    server.status, server.body = 200, body
    assert "HF_ENDPOINT and the proxy" in refusal("owner/name")


def test_redirects_without_end(server: type[Answers]) -> None:
    server.status, server.headers = 307, {"Location": "/api/models/owner/name"}
    assert "redirects" in refusal("owner/name")


def test_a_hub_that_never_answers(
    server: type[Answers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    server.status = 0
    start = time.monotonic()
    assert "the Hub does not answer in time" in refusal("owner/name")
    assert "the Hub does not answer in time" in refusal("owner/name@" + COMMIT)
    assert "the Hub does not answer in time" in data_refusal(tmp_path)
    assert time.monotonic() - start < 20


def test_waiting_is_bounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.bound_waiting()
    hooks = huggingface_hub.get_session().event_hooks
    hub.bound_waiting()
    assert huggingface_hub.get_session().event_hooks == hooks
    request = httpx.Request("GET", "http://x", extensions={"timeout": {"read": None, "write": 5.0}})
    for hook in hooks["request"]:
        hook(request)
    assert request.extensions["timeout"] == {"read": hub.PATIENCE, "write": 5.0}


@pytest.mark.parametrize("revision", ["", "a b", "../x", "a..b", "/a", "a/", "a@{b", "x~1", "\n"])
def test_what_is_no_revision(offline: Path, revision: str) -> None:
    assert "is no revision of a Hub id" in refusal(f"owner/name@{revision}")


@pytest.mark.parametrize("revision", ["main", "refs/pr/3", "v1.0+b#2", COMMIT])
def test_revisions(offline: Path, revision: str) -> None:
    assert "its local cache does not hold it" in refusal(f"owner/name@{revision}")


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x", "a\0b", "a\nb/c"])
def test_names_that_are_no_names(name: str) -> None:
    assert "is no directory" in (message := refusal(name)) or "there is no such dir" in message


# ----------------------------------------------------------------------------- what its cache holds


@pytest.fixture
def snapshot(tiny_model: TinyModel, offline: Path) -> Path:
    """Of owner/name, as huggingface_hub lays it out, with its record of the commit's files."""
    repository = offline / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    blobs = shutil.copytree(tiny_model("olmoe"), repository / "blobs")
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    promise(snapshot)
    return snapshot


def promise(snapshot: Path, *more: str) -> None:
    """Record what the commit has: what is in the snapshot, and `more`."""
    trees = snapshot.parents[1] / "trees"
    trees.mkdir(exist_ok=True)
    names = [*(file.name for file in snapshot.iterdir()), *more]
    files = {name: {"size": 1, "blob_id": "x"} for name in names}
    record = {"format_version": 1, "files": files}
    (trees / f"{snapshot.name}.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "names", [["LICENSE"], ["original/params.json", "notes.txt"], ["onnx/model.safetensors"]]
)
def test_what_nobody_needs_may_lack(snapshot: Path, names: list[str]) -> None:
    promise(snapshot, *names)
    said: list[str] = []
    assert open_source("owner/name", notice=said.append).path == snapshot
    assert len(said) == 1
    assert said[0].startswith("owner/name: taken from the Hub's cache, without files that nobody")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_is_needed_and_lacks_is_named(snapshot: Path, name: str) -> None:
    (snapshot / name).unlink()
    promise(snapshot, name)
    assert f"owner/name: the Hub's cache lacks {name}, and the Hub cannot" in refusal("owner/name")


def test_what_is_needed_is_named_with_the_answer(
    server: type[Answers], snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server.status = 503
    promise(snapshot, "model-2.safetensors")
    message = refusal("owner/name")
    assert "lacks model-2.safetensors, and the Hub answers 503" in message


def test_a_whole_snapshot_serves_while_the_hub_fails(
    server: type[Answers], snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server.status = 503
    assert open_source("owner/name").path == snapshot


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("names", [["config.json"], ["model.safetensors"], None])
def test_links_to_nowhere(snapshot: Path, recorded: bool, names: list[str] | None) -> None:
    for file in snapshot.iterdir():
        if names is None or file.name in names:
            file.resolve().unlink()
    if not recorded:
        shutil.rmtree(snapshot.parents[1] / "trees")
    for model in ("owner/name", str(snapshot)):
        message = refusal(model)
        assert "gone" in message
        assert (names or ["config.json"])[0] in message
        assert "is not a model directory" not in message


def test_a_link_to_nowhere_that_nobody_needs(snapshot: Path) -> None:
    (snapshot / "LICENSE").symlink_to("gone")
    assert locate(str(snapshot)) == snapshot


def test_a_repository_of_the_cache_as_a_path(snapshot: Path) -> None:
    message = refusal(str(snapshot.parents[1]))
    assert "is a repository in the Hub's cache; give the model's id (owner/name)" in message
    assert str(snapshot) in message
    (snapshot.parents[1] / "refs" / "main").unlink()
    assert str(snapshot) in refusal(str(snapshot.parents[1]))
    shutil.rmtree(snapshot)
    assert "no snapshot of it is left" in refusal(str(snapshot.parents[1]))


# ---------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("short", "short"),
        ("two\n  lines", "two lines"),
        ("\x1b[31mred\x00\u202e", "[31mred"),
        (ValueError(), "ValueError"),
        ("begin " + "x" * 400 + " end", "begin " + "x" * 91 + " ... " + "x" * 93 + " end"),
    ],
)
def test_one_line(error: object, line: str) -> None:
    assert one_line(error) == line
