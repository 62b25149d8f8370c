"""A model as it may be published: FP8 in blocks, experts in MXFP4, packed to 4 bits, or fused.

    python benchmarks/source_formats.py                       measures, and writes to RESULTS.md
    python benchmarks/source_formats.py --write FORM MODEL DIRECTORY

The writers of FORMS share no line with what se-compress reads them by. smollm2-moe is written in
each form and compressed from it: in the source's precision, and to 4 bits by GPTQ with the super
experts protected. Each result is judged beside the plain model, and beside the source that it was
made from, on 4 x 256 held-out tokens; calibration sees 4 x 256. Forms that --work has measured are
not measured again.
"""

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from reference import ROOT, Model, judge, open_model, recipe_of
from results import machine, write_section
from safetensors.torch import load_file, save_file
from torch import Tensor

from se_compress.planning.policy import make_plan
from se_compress.recipe import Recipe
from se_compress.validation.validator import validate

Tensors = dict[str, Tensor]
BLOCK = 128
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_LINEAR = re.compile(r".+\.layers\.\d+\.(?!.*(norm|gate\.weight|shared_expert_gate)).+\.weight")
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


# ----------------------------------------------------------------------------------- one matrix


def to_fp8(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """E4M3 codes [R, C] and what a block of them is multiplied by, float32 [R/b, C/b], rounded up
    where blocks run over the edge."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block), -(-columns // block))
    for row in range(0, rows, block):
        for column in range(0, columns, block):
            part = weight[row : row + block, column : column + block].float()
            scale = part.abs().amax().clamp(min=1e-12) / 448
            scales[row // block, column // block] = scale
            codes[row : row + block, column : column + block] = (part / scale).to(codes.dtype)
    return codes, scales


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks uint8 [..., C/32, 16] and exponents uint8 [..., C/32] of a weight [..., C], as OCP
    Microscaling Formats 1.0, 6.3, rounds: to the power of two that lets the largest value fit."""
    groups = weight.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    exponent = torch.floor(torch.log2(largest)) - 2
    scaled = groups / torch.exp2(exponent)
    code = (scaled.abs().unsqueeze(-1) - _FP4).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8)
    return blocks, (exponent.squeeze(-1) + 127).to(torch.uint8)


def to_int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """Words int32 [R, C/8], eight codes in each, the first lowest; scales bfloat16 [R, C/group]."""
    groups = weight.float().unflatten(-1, (-1, group))
    scales = (groups.abs().amax(-1) / 7).clamp(min=1e-12).bfloat16()
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(-2) + 8
    eights = codes.long().unflatten(-1, (-1, 8))
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int(), scales


# ------------------------------------------------------------------------------------ whole models


def fused(tensors: Mapping[str, Tensor]) -> Tensors:
    """The experts of a layer in two tensors, gate_up_proj [E, 2I, H] and down_proj [E, H, I].
    transformers then uses the names in memory, which for Mixtral are others."""
    made: Tensors = {}
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            layer = experts.setdefault(match[1], {})
            layer.setdefault(match[3], {})[int(match[2])] = tensor
        else:
            made[name] = tensor
    for stem, layer in experts.items():
        whole = {p: torch.stack([of[e] for e in sorted(of)]) for p, of in layer.items()}
        gate, up, down = (
            ("w1", "w3", "w2") if "w1" in whole else ("gate_proj", "up_proj", "down_proj")
        )
        made[f"{stem}.gate_up_proj"] = torch.cat([whole[gate], whole[up]], 1)
        made[f"{stem}.down_proj"] = whole[down]
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in made.items()}


def in_fp8(tensors: Mapping[str, Tensor], block: int = BLOCK) -> Tensors:
    """All linears of decoder layers but routers, as DeepSeek-V3 is published."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and _LINEAR.fullmatch(name):
            made[name], made[f"{name}_scale_inv"] = to_fp8(tensor, block)
        else:
            made[name] = tensor
    return made


def in_mxfp4(tensors: Mapping[str, Tensor]) -> Tensors:
    """The experts fused and in MXFP4, as gpt-oss is published."""
    made: Tensors = {}
    for name, tensor in fused(tensors).items():
        if tensor.dim() == 3:
            made[f"{name}_blocks"], made[f"{name}_scales"] = to_mxfp4(tensor)
        else:
            made[name] = tensor
    return made


def in_int4(tensors: Mapping[str, Tensor], group: int = 32) -> Tensors:
    """Routed experts packed, as Kimi-K2-Thinking is published."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if not _EXPERT.fullmatch(name):
            made[name] = tensor
            continue
        words, scales = to_int4(tensor, group)
        made |= {f"{name}_packed": words, f"{name}_scale": scales}
        made[f"{name}_shape"] = torch.tensor(tensor.shape)
    return made


def _int4_settings(group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": group, "actorder": None, "dynamic": False}  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_expert.*", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    }


def fused_fp8(tensors: Mapping[str, Tensor], block: int = BLOCK) -> Tensors:
    """Fused experts whose scales are fused as well."""
    made: Tensors = {}
    for name, tensor in in_fp8(fused(tensors), block).items():
        made[name] = tensor
        if tensor.dim() == 3:
            parts = [to_fp8(matrix, block) for matrix in tensor]
            made[name] = torch.stack([codes.view(torch.uint8) for codes, _ in parts]).view(
                torch.float8_e4m3fn
            )
            made[f"{name}_scale_inv"] = torch.stack([scales for _, scales in parts])
    return made


def _fp8_settings(block: int) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
    }


# Name -> what it makes of the tensors, with blocks of FP8 so large.
FORMS: Mapping[str, Callable[[Tensors, int], Tensors]] = {
    "plain": lambda tensors, block: tensors,
    "fused": lambda tensors, block: fused(tensors),
    "fp8": in_fp8,
    "fused-fp8": fused_fp8,
    "mxfp4": lambda tensors, block: in_mxfp4(tensors),
    "int4": lambda tensors, block: in_int4(tensors),
}


def settings_of(form: str, block: int = BLOCK) -> dict[str, Any] | None:
    """The `quantization_config` of a form; None for plain weights."""
    settings = {
        "fp8": _fp8_settings(block),
        "fused-fp8": _fp8_settings(block),
        "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        "int4": _int4_settings(32),
    }
    return settings.get(form)


def write(form: str, model: Path, directory: Path, block: int = BLOCK) -> Path:
    """The model in a form, as a directory of its own."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: Tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    made = {name: tensor.contiguous() for name, tensor in FORMS[form](tensors, block).items()}
    save_file(made, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if settings := settings_of(form, block):
        config["quantization_config"] = settings
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return directory


# ----------------------------------------------------------------------------------- measurements

WORK = ROOT / "out" / "benchmark-source-formats"
MODEL = "smollm2-moe"
CALIBRATION, JUDGED = 4, 4  # sequences of 256 tokens
MEASURED = ("plain", "mxfp4", "fp8", "fused", "int4")
_SUPER = {"super_experts": {"confirm": False}}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "none": {"target": "transformers", "quantization": {"method": "none"}, **_SUPER},
    "4 bit": {
        "target": "gptqmodel",
        "quantization": {"method": "gptq", "group_size": 64},
        "policy": {"bits": [4]},
        **_SUPER,
    },
}


def measure(form: str, plain: Model, work: Path) -> dict[str, Any]:
    """What comes of one form: size, super experts, and the divergence of both results from the
    plain model and from their own source."""
    directory = work / form
    if not directory.exists():
        write(form, Path(plain.source.path), directory)
    judged = plain
    if form != "plain":
        judged = open_model(form, _recipe(directory, "4 bit"), work)
    row: dict[str, Any] = {
        "form": form,
        "size": judged.source.size_bytes,
        "super_experts": [str(expert.id) for expert in judged.profile.super_experts],
    }
    for method in METHODS:
        recipe = _recipe(directory, method)
        plan = make_plan(judged.source, judged.profile, recipe)
        own = judge(judged, recipe, plan, judged.calibration)
        result = judged.work / "checkpoint"
        beside = validate(
            plain.source, plan, result, plain.original.tokens, recipe,
            original=plain.original, reload=False,
        )  # fmt: skip
        checks = {check.name: check.value for check in beside.checks}
        row[method] = {
            "size": own["size"],
            "own": own["kl_divergence"],
            "plain": checks["kl_divergence"],
            "perplexity": own["perplexity"],
            "tensors": _digest(result),
        }
    return row


def _digest(directory: Path) -> str:
    """Of all tensors by name, whatever their order in the file."""
    digest = hashlib.sha256()
    tensors = load_file(directory / "model.safetensors")
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _recipe(model: Path, method: str) -> Recipe:
    validation = {"generation": {"tokens": 0}, "early_stop": False, "samples": JUDGED}
    recipe = recipe_of(MODEL, validation, **METHODS[method])
    fewer = recipe.calibration.model_copy(update={"samples": CALIBRATION})
    return recipe.model_copy(update={"model": str(model), "calibration": fewer})


def section(rows: Sequence[Mapping[str, Any]]) -> str:
    plain = rows[0]
    lines = [
        f"## {MODEL} as it may be published",
        "",
        f"`python benchmarks/source_formats.py`, {machine()}. 4 x 256 held-out tokens. KL in "
        "nats a token: of the plain model from what was made of a form (rounded by the form alone, "
        "or by the form and to 4 bits), and of the form's decoded source from its 4 bits.",
        "",
        "| form | MB | super experts | plain from form | form from its 4 bits | plain from its "
        "4 bits | the same, less the form's own | results equal plain's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        none, four = row["none"], row["4 bit"]
        equal = [m for m in METHODS if row[m]["tensors"] == plain[m]["tensors"]]
        lines.append(
            f"| {row['form']} | {row['size'] / 1e6:.1f} | {', '.join(row['super_experts'])} | "
            f"{none['plain']:.5f} | {four['own']:.5f} | {four['plain']:.5f} | "
            f"{four['plain'] - none['plain']:.5f} | {', '.join(equal) or '-'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", nargs=3, metavar=("FORM", "MODEL", "DIRECTORY"))
    parser.add_argument("--work", type=Path, default=WORK)
    arguments = parser.parse_args()
    if arguments.write:
        form, model, directory = arguments.write
        write(form, Path(model), Path(directory))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = ROOT / "models" / MODEL
    plain = open_model("plain", _recipe(model, "4 bit"), arguments.work)
    saved = arguments.work / "measured.json"
    rows = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
    for form in MEASURED:
        if form not in rows:
            rows[form] = measure(form, plain, arguments.work)
        print(json.dumps(rows[form]), flush=True)
        saved.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        write_section("source-formats", section([*rows.values()]))


if __name__ == "__main__":
    main()
