"""What more widths are worth where every layer has one, and what it costs that it has only one.

    python benchmarks/widths.py [--models smollm2-moe] [--only PART]

Each checkpoint is planned from one profile, quantised with GPTQ in groups of 64, read back and
compared with the source on 8 x 256 held-out tokens; twice, calibrated on two draws of 8 x 256 of
the profile's 32 x 256 tokens, so that a difference can be held against what the draw does:

    widths       compressed-tensors for vLLM, the super experts at 8 bits and their layers with
                 them: a mix of 3, 4 and 8 bits at each budget, and mixes of more widths at just
                 that size
    granularity  GPTQ files of 2, 3, 4 and 8 bits at one size: a width for each projection group
                 (GPTQModel), and one for each layer (vLLM); with the super experts at 8 bits, and
                 without

Measurements are kept under --work, and the section of RESULTS.md is rewritten from all of them, so
a run can be made in parts.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from reference import ROOT, Columns, Model, begin, cells, judge, open_model, rows_by_part
from reference import recipe_of as reference_recipe
from results import machine, write_section

from se_compress.artifacts import CompressionPlan, ExpertDecision, digest_of
from se_compress.planning.policy import make_plan, predicted_loss
from se_compress.recipe import Recipe

WORK = ROOT / "out" / "benchmark-widths"
PARTS = ("widths", "granularity")
BUDGETS = {"widths": (4.5, 5.0, 4.0, 6.0), "granularity": (4.5, 3.5)}
# The first is planned at the budget; the others get its bytes.
WIDTHS = ((3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 5, 6, 8))
FEW = (2, 3, 4, 8)  # what GPTQ files hold
CALIBRATION, DRAWS = 8, 2
TITLES = {
    "widths": "more widths, one for each layer (compressed-tensors for vLLM)",
    "granularity": "a width for each projection group, or one for each layer (GPTQ files)",
}


@dataclass(frozen=True)
class Version:
    """A checkpoint of a table: what it is called there, its target, format and policy."""

    name: str
    target: str
    form: str
    policy: Mapping[str, Any]


# Its profile has the losses of every width.
PROFILED = Version("", "vllm", "compressed-tensors", {"bits": list(WIDTHS[-1])})


def recipe_for(name: str, version: Version) -> Recipe:
    return reference_recipe(
        name,
        {
            "generation": {"tokens": 0},
            "massive_activation_ratio": 0.0,  # a bad result is measured, and not given up
            "sink_decay": 1.0,
            "early_stop": False,
        },
        target=version.target,
        policy=dict(version.policy),
        quantization={"method": "gptq", "group_size": 64, "format": version.form},
    )


def versions(model: Model, part: str) -> Iterator[Version]:
    for budget in BUDGETS[part]:
        found = _of_widths(budget) if part == "widths" else _of_granularities(budget)
        first = next(found)
        plan = make_plan(model.source, model.profile, recipe_for(model.name, first))
        yield first
        for other in found:
            budgeted = {k: v for k, v in other.policy.items() if k != "bits_per_weight"}
            at_size = {**budgeted, "size": plan.size_bytes}
            yield Version(other.name, other.target, other.form, at_size)


def _of_widths(budget: float) -> Iterator[Version]:
    lifted = {"protected_bits": 8, "lift_layers": True, "bits_per_weight": budget}
    for widths in WIDTHS:
        if min(widths) + 0.25 < budget:
            name = f"{budget} bits per weight: {', '.join(map(str, widths))}"
            yield Version(name, "vllm", "compressed-tensors", {**lifted, "bits": list(widths)})


def _of_granularities(budget: float) -> Iterator[Version]:
    for target, what in (("gptqmodel", "each projection group"), ("vllm", "each layer")):
        for protected in ("super experts at 8 bits", "none protected"):
            policy: dict[str, Any] = {"bits": list(FEW), "bits_per_weight": budget}
            if protected == "none protected":
                policy["protect"] = "none"
            else:
                policy |= {"protected_bits": 8, "lift_layers": target == "vllm"}
            name = f"{budget} bits per weight: a width for {what}, {protected}"
            yield Version(name, target, "gptq", policy)


def measure(
    model: Model, part: str, known: dict[str, dict[str, Any]], keep: Callable[[], None]
) -> None:
    """Add what is not known yet, every version on the first draw before any on the second. Two
    versions with one plan are measured once."""
    measured = {row["plan"]: row for row in known.values()}
    every = len(model.calibration) // CALIBRATION
    for draw in range(DRAWS):
        for version in versions(model, part):
            recipe = recipe_for(model.name, version)
            plan = make_plan(model.source, model.profile, recipe)
            widths = [[d.bits_of(role) for role in ("gate", "down")] for d in plan.experts]
            same = digest_of(version.target, version.form, widths)
            row = measured.setdefault(same, described(model, plan) | {"plan": same})
            if len(row["draws"]) <= draw:
                made = judge(model, recipe, plan, model.calibration[draw::every])
                row["draws"].append(made["kl_divergence"])
                row["perplexities"].append(made["perplexity"])
                print(model.name, part, version.name, json.dumps(row), flush=True)
            known[f"{part}: {version.name}"] = row
            keep()


def described(model: Model, plan: CompressionPlan) -> dict[str, Any]:
    return {
        "size": plan.size_bytes,
        "bits": plan.bits_per_weight,
        "predicted": predicted_loss(plan, model.profile),
        "widths": used(plan.experts),
        "draws": [],
        "perplexities": [],
    }


def used(experts: Sequence[ExpertDecision]) -> str:
    """How many routed experts have each width, of gate and up."""
    found: dict[int, int] = {}
    for decision in experts:
        if decision.expert != "shared":
            bits = decision.bits_of("gate")
            found[bits] = found.get(bits, 0) + 1
    return ", ".join(f"{count} at {bits}" for bits, count in sorted(found.items()))


# -------------------------------------------------------------------------------------------- table

COLUMNS: Columns = {
    "size": ("bytes", "{:,}"),
    "bits": ("bits per weight", "{:.3f}"),
    "widths": ("experts", "{}"),
    "predicted": ("predicted loss", "{:.4f}"),
    "kl": ("KL, mean", "{:.4f}"),
    "each": ("KL by draw", "{}"),
    "perplexity": ("PPL", "{:.2f}"),
}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each version, and what it has of the first of its budget: loss and KL."""
    heads = ["", *(title for title, _ in COLUMNS.values()), "beside the first"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    first: dict[str, Mapping[str, Any]] = {}
    for name, row in rows.items():
        told = {
            **row,
            "kl": mean(row["draws"]),
            "perplexity": mean(row["perplexities"]),
            "each": ", ".join(f"{draw:.4f}" for draw in row["draws"]),
        }
        other = first.setdefault(name.partition(":")[0], told)
        change = "" if other is told else "the same plan"
        if other["plan"] != row["plan"]:
            loss = told["predicted"] / other["predicted"] - 1
            kl = mean(a / b for a, b in zip(row["draws"], other["draws"], strict=False)) - 1
            change = f"predicted {loss:+.0%}, KL {kl:+.1%}"
        lines.append(f"| {name} | {' | '.join(cells(told, COLUMNS))} | {change} |")
    return "\n".join(lines)


def section(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = [
        "## More widths, and one for each layer",
        "",
        f"`python benchmarks/widths.py`, {machine()}. GPTQ, groups of 64, up to {DRAWS} draws of"
        f" {CALIBRATION} x 256 calibration tokens, 8 x 256 held-out tokens. The first line of a"
        " budget is planned at it, the others at that one's bytes.",
    ]
    for name, part, rows in rows_by_part(measured, PARTS):
        lines += ["", f"### {name}: {TITLES[part]}", "", table(rows)]
    return "\n".join(lines)


def main() -> None:
    arguments, saved, measured = begin(__doc__, PARTS, WORK)

    def keep() -> None:
        saved.write_text(json.dumps(measured, indent=1))
        write_section("widths", section(measured))

    for name in arguments.models.split(","):
        model = open_model(name, recipe_for(name, PROFILED), arguments.work)
        for part in (arguments.only,) if arguments.only else PARTS:
            measure(model, part, measured.setdefault(name, {}), keep)


if __name__ == "__main__":
    main()
