"""The same flow on a CUDA device: nothing in it may depend on where the tensors are.

Needs a GPU; elsewhere it is skipped and says so.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from se_compress.artifacts import CompressionPlan, ExpertProfile, RunOptions, ValidationReport
from se_compress.compression.execute import compress
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.profiling.profiler import profile_experts
from se_compress.validation.validator import validate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def _flow(
    model: Path, output: Path, device: str
) -> tuple[ExpertProfile, CompressionPlan, ValidationReport]:
    recipe = tiny.recipe(
        model,
        output,
        target="gptqmodel",
        quantization={"group_size": 32},
        validation={
            "data": "unused.txt",
            "generation": {"prompts": 2, "prompt_tokens": 8, "tokens": 4},
        },
    )
    source, options = open_source(str(model)), RunOptions(device=device)
    tokens = tiny.random_tokens(8, 32)
    profile = profile_experts(source, tokens, recipe, options)
    plan = make_plan(source, profile, recipe)
    compress(source, plan, tokens, recipe, output, options)
    held_out = tiny.random_tokens(4, 32, seed=1)
    return profile, plan, validate(source, plan, output, held_out, recipe, options)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_gpu_agrees_with_cpu(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    cpu_profile, cpu_plan, cpu = _flow(tiny_model(family), tmp_path / "cpu", "cpu")
    gpu_profile, gpu_plan, gpu = _flow(tiny_model(family), tmp_path / "gpu", "cuda")
    for ours, theirs in zip(cpu_profile.experts, gpu_profile.experts, strict=True):
        assert ours.id == theirs.id
        assert theirs.tokens == pytest.approx(ours.tokens, abs=2)
        assert theirs.peak == pytest.approx(ours.peak, rel=1e-2)
    assert [d.bits for d in cpu_plan.experts] == [d.bits for d in gpu_plan.experts]
    for ours, theirs in zip(cpu.records, gpu.records, strict=True):
        assert [e.tokens for e in theirs.experts] == pytest.approx(
            [e.tokens for e in ours.experts], abs=2
        )
        assert theirs.hidden_error == pytest.approx(ours.hidden_error, rel=0.1, abs=1e-3)
    assert gpu.perplexity_source == pytest.approx(cpu.perplexity_source, rel=1e-3)
    assert gpu.check("kl_divergence").value == pytest.approx(
        cpu.check("kl_divergence").value, rel=0.1, abs=1e-4
    )
    assert gpu.check("tensors_accounted").passed
