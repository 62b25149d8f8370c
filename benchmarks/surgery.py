"""What pruning and merging cost, and what super experts have to do with it.

    python benchmarks/surgery.py [--models smollm2-moe,smollm2-mixtral] [--only PART]

Each checkpoint is planned from one profile, written in the source's precision, and judged by the
validator on held-out text (8 x 256 tokens; four greedy continuations of 24 tokens):

    prune   12.5, 25 and 50 % of the experts by each score; where the score would take a super
            expert, protected and naive side by side
    limit   the least number of experts at which a score would take a super expert: protected,
            naive, and as many random experts of the same layers protected instead, five draws
    merge   the same number of experts, merged by their outputs
    random  the super experts' outputs set to zero, and those of as many random experts of the same
            layers, five draws
    auto    for a size, every split between pruning and widths: predicted loss and measured KL

Measurements are kept under --work, and the section of RESULTS.md is rewritten from all of them, so
a run can be made in parts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reference import (
    ROOT,
    Columns,
    Model,
    begin,
    cells,
    judge,
    open_model,
    random_experts,
    recipe_of,
)
from results import machine, write_section

from se_compress.artifacts import CompressionPlan
from se_compress.errors import RecipeError
from se_compress.planning.policy import make_plan, predicted_loss
from se_compress.recipe import Recipe

WORK = ROOT / "out" / "benchmark-surgery"
FRACTIONS = (0.125, 0.25, 0.5)
SCORES = ("reap", "frequency", "gate")
DRAWS = 5
# Of the source's size, so that widths alone, pruning alone and both can meet it.
AUTO_SIZES = {"smollm2-moe": 0.70, "smollm2-mixtral": 0.545}
AUTO_BITS = [2, 3, 4]
PARTS = ("prune", "limit", "merge", "auto", "random")


def recipe_for(name: str, quantized: bool = False, **policy: Any) -> Recipe:
    return recipe_of(
        name,
        {"generation": {"tokens": 24}, "early_stop": False},
        target="gptqmodel" if quantized else "transformers",
        super_experts={"confirm": False},
        policy=policy,
        quantization={"method": "gptq", "group_size": 64} if quantized else {"method": "none"},
    )


def plans(model: Model, part: str) -> Iterator[tuple[str, Recipe, CompressionPlan]]:
    """Name, recipe and plan of each checkpoint of a part of the benchmark."""
    if part == "auto":
        yield from _splits(model)
        return
    for name, policy in _limits(model) if part == "limit" else _policies(part):
        recipe = recipe_for(model.name, **policy)
        try:
            plan = make_plan(model.source, model.profile, recipe)
        except RecipeError as error:
            print(f"{model.name}: {name}: {error}")
            continue
        if policy.get("protect") == "none" and not _takes_super_experts(model, plan):
            continue  # the score spares them of itself: the same plan as the protected one
        yield name, recipe, plan


def _policies(part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if part == "prune":
        for score in SCORES:
            for fraction in FRACTIONS:
                rule = {"fraction": fraction, "score": score}
                yield f"prune {fraction:.1%}, {score}, protected", {"prune": rule}
                yield f"prune {fraction:.1%}, {score}, naive", {"prune": rule, "protect": "none"}
    if part == "merge":
        for fraction in FRACTIONS:
            yield f"merge {fraction:.1%}", {"merge": {"fraction": fraction}}
    if part == "random":
        yield "super experts zeroed", {"zero": "super-experts"}
        for seed in range(DRAWS):
            yield f"random experts zeroed, draw {seed}", {"zero": "random", "zero_seed": seed}


def _limits(model: Model) -> Iterator[tuple[str, dict[str, Any]]]:
    count = model.source.expert_count
    for score in SCORES:
        for gone in range(1, count):
            rule = {"fraction": gone / count, "score": score}
            naive = {"prune": rule, "protect": "none"}
            plan = make_plan(model.source, model.profile, recipe_for(model.name, **naive))
            if not _takes_super_experts(model, plan):
                continue
            name = f"prune {gone} of {count}, {score}"
            yield f"{name}, protected", {"prune": rule}
            yield f"{name}, naive", naive
            for draw in range(DRAWS):
                others = {"prune": rule, "protect": random_experts(model, draw)}
                yield f"{name}, others protected, draw {draw}", others
            break


def _takes_super_experts(model: Model, plan: CompressionPlan) -> bool:
    return any(plan.by_id[e.id].action == "prune" for e in model.profile.super_experts)


def _splits(model: Model) -> Iterator[tuple[str, Recipe, CompressionPlan]]:
    size = int(AUTO_SIZES[model.name] * model.source.size_bytes)
    budget = {"bits": AUTO_BITS, "size": size}
    chosen = recipe_for(model.name, True, prune={"fraction": "auto"}, **budget)
    best = make_plan(model.source, model.profile, chosen)
    for count in range(model.source.expert_count):
        rule = {"prune": {"fraction": count / model.source.expert_count}} if count else {}
        recipe = recipe_for(model.name, True, **rule, **budget)
        try:
            plan = make_plan(model.source, model.profile, recipe)
        except RecipeError:
            continue
        mark = ", chosen by auto" if plan.experts == best.experts else ""
        if not mark and (count > model.source.expert_count // 2 or count % 4):
            continue
        yield f"{count} of {model.source.expert_count} experts pruned{mark}", recipe, plan


def measure(model: Model, part: str) -> Iterator[dict[str, Any]]:
    supers = {expert.id for expert in model.profile.super_experts}
    for name, recipe, plan in plans(model, part):
        quantized = recipe.quantization.method != "none"
        tokens = model.calibration if quantized else model.calibration[:1]
        gone = {d.id for d in plan.experts if d.action in ("prune", "zero")}
        row = {"name": name} | judge(model, recipe, plan, tokens)
        row["super_experts_gone"] = len(supers & gone)
        if part == "auto":
            row["predicted"] = predicted_loss(plan, model.profile)
            row["bits"] = plan.bits_per_weight
        print(json.dumps(row), flush=True)
        yield row


# -------------------------------------------------------------------------------------------- table

COLUMNS: Columns = {
    "kl_divergence": ("KL", "{:.4f}"),
    "perplexity": ("PPL", "{:.2f}"),
    "massive_activation_ratio": ("massive activation kept", "{:.3f}"),
    "sink_decay": ("sink decay", "{:.3f}"),
    "router_agreement": ("router agreement", "{:.2f}"),
    "repetition": ("repetition", "{:+.3f}"),
    "loops": ("loops", "{:+.2f}"),
}
TITLES = {
    "prune": "Pruned by a score",
    "limit": "Pruned until a score takes a super expert",
    "merge": "Merged by outputs",
    "random": "Outputs set to zero (the experiment of arXiv:2507.23279)",
    "auto": "One size, split between pruning and widths",
}


def table(part: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = dict(COLUMNS)
    if part == "auto":
        columns = {
            "bits": ("bits per weight left", "{:.2f}"),
            "predicted": ("predicted loss", "{:.4g}"),
            **columns,
        }
    heads = ["", "MB", *(title for title, _ in columns.values())]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---|' * (len(heads) - 1)}"]
    for row in rows:
        lost = f" ({row['super_experts_gone']} super)" if row["super_experts_gone"] else ""
        lines.append(
            f"| {row['name']}{lost} | {row['size'] / 1e6:.1f} | {' | '.join(cells(row, columns))} |"
        )
    return "\n".join(lines)


def section(measured: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    lines = [
        "## Pruning and merging",
        "",
        f"`python benchmarks/surgery.py`, {machine()}. 8 x 256 held-out tokens; repetition and"
        ' loops are result minus source. "(n super)": super experts that are gone.',
    ]
    for name, parts in measured.items():
        for part, rows in ((part, rows) for part, rows in parts.items() if rows):
            source = rows[0]["perplexity_source"]
            lines += ["", f"### {name} (PPL {source:.2f}): {TITLES[part]}", "", table(part, rows)]
    return "\n".join(lines)


def main() -> None:
    arguments, saved, measured = begin(__doc__, PARTS, WORK)
    for name in arguments.models.split(","):
        model = open_model(name, recipe_for(name, merge={"fraction": 0.5}), arguments.work)
        for part in [arguments.only] if arguments.only else PARTS:
            rows = measured.setdefault(name, {})[part] = []
            for row in measure(model, part):
                rows.append(row)
                saved.write_text(json.dumps(measured, indent=1))
                write_section("surgery", section(measured))


if __name__ == "__main__":
    main()
