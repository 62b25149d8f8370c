"""The report: every gate in its order, and the package versions that it was made with."""

import importlib.metadata
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from se_compress.artifacts import (
    GATES,
    Check,
    Continuation,
    DomainReport,
    ModelSource,
    Tail,
    TaskReport,
    ValidationReport,
)
from se_compress.formats import FORMATS
from se_compress.opening.families import FAMILIES
from se_compress.opening.fused import unfused
from se_compress.validation.side_by_side import Compared
from se_compress.validation.stored import OnDisk

# Those that read formats, and what runs models anyway.
PACKAGES = (
    *("torch", "transformers", "safetensors"),
    *dict.fromkeys(form.package.replace("_", "-") for form in FORMATS.values()),
    *("datasets", "se-compress"),
)


def alone(check: Check, reason: str) -> list[Check]:
    """All gates in their order, of which only one could be run."""
    return [
        check if name == check.name else Check(name, None, None, None, reason)
        for name, gate in GATES.items()
        if not gate.optional or name == check.name
    ]


@dataclass(frozen=True)
class Judged:
    """The gates that the two models' behaviour decides, and what they were decided on. Without
    `compared` the result could not be run."""

    checks: tuple[Check, ...] = ()
    compared: Compared | None = None
    tail: Tail | None = None
    continuations: tuple[Continuation, ...] = ()
    domains: tuple[DomainReport, ...] = ()
    tasks: tuple[TaskReport, ...] = ()


NOTHING = Judged()


def report_on(
    source: ModelSource,
    checks: Sequence[Check],
    judged: Judged,
    on_disk: OnDisk,
) -> ValidationReport:
    compared, found = judged.compared, on_disk.tensors
    single = unfused(found, FAMILIES[source.family])
    perplexities = compared.predictions.perplexities if compared else (math.nan, math.nan)
    return ValidationReport(
        passed=all(check.passed is not False for check in checks),
        checks=tuple(checks),
        not_run=tuple(check.name for check in checks if check.passed is None),
        perplexity_source=perplexities[0],
        perplexity_result=perplexities[1],
        tokens=int(compared.predictions.tokens.sum()) if compared else 0,
        size_bytes=sum(info.size_bytes for info in found.values()),
        source_size_bytes=source.size_bytes,
        expert_bytes=sum(i.size_bytes for n, i in single.items() if ".experts." in n),
        source_expert_bytes=sum(
            i.disk_bytes for i in source.tensors.values() if i.kind == "expert"
        ),
        layers=compared.layers if compared else (),
        sinks=compared.sinks if compared else (),
        continuations=judged.continuations,
        records=on_disk.records,
        versions=_versions(),
        tail=judged.tail,
        domains=judged.domains,
        tasks=judged.tasks,
    )


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
