"""`quantization_config` of a checkpoint to be judged, where it is no object."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from se_compress.cli import app
from se_compress.engines.bare import lay_bare
from se_compress.errors import SourceError


@pytest.mark.parametrize("settings", [[1], "gptq", 5, True, [{}]])
def test_quantization_settings_that_are_no_object_are_refused(
    tmp_path: Path, settings: object
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}), "utf-8")
    (tmp_path / "bare").mkdir()
    with pytest.raises(SourceError, match="quantization_config is not a JSON object"):
        lay_bare(tmp_path, (), tmp_path / "bare")


@pytest.mark.parametrize("settings", [[1], "gptq", 5])
def test_a_checkpoint_whose_settings_are_no_object_is_not_judged(
    tiny_model: Callable[[str], Path], tmp_path: Path, settings: object
) -> None:
    model = tiny_model("qwen3_moe")
    shutil.copytree(model, tmp_path / "judged")
    tiny.edit_config(tmp_path / "judged", quantization_config=settings)
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(4000))), encoding="utf-8")
    text = {"data": str(tmp_path / "text.txt"), "samples": 2, "sequence_length": 16}
    (tmp_path / "r.yaml").write_text(
        json.dumps(
            {"model": str(model), "output": "out", "calibration": text, "validation": text}
            | {"quantization": {"method": "none"}}
        )
    )
    words = [str(tmp_path / "r.yaml"), "--set", "validation.generation.tokens=0"]
    done = CliRunner().invoke(app, [*words, "--validate", str(tmp_path / "judged")])
    assert isinstance(done.exception, SourceError)
    assert "quantization_config is not a JSON object" in str(done.exception)
