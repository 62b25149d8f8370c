"""--push-to-hub against a local server that speaks the Hub's protocol: only what passed its gates,
only files of ours, and every refusal before the work."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_automation import ENVIRONMENT, compress, prepare, run


@dataclass
class Hub:
    """What was asked of the server.

    committed  path in the repository -> its text, or "lfs <oid>"
    stored     oid -> bytes that were uploaded
    """

    address: str = ""
    made: list[dict[str, Any]] = field(default_factory=list)
    committed: dict[str, str] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: bool = False


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            return

        def answer(self, body: Any, status: int = 200) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                pieces = []
                while size := int(self.rfile.readline(), 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self) -> None:
            hub.asked.append(f"GET {self.path}")
            known = self.headers.get("Authorization") == "Bearer hf_good"
            if self.path.startswith("/api/whoami"):
                self.answer({"name": "me", "type": "user"} if known else {"error": "no"},
                            200 if known else 401)  # fmt: skip
            else:
                self.answer({"id": "me/small", "sha": "0" * 40, "siblings": []})

        def do_PUT(self) -> None:
            hub.stored[self.path.rsplit("/", 1)[1]] = self.body()
            self.answer({})

        def do_POST(self) -> None:
            hub.asked.append(f"POST {self.path}")
            body = self.body()
            if hub.broken and "/commit/" in self.path:
                self.answer({"error": "the disk is full"}, 507)
            elif self.path == "/api/repos/create":
                hub.made.append(json.loads(body))
                self.answer({"url": f"{hub.address}/me/small"})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in files
                ]  # fmt: skip
                self.answer({"files": modes})
            elif self.path.endswith("/info/lfs/objects/batch"):
                wanted = json.loads(body)["objects"]
                objects = [
                    {**one, "actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}}
                    for one in wanted
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                self.commit(body.decode())
            else:
                self.answer({})

        def commit(self, lines: str) -> None:
            from base64 import b64decode

            for line in map(json.loads, lines.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.committed[value["path"]] = b64decode(value["content"]).decode()
                elif line["key"] == "lfsFile":
                    hub.committed[value["path"]] = f"lfs {value['oid']}"
            self.answer({"commitUrl": f"{hub.address}/me/small/commit/1", "commitOid": "1",
                         "success": True})  # fmt: skip

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    found.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "HF_ENDPOINT": found.address, "HF_TOKEN": "hf_good", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():  # fmt: skip
        monkeypatch.setitem(ENVIRONMENT, name, value)
    yield found
    server.shutdown()
    server.server_close()


def test_what_passed_is_uploaded(
    hub: Hub, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    prepare(tmp_path, tiny_model("qwen3_moe"))
    done = compress(tmp_path, "--push-to-hub", "me/small")
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.address}/me/small" in done.stderr
    (made,) = hub.made
    assert made["name"] == "small"
    assert made.get("private") is True or made.get("visibility") == "private"
    result = tmp_path / "out"
    listed = json.loads((result / "se_compress" / "files.json").read_text("utf-8"))["files"]
    assert set(hub.committed) == {one["name"] for one in listed} | {"se_compress/files.json"}
    assert hub.committed["README.md"] == (result / "README.md").read_text("utf-8")
    oid = hub.committed["model.safetensors"].removeprefix("lfs ")
    assert hub.stored[oid] == (result / "model.safetensors").read_bytes()
    # Again: the result is up to date, and a file that somebody added stays at home.
    (result / "mine.txt").write_text("notes", encoding="utf-8")
    hub.committed.clear()
    assert compress(tmp_path, "--push-to-hub", "me/small").returncode == 0
    assert "mine.txt" not in hub.committed
    assert "config.json" in hub.committed


def test_what_was_rejected_is_not(
    hub: Hub, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    prepare(tmp_path, tiny_model("qwen3_moe"))
    strict = ["--set", "policy.zero=[{layer: 1, expert: 0}]", "--set", "policy.protect=none"]
    strict += ["--set", "validation.kl_divergence=1e-12"]
    rejected = compress(tmp_path, "--push-to-hub", "me/small", *strict)
    assert rejected.returncode == 4
    assert hub.made == []
    assert hub.committed == {}
    assert not [line for line in hub.asked if line.startswith("POST")]


PUSH = """
import sys
from pathlib import Path
from se_compress.request import Outcome
from se_compress.running.manifest import _ALWAYS, write_list
from se_compress.uploading import push
from artefacts_example import example_plan, example_profile, example_validation
(Path("out") / "se_compress").mkdir(parents=True)
for name in (*_ALWAYS, "model.safetensors"):
    (Path("out") / name).write_text("{}")
write_list(Path("out"), lambda *step: None)
push(Outcome(Path("out"), example_profile(), example_plan(), example_validation()), "me/small")
"""


def test_an_upload_that_fails_says_where_the_result_is(hub: Hub, tmp_path: Path) -> None:
    hub.broken = True
    here = str(Path(__file__).parent)
    paths = f"{here}:{Path(__file__).parents[1]}"
    failed = run([sys.executable, "-c", PUSH], tmp_path, PYTHONPATH=paths)
    assert "ResourceError: --push-to-hub me/small: the upload failed" in failed.stderr
    assert "the result is in out, and the same command uploads it again" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (["--push-to-hub", "me/small"], {"HF_TOKEN": "hf_bad"}, 2, "does not know the token"),
        (["--push-to-hub", "me/small"], {"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set"),
        (["--push-to-hub", "me/small"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 5, "be reached"),
        (["--push-to-hub", "small"], {}, 2, "write it as owner/name"),
        (["--push-to-hub", "a b/c"], {}, 2, "--push-to-hub a b/c: "),
        (["--push-to-hub", "me/small", "--dry-run"], {}, 2, "go with neither --dry-run nor"),
        (["--push-to-hub", "me/small", "--profile"], {}, 2, "neither --profile nor variants"),
    ],
)
def test_refusals_before_the_work(
    hub: Hub,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    code: int,
    message: str,
) -> None:
    prepare(tmp_path, tiny_model("qwen3_moe"))
    for name, value in environment.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    refused = compress(tmp_path, *arguments)
    assert refused.returncode == code, refused.stderr
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert hub.committed == {}
