"""What protection did: who was rescued and from what, who is expected, what is undecided."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import BOS, plant, random_tokens

from se_compress.artifacts import (
    CompressionPlan,
    ExpertId,
    ExpertProfile,
    ExpertStats,
    LayerStats,
    ModelSource,
    SuperExpert,
    UndecidedLayer,
    from_json,
    surprise,
    to_json,
)
from se_compress.errors import RecipeError
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.profiling.criterion import mark_layers, propose
from se_compress.profiling.doubt import stability_of, undecided_layers
from se_compress.profiling.profiler import profile_digest, profile_experts
from se_compress.recipe import SuperExperts

TinyModel = Callable[[str], Path]
PLANTED = ExpertId(1, 3)
KEPT: Mapping[str, Any] = {
    "target": "gptqmodel",
    "quantization": {"method": "rtn", "group_size": 32},
}
TOKENS = [[BOS, *row] for row in random_tokens(5, 19)]


@pytest.fixture(scope="module")
def planted(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelSource, ExpertProfile]:
    """A Qwen3-MoE with one super expert that only the first token of a sequence reaches."""
    directory = tmp_path_factory.mktemp("planted")
    tiny.build(directory, "qwen3_moe")
    plant(directory, 1, 3)
    source = open_source(str(directory))
    recipe = tiny.recipe(str(directory), policy={"merge": {"fraction": 0.25}})
    profile = profile_experts(source, TOKENS, recipe)
    assert [one.id for one in profile.super_experts] == [PLANTED]
    return source, profile


def made(
    planted: tuple[ModelSource, ExpertProfile], method: str = "none", **policy: object
) -> CompressionPlan:
    source, profile = planted
    quantization = {"method": method} | ({} if method == "none" else {"group_size": 32})
    recipe = tiny.recipe(
        "m",
        target="transformers" if method == "none" else "gptqmodel",
        policy=policy,
        quantization=quantization,
    )
    return make_plan(source, profile, recipe)


def noted(plan: CompressionPlan, beginning: str) -> list[str]:
    return [note for note in plan.notes if note.startswith(beginning)]


def test_rescued_from_a_score(planted: tuple[ModelSource, ExpertProfile]) -> None:
    rule = {"fraction": 0.5, "score": "frequency"}
    plan = made(planted, prune=rule)
    naive = made(planted, prune=rule, protect="none")
    # The slow twin: what the plan without protection does with it.
    fate = naive.by_id[PLANTED]
    assert fate.action == "prune"
    (one,) = plan.rescued
    assert (one.id, one.action, one.bits) == (PLANTED, "prune", None)
    assert one.reason == fate.reason
    assert plan.by_id[PLANTED].action == "keep"
    assert noted(plan, "rescued by protection: expert (1, 3) would be gone (pruned: ")
    assert from_json(CompressionPlan, to_json(plan), "plan") == plan
    assert naive.rescued == ()
    assert noted(naive, "super expert (1, 3) is pruned: it is not protected")


def test_a_score_that_spares_it_of_itself_rescues_nobody(
    planted: tuple[ModelSource, ExpertProfile],
) -> None:
    plan = made(planted, prune={"fraction": 0.25, "score": "reap"})
    assert plan.by_id[PLANTED].action == "keep"
    assert plan.rescued == ()
    assert not noted(plan, "rescued")


def test_rescued_from_the_budget(planted: tuple[ModelSource, ExpertProfile]) -> None:
    plan = made(planted, method="rtn", bits=[4])
    (one,) = plan.rescued
    assert (one.id, one.action, one.bits) == (PLANTED, "quantize", 4)
    assert not noted(plan, "rescued")  # its bytes are told, and it is in the plan's `rescued`
    assert made(planted, method="rtn", bits=[16]).rescued == ()


def test_without_a_profile_the_expected_ones_are_protected(
    planted: tuple[ModelSource, ExpertProfile],
) -> None:
    source, _ = planted
    expected = {"expected": [{"layer": 1, "expert": 3}]}
    recipe = tiny.recipe("m", super_experts=expected, **KEPT)
    plan = make_plan(source, None, recipe)
    assert plan.protected == (PLANTED,)
    assert noted(plan, "no profile yet: the 1 experts of super_experts.expected are protected")
    nowhere = {"expected": [{"layer": 1, "expert": 99}]}
    recipe = tiny.recipe("m", super_experts=nowhere, **KEPT)
    with pytest.raises(
        RecipeError, match=r"super_experts.expected.0: there is no expert \(1, 99\)"
    ):
        make_plan(source, None, recipe)


def test_a_profile_that_finds_others_says_so(planted: tuple[ModelSource, ExpertProfile]) -> None:
    source, profile = planted
    wrong = {"expected": [{"layer": 0, "expert": 3}]}  # the usual slip: a layer too low
    recipe = tiny.recipe("m", super_experts=wrong, **KEPT)
    plan = make_plan(source, profile, recipe)
    (said,) = noted(plan, "UNEXPECTED SUPER EXPERTS")
    assert "expected lists (0, 3); not found: (0, 3); found beside: (1, 3)" in said
    assert plan.protected == (PLANTED,)
    assert surprise(profile, [PLANTED]) == ""
    assert surprise(profile, []) == ""
    assert "not found: (2, 1)" in surprise(profile, [PLANTED, ExpertId(2, 1)])
    # Knowing them changes nothing of what is measured.
    plain = tiny.recipe("m", **KEPT)
    assert profile_digest(source, TOKENS, recipe) == profile_digest(source, TOKENS, plain)


# -------------------------------------------------------------------------------------- undecided


def layer(index: int, peak: float, rise: float, moe: bool = True) -> LayerStats:
    return LayerStats(
        index, moe, peak, 0, 7, BOS, 0.01, rise, 0.0, peak > 100, False, False, None, (), 0.0
    )


def expert(at: int, index: int, peak: float, tokens: int = 9) -> ExpertStats:
    return ExpertStats(
        at, index, peak, peak, 7, 0, BOS, tokens, 0.5, 1.0, 0.5, {}, {}, (peak, peak / 20)
    )


LAYERS = mark_layers([layer(0, 5, 5), layer(1, 900, 895), layer(2, 1500, 600), layer(3, 1500, 1)])
QUIET = [expert(at, i, 1.0 + i) for at in range(4) for i in range(4)]


def found_in(
    experts: list[ExpertStats], percentile: float
) -> tuple[tuple[UndecidedLayer, ...], list[SuperExpert]]:
    proposal = propose(LAYERS, experts, SuperExperts(percentile=percentile))
    return undecided_layers(LAYERS, experts, proposal), list(proposal.super_experts)


def test_a_layer_that_forms_by_no_one_expert_is_undecided() -> None:
    undecided, supers = found_in([*QUIET, expert(1, 9, 890)], 80.0)
    assert [one.id for one in supers] == [ExpertId(1, 9)]
    assert undecided == (UndecidedLayer(2, "no one expert"),)


def test_an_expert_that_only_the_percentile_holds_back_is_undecided() -> None:
    strong = [*QUIET, expert(1, 9, 890), expert(2, 9, 600)]
    undecided, supers = found_in(strong, 99.5)
    assert [one.id for one in supers] == [ExpertId(1, 9)]
    assert undecided == (UndecidedLayer(2, "percentile", (9,)),)
    assert found_in(strong, 80.0)[0] == ()


def test_an_expert_without_a_token_is_undecided() -> None:
    strong = [*QUIET, expert(1, 9, 890), expert(2, 9, 600), expert(3, 9, 0.0, tokens=0)]
    undecided, _ = found_in(strong, 80.0)
    assert undecided == (UndecidedLayer(3, "no token", (9,)),)


def test_pruning_an_expert_that_was_never_seen_is_told(
    planted: tuple[ModelSource, ExpertProfile],
) -> None:
    source, profile = planted
    unseen = replace(profile, undecided=(UndecidedLayer(2, "no token", (0, 1)),))
    rule = {"fraction": 0.5, "score": "frequency"}
    gone = {d.id for d in made((source, unseen), prune=rule).experts if d.action == "prune"}
    count = len(gone & {ExpertId(2, 0), ExpertId(2, 1)})
    notes = noted(made((source, unseen), prune=rule), f"{count} of the experts that go got no")
    assert (len(notes) == 1) == (count > 0)
    assert count


def test_stability_counts_thresholds_and_halves() -> None:
    strong = [*QUIET, expert(1, 9, 890), expert(2, 9, 65)]
    stability = stability_of(LAYERS, strong, SuperExperts(percentile=80.0))
    chosen = {(c.percentile, c.fraction_of_max): len(c.experts) for c in stability.thresholds}
    assert chosen[95.0, 0.10] == 1
    assert chosen[95.0, 0.07] == 1  # the percentile holds (2, 9) back
    assert len(chosen) == 16
    assert stability.halves == ((ExpertId(1, 9),), (ExpertId(1, 9),))
    alone = [replace(e, half_peaks=()) for e in strong]
    assert stability_of(LAYERS, alone, SuperExperts()).halves == ()


def test_the_halves_are_those_of_the_text(planted: tuple[ModelSource, ExpertProfile]) -> None:
    """Slow twin: profiles of the even and of the odd sequences alone."""
    source, profile = planted
    recipe = tiny.recipe("m", super_experts={"confirm": False})
    for half in (0, 1):
        alone = profile_experts(source, TOKENS[half::2], recipe)
        for stats in profile.experts:
            assert stats.half_peaks[half] == pytest.approx(alone.by_id[stats.id].peak, rel=1e-5)
    assert profile.stability is not None
    assert profile.stability.halves == ((PLANTED,), (PLANTED,))
