"""recipes/studies: the experiments can be planned, and what their pages add up is right."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import tuned_model
from artefacts_example import example_comparison, example_validation
from pages import parse
from safetensors.torch import load_file
from scipy.stats import t
from test_protection import PLANTED, made, noted, planted

from se_compress.artifacts import ComparedVariant, ExpertId, ExpertProfile, ModelSource
from se_compress.errors import RecipeError
from se_compress.model.checkpoint import open_tensors
from se_compress.model.plan_checks import check_structure
from se_compress.model.splice import merge_experts, open_shrunk
from se_compress.model.surgery import shrink
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.recipe import load_recipe
from se_compress.reporting.comparison_charts import decay_rate
from se_compress.reporting.comparison_page import render_comparison
from se_compress.reporting.draws import RATIO, draws_of, mean_of
from se_compress.validation.side_by_side import _new_ids

__all__ = ["planted"]  # the fixture
STUDIES = Path(__file__).parents[1] / "recipes" / "studies"
Planted = tuple[ModelSource, ExpertProfile]
TinyModel = Callable[[str], Path]


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_study_is_a_recipe_with_variants(file: Path) -> None:
    assert len(load_recipe(file).variants) > 3


def zeroed(planted: Planted, **policy: object) -> set[ExpertId]:
    plan = made(planted, protect="none", **policy)
    return {d.id for d in plan.experts if d.action == "zero"}


def test_random_experts_of_its_layer_and_of_any(planted: Planted) -> None:
    assert zeroed(planted, zero="super-experts") == {PLANTED}
    same = [zeroed(planted, zero="random", zero_seed=seed) for seed in range(6)]
    anywhere = [zeroed(planted, zero="random-anywhere", zero_seed=seed) for seed in range(12)]
    for chosen in (*same, *anywhere):
        assert len(chosen) == 1
        assert PLANTED not in chosen
    assert {i.layer for chosen in same for i in chosen} == {PLANTED.layer}
    assert {i.layer for chosen in anywhere for i in chosen} == {0, 1, 2}
    assert len(set().union(*same)) == 6, "no expert twice"
    assert len(set().union(*anywhere)) == 12
    assert anywhere == [
        zeroed(planted, zero="random-anywhere", zero_seed=seed) for seed in range(12)
    ]


def test_the_super_experts_alone_are_treated(planted: Planted) -> None:
    plan = made(planted, method="rtn", protect="all-but-super-experts", bits=[2])
    assert {d.id for d in plan.experts if d.bits != 16} == {PLANTED}
    assert plan.by_id[PLANTED].bits == 2
    assert plan.rescued == ()
    assert noted(plan, "an experiment: super experts alone are treated")
    source, _ = planted
    recipe = tiny.recipe(
        "m",
        target="gptqmodel",
        policy={"protect": "all-but-super-experts", "bits": [2]},
        quantization={"method": "rtn", "group_size": 32},
    )
    unknown = make_plan(source, None, recipe)  # which is none of them, or one
    assert {decision.bits for decision in unknown.experts} == {16}


def test_a_tuned_model_opens_and_differs_but_in_its_routers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tiny.build(base, "qwen2_moe")
    monkeypatch.setattr(tuned_model, "STEPS", 2)
    results = []
    for name in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["tuned_model.py", str(base), str(tmp_path / name)])
        tuned_model.main()
        results.append(load_file(tmp_path / name / "model.safetensors"))
    first, second = results
    before = load_file(base / "model.safetensors")
    source = open_source(str(tmp_path / "one"))
    assert source.experts.keys() == open_source(str(base)).experts.keys()
    assert first.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    routers = {name for name in before if name.endswith("mlp.gate.weight")}
    assert routers
    assert not routers & changed
    assert any(name.endswith("down_proj.weight") for name in changed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "one" / "tokenizer.json").exists()


# ------------------------------------------------------------------------------------- the pages


def draw(variant: ComparedVariant, seed: int, ratio: float) -> ComparedVariant:
    one = variant.checkpoint
    return replace(
        variant,
        changes={"policy.zero": '"random"', "policy.zero_seed": str(seed)},
        checkpoint=replace(
            one, name=f"random-{seed}", perplexity_source=10.0, perplexity_result=10.0 * ratio
        ),
    )


def test_draws_of_one_experiment_are_averaged() -> None:
    variants = {one.name: one for one in example_comparison().variants}
    random = variants["without-random-1"]
    lost = replace(variants["without-super-expert"], changes={"policy.zero": '"super-experts"'})
    several = [lost, *(draw(random, seed, ratio) for seed, ratio in enumerate((1.0, 1.1, 1.3)))]
    alone, three = draws_of([variants["wide-8"], *several])
    assert (alone.name, alone.count) == ("super-experts", 1)
    assert alone.means[RATIO].half is None
    assert (three.name, three.count) == ("random", 3)
    # The slow twin: t(0.975, 2) s / sqrt(3), by hand.
    mean = (1.0 + 1.1 + 1.3) / 3
    spread = math.sqrt(sum((x - mean) ** 2 for x in (1.0, 1.1, 1.3)) / 2)
    assert three.means[RATIO].value == pytest.approx(mean)
    assert three.means[RATIO].half == pytest.approx(4.302653 * spread / math.sqrt(3), rel=1e-6)
    assert t.ppf(0.975, 2) == pytest.approx(4.302653, rel=1e-6)
    assert mean_of([2.0]).half is None
    page = parse(
        render_comparison(
            replace(example_comparison(), variants=tuple(several), recommended=None, closest=None)
        )
    )
    text = page.first(id="ablation").text
    assert "Means over the draws, with 95 % intervals" in text
    assert "random, 3 draws" in text
    assert "1.13 ± 0.379" in text


def test_the_decay_rate_is_the_papers() -> None:
    layer = example_validation().layers[0]
    heads = replace(layer, sink_heads_source=(0.8, 0.4, 0.001), sink_heads_result=(0.2, 0.4, 0.9))
    assert decay_rate(heads) == pytest.approx(1 - (0.25 + 1.0) / 2)  # the third head is blind
    blind = replace(layer, sink_heads_source=(0.001,), sink_heads_result=(0.9,))
    assert math.isnan(decay_rate(blind))


def test_a_super_expert_is_averaged_alone(planted: Planted, tmp_path: Path) -> None:
    """It and the one that is most like it have equal weights, in their places; all else stays."""
    source, _ = planted
    plan = made(planted, protect="none", average="super-experts")
    mixed = sorted(d.id for d in plan.experts if d.action == "average")
    assert PLANTED in mixed
    assert [i.layer for i in mixed] == [PLANTED.layer] * 2
    assert sum(plan.by_id[i].share or 0.0 for i in mixed) == pytest.approx(1.0)
    assert noted(plan, f"super expert {PLANTED} is averaged with another: it is not protected")
    small = shrink(source, plan)
    assert small.source.expert_count == source.expert_count
    old, new = open_tensors(source.tensors), open_shrunk(small)
    first, second = (source.experts[i] for i in mixed)
    weights = [{role: old(one[role].name) for role in one} for one in (first, second)]
    wanted = merge_experts(weights, [plan.by_id[i].share or 0.0 for i in mixed])
    for role in first:
        assert torch.equal(new(first[role].name), wanted[role])
        assert torch.equal(new(second[role].name), wanted[role])
        assert not torch.equal(new(first[role].name), old(first[role].name))
    touched = {one[role].name for one in (first, second) for role in one}
    assert all(torch.equal(new(n), old(n)) for n in source.tensors if n not in touched)


def test_averaged_experts_are_judged_by_their_own_numbers(planted: Planted) -> None:
    source, _ = planted
    small = shrink(source, made(planted, protect="none", average="super-experts"))
    count = source.expert_count
    for layer in source.moe_layers:
        assert _new_ids(small, layer, count) == {e: e for e in range(count)}


def test_averaging_needs_two_experts_whose_shares_add_up(planted: Planted) -> None:
    source, _ = planted
    plan = made(planted, protect="none", average="super-experts")
    alone = [
        replace(d, action="keep") if d.action == "average" and d.id != PLANTED else d
        for d in plan.experts
    ]
    with pytest.raises(RecipeError, match="layer 1 has averaged experts with the shares"):
        check_structure(source, replace(plan, experts=tuple(alone)), "plan.json")


def test_a_shared_expert_is_not_averaged_and_that_is_told(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("deepseek_v3")))
    layer = source.moe_layers[0]
    named = [{"layer": layer, "expert": "shared"}, {"layer": layer, "expert": 0}]
    policy = {"average": named, "protect": "none"}
    recipe = tiny.recipe("m", policy=policy, quantization={"method": "none"})
    plan = make_plan(source, None, recipe)
    told = f"not averaged, for its layer has no other shared expert: ({layer}, shared)"
    assert noted(plan, told) == [told]
    assert sorted(str(d.id) for d in plan.experts if d.action == "average") == [
        f"({layer}, 0)", f"({layer}, 1)"
    ]  # fmt: skip
