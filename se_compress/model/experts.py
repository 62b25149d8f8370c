"""The experts of a layer, run so that an observer learns what each of them does.

transformers 5 fuses a layer's experts into two tensors, and hooks on expert modules see nothing. It
does let one register an experts function: `experts_forward`. All that is computed of an expert,
here or in a stage, goes through `RoutedExperts`, which knows every form that its decorator
`use_experts_implementation` knows: with and without a gate, with biases, transposed, interleaved,
with an activation of the family's own.

N rows (tokens of a batch) with H channels, E experts of I neurons, k of them chosen per row, n rows
of one. R is 2I, or I without a gate. Dtypes are the model's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from se_compress.artifacts import Role
from se_compress.model.observers import Observer
from se_compress.model.routing import select_rows, sum_routed


@dataclass(frozen=True)
class RoutedExperts:
    """The fused routed experts of a loaded layer, as one sees them without knowing how they lie.

    module  transformers' module
    """

    module: Any

    def __len__(self) -> int:
        return len(self.down_proj)

    @property
    def gate_up_proj(self) -> Tensor:
        """[E, R, H]: rows of gate and of up, or of up alone. A view of the live weights."""
        module = self.module
        return self._rows_first(module.gate_up_proj if module.has_gate else module.up_proj)

    @property
    def down_proj(self) -> Tensor:
        """[E, H, I]: a view of the live weights."""
        return self._rows_first(self.module.down_proj)

    def _rows_first(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if self.module.is_transposed else weight

    @property
    def roles(self) -> Mapping[Role, slice]:
        """The projections in `gate_up_proj`, and which of its rows are theirs."""
        if not self.module.has_gate:
            return {"up": slice(None)}
        if not self.module.is_concatenated:
            return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
        half = self.gate_up_proj.shape[1] // 2
        return {"gate": slice(0, half), "up": slice(half, None)}

    def part(self, name: str, role: Role) -> Tensor:
        """The part of one projection in a live tensor, a view: [E, rows, columns] of a weight,
        [E, rows] of a bias.

        name  what transformers calls the tensor within the module
        """
        return self.rows_of(cast(Tensor, getattr(self.module, name)), role)

    def rows_of(self, tensor: Tensor, role: Role) -> Tensor:
        """The same of a tensor that is given, such as a live one's gradient."""
        rows_first = tensor if tensor.dim() == 2 else self._rows_first(tensor)
        return rows_first if role == "down" else rows_first[:, self.roles[role]]

    def inner(self, expert: int, inputs: Tensor) -> Tensor:
        """The input [n, I] of an expert's down_proj, from the expert's inputs [n, H]."""
        return self.activated(expert, nn.functional.linear(inputs, self.gate_up_proj[expert]))

    def activated(self, expert: int | list[int], product: Tensor) -> Tensor:
        """The input [n, I] of down_proj, from what gate and up make of the inputs, [n, R].

        The product may have another dtype than the model, and is without biases. That of several
        experts is [experts, n, R].
        """
        module = self.module
        if module.has_bias:
            bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
            product = product + bias[expert].to(product.dtype).unsqueeze(-2)
        return cast(
            Tensor, module._apply_gate(product) if module.has_gate else module.act_fn(product)
        )

    def output(self, expert: int, inner: Tensor, down: Tensor | None = None) -> Tensor:
        """An expert's output [n, H], not yet weighted, from the input [n, I] of its down_proj.

        down  [H, I], stands in for its weight
        """
        weight = self.down_proj[expert] if down is None else down
        made = nn.functional.linear(inner, weight)
        if self.module.has_bias:
            made = made + self.module.down_proj_bias[expert].to(made.dtype)
        return made

    def stack(self, experts: list[int], gate_up: Tensor, down: Tensor, inputs: Tensor) -> Tensor:
        """The outputs [experts, n, H] of several experts at once, not yet weighted.

        gate_up, down  [experts, R, H] and [experts, H, I], stand in for their weights
        inputs         of each, [experts, n, H]
        """
        inner = self.activated(experts, torch.bmm(inputs, gate_up.mT))
        made = torch.bmm(inner, down.mT)
        if self.module.has_bias:
            made = made + self.module.down_proj_bias[experts].to(made.dtype).unsqueeze(-2)
        return made


def experts_forward(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The routed experts' output [N, H], as transformers' own implementations compute it.

    The signature is transformers'.

    module         the fused experts, with the observer as an attribute
    hidden         [N, H]
    top_k_index    int64 [N, k]; numbers that no expert has (experts that do nothing) add nothing
    top_k_weights  [N, k]
    """
    experts = RoutedExperts(module)
    observer = cast(Observer | None, getattr(module, "observer", None)) or Observer()
    observer.routed(hidden, top_k_index, top_k_weights)
    if not observer.runs_experts:
        return observer.routed_output(hidden)

    def run(expert: int, rows: Tensor, weights: Tensor) -> Tensor:
        # Both products see the padding of `select_rows`; what leaves here does not.
        inner = experts.inner(expert, select_rows(hidden, rows))
        output = experts.output(expert, inner)[: len(rows)]
        if expert in observer.silenced:
            output = torch.zeros_like(output)
        observer.expert(expert, rows, inner[: len(rows)], output, weights)
        return output

    return sum_routed(hidden, top_k_index, top_k_weights, len(experts), run)


def dense_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook on the down_proj of a dense layer: reports input [B, T, I], output [B, T, H]."""
    observer = cast(Observer, module.observer)
    observer.dense(inputs[0].flatten(0, -2), output.flatten(0, -2))


def shared_hooks(
    up: nn.Module, down: nn.Module, gate: nn.Module | None
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Forward hooks that report the shared expert or silence it, with the modules they are for.

    up, down  linears of the shared expert: H to I, and I to H
    gate      linear H -> 1 whose sigmoid weighs the shared expert's output; None if nothing does
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [inputs[0].flatten(0, -2)]
        cast(Observer, module.observer).shared_input(seen[0])

    def report(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        observer = cast(Observer, module.observer)
        hidden = seen.pop()
        if "shared" in observer.silenced:
            return torch.zeros_like(output)
        if observer.wants_inner:
            weights = torch.sigmoid(gate(hidden))[:, 0] if gate else hidden.new_ones(len(hidden))
            rows = torch.arange(len(hidden))
            inner, made = inputs[0].flatten(0, -2), output.flatten(0, -2)
            observer.expert("shared", rows, inner, made, weights)
        return output

    return [(up, keep), (down, report)]
