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

import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reference import (
    HELD_OUT,
    ROOT,
    Columns,
    Model,
    begin,
    cells,
    judge,
    leave_out_reload,
    open_model,
    recipe_of,
)
from results import machine, write_section

from se_compress.errors import RecipeError
from se_compress.policy import make_plan, predicted_loss
from se_compress.recipe import Recipe

WORK = ROOT / "out" / "benchmark-policy"
WIDTHS = [2, 3, 4, 8]
UNIFORM = (3, 2, 4)
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.25)
# At these the super experts are protected, and not, and random ones are.
PROTECTION = {"smollm2-moe": (3.0, 3.5, 4.25), "smollm2-mixtral": (2.5, 3.0, 3.5)}
RANDOM = {"smollm2-moe": 3.0, "smollm2-mixtral": 2.5}
DRAWS = 5
CALIBRATION = 8  # sequences that the quantiser sees
PARTS = ("mixed", "protection", "random")


def recipe_for(name: str, **policy: Any) -> Recipe:
    return recipe_of(
        name,
        {
            "generation": {"tokens": 0},
            "massive_activation_ratio": 0.0,  # a bad result is measured, and not given up
            "sink_decay": 1.0,
        },
        target="gptqmodel",
        policy=policy,
        quantization={"method": "gptq", "group_size": 64},
    )


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
            tokens = model.calibration[:: len(model.calibration) // CALIBRATION]
            measured[key] = judge(model, recipe, plan, tokens) | {
                "bits": plan.bits_per_weight,
                "predicted": predicted_loss(plan, model.profile),
            }
        known[f"{part}: {name}"] = measured[key] | {"policy": policy}
        keep()
        print(model.name, part, name, json.dumps(known[f"{part}: {name}"]), flush=True)


# -------------------------------------------------------------------------------------------- table

COLUMNS: Columns = {
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
        lines.append(f"| {name} | {' | '.join(cells(row, COLUMNS))} |")
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
    arguments, saved, measured = begin(__doc__, PARTS, WORK)
    leave_out_reload()

    def keep() -> None:
        saved.write_text(json.dumps(measured, indent=1))
        write_section("policy", section(measured))

    for name in arguments.models.split(","):
        model = open_model(name, recipe_for(name), arguments.work)
        for part in (arguments.only,) if arguments.only else PARTS:
            measure(model, part, measured.setdefault(name, {}), keep)


if __name__ == "__main__":
    main()
