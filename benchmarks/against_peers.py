"""Ours against GPTQModel and llm-compressor: the same work, time, memory and what it is worth.

    python benchmarks/against_peers.py [--models smollm2-moe,random-qwen3] [--bits 4,3,2]

Every tool quantises the routed experts of the same checkpoint, and nothing else, from the same
32 x 256 calibration tokens, symmetric, in groups of 64, each at its own defaults, in a process of
its own; the tools take turns, --rounds times at the first of --bits and each of --threads: as many
as a tool takes of itself ("all"), or OMP_NUM_THREADS ("1"). Leave the machine alone meanwhile.
Other widths are made once, for their quality; peers' results that lie there are not made again. The
clock is that of peers/worker.py, memory the process's largest resident set. Quality is measured by
peers/evaluate.py, which shares no code with any of them, on held-out text.

GPTQModel and llm-compressor get a virtual environment of their own, .venv-peers, made on the first
run from peers/constraints.txt; auto-round runs in this one, an hour or more at 200 steps a block. A
small model goes through each tool before the clock runs: GPTQModel compiles its packing kernel
then. Measurements are kept under --work, and the section of RESULTS.md is rewritten from all of
them, so a run can be made in parts (--steps, --tools, --models, --bits, --threads).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from results import machine, write_section

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ROOT / "benchmarks" / "peers"
PEERS = ROOT / ".venv-peers"
PINS = ("gptqmodel", "llmcompressor", "transformers", "compressed-tensors", "optimum")
TEXT = ROOT / "tools" / "reference" / "text"
CORPORA = ("austen", "factbook")
SKIP = [r".*self_attn.*", r".*shared_expert.*"]
GROUP_SIZE, SEQUENCE = 64, 256
THREADS = ("all", "1")
REFINE_STEPS = 100
DISTILL_STEPS = 13


@dataclass(frozen=True)
class Tool:
    """A competitor and its worker.

    routed     llm-compressor only: see peers/worker.py
    refine     ours only: steps of refining
    distill    ours only: steps of distilling
    tuned      auto-round only: steps for each block
    symmetric  whether groups have no zero point of their own
    """

    name: str
    worker: str
    routed: bool = False
    symmetric: bool = True
    refine: int = 0
    distill: int = 0
    tuned: int = 0


OURS = Tool("se-compress", "se_compress_worker.py")
# Workers that run in the environment of this script; auto-round is one of its extras.
BESIDE = (OURS.worker, "autoround_worker.py")
TOOLS = (
    OURS,
    Tool("GPTQModel", "gptqmodel_worker.py"),
    Tool("llm-compressor", "llmcompressor_worker.py"),
    Tool("llm-compressor, routed tokens only", "llmcompressor_worker.py", routed=True),
    Tool("auto-round, 200 steps", "autoround_worker.py", tuned=200),
    Tool("auto-round, rounding alone", "autoround_worker.py"),
    Tool("se-compress, asymmetric", "se_compress_worker.py", symmetric=False),
    Tool("se-compress, refined", "se_compress_worker.py", refine=REFINE_STEPS),
    Tool("se-compress, scales distilled", "se_compress_worker.py", distill=DISTILL_STEPS),
    Tool(
        "se-compress, refined and distilled",
        "se_compress_worker.py",
        refine=REFINE_STEPS,
        distill=DISTILL_STEPS,
    ),
)


def main() -> None:
    options = _options()
    work = Path(options.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen = options.tools.split(";")
    if any(tool.worker not in BESIDE for tool in TOOLS if tool.name in chosen):
        _make_environment()
    _write_tokens(work, options.held_out, options.other_text)
    tools = [tool for tool in TOOLS if tool.name in options.tools.split(";")]
    steps = options.steps.split(",")
    if "measure" in steps:
        _measure(work, tools, options)
    if "evaluate" in steps:
        for name in options.models.split(","):
            _evaluate(name, work)
    if "report" not in steps:
        return
    text = _report(work)
    write_section("against_peers", text)
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", default=",".join(THREADS))
    parser.add_argument("--models", default="smollm2-moe,random-qwen3")
    parser.add_argument("--bits", default="4,3,2", help="the first of them is timed")
    parser.add_argument("--tools", default=";".join(tool.name for tool in TOOLS), help="by ;")
    parser.add_argument("--work", default=str(ROOT / "out" / "against-peers"))
    parser.add_argument("--under", default="", help="a command that runs each timed process")
    parser.add_argument("--held-out", type=int, default=32, help="sequences of 256 to evaluate on")
    parser.add_argument(
        "--other-text", default="", help="a .txt of another kind, evaluated as well"
    )
    parser.add_argument("--steps", default="measure,evaluate,report")
    return parser.parse_args()


# ------------------------------------------------------------------------------------ preparations


def _make_environment() -> None:
    """.venv-peers; torch first and by its exact version: a range would bring gigabytes of CUDA."""
    ready = PEERS / ".ready"
    constraints = WORKERS / "constraints.txt"
    if ready.exists() and ready.read_text() == constraints.read_text():
        return
    subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    for packages in (("torch==2.13.0",), PINS):
        pip = [str(PEERS / "bin" / "pip"), "install", "--quiet", "--constraint", str(constraints)]
        subprocess.run([*pip, *packages], check=True)
    ready.write_text(constraints.read_text())


def _write_tokens(work: Path, held_out: int, other_text: str = "") -> None:
    """Calibration and held-out sequences, ids of the reference model's tokenizer; and as many of a
    text of another kind than was calibrated on, if there is one."""
    from se_compress.recipe import Calibration
    from se_compress.text.calibrate import draw_sequences

    wanted = {"calibration": 32, "held-out": held_out} | ({"other": held_out} if other_text else {})
    for part, count in wanted.items():
        files = tuple(str(TEXT / f"{name}-{part}.txt") for name in CORPORA)
        files = (other_text,) if part == "other" else files
        text = Calibration.model_validate(
            {"data": files, "samples": count, "sequence_length": SEQUENCE}
        )
        rows = draw_sequences(text, ROOT / "models" / "smollm2-moe", part)
        (work / f"{part}.json").write_text(json.dumps(rows))


def _model(name: str, work: Path) -> Path:
    if name.startswith("smollm2"):
        return ROOT / "models" / name
    layers, experts = {"random-qwen3": (4, 64), "warm-up": (1, 8)}[name]
    path = work / name
    if not (path / "config.json").exists():
        _build_random(path, layers, experts)
    return path


def _build_random(path: Path, layers: int, experts: int) -> None:
    """A seeded Qwen3-MoE of hidden 512, experts of 256, top 8, with smollm2-moe's tokenizer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    source = ROOT / "models" / "smollm2-moe"
    config = Qwen3MoeConfig(
        vocab_size=49152,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, path / file)


# ------------------------------------------------------------------------------------ measurements


def _measure(work: Path, tools: Sequence[Tool], options: argparse.Namespace) -> None:
    timed = [tool for tool in tools if tool.symmetric]
    for tool in timed if options.rounds else ():
        _run(tool, "warm-up", 4, work, options.under)
    threads = options.threads.split(",")
    widths = [int(bits) for bits in options.bits.split(",")]
    for name in options.models.split(","):
        for turn, count in product(range(options.rounds), threads):
            for tool in timed if turn % 2 == 0 else timed[::-1]:
                report = _run(tool, name, widths[0], work, options.under, count)
                _keep(work, name, widths[0], tool, {**report, "threads": count})
        for bits in widths:
            for tool in tools:
                made = (_output(work, name, bits, tool) / "config.json").exists()
                if made and (tool in timed and bits == widths[0] and options.rounds):
                    continue
                if not made or tool.worker == OURS.worker:
                    _run(tool, name, bits, work, options.under)


def _run(
    tool: Tool, name: str, bits: int, work: Path, under: str, threads: str = "all"
) -> dict[str, Any]:
    """One timed process; what it wrote stays in its directory until the next round."""
    output = _output(work, name, bits, tool)
    shutil.rmtree(output, ignore_errors=True)
    tokens = json.loads((work / "calibration.json").read_text())
    job = {
        "model": str(_model(name, work)),
        "output": str(output),
        "tokens": tokens if name != "warm-up" else tokens[:10],
        "bits": bits,
        "group_size": GROUP_SIZE,
        "symmetric": tool.symmetric,
        "skip": SKIP,
        "routed": tool.routed,
        "refine": tool.refine,
        "distill": tool.distill,
        "tuned": tool.tuned,
    }
    files = [output.with_name(f"{output.name}.{part}.json") for part in ("job", "report")]
    files[0].write_text(json.dumps(job))
    files[1].unlink(missing_ok=True)
    python = sys.executable if tool.worker in BESIDE else str(PEERS / "bin" / "python")
    command = [*under.split(), python, str(WORKERS / tool.worker), *map(str, files)]
    # GPTQModel 7.6 does not start on two cores without its variable.
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads != "all":
        environment["OMP_NUM_THREADS"] = threads
    with output.with_name(f"{output.name}.log").open("a") as log:
        done = subprocess.run(command, env=environment, cwd=work, stdout=log, stderr=log)
    if done.returncode or not files[1].exists():
        print(f"{tool.name}, {name}, {bits} bits: failed, see {output}.log", file=sys.stderr)
        return {"failed": True}
    report: dict[str, Any] = json.loads(files[1].read_text())
    print(tool.name, name, bits, threads, report, file=sys.stderr)
    return report


def _output(work: Path, name: str, bits: int, tool: Tool) -> Path:
    return work / f"{name}-{bits}-{tool.name.replace(', ', '-').replace(' ', '-')}"


def _keep(work: Path, name: str, bits: int, tool: Tool, report: dict[str, Any]) -> None:
    found = _found(work)
    entry = found.setdefault(f"{name}/{bits}/{tool.name}", {"runs": []})
    entry["runs"].append(report)
    (work / "found.json").write_text(json.dumps(found, indent=1))


def _found(work: Path) -> dict[str, Any]:
    file = work / "found.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _evaluate(name: str, work: Path) -> None:
    """Quality of every result of this model that lies there."""
    made = {
        str(path): (bits, tool)
        for bits in (2, 3, 4, 8)
        for tool in TOOLS
        if (path := _output(work, name, bits, tool)).joinpath("config.json").exists()
    }
    found = _found(work)
    for part, key in (("held-out", "quality"), ("other", "other")):
        tokens, report = work / f"{part}.json", work / "quality.json"
        if tokens.exists():
            script = [sys.executable, str(WORKERS / "evaluate.py"), str(_model(name, work))]
            subprocess.run([*script, str(tokens), str(report), *made], check=True)
            for path, quality in json.loads(report.read_text()).items():
                bits, tool = made[path]
                found.setdefault(f"{name}/{bits}/{tool.name}", {"runs": []})[key] = quality
    (work / "found.json").write_text(json.dumps(found, indent=1))


# ------------------------------------------------------------------------------------------ report


def _report(work: Path) -> str:
    found = _found(work)
    names = list(dict.fromkeys(key.partition("/")[0] for key in found))
    parts = ["## Against GPTQModel and llm-compressor", _explanation(found)]
    for name in names:
        parts += [f"### {name}", _table(found, name)]
    return "\n\n".join(parts)


def _explanation(found: dict[str, Any]) -> str:
    versions = {
        f"{key.split('/')[2].partition(',')[0]} {run['version']}"
        for key, entry in found.items()
        for run in entry["runs"]
        if run.get("version")
    }
    quality = next((e["quality"] for e in found.values() if "quality" in e), {"positions": 0})
    return (
        f"`python benchmarks/against_peers.py`: {', '.join(sorted(versions))}; {machine()}. All"
        f" routed experts, symmetric, groups of {GROUP_SIZE}, 32 x {SEQUENCE} calibration tokens."
        " Seconds are the median of the rounds, every round in brackets, from the imported"
        f" libraries to the finished checkpoint, on all {os.cpu_count()} cores as each tool uses"
        " them of itself, and with OMP_NUM_THREADS=1; other work on the machine lengthens them. KL"
        f" divergence to the source (nats) and perplexity over {quality['positions']} positions of"
        " held-out text; less is better everywhere."
    )


def _table(found: dict[str, Any], name: str) -> str:
    lines = [
        f"| bits | | seconds, {os.cpu_count()} cores | over ours | seconds, 1 thread | over ours"
        " | peak memory | KL | ours less by | perplexity | KL, other text |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bits in (4, 3, 2):
        ours = found.get(f"{name}/{bits}/{OURS.name}")
        for tool in TOOLS:
            entry = found.get(f"{name}/{bits}/{tool.name}")
            if entry and ours:
                lines.append(_row(bits, tool, entry, ours))
    return "\n".join(lines)


def _row(bits: int, tool: Tool, entry: dict[str, Any], ours: dict[str, Any]) -> str:
    cells = [str(bits), tool.name]
    runs, own_runs = _finished(entry), _finished(ours)
    for threads in THREADS:
        seconds, own = (
            [run["seconds"] for run in some if run["threads"] == threads]
            for some in (runs, own_runs)
        )
        each = ", ".join(f"{s:.1f}" for s in seconds)
        cells.append(f"{median(seconds):.1f} ({each})" if seconds else "")
        compared = seconds and own and tool is not OURS
        cells.append(f"{median(seconds) / median(own):.1f}x" if compared else "")
    cells.append(f"{max(run['peak_bytes'] for run in runs) / 1e9:.2f} GB" if runs else "")
    quality, best = entry.get("quality"), ours.get("quality")
    if quality:
        cells.append(f"{quality['kl_divergence']:.4f}")
        rival = tool.worker != OURS.worker
        less = 1 - best["kl_divergence"] / quality["kl_divergence"] if best else 0.0
        cells.append(f"{less:.0%}" if rival and best else "")
        cells.append(f"{quality['perplexity']:.2f} (source {quality['perplexity_source']:.2f})")
    else:
        cells += ["failed" if len(runs) < len(entry["runs"]) else "not measured", "", ""]
    other = entry.get("other")
    cells.append(f"{other['kl_divergence']:.4f}" if other else "")
    return f"| {' | '.join(cells)} |"


def _finished(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in entry["runs"] if not run.get("failed")]


if __name__ == "__main__":
    main()
