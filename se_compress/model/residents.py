"""Layers that stay in memory while tokens are generated: every token needs all of them.

A streamed model loads each layer for each token. Of the layers that fit, that is work done many
times over. What does not fit is streamed as before, and no value depends on which it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from se_compress.model.binding import experts_modules
from se_compress.model.streaming import StreamedModel
from se_compress.running.memory import available_memory

SHARE = 0.5  # of the free memory; the rest is for keys, values and one streamed layer


@contextmanager
def resident(model: StreamedModel, size_bytes: int | None = None) -> Iterator[None]:
    """Inside, `model.load_layer` gives the first layers that fit into `size_bytes` again instead of
    loading them anew; a layer must not be changed then. None: as much as half of the free memory.
    """
    room = free_bytes(model.device) * SHARE if size_bytes is None else float(size_bytes)
    load, kept = model.load_layer, dict[int, nn.Module]()
    held = 0.0

    def load_layer(layer: int) -> nn.Module:
        nonlocal held
        if layer in kept:
            return kept[layer]
        module = load(layer)
        size = sum(part.numel() * part.element_size() for part in module.parameters())
        if held + size <= room:
            kept[layer] = module
            held += size
            for _, experts in experts_modules(module):
                experts.layer_experts.keep()
        return module

    vars(model)["load_layer"] = load_layer
    try:
        yield
    finally:
        del vars(model)["load_layer"]
        # A layer's experts and what loads them know each other: nothing else would free them now.
        for module in kept.values():
            for _, experts in experts_modules(module):
                experts.layer_experts.kept = None


def free_bytes(device: torch.device) -> int:
    """Memory that is free where a model runs."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory().size_bytes
