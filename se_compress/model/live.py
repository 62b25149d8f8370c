"""The weights of a live model: put into a module of it that was built on the meta device.

Routed experts are found by their ids, and loaded some at a time; everything else is found by the
binding. Values are in the dtype that transformers gives them in a model of the dtype that was asked
for.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from se_compress.artifacts import ExpertId, ModelSource, Role
from se_compress.errors import SourceError
from se_compress.model.binding import Binding, experts_modules, layer_of
from se_compress.model.checkpoint import Reader, check_finite
from se_compress.model.experts import LayerExperts, RoutedExperts, roles_of


@dataclass(frozen=True)
class Weights:
    """Where the live tensors of a model come from.

    source   what there is
    read     reads a tensor by its name in the source
    model    of `binding.meta_model`
    binding  what fills what, routed experts left out
    device   where they go
    """

    source: ModelSource
    read: Reader
    model: Any
    binding: Binding
    device: torch.device
    _finite: set[str] = field(default_factory=set)  # of experts, which are read again and again

    def loaded(self, module: nn.Module, path: str) -> nn.Module:
        """A copy of a meta module with its weights. Raises SourceError as `fill` does."""
        real = copy.deepcopy(module)
        self.fill(real, path)
        return real

    def fill(self, module: nn.Module, path: str, skip: tuple[str, ...] = ()) -> None:
        """Give every meta parameter and buffer of a module its value, in place.

        The weights of routed experts stay on the meta device; their module gets
        `layer_experts`, which loads them.

        path  of the module in the model; "" for the model itself
        skip  beginnings of names within the module that stay as they are

        Raises SourceError for a weight that is missing, is NaN or infinite.
        """
        prefix = f"{path}." if path else ""
        stored = module.state_dict().keys()
        fused = dict(experts_modules(module))
        for inner, experts in fused.items():
            read = partial(self.experts, experts, prefix + inner)
            experts.layer_experts = LayerExperts(experts, read)
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        for name, meta in named:
            owner = name.rpartition(".")[0]
            is_bound = prefix + name in self.binding.bound or owner not in fused
            if name.startswith(skip) or (name in stored and not is_bound):
                continue
            real = _put_empty(module, name, meta, self.device)
            if name not in stored:
                continue
            real.copy_(self.value(prefix + name))
            # What transformers initialises below is what nobody has loaded.
            real._is_hf_initialized = True  # type: ignore[attr-defined]
        for child in module.modules():
            # Buffers that no checkpoint has (rotary frequencies) are computed by transformers.
            computed = child._non_persistent_buffers_set
            if computed and not next(iter(child.buffers())).is_meta:
                self.model._init_weights(child)

    def value(self, live: str) -> Tensor:
        """A live tensor, of the checkpoint's dtype. Raises SourceError as `fill` does."""
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        entry = self.binding.bound.get(live) or self.binding.bound.get(tied.get(live, ""))
        if entry is None:
            raise SourceError(
                f"{self.source.path}: {live} is missing; the model of config.json has it"
            )
        made = entry.values(self.model, self._read)
        return made[live if live in made else entry.live]  # tied: the other one's

    def _read(self, name: str) -> Tensor:
        return check_finite(name, self.read(name))

    def experts(self, module: Any, path: str, ids: Sequence[int]) -> RoutedExperts:
        """Some routed experts of a layer, by their ids in it. Raises SourceError as `fill` does.

        module, path  of the layer's experts
        """
        layer = layer_of(path)
        assert layer is not None
        first = "gate_up_proj" if module.has_gate else "up_proj"
        endings = (".weight", ".bias") if module.has_bias else (".weight",)
        made: list[Tensor] = []
        for ending in endings:
            for leaf in (first, "down_proj"):
                meta = getattr(module, leaf if ending == ".weight" else f"{leaf}_bias")
                if meta.dim() == 3 and module.is_transposed:
                    meta = meta.mT
                shape, pinned = (len(ids), *meta.shape[1:]), self.device.type == "cuda"
                fused = torch.empty(shape, dtype=meta.dtype, pin_memory=pinned)
                roles = roles_of(module, meta.shape[1]) if leaf == first else _DOWN
                for role, rows in roles.items():
                    for expert, whole in zip(ids, fused, strict=True):
                        whole[rows].copy_(self._expert(ExpertId(layer, expert), role, ending))
                made.append(fused.to(self.device))
        return RoutedExperts(module, ids, *made)

    def _expert(self, identity: ExpertId, role: Role, ending: str) -> Tensor:
        """A projection of an expert, or its bias."""
        name = self.source.experts[identity][role].name.removesuffix(".weight") + ending
        if name in self._finite:
            return self.read(name)
        self._finite.add(name)
        return self._read(name)


_DOWN: Mapping[Role, slice] = {"down": slice(None)}


def _put_empty(module: nn.Module, name: str, meta: Tensor, device: torch.device) -> Tensor:
    """Put a tensor without values in the place of the meta tensor `name`, and return it."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = leaf in owner._parameters
    # Floating buffers are router biases and rotary frequencies: float32 in any model.
    dtype = meta.dtype if is_parameter or not meta.is_floating_point() else torch.float32
    real = torch.empty(meta.shape, dtype=dtype, device=device)
    if is_parameter:
        owner._parameters[leaf] = nn.Parameter(real, requires_grad=False)
        return owner._parameters[leaf]  # type: ignore[return-value]
    owner._buffers[leaf] = real
    return real


class Lookup(nn.Module):
    """Stands in for an embedding, and looks its rows up where they lie: a table of all words takes
    no memory of its own.

    layer   the embedding, on the meta device but for its buffers
    table   gives the weights [V, H], dtype as on disk
    device  of what it gives
    """

    def __init__(
        self, layer: nn.Embedding, table: Callable[[], Tensor], device: torch.device
    ) -> None:
        super().__init__()
        layer.padding_idx = None  # an index of the whole table; only gradients ask for it
        # No weights to count.
        self.__dict__.update(layer=layer, table=table, device=device)

    @property
    def weight(self) -> Tensor:
        """What models ask the weights for, extents, dtype and device, without their values."""
        meta = self.__dict__["layer"].weight
        return torch.zeros((), dtype=meta.dtype, device=self.__dict__["device"]).expand(meta.shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the embedding itself makes of the rows that are asked for."""
        layer, meta = self.__dict__["layer"], self.__dict__["layer"].weight
        wanted, places = torch.unique(tokens, return_inverse=True)
        rows = self.__dict__["table"]()[wanted.cpu()].to(tokens.device, meta.dtype)
        layer._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        try:
            return layer(places, *args, **kwargs)
        finally:
            layer._parameters["weight"] = meta
