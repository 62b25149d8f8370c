"""What mixed widths and protection are worth, at equal size.

    python benchmarks/policy.py [--models smollm2-moe,smollm2-mixtral] [--only PART]

Each checkpoint is planned from one profile, quantised with GPTQ in groups of 64 (8 x 256
calibration tokens of the profile's 32 x 256), read back and compared with the source on 8 x 256
held-out tokens:

    mixed       2, 3 and 4 bits for all, the super experts in 16; widths of 2, 3, 4 and 8 bits mixed
                at just the same sizes; and at budgets between
    protection  at one budget of bits per weight: super experts protected, and not (the naive twin
                has the protection's bytes for its other experts)
    random      the same budget with as many random experts of the same layers protected, five draws

Measurements are kept under --work, and the section of RESULTS.md is rewritten from all of them, so
a run can be made in parts.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import machine, write_section

from se_compress import validator
from se_compress.artifacts import (
    Check,
    CompressionPlan,
    ExpertProfile,
    ModelSource,
    RunOptions,
    from_json,
    to_json,
)
from se_compress.calibrate import draw_sequences
from se_compress.checkpoint import allocate
from se_compress.errors import RecipeError
from se_compress.execute import compress
from se_compress.export import export_config
from se_compress.headers import lay_out
from se_compress.policy import make_plan, predicted_loss
from se_compress.profiler import profile_digest, profile_experts
from se_compress.recipe import Recipe, parse_recipe
from se_compress.source import open_source
from se_compress.targets import result_slots

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tools" / "reference" / "text"
WORK = ROOT / "out" / "benchmark-policy"
CORPORA = ("austen", "factbook")
WIDTHS = [2, 3, 4, 8]
UNIFORM = (3, 2, 4)
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.25)
# At these the super experts are protected, and not, and random ones are.
PROTECTION = {"smollm2-moe": (3.0, 3.5, 4.25), "smollm2-mixtral": (2.5, 3.0, 3.5)}
RANDOM = {"smollm2-moe": 3.0, "smollm2-mixtral": 2.5}
DRAWS = 5
CALIBRATION, HELD_OUT = 8, 8  # sequences that the quantiser sees, and that judge it
PARTS = ("mixed", "protection", "random")


@dataclass(frozen=True)
class Model:
    """A reference model with its profile and the source's side of every comparison."""

    name: str
    source: ModelSource
    profile: ExpertProfile
    calibration: list[list[int]]
    original: validator.Original
    work: Path


def recipe_for(name: str, **policy: Any) -> Recipe:
    files = {
        part: [str(TEXT / f"{c}-{part}.txt") for c in CORPORA]
        for part in ("calibration", "held-out")
    }
    return parse_recipe(
        {
            "model": str(ROOT / "models" / name),
            "output": "unused",
            "target": "gptqmodel",
            "calibration": {"data": files["calibration"], "samples": 32, "sequence_length": 256},
            "validation": {
                "data": files["held-out"],
                "samples": HELD_OUT,
                "sequence_length": 256,
                "generation": {"tokens": 0},
                "massive_activation_ratio": 0.0,  # a bad result is measured, and not given up
                "sink_decay": 1.0,
            },
            "policy": policy,
            "quantization": {"method": "gptq", "group_size": 64},
        },
        "benchmark",
    )


def profile_of(
    name: str, source: ModelSource, calibration: list[list[int]], work: Path
) -> ExpertProfile:
    """The profile kept under `work`, made if there is none that fits."""
    recipe, file = recipe_for(name), work / f"{name}-profile.json"
    profile = from_json(ExpertProfile, file.read_text(), str(file)) if file.exists() else None
    if profile is None or profile.digest != profile_digest(source, calibration, recipe):
        profile = profile_experts(source, calibration, recipe, RunOptions())
        file.write_text(to_json(profile))
    return profile


def open_model(name: str, work: Path) -> Model:
    recipe = recipe_for(name)
    source = open_source(recipe.model)
    calibration = draw_sequences(recipe.calibration, source.path, "calibration")
    held_out = draw_sequences(recipe.validation, source.path, "validation")
    profile = profile_of(name, source, calibration, work)
    original = validator.Original(source, held_out, recipe, RunOptions(), keep=True)
    return Model(name, source, profile, calibration, original, work)


def judge(model: Model, recipe: Recipe, plan: CompressionPlan) -> dict[str, Any]:
    """Write the checkpoint and read it back. Loading it through an engine is for the tests."""
    directory = model.work / "checkpoint"
    layout = lay_out(result_slots(model.source, plan), directory, 10**10)
    allocate(layout)
    tokens = model.calibration[:: len(model.calibration) // CALIBRATION]
    records = compress(model.source, plan, tokens, recipe, layout, RunOptions())
    export_config(model.source, plan, directory)
    report = validator.validate(
        model.source,
        plan,
        directory,
        model.original.tokens,
        records,
        recipe,
        RunOptions(),
        model.original,
    )
    return {check.name: check.value for check in report.checks} | {
        "perplexity": report.perplexity_result,
        "perplexity_source": report.perplexity_source,
        "size": report.size_bytes,
        "bits": plan.bits_per_weight,
        "predicted": predicted_loss(plan, model.profile),
    }


# ---------------------------------------------------------------------------------------- the plans


def policies(model: Model, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and policy of each checkpoint of a part of the benchmark."""
    if part == "mixed":
        for bits in UNIFORM:
            recipe = recipe_for(model.name, bits=bits)
            size = make_plan(model.source, model.profile, recipe).size_bytes
            yield f"{bits} bits for all", {"bits": bits}
            yield f"mixed, the size of {bits} bits", {"bits": WIDTHS, "size": size}
        for budget in BUDGETS:
            yield f"mixed, {budget} bits per weight", _budget(budget)
    if part == "protection":
        for budget in PROTECTION[model.name]:
            yield f"{budget} bits per weight, protected", _budget(budget)
            yield f"{budget} bits per weight, naive", _budget(budget) | {"protect": "none"}
    if part == "random":
        budget = RANDOM[model.name]
        for draw in range(DRAWS):
            chosen = _random_experts(model, draw)
            yield f"{budget} bits per weight, draw {draw}", _budget(budget) | {"protect": chosen}


def _budget(bits_per_weight: float) -> dict[str, Any]:
    return {"bits": WIDTHS, "bits_per_weight": bits_per_weight}


def _random_experts(model: Model, draw: int) -> list[dict[str, int]]:
    """As many others of the super experts' layers."""
    supers = {expert.id for expert in model.profile.super_experts}
    dice = random.Random(draw)
    chosen: list[dict[str, int]] = []
    for layer in sorted({identity.layer for identity in supers}):
        there = {identity.expert for identity in supers if identity.layer == layer}
        others = [e for e in range(model.source.expert_count) if e not in there]
        chosen += [{"layer": layer, "expert": e} for e in dice.sample(others, len(there))]
    return chosen


def measure(
    model: Model, part: str, known: dict[str, dict[str, Any]], keep: Callable[[], None]
) -> None:
    """Add what is not known yet. Equal policies of several parts are measured once."""
    measured = {json.dumps(row["policy"], sort_keys=True): row for row in known.values()}
    for name, policy in policies(model, part):
        key = json.dumps(policy, sort_keys=True)
        recipe = recipe_for(model.name, **policy)
        try:
            plan = make_plan(model.source, model.profile, recipe)
        except RecipeError as error:
            known[f"{part}: {name}"] = {"policy": policy, "impossible": str(error)}
            continue
        if key not in measured:
            measured[key] = judge(model, recipe, plan)
        known[f"{part}: {name}"] = measured[key] | {"policy": policy}
        keep()
        print(model.name, part, name, json.dumps(known[f"{part}: {name}"]), flush=True)


# -------------------------------------------------------------------------------------------- table

COLUMNS: Mapping[str, tuple[str, str]] = {
    "size": ("bytes", "{:,}"),
    "bits": ("bits per weight", "{:.3f}"),
    "predicted": ("predicted loss", "{:.4g}"),
    "kl_divergence": ("KL", "{:.4f}"),
    "perplexity": ("PPL", "{:.2f}"),
    "massive_activation_ratio": ("massive activation kept", "{:.4f}"),
    "sink_decay": ("sink decay", "{:.4f}"),
    "router_agreement": ("router agreement", "{:.3f}"),
}
TITLES = {
    "mixed": "widths mixed against one width",
    "protection": "super experts protected, and not, at one budget",
    "random": "random experts of the same layers protected instead",
}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"| {' | '.join(['', *(title for title, _ in COLUMNS.values())])} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for name, row in rows.items():
        if "impossible" in row:
            least = row["impossible"].partition(", but ")[2].partition(" is the least")[0]
            lines.append(
                f"| {name} | impossible, the least is {least} |{' |' * (len(COLUMNS) - 1)}"
            )
            continue
        cells = [
            pattern.format(row[key]) if row.get(key) is not None else "-"
            for key, (_, pattern) in COLUMNS.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = [
        "## Widths and protection",
        "",
        f"`python benchmarks/policy.py`, {machine()}. GPTQ, groups of 64, {CALIBRATION} x 256"
        f" calibration and {HELD_OUT} x 256 held-out tokens.",
    ]
    for name, known in measured.items():
        for part in PARTS:
            rows = {k.partition(": ")[2]: v for k, v in known.items() if k.startswith(f"{part}: ")}
            if rows:
                lines += ["", f"### {name}: {TITLES[part]}", "", table(rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="smollm2-moe,smollm2-mixtral")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--work", type=Path, default=WORK)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    saved = arguments.work / "measured.json"
    measured = json.loads(saved.read_text()) if saved.exists() else {}
    # The engine's own load is not what is compared here, and takes longer than the rest.
    not_run = Check("reload", None, None, None, "not run in this benchmark")
    validator._reload = lambda *_: not_run  # type: ignore[assignment]

    def keep() -> None:
        saved.write_text(json.dumps(measured, indent=1))
        write_section("policy", section(measured))

    for name in arguments.models.split(","):
        model = open_model(name, arguments.work)
        for part in (arguments.only,) if arguments.only else PARTS:
            measure(model, part, measured.setdefault(name, {}), keep)


if __name__ == "__main__":
    main()
