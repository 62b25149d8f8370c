"""Coded weights come out as slow loops, transformers and compressed-tensors decode them."""

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from sourced import source_formats
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from se_compress.artifacts import Encoding, Stored
from se_compress.model.decoding import decode
from se_compress.quant.packing import pack_rows

BF16 = torch.bfloat16


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Weights over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(
        3 * torch.randn((*shape[:-1], 1), generator=generator)
    )


def decoded(
    encoding: Encoding,
    parts: dict[str, Tensor],
    block: tuple[int, int] = (1, 1),
    transposed: bool = False,
    rows: tuple[int, int, int] | None = None,
    dtype: torch.dtype = BF16,
) -> Tensor:
    return decode(Stored(encoding, {}, 0, 0, block, transposed, rows), parts, dtype)


def same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, -0.0 and 0.0 told apart."""
    whole = {2: torch.int16, 4: torch.int32}[first.itemsize]
    return first.dtype == second.dtype and torch.equal(first.view(whole), second.view(whole))


# ---------------------------------------------------------------------------------------------- FP8


def slow_fp8(codes: Tensor, scales: Tensor, height: int, width: int) -> Tensor:
    """One value after the other, in double precision, rounded to float32 and then to bfloat16."""
    found = torch.empty(codes.shape)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            scale = float(scales[row // height, column // width])
            found[row, column] = float(codes[row, column]) * scale
    return found.bfloat16()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(32, 48, (16, 16)), (40, 40, (16, 16)), (5, 7, (128, 128)), (20, 12, (1, 12)), (9, 4, (9, 4)),
     (300, 8, (128, 4)), (17, 3, (1, 1))],
)  # fmt: skip
def test_fp8(rows: int, columns: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    height, width = block
    codes = (10 * draw(rows, columns)).clamp(-400, 400).to(dtype)
    scales = draw(-(-rows // height), -(-columns // width), seed=1)
    found = decoded("fp8", {"weight": codes, "scale": scales}, block)
    assert same(found, slow_fp8(codes, scales, height, width))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_all(shape: tuple[int, ...]) -> None:
    codes, scale = draw(6, 8).to(torch.float8_e4m3fn), torch.tensor(0.37)
    found = decoded("fp8", {"weight": codes, "scale": scale.reshape(shape)}, (6, 8))
    assert same(found, (codes.float() * 0.37).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float8_e8m0fnu, torch.uint8])
def test_fp8_is_what_transformers_decodes(dtype: torch.dtype) -> None:
    codes, scales = source_formats.to_fp8(draw(256, 384))
    if dtype in (torch.float8_e8m0fnu, torch.uint8):
        scales = torch.exp2(torch.log2(scales).ceil()).to(torch.float8_e8m0fnu).view(dtype)
    else:
        scales = scales.to(dtype)
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, BF16)
    assert same(decoded("fp8", {"weight": codes, "scale": scales}, (128, 128)), theirs)


# -------------------------------------------------------------------------------------------- MXFP4


def slow_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    rows = []
    for row, exponents in zip(blocks.tolist(), scales.tolist(), strict=True):
        found: list[float] = []
        for block, exponent in zip(row, exponents, strict=True):
            for byte in block:
                for code in (byte % 16, byte // 16):
                    magnitude = values[code % 8] * 2.0 ** (exponent - 127)
                    found.append(-magnitude if code >= 8 else magnitude)
        rows.append(found)
    return torch.tensor(rows, dtype=torch.float64).float().bfloat16()


def test_mxfp4_of_every_byte_and_exponent() -> None:
    """All pairs of values, and all exponents that leave them finite in bfloat16."""
    blocks = torch.arange(256).to(torch.uint8).reshape(1, 16, 16).repeat(253, 1, 1)
    scales = torch.arange(253).to(torch.uint8).reshape(253, 1).repeat(1, 16)
    found = decoded("mxfp4", {"blocks": blocks, "scales": scales})
    assert torch.isfinite(found).all()
    assert same(found, slow_mxfp4(blocks, scales))
    theirs = convert_moe_packed_tensors(blocks[None], scales[None])  # [1, C, R]
    assert same(found, theirs[0].T.contiguous())


def test_halves_of_bytes_are_what_transformers_decodes() -> None:
    """As DeepSeek-V4 has them: signed bytes [R, C/2], scales of 32 values."""
    blocks, scales = source_formats.to_mxfp4(draw(300, 64))
    parts = {"blocks": blocks.flatten(-2).view(torch.int8),
             "scales": scales.view(torch.float8_e8m0fnu)}  # fmt: skip
    found = decoded("mxfp4", parts)
    theirs = Fp8Dequantize(None)._dequantize_one(parts["blocks"], parts["scales"], BF16)
    assert same(found, theirs)
    assert same(found, slow_mxfp4(blocks, scales))


def test_a_weight_in_mxfp4_is_near() -> None:
    weight = draw(300, 64)
    blocks, scales = source_formats.to_mxfp4(weight)
    error = (decoded("mxfp4", {"blocks": blocks, "scales": scales}).float() - weight).norm()
    assert 0.05 < error / weight.norm() < 0.2


# ------------------------------------------------------------------------------------ packed words


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [32, 320])
def test_packed_words(bits: int, symmetric: bool, rows: int) -> None:
    group, columns = 16, 64
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (rows, columns // group)
    zeros = torch.full(shape, 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    scales = draw(*shape, seed=2).abs().bfloat16().float()
    parts = pack_rows(codes, scales, zeros, bits, with_zeros=not symmetric)
    found = decoded("pack-quantized", parts)
    steps = codes.float() - zeros.float().repeat_interleave(group, 1)
    assert same(found, (steps * scales.repeat_interleave(group, 1)).bfloat16())
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group
    )
    theirs = PackedQuantizationCompressor.decompress(
        dict(parts), QuantizationScheme(targets=["Linear"], weights=args)
    )
    assert torch.equal(found, theirs["weight"])


def test_what_the_script_packs() -> None:
    """The writer of the tests shares no line with the reader."""
    weight = draw(16, 64)
    words, scales = source_formats.to_int4(weight)
    parts = {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([16, 64])}
    found = decoded("pack-quantized", parts).float()
    wide = scales.float().repeat_interleave(32, 1)
    assert (found - weight).abs().max() <= 0.51 * wide.max()
    assert torch.equal(found, ((found / wide).round() * wide).bfloat16().float())


# ----------------------------------------------------------------------------------- views of parts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [None, (0, 6, 1), (6, 12, 1), (0, 12, 2), (1, 12, 2)])
def test_rows_of_a_plain_matrix(transposed: bool, rows: tuple[int, int, int] | None) -> None:
    whole = draw(12, 5)
    found = decoded(
        "plain",
        {"weight": whole.T.contiguous() if transposed else whole},
        transposed=transposed,
        rows=rows,
        dtype=torch.float32,
    )
    picked = range(12) if rows is None else range(*rows)
    assert found.is_contiguous()
    assert found.tolist() == [whole[row].tolist() for row in picked]


def test_a_bias_is_a_column() -> None:
    bias = torch.arange(8.0)
    found = decoded("plain", {"weight": bias}, rows=(1, 8, 2), dtype=torch.float32)
    assert found.tolist() == [1.0, 3.0, 5.0, 7.0]


def test_an_overflow_is_seen() -> None:
    """What no bfloat16 holds is infinite, which readers refuse."""
    codes = torch.full((1, 2), 448.0).to(torch.float8_e4m3fn)
    found = decoded("fp8", {"weight": codes, "scale": torch.tensor([[3e38]])}, (1, 2))
    assert math.isinf(float(found[0, 0]))
