"""What goes into the file follows from plan and headers, and is what the packer makes of it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from se_compress.artifacts import CompressionPlan, ModelSource, Scheme, TensorInfo
from se_compress.checkpoint import TORCH_DTYPES
from se_compress.errors import RecipeError
from se_compress.families import FAMILIES
from se_compress.headers import Slot
from se_compress.policy import make_plan
from se_compress.quant.packing import pack_gptq
from se_compress.recipe import Target
from se_compress.source import open_source
from se_compress.targets import (
    TARGETS,
    find_rules,
    packed_slots,
    planned_bits,
    result_name,
    result_slots,
    stored_bytes,
)

TinyModel = Callable[[str], Path]
MIXTRAL = "model.layers.2.block_sparse_moe."


def info(rows: int, columns: int) -> TensorInfo:
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    return TensorInfo(name, "BF16", (rows, columns), "f", 0, 2 * rows * columns)


def plan_for(source: ModelSource, target: str = "gptqmodel") -> CompressionPlan:
    method = "none" if target == "transformers" else "rtn"
    protect = [{"layer": source.moe_layers[0], "expert": 1}]
    return make_plan(
        source,
        None,
        tiny.recipe(
            source.name,
            target=target,
            policy={"protect": protect, "bits": 4},
            quantization={"method": method, "group_size": 32},
        ),
    )


# -------------------------------------------------------------------------------------- the table


def test_every_target_of_a_recipe_has_a_row() -> None:
    assert {rules.target for rules in TARGETS} == set(Target.__args__)  # type: ignore[attr-defined]
    assert all(rules.source for rules in TARGETS)
    assert len({(rules.target, rules.format) for rules in TARGETS}) == len(TARGETS)


def test_a_target_is_asked_for_a_method() -> None:
    assert find_rules("gptqmodel", "gptq").format == "gptq"
    assert find_rules("transformers", "none").format == "source"
    message = (
        "target transformers does not load experts of method rtn; it loads bitsandbytes, none, "
        "and rtn needs target gptqmodel"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        find_rules("transformers", "rtn")


# ---------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", find_rules("gptqmodel", "gptq").widths)
@pytest.mark.parametrize("group_size", [-1, 32, 64])
def test_slots_are_what_the_packer_makes(bits: int, group_size: int) -> None:
    rows, columns = 96, 64
    groups = 1 if group_size == -1 else columns // group_size
    packed = pack_gptq(
        torch.zeros(rows, columns, dtype=torch.uint8),
        torch.ones(rows, groups),
        torch.ones(rows, groups, dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
    )
    slots = packed_slots(info(rows, columns), bits, Scheme("gptq", "rtn", group_size, True))
    stem = "model.layers.0.mlp.experts.1.down_proj."
    assert [slot.name for slot in slots] == [stem + part for part in packed._fields]
    for slot, tensor in zip(slots, packed, strict=True):
        assert slot.shape == tuple(tensor.shape)
        assert TORCH_DTYPES[slot.dtype] == tensor.dtype
        assert slot.size_bytes == tensor.numel() * tensor.itemsize


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
    slots = {slot.name: slot for slot in result_slots(source, plan)}
    unchanged = packed = 0
    for name, tensor in source.tensors.items():
        stored = result_name(source, plan, name)
        quantized = tensor.kind == "expert" and (tensor.layer, tensor.expert) != (
            source.moe_layers[0],
            1,
        )
        assert planned_bits(plan, tensor) == (4 if quantized else 16)
        if quantized:
            packed += 1
            stem = stored.removesuffix(".weight")
            assert stored not in slots
            assert {f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} <= {
                *slots
            }
        else:
            unchanged += 1
            assert slots[stored] == Slot(stored, tensor.dtype, tensor.shape)
    assert packed == 3 * (len(source.moe_layers) * source.expert_count - 1)
    assert len(slots) == unchanged + 4 * packed


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_an_unquantised_result_is_the_source_itself(tiny_model: TinyModel, family: str) -> None:
    source = open_source(str(tiny_model(family)))
    slots = list(result_slots(source, plan_for(source, "transformers")))
    assert {slot.name: (slot.dtype, slot.shape) for slot in slots} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in source.tensors.items()
    }


def test_slots_keep_the_order_of_the_source(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("mixtral")))
    slots = [slot.name for slot in result_slots(source, plan_for(source, "transformers"))]
    assert slots == sorted(slots, key=lambda name: source.tensors[name].begin)


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        (f"{MIXTRAL}gate.weight", "model.layers.2.mlp.gate.weight"),
        (f"{MIXTRAL}experts.1.w1.weight", "model.layers.2.mlp.experts.1.gate_proj.weight"),
        (f"{MIXTRAL}experts.1.w3.qweight", "model.layers.2.mlp.experts.1.up_proj.qweight"),
        (f"{MIXTRAL}experts.1.w2.g_idx", "model.layers.2.mlp.experts.1.down_proj.g_idx"),
        ("model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_gptqmodel_finds_mixtral_by_the_names_of_its_live_model(
    tiny_model: TinyModel, name: str, stored: str
) -> None:
    source = open_source(str(tiny_model("mixtral")))
    assert result_name(source, plan_for(source), name) == stored
    assert result_name(source, plan_for(source, "transformers"), name) == name


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mixtral"}))
def test_the_other_families_keep_their_names(tiny_model: TinyModel, family: str) -> None:
    source = open_source(str(tiny_model(family)))
    plan = plan_for(source)
    assert [result_name(source, plan, name) for name in source.tensors] == [*source.tensors]


def test_no_two_tensors_share_a_name_in_the_result(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("mixtral")))
    plan = plan_for(source)
    assert len({result_name(source, plan, name) for name in source.tensors}) == len(source.tensors)
