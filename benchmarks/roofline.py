"""How much of the machine's measured matrix rate the three heavy steps of GPTQ reach.

    python benchmarks/roofline.py

The rate is that of the best square product among a few sizes, in float32 and, where the hardware
has them, of bfloat16. The steps run on random activations in the shapes of one MoE layer: Hessians
(n tokens, C columns: n C^2 flops, as half of a symmetric product is enough), factorisation
(C^3 / 3), and the update, which is all else that the solver does (the count is that of
quant/gptq.py).

On a CUDA device it does the whole layer of Qwen3-30B-A3B (128 experts, 2048 x 768, 512 x 2048
tokens, 8 experts a token) and projects the time for its 48 layers. Without one it says so, and
takes so many of that layer's experts and tokens as a CPU does in a minute.

What else a run is made of (products of experts, rounding, packing, decoding FP8, reading) is
measured beside it, and all of it kept in units.json, from which project.py reckons what large
models would take.
"""

import cProfile
import pstats
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import units
from results import machine, write_section

from se_compress.quant.gptq import gptq
from se_compress.quant.grid import Grid
from se_compress.quant.hessian import accumulate_hessian, factorise

BITS, GROUP_SIZE, ROUNDS = 4, 64, 2


@dataclass(frozen=True)
class Stack:
    """Matrices of one kind: experts, rows and columns of each, tokens that one expert sees.

    run      experts that are really run; the others take as long
    dtype    of the activations
    """

    name: str
    experts: int
    rows: int
    columns: int
    tokens: int
    run: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Step:
    """What one step took for all experts of a stack: flops that it needs, and seconds."""

    name: str
    flops: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.flops / self.seconds


SMOLLM2 = (
    Stack("smollm2-moe, gate and up", 16, 128, 576, 4096, run=16),
    Stack("smollm2-moe, down", 16, 576, 64, 4096, run=16),
)
QWEN3 = (
    Stack("Qwen3-30B-A3B, gate and up", 128, 1536, 2048, 65536, run=128),
    Stack("Qwen3-30B-A3B, down", 128, 2048, 768, 65536, run=128),
)
QWEN3_LAYERS = 48
ON_CPU = {"run": 4, "tokens": 8192}


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = {dtype: gemm_rate(device, dtype) for dtype in _dtypes(device)}
    qwen3 = tuple(stack if device.type == "cuda" else replace(stack, **ON_CPU) for stack in QWEN3)
    lines = [
        *_rates(device, rates),
        "",
        "| | step | GFLOP | seconds | GFLOP/s | of fp32 | of bf16 |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    found: dict[Stack, list[Step]] = {}
    for stack in (replace(s, dtype=d) for s in (*SMOLLM2, *qwen3) for d in rates):
        found[stack] = measure(stack, device)
        lines += [_row(stack, step, rates) for step in found[stack]]
    if device.type == "cpu":
        lines += ["", _shares(qwen3)]
    large = {stack: steps for stack, steps in found.items() if stack.name in _names(qwen3)}
    seconds = sum(s.seconds for k, v in large.items() if k.dtype == torch.float32 for s in v)
    measured = _units(device, rates, large)
    units.save(measured)
    lines += ["", _projection(device, seconds, qwen3[0]), "", _told(measured)]
    text = "\n".join(lines)
    write_section("roofline", text)
    print(text)


def _names(stacks: Sequence[Stack]) -> set[str]:
    return {stack.name for stack in stacks}


def _units(
    device: torch.device, rates: dict[torch.dtype, float], large: Mapping[Stack, Sequence[Step]]
) -> units.Units:
    """What project.py reckons with: the steps of the large layer as shares of the rates, both
    kinds of its matrices together, and what else a run is made of."""
    shares: dict[str, float] = {}
    sums: dict[str, list[float]] = {}
    for stack, steps in large.items():
        for step in steps:
            name = f"hessian {_name(stack.dtype)}" if step.name == "Hessians" else step.name
            flops, seconds = sums.setdefault(name, [0.0, 0.0])
            sums[name] = [flops + step.flops, seconds + step.seconds]
    for name, (flops, seconds) in sums.items():
        dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
        shares[name] = flops / seconds / rates[dtype]
    for dtype, rate in rates.items():
        seconds = units.forward_seconds(device, dtype, seconds_of)
        shares[f"forward {_name(dtype)}"] = units.forward_flops() / seconds / rate
    return units.Units(
        machine=torch.cuda.get_device_name() if device.type == "cuda" else machine(),
        device=device.type,
        threads=torch.get_num_threads(),
        rates={_name(dtype): rate for dtype, rate in rates.items()},
        shares=shares,
        decoded=units.decoded_per_second(seconds_of),
        rounded=units.rounded_per_second(device, seconds_of),
        packed=units.packed_per_second(device, seconds_of),
        read=units.read_per_second(partial(seconds_of, wall=True)),
        copied=units.copied_per_second(device, seconds_of),
    )


def _told(found: units.Units) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found.shares.items())
    return (
        f"Kept in units.json: shares of the rate of their dtype: {shares}; rounding "
        f"{found.rounded / 1e6:,.0f} million weights a second, packing {found.packed / 1e6:,.0f}, "
        f"decoding FP8 {found.decoded / 1e6:,.0f}; reading {found.read / 1e6:,.0f} MB a second, "
        f"copying {found.copied / 1e9:,.1f} GB a second."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(device: torch.device) -> list[torch.dtype]:
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
        return [torch.float32, torch.bfloat16]
    return [torch.float32]


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of the fastest square product."""
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    best = 0.0
    for n in sizes:
        left, right = torch.randn(2, n, n, device=device).to(dtype)
        best = max(best, 2 * n**3 / seconds_of(lambda a=left, b=right: a @ b, device, times=5))
    return best


def seconds_of(
    work: Callable[[], object], device: torch.device, times: int = 1, wall: bool = False
) -> float:
    """The least of several runs, after one that does not count. Of one thread on a CPU it is the
    process's own time, unless `wall`: other work on the machine is not in it."""
    own = device.type == "cpu" and torch.get_num_threads() == 1 and not wall
    clock = time.process_time if own else time.perf_counter
    work()
    least = float("inf")
    for _ in range(times):
        _wait(device)
        started = clock()
        work()
        _wait(device)
        least = min(least, clock() - started)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(stack: Stack, device: torch.device) -> list[Step]:
    """Hessians, factorisation and update of a stack."""
    torch.manual_seed(0)
    inputs = torch.randn(stack.tokens, stack.columns, device=device).to(stack.dtype)
    hessian = torch.zeros(stack.run, stack.columns, stack.columns, device=device)

    def accumulate() -> None:
        for member in hessian:
            accumulate_hessian(member.zero_(), inputs)

    n, c, r = stack.tokens, stack.columns, stack.rows
    whole = stack.experts / stack.run
    steps = [Step("Hessians", stack.experts * n * c**2, whole * seconds_of(accumulate, device))]
    if stack.dtype != torch.float32:
        return steps
    hessian /= n
    weight = torch.randn(stack.run, r, c, device=device) / c**0.5
    grid = Grid(BITS, GROUP_SIZE, True)
    factor = seconds_of(lambda: factorise(hessian, 0.2, "static"), device)
    solve = seconds_of(lambda: gptq(weight, hessian, grid, rounds=ROUNDS), device)
    update = (5 + 4 * ROUNDS) * c**2 * r
    steps.append(Step("factorisation", stack.experts * c**3 / 3, whole * factor))
    return [*steps, Step("update", stack.experts * update, whole * (solve - factor))]


# What the update is made of: functions of quant/, and what they are called in the report.
INSIDE = {
    "_sweep": "sweeps",
    "_round": "of them columns that are settled one by one",
    "_refit": "refits of the scales",
    "_gram": "of them products of a group's columns with all others",
    "choose_scales": "the first choice of the scales",
    "lost": "the error that is left",
}


def shares_of_update(stack: Stack) -> dict[str, float]:
    """The share of the update's time that each function in INSIDE takes, with all it calls."""
    torch.manual_seed(0)
    inputs = torch.randn(stack.tokens, stack.columns)
    hessian = torch.zeros(stack.run, stack.columns, stack.columns)
    for member in hessian:
        accumulate_hessian(member, inputs)
    weight = torch.randn(stack.run, stack.rows, stack.columns) / stack.columns**0.5
    profile = cProfile.Profile()
    profile.runcall(gptq, weight, hessian / stack.tokens, Grid(BITS, GROUP_SIZE, True))
    spent: Counter[str] = Counter()
    for (_, _, name), (_, _, _, seconds, _) in pstats.Stats(profile).stats.items():
        spent[name] += seconds
    return {name: spent[name] / (spent["gptq"] - spent["factorise"]) for name in INSIDE}


# ------------------------------------------------------------------------------------------ report


def _rates(device: torch.device, rates: dict[torch.dtype, float]) -> list[str]:
    where = torch.cuda.get_device_name() if device.type == "cuda" else "no CUDA device; CPU part"
    measured = ", ".join(f"{_short(d)} {rate / 1e9:,.0f} GFLOP/s" for d, rate in rates.items())
    return [
        "## Roofline",
        "",
        f"`python benchmarks/roofline.py`: {machine()}, {torch.get_num_threads()} threads, {where}."
        f" Measured matrix products: {measured}. {BITS} bits, groups of {GROUP_SIZE}, {ROUNDS}"
        " rounds; all experts of a layer.",
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _row(stack: Stack, step: Step, rates: dict[torch.dtype, float]) -> str:
    shares = [
        f"{step.rate / rates[d]:.0%}" if d in rates else "" for d in (torch.float32, torch.bfloat16)
    ]
    size = f"{stack.experts} x {stack.rows} x {stack.columns}, {stack.tokens} tokens each"
    cells = [
        f"{stack.name} ({size})",
        f"{step.name}, {_short(stack.dtype)} inputs" if step.name == "Hessians" else step.name,
        f"{step.flops / 1e9:,.0f}",
        f"{step.seconds:.2f}",
        f"{step.rate / 1e9:,.0f}",
        *shares,
    ]
    return f"| {' | '.join(cells)} |"


def _shares(stacks: Sequence[Stack]) -> str:
    rows = []
    for stack in stacks:
        parts = ", ".join(
            f"{INSIDE[name]} {share:.0%}" for name, share in shares_of_update(stack).items()
        )
        rows.append(f"What the update takes its time for, {stack.name}: {parts}.")
    return "\n\n".join(rows)


def _projection(device: torch.device, seconds: float, stack: Stack) -> str:
    if device.type == "cuda":
        what = "all 128 experts run, every token of 512 x 2048"
    else:
        what = (
            f"{stack.run} of the 128 experts and {stack.tokens} of the 65,536 tokens of each were "
            "run, the rest is arithmetic: there is no CUDA device here"
        )
    total = seconds * QWEN3_LAYERS
    return (
        f"One layer of Qwen3-30B-A3B shape takes {seconds:.1f} s in these three steps ({what}), "
        f"{QWEN3_LAYERS} layers {total / 60:.1f} minutes."
    )


if __name__ == "__main__":
    main()
