"""What came out, as the one record that `--json` prints and the exit code follows from."""

from collections.abc import Mapping
from pathlib import Path

from se_compress.artifacts import (
    PlanSummary,
    ProfileSummary,
    RunResult,
    ValidationReport,
    surprise,
)
from se_compress.artifacts.targets import spoken
from se_compress.errors import ValidationFailed
from se_compress.reporting.comparison import summarize
from se_compress.request import Outcome, Preview, Profiled, VariantsOutcome
from se_compress.tables import failed_gates, why_rejected, why_variants_rejected


def planned(previews: Mapping[str, Preview]) -> RunResult:
    """What a dry run found, as one record."""
    plans = [
        PlanSummary(
            name=name,
            target=spoken(one.plan.target),
            method=one.plan.scheme.method,
            size_bytes=one.plan.size_bytes,
            source_size_bytes=one.plan.source_size_bytes,
            bits_per_weight=one.plan.bits_per_weight,
            curve=one.curve,
            shortage=one.shortage or None,
        )
        for name, one in previews.items()
    ]
    return RunResult("planned", 0, plans=tuple(plans))


def finished(outcome: Outcome | VariantsOutcome) -> RunResult:
    """What came out, as one record."""
    if isinstance(outcome, Outcome):
        message, comparison = why_rejected(outcome), None
        checkpoints = [summarize(outcome, "", str(outcome.directory))]
    else:
        message = why_variants_rejected(outcome)
        comparison = str(outcome.directory / "comparison.json")
        checkpoints = [
            summarize(one, name, str(one.directory)) for name, one in outcome.outcomes.items()
        ]
    return RunResult(
        outcome="published" if outcome.published else "rejected",
        exit_code=0 if outcome.published else ValidationFailed.exit_code,
        message="" if outcome.published else message,
        comparison=comparison,
        checkpoints=tuple(checkpoints),
    )


def validated(report: ValidationReport, directory: Path, place: Path) -> RunResult:
    """The verdict on an existing checkpoint, as one record."""
    failed = f"{directory}: {failed_gates(report)}; report in {place}"
    return RunResult(
        outcome="validated" if report.passed else "rejected",
        exit_code=0 if report.passed else ValidationFailed.exit_code,
        message="" if report.passed else failed,
        validation=str(place / "validation.json"),
    )


def profiled(found: Profiled) -> RunResult:
    """What profiling alone found, as one record."""
    profiles = tuple(
        ProfileSummary(
            name=name,
            file=str(found.file(name)),
            massive=one.massive,
            super_experts=tuple(expert.id for expert in one.super_experts),
            confirmed=tuple(expert.id for expert in one.super_experts if expert.confirmed),
            undecided=tuple(dict.fromkeys(doubt.layer for doubt in one.undecided)),
            surprise=surprise(one, found.expected[name]),
        )
        for name, one in found.profiles.items()
    )
    return RunResult("profiled", 0, profiles=profiles)
