"""All of the result that is not a tensor: config, the engine's settings, tokenizer, licence."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from se_compress.artifacts import (
    ROLES,
    CompressionPlan,
    ExpertDecision,
    ModelSource,
    TensorInfo,
    write_atomically,
)
from se_compress.headers import INDEX_FILE
from se_compress.targets import planned_bits, result_name

# Weights in any format are not copied: the result has its own.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
REPLACED_FILES = ("config.json", "quantize_config.json", "README.md", INDEX_FILE)


def export_config(source: ModelSource, plan: CompressionPlan, directory: Path) -> None:
    """Write config.json (and the engine's own settings) and copy every other file of the source
    that a loader may want: tokenizer, generation config, licence."""
    for file in sorted(source.path.iterdir()):
        if file.is_file() and _is_auxiliary(file):
            shutil.copyfile(file, directory / file.name)
    config = dict(source.config)
    settings = quantization_config(source, plan)
    if settings:
        config["quantization_config"] = settings
        if plan.scheme.format == "gptq":
            write_atomically(directory / "quantize_config.json", _pretty(settings))
    write_atomically(directory / "config.json", _pretty(config))


def _is_auxiliary(file: Path) -> bool:
    weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
    return not weights and file.name not in REPLACED_FILES and not file.name.startswith(".")


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def quantization_config(source: ModelSource, plan: CompressionPlan) -> dict[str, Any]:
    """The `quantization_config` of config.json; empty for a plan that quantises nothing."""
    if not any(decision.action == "quantize" for decision in plan.experts):
        return {}
    if plan.scheme.format == "bitsandbytes":
        return _bitsandbytes_config(source, plan)
    return _gptq_config(source, plan)


def _bitsandbytes_config(source: ModelSource, plan: CompressionPlan) -> dict[str, Any]:
    """As `loading.SeCompressConfig` reads it: each matrix that is not as one would expect, an
    expert's in 16 bits or another's packed, by its name."""
    scheme = plan.scheme
    tensors = [(info, planned_bits(plan, info) == 16) for info in source.tensors.values()]
    blocks = {"block_size": scheme.group_size, "double_quant": scheme.double_quant}
    return {
        "quant_method": "se-compress",
        "format": "bitsandbytes",
        "version": 1,
        "data_type": scheme.data_type,
        **({} if scheme.data_type == "int8" else blocks),
        "in_16_bit": [_stem(i) for i, plain in tensors if i.kind == "expert" and i.role and plain],
        "others": [_stem(i) for i, plain in tensors if i.kind != "expert" and not plain],
    }


def _stem(info: TensorInfo) -> str:
    return info.name.removesuffix(".weight")


def _gptq_config(source: ModelSource, plan: CompressionPlan) -> dict[str, Any]:
    """GPTQ v1 as GPTQModel 7.6 reads it (quantization/config.py). The base width is the commonest
    one; `dynamic` maps patterns of module names to what differs: "-:pattern" leaves a module in 16
    bits, "+:pattern" gives it another width.
    """
    widths = [
        bits
        for decision in plan.experts
        for bits in map(decision.bits_of, ROLES)
        if bits is not None and bits < 16
    ]
    base = max(set(widths), key=lambda bits: (widths.count(bits), bits))
    return {
        "quant_method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "bits": base,
        "group_size": plan.scheme.group_size,
        "sym": plan.scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": _dynamic(source, plan, base),
        "meta": {"quantizer": ["se-compress"]},
    }


def _dynamic(source: ModelSource, plan: CompressionPlan, base: int) -> dict[str, dict[str, int]]:
    """Patterns for all modules that are not experts of the base width, the special ones first."""
    rules: dict[str, dict[str, int]] = {}
    for decision in plan.experts:
        if decision.expert == "shared":
            continue
        for pattern, bits in _modules(source, plan, decision):
            if bits == 16:
                rules[f"-:{pattern}"] = {}
            elif bits is not None and bits != base:
                rules[f"+:{pattern}"] = {"bits": bits, "group_size": plan.scheme.group_size}
    # Everything that is not a routed expert stays in 16 bits.
    return rules | {r"-:^(?!.*\.experts\.\d+\.).*$": {}}


def _modules(
    source: ModelSource, plan: CompressionPlan, decision: ExpertDecision
) -> list[tuple[str, int | None]]:
    """Patterns of module names and their widths: one for the expert, or one per projection."""
    names = {
        role: result_name(source, plan, info.name).removesuffix(".weight")
        for role, info in source.experts[decision.id].items()
    }
    if decision.bits_of("down") == decision.bits:
        return [("^" + re.escape(names["down"].rpartition(".")[0] + "."), decision.bits)]
    return [("^" + re.escape(name) + "$", decision.bits_of(role)) for role, name in names.items()]
