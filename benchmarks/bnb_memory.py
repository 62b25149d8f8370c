"""What a bitsandbytes checkpoint takes in memory once it is loaded, and what it computes.

    se-compress recipes/bitsandbytes-nf4.yaml
    python benchmarks/bnb_memory.py [out/bitsandbytes-nf4]

Three ways to have the same model through plain `from_pretrained`: the source in bfloat16, the
source under transformers' own BitsAndBytesConfig (nf4, double quantisation), and our checkpoint.
Bytes are those of all tensors of the loaded model after a forward pass, each storage counted once.
KL divergence is to the source on held-out text.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from results import machine, write_section
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import se_compress  # noqa: F401  teaches transformers our format
from se_compress.model.measures import kl_divergence

SOURCE = Path("models/smollm2-moe")
TEXT = Path("tools/reference/text/austen-held-out.txt")
SEQUENCES, LENGTH = 8, 256


def tokens() -> Tensor:
    """Held-out text [SEQUENCES, LENGTH]."""
    ids = AutoTokenizer.from_pretrained(SOURCE)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor(ids[: SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)


def held_bytes(model: Any) -> tuple[int, int]:
    """Bytes of all tensors, and of those of routed experts."""
    storages = {
        tensor.untyped_storage().data_ptr(): (name, tensor.untyped_storage().nbytes())
        for name, tensor in model.state_dict().items()
    }
    experts = sum(size for name, size in storages.values() if ".experts." in name)
    return sum(size for _, size in storages.values()), experts


@torch.no_grad()
def measure(path: Path, text: Tensor, **settings: Any) -> dict[str, Any]:
    """Load, run, and count."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **settings).eval()
    logits = torch.cat([model(sequence[None]).logits.float() for sequence in text])
    whole, experts = held_bytes(model)
    return {
        "logits": logits,
        "whole": whole,
        "experts": experts,
    }


def row(name: str, found: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    divergence = float(kl_divergence(source["logits"], found["logits"]).mean())
    return (
        f"| {name} | {found['whole'] / 1e6:.1f} MB | {found['experts'] / 1e6:.1f} MB "
        f"| {divergence:.4f} |"
    )


def main() -> None:
    result = Path(sys.argv[1] if len(sys.argv) > 1 else "out/bitsandbytes-nf4")
    text = tokens()
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # with these, bitsandbytes' CPU kernel fails on the gate, whose one row it cannot tile
        llm_int8_skip_modules=["lm_head", "shared_expert_gate"],
    )
    source = measure(SOURCE, text)
    rows = [
        row("source, bfloat16", source, source),
        row(
            "source, `BitsAndBytesConfig` nf4",
            measure(SOURCE, text, quantization_config=theirs),
            source,
        ),
        row(f"`{result.name}`", measure(result, text), source),
    ]
    lines = [
        "## bitsandbytes in memory",
        "",
        f"`benchmarks/bnb_memory.py`, {machine()}",
        "",
        f"| loaded | all tensors | routed experts | KL to the source, {text.numel()} tokens |",
        "|---|---|---|---|",
        *rows,
    ]
    print("\n".join(lines))
    write_section("bnb_memory", "\n".join(lines))


if __name__ == "__main__":
    main()
