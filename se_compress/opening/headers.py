"""The safetensors format: headers read, and shards laid out before anything is written.

A file (https://github.com/huggingface/safetensors, README "Format") is eight bytes, little-endian,
with the length of the header; a JSON header of name -> {dtype, shape, data_offsets}; then the data,
in the order of the offsets, without holes. What the safetensors library refuses is refused here.
Standard library only.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from se_compress.artifacts import TensorInfo
from se_compress.errors import SourceError
from se_compress.opening.modelfiles import (
    DEEPEST_JSON,
    check_file,
    check_place,
    nesting,
    open_file,
    read_json,
    shown,
    unique,
)

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
_ITEM_BITS: Mapping[str, int] = {
    **{dtype: 8 * size for dtype, size in ITEM_BYTES.items()},
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_HEADER_BYTES = 100_000_000
# Beyond this size a header is believed only if it holds a tensor for so many bytes: an entry takes
# about 130, while brackets alone would fill memory with millions of empty lists.
_PLAIN_HEADER_BYTES = 2**24
_BYTES_A_TENSOR = 2000
_LARGEST_INDEX_BYTES = 2**26
_LARGEST_COUNT = 2**64 - 1


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint directory, single file or sharded, from the headers alone: what
    transformers would load from it. Raises SourceError where there can be two opinions on that."""
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    if os.path.lexists(index):
        return _read_sharded(path, index)
    files = [single] if os.path.lexists(single) else sorted(path.glob("*.safetensors"))
    if not files:
        raise SourceError(_why_no_safetensors(path))
    if len(files) > 1:
        names = ", ".join(shown(file.name) for file in files[:3])
        raise SourceError(f"{path}: several weight files ({names} ...) but no {INDEX_FILE}")
    check_file(files[0])
    check_place(files[0], path)
    return {info.name: info for info in read_header(files[0])}


def _read_sharded(path: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = _read_index(path, index)
    shards = sorted(set(weight_map.values()))
    if os.path.lexists(path / SINGLE_FILE) and shards != [SINGLE_FILE]:
        raise SourceError(
            f"{path}: holds {SINGLE_FILE}, which transformers would load, and {INDEX_FILE}, which "
            f"names {shown(shards[0])}; one of the two has to go"
        )
    tensors: dict[str, TensorInfo] = {}
    files = {shard: path / shard for shard in shards}
    for shard, file in files.items():
        if not os.path.lexists(file):
            raise SourceError(f"{index} names {shown(shard)}, which is missing")
        check_file(file)
        check_place(file, path)
        for info in read_header(file):
            if info.name in tensors:
                other = Path(tensors[info.name].file).name
                raise SourceError(
                    f"{path}: {shown(info.name)} is in two shards, {shown(other)} and "
                    f"{shown(shard)}; one of them has to go"
                )
            if info.name not in weight_map:
                raise SourceError(
                    f"{file}: holds {shown(info.name)}, which {index.name} leaves out"
                )
            tensors[info.name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != str(files[shard]):
            raise SourceError(
                f"{index} places {shown(name)} in {shown(shard)}, which does not hold it"
            )
    return tensors


def _read_index(path: Path, index: Path) -> dict[str, str]:
    """Tensor -> its shard, as a path within the model's directory."""
    check_file(index)
    check_place(index, path)
    found = read_json(index, _LARGEST_INDEX_BYTES)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: cannot be read as an index: it has no weight_map")
    for shard in set(map(str, weight_map.values())):
        if not 0 < len(shard) < 256 or not shard.isprintable() or shard.endswith("/"):
            raise SourceError(f"{index}: names a shard {shown(shard)!r}, which no file is called")
        if PurePath(shard).is_absolute() or ".." in PurePath(shard).parts:
            raise SourceError(
                f"{index}: names {shown(shard)}, which leads out of the model's directory; shards "
                "lie in it"
            )
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise SourceError(f"{index}: cannot be read as an index: a shard is named by a word")
    return weight_map


def _why_no_safetensors(path: Path) -> str:
    pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if pickles:
        return (
            f"{path}: the weights are pickles ({pickles[0].name}), which can run code when loaded; "
            "convert them to safetensors first"
        )
    return f"{path}: holds no .safetensors file"


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file. Raises SourceError if the file is not what it claims."""
    size = check_file(file)
    with open_file(file) as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER_BYTES):
            raise SourceError(f"{file}: is truncated or not a safetensors file")
        text = stream.read(length)
    try:
        tensors = _parse(text, str(file))
        end = _check_order(tensors, 8 + length)
    except (ValueError, RecursionError) as error:
        reason = "nested without end" if isinstance(error, RecursionError) else str(error)
        raise SourceError(
            f"{file}: has a corrupt safetensors header ({shown(reason, 200)})"
        ) from None
    if end != size:
        raise SourceError(
            f"{file}: is {size} bytes long, but its header describes {end}; truncated?"
        )
    return tensors


def _parse(text: bytes, file: str) -> list[TensorInfo]:
    """The tensors of a header. Raises ValueError with what is wrong, RecursionError."""
    if len(text) > _PLAIN_HEADER_BYTES:
        if text.count(b'"data_offsets"') * _BYTES_A_TENSOR < len(text):
            raise ValueError(f"{len(text)} bytes for few tensors")
    header = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_number)
    if not isinstance(header, dict):
        raise ValueError("no mapping of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is no mapping of words to words")
    start = 8 + len(text)
    return [_tensor_info(name, entry, file, start) for name, entry in header.items()]


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _tensor_info(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{shown(name)} has not a dtype, a shape and two data_offsets, but {shown(entry)}"
        ) from None
    bits = _ITEM_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ValueError(f"{shown(name)} is of an unknown dtype, {shown(dtype)}")
    items = 1
    if type(shape) is not list:
        raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
    for extent in shape:
        if type(extent) is not int or extent < 0:
            raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
        items *= extent
        if items > _LARGEST_COUNT:
            raise ValueError(f"{shown(name)} has more items than can be counted")
    if type(begin) is not int or type(end) is not int or begin < 0:
        raise ValueError(f"{shown(name)} has the data_offsets {shown([begin, end])}")
    if items * bits != 8 * (end - begin):
        raise ValueError(f"{shown(name)} is {dtype} {shown(shape)} but has {end - begin} bytes")
    if len(entry) > 3 and nesting(entry) > DEEPEST_JSON:
        raise ValueError("nested without end")
    if not name.isascii():
        name.encode()  # a lone surrogate is a ValueError, and no name
    return TensorInfo(name, dtype, tuple(shape), file, begin + data_start, end + data_start)


def _check_order(tensors: list[TensorInfo], data_start: int) -> int:
    """The end of the data. Raises ValueError for holes and overlaps."""
    at = data_start
    for info in sorted(tensors, key=lambda info: (info.begin, info.end)):
        if info.begin != at:
            kind = "overlaps what is before it" if info.begin < at else "leaves a hole before it"
            raise ValueError(
                f"{shown(info.name)} begins at byte {info.begin - data_start} of the data, which "
                f"{kind}: that ends at {at - data_start}"
            )
        at = info.end
    return at


# ------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Slot:
    """What a tensor of the result will be: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        items = 1
        for extent in self.shape:
            items *= extent
        return items * ITEM_BYTES[self.dtype]


def lay_out(slots: Iterable[Slot], directory: Path, max_shard_bytes: int) -> dict[str, TensorInfo]:
    """Give every tensor its file and byte range, in the order of `slots`, shards filled up to
    `max_shard_bytes` (a larger single tensor gets a shard of its own)."""
    shards: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if shards[-1] and filled + slot.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += slot.size_bytes
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    placed: dict[str, TensorInfo] = {}
    for name, shard in zip(names, shards, strict=True):
        placed |= _place(shard, str(directory / name))
    return placed


def _place(shard: list[Slot], file: str) -> dict[str, TensorInfo]:
    # Wide dtypes first keeps every tensor aligned to its item size, as safetensors' own writer
    # does.
    ordered = sorted(shard, key=lambda slot: -ITEM_BYTES[slot.dtype])
    begin = 0
    relative = []
    for slot in ordered:
        end = begin + slot.size_bytes
        relative.append(TensorInfo(slot.name, slot.dtype, slot.shape, file, begin, end))
        begin = end
    start = len(header_bytes(relative, 0))
    return {i.name: replace(i, begin=i.begin + start, end=i.end + start) for i in relative}


def header_bytes(tensors: Iterable[TensorInfo], data_start: int) -> bytes:
    """The first bytes of a shard, up to its data; `tensors` count from the start of the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for info in tensors:
        offsets = [info.begin - data_start, info.end - data_start]
        entries[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
