"""What stands for the contents of a model: config, headers and weights, and no time or place.

All bytes of a small model are hashed. Of a large one a sample is, at fixed places: the middle of
every tensor and both ends of every file; and where the Hub's cache holds the file, the sha256 by
which it names it. Standard library only.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from se_compress.artifacts import TensorInfo
from se_compress.errors import SourceError

# Up to this size all bytes count; about a second.
WHOLE_BYTES = 2**28
SAMPLE_BYTES = 1024
_BLOCK_BYTES = 2**22
_SHA256 = re.compile(r"[0-9a-f]{64}")


def contents_digest(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """16 hexadecimal digits. Raises SourceError for a file that cannot be read any more."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    files: dict[str, list[TensorInfo]] = {}
    for name in sorted(tensors):
        files.setdefault(tensors[name].file, []).append(tensors[name])
    whole = sum(info.size_bytes for info in tensors.values()) <= WHOLE_BYTES
    for file in sorted(files):
        infos = files[file]
        lines = (f"{i.name} {i.dtype} {i.shape} {i.begin} {i.end}\n" for i in infos)
        digest.update(f"{os.path.basename(file)}\n{''.join(lines)}".encode())
        try:
            digest.update(_all(file) if whole else _sample(file, infos))
        except OSError as error:
            raise SourceError(f"{file}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:16]


def _all(file: str) -> bytes:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()


def _sample(file: str, tensors: Iterable[TensorInfo]) -> bytes:
    digest = hashlib.sha256()
    blob = Path(os.path.realpath(file)).name
    if _SHA256.fullmatch(blob):
        digest.update(blob.encode())
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        middles = (info.begin + max(info.size_bytes - SAMPLE_BYTES, 0) // 2 for info in tensors)
        for place in (0, *sorted(middles), max(size - SAMPLE_BYTES, 0)):
            digest.update(os.pread(descriptor, SAMPLE_BYTES, place))
    finally:
        os.close(descriptor)
    return digest.digest()
