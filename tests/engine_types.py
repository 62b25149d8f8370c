"""What each engine makes of a quantised model of every type: files rounded to nearest, loaded, and
compared with plain transformers holding the weights that the files stand for (dequantise.py).

    python tests/engine_types.py work auto-round afmoe jamba
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny
import tiny_types
import torch
from dequantise import dequantised
from safetensors.torch import load_file
from torch import Tensor

from se_compress.artifacts import (
    ROLES,
    SOURCE_BITS,
    CompressionPlan,
    ExpertDecision,
    ModelSource,
    Scheme,
)
from se_compress.errors import SeCompressError
from se_compress.opening.families import FAMILIES, live_prefix, unfused_name
from se_compress.opening.source import open_source

TOKENS = tiny.random_tokens(2, 24, seed=5)
# Name -> target, method and format of the rows that are run here.
CASES: Mapping[str, tuple[str, str, str]] = {
    "gptq": ("gptqmodel", "rtn", "gptq"),
    "gptq_v2": ("gptqmodel", "rtn", "gptq_v2"),
    "auto-round": ("transformers", "rtn", "auto-round"),
    "auto-round-gptq": ("transformers", "rtn", "auto-round-gptq"),
    "compressed-tensors": ("transformers", "rtn", "compressed-tensors"),
    "bitsandbytes": ("transformers", "bitsandbytes", "bitsandbytes"),
}
# Loads every directory, and writes the logits, or why there are none, beside it.
LOADER = """
import json, os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
case, tokens = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
if case.startswith("gptq"):
    from gptqmodel import BACKEND, GPTQModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging
import se_compress
logging.set_verbosity_error()

def load(directory):
    if case.startswith("gptq"):
        return GPTQModel.load(
            directory, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH
        ).model
    dtype = torch.float16 if case.startswith("auto-round") else torch.float32
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, output_loading_info=True
    )
    wrong = {key: sorted(info[key])[:2] for key in ("missing_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise ValueError(str(wrong))
    return model

for directory in sys.argv[3:]:
    try:
        with torch.no_grad():
            logits = load(directory).eval()(tokens, use_cache=False).logits.float()
        save_file({"logits": logits}, directory + ".found")
    except Exception as error:
        Path(directory + ".error").write_text(f"{type(error).__name__}: {error}"[:300])
"""


def write(source: ModelSource, case: str, directory: Path) -> Path:
    """The file of a case: four bits, groups of 32 columns, routed experts alone, of these one in 16
    bits where the engine takes that, whatever the table of model types says."""
    target, method, form = CASES[case]
    kept = ("shared",) if form == "compressed-tensors" else ("shared", 1)
    decisions = tuple(
        ExpertDecision(i.layer, i.expert, "keep", SOURCE_BITS, "kept")
        if i.expert in kept
        else ExpertDecision(i.layer, i.expert, "quantize", 4, "others alike")
        for i in source.experts
    )
    plan = CompressionPlan(
        target=target,
        scheme=Scheme(form, method, 32, True, *(("nf4", False) if form == "bitsandbytes" else ())),
        bits_per_weight=4.0,
        size_bytes=0,
        source_size_bytes=source.size_bytes,
        protected=(),
        profile_digest="",
        notes=(),
        experts=decisions,
    )
    return tiny.write_result(source, plan, directory)


def load_all(case: str, directories: Sequence[Path]) -> None:
    """In one process: an engine takes long to import."""
    subprocess.run(
        [sys.executable, "-c", LOADER, case, json.dumps(TOKENS), *map(str, directories)],
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        check=True,
    )


@torch.no_grad()
def expected_logits(source: ModelSource, directory: Path) -> Tensor:
    """Of the source's model in float32, its experts being those of the file."""
    model = tiny.plain_model(source.path)
    weights, family = dequantised(directory), FAMILIES[source.family]
    experts = {
        int(path.partition("layers.")[2].partition(".")[0]): module
        for path, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    }
    for identity, roles in source.experts.items():
        if not isinstance(identity.expert, int):
            continue
        module, found = experts[identity.layer], {}
        for role, info in roles.items():
            row = family.at(source.prefix)
            live = (unfused_name(row, info.name, p) for p in (None, live_prefix(source.config)))
            names = (info.name, *live)
            weight = next(weights[name] for name in names if name in weights)
            found[role] = weight.float().view(info.shape)  # bitsandbytes stores no shape
        put(module, identity.expert, found)
    logits: Tensor = model(torch.tensor(TOKENS), use_cache=False).logits
    return logits


def put(module: Any, expert: int, found: Mapping[str, Tensor]) -> None:
    """Give a live module the matrices [R, C] of one expert."""
    ups = [found[role] for role in ROLES[:2] if role in found]
    if len(ups) == 1:
        up, parameter = ups[0], module.up_proj
    else:
        up, parameter = torch.cat(ups), module.gate_up_proj
    for weight, whole in ((up, parameter), (found["down"], module.down_proj)):
        whole[expert] = weight.T if module.is_transposed else weight


def difference(directory: Path, expected: Tensor) -> float:
    """Relative, of the logits of a position, the median; infinite without any."""
    file = Path(f"{directory}.found")
    if not file.exists():
        return float("inf")
    found = load_file(file)["logits"]
    error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
    return error if error == error else float("inf")


def limit(model_type: str, case: str) -> float:
    """How far logits may be off. Engines that compute in float16 or float32 are at 0.01 at most;
    transformers runs the experts of MiniMax, and all of the composite of Llama 4, in the file's
    bfloat16. The tiny Granite models turn little noise into much: 0.02 and 0.04 under auto-round,
    where a wrong load is off by 1."""
    if model_type in ("granitemoe", "granitemoeshared"):
        return 0.1
    in_bfloat16 = case == "compressed-tensors" and model_type in ("minimax", "llama4")
    return 0.1 if in_bfloat16 else 0.02


def measure(work: Path, case: str, names: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Model type -> how far the logits are off, and the engine's error if there was one."""
    written: dict[str, tuple[ModelSource, Path]] = {}
    found: dict[str, tuple[float, str]] = {}
    for name in names:
        model, directory = work / "models" / name, work / f"{name}-{case}"
        if not model.exists():
            tiny_types.build_named(model, name)
        source = open_source(str(model))
        try:
            written[name] = (source, write(source, case, directory))
        except (SeCompressError, ValueError) as error:
            found[name] = (float("inf"), f"not written: {error}")
    load_all(case, [directory for _, directory in written.values()])
    for name, (source, directory) in written.items():
        file = Path(f"{directory}.error")
        error = file.read_text(encoding="utf-8") if file.exists() else ""
        found[name] = (difference(directory, expected_logits(source, directory)), error)
    return found


ALL = (*tiny_types.CONFIGS, *tiny_types.COMPOSITES)


def right_types(work: Path, case: str, names: Sequence[str] = ALL) -> list[str]:
    """Of these model types, those that the engine of a case loads right."""
    found = measure(work, case, names)
    return [name for name, (error, _) in found.items() if error < limit(name, case)]


def main() -> None:
    work, case, *names = sys.argv[1:]
    found = measure(Path(work), case, names or ALL)
    for name, (error, why) in found.items():
        said = "right" if error < limit(name, case) else f"WRONG {why[:150]}"
        print(f"{name:20} {case:20} {error:.2g} {said}")


if __name__ == "__main__":
    main()
