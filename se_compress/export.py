"""All of the result that is not a tensor: config, the engine's settings, tokenizer, licence."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from se_compress.artifacts import SOURCE_BITS, CompressionPlan, write_atomically
from se_compress.blueprint import Blueprint, PlannedTensor
from se_compress.headers import INDEX_FILE

# Weights in any format are not copied: the result has its own.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# All that is no routed expert. By full names: GPTQModel matches names within a layer as well, and
# gives up what a "-:" pattern hits there.
EVERYTHING_ELSE = r"-:^(model\.|lm_head)(?!.*\.experts\.\d+\.).*$"
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
    packed = [tensor for tensor in _matrices(blueprint) if tensor.making == "packed"]
    experts = [tensor for tensor in packed if tensor.info.kind == "expert"]
    widths = [tensor.bits for tensor in experts or packed]
    if not widths:
        return {}
    base = max(set(widths), key=lambda bits: (widths.count(bits), bits))
    settings = {
        "gptq": _gptq_settings,
        "gptq_v2": _gptq_settings,
        "auto-round": _auto_round_settings,
        "compressed-tensors": _compressed_tensors_settings,
        "bitsandbytes": _bitsandbytes_settings,
    }
    return settings[blueprint.plan.scheme.format](blueprint, base)


def _matrices(blueprint: Blueprint) -> Iterator[PlannedTensor]:
    """Every matrix that some engine could take for quantised. Layers for multi-token prediction,
    behind the decoder's, are among them."""
    for tensor in blueprint.tensors.values():
        info = tensor.info
        linear = info.kind not in ("norm", "embedding") or info.name == "lm_head.weight"
        if linear and len(info.shape) == 2 and info.name.endswith(".weight"):
            yield tensor


# --------------------------------------------------------------------------------------------- GPTQ


def _gptq_settings(blueprint: Blueprint, base: int) -> dict[str, Any]:
    """As GPTQModel 7.6 reads it (quantization/config.py). `dynamic` maps patterns of module names
    to what differs: "-:pattern" leaves a module in 16 bits, "+:pattern" gives it another width. Of
    the patterns that match, the first "-:" decides, then the first "+:", whatever their order."""
    plan = blueprint.plan
    return {
        "quant_method": "gptq",
        "format": plan.scheme.format,
        "checkpoint_format": plan.scheme.format,
        "bits": base,
        "group_size": plan.scheme.group_size,
        "sym": plan.scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": _dynamic(blueprint, base),
        "meta": {"quantizer": ["se-compress"]},
    }


def _dynamic(blueprint: Blueprint, base: int) -> dict[str, dict[str, int]]:
    plan = blueprint.plan
    others: dict[str, int] = {}
    experts: dict[str, dict[str, int]] = {}
    for tensor in _matrices(blueprint):
        if tensor.info.kind == "expert":
            expert = tensor.module.rpartition(".")[0]
            experts.setdefault(expert, {})[tensor.module] = tensor.bits
        else:
            others[tensor.module] = tensor.bits
    rules: dict[str, dict[str, int]] = {}
    for expert, modules in experts.items():
        widths = set(modules.values())
        if len(widths) == 1 and widths != {base}:
            rules |= _rule(re.escape(expert + "."), widths.pop(), plan)
        elif len(widths) > 1:
            for module, bits in modules.items():
                rules |= _rule(re.escape(module) + "$", bits, plan)
    if set(others.values()) == {SOURCE_BITS}:
        return rules | {EVERYTHING_ELSE: {}}
    for module, bits in others.items():
        rules |= _rule(re.escape(module) + "$", bits, plan)
    return rules


def _rule(pattern: str, bits: int, plan: CompressionPlan) -> dict[str, dict[str, int]]:
    if bits == SOURCE_BITS:
        return {f"-:^{pattern}": {}}
    return {f"+:^{pattern}": {"bits": bits, "group_size": plan.scheme.group_size}}


# --------------------------------------------------------------------------------------- auto-round


def _auto_round_settings(blueprint: Blueprint, base: int) -> dict[str, Any]:
    """As auto-round 0.15 reads it (inference/convert_model.py): every linear below
    `block_name_to_quantize` has the base width unless `extra_config` names it."""
    scheme = blueprint.plan.scheme
    differing = {
        tensor.module: {"bits": tensor.bits}
        for tensor in _matrices(blueprint)
        if tensor.info.layer is not None and tensor.bits != base
    }
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "bits": base,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": differing,
    }


# ------------------------------------------------------------------------------- compressed-tensors


def _compressed_tensors_settings(blueprint: Blueprint, base: int) -> dict[str, Any]:
    """As compressed-tensors 0.19 reads it (quantization/quant_config.py), and vLLM and SGLang.

    The base width is that of every Linear; a layer of another width has a pattern, which holds for
    the names on disk as for those in memory; other linears go by name. What keeps its 16 bits is in
    `ignore`. The order of rounding left no trace in the file, so none is claimed (`actorder`):
    SGLang would load scales otherwise on several GPUs.
    """
    targets: dict[int, list[str]] = {base: ["Linear"]}
    layers: dict[int, dict[int, None]] = {}
    ignore = [] if "lm_head.weight" in blueprint.tensors else ["lm_head"]
    for tensor in _matrices(blueprint):
        info, bits = tensor.info, tensor.bits
        if info.kind == "expert" and info.layer is not None:
            layers.setdefault(bits, {})[info.layer] = None
        elif bits == SOURCE_BITS:
            ignore.append(tensor.module)
        elif bits != base:
            targets.setdefault(bits, []).append(tensor.module)
    for bits, numbers in layers.items():
        pattern = rf"re:.*\.layers\.({'|'.join(map(str, numbers))})\..*\.experts\.\d+\..*"
        if bits == SOURCE_BITS:
            ignore.append(pattern)
        elif bits != base:
            targets.setdefault(bits, []).append(pattern)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _config_group(names, bits, blueprint.plan)
            for i, (bits, names) in enumerate(targets.items())
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "version": "0.19.0",
    }


def _config_group(names: list[str], bits: int, plan: CompressionPlan) -> dict[str, Any]:
    per_row = plan.scheme.group_size == -1
    return {
        "targets": names,
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": plan.scheme.symmetric,
            "strategy": "channel" if per_row else "group",
            "group_size": None if per_row else plan.scheme.group_size,
            "actorder": None,
            "dynamic": False,
        },
    }


# ------------------------------------------------------------------------------------ bitsandbytes


def _bitsandbytes_settings(blueprint: Blueprint, base: int) -> dict[str, Any]:
    """As `loading.SeCompressConfig` reads it: each matrix that is not as one would expect, an
    expert's in 16 bits or another's packed, by its name."""
    scheme = blueprint.plan.scheme
    experts = [tensor for tensor in blueprint.tensors.values() if tensor.info.kind == "expert"]
    blocks = {"block_size": scheme.group_size, "double_quant": scheme.double_quant}
    return {
        "quant_method": "se-compress",
        "format": "bitsandbytes",
        "version": 1,
        "data_type": scheme.data_type,
        **({} if scheme.data_type == "int8" else blocks),
        "in_16_bit": [tensor.module for tensor in experts if tensor.making != "packed"],
        "others": [tensor.module for tensor in blueprint.packed() if tensor.info.kind != "expert"],
    }
