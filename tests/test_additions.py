"""What an addition costs: a throw-away format, target, family and gate work from their rows alone,
and the names of those that we have stand in a few files of the package.

A family is at most one file, a target one, a gate three and a format four: its own, the list of
formats, the table of targets, and how its engine reads the settings.
"""

import ast
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny

import se_compress
from se_compress import compress
from se_compress.artifacts import GATES, CompressionPlan, ModelSource
from se_compress.artifacts.targets import ENGINES, TARGETS, Engine, Loader, Method
from se_compress.engines import engine_view
from se_compress.engines.accounting import account
from se_compress.engines.blueprint import draw_blueprint
from se_compress.errors import ValidationFailed
from se_compress.formats import FORMATS
from se_compress.formats.compressed_tensors import COMPRESSED_TENSORS
from se_compress.model.checkpoint import open_result, open_tensors
from se_compress.opening.families import FAMILIES
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.check import check_plan
from se_compress.planning.policy import make_plan
from se_compress.recipe import Recipe
from se_compress.reporting.page import describe_check
from se_compress.validation.checks import judged as judged_gate

TinyModel = Callable[[str], Path]
PACKAGE = Path(se_compress.__file__).parent
NEW = "throw-away"
# What stops early for some of the gates, and pages with fields of the same names: continuations
# that end in loops, and the router agreement of each layer.
CHOOSY = ("compression/early_warning.py", "reporting/report.py", "reporting/report_charts.py")
# A target that is a library of many uses.
LIBRARY = "transformers"


# ------------------------------------------------------------------------------------ in how many


def words_of(path: Path) -> Iterator[str]:
    """Every text in a module that is not a docstring, as it is and quoted, and every name of an
    attribute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield from (node.value, f'"{node.value}"')
        elif isinstance(node, ast.Attribute):
            yield node.attr


@cache
def vocabulary() -> Mapping[str, frozenset[str]]:
    """Module of the package -> the words in it."""
    return {
        path.relative_to(PACKAGE).as_posix(): frozenset(words_of(path))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def files_with(word: str) -> list[str]:
    return [name for name, words in vocabulary().items() if word in words]


def test_words_are_seen_where_they_stand() -> None:
    assert "opening/families.py" in files_with("qwen2_moe")
    assert "formats/gptq.py" in files_with("gptq_v2")
    assert "cli.py" not in files_with("qwen2_moe")


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_family_is_known_to_one_file(family: str) -> None:
    assert files_with(family) == ["opening/families.py"]


@pytest.mark.parametrize("target", sorted(set(ENGINES) - {LIBRARY}))
def test_a_target_is_known_to_its_table(target: str) -> None:
    """And to a format, if that names the engine which loads a file without a plan; and to what
    loads it, if it is loaded here."""
    loading = ["reload.py"] if target in get_args(Loader) else []
    files = [name for name in files_with(target) if not name.startswith("formats/")]
    assert files == ["artifacts/targets.py", *loading]


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_format_is_known_to_three_files_beside_the_list(form: str) -> None:
    """Its `quant_method` counts as well where that is the same word. What sources come in, packed
    files of another among it, is another matter."""
    others = ["recipe/sections.py"] if form in get_args(Method) else []
    others.append("opening/encodings.py")
    files = [name for name in files_with(form) if name not in others]
    assert len(files) <= 3, files
    assert "formats/__init__.py" not in files
    assert [name for name in files if name.startswith("formats/")]


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_known_to_its_table_and_to_what_measures_it(gate: str) -> None:
    """And to validator.py, which calls that; the early warning judges some during the work."""
    files = [name for name in files_with(f'"{gate}"') if not name.startswith(CHOOSY)]
    assert "artifacts/gates.py" in files
    assert len(files) <= 3, files


# ------------------------------------------------------------------------------------- throw-aways


def judged(source: ModelSource, plan: CompressionPlan, directory: Path) -> None:
    """The plan passes as one of a file would, and what is written of it is what was planned."""
    assert check_plan(plan, source, "the plan") == plan
    tiny.write_result(source, plan, directory)
    found, blueprint = read_headers(directory), draw_blueprint(source, plan)
    check = account(blueprint, directory, found, ())
    assert check.passed, check.detail
    read = open_result(found, source.tensors, plan.scheme, blueprint.names)
    exact = open_tensors(source.tensors)
    packed = [tensor.info.name for tensor in blueprint.packed()]
    assert packed
    for name in packed:
        error = (read(name) - exact(name).float()).norm() / exact(name).float().norm()
        assert error < 0.2, name


def patch_targets(patch: pytest.MonkeyPatch, *rows: Any) -> None:
    """More rows, wherever the table is looked at."""
    for name, module in list(sys.modules.items()):
        if name.startswith("se_compress") and getattr(module, "TARGETS", None) is TARGETS:
            patch.setattr(module, "TARGETS", (*TARGETS, *rows))


def row(target: str, form: str) -> Any:
    return next(r for r in TARGETS if (r.target, r.format) == (target, form))


def recipe(source: ModelSource, target: str = "transformers", form: str = "auto") -> Recipe:
    """A recipe with words that its Literals do not know yet."""
    sections = {"policy": {"bits": 4}, "quantization": {"method": "rtn", "group_size": 32}}
    known = tiny.recipe(source.name, **sections)
    quantization = known.quantization.model_copy(update={"format": form})
    return known.model_copy(update={"target": target, "quantization": quantization})


def test_a_format_is_its_own_file_a_row_and_how_its_settings_are_read(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(*arguments: Any) -> dict[str, Any]:
        return {**COMPRESSED_TENSORS.settings(*arguments), "quant_method": NEW}

    form = replace(COMPRESSED_TENSORS, name=NEW, quant_method=NEW, settings=settings)
    monkeypatch.setitem(FORMATS, NEW, form)  # type: ignore[arg-type]
    patch_targets(monkeypatch, replace(row("transformers", "compressed-tensors"), format=NEW))
    reader = engine_view.ENGINES["compressed-tensors"]
    monkeypatch.setitem(engine_view.ENGINES, NEW, reader)  # type: ignore[arg-type]
    source = open_source(str(tiny_model("qwen3_moe")))
    plan = make_plan(source, None, recipe(source, form=NEW))
    assert plan.scheme.format == NEW
    judged(source, plan, tmp_path / "result")
    config = json.loads((tmp_path / "result" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == NEW


def test_settings_that_an_engine_reads_otherwise_are_found_before_the_work(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method: Any = "compressed-tensors"
    monkeypatch.setitem(engine_view.FUSING, method, lambda settings, source: lambda module: 4)
    source = open_source(str(tiny_model("qwen3_moe")))
    settings = recipe(source)
    plan = make_plan(source, None, recipe(source, target="vllm"))
    assert plan.scheme.format == method
    told = "would be read wrong by vllm: .* has 16 bits in the file and 4 by its settings"
    with pytest.raises(ValidationFailed, match=told):
        compress(source, plan, [], settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_is_rows_of_its_table(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_targets(monkeypatch, replace(row("vllm", "compressed-tensors"), target=NEW))
    engine = Engine("transformers", stands_in=True, in_bfloat16="--bf16")
    monkeypatch.setitem(ENGINES, NEW, engine)  # type: ignore[arg-type]
    source = open_source(str(tiny_model("mixtral")))
    plan = make_plan(source, None, recipe(source, target=NEW))
    assert (plan.target, plan.scheme.format) == (NEW, "compressed-tensors")
    judged(source, plan, tmp_path / "result")


def test_a_family_is_a_row(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3_moe"), model)
    tiny.edit_config(model, model_type=NEW)
    family = replace(FAMILIES["qwen3_moe"], model_type=NEW)
    monkeypatch.setitem(FAMILIES, NEW, family)  # type: ignore[arg-type]
    # Measuring the engines (tools/model_types.py) says that they load it.
    rows = tuple(replace(r, model_types=r.model_types and r.model_types | {NEW}) for r in TARGETS)
    monkeypatch.setattr("se_compress.engines.targets.TARGETS", rows)
    source = open_source(str(model))
    plan = make_plan(source, None, recipe(source, "gptqmodel"))
    judged(source, plan, tmp_path / "result")


def test_a_gate_is_a_row_and_what_measures_it(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = replace(GATES["loops"], name=NEW, title="Thrown away", limit=0.2, in_recipe=False)
    monkeypatch.setitem(GATES, NEW, gate)  # type: ignore[arg-type]
    limits = recipe(open_source(str(tiny_model("qwen3_moe")))).validation
    passed, failed = (judged_gate(limits, NEW, value) for value in (0.1, 0.3))
    assert (passed.limit, passed.passed, failed.passed) == (0.2, True, False)
    assert describe_check(failed).title == "Thrown away"
