"""GPTQ v1 tensors: the integer codes of one matrix, packed into 32-bit words, and back.

R rows (out features), C columns (in features), G groups, b bits.

Values lie in the words as one little-endian string of bits: value i of a run has the bits from i*b
on, so 32 values fill b words whatever b is. At 2, 4 and 8 bits no value straddles two words; at 3
bits the 11th and the 22nd of every 32 do, the 10-1-10-1-10 pattern of GPTQModel's packer. Weights
are packed down the columns (a run belongs to one row of the matrix), zeros across the rows.

A zero is stored less one, and readers add the one to the packed words: zero 0 would borrow from its
neighbour, and is refused.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

WORD = 32


class PackedGptq(NamedTuple):
    """The four tensors of a GPTQ v1 module, under their names in the file."""

    qweight: Tensor  # int32 [C*b/32, R]
    qzeros: Tensor  # int32 [G, R*b/32]
    scales: Tensor  # float16 [G, R]
    g_idx: Tensor  # int32 [C]


def pack_gptq(
    codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, group_size: int
) -> PackedGptq:
    """Pack one matrix.

    codes uint8 [R, C], scales float [R, G], zeros uint8 [R, G]; group_size -1 is one group per row.
    Raises ValueError if R or C does not fill whole words, a zero point is 0 or a code is too wide.
    """
    rows, columns = codes.shape
    _check_fills_words("rows (out features)", rows, bits)
    _check_fills_words("columns (in features)", columns, bits)
    _check_range("code", codes, 0, bits)
    _check_range("zero point", zeros, 1, bits)
    return PackedGptq(
        qweight=_pack(codes, bits).T.contiguous(),
        qzeros=_pack(zeros.T - 1, bits),
        scales=scales.T.to(torch.float16).contiguous(),
        g_idx=_group_of_column(columns, group_size, codes.device),
    )


def unpack_gptq(packed: PackedGptq, *, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [R, C], scales float32 [R, G] and zeros uint8 [R, G] of a packed matrix."""
    codes = _unpack(packed.qweight.T, bits)
    zeros = (_unpack(packed.qzeros, bits) + 1).T
    return codes, packed.scales.T.to(torch.float32).contiguous(), zeros.contiguous()


def _group_of_column(columns: int, group_size: int, device: torch.device) -> Tensor:
    size = columns if group_size == -1 else group_size
    return torch.arange(columns, dtype=torch.int32, device=device) // size


def _pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] to int32 [N, K*bits/32], along the last axis."""
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
            f"GPTQ v1 at {bits} bits holds {least} to {2**bits - 1}"
        )
