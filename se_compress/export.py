"""All of the result that is not a tensor: config, the engine's settings, tokenizer, licence."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from se_compress.artifacts import write_atomically
from se_compress.blueprint import Blueprint
from se_compress.formats import FORMATS
from se_compress.headers import INDEX_FILE

# Weights in any format are not copied: the result has its own.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
REPLACED_FILES = ("config.json", "quantize_config.json", "README.md", INDEX_FILE)


def export_config(blueprint: Blueprint, directory: Path) -> None:
    """Write config.json (and the engine's own settings) and copy every other file of the source
    that a loader may want: tokenizer, generation config, licence."""
    source = blueprint.source
    for file in sorted(source.path.iterdir()):
        if file.is_file() and _is_auxiliary(file):
            shutil.copyfile(file, directory / file.name)
    config = dict(source.config)
    settings = quantization_config(blueprint)
    if settings:
        config["quantization_config"] = settings
        if settings["quant_method"] == "gptq":  # GPTQModel's own file
            write_atomically(directory / "quantize_config.json", _pretty(settings))
    write_atomically(directory / "config.json", _pretty(config))


def _is_auxiliary(file: Path) -> bool:
    weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
    return not weights and file.name not in REPLACED_FILES and not file.name.startswith(".")


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def quantization_config(blueprint: Blueprint) -> dict[str, Any]:
    """The `quantization_config` of config.json; empty for a plan that quantises nothing.

    The commonest width of the experts is the base; what differs from it is listed by module.
    """
    packed = [tensor for tensor in blueprint.linears if tensor.making == "packed"]
    experts = [tensor for tensor in packed if tensor.info.kind == "expert"]
    widths = [tensor.bits for tensor in experts or packed]
    if not widths:
        return {}
    base = max(set(widths), key=lambda bits: (widths.count(bits), bits))
    scheme = blueprint.plan.scheme
    return FORMATS[scheme.format].settings(blueprint.linears, scheme, base)
