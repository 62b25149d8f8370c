"""How far quantised checkpoints are from their source, all read by unpackers of this file's own.

    python evaluate.py SOURCE TOKENS.json REPORT.json RESULT_DIRECTORY...

Nothing of se-compress or of the peers is used: codes are taken off the bit stream, multiplied by
their scales, put into a plain float32 transformers model, and what is not an expert's matrix must
be the source's, bit for bit. Positions from 8 on are counted, as long as a next token follows.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

FIRST_POSITION = 8
PIECE = 512  # positions whose logits are held at once
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj")


def unpack(words: Tensor, count: int, bits: int) -> Tensor:
    """[R, W] int32 to [R, count] float32: unsigned numbers of `bits` bits, one after another from
    each row's lowest bit on, across the borders of words."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    digits = stream[:, : count * bits].reshape(len(stream), count, bits)
    return torch.from_numpy(digits @ (2 ** np.arange(bits))).float()


def from_gptq(parts: dict[str, Tensor], bits: int, settings: dict[str, Any]) -> Tensor:
    """[out, in] from qweight, qzeros, scales and g_idx. Version 1 stores zero points less one."""
    columns, (groups, rows) = len(parts["g_idx"]), parts["scales"].shape
    codes = unpack(parts["qweight"].T, columns, bits)
    zeros = unpack(parts["qzeros"], rows, bits)
    if settings.get("checkpoint_format", settings.get("format")) != "gptq_v2":
        zeros = (zeros + 1) % 2**bits
    group = parts["g_idx"].long()
    assert 0 <= int(group.min())
    assert int(group.max()) < groups
    return (codes - zeros.T[:, group]) * parts["scales"].float().T[:, group]


def from_compressed_tensors(parts: dict[str, Tensor], bits: int) -> Tensor:
    """[out, in] from weight_packed, weight_scale and weight_shape, symmetric."""
    rows, columns = parts["weight_shape"].tolist()
    codes = unpack(parts["weight_packed"], columns, bits) - 2 ** (bits - 1)
    scales = parts["weight_scale"].float()
    assert len(codes) == rows
    assert set(parts) == {"weight_packed", "weight_scale", "weight_shape"}
    return codes * scales.repeat_interleave(columns // scales.shape[1], 1)


def matrices(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, quantised ones as the float32 matrix that they stand for."""
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    packed: dict[str, dict[str, Tensor]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                stem, _, part = name.rpartition(".")
                if EXPERT.fullmatch(stem) and part != "weight":
                    packed.setdefault(stem, {})[part] = tensors.get_tensor(name)
                else:
                    yield name, tensors.get_tensor(name)
    for stem, parts in packed.items():
        if settings["quant_method"] == "gptq":
            yield f"{stem}.weight", from_gptq(parts, settings["bits"], settings)
        else:
            (group,) = settings["config_groups"].values()
            yield f"{stem}.weight", from_compressed_tensors(parts, group["weights"]["num_bits"])


def put_in(model: torch.nn.Module, source: dict[str, Tensor], directory: Path) -> int:
    """Give the experts of `model` the result's weights; returns how many were quantised. Raises
    ValueError unless all of them were and everything else is as in the source."""
    quantized, missing = 0, set(source)
    for name, tensor in matrices(directory):
        missing.discard(name)
        match = EXPERT.fullmatch(name.removesuffix(".weight"))
        if match is None:
            same_as = source.get(name, source["model.embed_tokens.weight"])  # a tied head
            if not torch.equal(tensor, same_as):
                raise ValueError(f"{directory}: {name} is not the source's")
            continue
        layer, expert, role = int(match[1]), int(match[2]), match[3]
        experts = model.model.layers[layer].mlp.experts
        if role == "down":
            experts.down_proj[expert] = tensor
        else:
            experts.gate_up_proj[expert].chunk(2)[role == "up"].copy_(tensor)
        quantized += not torch.equal(tensor, source[name])
    expected = sum(1 for name in source if EXPERT.fullmatch(name.removesuffix(".weight")))
    if missing - {"lm_head.weight"} or quantized != expected:
        raise ValueError(
            f"{directory}: {quantized} of {expected} expert matrices are quantised, "
            f"{len(missing)} tensors are missing"
        )
    return quantized


def final_states(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """[N, H]: the normed state at each counted position."""
    states = [model.model(part, use_cache=False).last_hidden_state for part in rows.split(4)]
    return torch.cat(states)[:, FIRST_POSITION:-1].flatten(0, 1)


def compare(model: torch.nn.Module, source: Tensor, result: Tensor, rows: Tensor) -> dict[str, Any]:
    """Mean KL(source || result) of the next-token distribution, and perplexities."""
    targets = rows[:, FIRST_POSITION + 1 :].flatten()
    totals = np.zeros(3)
    for ours, theirs, ids in zip(*(x.split(PIECE) for x in (source, result, targets)), strict=True):
        p, q = (model.lm_head(x).log_softmax(-1) for x in (ours, theirs))
        kl = (p.exp() * (p - q)).sum(-1)
        losses = (-x.gather(1, ids[:, None])[:, 0] for x in (p, q))
        totals += [float(x.double().sum()) for x in (kl, *losses)]
    kl, before, after = totals / len(targets)
    return {
        "kl_divergence": kl,
        "perplexity_source": float(np.exp(before)),
        "perplexity": float(np.exp(after)),
        "positions": len(targets),
    }


@torch.no_grad()
def main(path: str, tokens: str, report: str, *directories: str) -> None:
    rows = torch.tensor(json.loads(Path(tokens).read_text()))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    source: dict[str, Tensor] = {}
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            source |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    reference = final_states(model, rows)
    found = {}
    for directory in directories:
        quantized = put_in(model, source, Path(directory))
        found[directory] = compare(model, reference, final_states(model, rows), rows)
        found[directory]["matrices"] = quantized
        size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        found[directory]["size_bytes"] = size
    Path(report).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
