"""Run by tools/vllm_check.py in an environment that has vLLM: `NAME DIRECTORY NAME DIRECTORY ...`.

vLLM's own classes read the settings of a checkpoint; what they give to each matrix is compared with
its width in the file. No model is loaded.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.humming import HummingConfig
from vllm.model_executor.layers.quantization.inc.inc import INCConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import (
    get_dynamic_override,
    override_config,
)
from vllm.model_executor.layers.quantization.utils.humming import resolve_humming_layer_config

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}


class RoutedExperts(torch.nn.Module):
    """What vLLM calls the module of a layer's experts; its readers ask for the name."""


def own_name(module, present):
    parts = module.split(".")
    if "experts" in parts:
        return ".".join(parts[: parts.index("experts") + 1])
    for fused, members in PACKED.items():
        there = {".".join([*parts[:-1], member]) for member in members} <= present
        if parts[-1] in members and there:
            return ".".join([*parts[:-1], fused])
    return module


def widths(directory, group_size):
    """Module -> its width in the file, of the matrices of layers; 16 for a plain one."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                module, _, part = name.rpartition(".")
                shape = opened.get_slice(name).get_shape()
                if ".layers." not in name:
                    continue
                if part == "weight" and len(shape) == 2:
                    found[module] = 16
                elif part == "qweight":
                    groups = opened.get_slice(f"{module}.scales").get_shape()[0]
                    found[module] = shape[0] * 32 // (groups * group_size)
                elif part == "weight_packed":
                    columns = int(opened.get_tensor(f"{module}.weight_shape")[1])
                    found[module] = shape[1] * 32 // columns
    return found


def auto_gptq(settings):
    def look(name):
        config = AutoGPTQConfig.from_config(settings)
        if get_dynamic_override(config, layer_name=name) is False:
            return 16
        override_config(config, prefix=name)
        return config.weight_bits

    return look


def humming(settings):
    config = HummingConfig.from_config(settings)

    def look(name):
        if config.is_layer_skipped(settings, name):
            return 16
        return resolve_humming_layer_config(settings, name)["bits"]

    return look


def inc(settings):
    config = INCConfig.from_config(settings)
    config.packed_modules_mapping = PACKED

    def look(name):
        layer = RoutedExperts() if name.endswith(".experts") else torch.nn.Linear(1, 1)
        return config.config_parser.resolve(layer, name).bits

    return look


def compressed_tensors(settings):
    config = CompressedTensorsConfig.from_config(settings)
    config.packed_modules_mapping = PACKED
    linear = torch.nn.Linear(1, 1)

    def scheme(name):
        found = config.get_scheme_dict(linear, name)
        return found["weights"].num_bits if found else 16

    def look(name):
        if not name.endswith(".experts"):
            return scheme(name)
        spelling = ("gate_proj", "up_proj", "down_proj")
        if "block_sparse_moe" in name:
            spelling = ("w1", "w3", "w2")
        (width,) = {scheme(f"{name}.0.{one}") for one in spelling}
        return width

    return look


READERS = {
    "gptq": (auto_gptq, humming),
    "auto-round": (inc,),
    "compressed-tensors": (compressed_tensors,),
}


def main():
    """All files in one process: importing vLLM takes longer than all the rest."""
    for name, directory in zip(sys.argv[1::2], map(Path, sys.argv[2::2]), strict=True):
        look_up(name, directory)


def look_up(name, directory):
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    held = widths(directory, settings.get("group_size"))
    for reader in READERS[settings["quant_method"]]:
        look = reader(settings)
        wrong = [
            f"{module} has {bits}, {look(own_name(module, held.keys()))} is read"
            for module, bits in held.items()
            if look(own_name(module, held.keys())) != bits
        ]
        verdict = "; ".join(wrong[:3]) or "every width as it is"
        print(f"{name} by {reader.__name__}: {len(held)} matrices, {verdict}")


main()
