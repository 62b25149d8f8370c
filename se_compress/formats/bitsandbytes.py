"""bitsandbytes' nf4, fp4 and int8, under its own names; what is stored is told in quant/bnb.py."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from se_compress.artifacts import Scheme
from se_compress.formats.base import Format, Parts
from se_compress.formats.planned import PlannedTensor

if TYPE_CHECKING:
    from torch import Tensor


def _parts(rows: int, columns: int, bits: int, scheme: Scheme) -> Parts:
    """8 bits are int8."""
    if bits == 8:
        yield "weight", "I8", (rows * columns, 1)
        yield "SCB", "F32", (rows,)
        return
    blocks = rows * columns // scheme.group_size
    yield "weight", "U8", (rows * columns // 2, 1)
    yield "weight.absmax", "U8" if scheme.double_quant else "F32", (blocks,)
    if scheme.double_quant:
        yield "weight.nested_absmax", "F32", (-(-blocks // 256),)
        yield "weight.nested_offset", "F32", ()


def _quantize(weight: "Tensor", scheme: Scheme) -> "dict[str, Tensor]":
    from se_compress.quant.bnb import quantize_bnb

    return quantize_bnb(weight, scheme)


def _unpack(stored: "Mapping[str, Tensor]", shape: tuple[int, int], scheme: Scheme) -> "Tensor":
    import torch

    from se_compress.quant.bnb import dequantize_bnb

    return dequantize_bnb(stored, shape, scheme, torch.float32)


def _settings(linears: Sequence[PlannedTensor], scheme: Scheme, base: int) -> dict[str, Any]:
    """As `loading.SeCompressConfig` reads it: each matrix that is not as one would expect, an
    expert's in 16 bits or another's packed, by its name."""
    experts = [tensor for tensor in linears if tensor.info.kind == "expert"]
    others = [tensor for tensor in linears if tensor.info.kind != "expert"]
    blocks = {"block_size": scheme.group_size, "double_quant": scheme.double_quant}
    return {
        "quant_method": "se-compress",
        "format": "bitsandbytes",
        "version": 1,
        "data_type": scheme.data_type,
        **({} if scheme.data_type == "int8" else blocks),
        "in_16_bit": [tensor.module for tensor in experts if tensor.making != "packed"],
        "others": [tensor.module for tensor in others if tensor.making == "packed"],
    }


BITSANDBYTES = Format(
    name="bitsandbytes",
    suffixes=("weight", "weight.absmax", "weight.nested_absmax", "weight.nested_offset", "SCB"),
    parts=_parts,
    settings=_settings,
    unpack=_unpack,
    pack=None,
    quantize=_quantize,
    scale_dtype=None,
    quant_method="se-compress",
    layout="",
    engine="transformers",
    package="bitsandbytes",
    extra="bnb",
    has_float32=True,
)
