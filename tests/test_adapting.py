"""What an engine asks of a model is written for it, and changes nothing that the model computes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from se_compress.artifacts import CompressionPlan, ModelSource
from se_compress.engines.adapting import adaptations, adapted
from se_compress.engines.blueprint import draw_blueprint
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.validation import stored

TinyModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def unbiased(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = tmp_path_factory.mktemp("unbiased") / "model"
    return open_source(str(tiny.build(directory, "qwen2_moe", qkv_bias=False)))


def plan_for(source: ModelSource, target: str, **sections: Any) -> CompressionPlan:
    settings = {
        "policy": {"bits": 4, "protect": "none"},
        "quantization": {"method": "rtn", "group_size": 32},
        **sections,
    }
    return make_plan(source, None, tiny.recipe(source.name, target=target, **settings))


def bias_names(source: ModelSource) -> list[str]:
    layers = range(source.layer_count)
    return [f"model.layers.{n}.self_attn.{p}_proj.bias" for n in layers for p in "qkv"]


@pytest.mark.parametrize("packed", [False, True])
def test_vllm_gets_the_biases_that_it_takes_for_granted(
    unbiased: ModelSource, tmp_path: Path, packed: bool
) -> None:
    policy = {"bits": 4, "protect": "none", "other_bits": 4 if packed else 16}
    plan = plan_for(unbiased, "vllm", policy=policy)
    (note,) = (note for note in plan.notes if "uninitialised" in note)
    assert note.startswith("vllm gives every qwen2_moe biases of q, k and v: 9 biases of zero")
    directory = tiny.write_result(unbiased, plan, tmp_path / "out")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config["qkv_bias"] is True
    written = load_file(directory / "model.safetensors")
    assert {name for name in written if name.endswith(".bias")} == set(bias_names(unbiased))
    for name in bias_names(unbiased):
        rows = unbiased.tensors[name.replace(".bias", ".weight")].shape[0]
        assert torch.equal(written[name], torch.zeros(rows, dtype=torch.bfloat16))
    found = read_headers(directory)
    account = stored.planned(
        draw_blueprint(unbiased, plan), stored.find_checkpoint(directory)
    ).accounted
    assert (account.passed, account.value) == (True, 1.0)
    assert sum(info.size_bytes for info in found.values()) == plan.size_bytes


def test_the_biases_change_no_logit(unbiased: ModelSource, tmp_path: Path) -> None:
    plan = plan_for(unbiased, "vllm", quantization={"method": "none"})
    directory = tiny.write_result(unbiased, plan, tmp_path / "out")
    tokens = torch.tensor(tiny.random_tokens(1, 24))
    with torch.no_grad():
        plain, biased = (
            tiny.plain_model(path)(tokens).logits for path in (unbiased.path, directory)
        )
    assert torch.equal(plain, biased)


@pytest.mark.parametrize("target", ["transformers", "sglang"])
def test_who_reads_the_key_gets_no_biases(unbiased: ModelSource, target: str) -> None:
    assert adapted(unbiased, target) is unbiased
    assert adaptations(unbiased, target) == ()


def test_a_model_that_has_them_is_left_alone(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen2_moe")))
    assert adapted(source, "vllm") is source
    assert adaptations(source, "vllm") == ()


def test_a_pruned_model_gets_them_too(unbiased: ModelSource, tmp_path: Path) -> None:
    plan = plan_for(unbiased, "vllm")
    fewer = (
        replace(d, action="prune", bits=None)
        if d.expert in (0, 1)
        else replace(d, becomes=d.expert - 2)
        for d in plan.experts
        if d.expert != "shared"
    )
    shared = (d for d in plan.experts if d.expert == "shared")
    plan = replace(plan, experts=(*fewer, *shared))
    directory = tiny.write_result(unbiased, plan, tmp_path / "out")
    found = read_headers(directory)
    account = stored.planned(
        draw_blueprint(unbiased, plan), stored.find_checkpoint(directory)
    ).accounted
    assert (account.passed, account.value) == (True, 1.0)
    assert set(bias_names(unbiased)) <= found.keys()


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize("has", [{}, {"topk_method": "noaux_tc"}, {"scoring_func": "sigmoid"}])
def test_deepseek_v3_says_how_its_router_works(
    tmp_path: Path, target: str, has: dict[str, str]
) -> None:
    directory = tiny.build(tmp_path / "model", "deepseek_v3")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    plain = {k: v for k, v in config.items() if k not in ("topk_method", "scoring_func")}
    (directory / "config.json").write_text(json.dumps(plain | has), encoding="utf-8")
    source = open_source(str(directory))
    plan = plan_for(source, target, quantization={"method": "none"})
    missing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}.items() - has.items()
    assert all(f"{key}: {value}" in " ".join(plan.notes) for key, value in missing)
    out = tiny.write_result(source, plan, tmp_path / "out")
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (written["topk_method"], written["scoring_func"]) == ("noaux_tc", "sigmoid")
    told = adapted(source, "transformers")
    assert told is source


def test_what_the_config_says_already_is_kept(tmp_path: Path) -> None:
    directory = tiny.build(tmp_path / "model", "deepseek_v3")
    said = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    tiny.edit_config(directory, **said)
    source = open_source(str(directory))
    assert adapted(source, "vllm") is source
