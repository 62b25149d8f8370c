"""Routed experts that transformers runs by code of their own, put behind its experts interface.

All that is computed of experts here asks their module how they compute, and is handed rows, chosen
experts and weights: transformers' experts interface. Where a model type has none, its blocks are
replaced by ours: they compute the same bit for bit, and their weights keep their names.

N rows with H channels, E experts of I neurons.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# What runs the experts of a layer: their module, hidden states [N, H], the chosen experts [N, k]
# and their weights [N, k] -> output [N, H].
Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class InterfacedExperts(nn.Module):
    """Fused experts, gate_up_proj [E, H, 2I] and down_proj [E, I, H], that say how they compute.

    forward_by  runs them; set by `run_experts_by`
    """

    has_gate, has_bias, is_transposed = True, False, True
    forward_by: Forward

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = own.gate_up_proj, own.down_proj
        self.act_fn = own.act_fn

    def _apply_gate(self, product: Tensor) -> Tensor:
        """The input [n, I] of down_proj, from what gate and up make of the inputs, [n, 2I]."""
        gate, up = product.chunk(2, dim=-1)
        made: Tensor = self.act_fn(gate) * up
        return made

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.forward_by(self, hidden, top_k_index, top_k_weights)


class ScaledInputs(nn.Module):
    """Stands for a block that weighs what its experts are given, and adds up what they put out.

    transformers hands every expert all rows, times their scores, which are 0 for all experts but
    the chosen one; and of nothing an expert makes nothing. So the chosen one is given its rows
    times their scores, and its outputs have the weight 1. A row that went to several experts would
    be another one for each; such models are refused when they are opened (opening/config_rules.py).
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.experts = InterfacedExperts(block.experts)
        self.router, self.shared_expert = block.router, block.shared_expert

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Output [N, H] and the router's logits [N, E], for hidden states [..., H]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        scores, logits = self.router(rows)
        (chosen,) = torch.topk(logits, self.router.top_k, dim=1).indices.unbind(1)
        given = rows * scores.gather(1, chosen[:, None])
        ones = torch.ones_like(chosen[:, None], dtype=rows.dtype)
        routed = self.experts(given, chosen[:, None], ones)
        return self.shared_expert(rows) + routed, logits


# Class of transformers' block -> what takes its place.
_BLOCKS: Mapping[str, type[nn.Module]] = {"Llama4TextMoe": ScaledInputs}


def with_interface(model: Any) -> Any:
    """The model, its blocks without the experts interface replaced, in place."""
    for path, module in [*model.named_modules()]:
        if replacement := _BLOCKS.get(type(module).__name__):
            model.set_submodule(path, replacement(module))
    return model


def run_experts_by(model: Any, name: str, forward: Forward) -> None:
    """Let a function run the routed experts of a model, whoever has them.

    name  what it is called in transformers' table
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, forward)
    model.set_experts_implementation(name)
    for module in model.modules():
        if isinstance(module, InterfacedExperts):
            module.forward_by = forward
