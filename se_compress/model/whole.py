"""A whole model in memory, through which gradients flow: for models that are small enough.

transformers' own model, filled from a checkpoint. Its routed experts run as stacks (routing.py), so
that gradients reach them, the routers and whatever lies before, and no two of them meet at one
place in an order that a device would choose.

B sequences of T positions, N = B T rows with H channels, E experts, k chosen per row, V words.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from se_compress.artifacts import ModelSource
from se_compress.model.binding import Binding, bind_source, experts_modules, layer_of, meta_model
from se_compress.model.checkpoint import Reader
from se_compress.model.experts import RoutedExperts
from se_compress.model.live import Weights
from se_compress.model.own_experts import run_experts_by
from se_compress.model.routing import bunched

# What our experts function is called in transformers' table.
IMPLEMENTATION = "se_compress_whole"


@dataclass(frozen=True)
class WholeModel:
    """A model in memory, float32.

    source   config and tensors of its checkpoint
    model    transformers' model; no parameter asks for a gradient of itself
    binding  which tensor of the checkpoint is which of the model, routed experts left out
    """

    source: ModelSource
    model: Any
    binding: Binding

    def experts(self) -> Iterator[tuple[int, RoutedExperts]]:
        """All routed experts of each layer that has some."""
        for path, module in experts_modules(self.model):
            layer = layer_of(path)
            assert layer is not None
            yield layer, module.all_experts

    def forget_gradients(self) -> None:
        """Clear those of all parameters."""
        self.model.zero_grad()
        for _, experts in self.experts():
            experts.gate_up_proj.grad = experts.down_proj.grad = None

    def router_weights(self) -> dict[str, nn.Parameter]:
        """The matrices of the routers, [E, H] of most families, by their names in the checkpoint.

        Those that the checkpoint holds as the model does; gates of shared experts are none.
        """
        return self._parameters(self.source.router_weights)

    def norm_weights(self) -> dict[str, nn.Parameter]:
        """Those of the norms in its layers, in the same way."""
        return self._parameters(
            name
            for name, info in self.source.tensors.items()
            # Layers for multi-token prediction have norms that no live model has.
            if info.kind == "norm" and info.layer is not None and name in self.binding.live_of
        )

    def _parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Those of some tensors of the checkpoint that it holds as the model does."""
        lives = {name: self.binding.live_of[name] for name in names}
        return {
            name: self.model.get_parameter(live)
            for name, live in lives.items()
            if self.binding.bound[live].converter is None
        }

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def logits(self, tokens: Tensor) -> Tensor:
        """float32 [B, T, V], of token ids int64 [B, T]."""
        made: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return made.float()


def load_whole(source: ModelSource, read: Reader, device: torch.device) -> WholeModel:
    """The model of a checkpoint, all of it in memory, float32.

    source  config and tensors of the checkpoint
    read    reads a tensor by its name in the source; its values may be those of a compressed model

    Raises SourceError for a weight that is missing, is NaN or infinite.
    """
    where = str(source.path / "config.json")
    # The fused attention kernels of CUDA add up gradients in an order of their own.
    attention = "eager" if device.type == "cuda" else None
    model = meta_model(source.config, where=where, dtype=torch.float32, attention=attention)
    run_experts_by(model, IMPLEMENTATION, stacked_experts)
    binding = bind_source(model, source)
    Weights(source, read, model, binding, device).fill(model, "")
    for _, module in experts_modules(model):
        module.all_experts = module.layer_experts.load(range(len(module.layer_experts)))
    return WholeModel(source, model.requires_grad_(False), binding)


def stacked_experts(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The routed experts' output [N, H]; the signature is transformers'.

    module         the fused experts, with all of them as an attribute
    hidden         [N, H]
    top_k_index    int64 [N, k]; numbers that no expert has add nothing
    top_k_weights  their routing weights, [N, k]


    A gradient is added up over the k choices of a row by one sum: each choice has a place of its
    own (`bunched`), and rows that fill a stack up get the gradient zero.
    """
    experts = cast(RoutedExperts, module.all_experts)
    gate_up, down, count = experts.gate_up_proj, experts.down_proj, len(experts)
    routing = bunched(top_k_index, count)
    sizes = [bunch.rows.numel() for bunch in routing.bunches]
    choice_at = routing.places.new_zeros(sum(sizes))
    there = (top_k_index < count).reshape(-1)
    choices = torch.arange(len(there), device=hidden.device)[there]
    choice_at[routing.places.reshape(-1)[there]] = choices
    each = hidden[:, None].expand(-1, top_k_index.shape[1], -1).reshape(-1, hidden.shape[1])
    made = []
    for bunch, inputs in zip(
        routing.bunches, torch.split(each.index_select(0, choice_at), sizes), strict=True
    ):
        stacked = inputs.view(*bunch.rows.shape, -1)
        outputs = experts.stack(bunch.experts, gate_up[bunch.experts], down[bunch.experts], stacked)
        made.append(outputs.flatten(0, 1))
    outputs = torch.cat(made).index_select(0, routing.places.reshape(-1))
    weights = top_k_weights.reshape(-1).masked_fill(~there, 0).to(outputs.dtype)
    total = (outputs * weights[:, None]).view(*top_k_index.shape, -1).sum(1)
    return total.to(hidden.dtype)
