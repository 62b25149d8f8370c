"""Tensors that no file holds as they are, made from what the files hold: see `artifacts.Stored`.

Weights of published models may be coded: FP8 with a scale for a tensor, a row or a block, MXFP4,
whole numbers packed into words. Each decoder computes in float32 and rounds once, into the dtype of
the weight; transformers and compressed-tensors come to the same bits.

R rows by C columns, as the parts have them. One decoded matrix is in memory beside the mapped
parts, and for a moment a few hundred of its rows in float32.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from se_compress.artifacts import Encoding, Stored
from se_compress.quant.packing import unpack_rows

Parts = Mapping[str, Tensor]
# Rows that are decoded at once.
_ROWS = 256
# Sign, two bits of exponent, one of mantissa: OCP Microscaling Formats 1.0, table 5.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def decode(stored: Stored, parts: Parts, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, from its parts by what the encoding calls them."""
    values = _DECODERS[stored.encoding](parts, stored, dtype)
    if stored.transposed:
        values = values.T
    if stored.rows is not None:
        first, end, step = stored.rows
        values = values[first:end:step]
    return values.contiguous()


def _plain(parts: Parts, stored: Stored, dtype: torch.dtype) -> Tensor:
    """weight, in `dtype`."""
    return parts["weight"]


def _fp8(parts: Parts, stored: Stored, dtype: torch.dtype) -> Tensor:
    """weight F8_E4M3 or F8_E5M2 [R, C]; scale [r, c], one for a block of rows and columns."""
    codes = parts["weight"]
    height, width = stored.block
    rows, columns = codes.shape
    scales = _scales(parts["scale"]).reshape(-(-rows // height), -(-columns // width))
    by_column = scales.repeat_interleave(width, 1)[:, :columns]
    decoded = torch.empty(codes.shape, dtype=dtype)
    for first in range(0, rows, _ROWS):
        some = slice(first, min(first + _ROWS, rows))
        block = torch.arange(some.start, some.stop) // height
        decoded[some] = codes[some].float() * by_column[block]
    return decoded


def _mxfp4(parts: Parts, stored: Stored, dtype: torch.dtype) -> Tensor:
    """blocks U8 [R, G, 16], two values in a byte, the lower half first; scales U8 [R, G], the
    exponents of what 32 values are multiplied by, plus 127."""
    blocks, scales = parts["blocks"], _scales(parts["scales"])
    pairs = torch.tensor([[_FP4[byte & 15], _FP4[byte >> 4]] for byte in range(256)])
    rows, groups, half = blocks.shape
    decoded = torch.empty(rows, groups, 2 * half, dtype=dtype)
    for first in range(0, rows, _ROWS):
        some = slice(first, min(first + _ROWS, rows))
        values = pairs[blocks[some].int()].reshape(-1, groups, 2 * half)
        decoded[some] = values * scales[some].unsqueeze(-1)
    return decoded.reshape(rows, groups * 2 * half)


def _packed(parts: Parts, stored: Stored, dtype: torch.dtype) -> Tensor:
    """What `quant.packing.pack_rows` packs: weight_packed, weight_scale, weight_shape and, where
    zeros differ, weight_zero_point, whose words run down the rows."""
    rows, columns = parts["weight_shape"].tolist()
    decoded = torch.empty(rows, columns, dtype=dtype)
    for first in range(0, rows, _ROWS):
        count = min(_ROWS, rows - first)
        some = {"weight_shape": torch.tensor([count, columns])}
        for part in ("weight_packed", "weight_scale", "weight_zero_point"):
            if part in parts:
                length = -(-count * len(parts[part]) // rows)
                start = first * len(parts[part]) // rows
                some[part] = parts[part][start : start + length]
        decoded[first : first + count] = unpack_rows(some, columns).dequantized()
    return decoded


def _scales(stored: Tensor) -> Tensor:
    """Float32. Bytes hold an exponent, E8M0: 2 ** (byte - 127)."""
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.exp2(stored.view(torch.uint8).float() - 127)
    return stored.float()


_DECODERS: Mapping[Encoding, Callable[[Parts, Stored, torch.dtype], Tensor]] = {
    "plain": _plain,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "pack-quantized": _packed,
}
