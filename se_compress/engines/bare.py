"""A checkpoint as an engine may see it whose loader runs what it finds: weights and numbers only.

GPTQModel 7.6 runs the code that `auto_map` names in config.json or tokenizer_config.json whatever
`trust_remote_code` says, imports any module that a tokenizer's config names, and fetches adapters;
transformers fetches an attention kernel that a config names. So the engine is given a directory
with links to the weights and configs without any of this, and nothing else. No torch.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from se_compress.artifacts import TensorInfo
from se_compress.errors import SourceError
from se_compress.opening.auxiliary import CODE_KEYS, pretty, result_config, without
from se_compress.opening.headers import INDEX_FILE
from se_compress.opening.source import read_config

SETTINGS_FILE = "quantize_config.json"  # GPTQModel's own, which it reads before config.json
# Code from elsewhere (adapters), and what GPTQModel writes to or reads from (meta).
FOREIGN_KEYS = (*CODE_KEYS, "adapter", "meta", "_name_or_path")
# Logits are asked for by token ids: what GPTQModel insists on loading has one word.
TOKENIZER: Mapping[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"-": 0}, "unk_token": "-"},
}
TOKENIZER_CONFIG: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), "-"),
}


def lay_bare(directory: Path, tensors: Iterable[TensorInfo], bare: Path) -> None:
    """Fill the empty directory `bare` with what an engine needs of the checkpoint in `directory`,
    which holds `tensors`. Raises SourceError for a config that cannot be read, OSError where `bare`
    cannot be written."""
    config = without(result_config(read_config(directory), keep_code=False), FOREIGN_KEYS)
    if settings := read_config(directory).get("quantization_config"):
        if not isinstance(settings, dict):
            raise SourceError(f"{directory}/config.json: quantization_config is not a JSON object")
        config["quantization_config"] = _settings(settings)
    files = {"config.json": config, "tokenizer.json": TOKENIZER}
    files |= {"tokenizer_config.json": TOKENIZER_CONFIG}
    if (directory / SETTINGS_FILE).is_file():
        files[SETTINGS_FILE] = _settings(_read(directory / SETTINGS_FILE))
    file_of = {info.name: Path(info.file) for info in tensors}
    shards = {file.name: file for file in file_of.values()}
    if set(shards) != {"model.safetensors"}:
        weight_map = {name: file.name for name, file in file_of.items()}
        files[INDEX_FILE] = {"metadata": {}, "weight_map": weight_map}
    for name, value in files.items():
        (bare / name).write_text(pretty(value), encoding="utf-8")
    for name, shard in shards.items():
        (bare / name).symlink_to(shard.resolve())


def _read(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file}: cannot be read as JSON ({error})"[:300]) from None
    if not isinstance(value, dict):
        raise SourceError(f"{file}: is not a JSON object")
    return value


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` keeps who made the file: GPTQModel reads its own ones otherwise."""
    plain: dict[str, Any] = without(settings, FOREIGN_KEYS)
    meta = settings.get("meta")
    if isinstance(meta, Mapping) and "quantizer" in meta:
        plain["meta"] = {"quantizer": meta["quantizer"]}
    return plain
