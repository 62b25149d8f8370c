"""Damages that happen to checkpoints by accident, over seeds and models: what gates make of them.

    python benchmarks/damages.py [--models tiny,smollm2-moe,smollm2-mixtral] [--seeds 3]

gates.py asks which gate catches what on one model. This asks how often the default limits err:
sound versions that are rejected, broken ones that pass, over models and seeds. A seed draws the
held-out text, and which expert, layer or noise it is. The text is of two domains, judged by itself
each; beside it stands what one domain alone would have said. `tiny` is a small model that is
trained here on the calibration text of both domains, with a super expert planted into it.

A version is what was done to it, decided before anything is measured. The accounting of tensors
is that of a plan which quantises routed experts only. Where it, the weights or the files beside
them would tell, the table says what behaviour alone told, too.

What was measured is kept under --work and judged anew by the limits of today. Writes the section
"damages" of RESULTS.md.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accidents import DAMAGES, Damage, Model, plain, train
from results import machine, write_section
from versions import account, reader

from se_compress.artifacts import GATES, Check, ExpertId, ModelSource, RunOptions
from se_compress.model.checkpoint import Reader, open_tensors
from se_compress.model.observers import RoutingCapture
from se_compress.model.states import batches_of
from se_compress.model.streaming import StreamedModel
from se_compress.opening.source import open_source
from se_compress.profiling.profiler import profile_experts
from se_compress.recipe import Recipe, parse_recipe
from se_compress.text.alike import text_check
from se_compress.text.calibrate import draw_domains, draw_tokens
from se_compress.validation.validator import Original, judge

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tools" / "reference" / "text"
DOMAINS = {"prose": "austen", "facts": "factbook"}
ONE_DOMAIN = "prose"
NOT_BEHAVIOUR = ("weight_cosine", "weight_gain", "tensors_accounted", "text_alike")
TRAINED_STEPS, TRAINED_TOKENS = 400, 64
TEMPLATE = (  # of the tiny model
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


# ------------------------------------------------------------------------------------- the models


def build_tiny(directory: Path, recipe: Recipe) -> None:
    """A model of a few hundred thousand weights that has learnt both texts, and then was given a
    super expert: expert 2 of layer 1 answers the first token with a massive activation."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    tiny.build(directory, "qwen3_moe")
    tiny.save_tokenizer(directory, bos=True, template=TEMPLATE)
    source = open_source(str(directory))
    text = recipe.calibration.model_copy(update={"samples": 400, "sequence_length": TRAINED_TOKENS})
    model = plain(directory)
    train(model, torch.tensor(draw_tokens(text, source)), TRAINED_STEPS, 3e-3, 0)
    model.save_pretrained(directory)
    tiny.plant(directory, 1, 2)


def settings(directory: Path, tiny: bool, seed: int = 0) -> Recipe:
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
                "seed": seed,
                "generation": {"prompts": 8, "prompt_tokens": 16, "tokens": 48},
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


def measured(
    model: Model, original: Original, damage: Damage, seed: int
) -> dict[str, object] | None:
    """The value of each gate of a version, of all domains and of one alone. None where the model
    has no such thing to damage."""
    changed = damage.made(model, random.Random(seed))
    if changed is None:
        return None
    config = damage.config(model.source)
    run_as = replace(model.source, config=config) if config else None
    read = reader(model, changed)
    intended = read if damage.plan else None
    found = judge(original, read, model.recipe, RunOptions(), intended, run_as)
    of_files = [account(model, changed)]
    if damage.files is not None:
        of_files.append(beside(model.source, damage.files))
    alone = next(one for one in found.domains if one.name == ONE_DOMAIN)
    return {
        "damage": damage.name,
        "seed": seed,
        "domains": values([*found.checks, *of_files]),
        "alone": values(alone.checks),
    }


def beside(source: ModelSource, change: Callable[[Path], None]) -> Check:
    """What the files beside the weights show, once changed."""
    copy = source.path.parent / "files"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source.path, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    change(copy)
    return text_check(source, copy)


def values(checks: Sequence[Check]) -> dict[str, float]:
    return {check.name: check.value for check in checks if check.value is not None}


def missed(found: object) -> list[str]:
    """The gates whose default limit the values miss."""
    assert isinstance(found, Mapping)
    return [
        name for name, value in found.items() if not GATES[name].meets(value, GATES[name].limit)
    ]


def by_behaviour(found: object) -> list[str]:
    return [name for name in missed(found) if name not in NOT_BEHAVIOUR]


# ---------------------------------------------------------------------------------------- the table


def rows(kept: Sequence[Mapping[str, object]]) -> Iterator[str]:
    yield "| version | what it is | versions | rejected | by behaviour alone | on one domain |"
    yield "|---" * 6 + "|"
    for damage in DAMAGES:
        mine = [one for one in kept if one["damage"] == damage.name]
        if not mine:
            continue
        whole = sum(bool(missed(one["domains"])) for one in mine)
        behaviour, alone = (
            sum(bool(by_behaviour(one[key])) for one in mine) for key in ("domains", "alone")
        )
        kind = "sound" if damage.sound else "broken"
        wrong = whole if damage.sound else len(mine) - whole
        mark = f"**{whole}**" if wrong else str(whole)
        yield f"| {damage.name} | {kind} | {len(mine)} | {mark} | {behaviour} | {alone} |"


def summary(kept: Sequence[Mapping[str, object]]) -> str:
    sound = {damage.name for damage in DAMAGES if damage.sound}
    good = [one for one in kept if one["damage"] in sound]
    bad = [one for one in kept if one["damage"] not in sound]
    refused = [one for one in good if missed(one["domains"])]
    passed = [one for one in bad if not missed(one["domains"])]
    text = (
        f"False rejections: {rate(refused, good)} of sound versions; "
        f"misses: {rate(passed, bad)} of broken ones."
    )
    gates = sorted({gate for one in refused for gate in missed(one["domains"])})
    return text + (f" What rejected sound ones: {', '.join(gates)}." if gates else "")


def rate(some: Sequence[object], all_of_them: Sequence[object]) -> str:
    """Such as "1 of 12 (8 %)"."""
    share = f" ({len(some) / len(all_of_them):.0%})".replace("%", " %") if all_of_them else ""
    return f"{len(some)} of {len(all_of_them)}{share}"


def margins(kept: Mapping[str, Sequence[Mapping[str, object]]]) -> Iterator[str]:
    """Each gate on behaviour: its worst value of a sound version of each model."""
    sound = {damage.name for damage in DAMAGES if damage.sound}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, versions_ in kept.items():
        for one in versions_:
            if one["damage"] in sound:
                assert isinstance(one["domains"], Mapping)
                for gate, value in one["domains"].items():
                    found[gate][name].append(value)
    yield f"| worst value of a sound version | limit | {' | '.join(kept)} |"
    yield "|---" * (len(kept) + 2) + "|"
    for gate, row in ((GATES[name], row) for name, row in found.items()):
        worst = max if gate.side == "at most" else min
        cells = [f"{worst(row[name]):.3f}" if row[name] else "" for name in kept]
        yield f"| {gate.short} | {gate.limit:g} | {' | '.join(cells)} |"


def measure(name: str, seeds: int, work: Path, kept: list[dict[str, object]]) -> Iterator[None]:
    """What is not measured yet of a model, appended to `kept` one by one."""
    done = {(one["damage"], one["seed"]) for one in kept}
    open_ = {s: [d for d in DAMAGES if (d.name, s) not in done] for s in range(seeds)}
    model = prepare(name, work) if any(open_.values()) else None
    for seed, damages in open_.items():
        if not damages or model is None:
            continue
        recipe = settings(model.source.path, name == "tiny", seed)
        texts = draw_domains(recipe.validation, model.source)
        original = Original(model.source, texts, recipe, RunOptions(), keep=True)
        for damage in damages:
            started = time.perf_counter()
            if (found := measured(model, original, damage, seed)) is not None:
                kept.append(found)
                yield
            spent = time.perf_counter() - started
            print(f"{name}, {damage.name}, {seed}: {spent:.0f} s", flush=True)


def section(kept: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    text = f"## Damages by accident\n\n{machine()}. Default limits; two domains of held-out text. A"
    text += " bold number is wrong. Memorising is for small models only.\n"
    for name in ("tiny", "smollm2-moe", "smollm2-mixtral"):
        state = kept.get(name)
        found = [*rows(state), "", summary(state)] if state else ["Not measured yet."]
        text += "\n".join(["", f"### {name}", "", *found, ""])
    everything = [one for state in kept.values() for one in state]
    return "\n".join([text, "### all models", "", summary(everything), "", *margins(kept)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "damages")
    parser.add_argument("--models", default="tiny,smollm2-moe,smollm2-mixtral")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "measured.json"
    kept: dict[str, list[dict[str, object]]] = json.loads(file.read_text()) if file.exists() else {}
    for name in filter(None, arguments.models.split(",")):
        for _ in measure(name, arguments.seeds, arguments.work, kept.setdefault(name, [])):
            file.write_text(json.dumps(kept, indent=1))
            write_section("damages", section(kept))
    write_section("damages", section(kept))
    print(section(kept))


if __name__ == "__main__":
    main()
