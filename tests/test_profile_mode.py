"""--profile: what it finds, writes and says, and that nothing is compressed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_types
import yaml
from pages import check_form, parse
from typer.testing import CliRunner

from se_compress import cli
from se_compress.artifacts import (
    ExpertId,
    ExpertProfile,
    RunResult,
    StabilityStudy,
    from_json,
)
from se_compress.errors import RecipeError
from se_compress.opening.source import open_source
from se_compress.pipeline import preview, preview_variants
from se_compress.profile_mode import profile_only
from se_compress.recipe import load_recipe, parse_recipe, resolved
from se_compress.request import Request
from se_compress.running.places import profiled

TinyModel = Callable[[str], Path]
TinyType = Callable[[str], Path]
PLANTED = ExpertId(1, 3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE with a super expert, and the token that it answers before every sequence."""
    directory = tmp_path_factory.mktemp("planted") / "model"
    directory.mkdir()
    tiny.build(directory, "qwen3_moe")
    tiny.plant(directory, 1, 3)
    return tiny.save_tokenizer(directory, bos=True)


def write(directory: Path, model: Path, **sections: Any) -> Path:
    for name, text in (("numbers", "{:05d} "), ("letters", "the {:b} ")):
        content = "".join(text.format(n) for n in range(3000))
        (directory / f"{name}.txt").write_text(content, encoding="utf-8")
    text = {"data": str(directory / "numbers.txt"), "sequence_length": 32}
    recipe = {
        "model": str(model),
        "output": str(directory / "out"),
        "target": "gptqmodel",
        "calibration": {**text, "samples": 6},
        "quantization": {"method": "rtn", "group_size": 32},
        "validation": {**text, "samples": 2},
    }
    (directory / "r.yaml").write_text(yaml.safe_dump({**recipe, **sections}), encoding="utf-8")
    return directory / "r.yaml"


def request_of(recipe: Path, said: list[str] | None = None, fresh: bool = False) -> Request:
    def notice(sentence: str) -> None:
        if said is not None and not sentence.startswith("memory: "):  # which every run says
            said.append(sentence)

    return Request(load_recipe(recipe), recipe.read_text("utf-8"), notice=notice, fresh=fresh)


def test_a_profile_and_a_page_and_nothing_else(planted: Path, tmp_path: Path) -> None:
    request = request_of(write(tmp_path, planted))
    found = profile_only(request, profiled(request.output))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("out*/**/*")) == [
        "out.profile/profile.html", "out.profile/profile.json"
    ]  # fmt: skip
    text = found.file("").read_text("utf-8")
    profile = from_json(ExpertProfile, text, "profile.json")
    assert profile == found.profiles[""]
    assert [(one.id, one.confirmed) for one in profile.super_experts] == [(PLANTED, True)]
    page = parse(found.file("").with_suffix(".html").read_text("utf-8"))
    check_form(page)
    forming = page.first(id="layers").all("table")[0].text
    assert "1 (1, 3) yes" in forming
    assert "gives the same super experts" in page.first(id="stability").text
    assert "1: the same" in page.first(id="stability").text


def test_it_serves_a_later_run_and_is_measured_once(planted: Path, tmp_path: Path) -> None:
    said: list[str] = []
    request = request_of(write(tmp_path, planted), said)
    first = profile_only(request, profiled(request.output))
    assert preview(request).plan.protected == (PLANTED,)
    assert profile_only(request, profiled(request.output)).profiles == first.profiles
    assert said == [f"profile reused from {tmp_path}/out.profile/profile.json"]
    said.clear()
    again = profile_only(request_of(tmp_path / "r.yaml", said, fresh=True), tmp_path / "elsewhere")
    assert again.profiles == first.profiles
    assert said == []
    assert (tmp_path / "elsewhere" / "profile.html").exists()


def test_an_interrupted_one_goes_on(planted: Path, tmp_path: Path) -> None:
    request = request_of(write(tmp_path, planted))

    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("profile", 2):
            raise Stopped

    from dataclasses import replace

    broken = replace(request, options=replace(request.options, progress=stop))
    with pytest.raises(Stopped):
        profile_only(broken, profiled(request.output))
    assert (tmp_path / "out.profile.partial" / "profile-layer-00001.json").exists()
    said: list[str] = []
    found = profile_only(replace(request, notice=said.append), profiled(request.output))
    assert f"continuing from {tmp_path}/out.profile.partial" in said
    assert not (tmp_path / "out.profile.partial").exists()
    assert [one.id for one in found.profiles[""].super_experts] == [PLANTED]


def study(planted: Path, directory: Path, other: Path) -> Path:
    letters = {"calibration": {"data": str(directory / "letters.txt")}}
    variants = {"numbers": {}, "letters": letters, "other": {"model": str(other)}}
    return write(directory, planted, variants={**variants, "again": {"policy": {"bits": 3}}})


def test_what_several_have_in_common(planted: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(planted, tmp_path / "other"))
    tiny.plant(other, 2, 5)
    request = request_of(study(planted, tmp_path, other))
    found = profile_only(request, profiled(request.output))
    place = tmp_path / "out.profile"
    text = (place / "stability.json").read_text("utf-8")
    common = from_json(StabilityStudy, text, "stability.json")
    each = {one.name: [e.id for e in one.super_experts] for one in common.profiles}
    assert each["numbers"] == each["letters"] == each["again"] == [PLANTED]
    assert PLANTED in common.common or ExpertId(2, 5) in each["other"]
    assert set(common.common) == set.intersection(*map(set, each.values()))
    assert set(common.sometimes) == set.union(*map(set, each.values())) - set(common.common)
    assert common.stable == (not common.sometimes)
    assert found.profiles["numbers"].digest == found.profiles["again"].digest
    assert found.profiles["numbers"].tokens_digest != found.profiles["letters"].tokens_digest
    page = parse((place / "stability.html").read_text("utf-8"))
    check_form(page)
    assert "(1, 3)" in page.first(id="common").text
    assert all((place / name / "profile.html").exists() for name in each)


def test_several_models_are_for_profiles_alone(
    planted: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    request = request_of(study(planted, tmp_path, tiny_model("olmoe")))
    with pytest.raises(RecipeError, match=r"variants.other.model: .* only --profile takes several"):
        preview_variants(request)
    with pytest.raises(RecipeError, match=r"variant other: its model .* other layers or experts"):
        profile_only(
            request_of(study(planted, tmp_path, tiny_model("mixtral"))), tmp_path / "unlike"
        )


def test_what_float16_cannot_hold_is_told(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tiny.build(model, "qwen3_moe")
    tiny.plant(model, 1, 3, size=4e5)
    tiny.save_tokenizer(model, bos=True)
    said: list[str] = []
    request = request_of(write(tmp_path, model), said)
    found = profile_only(request, profiled(request.output))
    (one,) = found.profiles[""].super_experts
    assert one.peak > 65504
    (sentence,) = [line for line in said if "float16 ends at 65,504" in line]
    peak = max(one.peak, max(layer.peak for layer in found.profiles[""].layers))
    assert sentence.startswith(f"activations reach {peak:,.0f} (")
    page = parse(found.file("").with_suffix(".html").read_text("utf-8"))
    assert (
        "float16 ends at 65,504: serve the model in bfloat16" in page.first(id="super-experts").text
    )


def test_the_command(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path, planted, super_experts={"expected": [{"layer": 0, "expert": 3}]})
    runner = CliRunner()
    ran = runner.invoke(cli.app, [str(recipe), "--profile", "--device", "cpu", "--json"])
    assert ran.exit_code == 0, ran.output
    line = from_json(RunResult, ran.stdout.splitlines()[-1], "stdout")
    assert line.outcome == "profiled"
    (one,) = line.profiles or ()
    assert (one.super_experts, one.confirmed) == ((PLANTED,), (PLANTED,))
    assert "found beside: (1, 3)" in one.surprise
    assert json.loads(Path(one.file).read_text("utf-8"))["massive"] is True
    assert "UNEXPECTED SUPER EXPERTS" in ran.stderr
    assert "1 super expert: (1, 3); see" in ran.stderr
    for flag in ("--dry-run", "--plan=p.json", "--validate=d"):
        refused = runner.invoke(cli.app, [str(recipe), "--profile", flag])
        assert isinstance(refused.exception, RecipeError)
        assert "--profile: goes with none of" in str(refused.exception)


@pytest.mark.parametrize("name", tiny_types.NAMES)
def test_any_model_that_opens(tiny_type: TinyType, tmp_path: Path, name: str) -> None:
    """Whatever it is: a profile, a page and exit code 0."""
    path = tmp_path / "model"
    shutil.copytree(tiny_type(name), path)
    tiny.save_tokenizer(path)
    recipe = write(tmp_path, path, target="transformers", quantization={"method": "none"})
    ran = CliRunner().invoke(cli.app, [str(recipe), "--profile", "--json"])
    assert ran.exit_code == 0, ran.output
    (page,) = profiled(tmp_path / "out").glob("*.html")
    check_form(parse(page.read_text("utf-8")))
    profile = from_json(ExpertProfile, page.with_suffix(".json").read_text(), str(page))
    source = open_source(str(path))
    assert {stats.id for stats in profile.experts} == set(source.experts)
    assert len(profile.layers) == source.layer_count


def test_the_resolved_recipe_reads_back_as_the_same(planted: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, planted), ["policy.bits=[2, 3]", "policy.size=9MB"])
    assert parse_recipe(yaml.safe_load(resolved(recipe)), "resolved") == recipe
