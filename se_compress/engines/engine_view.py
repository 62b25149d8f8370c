"""What an engine makes of the settings of a result, module by module, beside what the file holds.

The settings are read here as the engines read them, from the finished JSON and by the names of the
modules alone: how they were written plays no part. A matrix that is plain in the file and quantised
by its settings (or the other way round, or of another width) is initialised at random by some
engines and read wrong by others, mostly without a word. No torch.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from se_compress.artifacts import SOURCE_BITS, TensorInfo
from se_compress.artifacts.targets import ENGINES as TARGET_ENGINES
from se_compress.artifacts.targets import targets_of
from se_compress.engines.blueprint import Blueprint
from se_compress.formats.gptq import FUSED_NAMES
from se_compress.opening.headers import Slot

Settings = Mapping[str, Any]
View = Callable[[str], int]  # the name of a module -> the width that the engine gives it
WORD_BITS = 32  # codes are packed into words of this many bits
_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_HOLDER = re.compile(r"(.*\.experts)\.\d+\.")


def misread(
    settings: Settings, blueprint: Blueprint, stored: Iterable[Slot | TensorInfo]
) -> list[str]:
    """A sentence for each matrix of the result that its engine takes for something else.

    settings   `quantization_config`; empty where nothing is quantised
    blueprint  for the names of the matrices: what it says of their widths plays no part
    stored     every tensor of the result
    """
    try:
        return list(_misread(settings, blueprint, {slot.name: slot for slot in stored}))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        return [f"quantization_config cannot be read ({error!r})"[:200]]


def _misread(
    settings: Settings, blueprint: Blueprint, slots: Mapping[str, Slot | TensorInfo]
) -> Iterator[str]:
    views = list(_views(settings, blueprint)) if settings else [_plain]
    for tensor in blueprint.tensors.values():
        info, module = tensor.info, tensor.module
        if len(info.shape) != 2 or not info.name.endswith(".weight"):
            continue
        held = stored_bits(module, info.shape[1], slots)
        claims = dict.fromkeys(view(module) for view in views)
        for claimed in claims if held is not None else ():
            if held != claimed:
                yield f"{module} has {held} bits in the file and {claimed} by its settings"


def _views(settings: Settings, blueprint: Blueprint) -> Iterator[View]:
    """How each target of the plan reads the settings; engines that read alike come once."""
    method, layers = settings["quant_method"], blueprint.source.layer_count
    fusing = {TARGET_ENGINES[target].fuses for target in targets_of(blueprint.plan.target)}
    for fuses in sorted(fusing):
        readers = FUSING if fuses and method in FUSING else ENGINES
        yield readers[method](settings, layers)


def _plain(module: str) -> int:
    return SOURCE_BITS


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
    return SOURCE_BITS if f"{module}.weight" in slots else None


# ------------------------------------------------------------------------------------------ engines


def _gptq(settings: Settings, layers: int) -> View:
    """GPTQModel 7.6: linears of the layers, and the head if it says so; of the rules that match,
    the first "-:" decides, then the first other one (quantization/config.py, dynamic_get)."""
    rules: Mapping[str, Mapping[str, int]] = settings.get("dynamic", {})
    patterns = _Patterns([re.sub(r"^[+-]:", "", rule) for rule in rules])
    overrides = list(rules.items())

    def view(module: str) -> int:
        head = module == "lm_head" and settings["lm_head"]
        if not head and not module.startswith("model.layers."):
            return SOURCE_BITS
        matching = [overrides[place] for place in patterns.matching(module)]
        if any(rule.startswith("-:") for rule, _ in matching):
            return SOURCE_BITS
        bits = matching[0][1].get("bits") if matching else None
        return int(settings["bits"] if bits is None else bits)

    return view


def _auto_round(settings: Settings, layers: int) -> View:
    """auto-round 0.15: linears below the named blocks, unless `extra_config` names them."""
    blocks = tuple(f"{block}." for block in settings["block_name_to_quantize"].split(","))
    base, named = int(settings["bits"]), settings["extra_config"]

    def view(module: str) -> int:
        below = module.startswith(blocks)
        return int(named.get(module, {}).get("bits", base)) if below else SOURCE_BITS

    return view


def _compressed_tensors(settings: Settings, layers: int) -> View:
    """compressed-tensors 0.19: every Linear that `ignore` does not match; an exact name comes
    before a pattern, and a pattern before the class (utils/match.py)."""
    ignored = _Targets(settings["ignore"])
    groups = settings["config_groups"].values()
    widths = {t: int(group["weights"]["num_bits"]) for group in groups for t in group["targets"]}
    targets = _Targets(list(widths))

    def view(module: str) -> int:
        if module.rpartition(".")[2].startswith("embed") or ignored.find(module):
            return SOURCE_BITS
        return widths.get(targets.find(module) or "Linear", SOURCE_BITS)

    return view


def _bitsandbytes(settings: Settings, layers: int) -> View:
    """Our own `loading`: experts of the decoder's layers unless listed, other linears if listed."""
    bits = 8 if settings["data_type"] == "int8" else 4
    in_16_bit, others = set(settings["in_16_bit"]), set(settings["others"])

    def view(module: str) -> int:
        layer = _LAYER.search(module)
        within = layer is not None and int(layer[1]) < layers
        expert = within and _EXPERT.search(module) is not None
        return bits if (module not in in_16_bit if expert else module in others) else SOURCE_BITS

    return view


def _fused_gptq(settings: Settings, layer_count: int) -> View:
    """vLLM 0.32 with --quantization humming (quantization/humming.py, is_layer_skipped, and
    utils/humming/linear.py, resolve_humming_layer_config), and SGLang 0.5.23 alike: any "-:" that
    matches, then the first "+:". vLLM without that flag (utils/gptq_utils.py,
    get_dynamic_override) takes the first of either kind, which is the same for rules of ours."""
    rules: Mapping[str, Mapping[str, int]] = settings.get("dynamic", {})

    def view(module: str) -> int:
        name = fused_module(module)
        if name in ("lm_head", "model.embed_tokens"):
            return SOURCE_BITS
        matching = [rule for rule in rules if re.match(rule[2:], name)]
        if any(rule.startswith("-") for rule in matching):
            return SOURCE_BITS
        wider = (rules[rule] for rule in matching if rule.startswith("+"))
        return int({"bits": settings["bits"], **next(wider, {})}["bits"])

    return cache(view)


def _expert_0(settings: Settings, layer_count: int) -> View:
    """vLLM 0.32 (compressed_tensors_moe.py, get_moe_method) and SGLang 0.5.23: what the settings
    say of expert 0 holds for all experts of its layer."""
    view = _compressed_tensors(settings, layer_count)
    return lambda module: view(re.sub(r"\.experts\.\d+\.", ".experts.0.", module))


def _inc(settings: Settings, layer_count: int) -> View:
    """vLLM 0.32 (quantization/inc/config_parser.py): the experts of a layer by an exact key for the
    module that holds them; a fused linear by the keys of its parts, if one is there."""
    blocks = tuple(settings["block_name_to_quantize"].split(","))
    base, named = int(settings["bits"]), settings["extra_config"]

    def view(module: str) -> int:
        held = _HOLDER.match(module)
        name = held[1] if held else module
        below = name.startswith(blocks)
        return int(named.get(name, {}).get("bits", base if below else SOURCE_BITS))

    return view


def fused_module(module: str) -> str:
    """The name by which vLLM and SGLang look a linear up: that of the module that holds a layer's
    experts, or of the linear that it becomes a part of."""
    if found := _HOLDER.match(module):
        return found[1]
    stem, _, linear = module.rpartition(".")
    return f"{stem}.{FUSED_NAMES.get(linear, linear)}" if stem else module


ENGINES: Mapping[str, Callable[[Settings, int], View]] = {
    "gptq": _gptq,
    "auto-round": _auto_round,
    "compressed-tensors": _compressed_tensors,
    "se-compress": _bitsandbytes,
}
# Of engines that look the experts of a layer up once, where they differ.
FUSING: Mapping[str, Callable[[Settings, int], View]] = {
    "gptq": _fused_gptq,
    "compressed-tensors": _expert_0,
    "auto-round": _inc,
}


# ----------------------------------------------------------------------------------------- patterns


class _Targets:
    """Names and "re:" patterns of compressed-tensors."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._names = set(targets)
        self._patterns = [(t, re.compile(t[3:])) for t in targets if t.startswith("re:")]

    def find(self, module: str) -> str:
        """The first that matches, names before patterns; "" if none does."""
        if module in self._names:
            return module
        return next((target for target, p in self._patterns if p.match(module)), "")


class _Patterns:
    """Thousands of patterns, one or more for each expert, looked up by what they begin with."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._by_start: dict[str, list[tuple[int, re.Pattern[str]]]] = {}
        for place, pattern in enumerate(patterns):
            start = literal_start(pattern)
            self._by_start.setdefault(start, []).append((place, re.compile(pattern)))

    def matching(self, text: str) -> list[int]:
        """Places of the patterns that match at the start of a text, in order."""
        starts = (text[:end] for end in range(len(text) + 1))
        likely = (pair for start in starts for pair in self._by_start.get(start, ()))
        return sorted(place for place, pattern in likely if pattern.match(text))


def literal_start(pattern: str) -> str:
    """Characters that every match of a pattern begins with; perhaps not all of them."""
    text = pattern.removeprefix("^")
    if "|" in text:
        return ""
    literal = re.match(r"(?:[\w ]|\\[^\w])*", text)
    found = literal[0] if literal else ""
    if text[len(found) : len(found) + 1] in tuple("*?{"):  # the last one may be missing
        found = re.sub(r"\\?.$", "", found)
    return re.sub(r"\\(.)", r"\1", found)
