"""The model's own forward pass, ended or fed at any of its layers.

Every decoder layer is a stand-in. Those before the layer at work return what the last real one
returned, whatever that is; the layer at work runs and ends the pass. So embeddings, masks, what is
done between layers and the head are the model's own, and one layer is in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


class _Ended(Exception):
    """Ends a forward pass; carries what was asked for."""

    def __init__(self, found: Any) -> None:
        super().__init__("a forward pass was ended at a layer")
        self.found = found


# Index of the layer, and what the model calls it with, positional and by name.
Work = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class Pass:
    """What the stand-ins do in a forward pass.

    at     layers before this one return `value`, the others do `work`
    value  what the last layer returned
    work   in the place of a layer
    """

    at: int = 0
    value: Any = None
    work: Work | None = None


class StandIn(nn.Module):
    """Stands in for a decoder layer."""

    def __init__(self, layer: nn.Module, index: int, running: Pass) -> None:
        super().__init__()
        # Not a submodule: it has no weights to count.
        self.__dict__.update(layer=layer, index=index, running=running)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        running, index = self.__dict__["running"], self.__dict__["index"]
        if index < running.at:
            return running.value
        assert running.work is not None
        return running.work(index, args, kwargs)


def run_until(running: Pass, at: int, value: Any, work: Work, forward: Callable[[], object]) -> Any:
    """What `work` makes of layer `at` in a forward pass that ends there.

    value    what the layer before it returned
    forward  begins the pass
    """

    def end(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise _Ended(work(index, args, kwargs))

    running.at, running.value, running.work = at, value, end
    try:
        forward()
    except _Ended as ended:
        return ended.found
    finally:
        running.value = running.work = None
    raise RuntimeError(f"layer {at} was never called")
