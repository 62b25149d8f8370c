"""Integer codes of one matrix in 32-bit words, and back; formats/ says which tensors hold them.

R rows (out features), C columns (in features), G groups, b bits.

Values lie in the words as one little-endian string of bits: value i of a run has the bits from i*b
on, so 32 values fill b words whatever b is. At 2, 4 and 8 bits no value straddles two words; at 3
bits the 11th and the 22nd of every 32 do, the 10-1-10-1-10 pattern of GPTQModel's packer. A code
means (code - zero) * scale of its group in every format.

Two families of layouts: down the columns (`pack_qweight`: GPTQ, auto-round) and across them
(`pack_rows`: compressed-tensors).
"""

import math
from collections.abc import Mapping
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

WORD = 32


class Codes(NamedTuple):
    """One matrix: codes uint8 [R, C], scales float32 [R, G], zeros uint8 [R, G], and the group of
    each column, int64 [C]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor

    def dequantized(self) -> Tensor:
        """float32 [R, C], bit for bit (code - zero) * scale."""
        columns, (rows, groups) = self.codes.shape[1], self.scales.shape
        width = -(-columns // groups)
        even = _in_order(columns, width, self.group.device)
        if columns != width * groups or not torch.equal(self.group, even):
            steps = self.codes.float() - self.zeros.float()[:, self.group]
            return steps * self.scales.float()[:, self.group]
        # groups that lie in order need no gather, which takes several times as long
        in_groups = self.codes.view(rows, groups, width).float()
        return in_groups.sub_(self.zeros[..., None]).mul_(self.scales[..., None]).flatten(1)


def pack_qweight(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, offset: int
) -> dict[str, Tensor]:
    """qweight int32 [C*b/32, R], qzeros int32 [G, R*b/32] and scales float16 [G, R] of one matrix.

    codes uint8 [R, C], scales float32 [R, G], zeros uint8 [R, G]; `offset` is taken off a zero
    before it is stored. Raises ValueError if R or C does not fill whole words, a zero or a code is
    out of range, or a scale is no float16 number.
    """
    _check_fits(codes, zeros, bits, offset)
    return {
        "qweight": _pack(codes, bits).T.contiguous(),
        "qzeros": _pack(zeros.T - offset, bits),
        "scales": _exactly(scales.T, torch.float16),
    }


def unpack_qweight(parts: Mapping[str, Tensor], columns: int, offset: int) -> Codes:
    """What `pack_qweight` packed, for a matrix of so many columns: the width follows from the
    words, and the groups from g_idx if it is there."""
    words, scales = parts["qweight"].T, parts["scales"].T.float()
    bits = _width(words, columns)
    codes = _unpack(words, bits)
    zeros = (_unpack(parts["qzeros"], bits) + offset).T
    group = parts["g_idx"].long() if "g_idx" in parts else _even_groups(columns, scales)
    return Codes(codes, scales.contiguous(), zeros.contiguous(), group)


def pack_rows(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, with_zeros: bool
) -> dict[str, Tensor]:
    """weight_packed int32 [R, C*b/32], weight_scale bfloat16 [R, G], weight_shape int64 [2], and
    weight_zero_point int32 [R*b/32, G] if wanted; arguments and errors as in `pack_qweight`."""
    _check_fits(codes, zeros, bits, 0)
    parts = {
        "weight_packed": _pack(codes, bits),
        "weight_scale": _exactly(scales, torch.bfloat16),
        "weight_shape": torch.tensor(codes.shape),
    }
    if with_zeros:
        parts["weight_zero_point"] = _pack(zeros.T, bits).T.contiguous()
    return parts


def unpack_rows(parts: Mapping[str, Tensor], columns: int) -> Codes:
    """What `pack_rows` packed; without zero points every zero is the middle code."""
    scales = parts["weight_scale"].float()
    if parts["weight_shape"].tolist() != [len(scales), columns]:
        shape = parts["weight_shape"].tolist()
        raise ValueError(f"weight_shape is {shape}, not {[len(scales), columns]}")
    bits = _width(parts["weight_packed"], columns)
    zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8)
    if "weight_zero_point" in parts:
        zeros = _unpack(parts["weight_zero_point"].T, bits).T
    codes = _unpack(parts["weight_packed"], bits)
    return Codes(codes, scales, zeros, _even_groups(columns, scales))


def group_of_column(columns: int, group_size: int, device: torch.device) -> Tensor:
    """int32 [C]; -1 is one group per row."""
    size = columns if group_size == -1 else group_size
    return torch.arange(columns, dtype=torch.int32, device=device) // size


def _width(words: Tensor, columns: int) -> int:
    bits, rest = divmod(words.shape[1] * WORD, columns)
    if rest or not 1 <= bits <= 8:
        raise ValueError(f"{columns} columns do not fill {words.shape[1]} words at any width")
    return bits


def _even_groups(columns: int, scales: Tensor) -> Tensor:
    """The group of each column where nothing but their number is stored."""
    groups = scales.shape[1]
    if columns % groups:
        raise ValueError(f"{columns} columns do not make {groups} equal groups")
    return _in_order(columns, columns // groups, scales.device)


def _in_order(columns: int, width: int, device: torch.device) -> Tensor:
    """int64 [C]: the group of each column where groups of `width` lie in order."""
    return torch.arange(columns, device=device) // width


def _exactly(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype of the file. Raises ValueError if that would round one."""
    stored = scales.to(dtype)
    if not torch.equal(stored.to(scales.dtype), scales):
        raise ValueError(f"a scale is no {dtype} number: the grid must have rounded it")
    return stored.contiguous()


def _pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] to int32 [N, K*bits/32], along the last axis."""
    if 8 % bits == 0:  # whole values in each byte, of which the first is a word's lowest
        octets = values.to(torch.uint8).reshape(len(values), -1, 8 // bits)
        places = (octets[..., at] << at * bits for at in range(8 // bits))
        return reduce(torch.bitwise_or, places).contiguous().view(torch.int32)
    run, words = _run(bits)
    runs = values.to(torch.int64).reshape(len(values), -1, run)
    first = torch.arange(run, device=values.device) * bits
    packed = []
    for word in range(words):
        shift = first - word * WORD
        # int64 holds a straddling value whole: the left shift spills above bit 31 and is masked
        # off, the right shift drops the bits that went into the word before.
        shifted = (runs << shift.clamp(min=0)) >> (-shift).clamp(min=0, max=bits)
        inside = (shift > -bits) & (shift < WORD)
        packed.append((shifted * inside).sum(-1) & (2**WORD - 1))
    return torch.stack(packed, -1).flatten(-2).to(torch.int32)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [N, W] to uint8 [N, W*32/bits]."""
    if 8 % bits == 0:  # whole values in each byte, of which the first is a word's lowest
        octets = packed.contiguous().view(torch.uint8)[..., None]
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return torch.bitwise_right_shift(octets, shifts).bitwise_and_(2**bits - 1).flatten(-2)
    run, words = _run(bits)
    runs = (packed.to(torch.int64) & (2**WORD - 1)).reshape(len(packed), -1, words)
    first = torch.arange(run, device=packed.device) * bits
    word, shift = first // WORD, first % WORD
    after = (word + 1).clamp(max=words - 1)  # the last value of a run never straddles
    values = torch.bitwise_right_shift(runs[..., word] | runs[..., after] << WORD, shift)
    return torch.bitwise_and(values, 2**bits - 1).flatten(-2).to(torch.uint8)


def _run(bits: int) -> tuple[int, int]:
    """The fewest values that fill whole words, and these words: (8, 1) at 4 bits, (32, 3) at 3."""
    words = bits // math.gcd(bits, WORD)
    return words * WORD // bits, words


def _check_fits(codes: Tensor, zeros: Tensor, bits: int, offset: int) -> None:
    rows, columns = codes.shape
    _check_fills_words("rows (out features)", rows, bits)
    _check_fills_words("columns (in features)", columns, bits)
    _check_range("code", codes, 0, bits)
    _check_range("zero point", zeros, offset, bits)


def _check_fills_words(what: str, count: int, bits: int) -> None:
    run, _ = _run(bits)
    if count % run:
        raise ValueError(
            f"{count} {what} of {bits} bits do not fill whole 32-bit words: "
            f"a multiple of {run} would"
        )


def _check_range(what: str, values: Tensor, least: int, bits: int) -> None:
    if values.numel() == 0:
        return
    low, high = int(values.min()), int(values.max())
    if low < least or high >= 2**bits:
        raise ValueError(
            f"a {what} is {low if low < least else high}: "
            f"a file of {bits} bits holds {least} to {2**bits - 1}"
        )
