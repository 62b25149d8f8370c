"""Open a model: config, headers, and the account of every tensor. No weight is read, torch not needed.

Format of a safetensors file (https://github.com/huggingface/safetensors, README "Format"): eight bytes,
little-endian, the length of the header; a JSON header of name -> {dtype, shape, data_offsets}; then
the data, in the order of the offsets, without holes.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from se_compress import families
from se_compress.artifacts import ModelSource, TensorInfo
from se_compress.errors import SourceError

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
WEIGHT_DTYPES = ("BF16", "F16", "F32")
INDEX_FILE = "model.safetensors.index.json"
# What a loader may want beside the weights; pickles are left where they are.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LARGEST_HEADER_BYTES = 100_000_000


def open_source(model: str) -> ModelSource:
    """Open a model directory, or a model of the Hub (`id` or `id@revision`).

    Every tensor is classified and the expert set is compared with what the config promises. Raises
    SourceError with the tensor, file or key that is wrong.
    """
    path = locate(model)
    config = read_config(path)
    family = families.family_of(config, str(path))
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise SourceError(
            f"{path}: the model is already quantised ({method}); give the original checkpoint"
        )
    _check_keys(config, family, path)
    found = read_headers(path)
    tensors = {name: families.classify(info, family, config) for name, info in found.items()}
    _check_experts(tensors, family, config, path)
    return ModelSource(
        path=path,
        name=model,
        family=family.model_type,
        config=config,
        tensors=tensors,
        layer_count=families.layer_count(config),
        moe_layers=families.moe_layers(config),
        expert_count=int(config[family.count_key]),
        top_k=int(config["num_experts_per_tok"]),
        digest=_digest(path, config, tensors.values()),
    )


def locate(model: str) -> Path:
    """The directory of a model; one of the Hub is fetched into (or, offline, taken from) its cache."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise SourceError(f"{model}: is a file; a model is a directory or a Hub id")
    name, _, revision = model.partition("@")
    if not _HUB_ID.fullmatch(name):
        raise SourceError(f"{model}: there is no such directory, and a Hub id is owner/name")
    return _from_hub(name, revision or None)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached and its local cache does not hold it"
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
    raise SourceError(f"{name}: there is no such directory, and as a Hub id: {reason}")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path}: has no config.json, so it is not a model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise SourceError(f"{file}: is not a JSON object")
    return config


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
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{index}: cannot be read as an index ({error!r})") from None
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        file = path / name
        if not file.exists():
            raise SourceError(f"{index} names {name}, which is missing")
        tensors |= {info.name: info for info in read_header(file)}
    for name, shard in weight_map.items():
        if name not in tensors:
            raise SourceError(f"{index} places {name} in {shard}, which does not hold it")
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
        raise SourceError(f"{file}: is {size} bytes long, but its header describes {end}; truncated?")
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


def _check_keys(config: Mapping[str, Any], family: families.Family, path: Path) -> None:
    needed = ("num_hidden_layers", "hidden_size", "num_experts_per_tok")
    for key in (*needed, family.count_key, family.width_key):
        if not isinstance(config.get(key), int):
            raise SourceError(f"{path}/config.json: {key} is {config.get(key)!r}; a number is needed")
    if not families.moe_layers(config):
        raise SourceError(f"{path}/config.json: no layer has experts, so there is nothing to do")


def _check_experts(
    tensors: Mapping[str, TensorInfo], family: families.Family, config: Mapping[str, Any], path: Path
) -> None:
    expected = families.expected_experts(family, config)
    for info in tensors.values():
        stray = info.layer is not None and "expert" in info.name and info.name not in expected
        if stray and info.kind != "router":
            raise SourceError(f"{path}: {info.name} does not belong to the experts of config.json")
    for name, shape in expected.items():
        if name not in tensors:
            raise SourceError(f"{path}: {name} is missing; config.json promises it")
        if tensors[name].shape != shape:
            raise SourceError(
                f"{path}: {name} is {list(tensors[name].shape)}, but config.json says {list(shape)}"
            )
        if tensors[name].dtype not in WEIGHT_DTYPES:
            raise SourceError(
                f"{path}: {name} is {tensors[name].dtype}; {', '.join(WEIGHT_DTYPES)} can be read"
            )
    for layer in families.moe_layers(config):
        for name in families.router_tensors(family, layer):
            if name not in tensors:
                raise SourceError(f"{path}: {name} is missing; every expert layer needs it")


def _digest(path: Path, config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    files = set()
    for info in sorted(tensors, key=lambda info: info.name):
        plain = replace(info, file=Path(info.file).name)
        digest.update(f"{plain.name} {plain.dtype} {plain.shape} {plain.file} {plain.begin}".encode())
        files.add(info.file)
    for file in sorted(files):
        status = Path(file).stat()
        digest.update(f"{Path(file).name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
