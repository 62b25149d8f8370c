"""Tensors that no file holds as they are, made from what the files hold: see `artifacts.Stored`.

Weights of published models may be coded: FP8 with a scale for a tensor, a row or a block, MXFP4,
whole numbers packed into words. Each decoder computes in float32 and rounds once, into the dtype of
the weight; transformers and compressed-tensors come to the same bits.

R rows by C columns, as the parts have them. One decoded matrix is in memory beside the mapped
parts, and for a moment a few hundred of its rows in float32.
"""

from collections.abc import Callable, Iterator, Mapping

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
    rows = slice(*stored.rows) if stored.rows is not None else slice(None)
    decoder = _DECODERS[stored.encoding]
    if stored.transposed:
        return decoder(parts, stored, slice(None), dtype).T[rows].contiguous()
    return decoder(parts, stored, rows, dtype)


def _plain(parts: Parts, stored: Stored, rows: slice, dtype: torch.dtype) -> Tensor:
    """weight [R, ...], in `dtype`."""
    return parts["weight"][rows].contiguous()


def _fp8(parts: Parts, stored: Stored, rows: slice, dtype: torch.dtype) -> Tensor:
    """weight F8_E4M3 or F8_E5M2 [R, C]; scale [r, c], one for a block of rows and columns."""
    count, columns = parts["weight"].shape
    height, width = stored.block
    scales = _scales(parts["scale"]).reshape(-(-count // height), -(-columns // width))
    by_column = scales.repeat_interleave(width, 1)[:, :columns]
    codes, block = parts["weight"][rows], torch.arange(count)[rows] // height
    decoded = torch.empty(codes.shape, dtype=dtype)
    for some in _runs(len(codes)):
        decoded[some] = codes[some].float() * by_column[block[some]]
    return decoded


def _mxfp4(parts: Parts, stored: Stored, rows: slice, dtype: torch.dtype) -> Tensor:
    """blocks, bytes [R, G, 16] or [R, G * 16], two values in a byte, the lower half first; scales,
    bytes [R, G], the exponents of what 32 values are multiplied by, plus 127."""
    blocks, scales = parts["blocks"][rows].view(torch.uint8), _scales(parts["scales"][rows])
    blocks = blocks.reshape(*scales.shape, -1)
    pairs = torch.tensor([[_FP4[byte & 15], _FP4[byte >> 4]] for byte in range(256)])
    count, groups, half = blocks.shape
    decoded = torch.empty(count, groups, 2 * half, dtype=dtype)
    for some in _runs(count):
        values = pairs[blocks[some].int()].reshape(-1, groups, 2 * half)
        decoded[some] = values * scales[some].unsqueeze(-1)
    return decoded.reshape(count, groups * 2 * half)


def _runs(count: int) -> Iterator[slice]:
    return (slice(first, min(first + _ROWS, count)) for first in range(0, count, _ROWS))


def _packed(parts: Parts, stored: Stored, rows: slice, dtype: torch.dtype) -> Tensor:
    """What `quant.packing.pack_rows` packs: weight_packed, weight_scale, weight_shape and, where
    zeros differ, weight_zero_point, whose words run down the rows."""
    count, columns = len(parts["weight_packed"]), parts["weight_shape"].tolist()[-1]
    if parts["weight_shape"].tolist() != [count, columns] or columns < 1:
        raise ValueError(f"weight_shape is {parts['weight_shape'].tolist()} of {count} rows")
    decoded = torch.empty(count, columns, dtype=dtype)
    for some in _runs(count):
        run = {"weight_shape": torch.tensor([some.stop - some.start, columns])}
        for part in ("weight_packed", "weight_scale", "weight_zero_point"):
            if part in parts:
                words = len(parts[part])  # as many as rows; of zero points, fewer
                run[part] = parts[part][some.start * words // count : some.stop * words // count]
        decoded[some] = unpack_rows(run, columns).dequantized()
    return decoded[rows]


def _scales(stored: Tensor) -> Tensor:
    """Float32. Bytes hold an exponent, E8M0: 2 ** (byte - 127)."""
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.exp2(stored.view(torch.uint8).float() - 127)
    return stored.float()


_DECODERS: Mapping[Encoding, Callable[[Parts, Stored, slice, torch.dtype], Tensor]] = {
    "plain": _plain,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "pack-quantized": _packed,
}
