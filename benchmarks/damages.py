"""Damages that happen to checkpoints by accident, over seeds and models: what gates make of them.

    python benchmarks/damages.py [--models tiny,smollm2-moe,smollm2-mixtral] [--seeds 3]

gates.py asks which gate catches what on one model. This asks how often the default limits err:
sound versions that are rejected, broken ones that pass, over models and seeds (which expert, which
layer, which noise). Held-out text is of two domains, judged by itself each; beside it stands what
one domain alone would have said. `tiny` is a small model that is trained here on the calibration
text of both domains, with a super expert planted into it.

A version is what was done to it, decided before anything is measured. The accounting of tensors
is that of a plan which quantises routed experts only. Where it or the weights alone would tell, the
table says what behaviour alone told, too. Writes the section "damages" of RESULTS.md.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from results import machine, write_section
from torch import Tensor

from se_compress.artifacts import Check, ExpertId, ModelSource, RunOptions
from se_compress.model.checkpoint import Reader, open_tensors
from se_compress.model.observers import RoutingCapture
from se_compress.model.states import batches_of
from se_compress.model.streaming import StreamedModel
from se_compress.opening.source import open_source
from se_compress.profiling.profiler import profile_experts
from se_compress.quant.grid import Grid, dequantize, rtn
from se_compress.recipe import Recipe, parse_recipe
from se_compress.text.calibrate import draw_domains, draw_tokens
from se_compress.validation.validator import Original, judge

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tools" / "reference" / "text"
DOMAINS = {"prose": "austen", "facts": "factbook"}
ON_WEIGHTS = ("weight_cosine", "weight_gain", "tensors_accounted")
TRAINED_STEPS, TRAINED_ROWS, TRAINED_TOKENS = 400, 16, 64
MEMORISED_STEPS = 60
Changes = Mapping[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A model, what it routes where, and the two ways in which it is judged."""

    source: ModelSource
    read: Reader
    recipe: Recipe
    super_expert: ExpertId
    favours: Mapping[ExpertId, float]
    by_domain: Original
    alone: Original

    def names(self, expert: ExpertId) -> list[str]:
        return [info.name for info in self.source.experts[expert].values()]

    def routed(self) -> list[ExpertId]:
        return sorted(i for i in self.source.experts if i.expert != "shared")

    def others(self) -> list[ExpertId]:
        return [i for i in self.routed() if i != self.super_expert]

    def named(self, part: str, layer: int) -> str:
        return next(n for n in self.source.tensors if n.endswith(part) and f".{layer}." in n)


@dataclass(frozen=True)
class Damage:
    """A version of a model. `made` gives its changed tensors, None where the model has no such
    thing; `config` keys of its config that are others."""

    name: str
    sound: bool
    made: Callable[[Model, random.Random], Changes | None]
    config: Callable[[ModelSource], Mapping[str, object]] = lambda source: {}


# ----------------------------------------------------------------------------------- the versions


def rounded(bits: int) -> Callable[[Model, random.Random], Changes]:
    def made(model: Model, dice: random.Random) -> Changes:
        columns = min(model.read(n).shape[1] for i in model.others() for n in model.names(i)[:3])
        grid = Grid(bits, min(64, columns), symmetric=True)
        names = [name for expert in model.others() for name in model.names(expert)]
        return {n: dequantize(rtn(model.read(n).float()[None], grid, None))[0] for n in names}

    return made


def lost_domain(model: Model, dice: random.Random) -> Changes:
    """A sixth of the experts silent: those that the facts use most, compared with the prose."""
    ranked = sorted(model.others(), key=lambda i: -model.favours[i])
    gone = ranked[: max(1, len(ranked) // 6)]
    names = [model.source.experts[i]["down"].name for i in gone]
    return {name: torch.zeros_like(model.read(name)) for name in names}


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


def shifted_router(model: Model, dice: random.Random) -> Changes:
    layer = dice.choice(model.source.moe_layers)
    name = next(
        info.name
        for info in model.source.tensors.values()
        if info.kind == "router" and info.layer == layer and len(info.shape) == 2
    )
    return {name: model.read(name).roll(1, dims=0)}


def memorised(model: Model, dice: random.Random) -> Changes | None:
    """The experts trained on the calibration text until they know it; small models only."""
    if model.source.size_bytes > 20_000_000:
        return None
    tokens = draw_tokens(model.recipe.calibration, model.source)
    trained = plain(model.source.path)
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


DAMAGES = (
    Damage("an equal copy", True, lambda model, dice: {}),
    Damage("8 bits, rounded to nearest", True, rounded(8)),
    Damage("4 bits, rounded to nearest, super expert kept", True, rounded(4)),
    Damage("a domain lost", False, lost_domain),
    Damage("one expert's gate and up exchanged", False, gate_for_up),
    Damage("a shard of another revision", False, other_revision),
    Damage("rotary base ten times as large", False, lambda model, dice: {}, other_base),
    Damage("two heads of the keys exchanged", False, permuted_heads),
    Damage("rows of a router shifted by one", False, shifted_router),
    Damage("calibration text memorised", False, memorised),
)


# ------------------------------------------------------------------------------------- the models


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


def build_tiny(directory: Path, recipe: Recipe) -> None:
    """A model of a few hundred thousand weights that has learnt both texts, and then was given a
    super expert: expert 2 of layer 1 answers the first token with a massive activation."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    tiny.build(directory, "qwen3_moe")
    tiny.save_tokenizer(directory, bos=True)
    source = open_source(str(directory))
    text = recipe.calibration.model_copy(update={"samples": 400, "sequence_length": TRAINED_TOKENS})
    model = plain(directory)
    train(model, torch.tensor(draw_tokens(text, source)), TRAINED_STEPS, 3e-3, 0)
    model.save_pretrained(directory)
    tiny.plant(directory, 1, 2)


def settings(directory: Path, tiny: bool) -> Recipe:
    length = 64 if tiny else 128
    return parse_recipe(
        {
            "model": str(directory),
            "output": "unused",
            "calibration": {
                "data": {d: str(TEXT / f"{c}-calibration.txt") for d, c in DOMAINS.items()},
                "samples": 8,
                "sequence_length": length,
            },
            "super_experts": {"confirm": False},
            "validation": {
                "data": {d: str(TEXT / f"{c}-held-out.txt") for d, c in DOMAINS.items()},
                "samples": 8,
                "sequence_length": length,
                "generation": {"prompts": 4, "prompt_tokens": 16, "tokens": 48},
            },
        },
        "benchmarks/damages.py",
    )


def prepare(name: str, work: Path) -> Model:
    directory = work / "tiny" if name == "tiny" else ROOT / "models" / name
    recipe = settings(directory, name == "tiny")
    if name == "tiny" and not directory.exists():
        build_tiny(directory, recipe)
    source = open_source(str(directory))
    read = open_tensors(source.tensors)
    calibration = draw_tokens(recipe.calibration, source)
    found = profile_experts(source, calibration, recipe, RunOptions()).super_experts
    if not found:
        raise SystemExit(f"{name} has no super expert")
    texts = draw_domains(recipe.validation, source)
    assert isinstance(texts, dict)
    return Model(
        source=source,
        read=read,
        recipe=recipe,
        super_expert=max(found, key=lambda one: one.peak).id,
        favours=favours(source, read, texts),
        by_domain=Original(source, texts, recipe, RunOptions(), keep=True),
        alone=Original(source, texts["prose"], recipe, RunOptions(), keep=True),
    )


def favours(
    source: ModelSource, read: Reader, texts: Mapping[str, object]
) -> dict[ExpertId, float]:
    """By how much more the facts use each expert than the prose does, as a ratio of tokens."""
    counts = {name: used(source, read, tokens) for name, tokens in texts.items()}
    prose, facts = counts["prose"], counts["facts"]
    return {i: (facts.get(i, 0) + 1) / (prose.get(i, 0) + 1) for i in source.experts}


def used(source: ModelSource, read: Reader, tokens: object) -> dict[ExpertId, int]:
    """Tokens that went to each routed expert."""
    model = StreamedModel(source, read)
    states = model.embed(batches_of(tokens, 4096))  # type: ignore[arg-type]
    counts: dict[ExpertId, int] = {}
    for layer in range(source.layer_count):
        watch = RoutingCapture()
        states = model.run_layer(layer, model.load_layer(layer), states, watch)
        if watch.saw_experts:
            for expert, count in enumerate(watch.experts.flatten().bincount().tolist()):
                counts[ExpertId(layer, expert)] = count
    return counts


# ---------------------------------------------------------------------------------- the measuring


def judged(model: Model, damage: Damage, seed: int) -> dict[str, object] | None:
    """The gates that a version misses: of all, by behaviour alone, and on one domain alone."""
    changed = damage.made(model, random.Random(seed))
    if changed is None:
        return None
    config = damage.config(model.source)
    run_as = replace(model.source, config=config) if config else None

    def read(name: str) -> Tensor:
        return changed[name] if name in changed else model.read(name)

    failed = {}
    for key, original in (("domains", model.by_domain), ("alone", model.alone)):
        recipe = model.recipe
        if key == "alone":
            held_out = recipe.validation.of("prose")
            bare = tuple(one.model_copy(update={"domain": ""}) for one in held_out.data)
            validation = held_out.model_copy(update={"data": bare})
            recipe = recipe.model_copy(update={"validation": validation})
        checks = judge(original, read, recipe, RunOptions(), run_as=run_as)
        failed[key] = [
            one.name for one in (*checks, account(model, changed)) if one.passed is False
        ]
    return {"damage": damage.name, "seed": seed, **failed}


def account(model: Model, changed: Changes) -> Check:
    planned = {name for expert in model.routed() for name in model.names(expert)}
    wrong = [n for n in changed if n not in planned and not torch.equal(changed[n], model.read(n))]
    return Check("tensors_accounted", None, None, not wrong)


def rows(kept: Sequence[Mapping[str, object]]) -> Iterator[str]:
    yield "| version | what it is | versions | rejected | by behaviour alone | on one domain |"
    yield "|---" * 6 + "|"
    for damage in DAMAGES:
        mine = [one for one in kept if one["damage"] == damage.name]
        if not mine:
            continue
        whole = sum(bool(one["domains"]) for one in mine)
        behaviour, alone = (
            sum(bool(_behaviour(one[key])) for one in mine) for key in ("domains", "alone")
        )
        kind = "sound" if damage.sound else "broken"
        wrong = whole if damage.sound else len(mine) - whole
        mark = f"**{whole}**" if wrong else str(whole)
        yield f"| {damage.name} | {kind} | {len(mine)} | {mark} | {behaviour} | {alone} |"


def _behaviour(failed: object) -> list[str]:
    assert isinstance(failed, list)
    return [name for name in failed if name not in ON_WEIGHTS]


def summary(kept: Sequence[Mapping[str, object]]) -> str:
    sound = {damage.name for damage in DAMAGES if damage.sound}
    good = [one for one in kept if one["damage"] in sound]
    bad = [one for one in kept if one["damage"] not in sound]
    refused, missed = [o for o in good if o["domains"]], [o for o in bad if not o["domains"]]
    text = (
        f"False rejections: {len(refused)} of {len(good)} sound versions; misses: {len(missed)} of "
        f"{len(bad)} broken ones."
    )
    gates = sorted({str(gate) for one in refused for gate in _as_list(one["domains"])})
    return text + (f" What rejected sound ones: {', '.join(gates)}." if gates else "")


def _as_list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "damages")
    parser.add_argument("--models", default="tiny,smollm2-moe,smollm2-mixtral")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "measured.json"
    kept: dict[str, list[dict[str, object]]] = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.models.split(","):
        done = {(one["damage"], one["seed"]) for one in kept.setdefault(name, [])}
        wanted = [
            (d, s) for s in range(arguments.seeds) for d in DAMAGES if (d.name, s) not in done
        ]
        model = prepare(name, arguments.work) if wanted else None
        for damage, seed in wanted:
            started = time.perf_counter()
            assert model is not None
            if found := judged(model, damage, seed):
                kept[name].append(found)
                file.write_text(json.dumps(kept, indent=1))
            print(
                f"{name}, {damage.name}, {seed}: {time.perf_counter() - started:.0f} s", flush=True
            )
    text = f"## Damages by accident\n\n{machine()}. Default limits; two domains of held-out text. A"
    text += " bold number is wrong.\n"
    for name in ("tiny", "smollm2-moe", "smollm2-mixtral"):
        state = kept.get(name)
        found = [*rows(state), "", summary(state)] if state else ["Not measured yet."]
        text += "\n".join(["", f"### {name}", "", *found, ""])
    write_section("damages", text)
    print(text)


if __name__ == "__main__":
    main()
