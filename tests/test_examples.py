"""The scripts of recipes/python and the README's block run as they stand, on tiny models."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from se_compress.artifacts import CompressionPlan, to_json
from se_compress.errors import RecipeError
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.check import check_plan
from se_compress.planning.policy import make_plan
from se_compress.recipe import load_recipe

TinyModel = Callable[[str], Path]
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "recipes" / "python"
FROM_PYTHON = re.compile(
    r"^## From Python\n.*?^```yaml\n(.*?)^```$.*?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
# A random model has nothing to lose and much to be upset about.
WIDE = {"perplexity_increase": 1e9, "kl_divergence": 1e3, "router_agreement": 0.0,
        "router_agreement_least": 0.0, "sink_decay": 1.0}  # fmt: skip


@pytest.fixture
def recipe(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A recipe that compresses a tiny model for plain transformers within seconds."""
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(600))), encoding="utf-8")
    text = {"data": str(tmp_path / "text.txt"), "sequence_length": 32}
    settings = {
        "model": str(tiny_model("qwen3_moe")),
        "output": str(tmp_path / "unused"),
        "target": "vllm",
        "calibration": {**text, "samples": 4},
        "policy": {"bits": 4},
        "quantization": {"method": "rtn", "group_size": 32},
        "validation": {**text, "samples": 2, "seed": 1, "generation": {"tokens": 0}, **WIDE},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path / "r.yaml"


@pytest.fixture
def start(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a script with the recipe and more arguments; what it prints."""

    def run(script: Path, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(script), str(recipe), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


def change(recipe: Path, **sections: Any) -> None:
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    recipe.write_text(yaml.safe_dump({**settings, **sections}), encoding="utf-8")


def mixed_plan(recipe: Path) -> CompressionPlan:
    """8 bits in all layers but the last, which has 4."""
    known = load_recipe(recipe)
    source = open_source(known.model)
    plan = make_plan(source, None, known)
    last = source.moe_layers[-1]
    experts = tuple(replace(d, bits=4 if d.layer == last else 8) for d in plan.experts)
    return check_plan(replace(plan, experts=experts), source, "the plan")


def test_every_script_is_run_here() -> None:
    names = {"compress.py", "edit_a_plan.py", "find_super_experts.py", "judge.py"}
    assert {path.name for path in SCRIPTS.iterdir() if path.suffix == ".py"} == names


def test_compress_and_judge(start: Callable[..., str], tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert start(SCRIPTS / "compress.py", made) == "passed\n"
    assert read_headers(made)
    said = start(SCRIPTS / "judge.py", made)
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    assert {"kl_divergence", "weight_cosine", "reload"} <= lines.keys()
    assert "False" not in said


def test_edit_a_plan(start: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    before = mixed_plan(recipe)
    (tmp_path / "plan.json").write_text(to_json(before), encoding="utf-8")
    said = start(SCRIPTS / "edit_a_plan.py", tmp_path / "plan.json", tmp_path / "made")
    assert re.fullmatch(r"\d\.\d\d bits per expert weight\n", said)
    assert float(said.split()[0]) < before.bits_per_weight - 1
    config = json.loads((tmp_path / "made" / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_find_super_experts(start: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(load_recipe(recipe).model, tmp_path / "planted")
    tiny.plant(tmp_path / "planted", layer=1, expert=3)
    tiny.save_tokenizer(tmp_path / "planted", bos=True)
    change(recipe, model=str(tmp_path / "planted"))
    said = start(SCRIPTS / "find_super_experts.py")
    assert said.startswith("(1, 3): peak ")
    assert "expert.confirmed=True" in said


def test_the_block_of_the_readme_is_a_script_that_is_run_here() -> None:
    block = FROM_PYTHON.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert block
    assert len(block[2].splitlines()) <= 15
    docstring, _, script = (SCRIPTS / "compress.py").read_text(encoding="utf-8").partition("\n\n")
    assert docstring.startswith('"""')
    assert script == block[2]


def test_the_recipe_of_the_readme_has_all_that_is_needed(tmp_path: Path) -> None:
    block = FROM_PYTHON.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert block
    settings = yaml.safe_load(block[1])
    (tmp_path / "r.yaml").write_text(block[1], encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml").policy.bits == (4,)
    for key in settings.keys() - {"policy"}:
        less = {name: value for name, value in settings.items() if name != key}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(less), encoding="utf-8")
        with pytest.raises(RecipeError, match=key):
            load_recipe(tmp_path / "r.yaml")
