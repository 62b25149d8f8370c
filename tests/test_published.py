"""Published models with coded weights, as they lie on the Hub: names, shapes, sizes, and a plan."""

from math import prod
from pathlib import Path

import pytest
from published import PUBLISHED, write_published
from tiny import recipe

from se_compress.artifacts import ROLES
from se_compress.opening.families import ALIASES
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan

# Decoder layers, layers with experts, experts of one, of a token.
COUNTS = {
    "deepseek-ai/DeepSeek-V3": (61, 58, 256, 8),
    "moonshotai/Kimi-K2-Instruct": (61, 60, 384, 8),
    "moonshotai/Kimi-K2-Thinking": (61, 60, 384, 8),
    "openai/gpt-oss-20b": (24, 24, 32, 4),
    "openai/gpt-oss-120b": (36, 36, 128, 4),
    "Qwen/Qwen3-30B-A3B-FP8": (48, 48, 128, 8),
    "MiniMaxAI/MiniMax-M2": (62, 62, 256, 8),
}


# Billions of parameters as their makers tell (arXiv:2508.10925; the model cards).
PARAMETERS = {
    "openai/gpt-oss-20b": "20.9",
    "openai/gpt-oss-120b": "116.8",
    "Qwen/Qwen3-30B-A3B-FP8": "30.5",
    "MiniMaxAI/MiniMax-M2": "229",
    "moonshotai/Kimi-K2-Instruct": "1026",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_coded_model_has_the_parameters_that_its_makers_tell(tmp_path: Path, name: str) -> None:
    """Codes, scales and fused tensors are counted as the weights that they stand for."""
    source = open_source(str(write_published(name, tmp_path / "model")))
    found = sum(prod(info.shape) for info in source.tensors.values()) / 1e9
    told = PARAMETERS[name]
    assert f"{found:.{len(told.partition('.')[2])}f}" == told


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_opens_with_the_published_totals(tmp_path: Path, name: str) -> None:
    published = PUBLISHED[name]
    source = open_source(str(write_published(name, tmp_path / "model")))
    disk = read_headers(source.path)
    assert len(disk) == published.names
    assert source.size_bytes == sum(info.size_bytes for info in disk.values())
    assert round(source.size_bytes / 1e9, 1) == published.size
    layers, sparse, experts, chosen = COUNTS[name]
    assert (source.layer_count, len(source.moe_layers)) == (layers, sparse)
    assert (source.expert_count, source.top_k) == (experts, chosen)
    model_type = published.config["model_type"]
    assert source.family == ALIASES.get(model_type, model_type)
    routed = [roles for i, roles in source.experts.items() if i.expert != "shared"]
    assert len(routed) == sparse * experts
    assert all(roles[role].dtype == "BF16" for roles in routed for role in ROLES)
    assert all(roles[role].stored for roles in routed for role in ROLES)


def test_a_plan_of_deepseek_v3(tmp_path: Path) -> None:
    """Unquantised it is as large as its BF16 conversions on the Hub, multi-token prediction too."""
    path = write_published("deepseek-ai/DeepSeek-V3", tmp_path / "model")
    source = open_source(str(path))
    chosen = recipe(path, target="transformers", quantization={"method": "none"})
    plan = make_plan(source, None, chosen)
    assert plan.source_size_bytes == source.size_bytes
    in_16_bits = sum(info.size_bytes for info in source.tensors.values())
    assert plan.size_bytes == in_16_bits
    assert round(plan.size_bytes / 1e9, 1) == 1369.0
    assert source.tensors["model.layers.61.eh_proj.weight"].stored is None
    assert source.tensors["model.layers.61.mlp.experts.255.up_proj.weight"].stored is not None
    coded = sum(info.stored is not None for info in source.tensors.values())
    note = (
        f"{coded} weights of the source are fp8; what is not quantised here is written in 16 bits"
    )
    assert note in plan.notes
    quantised = recipe(
        path, target="vllm", quantization={"method": "rtn", "group_size": 128}, policy={"bits": [4]}
    )
    smaller = make_plan(source, None, quantised)
    assert smaller.size_bytes < 0.65 * source.size_bytes
