"""What flows between the stages, and how it is written to JSON. Read this file first.

    Recipe -> ModelSource -> ExpertProfile -> CompressionPlan -> LayerRecord ... -> ValidationReport

Every artefact is frozen, and everything that is said about an expert is keyed by `ExpertId`: the
decoder's own layer index (0-based, dense layers counted) and the expert's index, or "shared". Never
by a position in some list. This module needs the standard library only.
"""

import dataclasses
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from se_compress.errors import RecipeError

ExpertIndex = int | Literal["shared"]
TensorKind = Literal[
    "expert", "shared_expert", "router", "attention", "dense_mlp", "norm", "embedding", "other"
]
Action = Literal["keep", "quantize", "prune", "merge", "zero"]
Role = Literal["gate", "up", "down"]
Part = Literal["gate_up", "down"]
OutlierReason = Literal["cancels", "layer forms no massive activation", "model has none"]
ROLES: tuple[Role, ...] = ("gate", "up", "down")
PARTS: Mapping[Part, tuple[Role, ...]] = {"gate_up": ("gate", "up"), "down": ("down",)}

# Of a field that is written to JSON only where it says something.
UNLESS_NONE: Mapping[str, bool] = {"unless_none": True}

Artifact = TypeVar("Artifact")


@dataclass(frozen=True, slots=True)
class ExpertId:
    """One expert: absolute decoder layer, index within the layer or "shared"."""

    layer: int
    expert: ExpertIndex

    @property
    def sort_key(self) -> tuple[int, bool, int]:
        """Layer first, routed experts by index, the shared expert last."""
        routed = isinstance(self.expert, int)
        return (self.layer, not routed, self.expert if isinstance(self.expert, int) else 0)

    def __lt__(self, other: "ExpertId") -> bool:
        return self.sort_key < other.sort_key

    def __str__(self) -> str:
        return f"({self.layer}, {self.expert})"


@dataclass(frozen=True)
class RunOptions:
    """How to run. Nothing in here changes the result beyond float round-off.

    device        "cpu", "cuda" or "cuda:N"
    work          directory for saved progress; None: nothing is saved
    batch_tokens  tokens that go through a layer at once
    progress      called with stage, steps done, steps in all
    """

    device: str = "cpu"
    work: Path | None = None
    batch_tokens: int = 4096
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None


# ------------------------------------------------------------------------------- the source model


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, as its safetensors header has it, and what it is to the model.

    dtype       safetensors' own name ("BF16", "F32", "I32" ...)
    begin, end  byte range of the data, from the start of the file
    layer       decoder layer, None for tensors outside the decoder layers
    expert      set for kinds "expert" and "shared_expert"
    role        which of the three projections; None for anything else (biases, gates, norms)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int
    kind: TensorKind = "other"
    layer: int | None = None
    expert: ExpertIndex | None = None
    role: Role | None = None

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint on disk, known from its config and headers only; no weight has been read.

    path            the directory
    name            what the recipe called it
    family          `model_type`, a row of families.py
    config          config.json
    tensors         every tensor by name
    moe_layers      absolute indices of the layers with routed experts
    expert_count    routed experts of each of these layers
    contents        works `digest` out, when it is wanted
    """

    path: Path
    name: str
    family: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    layer_count: int
    moe_layers: tuple[int, ...]
    expert_count: int
    top_k: int
    contents: Callable[[], str] = field(repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        """Of what the model is: config, headers and weights, but no time or place, so that a copy
        is the same model. All bytes of a small one (256 MB) count, of a larger one the middle of
        each tensor, both ends of each file, and the Hub's own hash where its cache holds the file:
        a change of a few weights elsewhere in a large model is missed, another model is not."""
        return self.contents()

    @cached_property
    def experts(self) -> dict[ExpertId, dict[Role, TensorInfo]]:
        """The weight matrices of every routed and shared expert, in the order of their ids."""
        found: dict[ExpertId, dict[Role, TensorInfo]] = {}
        for info in self.tensors.values():
            if info.role is not None and info.expert is not None and info.layer is not None:
                found.setdefault(ExpertId(info.layer, info.expert), {})[info.role] = info
        return {identity: found[identity] for identity in sorted(found)}

    @cached_property
    def size_bytes(self) -> int:
        """All tensor data, headers not counted."""
        return sum(info.size_bytes for info in self.tensors.values())


# ------------------------------------------------------------------------------------ the profile


@dataclass(frozen=True)
class ExpertStats:
    """What one expert did over the calibration tokens.

    peak              max |down_proj output| before the routing weight, float32, all routed tokens
    weighted_peak     the same after the routing weight (or the shared expert's gate)
    channel, position, token_id   where the peak stands: residual channel, position in its
                      sequence, the token there; -1 if no token was routed here
    tokens            tokens routed to the expert
    gate_mass         sum of its routing weights over all tokens, divided by the number of tokens
    mean_output_norm  mean L2 norm of the down_proj output over its tokens
    saliency          mean of routing weight x output norm over its tokens (REAP, arXiv:2510.13999)
    loss_gate_up      bits -> KL divergence, in nats per token, that rounding gate_proj and up_proj
                      to that width (no GPTQ) is expected to cost: the layer's sensitivity x the
                      mean over all tokens of |weight x (output - quantised output)|^2 / |h|^2, h
                      the token's residual after the layer
    loss_down         the same for down_proj; 0 bits: nothing is left of the output
    """

    layer: int
    expert: ExpertIndex
    peak: float
    weighted_peak: float
    channel: int
    position: int
    token_id: int
    tokens: int
    gate_mass: float
    mean_output_norm: float
    saliency: float
    loss_gate_up: Mapping[int, float]
    loss_down: Mapping[int, float]

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)

    def loss_of(self, part: Part, bits: int) -> float:
        """What a width costs one part of the expert; 16 bits cost nothing."""
        return (
            0.0 if bits == 16 else (self.loss_down if part == "down" else self.loss_gate_up)[bits]
        )


@dataclass(frozen=True)
class LayerStats:
    """The residual stream after one decoder layer, and the layer's attention sinks.

    peak, position, channel, token_id   the largest |h| over all tokens and where it stands
    median       median |h| over tokens and channels
    rise, fall   most that the layer adds to, takes from, any |h| (per token and channel)
    massive      Sun et al. (arXiv:2402.17762): peak > 100 and peak >= 1000 x median
    forming      the layer makes massive activations: see `profiler.forming_layers`
    cancelling   the layer takes away most of a massive activation: `profiler.cancelling_layers`
    mlp_peak     max |down_proj output| of the dense MLP; None in a MoE layer
    sink_mass    per head, mean attention that queries at position >= 8 pay to position 0
    sink_rate    Gu et al. (arXiv:2410.10781): share of heads whose position-0 attention, averaged
                 over all queries, exceeds 0.3
    sensitivity  KL divergence of the next token, in nats, per squared relative error of the stream
                 after the layer: measured once, by rounding all its experts; 1 in a dense layer
    """

    layer: int
    moe: bool
    peak: float
    position: int
    channel: int
    token_id: int
    median: float
    rise: float
    fall: float
    massive: bool
    forming: bool
    cancelling: bool
    mlp_peak: float | None
    sink_mass: tuple[float, ...]
    sink_rate: float
    sensitivity: float = 1.0


@dataclass(frozen=True)
class Ablation:
    """What happened when the output of one expert was set to zero.

    rise_removed         share of the layer's rise of the massive activation that vanished
    massive_activation   peak |h| at the model's strongest layer, after / before
    sink_mass            mean over layers and heads from the expert's layer on, after / before
    kl_divergence        mean KL(original || ablated) of the next-token distribution, nats
    """

    layer: int
    expert: ExpertIndex
    rise_removed: float
    massive_activation: float
    sink_mass: float
    kl_divergence: float


@dataclass(frozen=True)
class SuperExpert:
    """An expert that the criterion proposes; `confirmed` is what zeroing it showed."""

    layer: int
    expert: ExpertIndex
    peak: float
    channel: int
    position: int
    token_id: int
    confirmed: bool | None = None
    zeroed: Ablation | None = None
    control: Ablation | None = None

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)


@dataclass(frozen=True)
class OutlierExpert:
    """An expert over the thresholds that is not a super expert, and why it is not."""

    layer: int
    expert: ExpertIndex
    peak: float
    channel: int
    position: int
    reason: OutlierReason

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike the routed experts of a layer are: Euclidean distances of their mean outputs over
    a sample of the layer's tokens, those not routed to them included (HC-SMoE, arXiv:2410.08589).

    distances   of the pairs (0, 1), (0, 2) ... (1, 2) ...
    """

    layer: int
    distances: tuple[float, ...]


@dataclass(frozen=True)
class ExpertProfile:
    """profile.json: measured once, planned from often.

    digest          of everything the profile was made from
    tokens_digest   of the calibration tokens
    threshold       the peak that an expert has to exceed: max of the two clauses below
    super_experts   in order of id; empty with a note if the model has no massive activation
    similarities    measured only for a recipe that merges
    """

    model: str
    digest: str
    source_digest: str
    tokens_digest: str
    samples: int
    sequence_length: int
    threshold: float
    percentile_value: float
    fraction_value: float
    massive: bool
    super_experts: tuple[SuperExpert, ...]
    outliers: tuple[OutlierExpert, ...]
    notes: tuple[str, ...]
    layers: tuple[LayerStats, ...]
    experts: tuple[ExpertStats, ...]
    similarities: tuple[LayerSimilarity, ...] = ()

    @cached_property
    def by_id(self) -> dict[ExpertId, ExpertStats]:
        return {stats.id: stats for stats in self.experts}


# --------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Scheme:
    """How every quantised matrix of a plan is stored, whatever its width.

    format        file format, see targets.py; "source" if nothing is quantised
    method        how the codes are found
    group_size    input columns that share a scale; -1: one scale per row
    symmetric     one zero for all groups
    data_type     bitsandbytes' nf4, fp4 or int8
    double_quant  bitsandbytes' scales are quantised themselves
    """

    format: str
    method: str
    group_size: int
    symmetric: bool
    data_type: str | None = field(default=None, metadata=UNLESS_NONE)
    double_quant: bool | None = field(default=None, metadata=UNLESS_NONE)


@dataclass(frozen=True)
class ExpertDecision:
    """What becomes of one expert, and why.

    bits        width of gate_proj and up_proj; None for a pruned expert; 16 keeps the source's own
                precision, whatever that is
    down_bits   width of down_proj where it is another one
    becomes     its index in the result where experts of its layer go; None: as before
    share       its weight in the average, for action merge: the experts that become one add up to 1
    """

    layer: int
    expert: ExpertIndex
    action: Action
    bits: int | None
    reason: str
    down_bits: int | None = field(default=None, metadata=UNLESS_NONE)
    becomes: int | None = field(default=None, metadata=UNLESS_NONE)
    share: float | None = field(default=None, metadata=UNLESS_NONE)

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)

    def bits_of(self, role: Role) -> int | None:
        """The width of one of the three projections."""
        return self.down_bits if role == "down" and self.down_bits is not None else self.bits


@dataclass(frozen=True)
class OtherDecision:
    """The width of a linear that belongs to no expert (attention, dense MLP), by tensor name."""

    name: str
    bits: int
    reason: str


@dataclass(frozen=True)
class CompressionPlan:
    """plan.json: readable, editable, handed back with `--plan`.

    bits_per_weight   over all weights of the routed experts, scales and indices included
    size_bytes        all tensor data of the checkpoint as the export will write it
    protected         experts that must not be lowered, pruned or merged away
    others            linears of attention and dense MLPs; those without a line keep 16 bits
    """

    target: str
    scheme: Scheme
    bits_per_weight: float
    size_bytes: int
    source_size_bytes: int
    protected: tuple[ExpertId, ...]
    profile_digest: str
    notes: tuple[str, ...]
    experts: tuple[ExpertDecision, ...]
    others: tuple[OtherDecision, ...] = ()

    @cached_property
    def by_id(self) -> dict[ExpertId, ExpertDecision]:
        return {decision.id: decision for decision in self.experts}

    @cached_property
    def by_name(self) -> dict[str, OtherDecision]:
        return {decision.name: decision for decision in self.others}


@dataclass(frozen=True)
class CurvePoint:
    """What one budget would buy.

    widths           one: all unprotected experts have it; several: the best mixture of these
    bits_per_weight, size_bytes   as in CompressionPlan
    predicted_loss   sum over experts and parts of what their widths lose (ExpertStats); None
                     without a profile
    """

    widths: tuple[int, ...]
    bits_per_weight: float
    size_bytes: int
    predicted_loss: float | None


# ------------------------------------------------------------------------------------ compression


@dataclass(frozen=True)
class ExpertRecord:
    """How the quantisation of one expert went.

    bits, down_bits   as in ExpertDecision
    tokens      calibration tokens behind its Hessian
    shrinkage   share of the layer's Hessian mixed in (0 = enough tokens of its own)
    damping     share of each column's mean square that was added to it (larger of the two Hessians)
    error       relative output error, sqrt(tr(dW H dW^T) / tr(W H W^T)): gate and up, then down
    fallback    "" or why another method had to be used; a part that keeps 16 bits has error 0
    """

    layer: int
    expert: ExpertIndex
    bits: int
    tokens: int
    shrinkage: float
    damping: float
    error_gate_up: float
    error_down: float
    fallback: str
    down_bits: int | None = field(default=None, metadata=UNLESS_NONE)

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)


@dataclass(frozen=True)
class LinearRecord:
    """The same for a linear of attention or of a dense MLP, by the name of its weight; every token
    passes it."""

    name: str
    bits: int
    tokens: int
    damping: float
    error: float
    fallback: str


@dataclass(frozen=True)
class Check:
    """One gate. `passed` is None when the check could not be run; `detail` then says why.

    low, high   95 % interval of the value over the held-out sequences, for the checks that have one
    """

    name: str
    value: float | None
    limit: float | None
    passed: bool | None
    detail: str = ""
    low: float | None = field(default=None, metadata=UNLESS_NONE)
    high: float | None = field(default=None, metadata=UNLESS_NONE)


@dataclass(frozen=True)
class LayerRecord:
    """What compressing one layer did.

    hidden_error   relative distance between the hidden states of the compressed stream and those of
                   the source after the layer
    failed         the gate that the compressed stream failed here: compressing stopped
    """

    layer: int
    seconds: float
    hidden_error: float
    experts: tuple[ExpertRecord, ...]
    linears: tuple[LinearRecord, ...] = ()
    failed: Check | None = field(default=None, metadata=UNLESS_NONE)


# ------------------------------------------------------------------------------------- validation


@dataclass(frozen=True)
class MassiveElement:
    """A massive activation of the source (Sun's rule) after one layer, and what became of it.

    position         in the sequence; -1: at several, none of them in half of the sequences
    share            elements per sequence
    source, result   mean h
    retention        see `measures.massive_elements`
    """

    position: int
    channel: int
    share: float
    source: float
    result: float
    retention: float


@dataclass(frozen=True)
class LayerComparison:
    """Source and result side by side after one layer.

    peak_*            largest |h| of the residual stream
    massive           massive activations of the source, the strongest first, eight at most
    massive_result    whether the result's residual stream is massive (Sun's rule)
    sink_cosine, sink_error   direction and size of the change of the sink tokens' residual, see
                      `measures.sink_token_change`
    sink_mass_*       mean over heads of the attention to position 0 from queries at position >= 8
    sink_heads_*      the same per head
    sink_rate_*       share of the heads for which position 0 is a sink, see `measures.sink_rate`
    hidden_error      |h_result - h_source| / |h_source| over all tokens
    router_agreement  mean share of the top-k experts chosen by both; None in a dense layer
    """

    layer: int
    peak_source: float
    peak_result: float
    sink_mass_source: float
    sink_mass_result: float
    sink_heads_source: tuple[float, ...]
    sink_heads_result: tuple[float, ...]
    hidden_error: float
    router_agreement: float | None
    massive: tuple[MassiveElement, ...]
    massive_result: bool
    sink_cosine: float
    sink_error: float
    sink_rate_source: float
    sink_rate_result: float


@dataclass(frozen=True)
class SinkPosition:
    """A position that draws attention: mean over all layers and heads (mass), and the share of
    these for which it is a sink (rate, see `measures.sink_rate`)."""

    position: int
    mass_source: float
    mass_result: float
    rate_source: float
    rate_result: float


@dataclass(frozen=True)
class Loop:
    """The end of a continuation that repeats itself, see `measures.find_loop`. In tokens."""

    period: int
    length: int


@dataclass(frozen=True)
class Continuation:
    """One greedy continuation by both models.

    distinct_*   different 4-grams / 4-grams, see `measures.distinct`
    loop_*       None: it does not end in a loop
    """

    prompt: str
    source: str
    result: str
    distinct_source: float | None = None
    distinct_result: float | None = None
    loop_source: Loop | None = field(default=None, metadata=UNLESS_NONE)
    loop_result: Loop | None = field(default=None, metadata=UNLESS_NONE)


@dataclass(frozen=True)
class ValidationReport:
    """validation.json. `passed` is true if no check failed (a check that was not run did not pass
    and did not fail: it is named in `not_run`).

    sinks   the positions that draw most attention in the source or the result
    """

    passed: bool
    checks: tuple[Check, ...]
    not_run: tuple[str, ...]
    perplexity_source: float
    perplexity_result: float
    tokens: int
    size_bytes: int
    source_size_bytes: int
    expert_bytes: int
    source_expert_bytes: int
    layers: tuple[LayerComparison, ...]
    sinks: tuple[SinkPosition, ...]
    continuations: tuple[Continuation, ...]
    records: tuple[LayerRecord, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    def check(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)


# ------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class PlanSummary:
    """What a dry run tells of one checkpoint; `name` is the variant's, "" without variants, and
    `curve` what other budgets would buy."""

    name: str
    target: str
    method: str
    size_bytes: int
    source_size_bytes: int
    bits_per_weight: float
    curve: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True)
class CheckpointSummary:
    """One finished checkpoint in numbers: part of comparison.json and of what `--json` prints.

    name             of the variant; "" without variants
    directory        where it is: in comparison.json seen from there, otherwise as the recipe has it
    published        it passed its gates; otherwise it is kept apart as rejected
    size_bytes, bits_per_weight   as in validation.json and plan.json
    perplexity_*     as in validation.json; None if the result could not be run
    super_experts    how many the model has
    kept             how many of these were neither pruned, merged nor zeroed
    protected        how many experts the plan protects
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


@dataclass(frozen=True)
class ComparedVariant:
    """One variant of a comparison.

    changes   key path of the recipe -> value as JSON, where it differs from the common part
    removed   experts that were pruned or merged into others
    zeroed    experts whose output was set to zero
    layers    as in its validation.json
    """

    checkpoint: CheckpointSummary
    changes: Mapping[str, str]
    removed: tuple[ExpertId, ...]
    zeroed: tuple[ExpertId, ...]
    layers: tuple[LayerComparison, ...]

    @property
    def name(self) -> str:
        return self.checkpoint.name


@dataclass(frozen=True)
class Comparison:
    """comparison.json: all variants of one recipe, judged on the same text.

    passed        at least one variant passed, and so did each of `required`
    recommended   of those that passed and have no expert set to zero: the smallest, or one at most
                  2 % larger that is nearer to the source (least KL divergence); None if there is
                  none
    closest       of the same: the nearest to the source
    size_bytes, perplexity   of the source; None if no result could be run
    tokens        held-out tokens
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


@dataclass(frozen=True)
class RunResult:
    """The line that `--json` prints.

    outcome       published, rejected (exit code 4), planned (a dry run), validated (an existing
                  checkpoint passed), or failed: see `message`
    message       the sentence that goes with an exit code other than 0; "" with 0
    comparison    path of comparison.json; None without variants
    checkpoints   one for each variant, or the only one; none after an error
    plans         the same of a dry run
    validation    path of the validation.json of an existing checkpoint
    """

    outcome: Literal["published", "rejected", "planned", "validated", "failed"]
    exit_code: int
    message: str = ""
    comparison: str | None = None
    checkpoints: tuple[CheckpointSummary, ...] = ()
    plans: tuple[PlanSummary, ...] = ()
    validation: str | None = field(default=None, metadata=UNLESS_NONE)


# ------------------------------------------------------------------------------------------- JSON

# JSON has no such numbers: they are written as these strings.
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def to_json(artifact: object) -> str:
    """Deterministic JSON: fields in the order of the dataclass, one record of a list per line."""
    plain = _plain(artifact)
    if not isinstance(plain, dict):
        raise TypeError(f"{type(artifact).__name__} is not an artefact")
    lines = []
    for key, value in plain.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join("    " + _dump(row) for row in value)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {_dump(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def to_json_line(artifact: object) -> str:
    """The same in a single line of ASCII."""
    return json.dumps(_plain(artifact), allow_nan=False)


def from_json(kind: type[Artifact], text: str, where: str) -> Artifact:
    """The inverse of `to_json`, strict: an unknown, missing or mistyped field is a `RecipeError`
    that names `where` and the field."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}: not JSON ({error.msg}, line {error.lineno})") from None
    value: Artifact = _decode(kind, data, where)
    return value


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".writing")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def digest_of(*parts: object) -> str:
    """A short digest of JSON-able values, equal for equal values on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _dump(plain: Any) -> str:
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        present = {
            f.name: getattr(value, f.name)
            for f in dataclasses.fields(value)
            if "unless_none" not in f.metadata or getattr(value, f.name) is not None
        }
        return {name: _plain(item) for name, item in present.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, data, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is Mapping and isinstance(data, dict):
        key_kind, value_kind = arguments
        if key_kind is int and not all(key.isdecimal() for key in data):
            raise RecipeError(f"{where} has the keys {', '.join(data)}, but numbers are expected")
        return {key_kind(k): _decode(value_kind, v, f"{where}.{k}") for k, v in data.items()}
    if origin is Literal and data in arguments:
        return data
    number = isinstance(data, int | float) and not isinstance(data, bool)
    if kind is float and (number or data in NOT_FINITE):
        return float(data)
    if isinstance(kind, type) and type(data) is kind:
        return data
    raise _mistyped(data, (kind,), where)


def _mistyped(data: Any, kinds: tuple[Any, ...], where: str) -> RecipeError:
    expected = " or ".join(map(_describe, kinds))
    return RecipeError(f"{where} is {json.dumps(data)[:60]}, but {expected} is expected")


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is {json.dumps(data)[:60]}, but an object is expected")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in data:
        if name not in fields:
            raise RecipeError(f"{where}.{name} is unknown; known are {', '.join(fields)}")
    for name, known in fields.items():
        optional = not (
            known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        )
        if name not in data and not optional:
            raise RecipeError(f"{where}.{name} is missing")
    return kind(**{k: _decode(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def _decode_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return _decode(kinds[0], data, where)
    for kind in kinds:
        try:
            return _decode(kind, data, where)
        except RecipeError:
            continue
    raise _mistyped(data, kinds, where)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(json.dumps(a) for a in typing.get_args(kind))
    return getattr(kind, "__name__", str(kind))
