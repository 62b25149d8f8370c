"""What distilling trains of a result that lies on disk: scales of packed experts, routers, norms.

Each kind has parameters that an optimiser moves, relative to where they started, and puts into
the live model what the file would then hold, rounded as it is stored there. So what is measured is
what will be written, and gradients pass the rounding as if it were not there.

n experts of a layer, R rows, C columns, G groups of a row, E experts, H channels.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from se_compress.artifacts import ExpertId, Role, TensorInfo
from se_compress.compression.stacks import Packed, grid_of, packed_rows
from se_compress.engines.blueprint import Blueprint
from se_compress.formats import FORMATS, PlannedTensor
from se_compress.model.checkpoint import TORCH_DTYPES, Reader, open_tensors
from se_compress.model.experts import RoutedExperts
from se_compress.model.whole import WholeModel
from se_compress.quant.grid import Grid, QuantizedStack, dequantize
from se_compress.quant.tuned import ScaledStack

PLAIN_REACH = 4.0  # the most by which a number is changed, of the tensor's root mean square
WHOLE = slice(None)


class Trained(Protocol):
    """Some parameters of a result.

    kind       "scales", "routers" or "norms"
    parameter  float32: by how much they differ from their start, relative
    """

    kind: str
    parameter: Tensor

    def put(self) -> None:
        """Bring the parameter back into its bounds, and the live model up to date with it."""

    def follow(self) -> None:
        """Take the live model's gradient for the parameter's own."""

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the result as they are now, by their names there."""


class Scales:
    """The scales of one projection of the experts of a layer that are packed at one width."""

    kind = "scales"

    def __init__(
        self, experts: RoutedExperts, role: Role, members: Mapping[int, PlannedTensor],
        stack: QuantizedStack, form: str,
    ) -> None:  # fmt: skip
        """members  index in the live module -> their tensors, in the order of the stack"""
        self._experts, self._role = experts, role
        self._members, self._form = members, form
        self._scaled = ScaledStack(stack)
        self.parameter = self._scaled.ratios
        _fused_tensor(experts, role).requires_grad_()

    def put(self) -> None:
        self._scaled.keep_in_bounds()
        with torch.no_grad():
            live = _rows(self._experts, _fused_tensor(self._experts, self._role), self._role)
            live[[*self._members]] = dequantize(self._scaled.hardened())

    def follow(self) -> None:
        gradient = _gradient_of(_fused_tensor(self._experts, self._role))
        self._scaled.follow(_rows(self._experts, gradient, self._role)[[*self._members]])

    def stored(self) -> dict[str, Tensor]:
        stack, packed = self._scaled.hardened(), Packed()
        for i, tensor in enumerate(self._members.values()):
            packed |= packed_rows(tensor.module, stack, i, WHOLE, self._form)
        return {
            f"{m}.{part}": value for m, parts in packed.items() for part, value in parts.items()
        }


class Plain:
    """A tensor that is stored as it is: the matrix of a router, [E, H], or the weight of a norm."""

    def __init__(self, kind: str, live: nn.Parameter, tensor: PlannedTensor) -> None:
        self.kind = kind
        self._live, self._tensor = live.requires_grad_(), tensor
        self._start = live.detach().clone()
        self._size = self._start.square().mean().sqrt()
        self.parameter = torch.zeros_like(self._start)

    def put(self) -> None:
        with torch.no_grad():
            self.parameter.clamp_(-PLAIN_REACH, PLAIN_REACH)
            self._live.copy_(self._stored())

    def _stored(self) -> Tensor:
        exact = self._start + self._size * self.parameter
        return exact.to(TORCH_DTYPES[self._tensor.info.dtype])

    def follow(self) -> None:
        self.parameter.grad = _gradient_of(self._live) * self._size

    def stored(self) -> dict[str, Tensor]:
        return {self._tensor.name: self._stored()}


def _gradient_of(live: Tensor) -> Tensor:
    """Zeros for what no token of a step has passed."""
    return torch.zeros_like(live) if live.grad is None else live.grad


def _fused_tensor(experts: RoutedExperts, role: Role) -> Tensor:
    """The live tensor [E, R, C] that has a projection of all experts of a layer."""
    return experts.down_proj if role == "down" else experts.gate_up_proj


def _rows(experts: RoutedExperts, tensor: Tensor, role: Role) -> Tensor:
    """Those of a projection in such a tensor, or in its gradient: a view."""
    return tensor if role == "down" else tensor[:, experts.roles[role]]


# ------------------------------------------------------------------------------------ of a result


def routers_of(model: WholeModel, blueprint: Blueprint) -> Iterator[Trained]:
    """The routers of a result."""
    for name, weight in model.router_weights().items():
        yield Plain("routers", weight, blueprint.tensors[name])


def norms_of(model: WholeModel, blueprint: Blueprint) -> Iterator[Trained]:
    """The norms of its layers."""
    for name, weight in model.norm_weights().items():
        yield Plain("norms", weight, blueprint.tensors[name])


def scales_of(
    model: WholeModel, blueprint: Blueprint, found: Mapping[str, TensorInfo]
) -> Iterator[Trained]:
    """The scales of the packed experts of a result, whose files have the headers `found`."""
    read, scheme = open_tensors(found), blueprint.plan.scheme
    for layer, experts in model.experts():
        for role in (*experts.roles, "down"):
            for bits, members in _by_bits(blueprint, layer, role, len(experts)).items():
                grid = grid_of(bits, scheme)
                stack = _stack_of(read, members.values(), grid, scheme.format, model.device)
                yield Scales(experts, role, members, stack, scheme.format)


def _by_bits(
    blueprint: Blueprint, layer: int, role: Role, count: int
) -> dict[int, dict[int, PlannedTensor]]:
    """The packed tensors of a projection in a layer, by width and index in the live module."""
    found: dict[int, dict[int, PlannedTensor]] = {}
    for expert in range(count):
        info = blueprint.source.experts[ExpertId(layer, expert)][role]
        tensor = blueprint.tensors[info.name]
        if tensor.making == "packed":
            found.setdefault(tensor.bits, {})[expert] = tensor
    return found


def _stack_of(
    read: Reader, tensors: Iterable[PlannedTensor], grid: Grid, form: str, device: torch.device
) -> QuantizedStack:
    """Packed matrices, read back to a device."""
    unpack = FORMATS[form].codes
    assert unpack is not None
    found = []
    for tensor in tensors:
        stem = f"{tensor.module}."
        parts = {slot.name.removeprefix(stem): read(slot.name) for slot in tensor.stored}
        found.append(unpack(parts, tensor.info.shape[1]))
    codes, scales, zeros = (
        torch.stack([getattr(one, part) for one in found]).to(device)
        for part in ("codes", "scales", "zeros")
    )
    return QuantizedStack(codes, scales, zeros, grid)
