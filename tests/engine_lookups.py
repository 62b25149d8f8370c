"""How vLLM, SGLang and GPTQModel look the width of a module up in exported settings, written down
from their code and from nothing of ours: what the engine's own names are, and what it asks for.

vLLM 0.32 (below vllm/model_executor/layers/quantization) and SGLang 0.5.23 (below
sglang/srt/layers/quantization) are in no environment of ours. GPTQModel 7.6 is: see `gptqmodel`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from typing import Any

Settings = dict[str, Any]
# An engine's own name of a module -> its width there, 16 for a plain one.
Lookup = Callable[[str], int]
# models/*.py, packed_modules_mapping: the linear of the engine -> the parts on file.
PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}


def own_name(module: str, present: Collection[str]) -> str:
    """The engine's name of what a module on file becomes a part of. Without q_a_proj (models/
    deepseek_v2.py) nothing is fused with kv_a_proj_with_mqa.

    present  modules of the file
    """
    parts = module.split(".")
    if "experts" in parts:  # fused_moe/layer.py: prefix=f"{prefix}.experts"
        return ".".join(parts[: parts.index("experts") + 1])
    for fused, members in PACKED.items():
        there = {".".join([*parts[:-1], member]) for member in members} <= set(present)
        if parts[-1] in members and there:
            return ".".join([*parts[:-1], fused])
    return module


def auto_gptq(settings: Settings) -> Lookup:
    """vLLM, utils/gptq_utils.py: get_dynamic_override and override_config, of auto_gptq.py."""

    def lookup(name: str) -> int:
        if name == "lm_head" and not settings["lm_head"]:
            return 16
        for pattern, overrides in settings["dynamic"].items():
            if pattern.startswith("-:"):
                if re.match(pattern.removeprefix("-:"), name):
                    return 16
            elif re.match(pattern.removeprefix("+:"), name):
                return int(overrides.get("bits", settings["bits"]))
        return int(settings["bits"])

    return lookup


def humming(settings: Settings) -> Lookup:
    """vLLM, humming.py: is_layer_skipped, and utils/humming: resolve_humming_layer_config; SGLang,
    humming.py: is_layer_skipped and get_layer_weight_schema."""

    def lookup(name: str) -> int:
        if "lm_head" in name:
            return 16
        for regex in settings.get("dynamic", {}):
            if regex[:1] == "-" and re.match(regex[2:], name):
                return 16
        for regex, overrides in settings.get("dynamic", {}).items():
            if regex[:1] == "+" and re.match(regex[2:], name):
                return int({**settings, **overrides}["bits"])
        return int(settings["bits"])

    return lookup


def inc(settings: Settings) -> Lookup:
    """vLLM, inc/config_parser.py: _resolve_raw. Its branch for the single experts of a layer asks
    for a class that is named FusedMoE, and there is none."""
    extra: dict[str, dict[str, int]] = settings["extra_config"]
    base = int(settings["bits"])

    def configured(name: str, quantized: bool) -> int:
        return int(extra.get(name, {}).get("bits", base if quantized else 16))

    def lookup(name: str) -> int:
        if name in extra:
            return configured(name, True)
        for key in extra:
            if name.endswith(f".{key}"):
                return configured(key, True)
        blocks = settings["block_name_to_quantize"].split(",")
        quantized = name != "lm_head" and any(name.startswith(block) for block in blocks)
        for fused, members in PACKED.items():
            if fused in name and name.count(fused) == 1:
                names = [name.replace(fused, member) for member in members]
                if any(one in extra for one in names):
                    (width,) = {configured(one, quantized) for one in names}
                    return width
        return configured(name, quantized)

    return lookup


def compressed_tensors(settings: Settings) -> Lookup:
    """vLLM, compressed_tensors.py: get_scheme_dict, and utils.py: find_matched_target; of experts,
    compressed_tensors_moe.py: the three projections of expert 0. SGLang's get_moe_scheme alike."""

    def matches(target: str, name: str) -> bool:
        pattern = target[:3] == "re:"
        return bool(re.match(target[3:], name)) if pattern else target == name

    def scheme(name: str) -> int:
        if any(matches(target, name) for target in settings["ignore"]):
            return 16
        groups = settings["config_groups"].values()
        for group in groups:
            if any(matches(target, name) for target in group["targets"]):
                return int(group["weights"]["num_bits"])
        linear = next(group for group in groups if "Linear" in group["targets"])
        return int(linear["weights"]["num_bits"])

    def lookup(name: str) -> int:
        if name.endswith(".experts"):
            spelling = ("w1", "w3", "w2") if "block_sparse_moe" in name else (
                "gate_proj", "up_proj", "down_proj"
            )  # fmt: skip
            (width,) = {scheme(f"{name}.0.{one}") for one in spelling}
            return width
        stem, _, last = name.rpartition(".")
        members = PACKED.get(last)
        if members is None:
            return scheme(name)
        (width,) = {scheme(f"{stem}.{member}") for member in members}
        return width

    return lookup


# GPTQModel patches torch, transformers and safetensors when it is imported: a process of its own.
GPTQMODEL = """
import json, sys
from gptqmodel.quantization.config import QuantizeConfig
settings, modules = json.load(sys.stdin)
config = QuantizeConfig.from_quant_config(settings)
found = {}
for module in modules:
    bits = config.dynamic_get(layer_name=module, key="bits", default=config.bits)
    found[module] = 16 if bits is False else int(bits)
print("FOUND" + json.dumps(found))
"""


def gptqmodel(settings: Settings, modules: list[str]) -> dict[str, int]:
    """The width of each module on file by GPTQModel's own `QuantizeConfig.dynamic_get`."""
    done = subprocess.run(
        [sys.executable, "-c", GPTQMODEL],
        input=json.dumps([settings, modules]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = done.stdout.rpartition("FOUND")[2]
    return {module: int(bits) for module, bits in json.loads(answer).items()}
