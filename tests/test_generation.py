"""A generation_config.json that transformers reads and will not write again is told."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from se_compress.engines.generation import FILE, why_not_saved

GREEDY = {"do_sample": False}
SAVED = ({}, {"do_sample": True, "temperature": 0.6}, GREEDY, {"eos_token_id": [1, 2]})
NOT_SAVED = (
    {**GREEDY, "temperature": 1e-06, "top_p": 0.6},
    {**GREEDY, "top_k": 5},
    {"num_beams": 1, "num_beam_groups": 2, "early_stopping": "x"},
    {"max_new_tokens": -1},
    {"cache_implementation": "of my own"},
)


@pytest.mark.parametrize("settings", [*SAVED, *NOT_SAVED])
def test_what_transformers_will_not_save_is_told(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    (tmp_path / FILE).write_text(json.dumps(settings), encoding="utf-8")
    told = why_not_saved(tmp_path)
    try:
        GenerationConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    except ValueError:
        assert told.startswith("generation_config.json is copied as it is, and transformers will")
        assert len(told) < 300
    else:
        assert told == ""


@pytest.mark.parametrize("text", ["[1]", "{", "5", '"x"', '{"watermarking_config": 5}', "null"])
def test_what_cannot_be_read_at_all_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    assert FILE in why_not_saved(tmp_path)


def test_no_file_is_no_fault(tmp_path: Path) -> None:
    assert why_not_saved(tmp_path) == ""
