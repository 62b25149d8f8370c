"""What a GPU computes beside what the CPU does, and beside slow twins: the part `twins` of gpu.py.

Small on purpose, seconds on any device. Rounding differs between devices, so that a code near a
tie may fall on the other side: codes are held to agree in 99 of 100, costs within a hundredth,
and whatever has no rounding of its own (packing, decoding) to be the same bits.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.append(str(TESTS))

import tiny  # noqa: E402
from packed import pack, unpack  # noqa: E402
from textbook import (  # noqa: E402
    MEMBERS,
    damped,
    order_of,
    stack,
    textbook_gptq,
    textbook_refit,
)

from se_compress.artifacts import RunOptions  # noqa: E402
from se_compress.compression.execute import compress  # noqa: E402
from se_compress.opening.source import open_source  # noqa: E402
from se_compress.planning.policy import make_plan  # noqa: E402
from se_compress.profiling.profiler import profile_experts  # noqa: E402
from se_compress.quant.gptq import gptq  # noqa: E402
from se_compress.quant.grid import WIDTHS, Grid, choose_scales, dequantize  # noqa: E402
from se_compress.quant.hessian import accumulate_hessian  # noqa: E402
from se_compress.validation.validator import validate  # noqa: E402

AGREE = 0.99
NEAR = 0.01
FORMS = ("gptq", "gptq_v2", "auto-round", "auto-round-gptq", "compressed-tensors")
FAMILIES = ("qwen3_moe", "deepseek_v3")
Row = dict[str, Any]


def twins(device: str, work: Path) -> Iterator[Row]:
    """A row for each comparison: what, how far, and whether that is near enough."""
    yield from _gptq_beside_its_textbook(device)
    yield from _hessians(device)
    yield from _packing(device)
    yield from _decoding(device)
    for family in FAMILIES:
        for refine in (None, {"steps": 10}):
            yield _flow(family, device, work, refine)


def row(what: str, found: str, right: bool) -> Row:
    return {"what": what, "found": found, "right": right}


def _gptq_beside_its_textbook(device: str) -> Iterator[Row]:
    weight, hessian = stack()
    for bits in (2, 4):
        for symmetric in (True, False):
            grid = Grid(bits, 16, symmetric)
            made = gptq(weight.to(device), hessian.to(device), grid, scales="minmax", rounds=0)
            codes = made.stack.codes.cpu()
            scales, zeros = choose_scales(weight, grid, None)
            slow = [
                textbook_gptq(
                    weight[e], hessian[e], scales[e], zeros[e], grid, order_of(hessian[e])
                )
                for e in range(MEMBERS)
            ]
            share = float((codes == torch.stack(slow)).float().mean())
            name = f"{bits} bits, {'symmetric' if symmetric else 'with zero points'}"
            yield row(f"GPTQ beside its textbook: {name}", f"{share:.2%} of codes", share >= AGREE)
    yield _rounds(device)


def _rounds(device: str) -> Row:
    """A round on the device, its refit beside least squares, its cost beside the CPU's."""
    weight, hessian = stack(seed=3)
    grid = Grid(3, 16, True)
    before = gptq(weight.to(device), hessian.to(device), grid, rounds=0).stack
    after = gptq(weight.to(device), hessian.to(device), grid, rounds=1).stack
    near = []
    for e in range(MEMBERS):
        wanted = textbook_refit(weight[e], hessian[e], before.codes[e].cpu(), before.zeros[e].cpu(),
                                grid)  # fmt: skip
        found, old = after.scales[e].cpu(), before.scales[e].cpu()
        near.append(torch.isclose(found.double(), wanted, rtol=2e-3) | (found == old))
    here = _cost(weight, dequantize(after).cpu(), hessian)
    there = _cost(weight, dequantize(gptq(weight, hessian, grid, rounds=1).stack), hessian)
    right = bool(torch.stack(near).all()) and abs(here / there - 1) < NEAR
    return row("a round beside least squares and the CPU", f"cost {here / there - 1:+.2%}", right)


def _cost(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    change = (rounded - weight).double()
    every = torch.stack([damped(member) for member in hessian])
    return float(((change @ every) * change).sum())


def _hessians(device: str) -> Iterator[Row]:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(1000, 320, generator=draw)
    exact = inputs.double().T @ inputs.double()
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        total = torch.zeros(320, 320, device=device)
        accumulate_hessian(total, inputs.to(device, dtype))
        error = float((total.cpu().double() - exact).norm() / exact.norm())
        yield row(f"Hessian of {dtype} beside float64", f"{error:.1e} off", error < most)


def _packing(device: str) -> Iterator[Row]:
    for form in FORMS:
        same = True
        for bits in WIDTHS:
            given: dict[str, Any] = {"bits": bits, "group_size": 32, "symmetric": False}
            there = pack(form, *_matrix(bits), **given)
            here = pack(form, *(part.to(device) for part in _matrix(bits)), **given)
            same &= all(torch.equal(part.cpu(), there[name]) for name, part in here.items())
        yield row(f"packing, {form}, {len(WIDTHS)} widths", "words", same)


def _decoding(device: str) -> Iterator[Row]:
    """Packed words to weights. Coded sources (FP8, MXFP4) are decoded where they are read, on the
    CPU, whatever the device."""
    for form in FORMS:
        same = True
        for bits in WIDTHS:
            parts = pack(form, *_matrix(bits), bits=bits, group_size=32, symmetric=False)
            here = unpack(form, {n: part.to(device) for n, part in parts.items()}, 96)
            there = unpack(form, parts, 96)
            same &= torch.equal(here.dequantized().cpu(), there.dequantized())
        yield row(f"decoding, {form}, {len(WIDTHS)} widths", "weights", same)


def _matrix(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of a matrix of 64 x 96."""
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (64, 96), dtype=torch.uint8, generator=draw)
    scales = torch.randn(64, 3, generator=draw).bfloat16().float()
    zeros = torch.randint(1, 2**bits, (64, 3), dtype=torch.uint8, generator=draw)
    return codes, scales, zeros


def _flow(family: str, device: str, work: Path, refine: Mapping[str, int] | None) -> Row:
    """Profile, plan, GPTQ and validation of a tiny model on both devices."""
    model = work / f"tiny-{family}"
    if not model.exists():
        tiny.build(model, family)
    name = f"{family}, the whole flow" + (", refined" if refine else "")
    here, there = (
        _run(model, work / f"made-{family}-{device_}-{bool(refine)}", device_, refine)
        for device_ in (device, "cpu")
    )
    errors = [abs(a - b) / max(b, 1e-6) for a, b in zip(here[0], there[0], strict=True)]
    kl = abs(here[1] - there[1]) / max(there[1], 1e-6)
    found = f"errors of layers at most {max(errors):.1%} apart, KL {kl:.1%}"
    return row(f"{name} beside the CPU", found, max(errors) < 0.1 and kl < 0.1)


def _run(
    model: Path, output: Path, device: str, refine: Mapping[str, int] | None
) -> tuple[list[float], float]:
    settings: dict[str, Any] = {"method": "gptq", "group_size": 32}
    if refine:
        settings["refine"] = dict(refine)
    recipe = tiny.recipe(
        model,
        output,
        target="gptqmodel",
        quantization=settings,
        policy={"bits": 3, "protect": "none"},
        calibration={"data": "unused.txt", "samples": 16, "sequence_length": 32},
        validation={"data": "unused.txt", "generation": {"tokens": 0}},
    )
    source, options = open_source(str(model)), RunOptions(device=device)
    tokens = tiny.random_tokens(16, 32)
    plan = make_plan(source, profile_experts(source, tokens, recipe, options), recipe)
    compress(source, plan, tokens, recipe, output, options)
    held_out = tiny.random_tokens(4, 32, seed=1)
    report = validate(source, plan, output, held_out, recipe, options, reload=False)
    kl = report.check("kl_divergence").value
    return [record.hidden_error for record in report.records], float(kl or 0.0)
