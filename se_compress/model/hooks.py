"""How the parts of a layer come to tell an observer what happens in them.

Attention and routed experts find the observer as an attribute, in the functions that transformers
lets one register (attention.py, experts.py). Plain MLPs (shared experts, dense layers) have no such
interface and get hooks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from se_compress.artifacts import ExpertId, ModelSource
from se_compress.model.attention import watched_attention
from se_compress.model.experts import Routed, dense_hook, shared_hooks
from se_compress.model.observers import Observer
from se_compress.opening.families import FAMILIES

# A module, and what torch is to call behind its forward pass.
Hook = tuple[nn.Module, Callable[..., Any]]


@contextmanager
def told(
    module: nn.Module, observer: Observer, routed: Routed, hooks: Sequence[Hook]
) -> Iterator[None]:
    """While this is entered, the parts of a layer report to the observer.

    module  the layer
    routed  is given what its routed experts are given, and stands for them
    hooks   from `plain_hooks`
    """
    for child in module.modules():
        child.observer = observer  # type: ignore[assignment]
        child.routed = routed  # type: ignore[assignment]
    handles = [part.register_forward_hook(hook) for part, hook in hooks]
    watched: AbstractContextManager[None] = nullcontext()
    if observer.wants_attention:
        watched = watched_attention()
    try:
        with watched:
            yield
    finally:
        for handle in handles:
            handle.remove()
        # The module of routed experts is in a circle with what loads them, and stays until Python
        # looks for such: what the observer has kept must not stay with it.
        for child in module.modules():
            del child.observer, child.routed


def plain_hooks(
    source: ModelSource, path_of: Callable[[str], str], layer: int, module: nn.Module
) -> list[Hook]:
    """The hooks on the plain MLPs of a layer.

    path_of  the path of a linear within its layer, by the name of its weight in the source
    """
    if layer not in source.moe_layers:
        return [(down, dense_hook) for down in _dense_down(source, path_of, layer, module)]
    shared = source.experts.get(ExpertId(layer, "shared"))
    if shared is None:
        return []
    up, down = (module.get_submodule(path_of(shared[role].name)) for role in ("up", "down"))
    gate = FAMILIES[source.family].at(source.prefix).shared_gate.format(layer=layer)
    return shared_hooks(up, down, module.get_submodule(path_of(gate)) if gate else None)


def _dense_down(
    source: ModelSource, path_of: Callable[[str], str], layer: int, module: nn.Module
) -> list[nn.Module]:
    """The down_proj of a layer's dense MLP; none if it has no MLP."""
    paths = {
        path_of(name)
        for name, info in source.tensors.items()
        if info.layer == layer and info.kind == "dense_mlp" and len(info.shape) == 2
    }
    return [part for path, part in module.named_modules() if path in paths][-1:]
