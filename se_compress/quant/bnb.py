"""bitsandbytes' own kernels for one matrix at a time: tensors in, tensors out.

R rows (out features), C columns (in features), B = R*C / group_size blocks.

nf4 and fp4 keep one absolute maximum per block of `group_size` weights along a row, and two codes
to the byte. With double quantisation the maxima themselves are codes of bitsandbytes' dynamic 8-bit
map, less their mean, in blocks of 256. int8 is the weight of LLM.int8(): one maximum per row, 127
steps to either side.

The parts go by bitsandbytes' own names, and int8 is flat as its 4-bit types are: transformers
without our quantizer then stops at the shape, where it would take [R, C] for the weight itself.
bitsandbytes' tables (the 16 values of nf4 and fp4, the dynamic map) are not among the parts.

A block must not run on into the next row: bitsandbytes 0.50.2 writes such codes, and its CPU kernel
then reads them back with the maxima of other blocks, without an error.
"""

import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from se_compress.artifacts import Scheme

# What bitsandbytes takes (functional.quantize_4bit), less 2048 and 4096, which its CPU kernel hands
# to torch.compile.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024)
NESTED_BLOCK = 256


# What may belong to one matrix.
PARTS = ("weight", "weight.absmax", "weight.nested_absmax", "weight.nested_offset", "SCB")


def quantize_bnb(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The parts of one floating-point matrix [R, C].

    nf4, fp4  weight uint8 [R*C/2, 1]; weight.absmax float32 [B], or with double quantisation uint8
              [B], weight.nested_absmax float32 [B/256, rounded up] and weight.nested_offset
              float32 []
    int8      weight int8 [R*C, 1]; SCB float32 [R]

    Raises ValueError if the block size is not one of BLOCK_SIZES or does not divide C.
    """
    functional = _functional()
    if scheme.data_type == "int8":
        # On the CPU: the kernel for CUDA takes float16 only, and the result is to be the same.
        codes, row_maxima, _ = functional.int8_vectorwise_quant(weight.float().cpu())
        return {"weight": codes.reshape(-1, 1), "SCB": row_maxima}
    if scheme.group_size not in BLOCK_SIZES or weight.shape[1] % scheme.group_size:
        raise ValueError(f"blocks of {scheme.group_size} do not fit {tuple(weight.shape)}")
    codes, state = functional.quantize_4bit(
        weight.float(),
        blocksize=scheme.group_size,
        compress_statistics=scheme.double_quant,
        quant_type=scheme.data_type,
    )
    parts = {"weight": codes, "weight.absmax": state.absmax}
    if scheme.double_quant:
        parts["weight.nested_absmax"] = state.state2.absmax
        parts["weight.nested_offset"] = state.offset
    return parts


def dequantize_bnb(
    parts: Mapping[str, Tensor], shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> Tensor:
    """What the parts stand for, [R, C] in float32, float16 or bfloat16, on their device."""
    functional = _functional()
    if scheme.data_type == "int8":
        codes = parts["weight"].view(shape)
        weight: Tensor = functional.int8_vectorwise_dequant(codes, parts["SCB"])
        return weight.to(dtype)
    offset = nested = None
    if scheme.double_quant:
        offset = parts["weight.nested_offset"]
        nested = functional.QuantState(
            parts["weight.nested_absmax"],
            code=_dynamic_map(parts["weight"].device),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    state = functional.QuantState(
        parts["weight.absmax"],
        shape=torch.Size(shape),
        blocksize=scheme.group_size,
        quant_type=scheme.data_type,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )
    unpacked: Tensor = functional.dequantize_4bit(parts["weight"], state)
    return unpacked


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    values: Tensor = _functional().create_dynamic_map()
    return values.to(device)


@cache
def _functional() -> Any:
    """bitsandbytes.functional, without the warning that a kernel which we do not call (its product
    with 4-bit weights) cannot be had from the Hub."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.disabled = True
    try:
        return import_module("bitsandbytes.functional")
    finally:
        logger.disabled = False
