"""Engines take every module of a result for what it is in the file, by the exported settings."""

import copy
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from se_compress.artifacts import CompressionPlan, ExpertDecision, ModelSource
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.engine_view import _Patterns, literal_start, misread, stored_bits
from se_compress.engines.export import quantization_config
from se_compress.engines.targets import find_rules
from se_compress.opening.headers import Slot
from se_compress.opening.source import open_source
from se_compress.planning.check import check_plan
from se_compress.planning.policy import make_plan
from se_compress.validation import stored

TinyModel = Callable[[str], Path]
TWELVE = "deepseek_v3-twelve"
MODELS = (*tiny.CONFIGS, "deepseek_v3-next-token", "qwen3_moe-tied", TWELVE)
# Target, method and format -> widths that a mixed plan of it may have.
ENGINES = {
    "gptqmodel": ("gptqmodel", "rtn", "auto"),
    "auto-round": ("transformers", "rtn", "auto-round"),
    "one-width": ("transformers", "rtn", "compressed-tensors"),
    "vllm": ("vllm", "rtn", "auto"),
    "bitsandbytes": ("transformers", "bitsandbytes", "auto"),
}


@pytest.fixture(scope="module")
def opened(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ModelSource]:
    twelve = tmp_path_factory.mktemp("twelve")
    changes = {"num_hidden_layers": 12, "n_routed_experts": 12, "num_nextn_predict_layers": 2}
    tiny.build(twelve, "deepseek_v3", **changes)
    return lambda name: open_source(str(twelve if name == TWELVE else tiny_model(name)))


def uniform(source: ModelSource, engine: str, **policy: Any) -> CompressionPlan:
    target, method, form = ENGINES[engine]
    grid = {"block_size": 32} if method == "bitsandbytes" else {"group_size": 32, "format": form}
    settings = {
        "target": target,
        "policy": {"bits": 4, **policy},
        "quantization": {"method": method, **grid},
    }
    return make_plan(source, None, tiny.recipe(source.name, **settings))


def mixed(source: ModelSource, engine: str) -> CompressionPlan:
    """As many widths side by side as the engine takes, 16 among them; attention packed as well."""
    plan = uniform(source, engine)
    rules = find_rules(*ENGINES[engine])
    widths = (*((4,) if engine == "bitsandbytes" else rules.widths), 16)
    last = source.moe_layers[-1]

    def other(decision: ExpertDecision) -> ExpertDecision:
        if decision.expert == "shared" or rules.granularity == "model":
            return decision
        place = decision.layer if rules.granularity == "layer" else int(decision.expert)
        bits = widths[(place + (decision.layer == last)) % len(widths)]
        return replace(decision, bits=bits, action="keep" if bits == 16 else "quantize")

    return check_plan(replace(plan, experts=tuple(map(other, plan.experts))), source, "mixed")


def pruned(source: ModelSource, engine: str) -> CompressionPlan:
    plan = uniform(source, engine)
    gone = 4 if source.expert_count > 4 else 2

    def smaller(decision: ExpertDecision) -> ExpertDecision:
        if decision.expert == "shared":
            return decision
        if int(decision.expert) < gone:
            return replace(decision, action="prune", bits=None)
        return replace(decision, becomes=int(decision.expert) - gone)

    return replace(plan, experts=tuple(map(smaller, plan.experts)))


PLANS: dict[str, Callable[[ModelSource, str], CompressionPlan]] = {
    "uniform": uniform,
    "one kept": lambda source, engine: uniform(
        source,
        engine,
        protect=[{"layer": source.moe_layers[-1], "expert": 1}],
        lift_layers=engine == "vllm",
    ),
    "others packed": lambda source, engine: uniform(source, engine, other_bits=8),
    "mixed": mixed,
    "pruned": pruned,
}


def cases() -> Iterator[tuple[str, str]]:
    for engine in ENGINES:
        for plan in PLANS:
            keeps = plan in ("one kept",) and engine in ("one-width",)
            if not keeps and not (plan == "others packed" and engine == "bitsandbytes"):
                yield engine, plan


@pytest.mark.parametrize(("engine", "plan"), list(cases()))
def test_every_module_is_taken_for_what_it_is(
    opened: Callable[[str], ModelSource], engine: str, plan: str
) -> None:
    for name in MODELS:
        source = opened(name)
        blueprint = draw_blueprint(source, PLANS[plan](source, engine))
        settings = quantization_config(blueprint)
        assert misread(settings, blueprint, blueprint.slots.values()) == [], name


# ------------------------------------------------------------------------- what it is to find out


def problems(source: ModelSource, plan: CompressionPlan, settings: dict[str, Any]) -> list[str]:
    blueprint = draw_blueprint(source, plan)
    return misread(settings, blueprint, blueprint.slots.values())


@pytest.mark.parametrize("engine", ["gptqmodel", "auto-round", "one-width"])
def test_layers_behind_the_decoder_that_settings_forget_are_found(
    opened: Callable[[str], ModelSource], engine: str
) -> None:
    source = opened("deepseek_v3-next-token")
    plan = uniform(source, engine)
    settings = copy.deepcopy(quantization_config(draw_blueprint(source, plan)))
    for key in ("dynamic", "extra_config", "ignore"):
        named = settings.get(key, {})
        kept = [n for n in named if "layers.3." not in n and r"layers\.3\." not in n]
        if isinstance(named, dict) and key in settings:
            settings[key] = {name: named[name] for name in kept}
        elif key in settings:
            settings[key] = kept
    found = problems(source, plan, settings)
    assert len(found) >= 24
    assert all(text.startswith("model.layers.3.") for text in found)
    assert found[0].endswith("has 16 bits in the file and 4 by its settings")


def test_a_width_that_belongs_to_layer_11_and_not_to_layer_1_is_found(
    opened: Callable[[str], ModelSource],
) -> None:
    source = opened(TWELVE)
    plan = uniform(source, "vllm")
    experts = (replace(d, bits=8 if d.layer == 1 else d.bits) for d in plan.experts)
    plan = replace(plan, experts=tuple(experts))
    settings = quantization_config(draw_blueprint(source, plan))
    assert problems(source, plan, settings) == []
    for group in settings["config_groups"].values():
        group["targets"] = [target.replace("(1)", "1?(1)") for target in group["targets"]]
    found = problems(source, plan, settings)
    assert len(found) == 3 * source.expert_count
    assert all(text.startswith("model.layers.11.mlp.experts.") for text in found)


@pytest.mark.parametrize(
    ("engine", "key", "value"),
    [("gptqmodel", "bits", 8), ("gptqmodel", "dynamic", {}), ("vllm", "ignore", []),
     ("auto-round", "extra_config", {})],
)  # fmt: skip
def test_the_account_of_a_result_fails_with_its_settings(
    tiny_model: TinyModel, tmp_path: Path, engine: str, key: str, value: object
) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    plan = uniform(source, engine)
    directory = tiny.write_result(source, plan, tmp_path / "out")
    blueprint, on_disk = draw_blueprint(source, plan), stored.find_checkpoint(directory)
    assert stored.planned(blueprint, on_disk).accounted.passed
    settings = {**quantization_config(blueprint), key: value}
    tiny.edit_config(directory, quantization_config=settings)
    check = stored.planned(blueprint, on_disk).accounted
    assert check.passed is False
    assert "bits in the file and" in check.detail


@pytest.mark.parametrize("module", ["model.layers.1.mlp.gate", "model.layers.2.self_attn.o_proj"])
def test_a_router_or_a_projection_that_settings_claim_is_found(
    opened: Callable[[str], ModelSource], module: str
) -> None:
    source = opened("qwen3_moe")
    plan = uniform(source, "vllm")
    settings = quantization_config(draw_blueprint(source, plan))
    settings["ignore"] = [name for name in settings["ignore"] if name != module]
    assert problems(source, plan, settings) == [
        f"{module} has 16 bits in the file and 4 by its settings"
    ]


@pytest.mark.parametrize(
    "settings", [{"quant_method": "fp8"}, {"quant_method": "gptq"}, {"quant_method": "auto-round"}]
)
def test_settings_that_cannot_be_read_are_a_problem(
    opened: Callable[[str], ModelSource], settings: dict[str, Any]
) -> None:
    source = opened("qwen3_moe")
    (found,) = problems(source, uniform(source, "gptqmodel"), settings)
    assert found.startswith("quantization_config cannot be read")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("part", ["qweight", "weight_packed"])
def test_the_width_is_read_off_the_shape(bits: int, part: str) -> None:
    words = 64 * bits // 32
    shape = (words, 96) if part == "qweight" else (96, words)
    assert stored_bits("x", 64, {f"x.{part}": Slot(f"x.{part}", "I32", shape)}) == bits


@pytest.mark.parametrize(
    ("pattern", "start"),
    [(r"^model\.layers\.1\.mlp\.experts\.2\.", "model.layers.1.mlp.experts.2."),
     (r"model\.layers\.1\.x$", "model.layers.1.x"), (r"^a|b", ""), (r"^(model\.|lm_head).*$", ""),
     (r"^ab*", "a"), (r"^a\.?b", "a"), (r"^a\.+b", "a."), (r"^a\d", "a"), (r"^ab{2}", "a"),
     ("", "")],
)  # fmt: skip
def test_what_every_match_begins_with(pattern: str, start: str) -> None:
    assert literal_start(pattern) == start


def test_a_pattern_for_each_of_many_experts_is_looked_up_fast() -> None:
    stems = [f"model.layers.{layer}.mlp.experts.{e}" for layer in range(48) for e in range(128)]
    patterns = _Patterns([r"^nothing$", *(f"^{re.escape(stem)}\\." for stem in stems), r"^.*gate"])
    started = time.perf_counter()
    for place, stem in enumerate(stems, start=1):
        assert patterns.matching(f"{stem}.up_proj") == [place]
        assert patterns.matching(f"{stem}.gate_proj") == [place, len(stems) + 1]
    assert time.perf_counter() - started < 5
