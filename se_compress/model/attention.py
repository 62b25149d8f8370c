"""The attention of a layer, run so that an observer learns where it goes."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from se_compress.model.observers import Observer


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [B, T, heads, value size] as transformers' "sdpa" computes it.

    The signature is transformers'. For an observer that asks for it, the probabilities of the
    watched sequences are computed beside it, in float32: sdpa does not give them.

    query           [B, heads, T, head size]
    key, value      [B, key heads, T, size of a head]; a key head serves several heads
    attention_mask  boolean [B, 1, T, keys], true where a query sees a key; None: causal
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    observer = cast(Observer | None, getattr(module, "observer", None))
    if observer is not None and observer.wants_attention:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if count := observer.watched(len(query)):
            mask = None if attention_mask is None else attention_mask[:count]
            _report_attention(observer, query[:count], key[:count], mask, scale)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _report_attention(
    observer: Observer, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
) -> None:
    """Tell the observer what positions receive; tensors as in `attention_forward`."""
    length = query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.matmul(query.float(), key.float().transpose(2, 3)) * scaling
    if mask is None:
        visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    else:  # boolean: `streaming` registers sdpa's masks
        visible = mask[..., :length]
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    # Key 0 is seen by every query, the last one by one: a sum alone would favour the early ones.
    observer.attention(probabilities[..., 0], probabilities.sum(dim=2) / visible.sum(dim=-2))
