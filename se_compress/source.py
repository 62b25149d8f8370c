"""Open a model: config, headers, and the account of every tensor. No weight is read; no torch."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from se_compress import families
from se_compress.artifacts import ModelSource, TensorInfo
from se_compress.errors import SourceError
from se_compress.headers import read_headers
from se_compress.hub import locate

WEIGHT_DTYPES = ("BF16", "F16", "F32")


def open_source(model: str, keep_code: bool = False) -> ModelSource:
    """Open a model directory, or a model of the Hub (`id` or `id@revision`).

    `keep_code` has a model of the Hub fetched with its Python files, which nothing here runs.
    Every tensor is classified and the expert set is compared with what the config promises. Raises
    SourceError with the tensor, file or key that is wrong.
    """
    path = locate(model, keep_code)
    config = read_config(path)
    family = families.family_of(config, str(path))
    if settings := config.get("quantization_config"):
        method = settings.get("quant_method", "unknown")
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
        expert_count=int(config[families.count_key(family, config)]),
        top_k=int(config["num_experts_per_tok"]),
        digest=_digest(path, config, tensors.values()),
    )


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


def _check_keys(config: Mapping[str, Any], family: families.Family, path: Path) -> None:
    needed = ("num_hidden_layers", "hidden_size", "num_experts_per_tok")
    for key in (*needed, families.count_key(family, config), family.width_key):
        if not isinstance(config.get(key), int):
            raise SourceError(
                f"{path}/config.json: {key} is {config.get(key)!r}; a number is needed"
            )
    if not families.moe_layers(config):
        raise SourceError(f"{path}/config.json: no layer has experts, so there is nothing to do")


def _check_experts(
    tensors: Mapping[str, TensorInfo],
    family: families.Family,
    config: Mapping[str, Any],
    path: Path,
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
        digest.update(
            f"{plain.name} {plain.dtype} {plain.shape} {plain.file} {plain.begin}".encode()
        )
        files.add(info.file)
    for file in sorted(files):
        status = Path(file).stat()
        digest.update(f"{Path(file).name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
