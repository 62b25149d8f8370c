"""The experts of a layer, run so that an observer learns what happens inside.

transformers fuses the routed experts of a layer into two tensors and lets one register the function
that runs them: ours is `experts_forward`. Shared experts and the MLPs of dense layers stay ordinary
modules and get hooks.

N rows (tokens) with H channels, E experts of I neurons, k of them chosen per row, n rows of one.
Dtypes are the model's.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from se_compress.errors import SourceError
from se_compress.model.observers import Observer
from se_compress.model.routing import select_rows, sum_routed


class _FusedExperts(Protocol):
    """What we use of transformers' module: gate_up_proj [E, 2I, H], down_proj [E, H, I]."""

    gate_up_proj: Tensor
    down_proj: Tensor
    is_transposed: bool
    has_bias: bool
    has_gate: bool
    observer: Observer | None

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


def experts_forward(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The routed experts' output [N, H], as transformers' own implementations compute it.

    The signature is transformers'. Raises SourceError for a layout of experts that no family of
    ours has.

    module         the fused experts, with the observer as an attribute
    hidden         [N, H]
    top_k_index    int64 [N, k]
    top_k_weights  [N, k]
    """
    experts = cast(_FusedExperts, module)
    if experts.is_transposed or experts.has_bias or not experts.has_gate:
        raise SourceError(f"{type(module).__name__}: this layout of fused experts is not supported")
    observer = cast(Observer | None, getattr(module, "observer", None)) or Observer()
    observer.routed(hidden, top_k_index, top_k_weights)
    if not observer.runs_experts:
        return torch.zeros_like(hidden)

    def run(expert: int, rows: Tensor, weights: Tensor) -> Tensor:
        # Both products see the padding of `select_rows`; what leaves here does not.
        inner = expert_inner(module, expert, select_rows(hidden, rows))
        output = nn.functional.linear(inner, experts.down_proj[expert])[: len(rows)]
        if expert in observer.silenced:
            output = torch.zeros_like(output)
        observer.expert(expert, rows, inner[: len(rows)], output, weights)
        return output

    return sum_routed(hidden, top_k_index, top_k_weights, experts.gate_up_proj.shape[0], run)


def expert_inner(module: nn.Module, expert: int, inputs: Tensor) -> Tensor:
    """The input [n, I] of a routed expert's down_proj, from the expert's inputs [n, H]."""
    experts = cast(_FusedExperts, module)
    return experts._apply_gate(nn.functional.linear(inputs, experts.gate_up_proj[expert]))


def dense_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook on the down_proj of a dense layer: reports input [B, T, I], output [B, T, H]."""
    observer = cast(Observer, module.observer)
    observer.dense(inputs[0].flatten(0, -2), output.flatten(0, -2))


def shared_hook(gate: nn.Module | None) -> Callable[..., Tensor]:
    """A forward hook on the shared expert, [..., H] to [..., H]: reports it, or silences it.

    gate  linear H -> 1 whose sigmoid weighs the shared expert's output; None if nothing does
    """

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        observer = cast(Observer, module.observer)
        hidden = inputs[0].flatten(0, -2)
        flat = output.flatten(0, -2)
        if "shared" in observer.silenced:
            return torch.zeros_like(output)
        if not observer.wants_inner:
            return output
        # A hook sees the module's input and output only: what lies between is computed again.
        mlp = cast(Any, module)
        inner = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        weights = torch.sigmoid(gate(hidden))[:, 0] if gate else hidden.new_ones(len(hidden))
        observer.expert("shared", torch.arange(len(hidden)), inner, flat, weights)
        return output

    return hook
