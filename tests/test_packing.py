"""Packed words against a packer that sets one bit at a time."""

import pytest
import torch
from torch import Tensor

from se_compress.quant.packing import pack_gptq, unpack_gptq

WIDTHS = [2, 3, 4, 8]
ROWS, COLUMNS = 64, 96
Matrix = tuple[Tensor, Tensor, Tensor]


def words_bit_by_bit(values: list[int], bits: int) -> list[int]:
    """Values one after the other, least bit first, cut into signed 32-bit words."""
    string = [value >> bit & 1 for value in values for bit in range(bits)]
    words = []
    for start in range(0, len(string), 32):
        word = sum(bit << place for place, bit in enumerate(string[start : start + 32]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def matrix(bits: int, groups: int, rows: int = ROWS, columns: int = COLUMNS) -> Matrix:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=draw)
    scales = torch.randn(rows, groups, generator=draw).to(torch.float16).to(torch.float32)
    zeros = torch.randint(1, 2**bits, (rows, groups), dtype=torch.uint8, generator=draw)
    return codes, scales, zeros


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_those_of_the_bit_by_bit_packer(bits: int) -> None:
    codes, scales, zeros = matrix(bits, groups=3)
    packed = pack_gptq(codes, scales, zeros, bits=bits, group_size=32)
    down = [words_bit_by_bit(row, bits) for row in codes.tolist()]
    across = [words_bit_by_bit([z - 1 for z in group], bits) for group in zeros.T.tolist()]
    assert packed.qweight.T.tolist() == down
    assert packed.qzeros.tolist() == across
    assert packed.scales.tolist() == scales.T.tolist()


def test_three_bits_straddle_words_at_the_11th_and_22nd_value() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21] = 0b101, 0b011
    ones = torch.ones(32, 1)
    packed = pack_gptq(codes, ones, ones.to(torch.uint8), bits=3, group_size=-1)
    assert packed.qweight[:, 0].tolist() == [0b01 << 30, 0b1 | -(2**31), 0b01]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("group_size", "groups"), [(-1, 1), (32, 3), (40, 3)])
def test_dtypes_shapes_and_the_group_of_each_column(
    bits: int, group_size: int, groups: int
) -> None:
    packed = pack_gptq(*matrix(bits, groups), bits=bits, group_size=group_size)
    assert [t.dtype for t in packed] == [torch.int32, torch.int32, torch.float16, torch.int32]
    assert packed.qweight.shape == (COLUMNS * bits // 32, ROWS)
    assert packed.qzeros.shape == (groups, ROWS * bits // 32)
    assert packed.scales.shape == (groups, ROWS)
    size = COLUMNS if group_size == -1 else group_size
    assert packed.g_idx.tolist() == [column // size for column in range(COLUMNS)]
    assert all(t.is_contiguous() for t in packed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_gives_back_what_was_packed(bits: int) -> None:
    given = matrix(bits, groups=3)
    codes, scales, zeros = unpack_gptq(pack_gptq(*given, bits=bits, group_size=32), bits=bits)
    for got, wanted in zip((codes, scales, zeros), given, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_reader_may_add_one_to_every_zero_of_a_word_at_once(bits: int) -> None:
    codes, scales, zeros = matrix(bits, groups=3)
    packed = pack_gptq(codes, scales, zeros, bits=bits, group_size=32)
    one_in_each = sum(1 << place for place in range(0, 32, bits))
    true_zeros = [words_bit_by_bit(group, bits) for group in zeros.T.tolist()]
    assert (packed.qzeros + one_in_each).tolist() == true_zeros


@pytest.mark.parametrize(
    ("bits", "rows", "columns", "message"),
    [
        (4, 12, 32, r"12 rows \(out features\) of 4 bits .* a multiple of 8 would"),
        (2, 32, 24, r"24 columns \(in features\) of 2 bits .* a multiple of 16 would"),
        (3, 32, 48, r"48 columns \(in features\) of 3 bits .* a multiple of 32 would"),
        (8, 6, 32, r"6 rows \(out features\) of 8 bits .* a multiple of 4 would"),
    ],
)
def test_what_does_not_fill_words_is_refused(
    bits: int, rows: int, columns: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack_gptq(*matrix(bits, 1, rows, columns), bits=bits, group_size=-1)


@pytest.mark.parametrize(("bits", "rows", "columns"), [(4, 8, 16), (2, 16, 48), (8, 4, 12)])
def test_whole_words_that_are_no_whole_run_of_32_values_fit(
    bits: int, rows: int, columns: int
) -> None:
    given = matrix(bits, 1, rows, columns)
    codes, _, zeros = unpack_gptq(pack_gptq(*given, bits=bits, group_size=-1), bits=bits)
    assert torch.equal(codes, given[0])
    assert torch.equal(zeros, given[2])


def test_a_zero_of_zero_is_refused() -> None:
    codes, scales, zeros = matrix(4, groups=1)
    zeros[5] = 0
    with pytest.raises(ValueError, match="a zero point is 0: GPTQ v1 at 4 bits holds 1 to 15"):
        pack_gptq(codes, scales, zeros, bits=4, group_size=-1)


def test_a_code_that_is_too_wide_is_refused() -> None:
    codes, scales, zeros = matrix(3, groups=1)
    codes[5, 5] = 8
    with pytest.raises(ValueError, match="a code is 8: GPTQ v1 at 3 bits holds 0 to 7"):
        pack_gptq(codes, scales, zeros, bits=3, group_size=-1)
