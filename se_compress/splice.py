"""Make the tensors of a smaller model from those of the original: see surgery.py."""

from collections.abc import Mapping

import torch
from torch import Tensor

from se_compress.artifacts import ExpertId, ModelSource, TensorInfo
from se_compress.checkpoint import Reader, open_tensors
from se_compress.surgery import Shrunk, is_made


def open_shrunk(source: ModelSource, small: Shrunk) -> Reader:
    """A reader of the smaller model by its own names.

    What merely moved is read where it is. Router rows, and every other tensor that has a row per
    expert, are those of the experts that are left; the down_proj of a zeroed expert is zero.
    """
    read_source, read_moved = open_tensors(source.tensors), open_tensors(small.source.tensors)

    def read(name: str) -> Tensor:
        info = small.source.tensors.get(name)
        if info is None or not is_made(info):
            return read_moved(name)
        if info.role == "down":
            return torch.zeros_like(read_source(_original(source, small, info).name))
        return read_source(name)[_rows(small.origin, info)]

    return read


def _original(source: ModelSource, small: Shrunk, info: TensorInfo) -> TensorInfo:
    assert info.layer is not None
    assert info.expert is not None
    assert info.role is not None
    identity = small.origin[ExpertId(info.layer, info.expert)][0]
    return source.experts[identity][info.role]


def _rows(origin: Mapping[ExpertId, tuple[ExpertId, ...]], info: TensorInfo) -> list[int]:
    """The rows of the source that the result keeps, in the result's order."""
    return [
        members[0].expert
        for identity, members in origin.items()
        if identity.layer == info.layer and isinstance(members[0].expert, int)
    ]
