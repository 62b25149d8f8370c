"""What mixed widths and protection are worth, at equal size.

    python benchmarks/policy.py [--models smollm2-moe,smollm2-mixtral] [--only PART]

Each checkpoint is planned from one profile, quantised with GPTQ in groups of 64 (8 x 256
calibration tokens of the profile's 32 x 256), read back and compared with the source on 8 x 256
held-out tokens:

    mixed       2, 3 and 4 bits for all, the super experts in 16; widths of 2, 3, 4 and 8 bits mixed
                at just the same sizes; and at budgets between
    inverted    the mixtures of the sizes of 3 and 4 bits turned over: as many of each width, but
                the most to what the profile predicts to lose least; a control, as a ranking that
                says nothing would beat one width no less than its inverse does
    protection  at one budget of bits per weight: super experts protected, and not (the naive twin
                has the protection's bytes for its other experts); four continuations of 24 tokens
    random      the same budget with as many random experts of the same layers protected, five draws

A GPTQ file spends 32 / rows bits per weight on g_idx, which these small experts feel: budgets below
its least are met in auto-round's packing, and 2.25 bits with one scale per row.

Measurements are kept under --work, and the section of RESULTS.md is rewritten from all of them, so
a run can be made in parts.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from reference import (
    HELD_OUT,
    ROOT,
    Columns,
    Model,
    begin,
    cells,
    judge,
    open_model,
    random_experts,
    recipe_of,
    rows_by_part,
)
from results import machine, write_section
from scipy.stats import spearmanr

from se_compress.artifacts import (
    PROJECTION_GROUPS,
    CompressionPlan,
    ExpertId,
    ExpertProfile,
    ProjectionGroup,
)
from se_compress.errors import RecipeError
from se_compress.planning.policy import make_plan, predicted_loss
from se_compress.recipe import Recipe

WORK = ROOT / "out" / "benchmark-policy"
WIDTHS = [2, 3, 4, 8]
UNIFORM = (3, 2, 4)
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.25)
# At these the super experts are protected, and not, and at one of them random ones are.
PROTECTION = {"smollm2-moe": (2.5, 3.0, 3.5, 4.25), "smollm2-mixtral": (2.5, 3.0, 3.5, 4.25)}
RANDOM = {"smollm2-moe": 3.0, "smollm2-mixtral": 2.5}
EIGHT = 3.0  # up to this budget, protection at 8 bits in place of 16 is measured as well
DRAWS = 5
CALIBRATION = 8  # sequences that the quantiser sees
CONTINUED = 24  # tokens of a continuation
INVERTED = (3, 4)  # at the sizes of these
RANKED_AT = 3  # bits at which units are ranked by what they are predicted to lose
PARTS = ("mixed", "inverted", "protection", "random")
FORMS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    ", auto-round": {"target": "transformers"},
    ", auto-round, a scale per row": {"target": "transformers", "group_size": -1},
}


@dataclass(frozen=True)
class Setting:
    """How a checkpoint is made and judged: files by their target, groups, tokens to continue by,
    and whether its widths are turned over."""

    policy: Mapping[str, Any]
    target: str = "gptqmodel"
    group_size: int = 64
    continued: int = 0
    inverted: bool = False

    @property
    def key(self) -> str:
        parts = {k: v for k, v in asdict(self).items() if k != "inverted" or v}
        return json.dumps(parts, sort_keys=True)


def recipe_for(name: str, setting: Setting) -> Recipe:
    return recipe_of(
        name,
        {
            "generation": {"tokens": setting.continued},
            "massive_activation_ratio": 0.0,  # a bad result is measured, and not given up
            "sink_decay": 1.0,
        },
        target=setting.target,
        policy=setting.policy,
        quantization={"method": "gptq", "group_size": setting.group_size},
    )


# ---------------------------------------------------------------------------------------- the plans


def settings(model: Model, part: str) -> Iterator[tuple[str, Setting]]:
    """Name and setting of each checkpoint of a part of the benchmark."""
    if part == "mixed":
        for bits in UNIFORM:
            yield f"{bits} bits for all", Setting({"bits": bits})
            yield f"mixed, the size of {bits} bits", Setting(_mixed(model, bits))
        for budget in BUDGETS:
            yield _budget(model, budget)
        yield "2 bits for all, auto-round", Setting({"bits": 2}, "transformers")
    if part == "inverted":
        for bits in INVERTED:
            yield f"{bits} bits for all", Setting({"bits": bits})
            yield f"mixed, the size of {bits} bits", Setting(_mixed(model, bits))
            turned = Setting(_mixed(model, bits), inverted=True)
            yield f"the same, inverted, the size of {bits} bits", turned
    if part == "protection":
        for budget in PROTECTION[model.name]:
            yield _budget(model, budget, ", protected", continued=CONTINUED)
            if budget <= EIGHT:
                eight = {"protected_bits": 8}
                yield _budget(model, budget, ", protected at 8 bits", eight, continued=CONTINUED)
            yield _budget(model, budget, ", naive", {"protect": "none"}, continued=CONTINUED)
    if part == "random":
        for draw in range(DRAWS):
            chosen = {"protect": random_experts(model, draw)}
            budget = RANDOM[model.name]
            yield _budget(model, budget, f", draw {draw}", chosen, continued=CONTINUED)


def _mixed(model: Model, bits: int) -> dict[str, Any]:
    """The policy of a mixture that has the size of one width for all."""
    plan = make_plan(model.source, model.profile, recipe_for(model.name, Setting({"bits": bits})))
    return {"bits": WIDTHS, "size": plan.size_bytes}


def inverted(plan: CompressionPlan, profile: ExpertProfile) -> CompressionPlan:
    """The same number of experts at each width, for gate and up and for down, but in the reverse
    order of what they are predicted to lose; to the byte as large, for all experts are."""
    turned = {decision.id: decision for decision in plan.experts}
    free = [d for d in plan.experts if d.action == "quantize" and isinstance(d.expert, int)]
    widths = {d.id: {group: d.bits_of(roles[0]) for group, roles in PROJECTION_GROUPS.items()}
              for d in free}  # fmt: skip
    for group in PROJECTION_GROUPS:
        ranked = sorted(free, key=lambda d: (loss_of(profile, d.id, group), d.id))
        most_first = sorted((widths[d.id][group] for d in free), reverse=True)
        for decision, bits in zip(ranked, most_first, strict=True):
            widths[decision.id][group] = bits
    for decision in free:
        bits, down = widths[decision.id]["gate_up"], widths[decision.id]["down"]
        other = down if down != bits else None
        turned[decision.id] = replace(
            decision, bits=bits, down_bits=other, reason="inverted, as a control"
        )
    return replace(plan, experts=tuple(turned.values()))


def loss_of(profile: ExpertProfile, identity: ExpertId, group: ProjectionGroup) -> float:
    return profile.by_id[identity].loss_of(group, RANKED_AT)


def rises_with_depth(profile: ExpertProfile) -> float:
    """Spearman's correlation of a layer's predicted loss, its experts' sum, with its index.

    A score that only rises with depth is that of the hidden states' norm.
    """
    totals: dict[int, float] = {}
    for stats in profile.experts:
        if stats.expert != "shared":
            loss = sum(stats.loss_of(group, RANKED_AT) for group in PROJECTION_GROUPS)
            totals[stats.layer] = totals.get(stats.layer, 0.0) + loss
    return float(spearmanr(list(totals), list(totals.values()))[0])


def _budget(
    model: Model,
    bits_per_weight: float,
    suffix: str = "",
    policy: Mapping[str, Any] = MappingProxyType({}),
    **setting: Any,
) -> tuple[str, Setting]:
    """Of the formats that can meet the budget under protection, the first."""
    name = f"{bits_per_weight} bits per weight"
    protected = {"bits": WIDTHS, "bits_per_weight": bits_per_weight}
    for form, parts in FORMS.items():
        try:
            recipe = recipe_for(model.name, Setting(protected, **parts))
            make_plan(model.source, model.profile, recipe)
        except RecipeError:
            continue
        return f"{name}{form}{suffix}", Setting({**protected, **policy}, **parts, **setting)
    raise SystemExit(f"{name}: none of the formats can meet that for {model.name}")


def measure(
    model: Model, part: str, known: dict[str, dict[str, Any]], keep: Callable[[], None]
) -> None:
    """Add what is not known yet. Equal settings of several parts are measured once."""
    measured = {row["setting"]: row for row in known.values()}
    for key in [key for key in known if key.startswith(f"{part}: ")]:
        del known[key]
    for name, setting in settings(model, part):
        if setting.key not in measured:
            recipe = recipe_for(model.name, setting)
            plan = make_plan(model.source, model.profile, recipe)
            if setting.inverted:
                plan = inverted(plan, model.profile)
            tokens = model.calibration[:: len(model.calibration) // CALIBRATION]
            measured[setting.key] = judge(model, recipe, plan, tokens) | {
                "bits": plan.bits_per_weight,
                "predicted": predicted_loss(plan, model.profile),
                "setting": setting.key,
            }
            if part == "inverted":
                measured[setting.key]["rises"] = rises_with_depth(model.profile)
            print(model.name, part, name, json.dumps(measured[setting.key]), flush=True)
        known[f"{part}: {name}"] = measured[setting.key]
        keep()


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
    "repetition": ("repetition", "{:+.3f}"),
    "loops": ("loops", "{:+.2f}"),
}
TITLES = {
    "mixed": "widths mixed against one width",
    "inverted": "a mixture against one width and its own inverse",
    "protection": "super experts protected, and not, at one budget",
    "random": "random experts of the same layers protected instead",
}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"| {' | '.join(['', *(title for title, _ in COLUMNS.values())])} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(f"| {name} | {' | '.join(cells(row, COLUMNS))} |" for name, row in rows.items()),
    ]
    return "\n".join(lines)


def section(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = [
        "## Widths and protection",
        "",
        f"`python benchmarks/policy.py`, {machine()}. GPTQ, groups of 64, {CALIBRATION} x 256"
        f" calibration and {HELD_OUT} x 256 held-out tokens; repetition and loops are result minus"
        " source. A file is GPTQ unless its name says otherwise.",
    ]
    for name, part, rows in rows_by_part(measured, PARTS):
        lines += ["", f"### {name}: {TITLES[part]}", "", table(rows)]
        rises = [row["rises"] for row in rows.values() if "rises" in row]
        if rises:
            lines += ["", f"The predicted loss of a layer and its depth: Spearman {rises[0]:+.2f}."]
    return "\n".join(lines)


def main() -> None:
    arguments, saved, measured = begin(__doc__, PARTS, WORK)

    def keep() -> None:
        saved.write_text(json.dumps(measured, indent=1))
        write_section("policy", section(measured))

    for name in arguments.models.split(","):
        model = open_model(name, recipe_for(name, Setting({}, continued=CONTINUED)), arguments.work)
        for part in (arguments.only,) if arguments.only else PARTS:
            measure(model, part, measured.setdefault(name, {}), keep)


if __name__ == "__main__":
    main()
