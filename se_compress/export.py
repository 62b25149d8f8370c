"""All of the result that is not a tensor: config, the engine's settings, tokenizer, licence."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from se_compress.artifacts import CompressionPlan, ModelSource, TensorInfo, write_atomically
from se_compress.auxiliary import (
    Auxiliary,
    copied_text,
    find_auxiliary,
    pretty,
    result_config,
)
from se_compress.engine_view import misread
from se_compress.errors import ValidationFailed
from se_compress.targets import planned_bits, result_name, result_slots

# All that is no routed expert. By full names: GPTQModel matches names within a layer as well, and
# gives up what a "-:" pattern hits there.
EVERYTHING_ELSE = r"-:^(model\.|lm_head)(?!.*\.experts\.\d+\.).*$"


def export_config(
    source: ModelSource, plan: CompressionPlan, directory: Path, keep_code: bool = False
) -> None:
    """Write config.json (and the engine's own settings) and copy what else of the source a loader
    or a user may want: `auxiliary.find_auxiliary` tells it.

    keep_code  `auto_map` stays in the configs, and the Python files that it names come along

    Raises SourceError if such a file cannot be copied, ValidationFailed if the settings do not say
    of every module what the file holds.
    """
    settings = quantization_config(source, plan)
    if problems := misread(settings, source, plan, result_slots(source, plan)):
        raise ValidationFailed(
            f"the exported settings would be read wrong by {plan.target}: {'; '.join(problems[:3])}"
        )
    _copy(find_auxiliary(source.path, source.config, keep_code), directory, keep_code)
    config = result_config(source.config, keep_code)
    if settings:
        config["quantization_config"] = settings
        if settings["quant_method"] == "gptq":  # GPTQModel's own file
            write_atomically(directory / "quantize_config.json", pretty(settings))
    write_atomically(directory / "config.json", pretty(config))


def _copy(found: Auxiliary, directory: Path, keep_code: bool) -> None:
    for name, file in found.files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = copied_text(name, file, keep_code)
        if text is None:
            shutil.copyfile(file, target)
        else:
            write_atomically(target, text)


def quantization_config(source: ModelSource, plan: CompressionPlan) -> dict[str, Any]:
    """The `quantization_config` of config.json; empty for a plan that quantises nothing.

    The commonest width of the experts is the base; what differs from it is listed by module.
    """
    widths = [
        bits for info, bits in _matrices(source, plan) if info.kind == "expert" and bits != 16
    ] or [bits for _, bits in _matrices(source, plan) if bits != 16]
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
    return settings[plan.scheme.format](source, plan, base)


def _matrices(source: ModelSource, plan: CompressionPlan) -> Iterator[tuple[TensorInfo, int]]:
    """Every matrix that some engine could take for quantised, under its name in the result, and its
    width. Layers for multi-token prediction, behind the decoder's, are among them."""
    for info in source.tensors.values():
        linear = info.kind not in ("norm", "embedding") or info.name == "lm_head.weight"
        if linear and len(info.shape) == 2 and info.name.endswith(".weight"):
            yield replace(info, name=result_name(source, plan, info.name)), planned_bits(plan, info)


def _module(info: TensorInfo) -> str:
    return info.name.removesuffix(".weight")


# --------------------------------------------------------------------------------------------- GPTQ


def _gptq_settings(source: ModelSource, plan: CompressionPlan, base: int) -> dict[str, Any]:
    """As GPTQModel 7.6 reads it (quantization/config.py). `dynamic` maps patterns of module names
    to what differs: "-:pattern" leaves a module in 16 bits, "+:pattern" gives it another width. Of
    the patterns that match, the first "-:" decides, then the first "+:", whatever their order."""
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
        "dynamic": _dynamic(source, plan, base),
        "meta": {"quantizer": ["se-compress"]},
    }


def _dynamic(source: ModelSource, plan: CompressionPlan, base: int) -> dict[str, dict[str, int]]:
    others: dict[str, int] = {}
    experts: dict[str, dict[str, int]] = {}
    for info, bits in _matrices(source, plan):
        module = _module(info)
        if info.kind == "expert":
            experts.setdefault(module.rpartition(".")[0], {})[module] = bits
        else:
            others[module] = bits
    rules = _plain_layers(others)
    for expert, modules in experts.items():
        widths = set(modules.values())
        if len(widths) == 1 and widths != {base}:
            rules |= _rule(re.escape(expert + "."), widths.pop(), plan)
        elif len(widths) > 1:
            for module, bits in modules.items():
                rules |= _rule(re.escape(module) + "$", bits, plan)
    if set(others.values()) == {16}:
        return rules | {EVERYTHING_ELSE: {}}
    for module, bits in others.items():
        rules |= _rule(re.escape(module) + "$", bits, plan)
    return rules


def _plain_layers(others: dict[str, int]) -> dict[str, dict[str, int]]:
    """Rules for layers of multi-token prediction, whose modules are taken off `others`. No plan
    quantises their experts, and EVERYTHING_ELSE spares all experts."""
    layers: dict[str, list[str]] = {}
    for module in others:
        if match := re.match(r"(.*\.layers\.\d+\.).*\.experts\.\d+\.", module):
            layers.setdefault(match[1], [])
    for module in others:
        if match := re.match(r".*\.layers\.\d+\.", module):
            layers.get(match[0], []).append(module)
    rules = {}
    for stem, modules in layers.items():
        if {others[module] for module in modules} == {16}:
            rules[f"-:^{re.escape(stem)}"] = dict[str, int]()
            for module in modules:
                del others[module]
    return rules


def _rule(pattern: str, bits: int, plan: CompressionPlan) -> dict[str, dict[str, int]]:
    if bits == 16:
        return {f"-:^{pattern}": {}}
    return {f"+:^{pattern}": {"bits": bits, "group_size": plan.scheme.group_size}}


# --------------------------------------------------------------------------------------- auto-round


def _auto_round_settings(source: ModelSource, plan: CompressionPlan, base: int) -> dict[str, Any]:
    """As auto-round 0.15 reads it (inference/convert_model.py): every linear below
    `block_name_to_quantize` has the base width unless `extra_config` names it, behind the decoder
    (multi-token prediction) too."""
    blocks = "model.layers"
    differing = {
        _module(info): {"bits": bits}
        for info, bits in _matrices(source, plan)
        if info.name.startswith(f"{blocks}.") and bits != base
    }
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "bits": base,
        "group_size": plan.scheme.group_size,
        "sym": plan.scheme.symmetric,
        "data_type": "int",
        "block_name_to_quantize": blocks,
        "extra_config": differing,
    }


# ------------------------------------------------------------------------------- compressed-tensors


def _compressed_tensors_settings(
    source: ModelSource, plan: CompressionPlan, base: int
) -> dict[str, Any]:
    """As compressed-tensors 0.19 reads it (quantization/quant_config.py), and vLLM and SGLang.

    The base width is that of every Linear; a layer of another width has a pattern, which holds for
    the names on disk as for those in memory; other linears go by name. What keeps its 16 bits is in
    `ignore`. The order of rounding left no trace in the file, so none is claimed (`actorder`):
    SGLang would load scales otherwise on several GPUs.
    """
    targets: dict[int, list[str]] = {base: ["Linear"]}
    layers: dict[int, dict[int, None]] = {}
    ignore = [] if any(i.name == "lm_head.weight" for i in source.tensors.values()) else ["lm_head"]
    for info, bits in _matrices(source, plan):
        if info.kind == "expert" and info.layer is not None:
            layers.setdefault(bits, {})[info.layer] = None
        elif bits == 16:
            ignore.append(_module(info))
        elif bits != base:
            targets.setdefault(bits, []).append(_module(info))
    for bits, numbers in layers.items():
        pattern = rf"re:.*\.layers\.({'|'.join(map(str, numbers))})\..*\.experts\.\d+\..*"
        if bits == 16:
            ignore.append(pattern)
        elif bits != base:
            targets.setdefault(bits, []).append(pattern)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _config_group(names, bits, plan)
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


def _bitsandbytes_settings(source: ModelSource, plan: CompressionPlan, base: int) -> dict[str, Any]:
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
        "in_16_bit": [
            _module(i) for i, plain in tensors if i.kind == "expert" and i.role and plain
        ],
        "others": [_module(i) for i, plain in tensors if i.kind != "expert" and not plain],
    }
