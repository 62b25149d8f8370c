"""The whole road on a tiny model: what comes out, what is reused, and what survives being killed.

Loading the result with GPTQModel has tests of its own (test_reload, test_cli); here it is left out.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from se_compress.artifacts import (
    Check,
    Comparison,
    CompressionPlan,
    ExpertId,
    ExpertProfile,
    RunOptions,
    ValidationReport,
    from_json,
    to_json,
)
from se_compress.engines import targets
from se_compress.errors import RecipeError, ResourceError, SourceError
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.pipeline import (
    Outcome,
    Request,
    VariantsOutcome,
    judge_existing,
    preview,
    preview_variants,
    run,
    run_variants,
)
from se_compress.recipe import load_recipe
from se_compress.running import preflight
from se_compress.running.manifest import write_list
from se_compress.validation import validator

TinyModel = Callable[[str], Path]
NUMBERS = " ".join(f"{n:05d}" for n in range(4000))
WEIGHTS = "model.safetensors"
COMMAND = str(Path(sys.executable).with_name("se-compress"))

# A run that ends with SIGKILL as soon as STAGE has done STEP steps, a random moment later.
KILLED = """
import os, random, signal, sys, threading, time
from pathlib import Path
from se_compress.validation import validator
from se_compress.artifacts import Check, RunOptions
from se_compress.pipeline import Request, run
from se_compress.recipe import load_recipe
stage, step, seed = sys.argv[2], int(sys.argv[3]), sys.argv[4]
def die():
    time.sleep(random.Random(seed).uniform(0, 0.05))
    os.kill(os.getpid(), signal.SIGKILL)
def progress(now, done, total):
    if (now, done) == (stage, step):
        threading.Thread(target=die).start()
        time.sleep(random.Random(seed).uniform(0, 0.05))
validator._reload = lambda *arguments: time.sleep(10)
recipe = Path(sys.argv[1])
run(Request(load_recipe(recipe), recipe.read_text(), RunOptions(progress=progress)))
"""


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check("reload", None, validator.RELOAD_LIMIT, None, "not in this test")
    monkeypatch.setattr(validator, "_reload", lambda *arguments: check)


class Workplace:
    """A directory with a recipe that works, and what runs in it have said."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.output = directory / "out"
        self.partial = directory / "out.partial"
        self.rejected = directory / "out.rejected"
        self.recipe = directory / "r.yaml"
        self.said: list[str] = []
        (directory / "text.txt").write_text(NUMBERS, encoding="utf-8")
        text = {"data": str(directory / "text.txt"), "sequence_length": 32}
        self.settings: dict[str, Any] = {
            "model": str(model),
            "output": str(self.output),
            "target": "gptqmodel",
            "calibration": {**text, "samples": 8},
            "policy": {"bits": [4]},
            "quantization": {"method": "gptq", "group_size": 32},
            "validation": {
                **text,
                "samples": 2,
                "seed": 1,
                "generation": {"prompts": 1, "prompt_tokens": 8, "tokens": 4},
                # A random model has nothing to lose and much to be upset about.
                "perplexity_increase": 1e9,
                "kl_divergence": 1e3,
                "router_agreement": 0.0,
                "router_agreement_least": 0.0,
                "sink_decay": 1.0,
                "repetition": 10.0,
                "loops": 10.0,
            },
        }

    def request(self, *overrides: str, **how: Any) -> Request:
        text = yaml.safe_dump(self.settings, sort_keys=False)
        self.recipe.write_text(text, encoding="utf-8")
        recipe = load_recipe(self.recipe, overrides)
        self.said = []
        return Request(recipe, self.recipe.read_text("utf-8"), notice=self._note, **how)

    def _note(self, sentence: str) -> None:
        """Every run says what it takes of memory; what it says beside that is looked at."""
        if "memory: " not in sentence:
            self.said.append(sentence)

    def run(self, *overrides: str, **how: Any) -> Outcome:
        return run(self.request(*overrides, **how))

    def run_variants(self, *overrides: str, **how: Any) -> VariantsOutcome:
        return run_variants(self.request(*overrides, **how))

    def plan(self) -> CompressionPlan:
        text = (self.output / "se_compress" / "plan.json").read_text("utf-8")
        return from_json(CompressionPlan, text, "plan.json")

    def listing(self) -> set[str]:
        return {entry.name for entry in self.directory.iterdir()} - {"r.yaml", "text.txt"}


def test_a_shape_that_only_transformers_knows_is_refused_before_the_work(
    tiny_type: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_type("dots1"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.self_attn.q_norm.weight"
    tensors[name] = torch.ones(len(tensors[name]) + 1)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    place = Workplace(tmp_path, model)
    place.settings |= {"target": "transformers", "quantization": {"method": "none"}}
    del place.settings["policy"]
    with pytest.raises(SourceError, match=rf"{re.escape(name)} is \[17\], but .* has \[16\]"):
        place.run()
    assert place.listing() == {"model"}


@pytest.fixture
def place(tiny_model: TinyModel, tmp_path: Path) -> Workplace:
    return Workplace(tmp_path, tiny_model("qwen2_moe"))


@pytest.fixture(scope="module")
def published(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An uninterrupted run's result. Not to be changed: `settled` makes a copy."""
    with pytest.MonkeyPatch.context() as patch:
        no_engine.__wrapped__(patch)  # type: ignore[attr-defined]
        directory = tmp_path_factory.mktemp("published")
        assert Workplace(directory, tiny_model("qwen2_moe")).run().published
        yield directory / "out"


@pytest.fixture
def settled(place: Workplace, published: Path) -> Workplace:
    """A workplace in which the recipe has been run."""
    shutil.copytree(published, place.output)
    settings = json.loads((place.output / "se_compress" / "run.json").read_text("utf-8"))
    for section in ("calibration.data", "validation.data"):
        settings[section][0]["data"] = str(place.directory / "text.txt")
    (place.output / "se_compress" / "run.json").write_text(json.dumps(settings), "utf-8")
    write_list(place.output, lambda *step: None)
    return place


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# -------------------------------------------------------------------------------- what comes out


def test_all_files_of_the_contract_come_out(published: Path, tiny_model: TinyModel) -> None:
    assert set(files_of(published)) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantize_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "se_compress/recipe-resolved.yaml",
        "se_compress/recipe.yaml",
        "se_compress/profile.json",
        "se_compress/plan.json",
        "se_compress/compression.json",
        "se_compress/validation.json",
        "se_compress/report.html",
        "se_compress/run.json",
        "se_compress/files.json",
    }
    assert [path.name for path in published.parent.iterdir() if path.is_dir()] == ["out"]
    ours = published / "se_compress"
    profile = from_json(ExpertProfile, (ours / "profile.json").read_text("utf-8"), "profile")
    plan = from_json(CompressionPlan, (ours / "plan.json").read_text("utf-8"), "plan")
    report = from_json(ValidationReport, (ours / "validation.json").read_text("utf-8"), "report")
    assert profile.model == str(tiny_model("qwen2_moe"))
    assert plan.profile_digest == profile.digest
    assert report.passed
    assert report.size_bytes == plan.size_bytes
    assert [check.name for check in report.checks] == [
        "perplexity_increase",
        "kl_divergence",
        "massive_activation_ratio",
        "sink_token_error",
        "sink_decay",
        "router_agreement",
        "router_agreement_least",
        "repetition",
        "loops",
        "weight_cosine",
        "weight_gain",
        "tensors_accounted",
        "text_alike",
        "reload",
    ]
    assert (ours / "recipe.yaml").read_bytes() == (published.parent / "r.yaml").read_bytes()
    assert "<html" in (ours / "report.html").read_text("utf-8")


def test_every_stage_reports_its_progress(place: Workplace) -> None:
    seen: list[tuple[str, int, int]] = []
    options = RunOptions(progress=lambda *step: seen.append(step))
    place.run(options=options)
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    named = "profile", "sensitivity", "compress", "validate", "generate", "weights", "hash"
    assert stages == [*named]
    for stage in stages:
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_the_source_s_licence_is_passed_on(place: Workplace, tmp_path: Path) -> None:
    shutil.copytree(place.settings["model"], tmp_path / "model")
    card = "---\nlicense: apache-2.0\n---\n# A model\n"
    (tmp_path / "model" / "README.md").write_text(card, encoding="utf-8")
    place.settings |= {"model": str(tmp_path / "model")}
    place.run()
    front = (place.output / "README.md").read_text("utf-8").split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "apache-2.0"


# ------------------------------------------------------------------------------------- run again


def test_a_second_run_is_up_to_date_and_does_nothing(settled: Workplace) -> None:
    before = files_of(settled.output)
    outcome = settled.run()
    assert settled.said == [
        f"{settled.output} is up to date: nothing in the recipe, the model or the data changed"
    ]
    assert (outcome.published, outcome.directory) == (True, settled.output)
    assert outcome.validation.passed
    assert files_of(settled.output) == before
    assert settled.listing() == {"out"}


def test_a_changed_setting_is_named_and_the_profile_is_reused(settled: Workplace) -> None:
    outcome = settled.run("policy.bits=[2]")
    profile = settled.output / "se_compress" / "profile.json"
    assert settled.said == ["policy.bits changed: [4] -> [2]", f"profile reused from {profile}"]
    assert outcome.published
    assert {d.bits for d in settled.plan().experts if d.action == "quantize"} == {2}
    assert settled.listing() == {"out"}


def test_a_profile_is_not_reused_when_it_would_differ(settled: Workplace) -> None:
    settled.run("quantization.group_size=-1")
    assert settled.said == ["quantization.group_size changed: 32 -> -1"]


def test_a_changed_text_is_named(settled: Workplace) -> None:
    (settled.directory / "text.txt").write_text(NUMBERS[::-1], encoding="utf-8")
    settled.run()
    assert settled.said == ["the calibration text changed", "the validation text changed"]


def test_a_changed_model_is_named(settled: Workplace) -> None:
    model = settled.directory / "model"
    shutil.copytree(settled.settings["model"], model)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tiny.edit_weights(model, {name: 2 * load_file(model / WEIGHTS)[name]})
    settled.settings |= {"model": str(model)}
    settled.run()
    assert settled.said == ["the model's files changed"]


def test_fresh_ignores_the_result_and_its_profile(settled: Workplace) -> None:
    before = files_of(settled.output)
    (settled.output / "se_compress" / "profile.json").write_text("{}", encoding="utf-8")
    outcome = settled.run(fresh=True)
    assert outcome.published
    assert settled.said == []
    after = files_of(settled.output)
    assert after[WEIGHTS] == before[WEIGHTS]
    assert after["se_compress/profile.json"] == before["se_compress/profile.json"]


def test_a_profile_that_cannot_be_read_is_measured_again(settled: Workplace) -> None:
    (settled.output / "se_compress" / "profile.json").write_text('{"model": 1}', encoding="utf-8")
    assert settled.run("policy.bits=[2]").published
    file = settled.output / "se_compress" / "profile.json"
    assert settled.said == [
        "policy.bits changed: [4] -> [2]",
        f"{file} is damaged, or of another version: not used",
    ]


@pytest.mark.parametrize("name", ["run.json", "plan.json", "validation.json"])
@pytest.mark.parametrize("text", [None, "", "{}"])
def test_a_result_whose_reports_are_not_whole_is_made_again(
    settled: Workplace, name: str, text: str | None
) -> None:
    before = files_of(settled.output)
    file = settled.output / "se_compress" / name
    file.unlink()
    if text is not None:
        file.write_text(text, encoding="utf-8")
    assert settled.run().published
    assert files_of(settled.output)[f"se_compress/{name}"] != (text or "").encode()
    assert files_of(settled.output)[WEIGHTS] == before[WEIGHTS]


def set_to(file: Path, data: bytes | None) -> None:
    file.unlink()
    if data is not None:
        file.write_bytes(data)


DAMAGES = {
    "is missing": lambda data: None,
    "has 100 bytes, not the": lambda data: data[:100],
    "differs from what was written": lambda data: data[:-64] + bytes(64),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "README.md"])
def test_a_result_that_is_not_whole_is_named_and_made_again(
    settled: Workplace, name: str, damage: str
) -> None:
    before = files_of(settled.output)
    set_to(settled.output / name, DAMAGES[damage](before[name]))
    stages: set[str] = set()
    options = RunOptions(progress=lambda stage, done, total: stages.add(stage))
    assert settled.run(options=options).published
    assert stages == {"verify"} or name == WEIGHTS, "what is cheap is made again alone"
    assert settled.said[0].startswith(f"{settled.output}: {name} {damage}")
    assert settled.said[0].endswith("made again")
    after = files_of(settled.output)
    assert after[name] == before[name]
    assert after[WEIGHTS] == before[WEIGHTS]
    assert settled.listing() == {"out"}


@pytest.mark.parametrize("text", [None, b"", b"[]", b'{"files": []', b'{"files": []}', b"\xff"])
def test_a_result_without_a_list_of_its_files_is_made_again(
    settled: Workplace, text: bytes | None
) -> None:
    set_to(settled.output / "se_compress" / "files.json", text)
    assert settled.run().published
    assert settled.said[0].endswith("(se_compress/files.json): made again")
    settled.run()
    assert "is up to date" in settled.said[0]


def test_a_rejected_result_under_the_good_name_is_not_published(place: Workplace) -> None:
    place.run(STRICT)
    place.rejected.rename(place.output)
    outcome = place.run(STRICT)
    assert not outcome.published
    assert outcome.directory == place.rejected
    assert place.said[0] == f"{place.output}: holds a result that did not pass: made again"


def test_a_good_result_under_the_rejected_name_is_not_buried(settled: Workplace) -> None:
    settled.output.rename(settled.rejected)
    with pytest.raises(RecipeError, match="holds a result that passed its gates"):
        settled.run()
    assert (settled.rejected / WEIGHTS).exists()


def test_what_somebody_put_into_the_result_is_kept(settled: Workplace) -> None:
    (settled.output / "notes.md").write_text("years of work", encoding="utf-8")
    settled.run()
    assert "is up to date" in settled.said[0]
    with pytest.raises(RecipeError, match=r"out: holds notes\.md, which se-compress did not write"):
        settled.run("policy.bits=[2]")
    assert (settled.output / "notes.md").read_text("utf-8") == "years of work"
    assert settled.listing() == {"out"}


def test_what_comes_in_during_the_run_is_kept_and_the_work_as_well(settled: Workplace) -> None:
    def puts(stage: str, done: int, total: int) -> None:
        if stage == "hash":
            (settled.output / "late.md").touch()

    with pytest.raises(RecipeError, match=r"out: holds late\.md"):
        settled.run("policy.bits=[2]", options=RunOptions(progress=puts))
    assert (settled.partial / "checkpoint" / WEIGHTS).exists()
    (settled.output / "late.md").unlink()
    stages: list[str] = []
    options = RunOptions(progress=lambda stage, done, total: stages.append(stage))
    assert settled.run("policy.bits=[2]", options=options).published
    assert "profile" not in stages


@pytest.mark.parametrize("name", ["model", "model/out", "out.partial", "out.rejected"])
def test_an_output_that_is_or_touches_the_model_is_refused(place: Workplace, name: str) -> None:
    model = place.directory / "model"
    shutil.copytree(place.settings["model"], model)
    before = files_of(model)
    if name.startswith("out."):
        (place.directory / name).symlink_to("model")
    else:
        place.settings["output"] = str(place.directory / name)
    place.settings["model"] = str(model)
    for act in (place.run, lambda: preview(place.request())):
        with pytest.raises(RecipeError, match=r"^output .*(lies in the model|is a link)"):
            act()
    assert files_of(model) == before


def test_a_result_is_not_compressed_into_itself(place: Workplace) -> None:
    """Of ours, with nothing quantised, it would do as a model."""
    place.settings |= {"target": "transformers", "quantization": {"method": "none"}}
    assert place.run().published
    before = files_of(place.output)
    place.settings |= {"model": str(place.output)}
    for how in ({}, {"fresh": True}):
        with pytest.raises(RecipeError, match="is, holds or lies in the model"):
            place.run(**how)
    assert files_of(place.output) == before


@pytest.mark.parametrize("stage", ["profile", "compress", "validate"])
@pytest.mark.parametrize("how", ["removed", "truncated", "directory"])
def test_a_source_that_goes_during_the_run(place: Workplace, stage: str, how: str) -> None:
    model = place.directory / "model"
    shutil.copytree(place.settings["model"], model)
    place.settings["model"] = str(model)

    def goes(now: str, done: int, total: int) -> None:
        if now == stage and model.exists():
            if how == "directory":
                shutil.rmtree(model)
            elif how == "removed":
                (model / WEIGHTS).unlink(missing_ok=True)
            else:
                os.truncate(model / WEIGHTS, 1000)

    with pytest.raises(SourceError, match=r"model\.safetensors: .*; (it|the model) has changed$"):
        place.run(options=RunOptions(progress=goes))
    assert place.partial.exists()


def test_what_does_not_come_out_as_it_was_is_made_with_all_the_rest(settled: Workplace) -> None:
    (settled.output / "config.json").unlink()
    model = settled.directory / "model"
    shutil.copytree(settled.settings["model"], model, copy_function=shutil.copy2)
    (model / "generation_config.json").write_text('{"temperature": 2.0}', encoding="utf-8")
    (settled.output / "generation_config.json").unlink()
    settled.settings["model"] = str(model)
    assert settled.run().published
    assert (settled.output / "generation_config.json").read_text("utf-8") == '{"temperature": 2.0}'
    assert (settled.output / "config.json").exists()
    settled.run()
    assert "is up to date" in settled.said[0]


# -------------------------------------------------------------------------------------- rejected

STRICT = "validation.kl_divergence=1e-9"


def test_a_rejected_checkpoint_is_kept_apart(place: Workplace) -> None:
    outcome = place.run(STRICT)
    assert not outcome.published
    assert outcome.directory == place.rejected
    assert place.listing() == {"out.rejected"}
    assert {WEIGHTS, "se_compress/report.html", "se_compress/validation.json"} <= set(
        files_of(place.rejected)
    )
    failed = [check.name for check in outcome.validation.checks if check.passed is False]
    assert failed == ["kl_divergence"]


def test_the_profile_of_a_rejected_checkpoint_is_reused(place: Workplace) -> None:
    place.run(STRICT)
    assert place.run().published
    assert place.said == [
        "validation.kl_divergence changed: 1e-09 -> 1000.0",
        f"profile reused from {place.rejected / 'se_compress' / 'profile.json'}",
    ]


def test_a_good_result_survives_a_rejected_one(settled: Workplace) -> None:
    before = files_of(settled.output)
    assert not settled.run(STRICT).published
    assert files_of(settled.output) == before
    assert settled.listing() == {"out", "out.rejected"}
    settled.run()
    assert settled.said[0].endswith("changed")


# ------------------------------------------------------------------------------------------ plans


def write_plan(place: Workplace, plan: CompressionPlan) -> Path:
    file = place.directory / "plan.json"
    file.write_text(to_json(plan), encoding="utf-8")
    return file


def test_an_edited_plan_is_honoured(settled: Workplace) -> None:
    plan = settled.plan()
    widths = {ExpertId(1, 0): 8, ExpertId(1, 1): 16, ExpertId(2, 3): 2}
    experts = tuple(
        replace(d, bits=widths[d.id], action="keep" if widths[d.id] == 16 else "quantize")
        if d.id in widths else d for d in plan.experts
    )  # fmt: skip
    file = write_plan(settled, replace(plan, experts=experts))
    outcome = settled.run(plan_file=file)
    assert settled.said[0] == "the plan file changed"
    assert outcome.published
    written = load_file(settled.output / WEIGHTS)
    assert "model.layers.1.mlp.experts.1.up_proj.weight" in written
    for identity, bits in {**widths, ExpertId(2, 4): 4}.items():
        if bits != 16:
            stem = f"model.layers.{identity.layer}.mlp.experts.{identity.expert}.up_proj"
            assert written[f"{stem}.qweight"].shape == (tiny.HIDDEN * bits // 32, 32)
    assert settled.plan() == outcome.plan
    assert outcome.plan.size_bytes == outcome.validation.size_bytes != plan.size_bytes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantization.method=rtn", "method is gptq, but the recipe says rtn"),
        ("quantization.group_size=-1", "group_size is 32, but the recipe says -1"),
        ("quantization.symmetric=false", "format is gptq, but the recipe says gptq_v2"),
        ("target=transformers", "target is gptqmodel, but the recipe says transformers"),
    ],
)
def test_a_plan_for_another_recipe_is_refused(
    settled: Workplace, override: str, message: str
) -> None:
    file = write_plan(settled, settled.plan())
    with pytest.raises(RecipeError, match=f"^{re.escape(str(file))}: {message}$"):
        settled.run(override, plan_file=file)
    assert settled.listing() == {"out", "plan.json"}


def test_a_plan_for_another_model_is_refused(settled: Workplace, tiny_model: TinyModel) -> None:
    file = write_plan(settled, settled.plan())
    settled.settings |= {"model": str(tiny_model("mixtral"))}
    with pytest.raises(RecipeError, match=r"plan\.json: expert \(0, 0\) of the model has no line"):
        settled.run(plan_file=file)


# ---------------------------------------------------------------------------------------- preview


def test_a_preview_before_the_first_run_knows_no_super_experts(place: Workplace) -> None:
    found = preview(place.request())
    assert found.profile is None
    assert found.plan.notes[0].startswith("no profile yet")
    assert place.listing() == set()


def test_a_preview_uses_the_profile_that_there_is(settled: Workplace) -> None:
    found = preview(settled.request("policy.bits=[2]"))
    assert found.profile is not None
    assert found.plan.profile_digest == found.profile.digest
    assert found.plan.notes == ("the profile found no super expert, so none is protected",)


def test_a_preview_does_not_use_the_profile_of_another_model(
    settled: Workplace, tiny_model: TinyModel
) -> None:
    settled.settings |= {"model": str(tiny_model("qwen3_moe"))}
    assert preview(settled.request()).profile is None


# ------------------------------------------------------------------------------------- pre-flight


@pytest.mark.parametrize("data_type", ["nf4", "int8"])
def test_a_bitsandbytes_checkpoint_comes_out_whole(place: Workplace, data_type: str) -> None:
    blocks = {} if data_type == "int8" else {"block_size": 32}
    place.settings |= {
        "target": "transformers",
        "policy": {"bits": 8 if data_type == "int8" else 4},
        "quantization": {"method": "bitsandbytes", "data_type": data_type, **blocks},
    }
    outcome = run(place.request())
    assert outcome.published
    assert outcome.validation.check("tensors_accounted").passed
    assert outcome.validation.size_bytes == outcome.plan.size_bytes
    errors = [e.error_down for r in outcome.validation.records for e in r.experts]
    least, most = (0.001, 0.02) if data_type == "int8" else (0.05, 0.15)
    assert all(least < error < most for error in errors)
    assert not (place.output / "quantize_config.json").exists()


def test_a_missing_bitsandbytes_is_found_before_the_work(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.settings |= {"target": "transformers", "quantization": {"method": "bitsandbytes"}}
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"not installed: pip install 'se-compress\[bnb\]'$"):
        run(place.request("quantization.block_size=32"))
    assert not place.partial.exists()


def test_held_out_text_that_calibration_saw_is_told_everywhere(place: Workplace) -> None:
    place.settings["validation"] |= {"samples": 8, "seed": 0}
    outcome = place.run("quantization.method=rtn", "super_experts.confirm=false")
    said = "caution: calibration saw 100 % of the held-out text"
    assert [sentence for sentence in place.said if sentence.startswith(said)]
    assert any(note.startswith(said) for note in place.plan().notes)
    assert said in (outcome.directory / "README.md").read_text("utf-8")
    assert said in (outcome.directory / "se_compress" / "report.html").read_text("utf-8")
    assert "come from one source" in preview(place.request()).cautions[0]


def test_too_little_memory_is_found_before_the_work(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_300_000))
    with pytest.raises(ResourceError, match=r"lower calibration\.samples to \d|set compute_dtype"):
        place.run()
    assert place.listing() == set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "available", [500_000, 1_000_000, 1_150_000, 1_300_000, 1_500_000, 1_900_000]
)
def test_what_the_message_about_memory_advises_makes_room(
    available: int, dtype: str, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    def shortage(*overrides: str, on_disk: bool = False) -> str:
        recipe = place.request(f"compute_dtype={dtype}", *overrides).recipe
        tokens = recipe.calibration.samples * recipe.calibration.sequence_length
        try:
            preflight.check_memory(open_source(recipe.model), recipe, tokens, on_disk)
        except ResourceError as error:
            return str(error).rpartition("; ")[2]
        return ""

    advice = shortage()
    if advice == "no setting of the recipe makes it fit":
        assert shortage("calibration.samples=1", "compute_dtype=bfloat16")
        return
    for option in advice.split(" or ") if advice else ():
        if "--hidden-states" in option:
            assert shortage(on_disk=True) == ""
            continue
        samples = re.search(r"samples to (\d+)", option)
        changes = [f"calibration.samples={samples[1]}"] if samples else []
        assert changes or "bfloat16" in option
        changes += ["compute_dtype=bfloat16"] if "bfloat16" in option else []
        assert shortage(*changes) == ""
        if samples:
            changes[0] = f"calibration.samples={int(samples[1]) + 1}"
            assert shortage(*changes)


def test_a_run_says_what_it_takes_of_memory_before_it_begins(place: Workplace) -> None:
    said: list[str] = []
    with pytest.raises(Stop):
        run(replace(place.request(options=stop_at("profile", 0)), notice=said.append))
    recipe = place.request().recipe
    sentence = preflight.memory_sentence(open_source(recipe.model), recipe, 8 * 32)
    assert said == [sentence]
    assert preview(place.request()).memory == sentence


def test_too_little_disk_is_found_before_the_work(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=400_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"saved progress 0\.3 MB, but only 0\.4 MB are free$"):
        place.run()
    told = preview(place.request()).shortage
    assert re.search(r"the result takes 0\.3 MB .* but only 0\.4 MB are free$", told)
    assert place.listing() == set()
    usage.free = 800_000
    assert preview(place.request()).shortage == ""
    assert place.run().published


# ------------------------------------------------------------------------------------ at one time


def test_two_runs_at_once_do_not_disturb_each_other(place: Workplace, published: Path) -> None:
    refused: list[str] = []

    def second(stage: str, done: int, total: int) -> None:
        with pytest.raises(RecipeError) as caught:
            place.run()
        refused.append(str(caught.value))

    assert place.run(options=RunOptions(progress=second)).published
    assert set(refused) == {f"output {place.partial}: another se-compress is working on it"}
    assert (place.output / WEIGHTS).read_bytes() == (published / WEIGHTS).read_bytes()


def test_a_directory_beside_the_output_is_not_ours_to_use(settled: Workplace) -> None:
    mine = settled.directory / "out.replaced"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work", encoding="utf-8")
    settled.run("policy.bits=[2]")
    assert files_of(mine) == {"thesis.tex": b"years of work"}


# ----------------------------------------------------------------------------------- interrupted


class Stop(Exception):
    """Stands for whatever ends a run from outside."""


def stop_at(stage: str, step: int) -> RunOptions:
    def progress(now: str, done: int, total: int) -> None:
        if (now, done) == (stage, step):
            raise Stop

    return RunOptions(progress=progress)


def assert_as_uninterrupted(place: Workplace, published: Path) -> None:
    """The same tensors, profile and plan, byte for byte, and nothing left over."""
    ours, theirs = files_of(place.output), files_of(published)
    assert set(ours) == set(theirs)
    for name in (WEIGHTS, "config.json", "se_compress/profile.json", "se_compress/plan.json"):
        assert ours[name] == theirs[name], name
    assert place.listing() == {"out"}


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    place: Workplace, published: Path
) -> None:
    place.request()
    kills = [("profile", 1), ("profile", 3), ("compress", 2), ("validate", 1), ("generate", 3)]
    kept: dict[str, int] = {}
    for stage, step in kills:
        command = [sys.executable, "-c", KILLED, str(place.recipe), stage, str(step), f"{step}"]
        died = subprocess.run(command, capture_output=True, text=True, check=False)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert not place.output.exists()
        records = {p.name: p.stat().st_mtime_ns for p in place.partial.glob("*-layer-*.json")}
        assert kept.items() <= records.items(), "a finished layer was done again"
        kept = records
    assert len(kept) == 6
    assert place.run().published
    assert f"continuing from {place.partial}" in place.said
    assert_as_uninterrupted(place, published)


@pytest.mark.parametrize(
    ("stage", "step"), [("profile", 0), ("profile", 2), ("compress", 1), ("validate", 0)]
)
def test_a_run_that_stopped_goes_on_after_the_last_finished_layer(
    place: Workplace, published: Path, stage: str, step: int
) -> None:
    with pytest.raises(Stop):
        place.run(options=stop_at(stage, step))
    assert place.listing() == {"out.partial"}
    assert place.run().published
    assert_as_uninterrupted(place, published)


def test_progress_of_another_recipe_is_named_and_dropped(place: Workplace, published: Path) -> None:
    with pytest.raises(Stop):
        place.run("policy.bits=[2]", options=stop_at("compress", 2))
    profile = place.partial / "profile.json"
    assert place.run().published
    assert place.said == ["policy.bits changed: [2] -> [4]", f"profile reused from {profile}"]
    assert_as_uninterrupted(place, published)


def test_fresh_drops_the_progress(place: Workplace, published: Path) -> None:
    with pytest.raises(Stop):
        place.run(options=stop_at("compress", 2))
    assert place.run(fresh=True).published
    assert place.said == []
    assert_as_uninterrupted(place, published)


def test_the_progress_of_a_changed_model_is_dropped(place: Workplace) -> None:
    model = place.directory / "model"
    shutil.copytree(place.settings["model"], model)
    place.settings |= {"model": str(model)}
    with pytest.raises(Stop):
        place.run(options=stop_at("compress", 2))
    name = "model.layers.2.mlp.experts.0.up_proj.weight"
    tiny.edit_weights(model, {name: torch.full((32, 64), float("nan"), dtype=torch.bfloat16)})
    with pytest.raises(SourceError, match=f"^{name}: 2048 of 2048 values are NaN or infinite$"):
        place.run()
    assert place.said == ["the model's files changed"]


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_leaves_what_can_be_continued(
    place: Workplace, published: Path, number: signal.Signals, code: int, word: str
) -> None:
    place.request()
    started = subprocess.Popen(
        [COMMAND, str(place.recipe), "--device", "cpu", "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (place.partial / "profile-layer-00000.json").exists():
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.005)
    started.send_signal(number)
    out, err = started.communicate(timeout=60)
    message = f"se-compress: {word}; the same command continues where it stopped\n"
    assert (started.returncode, out, err) == (code, "", message)
    assert place.listing() == {"out.partial"}
    assert place.run().published
    assert_as_uninterrupted(place, published)


# ------------------------------------------------------------------------------------- variants

THREE = {
    "four": {},
    "two": {"policy": {"bits": [2]}, "validation": {"kl_divergence": 1e-9}},
    "none": {"target": "transformers", "quantization": {"method": "none"}},
}


@pytest.fixture
def several(place: Workplace) -> Workplace:
    place.settings |= {"variants": THREE}
    return place


def entries(place: Workplace) -> set[str]:
    return {entry.name for entry in place.output.iterdir()}


COMPARED = {"four", "two.rejected", "none", "comparison.json", "comparison.html"}


def test_variants_share_a_profile_and_a_rejected_one_stops_nobody(
    several: Workplace, published: Path
) -> None:
    stages: list[str] = []
    options = RunOptions(progress=lambda stage, done, total: stages.append(stage))
    outcome = several.run_variants(options=options)
    assert {name: one.published for name, one in outcome.outcomes.items()} == {
        "four": True, "two": False, "none": True
    }  # fmt: skip
    assert entries(several) == COMPARED
    assert several.listing() == {"out"}
    assert {stage for stage in stages if "profile" in stage} == {"four: profile"}
    profile = several.output / "four" / "se_compress" / "profile.json"
    assert several.said == [f"{n}: profile reused from {profile}" for n in ("two", "none")]
    # A variant is what the same recipe makes alone.
    for name in (WEIGHTS, "config.json", "se_compress/plan.json", "se_compress/profile.json"):
        assert (several.output / "four" / name).read_bytes() == (published / name).read_bytes()


def test_the_comparison_says_what_the_variants_own_files_say(several: Workplace) -> None:
    found = several.run_variants().comparison
    text = (several.output / "comparison.json").read_text("utf-8")
    assert from_json(Comparison, text, "comparison.json") == found
    assert (found.passed, found.required) == (True, ())
    assert (found.recommended, found.closest) == ("four", "none")
    assert found.by_name["two"].changes == {
        "policy.bits": "[2]", "validation.kl_divergence": "1e-09"
    }  # fmt: skip
    assert found.by_name["four"].changes == {}
    for variant in found.variants:
        ours = several.output / variant.checkpoint.directory / "se_compress"
        report = from_json(ValidationReport, (ours / "validation.json").read_text("utf-8"), "")
        plan = from_json(CompressionPlan, (ours / "plan.json").read_text("utf-8"), "")
        assert variant.layers == report.layers
        assert variant.checkpoint.checks == report.checks
        assert variant.checkpoint.size_bytes == report.size_bytes
        assert variant.checkpoint.bits_per_weight == plan.bits_per_weight
        assert variant.checkpoint.published == report.passed
        assert found.perplexity == report.perplexity_source


def test_a_required_variant_that_fails_fails_the_comparison(several: Workplace) -> None:
    several.settings |= {"require": ["four", "two"]}
    found = several.run_variants().comparison
    assert (found.passed, found.recommended) == (False, "four")
    several.settings |= {"require": ["four"]}
    assert several.run_variants().comparison.passed
    strict = several.run_variants("validation.kl_divergence=1e-9", "variants.none=null").comparison
    assert (strict.passed, strict.recommended, strict.closest) == (False, None, None)


def test_a_second_run_of_variants_does_nothing(several: Workplace) -> None:
    several.run_variants()
    before = files_of(several.output)
    several.run_variants()
    same = "is up to date: nothing in the recipe, the model or the data changed"
    assert several.said == [
        f"four: {several.output / 'four'} {same}",
        f"two: {several.output / 'two.rejected'} {same} (--fresh makes it again)",
        f"none: {several.output / 'none'} {same}",
    ]
    assert files_of(several.output) == before


def test_a_changed_variant_alone_is_made_again(several: Workplace) -> None:
    several.run_variants()
    before = files_of(several.output / "none")
    several.run_variants("variants.four.policy.bits=[3]")
    assert several.said[0] == "four: policy.bits changed: [4] -> [3]"
    assert several.said[1].startswith("four: profile reused from ")
    assert [sentence.split(":")[0] for sentence in several.said[2:]] == ["two", "none"]
    assert files_of(several.output / "none") == before


@pytest.mark.parametrize("stage", ["four: compress", "two: validate", "none: profile"])
def test_variants_go_on_where_they_stopped(several: Workplace, stage: str) -> None:
    if stage == "none: profile":  # which it does not share if it measures something else
        several.settings["variants"] = {
            **THREE, "none": {**THREE["none"], "super_experts": {"percentile": 99.0}}
        }  # fmt: skip
    with pytest.raises(Stop):
        several.run_variants(options=stop_at(stage, 1))
    assert "comparison.json" not in entries(several)
    seen: list[str] = []
    options = RunOptions(progress=lambda now, done, total: seen.append(now))
    assert several.run_variants(options=options).comparison.passed
    variant = stage.split(":")[0]
    kept = f"{variant}: continuing from {several.output / variant}.partial"
    assert (kept in several.said) or stage.endswith("validate")
    assert "four: profile" not in seen
    assert entries(several) == COMPARED


def test_a_variant_whose_output_is_not_ours_stops_all_before_the_work(several: Workplace) -> None:
    (several.output / "four").mkdir(parents=True)
    (several.output / "four" / "thesis.tex").write_text("years of work", encoding="utf-8")
    message = f"^output {several.output} exists and was not made by se-compress"
    with pytest.raises(RecipeError, match=message):
        several.run_variants()
    assert files_of(several.output) == {"four/thesis.tex": b"years of work"}


def test_a_single_result_is_not_buried_under_variants(settled: Workplace) -> None:
    before = files_of(settled.output)
    settled.settings |= {"variants": THREE}
    with pytest.raises(RecipeError, match="was not made by se-compress"):
        settled.run_variants()
    assert files_of(settled.output) == before


def test_an_error_names_its_variant(several: Workplace) -> None:
    with pytest.raises(RecipeError, match=r"^variant two: target gptqmodel does not load"):
        several.run_variants("variants.two.quantization.method=none")
    assert several.listing() == set()
    plan = several.directory / "plan.json"
    with pytest.raises(RecipeError, match=r"one plan cannot serve 3 variants"):
        several.run_variants(plan_file=plan)


def test_a_preview_of_variants_tells_each_size(
    several: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = preview_variants(several.request())
    sizes = {name: one.plan.size_bytes for name, one in found.items()}
    assert sizes["two"] < sizes["four"] < sizes["none"] == found["none"].source.size_bytes
    assert several.listing() == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=sizes["none"]))
    told = {one.shortage for one in preview_variants(several.request()).values()}
    assert re.search("the 3 results take 1.0 MB and saved progress", told.pop())
    assert not told, "the same sentence for all"


def test_a_run_that_has_lost_its_massive_activation_stops_and_keeps_what_it_has(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3_moe"), model)
    tiny.fragile(model, 1, 5)
    tiny.save_tokenizer(model, bos=True)
    place = Workplace(tmp_path, model)
    place.settings["policy"] = {"bits": [2], "protect": "none"}
    place.settings["quantization"] |= {"method": "rtn", "scales": "minmax"}
    outcome = place.run()
    assert not outcome.published
    assert outcome.directory == place.rejected
    assert not place.output.exists()
    failed = [check for check in outcome.validation.checks if check.passed is False]
    assert [check.name for check in failed] == ["massive_activation_ratio"]
    assert "after layer 1 on calibration text" in failed[0].detail
    assert "expert (1, 5) wrote" in failed[0].detail
    assert outcome.validation.check("reload").detail == "compressing stopped after layer 1"
    assert [record.layer for record in outcome.validation.records] == [0, 1]
    assert (place.rejected / "se_compress" / "report.html").exists()
    assert not (place.rejected / "config.json").exists(), "half a checkpoint is not one"


# ------------------------------------------------------------------------- damage, and who sees it


def flip_a_byte(directory: Path, name: str) -> None:
    info = read_headers(directory)[name]
    with open(info.file, "r+b") as stream:
        stream.seek(info.begin)
        byte = stream.read(1)[0]
        stream.seek(info.begin)
        stream.write(bytes([byte ^ 1]))


PACKED = "model.layers.1.mlp.experts.3.up_proj.qweight"
COPIED = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("tensor", "told"),
    [(PACKED, "differs from what was written"), (COPIED, "differs from the source")],
)
def test_damage_done_while_a_run_was_stopped_is_made_again(
    place: Workplace, tensor: str, told: str
) -> None:
    with pytest.raises(Stop):
        place.run(options=stop_at("compress", 2))
    flip_a_byte(place.partial / "checkpoint", tensor)

    outcome = place.run()
    assert f"{tensor} {told}: its stage starts again" in place.said
    assert outcome.published
    assert outcome.validation.check("tensors_accounted").passed


def test_damage_to_a_published_result_is_seen_by_validate(settled: Workplace) -> None:
    request = settled.request()

    def judged() -> Check:
        report = judge_existing(request, settled.output, settled.directory / "report")
        check = report.check("tensors_accounted")
        assert report.passed is check.passed
        return check

    assert judged().passed
    assert judged().detail == ""
    flip_a_byte(settled.output, PACKED)
    check = judged()
    assert check.passed is False
    assert check.detail == f"{PACKED} differs from what was written"
    for text in (None, "{", '{"layers": []}'):
        file = settled.output / "se_compress" / "compression.json"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text, encoding="utf-8")
        check = judged()
        assert check.passed, "one bit of one code changes no other gate"
        assert re.fullmatch(
            r"not compared: \d+ tensors that were made here, no digests of them were found",
            check.detail,
        )


def test_what_float16_does_not_hold_is_told_everywhere(
    place: Workplace, tiny_model: TinyModel
) -> None:
    model = place.directory / "model"
    shutil.copytree(tiny_model("qwen2_moe"), model)
    weights = load_file(model / WEIGHTS)
    loud = {n: t * 1e6 for n, t in weights.items() if "layers.1.mlp.experts.3.down" in n}
    tiny.edit_weights(model, loud)
    tiny.edit_config(model, dtype="float16")
    place.settings["model"] = str(model)
    place.settings["policy"]["protect"] = "none"
    outcome = place.run("validation.early_stop=false")
    told = [note for note in outcome.plan.notes if "65,504" in note]
    assert len(told) == 1
    assert told[0] in place.said
    for page in ("README.md", "se_compress/report.html"):
        text = (outcome.directory / page).read_text(encoding="utf-8")
        assert "65,504" in text
