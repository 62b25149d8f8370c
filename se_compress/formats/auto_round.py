"""auto-round, packing_format auto_round: as GPTQ without g_idx, and with zeros as they are.

Stored (auto-round 0.15, auto_round_extension/torch/qlinear_torch.py), b bits, G groups:

    qweight  int32 [C*b/32, R], runs down the columns
    qzeros   int32 [G, R*b/32], runs across the rows
    scales   float16 [G, R]
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from se_compress.artifacts import Scheme
from se_compress.formats.base import Format, Parts, groups_of
from se_compress.formats.planned import PlannedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from se_compress.quant.grid import Grid


def parts(rows: int, columns: int, bits: int, scheme: Scheme) -> Parts:
    """What GPTQ and auto-round both store."""
    groups = groups_of(columns, scheme)
    yield "qweight", "I32", (columns * bits // 32, rows)
    yield "qzeros", "I32", (groups, rows * bits // 32)
    yield "scales", "F16", (groups, rows)


def _pack(codes: "Tensor", scales: "Tensor", zeros: "Tensor", grid: "Grid") -> "dict[str, Tensor]":
    from se_compress.quant.packing import pack_qweight

    return pack_qweight(codes, scales, zeros, grid.bits, 0)


def _unpack(stored: "Mapping[str, Tensor]", shape: tuple[int, int], scheme: Scheme) -> "Tensor":
    from se_compress.quant.packing import unpack_qweight

    return unpack_qweight(stored, shape[1], 0).dequantized()


def _settings(linears: Sequence[PlannedTensor], scheme: Scheme, base: int) -> dict[str, Any]:
    """As auto-round 0.15 reads it (inference/convert_model.py): every linear below
    `block_name_to_quantize` has the base width unless `extra_config` names it, behind the decoder
    (multi-token prediction) too."""
    blocks = "model.layers"
    differing = {
        tensor.module: {"bits": tensor.bits}
        for tensor in linears
        if tensor.name.startswith(f"{blocks}.") and tensor.bits != base
    }
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "bits": base,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "data_type": "int",
        "block_name_to_quantize": blocks,
        "extra_config": differing,
    }


AUTO_ROUND = Format(
    name="auto-round",
    suffixes=("qweight", "qzeros", "scales"),
    parts=parts,
    settings=_settings,
    unpack=_unpack,
    pack=_pack,
    quantize=None,
    scale_dtype="float16",
    quant_method="auto-round",
    layout="",
    engine="transformers",
    package="auto_round",
    extra="autoround",
    has_float32=False,
)
