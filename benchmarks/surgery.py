"""What pruning and merging cost, and what super experts have to do with it.

    python benchmarks/surgery.py [--models smollm2-moe,smollm2-mixtral] [--only PART]

Each checkpoint is planned from one profile, written in the source's precision, and judged by the
validator on held-out text (8 x 256 tokens; four greedy continuations of 24 tokens):

    prune   12.5, 25 and 50 % of the experts by each score; where the score would take a super
            expert, protected and naive side by side
    merge   the same number of experts, merged by their outputs
    random  the super experts' outputs set to zero, and those of as many random experts of the same
            layers, five draws
    auto    for a size, every split between pruning and widths: predicted loss and measured KL

Measurements are kept under --work, and the section of RESULTS.md is rewritten from all of them, so
a run can be made in parts.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
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
from se_compress.surgery import shrink
from se_compress.targets import result_slots

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tools" / "reference" / "text"
CORPORA = ("austen", "factbook")
FRACTIONS = (0.125, 0.25, 0.5)
SCORES = ("reap", "frequency", "gate")
DRAWS = 5
# Of the source's size, so that widths alone, pruning alone and both can meet it.
AUTO_SIZES = {"smollm2-moe": 0.70, "smollm2-mixtral": 0.545}
AUTO_BITS = [2, 3, 4]
PARTS = ("prune", "merge", "auto", "random")


@dataclass(frozen=True)
class Model:
    """A reference model with its profile and the source's side of every comparison."""

    name: str
    source: ModelSource
    profile: ExpertProfile
    calibration: list[list[int]]
    original: validator.Original
    work: Path


def recipe_for(name: str, quantized: bool = False, **policy: Any) -> Recipe:
    files = {
        part: [str(TEXT / f"{c}-{part}.txt") for c in CORPORA]
        for part in ("calibration", "held-out")
    }
    method = {"method": "gptq", "group_size": 64} if quantized else {"method": "none"}
    return parse_recipe(
        {
            "model": str(ROOT / "models" / name),
            "output": "unused",
            "target": "gptqmodel" if quantized else "transformers",
            "calibration": {"data": files["calibration"], "samples": 32, "sequence_length": 256},
            "validation": {
                "data": files["held-out"],
                "samples": 8,
                "sequence_length": 256,
                "generation": {"tokens": 24},
                "early_stop": False,
            },
            "super_experts": {"confirm": False},
            "policy": policy,
            "quantization": method,
        },
        "benchmark",
    )


def open_model(name: str, work: Path) -> Model:
    recipe = recipe_for(name, merge={"fraction": 0.5})
    source = open_source(recipe.model)
    calibration = draw_sequences(recipe.calibration, source.path, "calibration")
    held_out = draw_sequences(recipe.validation, source.path, "validation")
    file = work / f"{name}-profile.json"
    profile = from_json(ExpertProfile, file.read_text(), str(file)) if file.exists() else None
    if profile is None or profile.digest != profile_digest(source, calibration, recipe):
        profile = profile_experts(source, calibration, recipe, RunOptions())
        file.write_text(to_json(profile))
    original = validator.Original(source, held_out, recipe, RunOptions(), keep=True)
    return Model(name, source, profile, calibration, original, work)


def judge(model: Model, recipe: Recipe, plan: CompressionPlan) -> dict[str, Any]:
    """Write the checkpoint and read it back. Loading it through an engine is for the tests."""
    directory = model.work / "checkpoint"
    small = shrink(model.source, plan)
    layout = lay_out(result_slots(small.source, small.plan), directory, 10**10)
    allocate(layout)
    quantized = recipe.quantization.method != "none"
    tokens = model.calibration if quantized else model.calibration[:1]
    records = compress(model.source, plan, tokens, recipe, layout, RunOptions())
    export_config(small.source, small.plan, directory)
    held_out = model.original.tokens
    report = validator.validate(
        model.source, plan, directory, held_out, records, recipe, RunOptions(), model.original
    )
    checks = {check.name: check.value for check in report.checks}
    supers = {expert.id for expert in model.profile.super_experts}
    gone = {d.id for d in plan.experts if d.action in ("prune", "zero")}
    return checks | {
        "perplexity": report.perplexity_result,
        "perplexity_source": report.perplexity_source,
        "size": plan.size_bytes,
        "super_experts_gone": len(supers & gone),
    }


def plans(model: Model, part: str) -> Iterator[tuple[str, Recipe, CompressionPlan]]:
    """Name, recipe and plan of each checkpoint of a part of the benchmark."""
    if part == "auto":
        yield from _splits(model)
        return
    for name, policy in _policies(part):
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
    for name, recipe, plan in plans(model, part):
        row = {"name": name} | judge(model, recipe, plan)
        if part == "auto":
            row["predicted"] = predicted_loss(plan, model.profile)
            row["bits"] = plan.bits_per_weight
        print(json.dumps(row), flush=True)
        yield row


# -------------------------------------------------------------------------------------------- table

COLUMNS: Mapping[str, tuple[str, str]] = {
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
        cells = [
            pattern.format(row[key]) if row.get(key) is not None else "-"
            for key, (_, pattern) in columns.items()
        ]
        lost = f" ({row['super_experts_gone']} super)" if row["super_experts_gone"] else ""
        lines.append(f"| {row['name']}{lost} | {row['size'] / 1e6:.1f} | {' | '.join(cells)} |")
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="smollm2-moe,smollm2-mixtral")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "benchmark-surgery")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    saved = arguments.work / "measured.json"
    measured = json.loads(saved.read_text()) if saved.exists() else {}
    # The engine's own load is not what is compared here, and takes longer than the rest.
    not_run = Check("reload", None, None, None, "not run in this benchmark")
    validator._reload = lambda *_: not_run  # type: ignore[assignment]
    for name in arguments.models.split(","):
        model = open_model(name, arguments.work)
        for part in [arguments.only] if arguments.only else PARTS:
            rows = measured.setdefault(name, {})[part] = []
            for row in measure(model, part):
                rows.append(row)
                saved.write_text(json.dumps(measured, indent=1))
                write_section("surgery", section(measured))


if __name__ == "__main__":
    main()
