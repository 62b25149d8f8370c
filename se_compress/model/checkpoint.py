"""Tensors on disk: read by name, and written into shards whose layout is known in advance.

All names, dtypes and shapes of a result follow from its plan, so every shard is laid out and
reserved before the first weight is read; a tensor is then written to its own place whenever it is
ready. A full disk shows at once, a killed run goes on where it was, nothing is copied twice, and no
more than one tensor has to be in memory.
"""

import json
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from se_compress.artifacts import Scheme, Stored, TensorInfo
from se_compress.errors import ResourceError, SourceError
from se_compress.formats import FORMATS, UNQUANTISED
from se_compress.model.decoding import decode
from se_compress.opening.headers import INDEX_FILE, header_bytes

Reader = Callable[[str], Tensor]

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
# Of a tensor that holds the codes of a quantised matrix.
CODE_DTYPES = ("I32", "U8", "I8")
COPY_BYTES = 2**24


def open_tensors(tensors: Mapping[str, TensorInfo]) -> Reader:
    """A function that reads one tensor by name through a memory map, decoded where it is coded.

    Shape and dtype are those of `tensors`. What is not decoded shares the map's pages and is
    read-only by convention: change a copy. The function raises SourceError for an unknown name, a
    dtype that torch does not have and a file that has changed.
    """

    def read(name: str) -> Tensor:
        info = tensors.get(name)
        if info is None:
            raise SourceError(f"{name}: the checkpoint has no such tensor")
        if info.dtype not in TORCH_DTYPES:
            raise SourceError(f"{name}: dtype {info.dtype} cannot be read")
        return read_tensor(info)

    return read


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, as `open_tensors` reads it. Raises SourceError for parts that contradict what
    their headers say."""
    if info.stored is None:
        return _map(info)
    parts = {part: _map(where) for part, where in info.stored.parts.items()}
    try:
        decoded = decode(info.stored, parts, TORCH_DTYPES[info.dtype])
    except ValueError as error:
        raise SourceError(f"{info.file}: {info.name} cannot be decoded ({error})") from None
    if tuple(decoded.shape) != info.shape:
        raise SourceError(
            f"{info.file}: {info.name} decodes to {list(decoded.shape)}, not {list(info.shape)}"
        )
    return decoded


def _map(info: TensorInfo) -> Tensor:
    """The tensor, in pages of its file."""
    dtype = TORCH_DTYPES[info.dtype]
    if info.size_bytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    skipped = info.begin % mmap.ALLOCATIONGRANULARITY
    length = skipped + info.size_bytes
    with open_whole(info) as stream:
        # ACCESS_COPY: torch wants a writable buffer; nothing ever reaches the file. Of this tensor
        # alone: the kernel refuses a writable map of a file that is larger than memory.
        pages = mmap.mmap(
            stream.fileno(), length, access=mmap.ACCESS_COPY, offset=info.begin - skipped
        )
    raw = torch.frombuffer(pages, dtype=torch.uint8, count=info.size_bytes, offset=skipped)
    if skipped % dtype.itemsize:  # some writers do not align their tensors
        raw = raw.clone()
    return raw.view(dtype).reshape(info.shape)


def open_whole(info: TensorInfo) -> BinaryIO:
    """The tensor's file, open for reading.

    Raises SourceError if it is gone, or has become too short for the tensor: reading a map beyond
    the end of its file would kill the process.
    """
    try:
        stream = open(info.file, "rb")
    except OSError as error:
        raise SourceError(
            f"{info.file}: cannot be read any more ({error.strerror}); it has changed"
        ) from None
    if os.fstat(stream.fileno()).st_size < info.end:
        stream.close()
        raise SourceError(f"{info.file}: ended within {info.name}; it has changed")
    return stream


def open_result(
    found: Mapping[str, TensorInfo],
    source: Mapping[str, TensorInfo],
    scheme: Scheme,
    names: Mapping[str, str] = {},
) -> Reader:
    """A reader of a compressed checkpoint by the names of its source.

    Packed weights come back dequantised, float32 [rows, columns], everything else as it is on disk.

    found, source   headers of the compressed checkpoint and of its source
    scheme          how the quantised matrices are stored
    names           tensor of the source -> what the checkpoint calls it, where that differs
    """
    read_stored = open_tensors(found)
    if scheme.format == UNQUANTISED:
        return lambda name: read_stored(names.get(name, name))
    form = FORMATS[scheme.format]

    def read(name: str) -> Tensor:
        stored = names.get(name, name)
        stem = stored.removesuffix(".weight")
        parts = {p: f"{stem}.{p}" for p in form.suffixes if f"{stem}.{p}" in found}
        codes = found.get(parts.get(form.suffixes[0], ""))
        if codes is None or codes.dtype not in CODE_DTYPES:
            return read_stored(stored)
        rows, columns = source[name].shape
        tensors = {part: read_stored(where) for part, where in parts.items()}
        return form.unpack(tensors, (rows, columns), scheme)

    return read


def copy_tensor(info: TensorInfo, slot: TensorInfo) -> None:
    """Copy the bytes of a tensor to its place in the result, whatever its shape and dtype.

    Raises SourceError if the file has become too short.
    """
    with open_whole(info) as stream, open(slot.file, "r+b") as target:
        stream.seek(info.begin)
        target.seek(slot.begin)
        remaining = info.size_bytes
        while remaining:
            data = stream.read(min(remaining, COPY_BYTES))
            if not data:
                raise SourceError(f"{info.file}: ended within {info.name}; it has changed")
            target.write(data)
            remaining -= len(data)


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """The same tensor [...]. Raises SourceError, naming it, if it holds NaN or infinity."""
    # A sum is one pass. It may overflow over finite values, so that a bad sum only asks.
    if tensor.is_floating_point() and not torch.isfinite(tensor.float().sum()):
        bad = int((~torch.isfinite(tensor.float())).sum())
        if bad:
            raise SourceError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")
    return tensor


# ---------------------------------------------------------------------------------------- writing


def reserve(layout: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Make the shard files at full size, headers written, and the index if there are several.

    Files that exist with the right size and header are left as they are: a run is being resumed.
    Returns the names of the others, which are empty now. Raises ResourceError if the disk is too
    small.
    """
    made = []
    files: dict[str, list[TensorInfo]] = {}
    for info in layout.values():
        files.setdefault(info.file, []).append(info)
    for file, tensors in files.items():
        start = min(info.begin for info in tensors)
        header, end = header_bytes(tensors, start), max(info.end for info in tensors)
        if _reserve_file(Path(file), header, end):
            made.append(file)
    if len(files) > 1:
        directory = Path(next(iter(files))).parent
        total = sum(info.size_bytes for info in layout.values())
        weight_map = {name: Path(layout[name].file).name for name in sorted(layout)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return tuple(made)


def _reserve_file(path: Path, header: bytes, size_bytes: int) -> bool:
    """Make one shard file; False if it is there already."""
    if path.exists() and path.stat().st_size == size_bytes:
        with path.open("rb") as stream:
            if stream.read(len(header)) == header:
                return False
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size_bytes)
            stream.write(header)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ResourceError(
            f"{path.parent}: {size_bytes / 1e9:.2f} GB cannot be allocated ({error.strerror})"
        ) from None
    return True


def write_tensors(layout: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to their places and wait until the disk has them.

    Raises ValueError if a tensor is not what the layout says: that would be a bug of the caller.
    """
    descriptors: dict[str, int] = {}
    try:
        for name, tensor in tensors.items():
            info = layout[name]
            if tuple(tensor.shape) != info.shape or tensor.dtype != TORCH_DTYPES[info.dtype]:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not as in {info}"
                )
            if info.file not in descriptors:
                descriptors[info.file] = os.open(info.file, os.O_RDWR)
            if info.stored is None:
                _write_at(descriptors[info.file], tensor, info.begin)
            else:
                _write_into(descriptors[info.file], tensor, info.stored)
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _write_into(descriptor: int, tensor: Tensor, stored: Stored) -> None:
    """Put a tensor into its rows of a fused one: what is beside them stays."""
    (info,) = stored.parts.values()
    skipped = info.begin % mmap.ALLOCATIONGRANULARITY
    length, start = skipped + info.size_bytes, info.begin - skipped
    with mmap.mmap(descriptor, length, access=mmap.ACCESS_WRITE, offset=start) as pages:
        raw = torch.frombuffer(pages, dtype=torch.uint8, count=info.size_bytes, offset=skipped)
        whole = raw.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)
        rows = slice(*stored.rows) if stored.rows is not None else slice(None)
        (whole.T if stored.transposed else whole)[rows].copy_(tensor)
        pages.flush()
        del raw, whole  # a map that is still seen cannot be closed


def _write_at(descriptor: int, tensor: Tensor, offset: int) -> None:
    """Write the bytes of a tensor; one call of the system may take only a part of them."""
    if tensor.numel() == 0:
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = memoryview(flat.numpy().data)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
