"""What is read of every type: its tiny model in bfloat16 in each form that models are published in,
run a layer at a time, and compared with plain transformers holding what the form stands for.

    python tests/source_types.py work fp8 afmoe jamba
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny
import tiny_types
import torch
from safetensors.torch import load_file, save_file
from sourced import source_formats
from torch import Tensor
from transformers import AutoModelForCausalLM

from se_compress.errors import SeCompressError
from se_compress.model.checkpoint import open_tensors
from se_compress.model.states import batches_of
from se_compress.model.streaming import StreamedModel
from se_compress.opening.families import FAMILIES
from se_compress.opening.source import open_source

Tensors = dict[str, Tensor]
BLOCK, GROUP = 16, 32  # rows and columns that share a scale of FP8; columns, of the others
TOKENS = tiny.random_tokens(2, 24, seed=5)
_EXPERTS = re.compile(r".*\.(experts\.(\d+\.\w+\.weight|\w+_proj)|(in|out)put_linear\.weight)")
_ATTENTION = re.compile(r".*\.self_attn\.[qkvo]_proj\.weight")
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """What is stored of a matrix [R, C], and what that stands for."""
    codes, scales = source_formats.to_fp8(weight, BLOCK)
    wide = torch.kron(scales, torch.ones(BLOCK, BLOCK))[: weight.shape[0], : weight.shape[1]]
    return {name: codes, f"{name}_scale_inv": scales}, codes.float() * wide


def mxfp4(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    blocks, scales = source_formats.to_mxfp4(weight)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    signs = torch.where(codes > 7, -1.0, 1.0)
    values = signs * _FP4[codes % 8] * torch.exp2(scales.float() - 127).unsqueeze(-1)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, values.flatten(-2)


def int4(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    words, scales = source_formats.to_int4(weight)
    digits = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(-2)
    steps = scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    stored = {f"{name}_packed": words, f"{name}_scale": scales}
    return {**stored, f"{name}_shape": torch.tensor(weight.shape)}, (digits - 8) * steps


CODERS: Mapping[str, Callable[[str, Tensor], tuple[Tensors, Tensor]]] = {
    "fp8": fp8,
    "mxfp4": mxfp4,
    "int4": int4,
}
FORMS = ("bf16", "fused", *CODERS)


def coded(form: str, tensors: Tensors, transposed: bool) -> tuple[Tensors, Tensors]:
    """A model in a form, and the weights that this stands for by the same names. Experts are coded,
    and in FP8 attention as well; fused ones matrix by matrix."""
    stored, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        attention = form == "fp8" and _ATTENTION.fullmatch(name)
        if not (_EXPERTS.fullmatch(name) or attention):
            continue
        # MXFP4 has its rows as rows where plain matrices are transposed.
        turned = transposed and form == "mxfp4" and weight.dim() == 3
        matrices = weight.mT if turned else weight
        if form != "fp8" and matrices.shape[-1] % GROUP:
            continue
        parts, values = _coded(form, name, matrices)
        del stored[name]
        stored |= parts
        meant[name] = (values.mT if turned else values).contiguous().bfloat16()
    return stored, meant


def _coded(form: str, name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    if weight.dim() == 2:
        return CODERS[form](name, weight)
    made = [CODERS[form](name, matrix) for matrix in weight]
    parts = {part: torch.stack([stored[part].view(torch.uint8) if stored[part].itemsize == 1 else
             stored[part] for stored, _ in made]) for part in made[0][0]}  # fmt: skip
    parts = {p: t.view(made[0][0][p].dtype) for p, t in parts.items()}
    return parts, torch.stack([values for _, values in made])


def write(model: Path, form: str, directory: Path) -> tuple[Path, Path]:
    """A tiny model in bfloat16 in a form, and the plain model that it stands for."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    transposed = FAMILIES[config["model_type"]].transposed
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    config |= {"dtype": "bfloat16"}
    plain, coding = directory / "plain", directory / "form"
    stored, meant = coded(form, tensors, transposed) if form in CODERS else (tensors, tensors)
    _save(plain, meant, config)
    if settings := source_formats.settings_of(form, BLOCK):
        config |= {"quantization_config": settings}
    _save(coding, _in_memory(plain) if form == "fused" else stored, config)
    return coding, plain


def _save(directory: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _in_memory(model: Path) -> Tensors:
    """The tensors under transformers' own names, its experts fused."""
    live: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tied = set(live.all_tied_weights_keys or {})
    return {n: t.clone() for n, t in live.state_dict().items() if n not in tied}


@torch.no_grad()
def difference(form: Path, plain: Path) -> float:
    """The largest relative distance of a position's logits from those of plain transformers."""
    source = open_source(str(form))
    model = StreamedModel(source, open_tensors(source.tensors), torch.device("cpu"), torch.float32)
    states = model.embed(batches_of(TOKENS, 10**6))
    for layer in range(source.layer_count):
        states = model.run_layer(layer, model.load_layer(layer), states)
    found = torch.cat([*model.logits(states)])
    expected = tiny.plain_model(plain)(torch.tensor(TOKENS), use_cache=False).logits
    away = (found - expected.view(found.shape)).norm(dim=-1) / expected.view(found.shape).norm(
        dim=-1
    )
    return float(away.max())


def measure(work: Path, form: str, names: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Model type -> how far the logits are off, and why there are none."""
    found: dict[str, tuple[float, str]] = {}
    for name in names:
        model = work / "models" / name
        if not model.exists():
            tiny_types.build_named(model, name)
        try:
            found[name] = (difference(*write(model, form, work / f"{name}-{form}")), "")
        except (SeCompressError, AssertionError) as error:
            found[name] = (float("inf"), f"{type(error).__name__}: {error}")
    return found


ALL = tuple(tiny_types.CONFIGS)
LIMIT = 1e-4  # round-off of float32


def right_types(work: Path, form: str, names: Sequence[str] = ALL) -> list[str]:
    """Of these model types, those that are read right in a form."""
    return [name for name, (error, _) in measure(work, form, names).items() if error < LIMIT]


def main() -> None:
    work, form, *names = sys.argv[1:]
    for name, (error, why) in measure(Path(work), form, names or ALL).items():
        print(
            f"{name:20} {form:8} {error:.2g} {'right' if error < LIMIT else f'WRONG {why[:200]}'}"
        )


if __name__ == "__main__":
    main()
