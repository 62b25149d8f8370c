"""What each target loads of each model type: the table is current, measured, and held to."""

import os
from collections.abc import Callable
from pathlib import Path

import engine_types
import model_types
import pytest
import source_types
import tiny
import tiny_types

from se_compress.artifacts.targets import TARGETS
from se_compress.errors import RecipeError, SourceError
from se_compress.opening.families import COMPOSITES, FAMILIES
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan

TinyType = Callable[[str], Path]
NIGHTLY = pytest.mark.skipif(
    "SE_COMPRESS_NIGHTLY" not in os.environ, reason="takes minutes; SE_COMPRESS_NIGHTLY=1 runs it"
)


def test_the_page_of_models_is_current() -> None:
    assert model_types.PAGE.read_text(encoding="utf-8") == model_types.page()


def test_every_row_that_packs_says_of_which_types() -> None:
    for rules in TARGETS:
        assert (rules.model_types is None) == (not rules.widths), rules.format
        assert (rules.model_types or frozenset()) <= {*FAMILIES, *COMPOSITES}
    exact = {name for name, family in FAMILIES.items() if family.exact}
    assert all(rules.model_types >= exact for rules in TARGETS if rules.model_types is not None)


@pytest.mark.parametrize("model_type", ["afmoe", "granitemoe", "mimo_v2_flash", "nemotron_h"])
def test_a_type_that_a_target_is_not_known_to_load(tiny_type: TinyType, model_type: str) -> None:
    """It is refused by the plan, with what loads it."""
    settings = tiny.recipe(
        tiny_type(model_type),
        target="gptqmodel",
        quantization={"method": "rtn", "group_size": 32},
        policy={"bits": 4, "protect": "none"},
    )
    match = (
        rf"^target gptqmodel is not known to load gptq of {model_type}; target transformers loads "
        r".*; quantization\.method none is loaded by transformers$"
    )
    with pytest.raises(RecipeError, match=match):
        make_plan(open_source(str(tiny_type(model_type))), None, settings)


@pytest.mark.parametrize(
    "case",
    [
        "compressed-tensors",
        *(pytest.param(c, marks=NIGHTLY) for c in engine_types.CASES if c != "compressed-tensors"),
    ],
)
def test_the_engine_loads_the_types_of_the_table_and_no_other(tmp_path: Path, case: str) -> None:
    target, _, form = engine_types.CASES[case]
    rules = next(r for r in TARGETS if (r.target, r.format) == (target, form))
    assert sorted(engine_types.right_types(tmp_path, case)) == sorted(rules.model_types or ())
    assert len(list(tmp_path.glob(f"*-{case}"))) >= len(tiny_types.CONFIGS) - 5


@pytest.mark.parametrize("form", [pytest.param(f, marks=NIGHTLY) for f in source_types.FORMS])
def test_every_type_is_read_in_the_forms_of_the_table(tmp_path: Path, form: str) -> None:
    assert sorted(source_types.right_types(tmp_path, form)) == model_types.READS[form]


@pytest.mark.parametrize("form", source_types.FORMS)
@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "jamba", "minimax_m2"])
def test_a_type_is_read_as_the_table_says(
    tiny_type: TinyType, tmp_path: Path, name: str, form: str
) -> None:
    if name in model_types.READS[form]:
        coded, plain = source_types.write(tiny_type(name), form, tmp_path)
        assert source_types.difference(coded, plain) < source_types.LIMIT
    else:
        coded, _ = source_types.write(tiny_type(name), form, tmp_path)
        with pytest.raises(SourceError, match=r"quantization_config|weight_packed is I32"):
            open_source(str(coded))


def test_a_composite_is_what_was_measured_of_it(tmp_path: Path) -> None:
    """GPTQModel loads Qwen3.5 as a text model; the composite it loads by code of its own."""
    path = tiny_types.build_composite(tmp_path / "model", "qwen3_5_moe")
    settings = tiny.recipe(
        path,
        target="gptqmodel",
        quantization={"method": "rtn", "group_size": 32},
        policy={"bits": 4, "protect": "none"},
    )
    match = "^target gptqmodel is not known to load gptq of qwen3_5_moe; target transformers loads"
    with pytest.raises(RecipeError, match=match):
        make_plan(open_source(str(path)), None, settings)
