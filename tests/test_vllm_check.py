"""The parts of tools/vllm_check.py that need no vLLM: its files, its comparing, and its client
against a small server of the OpenAI protocol."""

import json
import sys
from pathlib import Path

import pytest
import vllm_check
import vllm_files
from vllm_server import GREEDY, Answers, Server, ask_all, wait_for

from se_compress.opening.source import open_source

# Log-probabilities -0.5, -1.5, ... of the tokens behind the first, as vLLM reports them with echo;
# continuations count on from the last token of the prompt.
STUB = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and body["temperature"] == 0.0, body
        prompt = body["prompt"]
        made = [prompt[-1] + 1 + i for i in range(body["max_tokens"])]
        choice = {"text": "", "token_ids": made}
        if body.get("echo"):
            known = [None, *(-0.5 - i for i in range(len(prompt) - 1)), -9.0]
            choice["logprobs"] = {"token_logprobs": known}
        self.answer({"choices": [choice]})
    def answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *arguments):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_server_is_asked_over_http_and_ended() -> None:
    tokens = list(range(100, 140))
    with Server([sys.executable, "-c", STUB], {}) as server:
        assert wait_for(server, 30) == ""
        answers = ask_all(server.address, "model", tokens)
        assert server.resident_bytes() > 2**20
    assert server.process.poll() is not None
    assert answers.logprobs == [-0.5 - i for i in range(39)]
    assert answers.greedy == [100 + GREEDY + i for i in range(GREEDY)]
    assert answers.speed > 0


def test_a_server_that_refuses_says_why() -> None:
    code = "import sys; print('INFO: starting'); sys.exit('ValueError: no such model')"
    with Server([sys.executable, "-c", code], {}) as server:
        assert wait_for(server, 30) == "ValueError: no such model"


def test_answers_are_compared_in_words() -> None:
    exact = Answers([-1.0, -2.0, -3.0], [5, 6, 7, 8], 0.0)
    near = Answers([-1.1, -2.0, -3.3], [5, 6, 9, 8], 12.0)
    assert near.beside(exact) == (
        "log-probabilities 0.1000 away in the median, 0.1000 at the 99th percentile; 2 of 4 greedy "
        "tokens alike; 12.0 tokens per second"
    )
    nothing = Answers([float("nan"), -2.0, float("nan")], [], 0.0)
    assert nothing.beside(exact) == "2 log-probabilities are NaN"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        few = {name: vllm_files.FAMILIES[name] for name in ("qwen2_moe", "mixtral")}
        patch.setattr(vllm_files, "FAMILIES", few)
        patch.setattr(vllm_files, "MODEL", Path("not there"))
        return vllm_files.build_files(tmp_path_factory.mktemp("files") / "packed", packed=True)


def test_the_files_are_of_one_width_and_of_several_in_each_format(files: dict[str, Path]) -> None:
    assert len(files) == 12
    methods: dict[str, list[str]] = {}
    for name, directory in files.items():
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        methods.setdefault(config["quantization_config"]["quant_method"], []).append(name)
        assert config.get("qkv_bias", True) is True
    assert {method: len(names) for method, names in methods.items()} == {
        "compressed-tensors": 4, "gptq": 4, "auto-round": 4
    }  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2_moe gptq by layer", "mixtral compressed-tensors uniform"])
def test_what_a_file_stands_for_is_an_ordinary_model(
    files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    directory = vllm_files.plain(files[name], tmp_path / "plain")
    source = open_source(str(directory))
    assert {info.dtype for info in source.tensors.values()} == {"BF16"}
    tokens = vllm_files.held_out(directory)
    answers = vllm_check.exact_answers(directory, tokens)
    assert len(answers.logprobs) == len(tokens) - 1
    assert len(answers.greedy) == GREEDY
    assert all(value < 0 for value in answers.logprobs)


def test_without_an_environment_every_part_says_so(tmp_path: Path) -> None:
    for name in ("settings", "served", "int4", "widths", "parser"):
        assert vllm_check.PARTS[name](tmp_path, None, "") == [vllm_check.NOT_MADE]


def test_a_machine_without_a_kernel_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_check, "kernels", lambda python: {"gpu": False, "amx": False})
    (line,) = vllm_check.check_int4(tmp_path, Path(sys.executable), "")
    assert line.startswith("not run: this machine has no GPU and its CPU no AMX")


def test_widths_are_not_run_without_a_gpu_that_has_kernels_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"gpu": True, "amx": True, "humming": False}
    monkeypatch.setattr(vllm_check, "kernels", lambda python: here)
    (line,) = vllm_check.check_widths(tmp_path, Path(sys.executable), "")
    assert line.startswith("not run: no GPU of SM75 or later")


def test_files_for_a_gpu_have_every_width_and_the_flags_that_their_server_needs(
    tmp_path: Path,
) -> None:
    flags, widths = {}, {}
    for name, directory, asked in vllm_files.build_widths(tmp_path / "w", "qwen3_moe"):
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        flags[name] = asked
        if (groups := config["quantization_config"].get("config_groups")) is not None:
            widths[name] = sorted(group["weights"]["num_bits"] for group in groups.values())
    humming = [name for name, asked in flags.items() if asked == "--quantization humming"]
    assert humming == ["qwen3_moe gptq, by layer"]
    assert {asked for name, asked in flags.items() if name not in humming} == {""}
    assert widths == {
        "qwen3_moe compressed-tensors, by layer": [2, 3, 4, 8],
        **{f"qwen3_moe compressed-tensors, {bits} bits": [bits] for bits in (2, 3, 4, 8)},
        "qwen3_moe compressed-tensors, 4 bits with zero points": [4],
    }
