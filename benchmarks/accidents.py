"""Damages that happen to checkpoints by accident, beside sound versions; damages.py judges them."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import versions
from torch import Tensor
from versions import Changes, rounded, silence

from se_compress.artifacts import ExpertId, ModelSource
from se_compress.text.calibrate import draw_tokens

TRAINED_ROWS = 16
MEMORISED_STEPS = 60


@dataclass(frozen=True)
class Model(versions.Model):
    """A model, and how much more each expert is used by the facts than by the prose."""

    favours: Mapping[ExpertId, float]

    def named(self, part: str, layer: int) -> str:
        return next(n for n in self.source.tensors if n.endswith(part) and f".{layer}." in n)


@dataclass(frozen=True)
class Damage:
    """A version of a model.

    made    its changed tensors; None where the model has no such thing
    config  its config; empty if that is the source's
    files   changes the files beside its weights, in a copy of the source's
    plan    a plan asks for the change: it is what the weights are compared with
    """

    name: str
    sound: bool
    made: Callable[[Model, random.Random], Changes | None]
    config: Callable[[ModelSource], Mapping[str, object]] = lambda source: {}
    files: Callable[[Path], None] | None = None
    plan: bool = False


def to_bits(bits: int) -> Callable[[Model, random.Random], Changes]:
    """All experts but the super expert, rounded to nearest."""

    def made(model: Model, dice: random.Random) -> Changes:
        return rounded(model, [name for one in model.others() for name in model.names(one)], bits)

    return made


def to_float8(model: Model, dice: random.Random) -> Changes:
    """All experts in e4m3, one scale for each matrix."""
    changed = {}
    for name in (name for expert in model.routed() for name in model.names(expert)):
        weight = model.read(name).float()
        scale = weight.abs().max().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        changed[name] = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    return changed


def lost_domain(model: Model, dice: random.Random) -> Changes:
    """A sixth of the experts silent: those that the facts use most, compared with the prose."""
    ranked = sorted(model.others(), key=lambda i: -model.favours[i])
    gone = ranked[: max(1, len(ranked) // 6)]
    return silence(model, gone)


def gate_for_up(model: Model, dice: random.Random) -> Changes:
    expert = model.source.experts[dice.choice(model.others())]
    gate, up = expert["gate"].name, expert["up"].name
    return {gate: model.read(up), up: model.read(gate)}


def other_revision(model: Model, dice: random.Random) -> Changes:
    """A tenth of the layers, one beside the other, as further training left them: each matrix off
    by 30 percent of its own spread."""
    count = model.source.layer_count
    first = dice.randrange(count - max(1, count // 10) + 1)
    layers = range(first, first + max(1, count // 10))
    draw = torch.Generator().manual_seed(dice.randrange(2**31))
    return {
        name: weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=draw)
        for name, info in model.source.tensors.items()
        if info.layer in layers and (weight := model.read(name).float()).dim() == 2
    }


def permuted_heads(model: Model, dice: random.Random) -> Changes | None:
    """The first two heads of the keys in each other's place, the values as they were."""
    config = model.source.config
    heads = int(str(config.get("num_key_value_heads", 1)))
    if heads < 2:
        return None
    name = model.named("self_attn.k_proj.weight", dice.randrange(model.source.layer_count))
    parts = list(model.read(name).chunk(heads))
    return {name: torch.cat([parts[1], parts[0], *parts[2:]])}


def shifted_router(model: Model, dice: random.Random) -> Changes | None:
    """No damage where all rows are alike: smollm2-mixtral sends each token to all experts."""
    layer = dice.choice(model.source.moe_layers)
    name = next(
        info.name
        for info in model.source.tensors.values()
        if info.kind == "router" and info.layer == layer and len(info.shape) == 2
    )
    rows = model.read(name)
    shifted = rows.roll(1, dims=0)
    return None if torch.equal(shifted, rows) else {name: shifted}


def memorised(model: Model, dice: random.Random) -> Changes | None:
    """The experts trained on the calibration text until they know it; small models only."""
    if model.source.size_bytes > 20_000_000:
        return None
    tokens = draw_tokens(model.recipe.calibration, model.source)
    trained: Any = plain(model.source.path)
    train(trained, torch.tensor(tokens), MEMORISED_STEPS, 3e-3, dice.randrange(2**31))
    from safetensors.torch import load_file

    target = model.source.path.parent / "memorised"
    trained.save_pretrained(target)
    weights = load_file(target / "model.safetensors")
    return {n: weights[n] for i in model.routed() for n in model.names(i) if n in weights}


def other_base(source: ModelSource) -> Mapping[str, object]:
    """The rotary base ten times as large."""
    changed = dict(source.config)
    if isinstance(rope := changed.get("rope_parameters"), Mapping):
        changed["rope_parameters"] = {**rope, "rope_theta": 10 * float(rope["rope_theta"])}
    else:
        changed["rope_theta"] = 10 * float(str(changed.get("rope_theta", 1e4)))
    return changed


def other_template(directory: Path) -> None:
    """The chat template of another family: its marks are words to this tokenizer."""
    template = "{% for message in messages %}[INST] {{ message.content }} [/INST]{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)


def nothing(model: Model, dice: random.Random) -> Changes:
    return {}


DAMAGES = (
    Damage("an equal copy", True, nothing),
    Damage("8 bits, rounded to nearest", True, to_bits(8)),
    Damage("experts in 8-bit floats", True, to_float8),
    Damage("4 bits, rounded to nearest, super expert kept", True, to_bits(4)),
    Damage(
        "the super expert set to zero",
        False,
        lambda model, dice: silence(model, [model.super_expert]),
        plan=True,
    ),
    Damage("a domain lost", False, lost_domain, plan=True),
    Damage("one expert's gate and up exchanged", False, gate_for_up),
    Damage("a shard of another revision", False, other_revision),
    Damage("rotary base ten times as large", False, nothing, other_base),
    Damage("two heads of the keys exchanged", False, permuted_heads),
    Damage("rows of a router shifted by one", False, shifted_router),
    Damage("another family's chat template", False, nothing, files=other_template),
    Damage("calibration text memorised", False, memorised),
)


# ------------------------------------------------------------------------------------- the training


def plain(directory: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def train(model: torch.nn.Module, rows: Tensor, steps: int, rate: float, seed: int) -> None:
    """Next-token loss on rows of token ids, [N, T]."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (TRAINED_ROWS,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
