"""A reference model with its profile, and checkpoints of it, written and judged one by one.

What benchmarks/policy.py and benchmarks/surgery.py share.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from se_compress.artifacts import (
    CompressionPlan,
    ExpertProfile,
    ModelSource,
    RunOptions,
    from_json,
    to_json,
)
from se_compress.compression.execute import compress
from se_compress.opening.source import open_source
from se_compress.profiling.profiler import profile_digest, profile_experts
from se_compress.recipe import Recipe, parse_recipe
from se_compress.text.calibrate import draw_sequences
from se_compress.validation import validator

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tools" / "reference" / "text"
CORPORA = ("austen", "factbook")
HELD_OUT = 8  # sequences of 256 tokens

Columns = Mapping[str, tuple[str, str]]  # key of a row -> title, pattern of a cell


@dataclass(frozen=True)
class Model:
    """A reference model with its profile and the source's side of every comparison."""

    name: str
    source: ModelSource
    profile: ExpertProfile
    calibration: list[list[int]]
    original: validator.Original
    work: Path


def recipe_of(name: str, validation: Mapping[str, Any], **sections: Any) -> Recipe:
    """A recipe for a reference model: calibration on 32 x 256 tokens, and what is given."""
    files = {
        part: [str(TEXT / f"{c}-{part}.txt") for c in CORPORA]
        for part in ("calibration", "held-out")
    }
    held_out = {"data": files["held-out"], "samples": HELD_OUT, "sequence_length": 256}
    return parse_recipe(
        {
            "model": str(ROOT / "models" / name),
            "output": "unused",
            "calibration": {"data": files["calibration"], "samples": 32, "sequence_length": 256},
            "validation": held_out | dict(validation),
            **sections,
        },
        "benchmark",
    )


def profile_of(
    name: str, recipe: Recipe, source: ModelSource, calibration: list[list[int]], work: Path
) -> ExpertProfile:
    """The profile kept under `work`, made if there is none that fits."""
    file = work / f"{name}-profile.json"
    profile = from_json(ExpertProfile, file.read_text(), str(file)) if file.exists() else None
    if profile is None or profile.digest != profile_digest(source, calibration, recipe):
        profile = profile_experts(source, calibration, recipe, RunOptions())
        file.write_text(to_json(profile))
    return profile


def open_model(name: str, recipe: Recipe, work: Path) -> Model:
    source = open_source(recipe.model)
    calibration = draw_sequences(recipe.calibration, source.path, "calibration")
    held_out = draw_sequences(recipe.validation, source.path, "validation")
    profile = profile_of(name, recipe, source, calibration, work)
    original = validator.Original(source, held_out, recipe, RunOptions(), keep=True)
    return Model(name, source, profile, calibration, original, work)


def random_experts(model: Model, draw: int) -> list[dict[str, int]]:
    """As many others of the super experts' layers; no two draws share one."""
    supers = {expert.id for expert in model.profile.super_experts}
    dice = random.Random(0)
    chosen: list[dict[str, int]] = []
    for layer in sorted({identity.layer for identity in supers}):
        there = {identity.expert for identity in supers if identity.layer == layer}
        others = [e for e in range(model.source.expert_count) if e not in there]
        dice.shuffle(others)
        first = draw * len(there)
        chosen += [{"layer": layer, "expert": e} for e in others[first : first + len(there)]]
    return chosen


def judge(
    model: Model, recipe: Recipe, plan: CompressionPlan, tokens: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Write the checkpoint, quantised on `tokens`, and read it back: its checks by name, the
    perplexities and its size."""
    directory = model.work / "checkpoint"
    compress(model.source, plan, tokens, recipe, directory)
    held_out = model.original.tokens
    # the engine's own load is not what is compared, and takes longer than the rest
    report = validator.validate(
        model.source,
        plan,
        directory,
        held_out,
        recipe,
        original=model.original,
        reload=False,
    )
    return {check.name: check.value for check in report.checks} | {
        "perplexity": report.perplexity_result,
        "perplexity_source": report.perplexity_source,
        "size": report.size_bytes,
    }


def cells(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """A row's values as a table shows them; "-" for what was not measured."""
    return [
        pattern.format(row[key]) if row.get(key) is not None else "-"
        for key, (_, pattern) in columns.items()
    ]


def begin(
    doc: str, parts: Sequence[str], work: Path
) -> tuple[argparse.Namespace, Path, dict[str, Any]]:
    """The command line (models, one part only, work), where measurements are kept, and those that
    are there already."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--models", default="smollm2-moe,smollm2-mixtral")
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--work", type=Path, default=work)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    saved = arguments.work / "measured.json"
    return arguments, saved, json.loads(saved.read_text()) if saved.exists() else {}


def rows_by_part(
    measured: Mapping[str, Mapping[str, Mapping[str, Any]]], parts: Sequence[str]
) -> Iterator[tuple[str, str, dict[str, Mapping[str, Any]]]]:
    """Model, part, and the rows of the part by their names; of parts that have rows.

    measured  model -> "part: name" -> row
    """
    for name, known in measured.items():
        for part in parts:
            rows = {k.partition(": ")[2]: v for k, v in known.items() if k.startswith(f"{part}: ")}
            if rows:
                yield name, part, rows
