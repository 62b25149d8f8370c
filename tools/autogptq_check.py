"""What auto-gptq 0.7.1 itself still loads, in an environment of its own: `.venv-autogptq`.

    python tools/autogptq_check.py [--work out/autogptq-check]

auto-gptq is archived: it quantises on CUDA only, does not import under transformers 5, knows no
mixed widths and of MoE families Mixtral alone. Three models in GPTQ v1 are given to it on the CPU:
a Mixtral with experts and attention in 4 bits, one with the attention alone, and a dense Llama. Its
logits, if it loads them, are compared with those of a plain model that holds the dequantised
weights (tests/dequantise.py, which shares no code with the package). It looks for Mixtral's names
on disk, our file for GPTQModel has those of the live model, so the tensors are renamed. Not part of
the tests.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-autogptq"
GROUP_SIZE = 32
PINS = ("torch==2.13.0", "auto-gptq==0.7.1", "transformers==4.57.6", "peft==0.15.2",
        "datasets==3.6.0", "huggingface_hub==0.36.2")  # fmt: skip

LOAD = """
import json, sys, torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import save_file
directory, tokens, answer = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoGPTQForCausalLM.from_quantized(
    directory, device="cpu", use_safetensors=True, disable_exllama=True, disable_exllamav2=True,
    torch_dtype=torch.float32,
)
packed = sum(hasattr(module, "qweight") for module in model.modules())
with torch.no_grad():
    logits = model.model(torch.tensor(tokens)).logits.float()
save_file({"logits": logits.contiguous(), "packed": torch.tensor(packed)}, answer)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "autogptq-check")
    work: Path = parser.parse_args().work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_environment()
    sys.path.insert(0, str(ROOT / "tests"))
    for part in ("all", "attention", "dense"):
        (work / part).mkdir()
    uniform = mixtral(work / "all", {"bits": 4, "other_bits": 4})
    check("Mixtral, 4 bits throughout", uniform)
    attention = mixtral(work / "attention", {"bits": 16, "other_bits": 4})
    check("Mixtral, attention in 4 bits, experts in 16", attention)
    check("dense Llama, 4 bits", llama(work / "dense", uniform / "quantize_config.json"))


def make_environment() -> None:
    if (VENV / ".ready").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *PINS], check=True)
    (VENV / ".ready").touch()


def mixtral(work: Path, policy: dict[str, Any]) -> Path:
    """A result of ours."""
    import tiny

    from se_compress.opening.source import open_source
    from se_compress.planning.policy import make_plan

    source = open_source(str(tiny.build(work / "source", "mixtral")))
    recipe = tiny.recipe(
        source.path,
        target="gptqmodel",
        policy={"protect": "none", **policy},
        quantization={"method": "rtn", "group_size": GROUP_SIZE},
    )
    plan = make_plan(source, None, recipe)
    return tiny.write_result(source, plan, work / "mixtral")


def rename(directory: Path) -> None:
    """Give the tensors of a Mixtral the names of its family on disk."""
    from dequantise import on_disk

    tensors = load_file(directory / "model.safetensors")
    renamed = {on_disk(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


def llama(work: Path, settings: Path) -> Path:
    """A small dense Llama, all linears of its layers packed as ours are; `settings`: a
    quantize_config.json of ours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from se_compress.formats.gptq import GPTQ
    from se_compress.quant.grid import Grid, rtn

    config = LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.clone()
            continue
        stack = rtn(weight[None], Grid(4, GROUP_SIZE, True))
        assert GPTQ.pack is not None
        packed = GPTQ.pack(stack.codes[0], stack.scales[0], stack.zeros[0], stack.grid)
        for part, tensor in packed.items():
            tensors[f"{name.removesuffix('.weight')}.{part}"] = tensor
    directory = work / "llama"
    config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    quantization = json.loads(settings.read_text())
    written = json.loads((directory / "config.json").read_text())
    written["quantization_config"] = quantization | {"dynamic": {}}
    (directory / "config.json").write_text(json.dumps(written))
    shutil.copyfile(settings, directory / "quantize_config.json")
    return directory


def check(name: str, directory: Path) -> None:
    """One line: how far auto-gptq's logits are from those of the dequantised weights."""
    import tiny
    from dequantise import plain_logits

    tokens = tiny.random_tokens(2, 24, seed=5)
    expected = plain_logits(directory, directory.with_name("plain"), tokens)
    if json.loads((directory / "config.json").read_text())["model_type"] == "mixtral":
        rename(directory)
    settings = json.loads((directory / "quantize_config.json").read_text())
    settings["model_file_base_name"] = "model"
    (directory / "quantize_config.json").write_text(json.dumps(settings))
    answer = directory.with_name("found.safetensors")
    done = subprocess.run(
        [str(VENV / "bin" / "python"), "-c", LOAD, str(directory), json.dumps(tokens), str(answer)],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1]
        print(f"{name}: auto-gptq 0.7.1 does not load it: {last}")
        return
    found = load_file(answer)
    error = (found["logits"] - expected).norm(dim=-1) / expected.norm(dim=-1)
    stored = sum("qweight" in key for key in load_file(directory / "model.safetensors"))
    print(
        f"{name}: {int(found['packed'])} packed linears, {stored} in the file; logits "
        f"{float(error.median()):.6f} away from the independent dequantisation (median, relative)"
    )


if __name__ == "__main__":
    main()
