"""What goes into the file follows from plan and headers, and is what the packer makes of it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from packed import pack

from se_compress.artifacts import (
    CompressionPlan,
    ExpertIndex,
    ModelSource,
    Scheme,
    TensorInfo,
    from_json,
    to_json,
)
from se_compress.artifacts.targets import ENGINES, Target, targets_of
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.targets import (
    TARGETS,
    find_rules,
    packed_parts,
    stored_bytes,
)
from se_compress.errors import RecipeError
from se_compress.formats import FORMATS, PlannedTensor
from se_compress.model.checkpoint import TORCH_DTYPES
from se_compress.opening.headers import Slot
from se_compress.opening.source import open_source
from se_compress.planning.check import check_plan
from se_compress.planning.policy import make_plan
from se_compress.recipe import load_recipe

TinyModel = Callable[[str], Path]
MIXTRAL = "model.layers.2.block_sparse_moe."


def info(rows: int, columns: int) -> TensorInfo:
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    return TensorInfo(name, "BF16", (rows, columns), "f", 0, 2 * rows * columns)


# What an unproven row has instead of a run: the files of the engine in which its facts were read.
READ = re.compile(r"\w+\.py\b")
Changes = Mapping[tuple[int, ExpertIndex], Mapping[str, Any]]


def plan_for(
    source: ModelSource,
    target: str = "gptqmodel",
    form: str = "auto",
    protect: Sequence[Mapping[str, int]] | None = None,
    method: str = "rtn",
) -> CompressionPlan:
    if protect is None:
        protect = [{"layer": source.moe_layers[0], "expert": 1}]
    return make_plan(
        source,
        None,
        tiny.recipe(
            source.name,
            target=target,
            policy={"protect": list(protect), "bits": 4},
            quantization={"method": method, "group_size": 32, "format": form},
        ),
    )


def unquantised(source: ModelSource) -> CompressionPlan:
    return plan_for(source, "transformers", method="none")


# -------------------------------------------------------------------------------------- the table


def test_every_target_of_a_recipe_has_a_row() -> None:
    assert {rules.target for rules in TARGETS} == set(get_args(Target)) == ENGINES.keys()
    assert all(rules.source for rules in TARGETS)
    assert len({(rules.target, rules.format) for rules in TARGETS}) == len(TARGETS)


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        (("gptqmodel", "gptq"), "gptq"),
        (("gptqmodel", "rtn", "auto", False), "gptq_v2"),
        (("gptqmodel", "gptq", "gptq_v2"), "gptq_v2"),
        (("transformers", "gptq"), "auto-round"),
        (("transformers", "gptq", "auto", False), "auto-round"),
        (("transformers", "gptq", "compressed-tensors"), "compressed-tensors"),
        (("transformers", "none"), "source"),
        (("transformers", "none", "auto", False), "source"),
        (("vllm", "gptq"), "compressed-tensors"),
        (("sglang", "rtn"), "compressed-tensors"),
        (("vllm", "none"), "source"),
        (("vllm", "gptq", "auto", False), "compressed-tensors"),
        (("vllm-cpu", "gptq"), "compressed-tensors"),
        ((("gptqmodel", "vllm", "sglang"), "gptq"), "gptq"),
        ((("vllm", "gptqmodel"), "gptq"), "gptq"),
        ((("transformers", "vllm"), "gptq"), "compressed-tensors"),
        ((("transformers", "vllm"), "gptq", "auto-round-gptq"), "auto-round-gptq"),
        ((("vllm", "sglang"), "gptq"), "compressed-tensors"),
        ((("transformers", "vllm", "sglang"), "none"), "source"),
    ],
)
def test_the_row_is_the_first_that_holds_what_is_asked(asked: tuple[Any, ...], form: str) -> None:
    assert find_rules(*asked).format == form


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ("gptqmodel", "none"),
            "target gptqmodel does not load experts of method none; it loads gptq, rtn, and none "
            "needs target sglang or transformers or vllm or vllm-cpu",
        ),
        (
            ("vllm", "gptq", "gptq_v2"),
            "quantization.format is gptq_v2; target vllm loads method gptq as compressed-tensors, "
            "gptq, auto-round-gptq",
        ),
        (
            ("vllm-cpu", "gptq", "auto", False),
            "quantization.symmetric is false; target vllm-cpu loads symmetric groups only",
        ),
        (
            (("gptqmodel", "transformers"), "gptq"),
            "no file of method gptq serves target gptqmodel and transformers: gptqmodel loads "
            "gptq, gptq_v2; transformers loads auto-round, compressed-tensors, auto-round-gptq",
        ),
        (
            (("gptqmodel", "vllm"), "gptq", "auto", False),
            "no file of method gptq serves target gptqmodel and vllm: gptqmodel loads gptq_v2; "
            "vllm loads compressed-tensors",
        ),
        (
            ("gptqmodel", "gptq", "gptq", False),
            "quantization.symmetric is false; target gptqmodel loads symmetric groups only of "
            "format gptq",
        ),
    ],
)
def test_what_no_row_holds_is_refused_with_what_is(asked: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        find_rules(*asked)


def test_each_width_of_a_row_says_what_it_needs() -> None:
    for rules in TARGETS:
        told = {width for need in rules.needs for width in need.widths}
        assert told == set(rules.widths), (rules.target, rules.format)
        assert rules.versions
        assert all(need.hardware for need in rules.needs)
        assert rules.proven or READ.search(rules.source), (rules.target, rules.format)


def test_each_row_has_a_recipe() -> None:
    """Those of recipes/models are planned in test_published_models.py, the others end to end."""
    used = set()
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("**/*.yaml")):
        if path.parent.name not in ("recipes", "models"):
            continue
        recipe = load_recipe(path)
        for one in recipe.variants.values() or [recipe]:
            asked = one.quantization
            rules = find_rules(one.target, asked.method, asked.format, asked.symmetric)
            used |= {(target, rules.format) for target in targets_of(one.target)}
    assert {(r.target, r.format) for r in TARGETS} == used


def test_several_targets_get_what_they_have_in_common() -> None:
    both = find_rules(("gptqmodel", "vllm"), "gptq")
    one, other = (find_rules(name, "gptq", "gptq") for name in ("gptqmodel", "vllm"))
    assert (one.granularity, other.granularity) == ("projection", "layer")
    assert (both.target, both.granularity) == ("gptqmodel and vllm", "layer")
    assert both.widths == (2, 3, 4, 8)
    assert both.group_sizes == (32, 64, 128)
    assert (both.dense_mlp, both.fused) == (False, other.fused)
    least = find_rules(("vllm", "vllm-cpu"), "gptq")
    assert (least.widths, least.group_sizes, least.asymmetric) == ((4,), (64, 128), False)


def test_one_target_in_a_list_is_that_target(tiny_model: TinyModel) -> None:
    assert tiny.recipe("m", target=["vllm"]).target == "vllm"
    assert tiny.recipe("m", target=["vllm", "vllm"]).target == "vllm"
    assert tiny.recipe("m", target=["vllm", "sglang"]).target == ("vllm", "sglang")


# ------------------------------------------------------------------------------------ granularity


def with_widths(source: ModelSource, target: str, form: str, changes: Changes) -> CompressionPlan:
    plan = plan_for(source, target, form, protect=())
    experts = tuple(replace(d, **changes.get((d.layer, d.expert), {})) for d in plan.experts)
    return replace(plan, experts=experts)


ONE_EXPERT: Changes = {(1, 2): {"bits": 8}}
ONE_LAYER: Changes = {(1, expert): {"bits": 8} for expert in range(8)}
DOWN: Changes = {(1, 2): {"down_bits": 8}}


@pytest.mark.parametrize(
    ("target", "form", "changes", "message"),
    [
        ("gptqmodel", "gptq", DOWN, ""),
        ("transformers", "auto-round", DOWN, ""),
        ("transformers", "auto-round", ONE_EXPERT, ""),
        ("vllm", "compressed-tensors", ONE_LAYER, ""),
        (
            "vllm", "compressed-tensors", ONE_EXPERT,
            "expert (1, 2) has 8 bits and expert (1, 0) 4; target vllm loads one width per layer",
        ),
        (
            "sglang", "compressed-tensors", DOWN,
            "expert (1, 2) has 4 bits and down_bits 8; target sglang loads one width per layer",
        ),
        (
            "transformers", "compressed-tensors", ONE_LAYER,
            "expert (1, 0) has 8 bits and expert (0, 0) 4; target transformers loads one width per "
            "model",
        ),
    ],
)  # fmt: skip
def test_a_mix_that_is_too_fine_is_refused_by_the_expert_s_name(
    tiny_model: TinyModel, target: str, form: str, changes: Changes, message: str
) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    plan = with_widths(source, target, form, changes)
    if not message:
        checked = check_plan(plan, source, "plan.json")
        assert [d.bits for d in checked.experts] == [d.bits for d in plan.experts]
        return
    with pytest.raises(RecipeError, match=re.escape(f"plan.json: {message}")):
        check_plan(plan, source, "plan.json")


def test_where_all_experts_are_alike_none_can_be_protected(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    message = (
        "expert (0, 1) keeps 16 bits; as compressed-tensors, target transformers loads one width "
        "for all experts of a model: accepted are policy.protect none and another "
        "quantization.format"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        plan_for(source, "transformers", "compressed-tensors")


# ---------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("form", [f.name for f in FORMATS.values() if f.pack])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_slots_are_what_the_packer_makes(
    form: str, bits: int, group_size: int, symmetric: bool
) -> None:
    rows, columns = 96, 64
    groups = 1 if group_size == -1 else columns // group_size
    packed = pack(
        form,
        torch.zeros(rows, columns, dtype=torch.uint8),
        torch.ones(rows, groups),
        torch.ones(rows, groups, dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )
    scheme = Scheme(form, "rtn", group_size, symmetric)
    parts = packed_parts((rows, columns), bits, scheme)
    size = stored_bytes(info(rows, columns), bits, scheme)
    planned = PlannedTensor(
        info(rows, columns), info(rows, columns).name, bits, "packed", size, parts
    )
    slots = planned.stored
    assert size == sum(slot.size_bytes for slot in slots)
    stem = "model.layers.0.mlp.experts.1.down_proj."
    assert [slot.name for slot in slots] == [stem + part for part in packed]
    for slot, tensor in zip(slots, packed.values(), strict=True):
        assert slot.shape == tuple(tensor.shape)
        assert TORCH_DTYPES[slot.dtype] == tensor.dtype
        assert slot.size_bytes == tensor.numel() * tensor.itemsize
    scales = next(tensor for tensor in packed.values() if tensor.is_floating_point())
    assert scales.dtype == getattr(torch, FORMATS[form].scale_dtype)


def test_at_16_bits_a_matrix_keeps_its_own_bytes() -> None:
    scheme = Scheme("gptq", "rtn", 32, True)
    assert stored_bytes(replace(info(64, 32), dtype="F32"), 16, scheme) == info(64, 32).size_bytes
    sizes = [stored_bytes(info(64, 32), bits, scheme) for bits in (2, 3, 4, 8, 16)]
    assert sizes == sorted(set(sizes))


# ---------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_all_but_the_planned_experts_stay_as_they_are(tiny_model: TinyModel, family: str) -> None:
    source = open_source(str(tiny_model(family)))
    plan = plan_for(source)
    blueprint = draw_blueprint(source, plan)
    slots = blueprint.slots
    unchanged = packed = 0
    for name, tensor in source.tensors.items():
        planned = blueprint.tensors[name]
        stored = planned.name
        quantized = tensor.kind == "expert" and (tensor.layer, tensor.expert) != (
            source.moe_layers[0],
            1,
        )
        assert planned.bits == (4 if quantized else 16)
        assert planned.making == ("packed" if quantized else "copied")
        if quantized:
            packed += 1
            assert stored not in slots
            assert {
                f"{planned.module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
            } <= {*slots}
        else:
            unchanged += 1
            assert slots[stored] == Slot(stored, tensor.dtype, tensor.shape)
    assert packed == 3 * (len(source.moe_layers) * source.expert_count - 1)
    assert len(slots) == unchanged + 4 * packed


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_an_unquantised_result_is_the_source_itself(tiny_model: TinyModel, family: str) -> None:
    source = open_source(str(tiny_model(family)))
    slots = draw_blueprint(source, unquantised(source)).slots.values()
    assert {slot.name: (slot.dtype, slot.shape) for slot in slots} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in source.tensors.items()
    }


def test_slots_keep_the_order_of_the_source(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("mixtral")))
    slots = [*draw_blueprint(source, unquantised(source)).slots]
    assert slots == sorted(slots, key=lambda name: source.tensors[name].begin)


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        (f"{MIXTRAL}gate.weight", "model.layers.2.mlp.gate.weight"),
        (f"{MIXTRAL}experts.1.w1.weight", "model.layers.2.mlp.experts.1.gate_proj.weight"),
        (f"{MIXTRAL}experts.1.w3.weight", "model.layers.2.mlp.experts.1.up_proj.weight"),
        (f"{MIXTRAL}experts.1.w2.weight", "model.layers.2.mlp.experts.1.down_proj.weight"),
        ("model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_mixtral_goes_by_the_names_that_each_engine_looks_for(
    tiny_model: TinyModel, name: str, stored: str
) -> None:
    source = open_source(str(tiny_model("mixtral")))

    def named(plan: CompressionPlan) -> str:
        return draw_blueprint(source, plan).names[name]

    assert named(plan_for(source)) == stored
    assert named(plan_for(source, "transformers")) == stored
    assert named(plan_for(source, "vllm", protect=())) == name
    assert named(unquantised(source)) == name


@pytest.mark.parametrize("family", sorted(set(tiny.CONFIGS) - {"mixtral"}))
def test_the_other_families_keep_their_names(tiny_model: TinyModel, family: str) -> None:
    source = open_source(str(tiny_model(family)))
    names = draw_blueprint(source, plan_for(source)).names
    assert names == {name: name for name in source.tensors}


def test_no_two_tensors_share_a_name_in_the_result(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("mixtral")))
    names = draw_blueprint(source, plan_for(source)).names
    assert len(set(names.values())) == len(source.tensors)


# ------------------------------------------------------------------------------- several targets


def several(source: ModelSource, *targets: str, **sections: Any) -> CompressionPlan:
    settings = {
        "policy": {"bits": 4, "protect": "none"},
        "quantization": {"method": "rtn", "group_size": 32},
        **sections,
    }
    return make_plan(source, None, tiny.recipe(source.name, target=list(targets), **settings))


def test_a_plan_for_several_targets_meets_them_all(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    plan = several(source, "gptqmodel", "vllm", "sglang")
    assert plan.target == ("gptqmodel", "vllm", "sglang")
    again = from_json(CompressionPlan, to_json(plan), "plan.json")
    assert again == plan
    assert check_plan(again, source, "plan.json").experts == plan.experts
    finer = replace(
        plan, experts=tuple(replace(d, bits=8) if d.expert == 2 else d for d in plan.experts)
    )
    message = (
        "plan.json: expert (0, 2) has 8 bits and expert (0, 0) 4; target gptqmodel, vllm and "
        "sglang loads one width per layer"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        check_plan(finer, source, "plan.json")


def test_protection_lifts_the_layer_if_one_of_the_targets_wants_it(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    policy = {"bits": 4, "protect": [{"layer": 1, "expert": 2}], "lift_layers": True}
    plan = several(source, "gptqmodel", "vllm", policy=policy)
    widths = {d.layer: {e.bits for e in plan.experts if e.layer == d.layer} for d in plan.experts}
    assert widths == {0: {4}, 1: {16}, 2: {4}}


@pytest.mark.parametrize(
    ("family", "targets", "sections", "message"),
    [
        (
            "mixtral", ("gptqmodel", "vllm"), {},
            "target gptqmodel and vllm: they look for the experts of mixtral by different names, so"
            " that no one file serves them all; a file for each does",
        ),
        (
            "deepseek_v3", ("vllm-cpu",), {"quantization": {"method": "rtn", "group_size": 64}},
            "target vllm-cpu has no kernel for the routing of deepseek_v3, which adds a bias to "
            "the scores; quantization.method none is loaded",
        ),
        (
            "qwen3_moe", ("vllm-cpu",), {},
            "target vllm-cpu does not load quantization.group_size 32; no quantization.group_size "
            "changes that; quantization.method none with target sglang or transformers or vllm or "
            "vllm-cpu leaves the experts as they are",
        ),
        (
            "qwen3_moe", ("vllm-cpu", "gptqmodel"), {},
            "hidden_size is 64; as gptq, target vllm-cpu and gptqmodel loads multiples of 128 only",
        ),
    ],
)  # fmt: skip
def test_what_no_such_file_holds_is_refused(
    tiny_model: TinyModel,
    family: str,
    targets: tuple[str, ...],
    sections: dict[str, Any],
    message: str,
) -> None:
    source = open_source(str(tiny_model(family)))
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        several(source, *targets, **sections)


def test_vllm_is_to_reload_what_is_made_for_it(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    validation = {"data": "unused.txt", "reload": {"engine": "vllm"}}
    for targets in (("vllm",), ("gptqmodel", "vllm"), ("vllm-cpu",)):
        quantization = {"method": "rtn", "group_size": 32}
        if targets == ("vllm-cpu",):
            quantization = {"method": "none"}
        several(source, *targets, validation=validation, quantization=quantization)
    message = (
        "validation.reload.engine is vllm; target sglang is no such engine, accepted are auto, and "
        "target vllm or vllm-cpu"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        several(source, "sglang", validation=validation)


# ---------------------------------------------------------------------------------- plans by hand


def by_hand(source: ModelSource, **changes: Any) -> CompressionPlan:
    """A plan for GPTQModel and vLLM, with keys changed in the file; those of `scheme` by theirs."""
    plain = json.loads(to_json(several(source, "gptqmodel", "vllm")))
    plain["scheme"] |= changes.pop("scheme", {})
    plan = from_json(CompressionPlan, json.dumps(plain | changes), "plan.json")
    return check_plan(plan, source, "plan.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": []},
            "plan.json: target is an empty list; at least one of gptqmodel, transformers, vllm, "
            "vllm-cpu, sglang",
        ),
        ({"target": ["vllm", "vllm"]}, "plan.json: target lists vllm twice"),
        ({"target": ["a", 3]}, 'plan.json.target is ["a", 3], but text or a list is expected'),
        (
            {"scheme": {"format": "auto"}},
            "plan.json: scheme.format is auto; a plan names the format that its target loads",
        ),
        (
            {"scheme": {"data_type": "nf4"}},
            "plan.json: scheme.data_type is nf4; method rtn has no such key",
        ),
        (
            {"scheme": {"double_quant": True}},
            "plan.json: scheme.double_quant is True; method rtn has no such key",
        ),
        (
            {
                "target": "transformers",
                "scheme": {"method": "bitsandbytes", "format": "bitsandbytes"},
            },
            "plan.json: scheme.data_type is None; accepted are nf4, fp4, int8",
        ),
    ],
)  # fmt: skip
def test_a_plan_by_hand_that_no_engine_could_mean_is_refused(
    tiny_model: TinyModel, changes: dict[str, Any], message: str
) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        by_hand(source, **changes)


def test_the_order_of_targets_is_no_matter(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    turned = by_hand(source, target=["vllm", "gptqmodel"])
    assert turned.experts == by_hand(source).experts
    assert turned.size_bytes == by_hand(source).size_bytes


# ----------------------------------------------------------------------------------- format: auto


def test_auto_is_the_first_format_that_loads_the_model(tiny_type: TinyModel) -> None:
    """And the plan says why it is not the target's first."""
    chosen = {"quantization": {"method": "rtn", "group_size": 32}, "policy": {"bits": 4}}
    found = {}
    for name in ("nemotron_h", "afmoe"):
        settings = tiny.recipe(tiny_type(name), target="transformers", **chosen)
        plan = make_plan(open_source(str(tiny_type(name))), None, settings)
        found[name] = (plan.scheme.format, [note for note in plan.notes if "format" in note])
    note = (
        "format compressed-tensors: target transformers is not known to load auto-round of "
        "nemotron_h"
    )
    assert found == {"nemotron_h": ("compressed-tensors", [note]), "afmoe": ("auto-round", [])}


def test_auto_without_a_format_that_loads_the_model(tiny_type: TinyModel) -> None:
    quantization = {"method": "rtn", "group_size": 32}
    settings = tiny.recipe(
        tiny_type("afmoe"), target="gptqmodel", quantization=quantization, policy={"bits": 4}
    )
    match = "^target gptqmodel is not known to load gptq of afmoe; target transformers loads"
    with pytest.raises(RecipeError, match=match):
        make_plan(open_source(str(tiny_type("afmoe"))), None, settings)


def test_a_format_that_is_asked_for_is_not_replaced(tiny_type: TinyModel) -> None:
    quantization = {"method": "rtn", "group_size": 32, "format": "auto-round"}
    settings = tiny.recipe(
        tiny_type("nemotron_h"), target="transformers", quantization=quantization,
        policy={"bits": 4},
    )  # fmt: skip
    with pytest.raises(RecipeError, match="is not known to load auto-round of nemotron_h; target"):
        make_plan(open_source(str(tiny_type("nemotron_h"))), None, settings)
