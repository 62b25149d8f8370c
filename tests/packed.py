"""Packing and unpacking by a format's name, as tests of the words want it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from se_compress.formats import FORMATS
from se_compress.quant.grid import Grid
from se_compress.quant.packing import Codes, unpack_qweight, unpack_rows


def pack(
    form: str,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
) -> dict[str, Tensor]:
    """The parts of one matrix in a format of integer codes."""
    scale_dtype = getattr(torch, str(FORMATS[form].scale_dtype))
    packer = FORMATS[form].pack
    assert packer is not None
    return packer(codes, scales, zeros, Grid(bits, group_size, symmetric, scale_dtype))


def unpack(form: str, parts: Mapping[str, Tensor], columns: int) -> Codes:
    """The codes of one matrix of so many columns."""
    if form == "compressed-tensors":
        return unpack_rows(parts, columns)
    return unpack_qweight(parts, columns, 1 if form in ("gptq", "auto-round-gptq") else 0)
