"""What a compressed checkpoint stands for, found without any code of the package: numpy, the file,
and its config.json, read as each format's own documentation has it.

A packed value is cut out of the words bit by bit; the width of a module is the one that the
settings give to its name, so that settings and tensors have to agree.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

Settings = dict[str, Any]
# Names in the live model -> names on disk, for the one family where they differ.
MIXTRAL = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".up_proj.": ".w3.",
    ".down_proj.": ".w2.",
}


def plain_logits(directory: Path, scratch: Path, tokens: list[list[int]]) -> Tensor:
    """Logits in float32 of an ordinary, unquantised model that holds the dequantised weights."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    scratch.mkdir()
    (scratch / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = dequantised(directory)
    if config["model_type"] == "mixtral":
        weights = {on_disk(name): weight for name, weight in weights.items()}
    save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        scratch, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits


def on_disk(name: str) -> str:
    for memory, disk in MIXTRAL.items():
        name = name.replace(memory, disk)
    return name


def dequantised(directory: Path) -> dict[str, Tensor]:
    """Every weight of the checkpoint by its name there, packed ones in float32."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("quantization_config", {})
    stored: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    if settings.get("quant_method") == "se-compress":
        return _bitsandbytes(stored, settings)
    parts = (
        r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_shape|weight_zero_point)"
    )
    weights: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        packed = re.fullmatch(rf"(.+){parts}", name)
        if packed is None:
            module = name.removesuffix(".weight")
            if ".experts." in name and settings and not name.endswith("bias"):
                assert width(settings, module) == 16, f"{name} is packed according to the settings"
            weights[name] = tensor.float()
        elif packed[2] in ("qweight", "weight_packed"):
            matrix = _gptq if packed[2] == "qweight" else _compressed_tensors
            weights[f"{packed[1]}.weight"] = torch.from_numpy(matrix(stored, packed[1], settings))
    return weights


def _bitsandbytes(stored: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """nf4 without double quantisation: [R * C / 2, 1] bytes, the upper half first; a maximum for
    each block of a row."""
    from bitsandbytes.functional import get_4bit_type

    table = get_4bit_type(settings["data_type"], device="cpu")
    weights = {}
    for name, tensor in stored.items():
        maxima = stored.get(f"{name}.absmax")
        if maxima is None:
            weights |= {name: tensor.float()} if not name.endswith(".absmax") else {}
            continue
        packed = tensor.flatten()
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
        weights[name] = (table[codes].view(len(maxima), -1) * maxima[:, None]).flatten()
    return weights


def width(settings: Settings, module: str) -> int:
    """The bits that the settings give to a module."""
    if settings["quant_method"] == "auto-round":
        return int(settings["extra_config"].get(module, settings)["bits"])
    if settings["quant_method"] == "compressed-tensors":
        return _compressed_tensors_width(settings, module)
    # GPTQModel moves "-:" patterns to the front when it reads them.
    for pattern, override in sorted(
        settings["dynamic"].items(), key=lambda rule: rule[0][0] != "-"
    ):
        if re.match(pattern[2:], module):
            return 16 if pattern.startswith("-:") else int(override["bits"])
    return int(settings["bits"])


def _compressed_tensors_width(settings: Settings, module: str) -> int:
    def matches(target: str) -> bool:
        return re.match(target[3:], module) is not None if target[:3] == "re:" else target == module

    if any(map(matches, settings["ignore"])):
        return 16
    groups = list(settings["config_groups"].values())
    named = [group for group in groups if any(map(matches, group["targets"]))]
    general = [group for group in groups if "Linear" in group["targets"]]
    return int([*named, *general][0]["weights"]["num_bits"])


def values(words: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """int32 [N, W] to the W*32/bits numbers of each row, least bit first."""
    string = np.unpackbits(words.astype("<i4").view(np.uint8), axis=1, bitorder="little")
    digits = string.reshape(len(words), -1, bits).astype(np.int64)
    return digits @ (1 << np.arange(bits))


def _gptq(stored: dict[str, Tensor], module: str, settings: Settings) -> np.ndarray[Any, Any]:
    def part(name: str) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(stored[f"{module}.{name}"].numpy())

    bits = width(settings, module)
    codes = values(np.ascontiguousarray(part("qweight").T), bits)
    first_version = "gptq" in (
        settings.get("checkpoint_format"),
        settings.get("packing_format", "").removeprefix("auto_round:auto_"),
    )
    zeros = values(part("qzeros"), bits) + (1 if first_version else 0)
    scales = part("scales").astype(np.float32)
    rows, columns = codes.shape
    weight = np.empty((rows, columns), np.float32)
    even = np.arange(columns) // (columns // len(scales))
    group = part("g_idx") if f"{module}.g_idx" in stored else even
    for column in range(columns):
        steps = codes[:, column] - zeros[group[column]]
        weight[:, column] = steps.astype(np.float32) * scales[group[column]]
    return weight


def _compressed_tensors(
    stored: dict[str, Tensor], module: str, settings: Settings
) -> np.ndarray[Any, Any]:
    bits = width(settings, module)
    codes = values(stored[f"{module}.weight_packed"].numpy(), bits) - (1 << (bits - 1))
    assert list(codes.shape) == stored[f"{module}.weight_shape"].tolist()
    scales = stored[f"{module}.weight_scale"].float().numpy()
    zeros = np.zeros_like(scales, dtype=np.int64)
    if f"{module}.weight_zero_point" in stored:
        words = np.ascontiguousarray(stored[f"{module}.weight_zero_point"].numpy().T)
        zeros = values(words, bits).T - (1 << (bits - 1))
    size = codes.shape[1] // scales.shape[1]
    steps = codes - np.repeat(zeros, size, axis=1)
    weight: np.ndarray[Any, Any] = steps.astype(np.float32) * np.repeat(scales, size, axis=1)
    return weight
