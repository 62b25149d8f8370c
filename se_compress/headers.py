"""The safetensors format: headers read, and shards laid out before anything is written.

A file (https://github.com/huggingface/safetensors, README "Format") is eight bytes, little-endian,
with the length of the header; a JSON header of name -> {dtype, shape, data_offsets}; then the data,
in the order of the offsets, without holes. Standard library only.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from se_compress.artifacts import TensorInfo
from se_compress.errors import SourceError

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_HEADER_BYTES = 100_000_000


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint directory, single file or sharded, from the headers alone."""
    index = path / INDEX_FILE
    if index.exists():
        return _read_sharded(path, index)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise SourceError(_why_no_safetensors(path))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise SourceError(f"{path}: several weight files ({names} ...) but no {INDEX_FILE}")
    return {info.name: info for info in read_header(files[0])}


def _read_sharded(path: Path, index: Path) -> dict[str, TensorInfo]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = {shard: path / shard for shard in sorted(set(weight_map.values()))}
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{index}: cannot be read as an index ({error!r})") from None
    held: dict[str, dict[str, TensorInfo]] = {}
    for shard, file in files.items():
        if not file.exists():
            raise SourceError(f"{index} names {shard}, which is missing")
        held[shard] = {info.name: info for info in read_header(file)}
    tensors = {name: info for infos in held.values() for name, info in infos.items()}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise SourceError(f"{index} places {name} in {shard}, which does not hold it")
        tensors[name] = held[shard][name]
    return tensors


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
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER_BYTES):
            raise SourceError(f"{file}: is truncated or not a safetensors file")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_tensor_info(name, entry, file, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SourceError(f"{file}: has a corrupt safetensors header") from None
    end = max((info.end for info in tensors), default=8 + length)
    if end != size:
        raise SourceError(
            f"{file}: is {size} bytes long, but its header describes {end}; truncated?"
        )
    for info in tensors:
        _check_extent(info)
    return tensors


def _tensor_info(name: str, entry: Mapping[str, Any], file: Path, data_start: int) -> TensorInfo:
    begin, end = (int(offset) + data_start for offset in entry["data_offsets"])
    shape = tuple(int(extent) for extent in entry["shape"])
    return TensorInfo(name, str(entry["dtype"]), shape, str(file), begin, end)


def _check_extent(info: TensorInfo) -> None:
    items = 1
    for extent in info.shape:
        items *= extent
    if info.dtype in ITEM_BYTES and items * ITEM_BYTES[info.dtype] != info.size_bytes:
        raise SourceError(
            f"{info.file}: {info.name} is {info.dtype} {list(info.shape)} but has "
            f"{info.size_bytes} bytes"
        )


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
