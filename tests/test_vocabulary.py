"""A text with a token that the embedding has no row for is refused before any of the work, by a run
and by `--validate`. (Added tokens that the text does not use: test_calibrate.)"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from se_compress.errors import SourceError
from se_compress.pipeline import Request, judge_existing, run
from se_compress.recipe import load_recipe

TinyModel = Callable[[str], Path]
PLAIN = " ".join(f"{n:05d}" for n in range(2000))
ADDED = 60


@pytest.fixture
def model(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """Its tokenizer has more words than its embedding has rows."""
    path = shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<|x{i}|>" for i in range(ADDED)])
    tokenizer.save_pretrained(path)
    return path


def request(model: Path, **texts: str) -> Request:
    """`texts` replace the calibration or the validation text."""
    directory = model.parent
    for section in ("calibration", "validation"):
        text = texts.get(section, PLAIN)
        (directory / f"{section}.txt").write_text(text, encoding="utf-8")
    settings = {
        "model": str(model),
        "output": str(directory / "out"),
        "target": "transformers",
        "quantization": {"method": "none"},
        "policy": {"protect": "none"},
    } | {
        section: {"data": str(directory / f"{section}.txt"), "samples": 4, "sequence_length": 32}
        for section in ("calibration", "validation")
    }
    recipe = directory / "r.yaml"
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return Request(load_recipe(recipe), recipe.read_text("utf-8"))


@pytest.mark.parametrize("section", ["calibration", "validation"])
def test_a_run_refuses_it_before_the_work(model: Path, section: str) -> None:
    text = f"<|x{ADDED - 1}|> ".join(PLAIN[i : i + 20] for i in range(0, len(PLAIN), 20))
    identity = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(f"<|x{ADDED - 1}|>")
    with pytest.raises(SourceError) as caught:
        run(request(model, **{section: text}))
    assert f"{section}.data: " in str(caught.value)
    assert f"the token '<|x59|>' of id {identity}, but the model's embedding has 288 rows" in str(
        caught.value
    )
    assert {path.name for path in model.parent.iterdir()} == {
        "model",
        "r.yaml",
        "calibration.txt",
        "validation.txt",
    }


def test_validate_refuses_it(model: Path) -> None:
    text = f"{PLAIN[:20]}<|x{ADDED - 1}|>" * 200
    with pytest.raises(SourceError, match="the model's embedding has 288 rows"):
        judge_existing(request(model, validation=text), model, model.parent / "report")
