"""What repairing a pruned or merged model, and training its routers and norms on the source's
predictions, brings back.

    python benchmarks/distilled.py [--models smollm2-moe,smollm2-mixtral] [--only PART]

Each checkpoint is planned from one profile, written in the source's precision from 32 x 256
calibration tokens, and judged by the validator on held-out text (8 x 256 tokens; four greedy
continuations of 24 tokens), without `policy.repair` and with it:

    prune-25, prune-50   so many percent of the experts by REAP
    merge-25, merge-50   the same number, merged by their outputs; its profile takes longer, for the
                         similarities
    ...-distilled        the same, trained

Measurements are kept under --work, and the section of RESULTS.md is rewritten from all of them, so
a run can be made in parts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reference import ROOT, Columns, Model, begin, cells, judge, open_model, recipe_of
from results import machine, write_section

from se_compress.planning.policy import make_plan
from se_compress.recipe import Distill, Recipe

WORK = ROOT / "out" / "benchmark-distilled"
SURGERY = ("prune-25", "prune-50", "merge-25", "merge-50")
PARTS = tuple(f"{part}{more}" for part in SURGERY for more in ("", "-distilled"))
# Two sequences a step, so that each of the 26 that tune is seen six times.
RULE = Distill(steps=78, sequences=2)


def recipe_for(name: str, **policy: Any) -> Recipe:
    return recipe_of(
        name,
        {"generation": {"tokens": 24}, "early_stop": False},
        target="transformers",
        super_experts={"confirm": False},
        policy=policy,
        quantization={"method": "none"},
    )


def measure(model: Model, part: str) -> Iterator[dict[str, Any]]:
    surgery, percent, *distilled = part.split("-")
    for repair in (False, True):
        policy = {surgery: {"fraction": int(percent) / 100}, "repair": repair}
        recipe = recipe_for(model.name, **policy)
        plan = make_plan(model.source, model.profile, recipe)
        if distilled:
            recipe = recipe.model_copy(update={"distill": RULE})
        row = {"name": ", ".join([f"{surgery} {percent} %", *["repaired"] * repair, *distilled])}
        row |= judge(model, recipe, plan, model.calibration)
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
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ["", "MB", *(title for title, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---|' * (len(heads) - 1)}"]
    for row in rows:
        values = [row["name"], f"{row['size'] / 1e6:.1f}", *cells(row, COLUMNS)]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def section(measured: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    lines = [
        "## Repaired and distilled after pruning and merging",
        "",
        f"`python benchmarks/distilled.py`, {machine()}. {RULE.steps} steps of {RULE.sequences}"
        " sequences of the 32 x 256 calibration tokens; 8 x 256 held-out tokens; repetition is"
        " result minus source.",
    ]
    for name, parts in measured.items():
        rows = [row for part in PARTS for row in parts.get(part, ())]
        if rows:
            source = rows[0]["perplexity_source"]
            lines += ["", f"### {name} (PPL {source:.2f})", "", table(rows)]
    return "\n".join(lines)


def main() -> None:
    arguments, saved, measured = begin(__doc__, PARTS, WORK)
    parts = [arguments.only] if arguments.only else PARTS
    merges = any(part.startswith("merge") for part in parts)
    policy = {"merge": {"fraction": 0.5}} if merges else {}
    for name in arguments.models.split(","):
        model = open_model(name, recipe_for(name, **policy), arguments.work)
        for part in parts:
            rows = measured.setdefault(name, {})[part] = []
            for row in measure(model, part):
                rows.append(row)
                saved.write_text(json.dumps(measured, indent=1))
                write_section("distilled", section(measured))


if __name__ == "__main__":
    main()
