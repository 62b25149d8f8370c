"""Checkpoints whose weights are coded: which tensors of the files make which weight.

A config says that there are such (`quantization_config`), a tensor's dtype or name which ones:
some weights of a checkpoint may be coded, and others not. What is read, by the names on disk:

    fp8             w F8_E4M3 or F8_E5M2 [R, C] with w_scale_inv (DeepSeek-V3, transformers'
                    finegrained_fp8), w_scale (compressed-tensors) or, of X.weight, X.scale
                    (DeepSeek-V4): one for the tensor, for each row, or for each block of both
    mxfp4           w_blocks U8 [.., R, C/32, 16] with w_scales U8 [.., R, C/32] (gpt-oss), or
                    X.weight I8 [R, C/2] with X.scale F8_E8M0 [R, C/32] (DeepSeek-V4)
    pack-quantized  weight_packed I32 [R, C*b/32] with weight_scale [R, G], weight_shape [2] and,
                    where zeros differ, weight_zero_point I32 [R*b/32, G] (compressed-tensors)

Each becomes one tensor with the name that it has in a model in 16 bits, and says what it is decoded
from; model/decoding.py does it. The standard library only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from se_compress.artifacts import Encoding, Stored, TensorInfo
from se_compress.errors import SourceError
from se_compress.opening.headers import ITEM_BYTES
from se_compress.opening.modelfiles import quoted, shown

SETTINGS_KEY = "quantization_config"
# Formats of compressed-tensors.
_FORMATS = ("pack-quantized", "float-quantized", "naive-quantized")
_READ = "fp8, mxfp4 and, of compressed-tensors, " + ", ".join(_FORMATS)
_CODES = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_FLOATS = ("F32", "BF16", "F16")
_SIXTEEN_BITS = ("BF16", "F16")
_PACKED, _BLOCKS = "weight_packed", "_blocks"
_VALUES_A_BLOCK, _VALUES_A_BYTE, _WORD = 32, 2, 32
_BYTES_A_BLOCK = _VALUES_A_BLOCK // _VALUES_A_BYTE
# Names' ends of what goes with a weight. Those of activations are bound to it, and not used: the
# weights are decoded, and so nothing is rounded between them.
_OF_WEIGHTS = ("_scale_inv", "_scale", "_scales", _BLOCKS)
ACTIVATION_PARTS = ("input_scale", "activation_scale")


@dataclass(frozen=True)
class Packing:
    """What a config says of coded weights.

    block   rows and columns that share a scale of FP8; None if that is the whole tensor or a row
    grids   of packed words: bits, columns that share a scale (-1 for a whole row), and whether
            the codes have one zero, in the middle
    """

    block: tuple[int, int] | None = None
    grids: tuple[tuple[int, int, bool], ...] = ()


def packing_of(config: Mapping[str, Any], where: str) -> Packing | None:
    """None for a config that promises plain weights. Raises SourceError, beginning with `where`,
    for a quantisation that cannot be read."""
    settings = config.get(SETTINGS_KEY)
    if not settings:
        return None
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
    if method not in ("fp8", "mxfp4", "compressed-tensors"):
        raise SourceError(
            f"{where}: the model is already quantised ({shown(method)}); give the original "
            f"checkpoint, or one that is converted to bfloat16 (read are {_READ})"
        )
    try:
        if method == "compressed-tensors":
            return _of_compressed_tensors(settings)
        return Packing(_block(settings.get("weight_block_size")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{where}: {SETTINGS_KEY} of {method} cannot be read ({shown(str(error), 200)})"
        ) from None


def _block(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int for n in size):
        raise ValueError(f"a block is {quoted(size)}, where two numbers from 1 are needed")
    if min(size) < 1:
        raise ValueError(f"a block is {quoted(size)}, where two numbers from 1 are needed")
    return size[0], size[1]


def _of_compressed_tensors(settings: Mapping[str, Any]) -> Packing:
    form, groups = settings.get("format"), settings["config_groups"].values()
    if form not in _FORMATS:
        raise ValueError(f"format is {quoted(form)}; read are {', '.join(_FORMATS)}")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError("sparsity_config: sparse weights are not read")
    if settings.get("transform_config"):
        raise ValueError("transform_config: transformed weights are not read")
    weights = [group["weights"] for group in groups if group.get("weights")]
    blocks = {_block(w.get("block_structure")) for w in weights if w.get("strategy") == "block"}
    if len(blocks) > 1:
        raise ValueError("groups have blocks of several sizes")
    grids = []
    for one in (w for w in weights if w["type"] == "int"):
        if one.get("actorder") == "group":
            raise ValueError("actorder group: columns out of order are not read")
        bits, size = one["num_bits"], one.get("group_size")
        if type(bits) is not int or not 1 <= bits <= 8:
            raise ValueError(f"num_bits is {quoted(bits)}; read are 1 to 8")
        size = size if type(size) is int and size > 0 else -1
        grids.append((bits, size, one.get("symmetric", True) is not False))
    return Packing(next(iter(blocks), None), tuple(dict.fromkeys(grids)))


def decoded(found: Mapping[str, TensorInfo], packing: Packing, where: str) -> dict[str, TensorInfo]:
    """The tensors with every coded weight under its own name, in the order of `found`.

    where  the config, for errors

    Raises SourceError for a coded weight without its scale, a scale without its weight, or a pair
    that does not fit, and if nothing is coded at all.
    """
    taken: set[str] = set()
    made: dict[str, TensorInfo] = {}
    for name, info in found.items():
        weight = _decoded(name, info, found, packing)
        if weight is not None:
            made[name] = weight
            taken.update(part.name for part in _parts(weight))
    if not made:
        raise SourceError(f"{where}: {SETTINGS_KEY} says that weights are coded, but none is")
    tensors: dict[str, TensorInfo] = {}
    for name, info in found.items():
        if name in made:
            tensors[made[name].name] = made[name]
        elif name not in taken:
            tensors[name] = _plain(info, found)
    if len(tensors) + len(taken) != len(found) + len(made):
        raise SourceError(f"{where}: a weight is there twice, coded and as it is")
    return tensors


def _parts(weight: TensorInfo) -> Iterator[TensorInfo]:
    assert weight.stored is not None
    yield from weight.stored.parts.values()


def _plain(info: TensorInfo, found: Mapping[str, TensorInfo]) -> TensorInfo:
    """The tensor itself. Raises SourceError if it goes with a coded weight, which is not there."""
    leaf = info.name.rpartition(".")[2]
    plain = (info.name.removesuffix(end) for end in _OF_WEIGHTS if leaf.endswith(end))
    if leaf.startswith("weight_") or leaf in ACTIVATION_PARTS or any(n in found for n in plain):
        raise SourceError(
            f"{info.file}: {shown(info.name)} is {info.dtype}, a part of a coded weight that is "
            "not there, or not coded"
        )
    return info


def _decoded(
    name: str, info: TensorInfo, found: Mapping[str, TensorInfo], packing: Packing
) -> TensorInfo | None:
    """The weight that `info` holds the codes of; None if it holds none."""
    if info.dtype in _CODES:
        return _fp8(name, info, found, packing)
    if info.dtype == "U8" and name.endswith(_BLOCKS):
        return _mxfp4(name, info, found)
    if info.dtype == "I8" and _stem(name) + "scale" in found:
        return _halves(name, info, found[_stem(name) + "scale"])
    if name.endswith(f".{_PACKED}"):
        return _packed_words(name, info, found, packing)
    return None


def _fp8(
    name: str, info: TensorInfo, found: Mapping[str, TensorInfo], packing: Packing
) -> TensorInfo:
    names = [name + end for end in ("_scale_inv", "_scale")]
    if name.endswith(".weight"):
        names.append(_stem(name) + "scale")
    names = [scale for scale in names if scale in found]
    if len(names) != 1:
        raise SourceError(
            f"{info.file}: {shown(name)} is {info.dtype}, and beside it there is "
            + (" and ".join(names) if names else f"neither {name}_scale_inv nor {name}_scale")
            + "; one scale is needed"
        )
    scale = found[names[0]]
    _check_dtype(scale, _SCALES)
    parts = {"weight": info, "scale": scale}
    stem = _stem(name)
    parts |= {end: found[stem + end] for end in ACTIVATION_PARTS if stem + end in found}
    block = _block_of(info, scale, packing)
    return _weight(name, info.shape, scale.dtype, "fp8", parts, block)


def _block_of(info: TensorInfo, scale: TensorInfo, packing: Packing) -> tuple[int, int]:
    """Rows and columns that share one of the scales, as their shape has it."""
    if len(info.shape) < 2:
        raise _misfit(info, scale, "only matrices are coded")
    rows, columns = info.shape[-2:]
    before = info.shape[:-2]
    choices = {(rows, columns): ((), (1,), (*before, 1, 1)), (1, columns): ((*before, rows, 1),)}
    for block, shapes in choices.items():
        if scale.shape in shapes and (not before or len(scale.shape) == len(info.shape)):
            return block
    if packing.block is None:
        raise _misfit(info, scale, "config.json gives no size of a block")
    height, width = packing.block
    if scale.shape != (*before, -(-rows // height), -(-columns // width)):
        raise _misfit(info, scale, f"blocks are {height} x {width}")
    return packing.block


def _mxfp4(name: str, info: TensorInfo, found: Mapping[str, TensorInfo]) -> TensorInfo:
    weight = name.removesuffix(_BLOCKS)
    scale = _beside(info, f"{weight}_scales", found)
    _check_dtype(scale, ("U8", "F8_E8M0"))
    if len(info.shape) < 3 or info.shape[-1] != _BYTES_A_BLOCK:
        raise _misfit(info, scale, f"a block has {_VALUES_A_BLOCK} values")
    if scale.shape != info.shape[:-1]:
        raise _misfit(info, scale, "each block has one scale")
    shape = (*info.shape[:-2], info.shape[-2] * _VALUES_A_BLOCK)
    return _weight(weight, shape, "BF16", "mxfp4", {"blocks": info, "scales": scale})


def _halves(name: str, info: TensorInfo, scale: TensorInfo) -> TensorInfo:
    _check_dtype(scale, ("U8", "F8_E8M0"))
    if len(info.shape) != 2 or scale.shape != (info.shape[0], info.shape[1] // _BYTES_A_BLOCK):
        raise _misfit(info, scale, f"a scale goes with {_VALUES_A_BLOCK} values, two in a byte")
    shape = (info.shape[0], info.shape[1] * _VALUES_A_BYTE)
    return _weight(name, shape, "BF16", "mxfp4", {"blocks": info, "scales": scale})


def _stem(name: str) -> str:
    """What the parts of a weight have in common, to the last dot."""
    return name.removesuffix("weight")


def _packed_words(
    name: str, info: TensorInfo, found: Mapping[str, TensorInfo], packing: Packing
) -> TensorInfo:
    stem = name.removesuffix(_PACKED)
    parts = {_PACKED: info}
    for part in ("weight_scale", "weight_shape"):
        parts[part] = _beside(info, stem + part, found)
    scale, zero = parts["weight_scale"], found.get(stem + "weight_zero_point")
    _check_dtype(info, ("I32",))
    _check_dtype(scale, _FLOATS)
    if len(info.shape) != 2 or len(scale.shape) != 2 or info.shape[0] != scale.shape[0]:
        raise _misfit(info, scale, "each row has its scales")
    rows, words = info.shape
    fitting = {
        (bits, words * _WORD // bits)
        for bits, size, symmetric in packing.grids
        if symmetric is (zero is None)
        and words * _WORD % bits == 0
        and scale.shape[1] == _groups(words * _WORD // bits, size)
    }
    if len(fitting) != 1:
        told = f"config.json has (bits, group size, symmetric) {list(packing.grids)}"
        raise _misfit(info, scale, told)
    ((bits, columns),) = fitting
    if zero is not None:
        _check_dtype(zero, ("I32",))
        if rows * bits % _WORD or zero.shape != (rows * bits // _WORD, scale.shape[1]):
            raise _misfit(info, zero, "zeros are packed down the rows")
        parts["weight_zero_point"] = zero
    return _weight(stem + "weight", (rows, columns), scale.dtype, "pack-quantized", parts)


def _groups(columns: int, size: int) -> int:
    return 1 if size == -1 else columns // size if columns % size == 0 else 0


def _weight(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    encoding: Encoding,
    parts: Mapping[str, TensorInfo],
    block: tuple[int, int] = (1, 1),
) -> TensorInfo:
    """A decoded weight: in the dtype of its scales where that has 16 bits, in bfloat16 else."""
    dtype = dtype if dtype in _SIXTEEN_BITS else "BF16"
    items = 1
    for extent in shape:
        items *= extent
    first = next(iter(parts.values()))
    on_disk = sum(part.size_bytes for part in parts.values())
    stored = Stored(encoding, parts, items * ITEM_BYTES[dtype], on_disk, block)
    return TensorInfo(name, dtype, shape, first.file, first.begin, first.end, stored=stored)


def _beside(info: TensorInfo, name: str, found: Mapping[str, TensorInfo]) -> TensorInfo:
    if name not in found:
        raise SourceError(f"{info.file}: {shown(info.name)} is coded, but {shown(name)} is missing")
    return found[name]


def _check_dtype(info: TensorInfo, accepted: tuple[str, ...]) -> None:
    if info.dtype not in accepted:
        raise SourceError(
            f"{info.file}: {shown(info.name)} is {info.dtype}; read are {', '.join(accepted)}"
        )


def _misfit(info: TensorInfo, scale: TensorInfo, why: str) -> SourceError:
    return SourceError(
        f"{info.file}: {shown(info.name)} is {info.dtype} {shown(list(info.shape))}, which does "
        f"not go with {shown(scale.name)} {shown(list(scale.shape))}: {why}"
    )
