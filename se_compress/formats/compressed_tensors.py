"""compressed-tensors, pack-quantized.

Stored (compressed-tensors 0.19, compressors/pack_quantized/base.py), b bits, G groups:

    weight_packed      int32 [R, C*b/32], runs across the columns
    weight_scale       bfloat16 [R, G]
    weight_shape       int64 [2]
    weight_zero_point  int32 [R*b/32, G], runs down the rows; only where zeros differ

It calls the codes less 2^(b-1) the values, which changes no bit.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from se_compress.artifacts import SOURCE_BITS, Scheme
from se_compress.formats.base import Format, Parts, groups_of
from se_compress.formats.planned import PlannedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from se_compress.quant.grid import Grid
    from se_compress.quant.packing import Codes


def _parts(rows: int, columns: int, bits: int, scheme: Scheme) -> Parts:
    groups = groups_of(columns, scheme)
    yield "weight_packed", "I32", (rows, columns * bits // 32)
    yield "weight_scale", "BF16", (rows, groups)
    yield "weight_shape", "I64", (2,)
    if not scheme.symmetric:
        yield "weight_zero_point", "I32", (rows * bits // 32, groups)


def _pack(codes: "Tensor", scales: "Tensor", zeros: "Tensor", grid: "Grid") -> "dict[str, Tensor]":
    from se_compress.quant.packing import pack_rows

    return pack_rows(codes, scales, zeros, grid.bits, with_zeros=not grid.symmetric)


def _codes(stored: "Mapping[str, Tensor]", columns: int) -> "Codes":
    from se_compress.quant.packing import unpack_rows

    return unpack_rows(stored, columns)


def _unpack(stored: "Mapping[str, Tensor]", shape: tuple[int, int], scheme: Scheme) -> "Tensor":
    return _codes(stored, shape[1]).dequantized()


def _settings(linears: Sequence[PlannedTensor], scheme: Scheme, base: int) -> dict[str, Any]:
    """As compressed-tensors 0.19 reads it (quantization/quant_config.py), and vLLM and SGLang.

    The base width is that of every Linear; a layer of another width has a pattern, which holds for
    the names on disk as for those in memory; other linears go by name. What keeps its 16 bits is in
    `ignore`. The order of rounding left no trace in the file, so none is claimed (`actorder`):
    SGLang would load scales otherwise on several GPUs.
    """
    targets: dict[int, list[str]] = {base: ["Linear"]}
    layers: dict[int, dict[int, None]] = {}
    ignore = [] if any("lm_head" in t.modules for t in linears) else ["lm_head"]
    for tensor in linears:
        if tensor.info.kind == "expert" and tensor.info.layer is not None:
            layers.setdefault(tensor.bits, {})[tensor.info.layer] = None
        elif tensor.bits == SOURCE_BITS:
            ignore += tensor.modules
        elif tensor.bits != base:
            targets.setdefault(tensor.bits, []).append(tensor.module)
    for bits, numbers in layers.items():
        pattern = rf"re:.*\.layers\.({'|'.join(map(str, numbers))})\..*\.experts\.\d+\..*"
        if bits == SOURCE_BITS:
            ignore.append(pattern)
        elif bits != base:
            targets.setdefault(bits, []).append(pattern)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _config_group(names, bits, scheme)
            for i, (bits, names) in enumerate(targets.items())
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "version": "0.19.0",
    }


def _config_group(names: list[str], bits: int, scheme: Scheme) -> dict[str, Any]:
    per_row = scheme.group_size == -1
    return {
        "targets": names,
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if per_row else "group",
            "group_size": None if per_row else scheme.group_size,
            "actorder": None,
            "dynamic": False,
        },
    }


COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    suffixes=("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    parts=_parts,
    settings=_settings,
    unpack=_unpack,
    codes=_codes,
    pack=_pack,
    quantize=None,
    scale_dtype="bfloat16",
    quant_method="compressed-tensors",
    layout="pack-quantized",
    engine="vllm",
    package="compressed_tensors",
    extra="compressed-tensors",
    has_float32=False,
)
