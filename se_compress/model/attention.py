"""The attention of a layer, watched: where it goes.

A model attends as transformers lets it: by "sdpa" where it supports that, by its own eager function
where it does not, as with learned sinks. Only while somebody watches do our functions take the
place of both, under the same names, so that the model masks (and indexes) as it would anyway.
Probabilities are those of the family's own eager function.

B sequences of a batch, T positions, K >= T keys: a family may have more keys than positions, behind
those of the positions.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from se_compress.model.observers import Observer

_EagerAttention = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def watched_attention() -> Iterator[None]:
    """While this is entered, attention is told to the `observer` of its module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Of this table alone, which every model uses; what is registered for all stays.
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _sdpa
    ALL_ATTENTION_FUNCTIONS["eager"] = _eager
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS["eager"]


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [B, T, heads, value size] as transformers' "sdpa" computes it.

    The signature is transformers'. The probabilities of the watched sequences are computed beside
    it, in float32: sdpa does not give them.

    query           [B, heads, T, head size]
    key, value      [B, key heads, K, size of a head]; a key head serves several heads
    attention_mask  boolean [B or 1, 1 or heads, T, K], true where a query sees a key; or what is
                    added to the scores; None: causal
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    observer = _observer(module)
    if count := observer.watched(len(query)):
        first = partial(_first, sequences=len(query), count=count)
        mask = _causal(query) if attention_mask is None else first(attention_mask)
        # One channel of the values: what becomes of them is not looked at.
        parts = (query.float(), key.float(), value[..., :1].float())
        _, weights = _own_eager(module)(
            module,
            *map(first, parts),
            _added(mask),
            **{name: first(option) for name, option in kwargs.items()},
        )
        _report(observer, weights, mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by the family's own eager function, and its probabilities [B, heads, T, K]."""
    observer = _observer(module)
    observer.learned_sinks |= kwargs.get("s_aux") is not None
    result, weights = _own_eager(module)(module, query, key, value, attention_mask, **kwargs)
    if count := observer.watched(len(query)):
        assert attention_mask is not None  # eager masks are always there
        mask = _first(attention_mask, len(query), count)
        _report(observer, weights[:count].float(), mask)
    return result, weights


def _observer(module: nn.Module) -> Observer:
    return cast(Observer, module.observer)


def _own_eager(module: nn.Module) -> _EagerAttention:
    """The eager attention function of the module's family."""
    return cast(_EagerAttention, sys.modules[type(module).__module__].eager_attention_forward)


def _first(part: Any, sequences: int, count: int) -> Any:
    """The part of the first `count` of all `sequences`; what is the same for all stays whole."""
    if isinstance(part, Tensor) and part.dim() and len(part) == sequences:
        return part[:count]
    return part


def _causal(query: Tensor) -> Tensor:
    """The mask [1, 1, T, T] that stands for none."""
    length = query.shape[2]
    every = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return every.tril()[None, None]


def _added(mask: Tensor) -> Tensor:
    """What is added to float32 scores for a mask."""
    if mask.dtype != torch.bool:
        return mask.float()
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)


def _report(observer: Observer, weights: Tensor, mask: Tensor) -> None:
    """Tell the observer what positions receive, from probabilities, float32 [B, heads, T, K]."""
    length = weights.shape[2]
    visible = mask[..., :length]
    if visible.dtype != torch.bool:
        visible = visible > torch.finfo(visible.dtype).min / 2
    weights = weights[..., :length]
    # Key 0 is seen by every query, the last one by one: a sum alone would favour the early ones.
    # Where attention is sparse, there may be keys that no query sees.
    seeing = visible.sum(dim=-2).clamp(min=1)
    # No view: it would keep all probabilities, and what is summed of it depend on where it lies.
    observer.attention(weights[..., 0].contiguous(), weights.sum(dim=2) / seeing)
