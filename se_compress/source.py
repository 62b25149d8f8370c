"""Open a model: config, headers, and the account of every tensor. No weight is read; no torch."""

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from se_compress import families
from se_compress.account import bind
from se_compress.artifacts import ModelSource
from se_compress.config_rules import check_rules, settle
from se_compress.config_values import take_values
from se_compress.digest import contents_digest
from se_compress.errors import SourceError
from se_compress.headers import read_headers
from se_compress.modelfiles import check_file, check_place, read_json, shown

# What a loader may want beside the weights; pickles are left where they are.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LARGEST_CONFIG_BYTES = 2**23


def open_source(model: str) -> ModelSource:
    """Open a model directory, or a model of the Hub (`id` or `id@revision`).

    The config's values are taken for what they are, every tensor is bound to its place in the model
    or explained. Raises SourceError with the tensor, file or key that is wrong.
    """
    path = locate(model)
    file = str(path / "config.json")
    found = read_config(path)
    family = families.family_of(found, str(path))
    _check_plain(found, file)
    config = settle(take_values(found, file), family, file)
    headers = read_headers(path)
    check_rules(config, family, len(headers), file)
    tensors = bind(headers, family, config, path)
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
        contents=partial(contents_digest, config, tensors),
    )


def locate(model: str) -> Path:
    """The directory of a model; one of the Hub is fetched, or offline taken from its cache."""
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
    from httpx import HTTPError, TransportError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fetch = partial(snapshot_download, name, revision=revision, allow_patterns=list(HUB_PATTERNS))
    try:
        try:
            return Path(fetch())
        except (TransportError, ConnectionError):  # of itself it seeks no commit in the cache
            return Path(fetch(local_files_only=True))
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached and its local cache does not hold it"
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
    raise SourceError(f"{name}: there is no such directory, and as a Hub id: {reason}")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, as it is there."""
    file = path / "config.json"
    if not os.path.lexists(file):
        raise SourceError(f"{path}: has no config.json, so it is {_what_else(path)}")
    check_file(file)
    check_place(file, path)
    config = read_json(file, _LARGEST_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise SourceError(f"{file}: is not a JSON object")
    return config


def _what_else(path: Path) -> str:
    snapshots = sorted(path.glob("snapshots/*/config.json"))
    if snapshots:
        return f"the Hub cache's folder of a model; give {snapshots[-1].parent}"
    return "not a model directory"


def _check_plain(config: Mapping[str, Any], file: str) -> None:
    """Raises SourceError for a checkpoint that says of itself that it is quantised."""
    settings = config.get("quantization_config")
    if not settings:
        return
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
    if method == "fp8":
        raise SourceError(
            f"{file}: the model is FP8, as some are published (quantization_config says fp8); such "
            "weights cannot be read yet: convert them to bfloat16 first"
        )
    raise SourceError(
        f"{file}: the model is already quantised ({shown(method)}); give the original checkpoint, "
        "or one that is converted to bfloat16"
    )
