"""The installed command: what it prints, how it ends; a refusal is one line and leaves no file."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from json_schemas import DIRECTORY
from jsonschema import Draft202012Validator
from safetensors.torch import load_file

from se_compress import __version__
from se_compress.artifacts import ValidationReport, from_json

RESULT_SCHEMA = DIRECTORY / "run-result.schema.json"
COMMAND = str(Path(sys.executable).with_name("se-compress"))
MODULE = [sys.executable, "-m", "se_compress"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
NUMBERS = " ".join(f"{n:05d}" for n in range(4000))

Completed = subprocess.CompletedProcess[str]


@pytest.fixture
def settings(tiny_model: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """A recipe that works: change it, `write` it. The text and OUTPUT stand in `tmp_path`."""
    (tmp_path / "text.txt").write_text(NUMBERS, encoding="utf-8")
    text = {"data": "text.txt", "samples": 8, "sequence_length": 32}
    return {
        "model": str(tiny_model("qwen3_moe")),
        "output": "out",
        "target": "transformers",
        "calibration": text,
        "quantization": {"method": "none", "group_size": 32},
        "validation": {**text, "samples": 2, "seed": 1, "generation": {"tokens": 0}},
    }


def run(*arguments: str, cwd: Path, command: Sequence[str] = (COMMAND,)) -> Completed:
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def write(settings: dict[str, Any], directory: Path) -> None:
    (directory / "r.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def refuse(directory: Path, code: int, message: str, *arguments: str) -> None:
    """`se-compress r.yaml ARGUMENTS` ends with `code` and the one line `message` (a pattern);
    nothing stands under the output's name."""
    done = run("r.yaml", "--device", "cpu", "--quiet", *arguments, cwd=directory)
    check_refusal(done, code, message)
    assert not (directory / "out").exists()


def check_refusal(done: Completed, code: int, message: str) -> None:
    assert re.fullmatch(f"se-compress: {message}\n", done.stderr), done.stderr
    assert "\n" not in done.stderr[:-1]
    assert done.returncode == code
    assert done.stdout == ""


# ------------------------------------------------------------------------------- what needs no run


def test_the_version(tmp_path: Path) -> None:
    for command in ([COMMAND], MODULE):
        done = run("--version", cwd=tmp_path, command=command)
        assert (done.returncode, done.stdout, done.stderr) == (
            0,
            f"se-compress {__version__}\n",
            "",
        )


def test_help_names_every_flag_of_the_contract(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    flags = ("RECIPE", "--output", "--set", "--plan", "--dry-run", "--fresh", "--device", "--quiet",
             "--verbose", "--version")  # fmt: skip
    assert [flag for flag in flags if flag not in done.stdout] == []
    assert "130 interrupted" in " ".join(done.stdout.split())


def test_a_dry_run_tells_sizes_and_writes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"target": "gptqmodel", "policy": {"bits": 4}}
    settings["quantization"]["method"] = "rtn"
    write(settings, tmp_path)
    before = sorted(tmp_path.iterdir())
    done = run("r.yaml", "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "experts at 4 bits" in done.stdout
    assert "not profiled yet" in done.stdout
    assert "note: no profile yet" in done.stdout
    result = done.stdout.splitlines()[-1]
    assert result == (
        "dry run: 0.4 MB -> 0.3 MB, 5.458 bits per expert weight, target gptqmodel can load it"
    )
    quiet = run("r.yaml", "--dry-run", "--quiet", cwd=tmp_path, command=MODULE)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, f"{result}\n", "")
    pruned = run("r.yaml", "--dry-run", "--set", "policy.prune.fraction=0.25", cwd=tmp_path)
    assert "experts pruned" in pruned.stdout
    assert "None" not in pruned.stdout
    assert sorted(tmp_path.iterdir()) == before


def modules_imported(*arguments: str, cwd: Path) -> set[str]:
    command = [sys.executable, "-X", "importtime", "-m", "se_compress"]
    done = run(*arguments, cwd=cwd, command=command)
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["r.yaml", "--dry-run"]])
def test_quick_answers_import_no_torch(
    settings: dict[str, Any], tmp_path: Path, arguments: list[str]
) -> None:
    write(settings, tmp_path)
    modules = modules_imported(*arguments, cwd=tmp_path)
    assert "typer" in modules
    assert modules.isdisjoint({"torch", "transformers", "datasets", "gptqmodel", "numpy"})


# ------------------------------------------------------------------------ the command line, exit 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"Missing argument 'RECIPE'\. \(--help tells what is accepted\)"),
        (["no.yaml"], "no.yaml: there is no such recipe"),
        (["r.yaml", "--fast"], r"No such option: --fast .*\(--help tells what is accepted\)"),
        (
            ["r.yaml", "s.yaml"],
            r"Got unexpected extra argument\(s\) \(s\.yaml\) \(--help .* accepted\)",
        ),
        (["r.yaml", "--set"], r"Option '--set' requires an argument\. \(--help .* accepted\)"),
        (["r.yaml", "--set", "policy.bits"], "--set policy.bits: write it as key.path=value"),
        (["r.yaml", "--set", "polcy.bits=4"], r"r\.yaml: polcy .* did you mean policy\?"),
        (
            ["r.yaml", "--device", "gpu"],
            "--device gpu: accepted are auto, cpu, cuda and cuda:N",
        ),
        (
            ["r.yaml", "--device", "cuda:x"],
            "--device cuda:x: accepted are auto, cpu, cuda and cuda:N",
        ),
        (
            ["r.yaml", "--hidden-states", "no"],
            "--hidden-states no: a directory that can be written to is needed",
        ),
        (
            ["r.yaml", "--hidden-states", "text.txt"],
            r"--hidden-states text\.txt: a directory that can be written to is needed",
        ),
        (["r.yaml", "--plan", "no.json"], r"--plan no\.json: cannot be read \(No such file .*\)"),
    ],
)
def test_a_bad_command_line(
    settings: dict[str, Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    write(settings, tmp_path)
    check_refusal(run(*arguments, cwd=tmp_path), 2, message)
    assert {entry.name for entry in tmp_path.iterdir()} == {"r.yaml", "text.txt"}


def test_a_cuda_device_that_is_not_there(settings: dict[str, Any], tmp_path: Path) -> None:
    write(settings, tmp_path)
    done = run("r.yaml", "--device", "cuda:99", cwd=tmp_path)
    check_refusal(
        done, 2, rf"--device cuda:99: torch sees {torch.cuda.device_count()} CUDA devices"
    )


def test_the_module_refuses_like_the_command(settings: dict[str, Any], tmp_path: Path) -> None:
    write(settings, tmp_path)
    arguments = ("r.yaml", "--set", "policy.bitz=4")
    for command in ([COMMAND], MODULE):
        done = run(*arguments, cwd=tmp_path, command=command)
        check_refusal(done, 2, r"r\.yaml: policy\.bitz is not a known key; did you mean bits\?")


# -------------------------------------------------------------------------------- recipes, exit 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibration.sample=3", r"r\.yaml: calibration\.sample is not .* did you mean samples\?"),
        ("calibration.samples=many", r"r\.yaml: calibration\.samples is 'many': input should .*"),
        ("target=onnx", r"r\.yaml: target: 'onnx' is not one of transformers, gptqmodel, .*"),
        ("target=gptqmodel", r"target gptqmodel does not load experts of method none; .*"),
        (
            "policy.size=1kB",
            r"policy\.size is 0\.0010 MB, but 0\.\d{4} MB is the least possible: "
            r"quantization\.method none keeps every weight, the rest of the model unchanged",
        ),
        (
            "policy.protect=[{layer: 7, expert: 0}]",
            r"policy\.protect\.0: there is no expert \(7, 0\); expert layers are 0 to 2, .*",
        ),
    ],
)
def test_a_bad_recipe(
    settings: dict[str, Any], tmp_path: Path, override: str, message: str
) -> None:
    write(settings, tmp_path)
    refuse(tmp_path, 2, message, "--set", override)


def test_an_impossible_budget_names_the_least_which_then_works(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"target": "gptqmodel", "policy": {"bits": [2, 4], "bits_per_weight": 2.0}}
    settings["quantization"]["method"] = "rtn"
    write(settings, tmp_path)
    refuse(tmp_path, 2, r"policy\.bits_per_weight is 2\.0, but \d\.\d{3} is the least possible: "
           r"all experts at 2 bits, with scales in groups of 32")  # fmt: skip
    least = run("r.yaml", cwd=tmp_path).stderr.split(" but ")[1].split()[0]
    done = run("r.yaml", "--dry-run", "--set", f"policy.bits_per_weight={least}", cwd=tmp_path)
    assert done.returncode == 0
    assert "experts at 2 bits" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"plan\.json: not JSON \(.*, line 1\)"),
        ('{"target": "gptqmodel"}', r"plan\.json\.scheme is missing"),
        ("\udcff", r"--plan plan\.json: cannot be read \(not UTF-8\)"),
    ],
)
def test_a_bad_plan(settings: dict[str, Any], tmp_path: Path, text: str, message: str) -> None:
    write(settings, tmp_path)
    (tmp_path / "plan.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    refuse(tmp_path, 2, message, "--plan", "plan.json")


# --------------------------------------------------------------------------------- models, exit 3


def spoil_config(directory: Path, **changes: object) -> None:
    tiny.edit_config(directory, **changes)


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def cut_to(size_bytes: int) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / "model.safetensors", size_bytes)


def corrupt(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"\xff\xfe}{")


def make_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def drop_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def drop_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def drop_an_expert(directory: Path) -> None:
    tiny.edit_weights(directory, {"model.layers.1.mlp.experts.3.up_proj.weight": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_config, "has no config.json, so it is not a model directory"),
        (
            lambda path: (path / "config.json").write_text("{"),
            r"/config\.json: is not JSON \(.*\)",
        ),
        (
            lambda path: (path / "config.json").write_text('{"model_type": "llama"}'),
            "model_type 'llama' is no Mixture-of-Experts model; recipes/MODELS.md lists .*",
        ),
        (
            lambda path: spoil_config(path, model_type="jambo"),
            "model_type 'jambo' is not supported; recipes/MODELS.md lists .* name are jamba, .*",
        ),
        (
            lambda path: spoil_config(path, quantization_config={"quant_method": "awq"}),
            r"/config\.json: the model is already quantised \(awq\); give the original "
            r"checkpoint, or one that is converted to bfloat16 \(read are fp8, mxfp4 and, .*\)",
        ),
        (
            make_pickle,
            r"the weights are pickles \(pytorch_model\.bin\), which can run code when loaded; "
            "convert them to safetensors first",
        ),
        (drop_weights, "holds no .safetensors file"),
        (truncate, r"/model\.safetensors: is \d+ bytes long, but its header describes \d+; .*"),
        (cut_to(100), r"/model\.safetensors: is truncated or not a safetensors file"),
        (cut_to(0), r"/model\.safetensors: is truncated or not a safetensors file"),
        (corrupt, r"/model\.safetensors: has a corrupt safetensors header \(.*\)"),
        (
            drop_an_expert,
            r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight is missing; config\.json .*",
        ),
    ],
)
def test_a_bad_model(
    settings: dict[str, Any], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(settings["model"], tmp_path / "model")
    change(tmp_path / "model")
    write(settings | {"model": "model"}, tmp_path)
    refuse(tmp_path, 3, r"model(: |(?=/))" + message)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", float("nan")),
        ("lm_head.weight", float("inf")),
    ],
)
def test_weights_that_are_not_finite(
    settings: dict[str, Any], tmp_path: Path, name: str, value: float
) -> None:
    shutil.copytree(settings["model"], tmp_path / "model")
    weight = load_file(tmp_path / "model" / "model.safetensors")[name].clone()
    weight.view(-1)[7] = value
    tiny.edit_weights(tmp_path / "model", {name: weight})
    write(settings | {"model": "model"}, tmp_path)
    count = weight.numel()
    refuse(tmp_path, 3, re.escape(f"{name}: 1 of {count} values are NaN or infinite"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", "no-such-model: there is no such directory, and a Hub id is owner/name"),
        (
            "no/such-model",
            "no/such-model: there is no such directory, and as a Hub id: the Hub cannot be reached "
            "and its local cache does not hold it",
        ),
        ("text.txt", r"text\.txt: is a file; a model is a directory or a Hub id"),
    ],
)
def test_a_model_that_is_not_there(
    settings: dict[str, Any], tmp_path: Path, model: str, message: str
) -> None:
    write(settings | {"model": model}, tmp_path)
    refuse(tmp_path, 3, message)


# ----------------------------------------------------------------------------------- text, exit 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"calibration\.data: mine\.txt does not exist; .*"),
        ("", r"calibration\.data: mine\.txt .*"),
        ("too short", r"calibration\.data: mine\.txt .*"),
    ],
)
def test_bad_text(settings: dict[str, Any], tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    settings["calibration"]["data"] = "mine.txt"
    write(settings, tmp_path)
    refuse(tmp_path, 3, message)


# -------------------------------------------------------------------------------- output, exit 2


@pytest.mark.parametrize("name", ["out", "out.partial", "out.rejected"])
def test_a_directory_that_is_not_ours_is_left_untouched(
    settings: dict[str, Any], tmp_path: Path, name: str
) -> None:
    write(settings, tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work", encoding="utf-8")
    done = run("r.yaml", "--device", "cpu", "--fresh", cwd=tmp_path)
    check_refusal(done, 2, rf"output {name} exists and was not made by se-compress; choose another "
                  "name or move it away")  # fmt: skip
    assert [entry.name for entry in (tmp_path / name).iterdir()] == ["thesis.tex"]
    assert (tmp_path / name / "thesis.tex").read_text(encoding="utf-8") == "years of work"


def test_a_lock_file_does_not_make_a_directory_ours(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    write(settings, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").write_text("", encoding="utf-8")
    done = run("r.yaml", "--device", "cpu", cwd=tmp_path)
    check_refusal(done, 2, "output out exists and was not made by se-compress; .*")
    assert (tmp_path / "out" / "lock").exists()


def test_a_file_in_place_of_the_output_is_left_untouched(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    write(settings, tmp_path)
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    done = run("r.yaml", "--device", "cpu", cwd=tmp_path)
    check_refusal(done, 2, "output out exists and is not a directory")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_an_output_that_cannot_be_made(settings: dict[str, Any], tmp_path: Path) -> None:
    write(settings, tmp_path)
    done = run("r.yaml", "--device", "cpu", "--output", "text.txt/deep/out", cwd=tmp_path)
    check_refusal(
        done, 2, r"output text\.txt/deep/out: cannot be written \(.*text\.txt is not a directory\)"
    )


# ----------------------------------------------------------------------------------- disk, exit 5


def test_a_file_system_that_is_too_small_is_found_before_the_work(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    write(settings, tmp_path)
    (tmp_path / "small").mkdir()
    mount = f"mount -t tmpfs -o size=200k tmpfs {tmp_path / 'small'}"
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*namespace, mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a user mount a tmpfs")
    script = f"{mount} && {COMMAND} r.yaml --device cpu --output small/out; echo $?; find small/*"
    done = run(script, cwd=tmp_path, command=namespace)
    pattern = (
        r"se-compress: .*/small: the result takes 0\.5 MB and saved progress 0\.3 MB, but only "
    )
    assert re.match(pattern + r"0\.2 MB are free\n", done.stderr), done.stderr
    assert done.stdout == "5\n"


def test_a_disk_that_fills_up_during_the_work(settings: dict[str, Any], tmp_path: Path) -> None:
    """A limit on the size of files stands for it: unlike free space, no pre-flight sees it."""
    write(settings, tmp_path)
    limited = ["sh", "-c", 'ulimit -f 16; exec "$0" "$@"', COMMAND]
    done = run("r.yaml", "--device", "cpu", "--quiet", cwd=tmp_path, command=limited)
    check_refusal(done, 5, r"the disk is full \(.*File too large.*\); progress is kept")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- a whole run


def test_quiet_prints_the_result_line_only_and_flags_are_honoured(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    write(settings, tmp_path)
    flags = ("--device", "cpu", "--output", "other", "--set", "super_experts.confirm=false")
    done = run("r.yaml", *flags, "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    pattern = (
        r"other: passed, 0\.4 MB -> 0\.4 MB, 16\.00 bits per expert weight, "
        r"perplexity \d+\.\d\d -> \d+\.\d\d\n"
    )
    assert re.fullmatch(pattern, done.stdout)
    assert {e.name for e in tmp_path.iterdir()} == {"other", "r.yaml", "text.txt"}
    ours = tmp_path / "other" / "se_compress"
    assert json.loads((ours / "run.json").read_text("utf-8"))["super_experts.confirm"] is False
    assert (ours / "recipe.yaml").read_text("utf-8") == (tmp_path / "r.yaml").read_text("utf-8")

    again = run("r.yaml", *flags, cwd=tmp_path, command=MODULE)
    assert again.returncode == 0
    *progress, last = again.stderr.splitlines()
    assert last == "other is up to date: nothing in the recipe, the model or the data changed"
    assert all(line.startswith("verify: ") for line in progress), "the whole result is read"
    assert again.stdout.splitlines()[-1] + "\n" == done.stdout
    assert "perplexity_increase" in again.stdout
    full = ["sh", "-c", 'exec "$0" "$@" > /dev/full', COMMAND]
    done = run("r.yaml", *flags, "--quiet", cwd=tmp_path, command=full)
    assert (done.returncode, done.stderr) == (
        0,
        "se-compress: stdout cannot be written (No space left on device)\n",
    )


def test_a_rejected_result_is_told_in_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"target": "gptqmodel", "policy": {"bits": 2}}
    settings["quantization"]["method"] = "rtn"
    settings["validation"] |= {"kl_divergence": 1e-6, "perplexity_increase": 1e9}
    settings["validation"] |= {"router_agreement": 0.0, "router_agreement_least": 0.0}
    settings["validation"] |= {"sink_decay": 1.0, "loops": 10.0}
    write(settings, tmp_path)
    done = run("r.yaml", "--quiet", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 4
    assert re.fullmatch(
        r"se-compress: nothing was published; kl_divergence is \S+, limit 1e-06 "
        r"\(2 sequences are too few for an interval\); report in "
        r"out\.rejected/se_compress\n",
        done.stderr,
    )
    assert re.fullmatch(r"out\.rejected: REJECTED, .*\n", done.stdout)
    assert not (tmp_path / "out").exists()
    report = (tmp_path / "out.rejected" / "se_compress" / "validation.json").read_text("utf-8")
    validation = from_json(ValidationReport, report, "validation.json")
    assert [check.name for check in validation.checks if check.passed is False] == ["kl_divergence"]
    assert validation.check("reload").passed


def test_an_existing_checkpoint_is_judged_on_its_own(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"target": "gptqmodel"}
    settings["quantization"]["method"] = "rtn"
    loose = {"perplexity_increase": 1e9, "kl_divergence": 1e3, "sink_decay": 1.0, "loops": 10.0}
    settings["validation"] |= {**loose, "router_agreement": 0.0, "router_agreement_least": 0.0}
    write(settings, tmp_path)
    assert run("r.yaml", "--quiet", "--device", "cpu", cwd=tmp_path).returncode == 0
    made = json.loads((tmp_path / "out" / "se_compress" / "validation.json").read_text())
    done = run("r.yaml", "--validate", "out", "--json", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    Draft202012Validator(json.loads(RESULT_SCHEMA.read_text("utf-8"))).validate(line)
    assert (line["outcome"], line["validation"]) == ("validated", "out.validation/validation.json")
    again = json.loads((tmp_path / "out.validation" / "validation.json").read_text())
    assert again["checks"] == made["checks"], "by the plan that lies in it"
    assert (tmp_path / "out.validation" / "report.html").exists()
    shutil.rmtree(tmp_path / "out" / "se_compress")  # and now as if it were another's: GPTQ v1
    strict = ("--set", "validation.kl_divergence=1e-9", "--output", "judged")
    done = run("r.yaml", "--validate", "out", *strict, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 4
    assert re.search(r"se-compress: out: kl_divergence is .* report in judged\n$", done.stderr)
    foreign = json.loads((tmp_path / "judged" / "validation.json").read_text())
    values = [{c["name"]: c["value"] for c in report["checks"]} for report in (made, foreign)]
    assert values[0] == values[1]
    assert (tmp_path / "out").exists(), "what is judged stays where it is"


def test_what_is_to_be_judged_has_to_be_there(settings: dict[str, Any], tmp_path: Path) -> None:
    write(settings, tmp_path)
    done = run("r.yaml", "--validate", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        3,
        "se-compress: --validate nowhere: there is no such directory",
    )
    done = run("r.yaml", "--validate", "out", "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "se-compress: --validate: goes with neither --plan nor --dry-run\n",
    )
