"""Blocks of experts that transformers runs by code of its own compute the same behind ours."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDDEN, VOCABULARY, plain_model, random_tokens
from torch import Tensor, nn

from se_compress.model.binding import meta_model
from se_compress.model.checkpoint import open_tensors
from se_compress.model.own_experts import InterfacedExperts, run_experts_by, with_interface
from se_compress.model.whole import load_whole
from se_compress.opening.source import open_source

TinyType = Callable[[str], Path]
TOKENS = torch.tensor(random_tokens(2, 40))


def one_by_one(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Experts in a loop over rows."""
    outputs = []
    for row, (expert,), (weight,) in zip(hidden, chosen.tolist(), weights, strict=True):
        gate, up = (row @ module.gate_up_proj[expert]).chunk(2)
        outputs.append(weight * ((module.act_fn(gate) * up) @ module.down_proj[expert]))
    return torch.stack(outputs)


def blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "shared_expert")]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_block_with_scaled_inputs_is_that_of_transformers(
    tiny_type: TinyType, dtype: torch.dtype, limit: float
) -> None:
    model = plain_model(tiny_type("llama4_text")).to(dtype)
    ours = with_interface(copy.deepcopy(model))
    run_experts_by(ours, "tests", one_by_one)
    hidden = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = hidden.view(-1, HIDDEN)
    assert len(blocks(ours)) == len(blocks(model)) == 2
    for own, theirs in zip(blocks(ours), blocks(model), strict=True):
        assert type(own.experts) is InterfacedExperts is not type(theirs.experts)
        (found, logits), (expected, wanted) = own(hidden), theirs(hidden)
        assert torch.equal(logits, wanted)
        assert (found - expected).norm() < limit * expected.norm()
        # Experts that are given their rows as they are compute something else.
        best, chosen = logits.topk(1)
        weighed = own.shared_expert(rows) + one_by_one(own.experts, rows, chosen, best.sigmoid())
        assert (weighed - expected).norm() > 0.05 * expected.norm()


def test_weights_keep_their_names(tiny_type: TinyType) -> None:
    model = plain_model(tiny_type("llama4_text"))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    after = with_interface(model).state_dict()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == before


def test_gradients_reach_the_router_as_in_transformers(tiny_type: TinyType) -> None:
    source = open_source(str(tiny_type("llama4_text")))
    model = load_whole(source, open_tensors(source.tensors), torch.device("cpu"))
    plain = plain_model(source.path)
    target = torch.randn(2, 40, VOCABULARY, generator=torch.Generator().manual_seed(2))
    for weights in model.router_weights().values():
        weights.requires_grad_(True)
    expected = plain(TOKENS, use_cache=False).logits
    made = model.logits(TOKENS)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    for logits in (made, expected):
        (logits * target).sum().backward()
    for name, weights in model.router_weights().items():
        wanted = plain.get_parameter(name).grad
        assert wanted is not None
        assert wanted.norm() > 0
        torch.testing.assert_close(weights.grad, wanted, rtol=1e-3, atol=1e-3)
    assert len(model.router_weights()) == 2


def test_rows_for_several_experts_are_not_run(tiny_type: TinyType) -> None:
    config = plain_model(tiny_type("llama4_text")).config.to_dict()
    model = meta_model(config, num_experts_per_tok=2)
    with pytest.raises(ValueError, match="too many values to unpack"):
        blocks(model)[0](torch.zeros(3, HIDDEN, device="meta", dtype=torch.bfloat16))
