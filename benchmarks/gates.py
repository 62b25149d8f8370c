"""Which gates catch what: sound and broken versions of smollm2-moe, judged one by one.

    python benchmarks/gates.py [--work DIR] [--only NAME,...] [--write-only]

Each version is made by changing tensors of the source, and judged as the validator judges a result,
on the held-out text of the reference model. Which ones are sound and which broken is decided by
what was done to them, before anything is measured. The rest lie in between: they are shown, but no
gate has to decide them. The default limits (`artifacts/gates.py`) are set so that
every sound version passes and every broken one is caught.

The accounting of tensors is that of a plan which quantises the routed experts: it catches every
change of anything else, byte for byte, so a router of fewer bits is caught however well it works.
The other gates have to catch what a wrong plan, or a wrong quantiser, would do to the experts.

Measurements are kept under --work and judged anew by the limits of today, so that a limit can be
moved without measuring again. Writes the section "gates" of RESULTS.md.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import versions
from results import machine, write_section
from versions import GROUP_SIZE, Changes, account, reader, rounded, silence

from se_compress.artifacts import GATES, Check, ExpertId, ModelSource, RunOptions
from se_compress.compression.execute import compress
from se_compress.model.checkpoint import open_result, open_tensors
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.profiling.profiler import profile_experts
from se_compress.recipe import Recipe, Validation, parse_recipe
from se_compress.text.calibrate import draw_sequences
from se_compress.validation.validator import Original, judge

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tools" / "reference" / "text"
# The columns: no version is on disk, to be loaded by an engine or with files beside it, and gates
# that a recipe has to ask for have no default limit to calibrate.
ON_DISK = ("reload", "text_alike")
COLUMNS = {n: gate for n, gate in GATES.items() if n not in ON_DISK and not gate.optional}
VERDICTS = {True: "sound", False: "broken", None: "between"}


@dataclass(frozen=True)
class Model(versions.Model):
    """The source, its super expert, and what is needed to make versions of it."""

    calibration: Sequence[Sequence[int]]
    work: Path


@dataclass(frozen=True)
class Case:
    """A version of the model.

    sound     True, False, or None for what lies in between
    surgery   a plan asks for the change: it is what the weights are compared with
    """

    name: str
    sound: bool | None
    change: Callable[[Model], Changes]
    surgery: bool = False


def round_experts(bits: int, protect: bool = False) -> Callable[[Model], Changes]:
    def change(model: Model) -> Changes:
        experts = model.others() if protect else model.routed()
        return rounded(model, [name for i in experts for name in model.names(i)], bits)

    return change


def round_super_expert(bits: int) -> Callable[[Model], Changes]:
    return lambda model: rounded(model, model.names(model.super_expert), bits)


def round_routers(bits: int) -> Callable[[Model], Changes]:
    def change(model: Model) -> Changes:
        names = [info.name for info in model.source.tensors.values() if info.kind == "router"]
        return rounded(model, [n for n in names if n.endswith("mlp.gate.weight")], bits)

    return change


def solved(model: Model) -> Changes:
    """What se-compress itself makes of it: GPTQ at 4 bits, the super expert kept."""
    plan = make_plan(model.source, None, model.recipe)
    directory = model.work / "gptq"
    compress(model.source, plan, model.calibration, model.recipe, directory)
    read = open_result(read_headers(directory), model.source.tensors, plan.scheme)
    return {name: read(name) for i in model.routed() for name in model.names(i)}


def silence_others(count: int, seed: int) -> Callable[[Model], Changes]:
    return lambda model: silence(model, model.drawn(count, random.Random(seed)))


def shift_scales(model: Model) -> Changes:
    """4 bits, but in one layer each row of down_proj has its neighbour's scale."""
    layer = model.source.layer_count // 2
    changed = dict(round_experts(4)(model))
    for identity in model.routed():
        if identity.layer == layer:
            name = model.source.experts[identity]["down"].name
            weight = changed[name]
            size = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
            changed[name] = weight / size * size.roll(1, dims=0)
    return changed


def exchange_experts(model: Model) -> Changes:
    """Two experts of the super expert's layer in each other's place, the router as it was."""
    first, second = (ExpertId(model.super_expert.layer, e) for e in two_others(model.super_expert))
    pairs = zip(model.names(first), model.names(second), strict=True)
    return {a: model.read(b) for pair in pairs for a, b in (pair, pair[::-1])}


def exchange_super_expert(model: Model) -> Changes:
    first = model.super_expert
    second = ExpertId(first.layer, two_others(first)[0])
    pairs = zip(model.names(first), model.names(second), strict=True)
    return {a: model.read(b) for pair in pairs for a, b in (pair, pair[::-1])}


def two_others(identity: ExpertId) -> list[int]:
    assert isinstance(identity.expert, int)
    return [expert for expert in range(3) if expert != identity.expert][:2]


def exchange_layers(model: Model) -> Changes:
    """A shard under the wrong index: two neighbouring layers in each other's place."""
    first = model.source.layer_count // 2
    names = {at: in_layer(model.source, at) for at in (first, first + 1)}
    pairs = zip(names[first], names[first + 1], strict=True)
    return {a: model.read(b) for pair in pairs for a, b in (pair, pair[::-1])}


def foreign_shard(model: Model) -> Changes:
    """Three layers of a model of the same shape that has never been trained with this one: each
    matrix drawn at random with its own mean and spread."""
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for layer in range(20, 23):
        for name in in_layer(model.source, layer):
            weight = model.read(name).float()
            noise = torch.randn(weight.shape, generator=generator)
            changed[name] = weight if weight.dim() == 1 else weight.mean() + weight.std() * noise
    return changed


def in_layer(source: ModelSource, layer: int) -> list[str]:
    return sorted(name for name, info in source.tensors.items() if info.layer == layer)


CASES = (
    Case("an equal copy", True, lambda model: {}),
    Case("8 bits, rounded to nearest", True, round_experts(8)),
    Case("4 bits, GPTQ, super expert kept", True, solved),
    Case("4 bits, rounded to nearest, super expert kept", True, round_experts(4, protect=True)),
    Case("4 bits, rounded to nearest", True, round_experts(4)),
    Case("3 random experts set to zero", True, silence_others(3, 0), surgery=True),
    Case("routers at 8 bits", None, round_routers(8)),
    Case("3 bits, rounded to nearest, super expert kept", None, round_experts(3, protect=True)),
    Case("3 bits, rounded to nearest", None, round_experts(3)),
    Case("super expert alone at 3 bits", None, round_super_expert(3)),
    Case("routers at 4 bits", None, round_routers(4)),
    Case("2 bits, rounded to nearest", False, round_experts(2)),
    Case("super expert alone at 2 bits", False, round_super_expert(2)),
    Case("super expert set to zero", False, lambda m: silence(m, [m.super_expert]), surgery=True),
    Case(
        "a quarter of the experts set to zero at random",
        False,
        silence_others(120, 0),
        surgery=True,
    ),
    Case("routers at 2 bits", False, round_routers(2)),
    Case("4 bits, scales of one layer one row off", False, shift_scales),
    Case("super expert and another exchanged", False, exchange_super_expert),
    Case("two ordinary experts exchanged", False, exchange_experts),
    Case("two layers exchanged", False, exchange_layers),
    Case("three layers of another model", False, foreign_shard),
)


def settings(text: Path, **policy: object) -> Recipe:
    corpora = ("austen", "factbook")
    return parse_recipe(
        {
            "model": str(ROOT / "models" / "smollm2-moe"),
            "output": "unused",
            "target": "gptqmodel",
            "calibration": {
                "data": [str(text / f"{c}-calibration.txt") for c in corpora],
                "samples": 16,
                "sequence_length": 256,
            },
            "policy": {"bits": [4], **policy},
            "quantization": {"group_size": GROUP_SIZE},
            "super_experts": {"confirm": False},
            "validation": {
                "data": [str(text / f"{c}-held-out.txt") for c in corpora],
                "samples": 16,
                "sequence_length": 128,
                "generation": {"prompts": 8, "prompt_tokens": 32, "tokens": 32},
            },
        },
        "benchmarks/gates.py",
    )


def prepare(work: Path) -> tuple[Model, Original]:
    recipe = settings(TEXT)
    source = open_source(recipe.model)
    calibration = draw_sequences(recipe.calibration, source.path, "calibration")
    found = profile_experts(source, calibration[:4], recipe, RunOptions()).super_experts
    super_expert = max(found, key=lambda one: one.peak).id
    protect = [{"layer": super_expert.layer, "expert": super_expert.expert}]
    recipe = settings(TEXT, protect=protect)
    read = open_tensors(source.tensors)
    held_out = draw_sequences(recipe.validation, source.path, "validation")
    original = Original(source, held_out, recipe, RunOptions(), keep=True)
    return Model(source, read, recipe, super_expert, calibration, work), original


def measure(case: Case, model: Model, original: Original) -> list[dict[str, object]]:
    changed = case.change(model)
    read = reader(model, changed)
    intended = read if case.surgery else None
    checks = judge(original, read, model.recipe, RunOptions(), intended).checks
    return [asdict(check) for check in (*checks, account(model, changed))]


def passes(check: Check, limits: Validation) -> bool:
    assert check.value is not None
    return GATES[check.name].meets(check.value, limits.limit(check.name))


def table(measured: Mapping[str, Sequence[Check]], limits: Validation) -> str:
    lines = [
        "| version | what it is | "
        + " | ".join(g.short for g in COLUMNS.values())
        + " | verdict |",
        "|---" * (len(COLUMNS) + 3) + "|",
        "| limit | | " + " | ".join(f"{limits.limit(name):g}" for name in COLUMNS) + " | |",
    ]
    for case in CASES:
        if case.name not in measured:
            continue
        cells, failed = [], []
        checks = {check.name: check for check in measured[case.name]}
        for check in (checks[name] for name in COLUMNS):
            value = f"{check.value:.3f}"
            if not passes(check, limits):
                failed.append(check.name)
                value = f"**{value}**"
            cells.append(value)
        verdict = f"caught by {len(failed)}" if failed else "passes"
        if case.sound is not None and case.sound is bool(failed):
            verdict = f"WRONG: {verdict}"
        kind = VERDICTS[case.sound]
        lines.append(f"| {case.name} | {kind} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def summary(measured: Mapping[str, Sequence[Check]], limits: Validation) -> str:
    decided = [case for case in CASES if case.sound is not None and case.name in measured]
    ok = {c.name: all(passes(check, limits) for check in measured[c.name]) for c in decided}
    sound, broken = ([c for c in decided if c.sound is s] for s in (True, False))
    missed = [case.name for case in broken if ok[case.name]]
    refused = [case.name for case in sound if not ok[case.name]]
    text = (
        f"{len(sound) - len(refused)} of {len(sound)} sound versions pass, "
        f"{len(broken) - len(missed)} of {len(broken)} broken ones are caught."
    )
    if missed:
        text += f" Not caught: {', '.join(missed)}."
    if refused:
        text += f" Refused without need: {', '.join(refused)}."
    if open_ := [case.name for case in CASES if case.name not in measured]:
        text += f" Not measured yet: {', '.join(open_)}."
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "gates")
    parser.add_argument("--only", default="", help="measure these again, comma-separated")
    parser.add_argument("--write-only", action="store_true", help="what has been measured so far")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "measured.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    again = set(filter(None, arguments.only.split(",")))
    wanted = [case for case in CASES if case.name not in kept or case.name in again]
    if wanted and not arguments.write_only:
        model, original = prepare(arguments.work)
        for case in wanted:
            started = time.perf_counter()
            kept[case.name] = measure(case, model, original)
            file.write_text(json.dumps(kept, indent=1))
            print(f"{case.name}: {time.perf_counter() - started:.0f} s", flush=True)
    limits = settings(TEXT).validation
    measured = {name: [Check(**check) for check in checks] for name, checks in kept.items()}
    text = f"## Gates\n\n{machine()}. smollm2-moe, 16 x 128 held-out tokens, 8 continuations of 32"
    text += f" tokens. A value beyond its limit is bold.\n\n{table(measured, limits)}\n\n"
    text += summary(measured, limits)
    write_section("gates", text)
    print(text)


if __name__ == "__main__":
    main()
