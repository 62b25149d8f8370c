"""auto-round: as GPTQ without g_idx. Packing auto_round stores zeros as they are, packing
auto_round:auto_gptq a zero less one, which vLLM reads as well.

Stored (auto-round 0.15, auto_round_extension/torch/qlinear_torch.py), b bits, G groups:

    qweight  int32 [C*b/32, R], runs down the columns
    qzeros   int32 [G, R*b/32], runs across the rows
    scales   float16 [G, R]
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from se_compress.artifacts import SOURCE_BITS, Scheme
from se_compress.formats.base import Format, Parts, groups_of
from se_compress.formats.planned import PlannedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from se_compress.quant.grid import Grid
    from se_compress.quant.packing import Codes


def parts(rows: int, columns: int, bits: int, scheme: Scheme) -> Parts:
    """What GPTQ and auto-round both store."""
    groups = groups_of(columns, scheme)
    yield "qweight", "I32", (columns * bits // 32, rows)
    yield "qzeros", "I32", (groups, rows * bits // 32)
    yield "scales", "F16", (groups, rows)


def _pack(
    offset: int, codes: "Tensor", scales: "Tensor", zeros: "Tensor", grid: "Grid"
) -> "dict[str, Tensor]":
    from se_compress.quant.packing import pack_qweight

    return pack_qweight(codes, scales, zeros, grid.bits, offset)


def read_codes(offset: int, stored: "Mapping[str, Tensor]", columns: int) -> "Codes":
    """What GPTQ and auto-round both store, read back."""
    from se_compress.quant.packing import unpack_qweight

    return unpack_qweight(stored, columns, offset)


def _unpack(
    offset: int, stored: "Mapping[str, Tensor]", shape: tuple[int, int], scheme: Scheme
) -> "Tensor":
    return read_codes(offset, stored, shape[1]).dequantized()


def _settings(
    packing: str, linears: Sequence[PlannedTensor], scheme: Scheme, base: int
) -> dict[str, Any]:
    """As auto-round 0.15 reads it (inference/convert_model.py): every linear below
    `block_name_to_quantize` has the base width unless `extra_config` names it, behind the decoder
    (multi-token prediction) too. vLLM 0.32 looks the experts of a layer up by the name of what
    holds them, and by that alone (quantization/inc/config_parser.py): a layer of one width that is
    not the base has that key as well."""
    blocks = next(t.module.partition("layers.")[0] for t in linears if t.bits != SOURCE_BITS)
    blocks += "layers"
    differing = {
        module: {"bits": tensor.bits}
        for tensor in linears
        for module in tensor.modules
        if module.startswith(f"{blocks}.") and tensor.bits != base
    }
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": base,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "data_type": "int",
        "block_name_to_quantize": blocks,
        "extra_config": differing | _holders(linears, base),
    }


def _holders(linears: Sequence[PlannedTensor], base: int) -> dict[str, dict[str, int]]:
    """The width of what holds the experts of a layer, where it is one and not the base."""
    layers: dict[str, set[int]] = {}
    for tensor in linears:
        stem, experts, _ = tensor.module.rpartition(".experts.")
        if experts:  # those of layers for multi-token prediction too
            layers.setdefault(f"{stem}.experts", set()).add(tensor.bits)
    alike = {holder: next(iter(bits)) for holder, bits in layers.items() if len(bits) == 1}
    return {holder: {"bits": bits} for holder, bits in alike.items() if bits != base}


AUTO_ROUND = Format(
    name="auto-round",
    suffixes=("qweight", "qzeros", "scales"),
    parts=parts,
    settings=partial(_settings, "auto_round"),
    unpack=partial(_unpack, 0),
    codes=partial(read_codes, 0),
    pack=partial(_pack, 0),
    quantize=None,
    scale_dtype="float16",
    quant_method="auto-round",
    layout="",
    engine="transformers",
    package="auto_round",
    extra="autoround",
    has_float32=False,
)
AUTO_ROUND_GPTQ = replace(
    AUTO_ROUND,
    name="auto-round-gptq",
    settings=partial(_settings, "auto_round:auto_gptq"),
    unpack=partial(_unpack, 1),
    codes=partial(read_codes, 1),
    pack=partial(_pack, 1),
)
