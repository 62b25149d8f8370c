"""The experts of a layer, run so that an observer learns what happens inside."""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from se_compress.errors import SourceError
from se_compress.model.observers import Observer
from se_compress.model.routing import select_rows, sum_routed


class _Instrumented(Protocol):
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
    """The routed experts' output [N, H], as transformers' own implementations compute it."""
    experts = cast(_Instrumented, module)
    if experts.is_transposed or experts.has_bias or not experts.has_gate:
        raise SourceError(f"{type(module).__name__}: this layout of fused experts is not supported")
    observer = cast(Observer | None, getattr(module, "observer", None)) or Observer()
    observer.routed(hidden, top_k_index, top_k_weights)
    if not observer.runs_experts:
        return torch.zeros_like(hidden)

    def run(expert: int, rows: Tensor, weights: Tensor) -> Tensor:
        inner = expert_inner(module, expert, select_rows(hidden, rows))
        output = nn.functional.linear(inner, experts.down_proj[expert])[: len(rows)]
        if expert in observer.silenced:
            output = torch.zeros_like(output)
        observer.expert(expert, rows, inner[: len(rows)], output, weights)
        return output

    return sum_routed(hidden, top_k_index, top_k_weights, experts.gate_up_proj.shape[0], run)


def expert_inner(module: nn.Module, expert: int, inputs: Tensor) -> Tensor:
    """The input [n, I] of a routed expert's down_proj, from inputs [n, H]."""
    experts = cast(_Instrumented, module)
    return experts._apply_gate(nn.functional.linear(inputs, experts.gate_up_proj[expert]))


def dense_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    observer = cast(Observer, module.observer)
    observer.dense(inputs[0].flatten(0, -2), output.flatten(0, -2))


def shared_hook(gate: nn.Module | None, down: str) -> Callable[..., Tensor]:
    """A hook on the shared expert: reports it, and silences it if asked to."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        observer = cast(Observer, module.observer)
        hidden = inputs[0].flatten(0, -2)
        flat = output.flatten(0, -2)
        if "shared" in observer.silenced:
            return torch.zeros_like(output)
        if not observer.wants_inner:
            return output
        inner = module.act_fn(module.gate_proj(hidden)) * module.up_proj(hidden)  # type: ignore[operator]
        weights = torch.sigmoid(gate(hidden))[:, 0] if gate else hidden.new_ones(len(hidden))
        observer.expert("shared", torch.arange(len(hidden)), inner, flat, weights)
        return output

    return hook
