"""What an engine makes of the settings of a result, module by module, beside what the file holds.

The settings are read here as the engines read them, from the finished JSON and by the names of the
modules alone: how they were written plays no part. A matrix that is plain in the file and quantised
by its settings (or the other way round, or of another width) is initialised at random by some
engines and read wrong by others, mostly without a word. No torch.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from se_compress.artifacts import CompressionPlan, ModelSource, TensorInfo
from se_compress.headers import Slot
from se_compress.targets import result_name

Settings = Mapping[str, Any]
WORD_BITS = 32  # codes are packed into words of this many bits
PLAIN = 16
_LAYER = re.compile(r"layers\.(\d+)\.")


def misread(
    settings: Settings,
    source: ModelSource,
    plan: CompressionPlan,
    stored: Iterable[Slot | TensorInfo],
) -> list[str]:
    """A sentence for each matrix of the result that its engine takes for something else.

    settings  `quantization_config`; empty where nothing is quantised
    source    the model that the result is of, after surgery
    stored    every tensor of the result
    """
    try:
        return list(_misread(settings, source, plan, {slot.name: slot for slot in stored}))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        return [f"quantization_config cannot be read ({error!r})"[:200]]


def _misread(
    settings: Settings,
    source: ModelSource,
    plan: CompressionPlan,
    slots: Mapping[str, Slot | TensorInfo],
) -> Iterator[str]:
    view = ENGINES[settings["quant_method"]] if settings else _nothing
    for info in source.tensors.values():
        module = result_name(source, plan, info.name).removesuffix(".weight")
        if len(info.shape) != 2 or not info.name.endswith(".weight"):
            continue
        held = stored_bits(module, info.shape[1], slots)
        claimed = view(settings, module, source)
        if held is not None and held != claimed:
            yield f"{module} has {held} bits in the file and {claimed} by its settings"


def stored_bits(module: str, columns: int, slots: Mapping[str, Slot | TensorInfo]) -> int | None:
    """The width of a matrix in the file, by the shapes and dtypes of its parts; None if it is not
    there."""
    if packed := slots.get(f"{module}.qweight"):  # [columns / codes in a word, rows]
        return packed.shape[0] * WORD_BITS // columns
    if packed := slots.get(f"{module}.weight_packed"):  # [rows, columns / codes in a word]
        return packed.shape[1] * WORD_BITS // columns
    if f"{module}.SCB" in slots:
        return 8
    if f"{module}.weight.absmax" in slots:
        return 4
    return PLAIN if f"{module}.weight" in slots else None


def _nothing(settings: Settings, module: str, source: ModelSource) -> int:
    return PLAIN


def _gptq(settings: Settings, module: str, source: ModelSource) -> int:
    """GPTQModel 7.6: linears of the layers, and the head if it says so; of the rules that match,
    the first "-:" decides, then the first other one (quantization/config.py, dynamic_get)."""
    if not module.startswith("model.layers.") and not (module == "lm_head" and settings["lm_head"]):
        return PLAIN
    rules = {rule: how for rule, how in settings.get("dynamic", {}).items()}
    matching = [rule for rule in rules if re.match(re.sub(r"^[+-]:", "", rule), module)]
    if any(rule.startswith("-:") for rule in matching):
        return PLAIN
    return int(rules[matching[0]].get("bits", settings["bits"]) if matching else settings["bits"])


def _auto_round(settings: Settings, module: str, source: ModelSource) -> int:
    """auto-round 0.15: linears below the named blocks, unless `extra_config` names them."""
    blocks = str(settings["block_name_to_quantize"]).split(",")
    if not any(module.startswith(f"{block}.") for block in blocks):
        return PLAIN
    return int(settings["extra_config"].get(module, {}).get("bits", settings["bits"]))


def _compressed_tensors(settings: Settings, module: str, source: ModelSource) -> int:
    """compressed-tensors 0.19: every Linear that `ignore` does not match; an exact name comes
    before a pattern, and a pattern before the class (utils/match.py)."""
    if module == "model.embed_tokens" or _matching(settings["ignore"], module):
        return PLAIN
    targets = {
        target: int(group["weights"]["num_bits"])
        for group in settings["config_groups"].values()
        for target in group["targets"]
    }
    found = _matching(list(targets), module) or [t for t in targets if t == "Linear"]
    return targets[found[0]] if found else PLAIN


def _matching(targets: Sequence[str], module: str) -> list[str]:
    patterns = [t for t in targets if t.startswith("re:") and re.match(t[3:], module)]
    return [*(t for t in targets if t == module), *patterns]


def _bitsandbytes(settings: Settings, module: str, source: ModelSource) -> int:
    """Our own `loading`: experts of the decoder's layers unless listed, other linears if listed."""
    bits = 8 if settings["data_type"] == "int8" else 4
    layer = _LAYER.search(module)
    within = layer is not None and int(layer[1]) < source.layer_count
    expert = within and re.search(r"\.experts\.\d+\.", module) is not None
    packed = module not in settings["in_16_bit"] if expert else module in settings["others"]
    return bits if packed else PLAIN


ENGINES: Mapping[str, Callable[[Settings, str, ModelSource], int]] = {
    "gptq": _gptq,
    "auto-round": _auto_round,
    "compressed-tensors": _compressed_tensors,
    "se-compress": _bitsandbytes,
}
