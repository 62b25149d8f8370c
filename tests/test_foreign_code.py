"""Code that comes with a model is never run: not by the reload of a result, not by `--validate` on
anybody's directory, and not from the current directory."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
from typer.testing import CliRunner

from se_compress.artifacts import CompressionPlan, ModelSource, RunOptions
from se_compress.cli import app
from se_compress.engines.bare import lay_bare
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.reloading import check_reload
from se_compress.errors import SourceError
from se_compress.model.checkpoint import open_result
from se_compress.model.streaming import StreamedModel
from se_compress.opening.headers import read_header, read_headers
from se_compress.opening.source import open_source
from se_compress.pipeline import Request, judge_existing, run
from se_compress.planning.policy import make_plan

TinyModel = Callable[[str], Path]
TOKENS = tiny.random_tokens(1, 24, seed=5)[0]
CODE = "from pathlib import Path\nPath({mark!r}).touch()\nclass X: pass\n"
AUTO_MAP = {
    "AutoConfig": "configuration_x.X",
    "AutoModelForCausalLM": "modeling_x.X",
    "AutoTokenizer": ["tokenization_x.X", None],
}
FILES = ("configuration_x", "modeling_x", "tokenization_x")
SHADOWS = (
    "torch",
    "sitecustomize",
    "usercustomize",
    "transformers",
    "json",
    "gptqmodel",
    "kernels",
)


class Bomb:
    """Unpickled, it leaves the mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.mark),))


def booby_trap(directory: Path, mark: Path) -> None:
    """Everything in a model's directory that some loader would run."""
    code = CODE.format(mark=str(mark))
    for name in (*FILES, *SHADOWS, "custom_generate/generate"):
        file = directory / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin"):
        (directory / name).write_bytes(pickle.dumps(Bomb(str(mark))))
    (directory / "adapter_config.json").write_text("{}", encoding="utf-8")
    for name in ("config.json", "tokenizer_config.json", "quantize_config.json"):
        file = directory / name
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            found |= {"auto_map": AUTO_MAP, "adapter": {"name": "lora", "path": str(directory)}}
            file.write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that any planted code would make; the current directory is full of it."""
    mark = tmp_path / "it-ran"
    here = tmp_path / "here"
    here.mkdir()
    booby_trap(here, mark)
    monkeypatch.chdir(here)
    return mark


def test_the_traps_would_spring(mark: Path) -> None:
    code = (Path.cwd() / "modeling_x.py").read_text(encoding="utf-8")
    exec(compile(code, "modeling_x.py", "exec"))
    assert mark.exists()
    mark.unlink()
    pickle.loads((Path.cwd() / "pytorch_model.bin").read_bytes())
    assert mark.exists()


def plan_for(source: ModelSource, target: str, method: str, form: str) -> CompressionPlan:
    grid = {} if method == "none" else {"group_size": 32, "format": form}
    return make_plan(
        source,
        None,
        tiny.recipe(source.name, target=target, quantization={"method": method, **grid}),
    )


@pytest.mark.parametrize(
    ("target", "method", "form"),
    [
        ("gptqmodel", "rtn", "auto"),
        ("transformers", "none", "auto"),
        ("transformers", "rtn", "auto-round"),
        ("vllm", "rtn", "auto"),
    ],
)
def test_the_reload_runs_nothing_of_a_result(
    tiny_model: TinyModel, tmp_path: Path, mark: Path, target: str, method: str, form: str
) -> None:
    source = open_source(str(tiny_model("deepseek_v3-next-token")))
    plan = plan_for(source, target, method, form)
    directory = tmp_path / "result"
    if method == "none":
        directory = tiny.build(directory, "deepseek_v3-next-token")
    else:
        tiny.write_result(source, plan, directory)
    booby_trap(directory, mark)
    found = read_headers(directory)
    read = open_result(found, source.tensors, plan.scheme, draw_blueprint(source, plan).names)
    model, stored_as = StreamedModel(source, read), plan.scheme.format
    check = check_reload(model, target, stored_as, directory, found.values(), TOKENS, RunOptions())
    assert check.value is not None, check.detail
    assert check.value < 0.1
    assert check.passed is not False
    assert not mark.exists()


def recipe(model: Path, output: Path, text: Path, **sections: Any) -> Any:
    validation = {"samples": 2, "sequence_length": 24, "generation": {"tokens": 0}}
    loose = dict.fromkeys(("perplexity_increase", "kl_divergence", "sink_token_error"), 1e9)
    loose |= {"router_agreement": 0, "router_agreement_least": 0, "early_stop": False}
    return tiny.recipe(
        model,
        output,
        calibration={"data": str(text), "samples": 2, "sequence_length": 24},
        validation={"data": str(text), "seed": 1, **validation, **loose},
        policy={"protect": "none"},
        **sections,
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{n:05d}" for n in range(1000)), encoding="utf-8")
    return file


def test_a_run_runs_nothing_even_if_the_result_keeps_the_code(
    tmp_path: Path, mark: Path, text: Path
) -> None:
    model = tiny.build(tmp_path / "model", "qwen3_moe")
    booby_trap(model, mark)
    checked = recipe(model, tmp_path / "out", text, quantization={"method": "none"})
    outcome = run(Request(checked, "", keep_code=True))
    assert outcome.validation.check("reload").passed
    assert not mark.exists()
    names = {file.name for file in outcome.directory.iterdir()}
    assert {f"{name}.py" for name in FILES} <= names
    assert not names & {"torch.py", "pytorch_model.bin", "training_args.bin", "custom_generate"}
    config = json.loads((outcome.directory / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == AUTO_MAP
    assert any("kept on demand" in note for note in outcome.plan.notes)
    card = (outcome.directory / "README.md").read_text(encoding="utf-8")
    assert "kept on demand" in card


@pytest.mark.parametrize(
    ("words", "told"),
    [((), "names (auto_map) is not in the result"), (("--keep-remote-code",), "kept on demand")],
)
def test_what_becomes_of_the_code_is_told_before_it_is_done(
    tmp_path: Path, mark: Path, text: Path, words: tuple[str, ...], told: str
) -> None:
    model = tiny.build(tmp_path / "model", "qwen3_moe")
    booby_trap(model, mark)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {model}\noutput: {tmp_path / 'out'}\nquantization: {{method: none}}\n"
        f"calibration: {{data: {text}}}\nvalidation: {{data: {text}, seed: 1}}\n",
        encoding="utf-8",
    )
    short = [f"--set={part}.sequence_length=32" for part in ("calibration", "validation")]
    shown = CliRunner().invoke(app, [str(file), "--dry-run", *short, *words])
    assert shown.exit_code == 0
    assert told in shown.output
    assert not mark.exists()


@pytest.mark.parametrize("keep_code", [False, True])
def test_code_is_fetched_from_the_hub_on_demand_only(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, keep_code: bool
) -> None:
    asked: list[list[str]] = []

    def snapshot(*arguments: object, allow_patterns: list[str], **others: object) -> str:
        asked.append(allow_patterns)
        return str(tiny_model("qwen3_moe"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    open_source("owner/name", keep_code)
    assert ["*.py" in patterns for patterns in asked] == [keep_code] * len(asked)
    assert asked


def test_validating_anybody_s_directory_runs_nothing(
    tiny_model: TinyModel, tmp_path: Path, mark: Path, text: Path
) -> None:
    path = tiny_model("qwen3_moe")
    source = open_source(str(path))
    directory = tmp_path / "anybody"
    tiny.write_result(source, plan_for(source, "gptqmodel", "rtn", "auto"), directory)
    booby_trap(directory, mark)
    checked = recipe(path, tmp_path / "out", text, target="gptqmodel")
    report = judge_existing(Request(checked, ""), directory, tmp_path / "report")
    reload = report.check("reload")
    assert reload.passed, reload.detail
    assert not mark.exists()


# ------------------------------------------------------------------------------ the bare directory


@pytest.fixture
def result(tiny_model: TinyModel, tmp_path: Path) -> Path:
    source = open_source(str(tiny_model("qwen3_moe")))
    directory = tmp_path / "result"
    plan = plan_for(source, "gptqmodel", "rtn", "auto")
    tiny.write_result(source, plan, directory, shard_bytes=100_000)
    return directory


def bared(directory: Path, tmp_path: Path) -> Path:
    bare = tmp_path / "bare"
    bare.mkdir()
    lay_bare(directory, read_headers(directory).values(), bare)
    return bare


def test_a_bare_directory_holds_weights_and_configs_only(result: Path, tmp_path: Path) -> None:
    booby_trap(result, tmp_path / "mark")
    bare = bared(result, tmp_path)
    shards = {file.name for file in result.glob("*.safetensors")}
    assert len(shards) > 1
    assert {file.name for file in bare.iterdir()} == shards | {
        "config.json", "quantize_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    stored = {info.name for file in bare.glob("*.safetensors") for info in read_header(file)}
    assert stored == read_headers(result).keys()
    for file in bare.glob("*.json"):
        words = file.read_text(encoding="utf-8")
        assert "auto_map" not in words
        assert "modeling_x" not in words
        assert "adapter" not in words


def test_the_settings_of_a_bare_directory_are_those_of_the_result(
    result: Path, tmp_path: Path
) -> None:
    bare = bared(result, tmp_path)
    for name in ("config.json", "quantize_config.json"):
        one, other = (json.loads((at / name).read_text(encoding="utf-8")) for at in (result, bare))
        assert one == other


@pytest.mark.parametrize("text", ["[1]", "{", "\x00"])
def test_settings_that_are_no_json_are_told(result: Path, tmp_path: Path, text: str) -> None:
    (result / "quantize_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=r"quantize_config\.json: (cannot be read|is not a JSON)"):
        bared(result, tmp_path)


def test_the_streamed_model_of_a_source_runs_none_of_its_code(
    tiny_model: TinyModel, mark: Path
) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    config = {**source.config, "auto_map": AUTO_MAP, "_attn_implementation": "someone/kernel"}
    source = replace(source, config=config)
    model = StreamedModel(source, lambda name: torch.zeros(source.tensors[name].shape))
    assert len(model.embed([torch.tensor([TOKENS])])) == 1
    assert not mark.exists()
