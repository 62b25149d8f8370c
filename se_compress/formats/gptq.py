"""GPTQ, versions 1 and 2.

Stored (GPTQModel, nn_modules/qlinear/__init__.py), b bits, G groups:

    qweight  int32 [C*b/32, R], runs down the columns
    qzeros   int32 [G, R*b/32], runs across the rows
    scales   float16 [G, R]
    g_idx    int32 [C], the group of each column

Version 1 stores a zero less one, and readers add the one to the packed words: zero 0 would borrow
from its neighbour, and is refused. Version 2 stores zeros as they are.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from se_compress.artifacts import SOURCE_BITS, Scheme
from se_compress.formats.auto_round import read_codes
from se_compress.formats.base import Format, Parts
from se_compress.formats.planned import PlannedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from se_compress.quant.grid import Grid

# All that is no routed expert. By full names: GPTQModel matches names within a layer as well, and
# gives up what a "-:" pattern hits there. vLLM and SGLang look the experts of a layer up once, by
# the name that they have in common: it must not match either.
EVERYTHING_ELSE = r"-:^(model\.|lm_head)(?!.*\.experts(\.|$)).*$"

# What vLLM and SGLang call a matrix that they make of several (packed_modules_mapping).
FUSED_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
}


def _parts(rows: int, columns: int, bits: int, scheme: Scheme) -> Parts:
    from se_compress.formats.auto_round import parts

    yield from parts(rows, columns, bits, scheme)
    yield "g_idx", "I32", (columns,)


def _pack(
    offset: int, codes: "Tensor", scales: "Tensor", zeros: "Tensor", grid: "Grid"
) -> "dict[str, Tensor]":
    from se_compress.quant.packing import group_of_column, pack_qweight

    parts = pack_qweight(codes, scales, zeros, grid.bits, offset)
    columns = codes.shape[1]
    return parts | {"g_idx": group_of_column(columns, grid.group_size, codes.device)}


def _unpack(
    offset: int, parts: "Mapping[str, Tensor]", shape: tuple[int, int], scheme: Scheme
) -> "Tensor":
    return read_codes(offset, parts, shape[1]).dequantized()


def _settings(
    version: str, linears: Sequence[PlannedTensor], scheme: Scheme, base: int
) -> dict[str, Any]:
    """As GPTQModel 7.6 reads it (quantization/config.py). `dynamic` maps patterns of module names
    to what differs: "-:pattern" leaves a module in 16 bits, "+:pattern" gives it another width. Of
    the patterns that match, the first "-:" decides, then the first "+:", whatever their order.

    vLLM and SGLang read the same patterns, but ask once for all experts of a layer, by the name of
    the module that holds them, and once for linears that they fuse: a layer whose experts are alike
    has one pattern, which matches that name too. A layer of several widths has none, and is read by
    GPTQModel alone.
    """
    return {
        "quant_method": "gptq",
        "format": version,
        "checkpoint_format": version,
        "bits": base,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": _dynamic(linears, scheme, base),
        "meta": {"quantizer": ["se-compress"]},
    }


def _dynamic(
    linears: Sequence[PlannedTensor], scheme: Scheme, base: int
) -> dict[str, dict[str, int]]:
    others: dict[str, int] = {}
    layers: dict[str, dict[str, int]] = {}
    for tensor in linears:
        if tensor.info.kind == "expert":
            holder = tensor.module.rpartition(".experts.")[0] + ".experts"
            layers.setdefault(holder, {})[tensor.module] = tensor.bits
        else:
            others[tensor.module] = tensor.bits
    rules = _plain_layers(others)
    for holder, modules in layers.items():
        rules |= _expert_rules(holder, modules, scheme, base)
    if set(others.values()) == {SOURCE_BITS}:
        return rules | {EVERYTHING_ELSE: {}}
    for module, bits in others.items():
        rules |= _rule(_or_fused(module) + "$", bits, scheme)
    return rules


def _expert_rules(
    holder: str, modules: Mapping[str, int], scheme: Scheme, base: int
) -> dict[str, dict[str, int]]:
    """Rules for the experts of a layer, as few as do.

    holder  name of the module that holds them
    """
    widths = set(modules.values())
    if len(widths) == 1:
        bits = widths.pop()
        return {} if bits == base else _rule(rf"{re.escape(holder)}(\.|$)", bits, scheme)
    experts: dict[str, dict[str, int]] = {}
    for module, bits in modules.items():
        experts.setdefault(module.rpartition(".")[0], {})[module] = bits
    rules: dict[str, dict[str, int]] = {}
    for expert, parts in experts.items():
        alike = set(parts.values())
        if len(alike) == 1 and alike != {base}:
            rules |= _rule(re.escape(expert + "."), alike.pop(), scheme)
        elif len(alike) > 1:
            for module, bits in parts.items():
                rules |= _rule(re.escape(module) + "$", bits, scheme)
    return rules


def _or_fused(module: str) -> str:
    """A pattern for a linear and for the one that vLLM and SGLang make of it and its neighbours;
    experts are no such linears."""
    stem, _, linear = module.rpartition(".")
    fused = FUSED_NAMES.get(linear)
    if fused is None or re.search(r"\.experts\.\d+$", stem):
        return re.escape(module)
    return rf"{re.escape(stem)}\.({linear}|{fused})"


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
        if {others[module] for module in modules} == {SOURCE_BITS}:
            rules[f"-:^{re.escape(stem)}"] = dict[str, int]()
            for module in modules:
                del others[module]
    return rules


def _rule(pattern: str, bits: int, scheme: Scheme) -> dict[str, dict[str, int]]:
    if bits == SOURCE_BITS:
        return {f"-:^{pattern}": {}}
    return {f"+:^{pattern}": {"bits": bits, "group_size": scheme.group_size}}


GPTQ = Format(
    name="gptq",
    suffixes=("qweight", "qzeros", "scales", "g_idx"),
    parts=_parts,
    settings=partial(_settings, "gptq"),
    unpack=partial(_unpack, 1),
    codes=partial(read_codes, 1),
    pack=partial(_pack, 1),
    quantize=None,
    scale_dtype="float16",
    quant_method="gptq",
    layout="gptq",
    engine="gptqmodel",
    package="gptqmodel",
    extra="gptq",
    has_float32=True,
    own_file="quantize_config.json",
)
GPTQ_V2 = replace(
    GPTQ,
    name="gptq_v2",
    layout="gptq_v2",
    settings=partial(_settings, "gptq_v2"),
    unpack=partial(_unpack, 0),
    codes=partial(read_codes, 0),
    pack=partial(_pack, 0),
)
