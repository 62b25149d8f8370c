"""Activations of the source that leave its numbers: its own fault, named where it happens first.

Beyond float32 (or bfloat16, whose range is the same) a hidden state is infinite, and NaN one step
later. A finite one whose square is not has lost its size to the next norm already: it divides by
infinity, and what is left is zero. Nothing can be measured of such a model or compared with it.
"""

from collections.abc import Sequence

from torch import Tensor

from se_compress.artifacts import ExpertId, ExpertIndex, TensorInfo
from se_compress.errors import SourceError
from se_compress.model.measures import overflows
from se_compress.model.streaming import StreamedModel


def check_states(model: StreamedModel, layer: int, states: Sequence[Tensor]) -> None:
    """Raises SourceError if the source's hidden states after a layer overflow.

    layer   the layer; -1 for the embeddings
    states  [B, T, H] for each batch, in the model's dtype
    """
    where = f"after layer {layer}" if layer >= 0 else "before layer 0"
    for batch in states:
        if overflows(batch):
            weights = _weights_of(model, layer if layer >= 0 else None)
            raise SourceError(_message(model, f"activations {where}", batch, weights))


def check_inputs(
    model: StreamedModel, layer: int, inputs: Tensor, expert: ExpertIndex | None = None
) -> None:
    """Raises SourceError if what experts of a layer are given overflows.

    inputs  input of all routed experts [N, H], or of one expert's down_proj [n, I]
    expert  the expert whose down_proj it is; None for the input of all
    """
    if overflows(inputs):
        place = f"layer {layer}" if expert is None else f"expert {ExpertId(layer, expert)}"
        what = f"activations within {place}"
        weights = [i for i in _weights_of(model, layer) if i.expert == expert]
        raise SourceError(_message(model, what, inputs, weights))


def check_logits(model: StreamedModel, logits: Tensor) -> Tensor:
    """The same logits, float32 [..., V]. Raises SourceError if one is NaN or infinite."""
    if not bool(logits.isfinite().all()):
        raise SourceError(_message(model, "logits", logits, _weights_of(model, None)))
    return logits


def _weights_of(model: StreamedModel, layer: int | None) -> list[TensorInfo]:
    """The source's tensors of a layer; None: those outside of the decoder layers."""
    return [info for info in model.source.tensors.values() if info.layer == layer]


def _message(model: StreamedModel, what: str, values: Tensor, weights: Sequence[TensorInfo]) -> str:
    """What overflows in `values` [..., C], and the largest of the weights that may have done it."""
    dtype = str(model.dtype).removeprefix("torch.")
    bad = int((~values.isfinite().all(dim=-1)).sum())
    how = f"are NaN or infinite for {bad} of {values[..., 0].numel()} tokens"
    if not bad:
        how = f"reach {float(values.abs().max()):.1e}, whose square is beyond float32"
    sizes = {info.name: _largest(model, info) for info in weights}
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    told = f"; the largest weight there is {sizes[largest]:.1e}, in {largest}" if largest else ""
    return f"{model.source.name}: the model's own {what} {how} (computed in {dtype}){told}"


def _largest(model: StreamedModel, info: TensorInfo) -> float:
    """The greatest |value| of a tensor; 0 if it is empty."""
    weight = model.read(info.name)
    return float(weight.float().abs().max()) if weight.numel() else 0.0
