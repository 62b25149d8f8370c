"""The profile of every model type finds the super expert that was planted in it and confirms it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOS, plain_model, random_tokens, recipe
from tiny_types import CONFIGS
from torch import Tensor

from se_compress.artifacts import ExpertId, RunOptions
from se_compress.model.binding import experts_modules, layer_of
from se_compress.model.experts import fused_experts
from se_compress.opening.source import open_source
from se_compress.profiling.profiler import profile_experts

TOKENS = [[BOS, *row] for row in random_tokens(6, 23)]
MASSIVE, SIZE = 7, 2e4
# Norms that routed outputs pass on their way into the stream: no output is massive behind them but
# by their weight.
NORMS: Mapping[str, tuple[str, ...]] = {
    "afmoe": ("post_mlp_layernorm",),
    "axk1": ("mlp.post_mlp_layernorm",),
    "flex_olmo": ("post_feedforward_layernorm",),
    "gemma4_text": ("post_feedforward_layernorm",),
}


def chosen_of(rows: Tensor, module: Any) -> tuple[Tensor, Tensor]:
    """What Llama 4's experts are given, [E * N, H] with zeros for all that are not chosen, as the
    chosen one's rows [N, H], and its number, [N, 1]."""
    each = rows.view(len(module.down_proj), -1, rows.shape[-1])
    chosen = each.abs().sum(-1).argmax(0)
    return each[chosen, torch.arange(len(chosen))], chosen[:, None]


@torch.no_grad()
def plant(model: Any, model_type: str) -> ExpertId:
    """Let an expert that is used write about SIZE on channel MASSIVE; a layer and an expert."""
    # Behind it nothing answers: flex_olmo's experts are given the stream as it is.
    path, module = experts_modules(model)[-1]
    layer = layer_of(path)
    assert layer is not None
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
        calls.append((inputs[0], inputs[1]) if inputs[1:] else chosen_of(inputs[0], module))

    hook = module.register_forward_pre_hook(keep)
    model(torch.tensor(TOKENS), use_cache=False)
    hook.remove()
    ((hidden, chosen),) = calls
    experts = fused_experts(module)
    expert = int(torch.bincount(chosen.flatten())[: len(experts)].argmax())
    inputs = hidden.view(-1, hidden.shape[-1])[(chosen == expert).any(dim=-1)]
    peak = experts.output(expert, experts.inner(expert, inputs))[:, MASSIVE].abs().max()
    experts.down_proj[expert, MASSIVE] *= SIZE / peak
    whole = model.get_submodule(f"{path.partition('layers.')[0]}layers.{layer}")
    for norm in NORMS.get(model_type, ()):
        whole.get_submodule(norm).weight[MASSIVE] = 2000
    return ExpertId(layer, expert)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_planted_super_expert_is_found(
    tiny_type: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    model = plain_model(tiny_type(model_type))
    planted = plant(model, model_type)
    model.save_pretrained(tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    profile = profile_experts(source, TOKENS, recipe(source.path), RunOptions(batch_tokens=144))
    (found,) = profile.super_experts
    assert found.id == planted
    assert found.channel == MASSIVE
    assert found.confirmed
