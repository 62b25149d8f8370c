"""The settings of one file give each module the same width in every engine that is to load it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_lookups as lookups
import pytest
import tiny

from se_compress.artifacts import CompressionPlan, ModelSource
from se_compress.engines.blueprint import Blueprint, draw_blueprint
from se_compress.engines.engine_view import misread
from se_compress.engines.export import quantization_config
from se_compress.opening.source import open_source
from se_compress.planning.check import check_plan
from se_compress.planning.policy import make_plan

TinyModel = Callable[[str], Path]
GPTQ = ("gptqmodel", "vllm", "sglang")
AUTO_ROUND = ("transformers", "vllm")
# Targets and format -> how each engine that fuses looks a module up.
FILES: dict[str, tuple[tuple[str, ...], str, tuple[Any, ...]]] = {
    "gptq": (GPTQ, "gptq", (lookups.auto_gptq, lookups.humming)),
    "auto-round": (AUTO_ROUND, "auto-round-gptq", (lookups.inc,)),
    "compressed-tensors": (
        ("vllm", "sglang"),
        "compressed-tensors",
        (lookups.compressed_tensors,),
    ),
}
FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3-next-token")


def planned(source: ModelSource, file: str, by_layer: bool, other_bits: int) -> CompressionPlan:
    targets, form, _ = FILES[file]
    plan = make_plan(
        source,
        None,
        tiny.recipe(
            source.name,
            target=list(targets),
            policy={"bits": 4, "protect": "none", "other_bits": other_bits},
            quantization={"method": "rtn", "group_size": 32, "format": form},
        ),
    )
    if not by_layer:
        return plan
    widths = dict(zip(source.moe_layers, (8, 16, 4), strict=False))
    experts = tuple(
        d if d.expert == "shared" else replace(
            d, bits=widths[d.layer], action="keep" if widths[d.layer] == 16 else "quantize"
        )
        for d in plan.experts
    )  # fmt: skip
    return check_plan(replace(plan, experts=experts), source, "by layer")


def modules(blueprint: Blueprint) -> dict[str, int]:
    """Each matrix below the layers, and the head, with its width in the file."""
    return {
        tensor.module: tensor.bits
        for tensor in blueprint.tensors.values()
        if tensor.is_linear and (tensor.info.layer is not None or tensor.module == "lm_head")
    }


@pytest.mark.parametrize("other_bits", [16, 4, 8])
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_that_fuse_read_every_width(
    tiny_model: TinyModel, family: str, file: str, by_layer: bool, other_bits: int
) -> None:
    source = open_source(str(tiny_model(family)))
    blueprint = draw_blueprint(source, planned(source, file, by_layer, other_bits))
    settings = quantization_config(blueprint)
    assert misread(settings, blueprint, blueprint.slots.values()) == []
    wanted = modules(blueprint)
    for engine in FILES[file][2]:
        look = engine(settings)
        read = {module: look(lookups.own_name(module, wanted)) for module in wanted}
        assert read == wanted, engine.__name__


@pytest.mark.parametrize("family", ["mixtral"])
@pytest.mark.parametrize(
    ("form", "engine"),
    [("gptq", lookups.humming), ("auto-round-gptq", lookups.inc),
     ("compressed-tensors", lookups.compressed_tensors)],
)  # fmt: skip
def test_vllm_alone_reads_mixtral_by_its_own_names(
    tiny_model: TinyModel, family: str, form: str, engine: Any
) -> None:
    source = open_source(str(tiny_model(family)))
    quantization = {"method": "rtn", "group_size": 32, "format": form}
    policy = {"bits": 4, "protect": [{"layer": 1, "expert": 0}], "lift_layers": True}
    plan = make_plan(
        source, None, tiny.recipe("m", target="vllm", policy=policy, quantization=quantization)
    )
    blueprint = draw_blueprint(source, plan)
    settings = quantization_config(blueprint)
    look = engine(settings)
    wanted = modules(blueprint)
    assert {module: look(lookups.own_name(module, wanted)) for module in wanted} == wanted
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in wanted


def test_gptqmodel_s_own_code_reads_the_same(tiny_model: TinyModel) -> None:
    pytest.importorskip("gptqmodel")
    source = open_source(str(tiny_model("qwen3_moe")))
    for other_bits in (16, 8):
        blueprint = draw_blueprint(source, planned(source, "gptq", True, other_bits))
        wanted = modules(blueprint)
        wanted.pop("lm_head")  # its own key says so
        settings = quantization_config(blueprint)
        assert lookups.gptqmodel(settings, [*wanted]) == wanted


def test_a_plan_per_expert_stays_gptqmodel_s(tiny_model: TinyModel) -> None:
    """What vLLM would make of it: the base width for a layer of several."""
    source = open_source(str(tiny_model("qwen3_moe")))
    quantization = {"method": "rtn", "group_size": 32}
    policy = {"bits": 4, "protect": [{"layer": 1, "expert": 2}]}
    plan = make_plan(
        source, None, tiny.recipe("m", target="gptqmodel", policy=policy, quantization=quantization)
    )
    blueprint = draw_blueprint(source, plan)
    settings = quantization_config(blueprint)
    assert misread(settings, blueprint, blueprint.slots.values()) == []
    kept = "model.layers.1.mlp.experts.2.up_proj"
    assert lookups.humming(settings)(lookups.own_name(kept, [kept])) == 4
    for_all = replace(blueprint.shrunk, plan=replace(plan, target=GPTQ))
    told = misread(settings, replace(blueprint, shrunk=for_all), blueprint.slots.values())
    assert f"{kept} has 16 bits in the file and 4 by its settings" in told


def test_the_order_of_columns_is_their_groups(tiny_model: TinyModel, tmp_path: Path) -> None:
    """vLLM reads g_idx and does not use it."""
    from safetensors.torch import load_file

    source = open_source(str(tiny_model("qwen3_moe")))
    directory = tiny.write_result(source, planned(source, "gptq", True, 16), tmp_path / "out")
    orders = {
        tuple((index - column // 32 for column, index in enumerate(tensor.tolist())))
        for name, tensor in load_file(directory / "model.safetensors").items()
        if name.endswith(".g_idx")
    }
    assert orders
    assert all(set(order) == {0} for order in orders)
