"""Layers of Qwen3-30B-A3B's shape through the public API: the parts `layer`, `equality` and `nf4`
of gpu.py.

The checkpoint is synthetic: two layers of random weights in bfloat16, written as a published one
is. Text is random token ids, as many as a recipe asks for by default. The second layer is the one
that is timed, from the calls of `RunOptions.progress`: by then every kernel has been loaded.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from roofline import gemm_rate
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from se_compress.artifacts import ModelSource, RunOptions
from se_compress.compression.execute import compress
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.profiling.profiler import profile_experts
from se_compress.recipe import Recipe, parse_recipe
from se_compress.validation.validator import validate

ROUNDS = 2
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """What is run: a model's sizes, and how much text."""

    config: Mapping[str, int]
    calibration: tuple[int, int]  # sequences, tokens of each
    held_out: tuple[int, int]


_COMMON = {"num_hidden_layers": 2, "norm_topk_prob": True, "max_position_embeddings": 4096}
FULL = Shape(
    {
        **_COMMON,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    (256, 512),
    (32, 256),
)
SMALL = Shape(
    {
        **_COMMON,
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 256,
    },
    (8, 64),
    (2, 64),
)


class Clock:
    """When each stage ended each layer, and how much memory the device held meanwhile."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.ends: dict[tuple[str, int], float] = {}
        own = self.device.type == "cpu" and torch.get_num_threads() == 1
        self.now = time.process_time if own else time.perf_counter  # as roofline.seconds_of
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def progress(self, stage: str, done: int, total: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.setdefault((stage, done), self.now())

    def last_layer(self, stage: str) -> float | None:
        """Seconds of the second of two layers; None of a stage that did not run."""
        first, second = self.ends.get((stage, 1)), self.ends.get((stage, 2))
        return second - first if first is not None and second is not None else None

    def peak_bytes(self) -> int | None:
        """The most that the device held since the last call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most


def layer(device: str, work: Path, small: bool, given: Shape | None = None) -> Iterator[Row]:
    """Profile, GPTQ and validation: seconds of a layer, memory, share of the measured rate."""
    shape = given or (SMALL if small else FULL)
    rates = {str(d): gemm_rate(torch.device(device), d) for d in (torch.float32, torch.bfloat16)}
    yield {"step": "rates", "small": small, **rates}
    source = open_source(str(write_model(work / "model", shape, device)))
    recipe = recipe_for(source, shape, work)
    calibration, held_out = text(shape.calibration, shape), text(shape.held_out, shape, seed=1)
    clock = Clock(device)
    options = RunOptions(device=device, progress=clock.progress)
    started = time.perf_counter()
    profile = profile_experts(source, calibration, recipe, options)
    for stage in ("profile", "sensitivity", "confirm"):
        yield timed(stage, clock, 0.0)
    plan = make_plan(source, profile, recipe)
    output = fresh(work / "made")
    compress(source, plan, calibration, recipe, output, options)
    yield timed("compress", clock, flops_of(shape))
    report = validate(source, plan, output, held_out, recipe, options, reload=False)
    yield timed("validate", clock, 0.0)
    bad = [check.name for check in report.checks if check.passed is False]
    yield {
        "step": "whole",
        "seconds": time.perf_counter() - started,
        "tokens": shape.calibration[0] * shape.calibration[1],
        "failed": bad,
        "files": hashes(output),
    }


def equality(device: str, work: Path, small: bool) -> Iterator[Row]:
    """The same plan once more: every file has to be what it was."""
    shape = SMALL if small else FULL
    first = hashes(work / "made")
    if not first:
        raise RuntimeError("the part `layer` made nothing to compare with")
    source = open_source(str(work / "model"))
    recipe = recipe_for(source, shape, work)
    options, calibration = RunOptions(device=device), text(shape.calibration, shape)
    profile = profile_experts(source, calibration, recipe, options)
    again = fresh(work / "again")
    compress(source, make_plan(source, profile, recipe), calibration, recipe, again, options)
    second = hashes(again)
    differing = sorted(n for n in first | second if first.get(n) != second.get(n))
    yield {"step": "equality", "files": len(first), "differing": differing}


def nf4(device: str, work: Path, small: bool) -> Iterator[Row]:
    """The experts as bitsandbytes packs them on this device, and on the CPU of the first layer."""
    import bitsandbytes

    shape = SMALL if small else FULL
    source = open_source(str(write_model(work / "model", shape, device)))
    recipe = recipe_for(
        source,
        shape,
        work,
        target="transformers",
        quantization={"method": "bitsandbytes", "data_type": "nf4", "block_size": 64},
    )
    plan = make_plan(source, None, recipe)
    clock = Clock(device)
    output = fresh(work / "nf4")
    options = RunOptions(device=device, progress=clock.progress)
    some = text((8, shape.calibration[1]), shape)
    compress(source, plan, some, recipe, output, options)
    report = validate(source, plan, output, text(shape.held_out, shape, seed=1), recipe, options,
                      reload=False)  # fmt: skip
    yield timed("nf4", clock, 0.0, "compress") | {
        "bitsandbytes": bitsandbytes.__version__,
        "weight_cosine": report.check("weight_cosine").value,
    }


def timed(step: str, clock: Clock, flops: float, stage: str = "") -> Row:
    return {
        "step": step,
        "seconds": clock.last_layer(stage or step),
        "peak": clock.peak_bytes(),
        "flops": flops,
    }


def flops_of(shape: Shape) -> float:
    """What GPTQ needs for the experts of one layer: Hessians, factors, sweeps and refits, as
    quant/gptq.py counts them; each expert sees its share of the tokens."""
    config = shape.config
    experts, hidden = config["num_experts"], config["hidden_size"]
    inner = config["moe_intermediate_size"]
    count = shape.calibration[0] * shape.calibration[1] * config["num_experts_per_tok"]
    total = 0.0
    for rows, columns in ((2 * inner, hidden), (hidden, inner)):
        solve = (5 + 4 * ROUNDS) * columns**2 * rows + columns**3 / 3
        total += count * columns**2 + experts * solve
    return total


# ----------------------------------------------------------------------------------------- material


def recipe_for(source: ModelSource, shape: Shape, work: Path, **sections: Any) -> Recipe:
    samples = dict(zip(("samples", "sequence_length"), shape.calibration, strict=True))
    held_out = dict(zip(("samples", "sequence_length"), shape.held_out, strict=True))
    settings: dict[str, Any] = {
        "model": str(source.path),
        "output": str(work / "unused"),
        "target": "gptqmodel",
        "calibration": {"data": "unused.txt", **samples},
        "policy": {"bits": 4, "protect": "none"},
        "quantization": {"method": "gptq", "group_size": 64},
        "validation": {"data": "unused.txt", **held_out, "generation": {"tokens": 0}},
    }
    return parse_recipe({**settings, **sections}, "gpu.py")


def text(size: tuple[int, int], shape: Shape, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(shape.config["vocab_size"], size, generator=draw).tolist()
    return ids


def fresh(directory: Path) -> Path:
    """The directory, with nothing of an earlier run in it."""
    for file in sorted(directory.rglob("*"), reverse=True) if directory.exists() else ():
        file.unlink() if file.is_file() else file.rmdir()
    return directory


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the files that hold weights or settings; records have seconds in them."""
    found: dict[str, str] = {}
    for file in sorted(directory.rglob("*")):
        if file.suffix == ".safetensors" or file.name in ("config.json", "quantize_config.json"):
            with file.open("rb") as opened:
                found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def write_model(directory: Path, shape: Shape, device: str) -> Path:
    """A shard for each layer and one for the rest; equal calls on one device give equal files."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model("qwen3_moe", **shape.config)
    draw = torch.Generator(device).manual_seed(0)
    where: dict[str, str] = {}
    shards = [_ends(config, draw), *(_layer(config, n, draw) for n in range(2))]
    for number, shard in enumerate(shards):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    size = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    described = {
        **config.to_dict(),
        "architectures": ["Qwen3MoeForCausalLM"],
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return directory


def _drawn(draw: torch.Generator, *extents: int) -> Tensor:
    noise = torch.randn(extents, generator=draw, device=draw.device)
    return (noise / extents[-1] ** 0.5).bfloat16().cpu()


def _ends(config: Any, draw: torch.Generator) -> dict[str, Tensor]:
    vocabulary, hidden = config.vocab_size, config.hidden_size
    return {
        "model.embed_tokens.weight": _drawn(draw, vocabulary, hidden),
        "lm_head.weight": _drawn(draw, vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }


def _layer(config: Any, number: int, draw: torch.Generator) -> dict[str, Tensor]:
    hidden, inner, head = config.hidden_size, config.moe_intermediate_size, config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate": (config.num_experts, hidden),
    }
    for expert in range(config.num_experts):
        shapes[f"mlp.experts.{expert}.gate_proj"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.up_proj"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, inner)
    tensors = {name: _drawn(draw, *extents) for name, extents in shapes.items()}
    ones = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    ones |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
    tensors |= {name: torch.ones(size, dtype=torch.bfloat16) for name, size in ones.items()}
    return {f"model.layers.{number}.{name}.weight": tensor for name, tensor in tensors.items()}
