"""What auto-gptq 0.7.1 itself still loads, in an environment of its own: `.venv-autogptq`.

    python tools/autogptq_check.py [--work out/autogptq-check]

auto-gptq is archived: it quantises on CUDA only, does not import under transformers 5, knows no
mixed widths and of MoE families Mixtral alone. A Mixtral whose experts and attention are all in 4
bits, GPTQ v1, is given to it on the CPU, and its logits, if it loads, are compared with those of a
plain model that holds the dequantised weights (tests/dequantise.py, which shares no code with the
package). It looks for Mixtral's names on disk, our file for GPTQModel has those of the live model,
so the tensors are renamed. Not part of the tests.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-autogptq"
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
    check(work)


def make_environment() -> None:
    if (VENV / ".ready").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *PINS], check=True)
    (VENV / ".ready").touch()


def check(work: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    from dequantise import on_disk, plain_logits

    from se_compress.policy import make_plan
    from se_compress.source import open_source

    tokens = tiny.random_tokens(2, 24, seed=5)
    source = open_source(str(tiny.build(work / "source", "mixtral")))
    recipe = tiny.recipe(
        source.path,
        target="gptqmodel",
        policy={"bits": 4, "protect": "none", "other_bits": 4},
        quantization={"method": "rtn", "group_size": 32},
    )
    plan = make_plan(source, None, recipe)
    directory = tiny.write_result(source, plan, work / "mixtral")
    expected = plain_logits(directory, work / "plain", tokens)
    tensors = load_file(directory / "model.safetensors")
    renamed = {on_disk(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((directory / "quantize_config.json").read_text())
    settings["model_file_base_name"] = "model"
    (directory / "quantize_config.json").write_text(json.dumps(settings))
    answer = work / "found.safetensors"
    done = subprocess.run(
        [str(VENV / "bin" / "python"), "-c", LOAD, str(directory), json.dumps(tokens), str(answer)],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1]
        print(f"Mixtral, 4 bits throughout: auto-gptq 0.7.1 does not load it: {last}")
        return
    found = load_file(answer)
    error = (found["logits"] - expected).norm(dim=-1) / expected.norm(dim=-1)
    print(
        f"Mixtral, 4 bits throughout: {int(found['packed'])} packed linears, logits "
        f"{float(error.median()):.4f} away from the independent dequantisation (median, relative)"
    )


if __name__ == "__main__":
    main()
