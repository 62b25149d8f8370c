"""comparison.json, the variants of a recipe side by side; and the line that `--json` prints."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from se_compress.artifacts.checks import Check
from se_compress.artifacts.gates import DISTANCE
from se_compress.artifacts.held_out import DomainReport, Tail, TextRecord
from se_compress.artifacts.ids import UNLESS_NONE, ExpertId
from se_compress.artifacts.plan import CurvePoint
from se_compress.artifacts.validation import LayerComparison


@dataclass(frozen=True)
class PlanSummary:
    """What a dry run tells of one checkpoint.

    name        of the variant; "" without variants
    target      the engine that has to load it
    method      of quantisation
    size_bytes, source_size_bytes, bits_per_weight   as in CompressionPlan
    curve       what other budgets would buy
    shortage    what does not fit on the disk here
    """

    name: str
    target: str
    method: str
    size_bytes: int
    source_size_bytes: int
    bits_per_weight: float
    curve: tuple[CurvePoint, ...] = ()
    shortage: str | None = field(default=None, metadata=UNLESS_NONE)


@dataclass(frozen=True)
class CheckpointSummary:
    """One finished checkpoint in numbers: part of comparison.json and of what `--json` prints.

    name             of the variant; "" without variants
    directory        where it is: in comparison.json seen from there, otherwise as the recipe has it
    target           the engine that has to load it
    method           of quantisation
    published        it passed its gates; otherwise it is kept apart as rejected
    size_bytes, source_size_bytes, bits_per_weight   as in validation.json and plan.json
    perplexity_*     as in validation.json; None if the result could not be run
    super_experts    how many the model has
    kept             how many of these were neither pruned, merged nor zeroed
    protected        how many experts the plan protects
    checks           every gate
    """

    name: str
    directory: str
    published: bool
    target: str
    method: str
    size_bytes: int
    source_size_bytes: int
    bits_per_weight: float
    perplexity_source: float | None
    perplexity_result: float | None
    super_experts: int
    kept: int
    protected: int
    checks: tuple[Check, ...]

    @cached_property
    def by_name(self) -> dict[str, Check]:
        return {check.name: check for check in self.checks}

    @property
    def distance(self) -> float | None:
        """From the source, in nats; None where it is not known."""
        check = self.by_name.get(DISTANCE)
        return check.value if check else None


@dataclass(frozen=True)
class ComparedVariant:
    """One variant of a comparison.

    checkpoint   it in numbers
    changes   key path of the recipe -> value as JSON, where it differs from the common part
    removed   experts that were pruned or merged into others
    zeroed    experts whose output was set to zero
    layers    as in its validation.json
    tail, domains, texts, cautions   as in its validation.json
    """

    checkpoint: CheckpointSummary
    changes: Mapping[str, str]
    removed: tuple[ExpertId, ...]
    zeroed: tuple[ExpertId, ...]
    layers: tuple[LayerComparison, ...]
    tail: Tail | None = None
    domains: tuple[DomainReport, ...] = ()
    texts: tuple[TextRecord, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.checkpoint.name


@dataclass(frozen=True)
class Comparison:
    """comparison.json: all variants of one recipe, judged on the same text.

    model         what the recipe called it
    required      variants that have to pass
    passed        at least one variant passed, and so did each of `required`
    recommended   of those that passed and have no expert set to zero: the smallest, or one at most
                  2 % larger that is nearer to the source (least KL divergence); None if there is
                  none. One that passed by looser limits only than a result at least as near to
                  the source was held to is left out, unless all did
    closest       of the same: the nearest to the source
    size_bytes, perplexity   of the source; None if no result could be run
    tokens        held-out tokens
    super_experts  those of the model
    variants      in the order of the recipe
    """

    model: str
    passed: bool
    required: tuple[str, ...]
    recommended: str | None
    closest: str | None
    size_bytes: int
    perplexity: float | None
    tokens: int
    super_experts: tuple[ExpertId, ...]
    variants: tuple[ComparedVariant, ...]

    @cached_property
    def by_name(self) -> dict[str, ComparedVariant]:
        return {variant.name: variant for variant in self.variants}

    @property
    def published(self) -> tuple[str, ...]:
        """Variants that passed, by name."""
        return tuple(one.name for one in self.variants if one.checkpoint.published)


@dataclass(frozen=True)
class ProfileSummary:
    """What `--profile` tells of one profile.

    name            of the variant; "" without variants
    file            its profile.json
    massive         whether the model has massive activations
    super_experts   those found, in order of id
    confirmed       those of them that zeroing confirmed
    undecided       layers of which nothing can be said
    surprise        "" if they are those that the recipe expects, or it expects none
    """

    name: str
    file: str
    massive: bool
    super_experts: tuple[ExpertId, ...]
    confirmed: tuple[ExpertId, ...]
    undecided: tuple[int, ...]
    surprise: str


@dataclass(frozen=True)
class RunResult:
    """The line that `--json` prints.

    outcome       published, rejected (exit code 4), planned (a dry run), profiled, validated (an
                  existing checkpoint passed), or failed: see `message`
    exit_code     of the process
    message       the sentence that goes with an exit code other than 0; "" with 0
    comparison    path of comparison.json; None without variants
    checkpoints   one for each variant, or the only one; none after an error
    plans         the same of a dry run
    validation    path of the validation.json of an existing checkpoint
    profiles      one for each variant, or the only one, of `--profile`
    """

    outcome: Literal["published", "rejected", "planned", "profiled", "validated", "failed"]
    exit_code: int
    message: str = ""
    comparison: str | None = None
    checkpoints: tuple[CheckpointSummary, ...] = ()
    plans: tuple[PlanSummary, ...] = ()
    validation: str | None = field(default=None, metadata=UNLESS_NONE)
    profiles: tuple[ProfileSummary, ...] | None = field(default=None, metadata=UNLESS_NONE)
