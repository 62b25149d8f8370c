"""What a GPU has to show, in at most eight minutes: one script, that says of each part what it
found or why it did not run.

    python benchmarks/gpu.py [--only PART ...] [--work DIR] [--results FILE]
    python benchmarks/gpu.py --device cpu --small      the same code where there is no GPU

twins     GPTQ, packing, unpacking, refining and the whole flow of tiny models on the device,
          beside the CPU and beside slow twins (gpu_twins.py)
layer     a layer of Qwen3-30B-A3B's shape (128 experts, 2048 x 768) through profile, GPTQ and
          validation: seconds of each step, peak memory of the device, share of the measured rate
          of matrix products; the goal is 48 such layers in 300 s (gpu_layer.py)
equality  the same plan a second time: SHA-256 of every file
nf4       the same layer by bitsandbytes, if it is installed
vllm      files of 2, 3, 4 and 8 bits, by layer too, with negative scales, served by vLLM
          (tools/vllm_check.py, part widths), if it is installed

It takes torch, transformers and what se-compress imports beside them in these stages: pydantic,
pyyaml, safetensors, scipy, wrapt (for a machine without a network: `pip download`, carry the
wheels, `pip install --target DIR`, PYTHONPATH). Each part is a process of its own with a budget of
seconds: one that fails or takes too long is told as "not run" or "stopped", and the others go on.
The section of RESULTS.md is written after every part.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results import RESULTS, machine, write_section

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # a checkout alone is enough, nothing has to be installed
TOTAL = 480.0
# Seconds that each part may take; what one does not need is no other's.
BUDGETS: Mapping[str, float] = {
    "twins": 70.0,
    "layer": 150.0,
    "equality": 70.0,
    "nf4": 60.0,
    "vllm": 120.0,
}
GIGABYTE = 1e9
LAYERS, GOAL = 48, 300  # of Qwen3-30B-A3B, and seconds for all of them on one H100 or H200
Row = dict[str, Any]


class NotRun(Exception):
    """A part has nothing to run on here; its text is the reason."""


@dataclass(frozen=True)
class Found:
    """What a part said: its rows, and why there are no more of them ("" if it came to its end)."""

    rows: Sequence[Row]
    why: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """What is asked for, and what has been found so far, by part."""

    device: str
    small: bool
    work: Path
    results: Path
    name: str = ""
    found: dict[str, Found] = field(default_factory=dict)


# --------------------------------------------------------------------------- a part, in its process


def _twins(device: str, work: Path, small: bool) -> Iterator[Row]:
    from gpu_twins import twins

    return twins(device, work)


def _layer(device: str, work: Path, small: bool) -> Iterator[Row]:
    from gpu_layer import layer

    return layer(device, work, small)


def _equality(device: str, work: Path, small: bool) -> Iterator[Row]:
    from gpu_layer import equality

    return equality(device, work, small)


def _nf4(device: str, work: Path, small: bool) -> Iterator[Row]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not installed")
    from gpu_layer import nf4

    return nf4(device, work, small)


def _vllm(device: str, work: Path, small: bool) -> Iterator[Row]:
    if device == "cpu":
        raise NotRun("the CPU has no kernels for these widths")
    if importlib.util.find_spec("vllm") is None:
        raise NotRun("vLLM is not installed")
    sys.path.append(str(ROOT / "tools"))
    from vllm_check import widths

    return ({"line": line} for line in widths(work / "vllm", Path(sys.executable), "qwen3_moe"))


PARTS: Mapping[str, Callable[[str, Path, bool], Iterator[Row]]] = {
    "twins": _twins,
    "layer": _layer,
    "equality": _equality,
    "nf4": _nf4,
    "vllm": _vllm,
}


def work_on(part: str, device: str, work: Path, small: bool, out: Path) -> int:
    """Run one part and write its rows to `out`, a line each as soon as it is known."""
    import torch

    with out.open("a", encoding="utf-8") as file:
        try:
            if device.startswith("cuda") and not torch.cuda.is_available():
                raise NotRun("torch sees no CUDA device")
            for row in PARTS[part](device, work, small):
                file.write(json.dumps(row) + "\n")
                file.flush()
        except NotRun as reason:
            file.write(json.dumps({"not run": str(reason)}) + "\n")
    return 0


# -------------------------------------------------------------------------------------- all of them


def run_part(run: Run, part: str, seconds: float) -> Found:
    """Start a part in its own process, for at most so many seconds."""
    rows_file = run.work / f"{part}.jsonl"
    rows_file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", part, "--rows", str(rows_file)]
    command += ["--device", run.device, "--work", str(run.work), *(["--small"] * run.small)]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        try:
            code = subprocess.run(command, stdout=said, stderr=said, timeout=seconds).returncode
            why = "" if code == 0 else f"failed: {_last_line(said)}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds:.0f} s, its budget"
    rows = _rows(rows_file)
    if rows and "not run" in rows[-1]:
        why = f"not run: {rows.pop()['not run']}"
    return Found(rows, why, time.perf_counter() - started)


def _last_line(said: Any) -> str:
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "without a word"


def _rows(file: Path) -> list[Row]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------- report


def section(run: Run) -> str:
    """The section of RESULTS.md: what each part found, or why it did not run."""
    lines = [
        "## On a GPU",
        "",
        f"`python benchmarks/gpu.py`{' (small)' if run.small else ''}: {machine()}, "
        f"{run.name or 'no CUDA device'}. The goal is {LAYERS} layers of Qwen3-30B-A3B in {GOAL} s"
        " on one H100 or H200.",
    ]
    for part in PARTS:
        lines += ["", f"### {part}", "", *_told(part, run)]
    return "\n".join(lines)


def _told(part: str, run: Run) -> list[str]:
    found = run.found.get(part)
    if found is None:
        return ["*not run*: it was not asked for"]
    report = {"twins": _of_twins, "layer": _of_layer, "equality": _of_equality, "nf4": _of_nf4,
              "vllm": _of_vllm}  # fmt: skip
    lines = report[part](found.rows) if found.rows else []
    if found.why:
        lines += [*([""] if lines else []), f"*{found.why}*"]
    elif found.rows:
        lines += ["", f"{found.seconds:.0f} s in all."]
    return lines or ["*not run*: it said nothing"]


def _of_twins(rows: Sequence[Row]) -> list[str]:
    wrong = [row["what"] for row in rows if not row["right"]]
    verdict = f"WRONG: {'; '.join(wrong)}." if wrong else f"All {len(rows)} agree."
    table = [f"| {row['what']} | {row['found']} | {'yes' if row['right'] else '**no**'} |"
             for row in rows]  # fmt: skip
    return [verdict, "", "| | found | near enough |", "|---|---|---|", *table]


def _of_layer(rows: Sequence[Row]) -> list[str]:
    rates = next((row for row in rows if row["step"] == "rates"), {})
    whole = next((row for row in rows if row["step"] == "whole"), None)
    steps = [row for row in rows if row["step"] not in ("rates", "whole")]
    measured = [row for row in steps if row["seconds"] is not None]
    products = ", ".join(
        f"{name.removeprefix('torch.')} {rate / 1e12:,.1f} TFLOP/s"
        for name, rate in rates.items()
        if name.startswith("torch.")
    )
    lines = [
        f"Measured matrix products: {products}. Seconds of the second layer.",
        "",
        "| step | seconds | peak device memory | TFLOP/s | of the float32 rate |",
        "|---|---|---|---|---|",
        *(_step(row, rates) for row in steps),
    ]
    seconds = {row["step"]: row["seconds"] for row in measured}
    if whole is not None:
        lines += ["", _verdict(seconds, whole, rates["small"])]
    return lines


def _step(row: Row, rates: Row) -> str:
    if row["seconds"] is None:
        return f"| {row['step']} | did not run: nothing was found to confirm | | | |"
    peak = f"{row['peak'] / GIGABYTE:.2f} GB" if row["peak"] is not None else "-"
    rate, share = "", ""
    if row["flops"]:
        rate = f"{row['flops'] / row['seconds'] / 1e12:,.3f}"
        share = f"{row['flops'] / row['seconds'] / rates['torch.float32']:.0%}"
    return f"| {row['step']} | {row['seconds']:.2f} | {peak} | {rate} | {share} |"


def _verdict(seconds: Mapping[str, float], whole: Row, small: bool) -> str:
    if small:
        return "Sizes as small as these say nothing of the goal."
    # `sensitivity` forks its stream behind every layer: the second of two runs three streams, the
    # n-th of all n + 1.
    runs = sum(n + 1 for n in range(1, LAYERS + 1))
    others = sum(value for step, value in seconds.items() if step != "sensitivity")
    all_layers = LAYERS * others + runs / 3 * seconds["sensitivity"]
    reached = "reached" if all_layers <= GOAL else "not reached"
    failed = f" Gates that failed: {', '.join(whole['failed'])}." if whole["failed"] else ""
    return (
        f"{LAYERS} such layers take {all_layers:,.0f} s on {whole['tokens']:,} calibration tokens,"
        f" {runs / 3 * seconds['sensitivity']:,.0f} of them for sensitivity, which runs a stream"
        f" more with each layer. The goal is {reached}, by this arithmetic.{failed}"
    )


def _of_equality(rows: Sequence[Row]) -> list[str]:
    row = rows[0]
    if row["differing"]:
        return [f"WRONG: {', '.join(row['differing'])} differ between two runs."]
    return [f"Two runs, {row['files']} files of weights and settings: the same SHA-256."]


def _of_nf4(rows: Sequence[Row]) -> list[str]:
    row = rows[0]
    peak = f", {row['peak'] / GIGABYTE:.2f} GB of device memory" if row["peak"] else ""
    return [
        f"bitsandbytes {row['bitsandbytes']}: {row['seconds']:.2f} s a layer{peak}; direction of"
        f" the worst matrix {row['weight_cosine']:.4f}."
    ]


def _of_vllm(rows: Sequence[Row]) -> list[str]:
    return [f"* {row['line']}" for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in a minute")
    parser.add_argument("--only", nargs="*", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "benchmark-gpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    work: Path = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if given.part:
        return work_on(given.part, given.device, work, given.small, given.rows)
    return _all(given, work)


def _all(given: argparse.Namespace, work: Path) -> int:
    """Every part in turn. 1 if one of them found something wrong."""
    import torch

    cuda = torch.cuda.is_available() and given.device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else ""
    run = Run(given.device, given.small, work, given.results, name)
    ends = time.perf_counter() + TOTAL
    for part in given.only:
        left = ends - time.perf_counter()
        run.found[part] = (
            run_part(run, part, min(left, BUDGETS[part]))
            if left > 5
            else Found([], f"not run: {TOTAL:.0f} s were over", 0.0)
        )
        print("\n".join(_told(part, run)), flush=True)
        write_section("gpu", section(run), run.results)
    return int("WRONG" in section(run))


if __name__ == "__main__":
    sys.exit(main())
