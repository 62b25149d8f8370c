"""What tools/vllm_check.py puts to vLLM: small random models of ours, packed and plain."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import tiny  # noqa: E402
from dequantise import dequantised, on_disk  # noqa: E402

from se_compress.artifacts import CompressionPlan, ModelSource  # noqa: E402
from se_compress.engines.serving import serving_of  # noqa: E402
from se_compress.opening.source import open_source  # noqa: E402
from se_compress.planning.policy import make_plan  # noqa: E402

MODEL = ROOT / "models" / "smollm2-moe"
TOKENS = 96
GPU_WIDTHS = (2, 3, 4, 8)  # 2 and 3 by Humming, which no CPU has
# Heads that vLLM's attention on CPUs has kernels for, experts whose widths fill groups of 64. A
# Qwen2-MoE without biases of q, k and v answers NaN there unless its export has some.
_WIDE: Mapping[str, Any] = {"hidden_size": 128, "num_attention_heads": 4}
_LATENT = {**_WIDE, "moe_intermediate_size": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
           "qk_nope_head_dim": 128, "v_head_dim": 128}  # fmt: skip
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {**_WIDE, "moe_intermediate_size": 64, "qkv_bias": False},
    "qwen3_moe": {**_WIDE, "moe_intermediate_size": 64, "head_dim": 32},
    "olmoe": {**_WIDE, "intermediate_size": 64},
    "mixtral": {**_WIDE, "intermediate_size": 64},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}
# Targets and format of the packed files.
FILES = {
    "compressed-tensors": (["vllm"], "compressed-tensors"),
    "gptq": (["gptqmodel", "vllm", "sglang"], "gptq"),
    "auto-round": (["transformers", "vllm"], "auto-round-gptq"),
}


def build_files(work: Path, packed: bool, model: str = "") -> dict[str, Path]:
    """Checkpoints of every family for vLLM, by name: 16 bits, or packed in each format that it
    reads, of one width and of several. `model` is what their names begin with."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found = {}
    sources = {
        family: open_source(str(tiny.build(work / f"source-{family}", family, **changes)))
        for family, changes in FAMILIES.items()
        if family.startswith(model)
    }
    if MODEL.exists() and MODEL.name.startswith(model):
        sources[MODEL.name] = open_source(str(MODEL))
    for family, source in sources.items():
        plans = _packed_plans(source) if packed else [("16 bits", _plan(source, ["vllm"], None))]
        for name, plan in plans:
            directory = work / f"{family}-{name.replace(' ', '-')}"
            found[f"{family} {name}"] = tiny.write_result(source, plan, directory)
    return found


def _packed_plans(source: ModelSource) -> Iterator[tuple[str, CompressionPlan]]:
    for form, (targets, asked) in FILES.items():
        if source.family == "mixtral":  # by its own names, so for vLLM alone
            targets = ["vllm"]
        plan = _plan(source, targets, asked)
        yield f"{form} uniform", plan
        first = source.moe_layers[0]
        lifted = (
            replace(d, bits=16, action="keep") if d.layer == first and d.expert != "shared" else d
            for d in plan.experts
        )
        yield f"{form} by layer", replace(plan, experts=tuple(lifted))


def build_widths(work: Path, family: str) -> Iterator[tuple[str, Path, str]]:
    """Files of 2, 3, 4 and 8 bits for vLLM on a GPU: name, directory and the flags that its server
    needs for it. Those of all widths come first: one of them shows most."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    changes = {**FAMILIES[family], "num_hidden_layers": len(GPU_WIDTHS) + 1, "mlp_only_layers": []}
    source = open_source(str(tiny.build(work / f"source-{family}", family, **changes)))
    for form in ("compressed-tensors", "gptq", "auto-round"):
        plan = _plan(source, *FILES[form])
        yield _built(work, source, f"{family} {form}, by layer", _by_layer(source, plan))
    for bits in GPU_WIDTHS:
        plan = _plan(source, ["vllm"], "compressed-tensors", bits)
        yield _built(work, source, f"{family} compressed-tensors, {bits} bits", plan)
    zeros = _plan(source, ["vllm"], "compressed-tensors", 4, symmetric=False)
    yield _built(work, source, f"{family} compressed-tensors, 4 bits with zero points", zeros)


def _by_layer(source: ModelSource, plan: CompressionPlan) -> CompressionPlan:
    """Each of the widths in a layer of its own, and one layer in 16 bits."""
    widths = dict(zip(source.moe_layers, (*GPU_WIDTHS, 16), strict=True))
    experts = (
        replace(d, bits=widths[d.layer], action="keep" if widths[d.layer] == 16 else "quantize")
        if d.expert != "shared"
        else d
        for d in plan.experts
    )
    return replace(plan, experts=tuple(experts))


def _built(
    work: Path, source: ModelSource, name: str, plan: CompressionPlan
) -> tuple[str, Path, str]:
    directory = work / re.sub(r"[ ,]+", "-", name)
    command = next(s.command for s in serving_of(plan) if s.target == "vllm")
    flags = command.partition("vllm serve .")[2].strip()
    return name, tiny.write_result(source, plan, directory), flags


def _plan(
    source: ModelSource,
    targets: list[str],
    form: str | None,
    bits: int = 4,
    symmetric: bool = True,
) -> CompressionPlan:
    quantization: dict[str, object] = {"method": "none"}
    if form is not None:
        quantization = {"method": "rtn", "group_size": 64, "format": form, "symmetric": symmetric}
    settings = {"policy": {"bits": bits, "protect": "none"}, "quantization": quantization}
    return make_plan(source, None, tiny.recipe(source.name, target=targets, **settings))


def plain(directory: Path, target: Path) -> Path:
    """A bfloat16 copy of a packed file: the weights that it stands for."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in directory.glob("tokenizer*"):
        shutil.copy(file, target)
    weights = dequantised(directory)
    if config["model_type"] == "mixtral":
        weights = {on_disk(name): weight for name, weight in weights.items()}
    rounded = {name: weight.bfloat16().contiguous() for name, weight in weights.items()}
    save_file(rounded, target / "model.safetensors", metadata={"format": "pt"})
    return target


def held_out(directory: Path) -> list[int]:
    """Tokens to ask about: of held-out text for the reference model, any for random ones."""
    if json.loads((directory / "config.json").read_text())["vocab_size"] == tiny.VOCABULARY:
        return tiny.random_tokens(1, 64, seed=11)[0]
    from transformers import AutoTokenizer

    text = (ROOT / "tools/reference/text/factbook-held-out.txt").read_text(encoding="utf-8")
    ids: list[int] = AutoTokenizer.from_pretrained(MODEL)(text[:4000])["input_ids"]
    return ids[:TOKENS]


# ------------------------------------------------------------------------- beside llm-compressor

PEER = """
import sys, torch
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
scheme = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True,
          "strategy": "group", "group_size": 64}}
ignore = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$", "re:.*shared_expert.*"]
oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=ignore))
model.save_pretrained(sys.argv[2], save_compressed=True)
"""


def written(work: Path) -> list[str]:
    """Names, dtypes and shapes of every tensor, and what both configs say of a matrix."""
    if not MODEL.exists():
        return [f"not run: {MODEL.relative_to(ROOT)} is not there (make models)"]
    source = open_source(str(MODEL))
    ours, theirs = work / "ours", work / "llm-compressor"
    shutil.rmtree(ours, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    tiny.write_result(source, _plan(source, ["sglang"], "compressed-tensors"), ours)
    if not (theirs / "config.json").exists():
        command = [sys.executable, "-c", PEER, str(MODEL), str(theirs)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    first, second = tensors(ours), tensors(theirs)
    both = first.keys() & second.keys()
    scheme, other = weights(ours), weights(theirs)
    differing = [(k, scheme.get(k), other[k]) for k in other if scheme.get(k) != other[k]]
    return [
        f"{len(first)} tensors of ours, {len(second)} of llm-compressor's; only ours "
        f"{sorted(first.keys() - second.keys())[:3]}, only theirs "
        f"{sorted(second.keys() - first.keys())[:3]}, dtype or shape differs "
        f"{[name for name in both if first[name] != second[name]][:3]}",
        f"config differs in {differing}",
    ]


def tensors(directory: Path) -> dict[str, tuple[str, list[int]]]:
    found: dict[str, tuple[str, list[int]]] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def weights(directory: Path) -> dict[str, Any]:
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    group = settings["config_groups"]["group_0"]
    common = {key: settings[key] for key in ("format", "quant_method", "quantization_status")}
    return {**common, "group format": group["format"], "targets": group["targets"],
            **group["weights"]}  # fmt: skip
