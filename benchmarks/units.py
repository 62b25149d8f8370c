"""What one unit of work costs on a machine: measured by roofline.py, kept in units.json, and what
project.py reckons with.

A share is of the measured rate of matrix products in the dtype that is named; the others are per
second. Each is of one process, with the threads that it has.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from se_compress.artifacts import Stored
from se_compress.formats import FORMATS
from se_compress.model.checkpoint import open_tensors
from se_compress.model.decoding import decode
from se_compress.opening.headers import read_headers
from se_compress.quant.grid import Grid, QuantizedStack, dequantize, rtn

FILE = Path(__file__).with_name("units.json")
ROWS, COLUMNS, TOKENS = 768, 2048, 1024  # an expert of Qwen3-30B-A3B, and what it sees at once
READ_BYTES = 2**28


@dataclass(frozen=True)
class Units:
    """What was measured, on what.

    machine    date and processor, or the accelerator
    device     "cpu" or "cuda"
    threads    of the process
    rates      dtype -> flops a second of square products
    shares     step -> share of the rate: "hessian float32", "hessian bfloat16", "factorisation",
               "update" (of float32), "forward float32", "forward bfloat16"
    decoded    weights a second, FP8 blocks to bfloat16, on the CPU
    rounded    weights a second, scales chosen and codes to the nearest, and back
    packed     weights a second, codes to words
    read       bytes a second from the disk, into tensors
    copied     bytes a second that a copy within the device's memory reads and writes
    """

    machine: str
    device: str
    threads: int
    rates: Mapping[str, float]
    shares: Mapping[str, float]
    decoded: float
    rounded: float
    packed: float
    read: float
    copied: float


def save(units: Units, file: Path = FILE) -> None:
    file.write_text(json.dumps(asdict(units), indent=1) + "\n", encoding="utf-8")


def load(file: Path = FILE) -> Units:
    """Raises SystemExit if nothing was measured yet."""
    if not file.exists():
        raise SystemExit(f"{file} is not there: python benchmarks/roofline.py measures it")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return Units(**found)


def forward_seconds(device: torch.device, dtype: torch.dtype, seconds_of: Any) -> float:
    """Of the product of an expert's tokens with its gate and up."""
    inputs = torch.randn(TOKENS, COLUMNS, device=device).to(dtype)
    weight = torch.randn(2 * ROWS, COLUMNS, device=device).to(dtype)
    found: float = seconds_of(lambda: inputs @ weight.T, device, times=5)
    return found


def forward_flops() -> float:
    return 2.0 * TOKENS * COLUMNS * 2 * ROWS


def rounded_per_second(device: torch.device, seconds_of: Any) -> float:
    weight = torch.randn(4, ROWS, COLUMNS, device=device)
    power = torch.rand(4, COLUMNS, device=device)
    grid = Grid(3, 64, True)
    seconds = seconds_of(lambda: dequantize(rtn(weight, grid, power)), device)
    return weight.numel() / float(seconds)


def packed_per_second(device: torch.device, seconds_of: Any) -> float:
    grid = Grid(4, 64, True, torch.float16)
    made: QuantizedStack = rtn(torch.randn(1, ROWS, COLUMNS, device=device), grid)
    packer = FORMATS["gptq"].pack
    assert packer is not None
    parts = (made.codes[0], made.scales[0], made.zeros[0])
    return ROWS * COLUMNS / float(seconds_of(lambda: packer(*parts, grid), device, times=3))


def decoded_per_second(seconds_of: Any) -> float:
    """FP8 in blocks of 128 x 128, as DeepSeek-V3 is published."""
    codes = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    scale = torch.rand(ROWS // 128, COLUMNS // 128)
    stored = Stored("fp8", {}, 0, 0, (128, 128))
    parts: dict[str, Tensor] = {"weight": codes, "scale": scale}
    cpu = torch.device("cpu")
    seconds = seconds_of(lambda: decode(stored, parts, torch.bfloat16), cpu, times=3)
    return ROWS * COLUMNS / float(seconds)


def read_per_second(seconds_of: Any) -> float:
    """Bytes of a file that is not in the page cache, through the reader of checkpoints."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.safetensors"
        save_file({"weight": torch.zeros(READ_BYTES // 2, dtype=torch.bfloat16)}, file)
        os.sync()
        infos = read_headers(Path(scratch))

        def read() -> Tensor:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return open_tensors(infos)("weight").clone()

        return READ_BYTES / float(seconds_of(read, torch.device("cpu"), times=2))


def copied_per_second(device: torch.device, seconds_of: Any) -> float:
    there = torch.empty(READ_BYTES // 4, device=device)
    here = torch.empty_like(there)
    return 2 * READ_BYTES / float(seconds_of(lambda: here.copy_(there), device, times=3))
