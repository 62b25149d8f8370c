"""Where protection pays: conditions under which a super expert is harmed, with and without it.

    python benchmarks/protection.py [--models smollm2-moe] [--only PART]

Each part is a condition, measured on 8 x 256 held-out tokens with the super experts in 16 bits,
with as many random experts of the same layers in 16 bits instead (one draw), and with none;
widths, text and solver are the same within a part:

    gptq         3 bits, groups of 64, calibrated on 8 x 256 tokens: what the others are held
                 against
    tiny         the same, profiled and calibrated on one sequence of 64 tokens
    first-token  the same, profiled and calibrated on sequences that all begin with the token that
                 begins a chat; held-out sequences begin with whatever stands there
    rtn-4, rtn-3 to the nearest, scales by the range of the weights: no activation is looked at
    nf4          bitsandbytes, blocks of 64
    row-2        2 bits, one scale for each row, GPTQ

A row also says which super experts the part's own profile found; they are not confirmed by zeroing.
Measurements are kept under --work, and the section of RESULTS.md is rewritten from all of them, so
a run can be made in parts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference import ROOT, Columns, Model, begin, cells, judge, random_experts
from reference import recipe_of as reference_recipe
from results import machine, write_section

from se_compress.artifacts import ModelSource, RunOptions
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.profiling.profiler import profile_experts
from se_compress.recipe import Recipe
from se_compress.text.calibrate import draw_sequences
from se_compress.validation.validator import Original

WORK = ROOT / "out" / "benchmark-protection"
CALIBRATION = 8  # sequences that the quantiser sees
DRAWS = 1
GPTQ: Mapping[str, Any] = {"method": "gptq", "group_size": 64}
RTN: Mapping[str, Any] = {"method": "rtn", "group_size": 64, "scales": "minmax"}
NF4: Mapping[str, Any] = {"method": "bitsandbytes", "data_type": "nf4", "block_size": 64}
# Part -> bits, quantisation, target.
CONDITIONS: Mapping[str, tuple[int, Mapping[str, Any], str]] = {
    "gptq": (3, GPTQ, "gptqmodel"),
    "tiny": (3, GPTQ, "gptqmodel"),
    "first-token": (3, GPTQ, "gptqmodel"),
    "rtn-4": (4, RTN, "gptqmodel"),
    "rtn-3": (3, RTN, "gptqmodel"),
    "nf4": (4, NF4, "transformers"),
    "row-2": (2, {"method": "gptq", "group_size": -1}, "transformers"),
}
PARTS = tuple(CONDITIONS)
TITLES = {
    "gptq": "GPTQ, 3 bits",
    "tiny": "GPTQ, 3 bits, one sequence of 64 tokens",
    "first-token": "GPTQ, 3 bits, another first token",
    "rtn-4": "to the nearest, 4 bits",
    "rtn-3": "to the nearest, 3 bits",
    "nf4": "bitsandbytes nf4",
    "row-2": "GPTQ, 2 bits, a scale per row",
}
FIRST_TOKEN = 1  # <|im_start|> of SmolLM2


def recipe_for(name: str, part: str, protect: object = "super-experts") -> Recipe:
    bits, quantization, target = CONDITIONS[part]
    return reference_recipe(
        name,
        {
            "generation": {"tokens": 0},
            "massive_activation_ratio": 0.0,  # a bad result is measured, and not given up
            "sink_decay": 1.0,
            "early_stop": False,
        },
        super_experts={"confirm": False},
        target=target,
        policy={"bits": bits, "protect": protect},
        quantization=dict(quantization),
    )


@dataclass(frozen=True)
class Opened:
    """A reference model with the source's side of every comparison; each part profiles it anew."""

    name: str
    source: ModelSource
    calibration: list[list[int]]
    original: Original
    work: Path


def opened(name: str, work: Path) -> Opened:
    recipe = recipe_for(name, PARTS[0])
    source = open_source(recipe.model)
    calibration, held_out = (
        [list(sequence) for sequence in draw_sequences(text, source.path, where)]
        for text, where in ((recipe.calibration, "calibration"), (recipe.validation, "validation"))
    )
    original = Original(source, held_out, recipe, RunOptions(), keep=True)
    return Opened(name, source, calibration, original, work)


def tokens_of(model: Opened, part: str) -> list[list[int]]:
    """What the profile and the quantiser see."""
    some = model.calibration[:: len(model.calibration) // CALIBRATION]
    if part == "tiny":
        return [some[0][:64]]
    if part == "first-token":
        return [[FIRST_TOKEN, *sequence[:-1]] for sequence in some]
    return some


def measure(model: Opened, part: str) -> Iterator[dict[str, Any]]:
    """One checkpoint after the other, by what was protected in it."""
    tokens, recipe = tokens_of(model, part), recipe_for(model.name, part)
    profile = profile_experts(model.source, tokens, recipe, RunOptions())
    here = Model(**vars(model), profile=profile)
    found = ", ".join(str(expert.id) for expert in profile.super_experts) or "none"
    protections: dict[str, object] = {"super experts": "super-experts", "none": "none"}
    for draw in range(DRAWS if profile.super_experts else 0):
        protections[f"others of their layers, draw {draw}"] = random_experts(here, draw)
    for protected, policy in protections.items():
        chosen = recipe_for(model.name, part, policy)
        plan = make_plan(model.source, profile, chosen)
        row = {"part": part, "protected": protected, "found": found}
        row |= judge(here, chosen, plan, tokens)
        print(json.dumps(row), flush=True)
        yield row


# -------------------------------------------------------------------------------------------- table

COLUMNS: Columns = {
    "found": ("super experts found", "{}"),
    "kl_divergence": ("KL", "{:.4f}"),
    "perplexity": ("PPL", "{:.2f}"),
    "massive_activation_ratio": ("massive activation kept", "{:.3f}"),
    "sink_decay": ("sink decay", "{:.4f}"),
    "sink_token_error": ("sink token moved", "{:.3f}"),
}


def table(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    heads = ["condition", "in 16 bits", "MB", *(title for title, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for part in PARTS:
        for row in parts.get(part, ()):
            beginning = f"| {TITLES[part]} | {row['protected']} | {row['size'] / 1e6:.2f} "
            lines.append(f"{beginning}| {' | '.join(cells(row, COLUMNS))} |")
    return "\n".join(lines)


def section(measured: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    lines = [
        "## Where protection pays",
        "",
        f"`python benchmarks/protection.py`, {machine()}. {CALIBRATION} x 256 calibration tokens "
        "unless the condition says otherwise, 8 x 256 held-out tokens.",
    ]
    for name, parts in measured.items():
        lines += ["", f"### {name}: what is kept in 16 bits", "", table(parts)]
    return "\n".join(lines)


def main() -> None:
    arguments, saved, measured = begin(__doc__, PARTS, WORK)
    for name in arguments.models.split(","):
        model = opened(name, arguments.work)
        for part in [arguments.only] if arguments.only else PARTS:
            rows = measured.setdefault(name, {})[part] = []
            for row in measure(model, part):
                rows.append(row)
                saved.write_text(json.dumps(measured, indent=1))
                write_section("protection", section(measured))


if __name__ == "__main__":
    main()
