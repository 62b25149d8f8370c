"""What large models would take, reckoned from measured units: a projection, nothing was run.

    python benchmarks/project.py [--units benchmarks/units.json] [--check]

Qwen3-235B-A22B and DeepSeek-V3, profiled, quantised to 4 bits by GPTQ and judged with the defaults
(256 x 512 tokens of calibration, 32 x 256 held out), on 1 x 80 GB, 8 x 80 GB and 4 x 8 x 80 GB:
time, the memory of a device, traffic between ranks, what is read from disk, and what would be the
bottleneck. Units are those that roofline.py measured. Where it ran on a GPU they are taken as they
are. Where it ran on a CPU, its *shares* of the matrix rate are applied to the rates of an H100's
data sheet, and work that is bound by memory is scaled by bandwidth. What no unit says is assumed,
and printed.

What is counted, and how ranks share it: reckoning.py.

--check  reckons a small layer on this machine in the same way, and runs it: how far such arithmetic
         is from the truth
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import units
from reckoning import (
    BLOCK,
    DEEPSEEK,
    PLACES,
    QWEN3,
    SKEW,
    STAGES,
    Place,
    Sizes,
    Text,
    Total,
    project,
    stage_of_layer,
)
from results import write_section
from units import Units

HOUR, TERA = 3600.0, 1e12
CHECKED = {
    "num_hidden_layers": 2,
    "norm_topk_prob": True,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
}
CHECKED_TEXT = ((16, 256), (8, 256))


def places_for(found: Units) -> Sequence[Place]:
    """The places, with the measured rates where units are those of a GPU."""
    if found.device == "cpu":
        return PLACES
    return [replace(p, rates=found.rates, bandwidth=found.copied) for p in PLACES]


def table(found: Units) -> list[str]:
    lines = [
        "| model | on | compute_dtype | hours | "
        + " | ".join(f"{stage}, h" for stage in STAGES)
        + " | bottleneck | GB of a device | TB from disk | TB between ranks |",
        "|---" * (len(STAGES) + 8) + "|",
    ]
    for sizes in (QWEN3, DEEPSEEK):
        for place in places_for(found):
            for dtype in ("float32", "bfloat16"):
                if f"forward {dtype}" in found.shares:
                    lines.append(_row(project(sizes, place, found, dtype), dtype))
    return lines


def _row(total: Total, dtype: str) -> str:
    stages = (f"{total.stages[stage].seconds / HOUR:.2f}" for stage in STAGES)
    read = sum(cost.read for cost in total.stages.values())
    sent = sum(cost.traffic for cost in total.stages.values())
    cells = [
        total.sizes.name,
        total.place.name,
        dtype,
        f"{total.seconds / HOUR:.2f}",
        *stages,
        total.bottleneck,
        f"{total.memory / 1e9:.0f}" + (" (does not fit)" if total.memory > 80e9 else ""),
        f"{read / TERA:.1f}",
        f"{sent / TERA:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def section(found: Units, checked: Sequence[str] = ()) -> str:
    if found.device == "cpu":
        basis = (
            f"Units: {found.machine}, {found.threads} threads, no GPU. Its shares of the matrix"
            " rate are applied to an H100's data sheet (67 TFLOP/s float32, 989 bfloat16), and"
            f" rounding and packing are scaled by bandwidth (3.35 TB/s to its"
            f" {found.copied / 1e9:.1f} GB/s); a GPU may reach other shares."
        )
    else:
        basis = f"Units: {found.machine}."
    one = PLACES[0]
    lines = [
        "## Projection to large models",
        "",
        f"`python benchmarks/project.py`: a projection, nothing of it was run. {basis} Assumed:"
        f" {one.disk / 1e9:.0f} GB/s from the disk of a node, {one.bus / 1e9:.0f} from the host to"
        f" a device, {one.link / 1e9:.0f} between devices of a node and {one.net / 1e9:.0f} between"
        f" nodes, for each device; {one.cores} cores a device to decode FP8 with; tokens of"
        f" experts spread by a lognormal of {SKEW}; blocks of {BLOCK} experts. 256 x 512 tokens of"
        " calibration, 32 x 256 held out, 4 bits, no continuations, no reload.",
        "",
        *table(found),
    ]
    return "\n".join([*lines, *(["", *checked] if checked else [])])


# -------------------------------------------------------------------------------------------- check


def check(found: Units) -> list[str]:
    """A small layer on this machine, run, and reckoned from the units."""
    from gpu_layer import Shape, layer

    shape = Shape(CHECKED, *CHECKED_TEXT)
    device = found.device
    with tempfile.TemporaryDirectory() as work:
        rows = {row["step"]: row for row in layer(device, Path(work), False, shape)}
    place = Place(1, 1, 80e9, found.rates, found.copied, bus=float("inf"), disk=found.read,
                  cores=found.threads)  # fmt: skip
    lines = [
        "The same arithmetic for a layer that runs here (32 experts of 512 x 256, 4,096 tokens; of"
        " one thread on a CPU the process's own seconds, without waiting for the disk):",
        "",
        "| stage | reckoned, s | measured, s | measured / reckoned |",
        "|---|---|---|---|",
    ]
    for stage in STAGES:
        seconds = rows[stage]["seconds"]
        if seconds is not None:
            cost = stage_of_layer(
                stage, checked_sizes(), place, found, 1, "float32", checked_text()
            )
            said = cost.seconds
            lines.append(f"| {stage} | {said:.2f} | {seconds:.2f} | {seconds / said:.1f} |")
    return lines


def checked_sizes() -> Sizes:
    c = CHECKED
    heads = (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * c["head_dim"]
    return Sizes(
        name="checked",
        layers=2,
        dense_layers=0,
        hidden=c["hidden_size"],
        inner=c["moe_intermediate_size"],
        experts=c["num_experts"],
        chosen=c["num_experts_per_tok"],
        shared=0,
        attention=heads * c["hidden_size"],
        dense=0,
        vocabulary=c["vocab_size"],
        weight_bytes=2,
    )


def checked_text() -> Text:
    (samples, length), (held_out, other) = CHECKED_TEXT
    return Text(samples * length, held_out * other, max(1, 512 // length) * length, 8 * length)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--units", type=Path, default=units.FILE)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    found = units.load(given.units)
    text = section(found, check(found) if given.check else ())
    write_section("project", text)
    print(text)


if __name__ == "__main__":
    main()
