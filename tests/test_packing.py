"""Packed words against a packer that sets one bit at a time."""

import pytest
import torch
from packed import pack, unpack
from torch import Tensor

WIDTHS = [2, 3, 4, 5, 6, 8]
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


FORMATS = ["gptq", "gptq_v2", "auto-round", "auto-round-gptq", "compressed-tensors"]


def bfloat16_scales(given: Matrix) -> Matrix:
    """The same with scales that every format holds."""
    codes, scales, zeros = given
    return codes, scales.bfloat16().float(), zeros


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("form", "offset"), [("gptq", 1), ("gptq_v2", 0), ("auto-round", 0), ("auto-round-gptq", 1)]
)
def test_words_are_those_of_the_bit_by_bit_packer(form: str, offset: int, bits: int) -> None:
    codes, scales, zeros = matrix(bits, groups=3)
    packed = pack(form, codes, scales, zeros, bits=bits, group_size=32, symmetric=False)
    down = [words_bit_by_bit(row, bits) for row in codes.tolist()]
    across = [words_bit_by_bit([z - offset for z in group], bits) for group in zeros.T.tolist()]
    assert packed["qweight"].T.tolist() == down
    assert packed["qzeros"].tolist() == across
    assert packed["scales"].tolist() == scales.T.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_packs_rows_and_its_zeros_down_the_rows(bits: int) -> None:
    codes, scales, zeros = bfloat16_scales(matrix(bits, groups=3))
    packed = pack(
        "compressed-tensors", codes, scales, zeros, bits=bits, group_size=32, symmetric=False
    )
    along = [words_bit_by_bit(row, bits) for row in codes.tolist()]
    down = [words_bit_by_bit(group, bits) for group in zeros.T.tolist()]
    assert packed["weight_packed"].tolist() == along
    assert packed["weight_zero_point"].T.tolist() == down
    assert packed["weight_scale"].tolist() == scales.tolist()
    assert packed["weight_shape"].tolist() == [ROWS, COLUMNS]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_own_library_packs_and_unpacks_the_same_bits(
    bits: int, symmetric: bool
) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes, scales, zeros = bfloat16_scales(matrix(bits, groups=3))
    middle = 2 ** (bits - 1)
    if symmetric:
        zeros = torch.full_like(zeros, middle)
    ours = pack(
        "compressed-tensors", codes, scales, zeros, bits=bits, group_size=32, symmetric=symmetric
    )
    values = (codes.to(torch.int16) - middle).to(torch.int8)  # it calls these the values
    theirs = helpers.pack_to_int32(values, bits)
    assert torch.equal(ours["weight_packed"], theirs)
    assert torch.equal(helpers.unpack_from_int32(ours["weight_packed"], bits, codes.shape), values)
    if not symmetric:
        points = (zeros.to(torch.int16) - middle).to(torch.int8)
        packed = helpers.pack_to_int32(points, bits, packed_dim=0)
        assert torch.equal(ours["weight_zero_point"], packed)
        unpacked = helpers.unpack_from_int32(
            ours["weight_zero_point"], bits, zeros.shape, packed_dim=0
        )
        assert torch.equal(unpacked, points)


def test_three_bits_straddle_words_at_the_11th_and_22nd_value() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21] = 0b101, 0b011
    ones = torch.ones(32, 1)
    packed = pack("gptq", codes, ones, ones.to(torch.uint8), bits=3, group_size=-1)
    assert packed["qweight"][:, 0].tolist() == [0b01 << 30, 0b1 | -(2**31), 0b01]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("group_size", "groups"), [(-1, 1), (32, 3), (40, 3)])
def test_dtypes_shapes_and_the_group_of_each_column(
    bits: int, group_size: int, groups: int
) -> None:
    packed = pack("gptq", *matrix(bits, groups), bits=bits, group_size=group_size)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == {
        "qweight": (torch.int32, (COLUMNS * bits // 32, ROWS)),
        "qzeros": (torch.int32, (groups, ROWS * bits // 32)),
        "scales": (torch.float16, (groups, ROWS)),
        "g_idx": (torch.int32, (COLUMNS,)),
    }
    size = COLUMNS if group_size == -1 else group_size
    assert packed["g_idx"].tolist() == [column // size for column in range(COLUMNS)]
    assert all(t.is_contiguous() for t in packed.values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("group_size", "groups"), [(-1, 1), (32, 3)])
def test_unpacking_gives_back_what_was_packed_and_finds_the_width_itself(
    form: str, bits: int, group_size: int, groups: int
) -> None:
    codes, scales, zeros = bfloat16_scales(matrix(bits, groups))
    parts = pack(form, codes, scales, zeros, bits=bits, group_size=group_size, symmetric=False)
    got = unpack(form, parts, COLUMNS)
    for found, wanted in zip(got, (codes, scales, zeros), strict=False):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    size = COLUMNS if group_size == -1 else group_size
    assert got.group.tolist() == [column // size for column in range(COLUMNS)]
    row, column = 7, 50
    step = int(codes[row, column]) - int(zeros[row, column // size])
    assert got.dequantized()[row, column] == step * float(scales[row, column // size])


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_symmetric_matrix_has_no_zeros_in_compressed_tensors(bits: int) -> None:
    codes, scales, zeros = bfloat16_scales(matrix(bits, groups=3))
    zeros.fill_(1 << (bits - 1))
    parts = pack("compressed-tensors", codes, scales, zeros, bits=bits, group_size=32)
    assert "weight_zero_point" not in parts
    assert torch.equal(unpack("compressed-tensors", parts, COLUMNS).zeros, zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_reader_may_add_one_to_every_zero_of_a_word_at_once(bits: int) -> None:
    codes, scales, zeros = matrix(bits, groups=3)
    packed = pack("gptq", codes, scales, zeros, bits=bits, group_size=32)
    one_in_each = sum(1 << place for place in range(0, 32, bits))
    true_zeros = [words_bit_by_bit(group, bits) for group in zeros.T.tolist()]
    assert (packed["qzeros"] + one_in_each).tolist() == true_zeros


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
        pack("gptq", *matrix(bits, 1, rows, columns), bits=bits, group_size=-1)


@pytest.mark.parametrize(("bits", "rows", "columns"), [(4, 8, 16), (2, 16, 48), (8, 4, 12)])
def test_whole_words_that_are_no_whole_run_of_32_values_fit(
    bits: int, rows: int, columns: int
) -> None:
    given = matrix(bits, 1, rows, columns)
    got = unpack("gptq", pack("gptq", *given, bits=bits, group_size=-1), columns)
    assert torch.equal(got.codes, given[0])
    assert torch.equal(got.zeros, given[2])


def test_a_zero_of_zero_is_refused_where_it_would_borrow() -> None:
    codes, scales, zeros = matrix(4, groups=1)
    zeros[5] = 0
    with pytest.raises(ValueError, match="a zero point is 0: a file of 4 bits holds 1 to 15"):
        pack("gptq", codes, scales, zeros, bits=4, group_size=-1)
    parts = pack("gptq_v2", codes, scales, zeros, bits=4, group_size=-1)
    assert torch.equal(unpack("gptq_v2", parts, COLUMNS).zeros, zeros)


def test_a_code_that_is_too_wide_is_refused() -> None:
    codes, scales, zeros = matrix(3, groups=1)
    codes[5, 5] = 8
    with pytest.raises(ValueError, match="a code is 8: a file of 3 bits holds 0 to 7"):
        pack("gptq", codes, scales, zeros, bits=3, group_size=-1)


@pytest.mark.parametrize(("form", "near"), [("gptq", 1e-8), ("compressed-tensors", 1.001)])
def test_a_scale_is_never_rounded_by_the_file(form: str, near: float) -> None:
    codes, scales, zeros = bfloat16_scales(matrix(4, groups=1))
    scales[3, 0] = near
    with pytest.raises(ValueError, match=r"a scale is no torch\.b?float16 number"):
        pack(form, codes, scales, zeros, bits=4, group_size=-1)


def test_words_that_do_not_belong_to_the_matrix_are_refused() -> None:
    parts = pack("gptq", *matrix(4, groups=1), bits=4, group_size=-1)
    with pytest.raises(ValueError, match="100 columns do not fill 12 words at any width"):
        unpack("gptq", parts, 100)
    given = bfloat16_scales(matrix(4, groups=1))
    parts = pack("compressed-tensors", *given, bits=4, group_size=-1)
    with pytest.raises(ValueError, match=r"weight_shape is \[64, 96\], not \[64, 48\]"):
        unpack("compressed-tensors", parts, 48)
