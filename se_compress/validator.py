"""Compare what was written with what it was made from, on text that neither has been fitted to.

Everything is read back from disk. Source and result run side by side, one layer of each in memory.

Measures (T positions of a sequence, p attention probabilities, h residual stream after a layer):

    perplexity_increase       exp(mean cross-entropy), result / source - 1
    kl_divergence             mean over positions of KL(source || result) of the next token, nats
    massive_activation_ratio  in each layer that is massive in the source (Sun et al.,
                              arXiv:2402.17762) and each sequence, r = h_result / h_source at the
                              source's largest |h|; mean over sequences of max(0, min(r, 1/r)); the
                              least of the layers
    sink_decay                1 - sum p_result / sum p_source of the attention to position 0 from
                              queries at position >= 8, over all layers and the heads whose mean
                              mass in the source is at least 0.05. The decay rate of
                              arXiv:2507.23279, eq. 7, weighted by mass, so that heads with hardly
                              any do not dominate
    router_agreement          share of a token's top-k experts that both chose; mean over tokens and
                              layers
    repetition                share of 4-grams of a greedy continuation that occurred in it before;
                              result - source, mean over prompts
    tensors_accounted         share of the planned tensors that are in the result as planned,
                              unchanged ones byte for byte, with nothing else beside them
    reload                    relative error of the logits after loading the result with its target
                              engine, against those that were validated here; median over positions,
                              as round-off that sends a few tokens to another expert is no fault
"""

import importlib.metadata
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from se_compress.artifacts import (
    Check,
    CompressionPlan,
    Continuation,
    LayerComparison,
    LayerRecord,
    ModelSource,
    RunOptions,
    TensorInfo,
    ValidationReport,
)
from se_compress.checkpoint import open_result, open_tensors
from se_compress.errors import NOT_RUN_EXIT_CODE
from se_compress.headers import Slot, read_headers
from se_compress.measures import is_massive, kl_divergence, relative_distance
from se_compress.recipe import Recipe, Validation
from se_compress.streaming import (
    PIECE_TOKENS,
    RoutingCapture,
    SinkCapture,
    StreamedModel,
    batches_of,
    in_pieces,
)
from se_compress.targets import result_name, result_slots

SINK_HEAD_FLOOR = 0.05
# The engines' bf16 kernels sit at 0.01 to 0.04, re-initialised experts at 0.3 and more.
RELOAD_LIMIT = 0.10
RELOAD_TOKENS = 64
NGRAM = 4
PACKAGES = ("torch", "transformers", "safetensors", "gptqmodel", "datasets", "se-compress")


def validate(
    source: ModelSource,
    plan: CompressionPlan,
    directory: Path,
    tokens: Sequence[Sequence[int]],
    records: Sequence[LayerRecord],
    recipe: Recipe,
    options: RunOptions,
) -> ValidationReport:
    """Judge the checkpoint in `directory`, made from `source` by `plan`.

    tokens   held-out sequences of token ids
    records  what compression said of each layer; goes into the report
    """
    found = read_headers(directory)
    accounted = _account(source, plan, found)
    if not _is_complete(source, plan, found):  # and so cannot be run
        return _report(source, plan, [accounted], _Compared(), (), records, found)
    rule = recipe.validation
    device, dtype = torch.device(options.device), getattr(torch, recipe.compute_dtype)
    original = StreamedModel(source, open_tensors(source.tensors), device, dtype)
    read = open_result(found, source.tensors, lambda name: result_name(source, plan, name))
    result = StreamedModel(source, read, device, dtype)
    compared = _compare(original, result, batches_of(tokens, options.batch_tokens), options)
    continuations, repetition = _generate(original, result, tokens, rule, options)
    checks = [
        _at_most("perplexity_increase", compared.perplexity_increase, rule.perplexity_increase),
        _at_most("kl_divergence", compared.divergence, rule.kl_divergence),
        _massive_check(compared, rule),
        _sink_check(compared, rule),
        _at_least("router_agreement", compared.router_agreement, rule.router_agreement),
        repetition,
        accounted,
        _reload(result, plan, directory, tokens[0][:RELOAD_TOKENS], options),
    ]
    return _report(source, plan, checks, compared, continuations, records, found)


def _at_most(name: str, value: float, limit: float, detail: str = "") -> Check:
    return Check(name, value, limit, value <= limit, detail)  # NaN fails


def _at_least(name: str, value: float, limit: float, detail: str = "") -> Check:
    return Check(name, value, limit, value >= limit, detail)


def _report(
    source: ModelSource,
    plan: CompressionPlan,
    checks: Sequence[Check],
    compared: "_Compared",
    continuations: tuple[Continuation, ...],
    records: Sequence[LayerRecord],
    found: Mapping[str, TensorInfo],
) -> ValidationReport:
    return ValidationReport(
        passed=all(check.passed is not False for check in checks),
        checks=tuple(checks),
        not_run=tuple(check.name for check in checks if check.passed is None),
        perplexity_source=compared.perplexity_source,
        perplexity_result=compared.perplexity_result,
        tokens=compared.tokens,
        size_bytes=sum(info.size_bytes for info in found.values()),
        source_size_bytes=source.size_bytes,
        expert_bytes=sum(i.size_bytes for i in found.values() if ".experts." in i.name),
        source_expert_bytes=sum(
            i.size_bytes for i in source.tensors.values() if i.kind == "expert"
        ),
        layers=tuple(compared.layers),
        continuations=continuations,
        records=tuple(records),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


# --------------------------------------------------------------------------------------- accounting


def _account(source: ModelSource, plan: CompressionPlan, found: Mapping[str, TensorInfo]) -> Check:
    """Every slot of the plan is there with its dtype and shape, unchanged tensors are the source's
    own bytes, and there is nothing else."""
    expected = {slot.name: slot for slot in result_slots(source, plan)}
    originals = {result_name(source, plan, n): info for n, info in source.tensors.items()}
    problems = [f"{name} is not planned" for name in found if name not in expected]
    for name, slot in expected.items():
        info = found.get(name)
        if info is None:
            problems.append(f"{name} is missing")
        elif Slot(name, info.dtype, info.shape) != slot:
            problems.append(f"{name} is {info.dtype} {list(info.shape)}")
        elif name in originals and not _same_bytes(originals[name], info):
            problems.append(f"{name} differs from the source")
    share = 1.0 - len(problems) / max(len(expected), 1)
    detail = "; ".join(problems[:3])
    return Check("tensors_accounted", max(share, 0.0), 1.0, not problems, detail)


def _is_complete(
    source: ModelSource, plan: CompressionPlan, found: Mapping[str, TensorInfo]
) -> bool:
    """Every slot of the plan is there with its dtype and shape."""
    there = {Slot(info.name, info.dtype, info.shape) for info in found.values()}
    return there.issuperset(result_slots(source, plan))


def _same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    with open(first.file, "rb") as one, open(second.file, "rb") as other:
        one.seek(first.begin)
        other.seek(second.begin)
        remaining = first.size_bytes
        while remaining:
            count = min(remaining, 2**24)
            if one.read(count) != other.read(count):
                return False
            remaining -= count
    return True


# ---------------------------------------------------------------------------------------- comparing


class _Watch(RoutingCapture, SinkCapture):
    """Routing and attention sinks of one layer of one model."""


@dataclass
class _Compared:
    """What the two streams showed."""

    layers: list[LayerComparison] = field(default_factory=list)
    retention: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    loss_source: float = 0.0
    loss_result: float = 0.0
    divergence: float = 0.0

    @property
    def perplexity_source(self) -> float:
        return _exp(self.loss_source)

    @property
    def perplexity_result(self) -> float:
        return _exp(self.loss_result)

    @property
    def perplexity_increase(self) -> float:
        return _exp(self.loss_result - self.loss_source) - 1.0

    @property
    def router_agreement(self) -> float:
        shares = [c.router_agreement for c in self.layers if c.router_agreement is not None]
        return sum(shares) / len(shares)


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _compare(
    original: StreamedModel, result: StreamedModel, batches: Sequence[Tensor], options: RunOptions
) -> _Compared:
    compared = _Compared()
    source_states, result_states = original.embed(batches), result.embed(batches)
    count = original.source.layer_count
    for layer in range(count):
        options.progress("validate", layer, count)
        source_watch, result_watch = _Watch(), _Watch()
        module = original.load_layer(layer)
        source_states = original.run_layer(layer, module, source_states, source_watch)
        module = result.load_layer(layer)
        result_states = result.run_layer(layer, module, result_states, result_watch)
        compared.layers.append(
            _compare_layer(layer, source_states, result_states, source_watch, result_watch)
        )
        retention = _retention(source_states, result_states)
        if retention is not None:
            compared.retention[layer] = retention
    options.progress("validate", count, count)
    _compare_predictions(compared, original, result, batches, source_states, result_states)
    return compared


def _compare_layer(
    layer: int,
    source_states: Sequence[Tensor],
    result_states: Sequence[Tensor],
    source_watch: _Watch,
    result_watch: _Watch,
) -> LayerComparison:
    source_heads = tuple(source_watch.sink_mass.tolist())
    result_heads = tuple(result_watch.sink_mass.tolist())
    return LayerComparison(
        layer=layer,
        peak_source=max(float(states.abs().max()) for states in source_states),
        peak_result=max(float(states.abs().max()) for states in result_states),
        sink_mass_source=sum(source_heads) / len(source_heads),
        sink_mass_result=sum(result_heads) / len(result_heads),
        sink_heads_source=source_heads,
        sink_heads_result=result_heads,
        hidden_error=relative_distance(result_states, source_states),
        router_agreement=_agreement(source_watch, result_watch),
    )


def _agreement(source_watch: _Watch, result_watch: _Watch) -> float | None:
    if not source_watch.saw_experts:
        return None
    same = source_watch.experts[:, :, None] == result_watch.experts[:, None, :]
    return float(same.any(dim=2).float().mean())


def _retention(source_states: Sequence[Tensor], result_states: Sequence[Tensor]) -> float | None:
    """See massive_activation_ratio; None for a layer that is not massive in the source."""
    old = torch.cat([states.flatten(1).float() for states in source_states])
    new = torch.cat([states.flatten(1).float() for states in result_states])
    median = float(old.abs().median(dim=1).values.mean())
    if not is_massive(float(old.abs().max()), median):
        return None
    at = old.abs().argmax(dim=1, keepdim=True)
    ratio = (new.gather(1, at) / old.gather(1, at)).clamp(min=1e-6)
    return float(torch.minimum(ratio, 1 / ratio).mean())


def _compare_predictions(
    compared: _Compared,
    original: StreamedModel,
    result: StreamedModel,
    batches: Sequence[Tensor],
    source_states: Sequence[Tensor],
    result_states: Sequence[Tensor],
) -> None:
    sequences = [row[1:] for batch in batches for row in batch]
    targets = [piece for row in sequences for piece in row.split(PIECE_TOKENS)]
    predictions = zip(
        targets,
        original.logits(in_pieces([states[:, :-1] for states in source_states])),
        result.logits(in_pieces([states[:, :-1] for states in result_states])),
        strict=True,
    )
    loss_source = loss_result = divergence = 0.0
    for target, source_logits, result_logits in predictions:
        wanted = target[None].to(source_logits.device)
        loss_source += _cross_entropy(source_logits, wanted)
        loss_result += _cross_entropy(result_logits, wanted)
        divergence += float(kl_divergence(source_logits, result_logits).double().sum())
        compared.tokens += target.numel()
    compared.loss_source = loss_source / compared.tokens
    compared.loss_result = loss_result / compared.tokens
    compared.divergence = divergence / compared.tokens


def _cross_entropy(logits: Tensor, target: Tensor) -> float:
    picked = logits.log_softmax(-1).gather(-1, target[..., None])
    return -float(picked.double().sum())


def _massive_check(compared: _Compared, rule: Validation) -> Check:
    name, limit = "massive_activation_ratio", rule.massive_activation_ratio
    if not compared.retention:
        return Check(
            name, None, limit, None, "not applicable: the source has no massive activation"
        )
    layer = min(compared.retention, key=lambda layer: compared.retention[layer])
    return _at_least(name, compared.retention[layer], limit, f"least in layer {layer}")


def _sink_check(compared: _Compared, rule: Validation) -> Check:
    before = after = 0.0
    for layer in compared.layers:
        for old, new in zip(layer.sink_heads_source, layer.sink_heads_result, strict=True):
            if old >= SINK_HEAD_FLOOR:
                before, after = before + old, after + new
    if not before:
        return Check(
            "sink_decay", None, rule.sink_decay, None,
            f"not applicable: no head of the source gives position 0 a mass of {SINK_HEAD_FLOOR}",
        )  # fmt: skip
    return _at_most("sink_decay", 1.0 - after / before, rule.sink_decay)


# --------------------------------------------------------------------------------------- generation


def _generate(
    original: StreamedModel,
    result: StreamedModel,
    tokens: Sequence[Sequence[int]],
    rule: Validation,
    options: RunOptions,
) -> tuple[tuple[Continuation, ...], Check]:
    wanted = rule.generation
    if not wanted.tokens:
        return (), Check(
            "repetition", None, rule.repetition, None, "not run: validation.generation.tokens is 0"
        )
    step = max(1, len(tokens) // wanted.prompts)
    prompts = torch.tensor([s[: wanted.prompt_tokens] for s in tokens[::step][: wanted.prompts]])
    steps = _steps("generate", 2 * wanted.tokens, options)
    source_ids = original.generate(prompts, wanted.tokens, lambda: next(steps)).tolist()
    result_ids = result.generate(prompts, wanted.tokens, lambda: next(steps)).tolist()
    repeated_source = sum(map(repetition, source_ids)) / len(source_ids)
    repeated_result = sum(map(repetition, result_ids)) / len(result_ids)
    detail = f"source {repeated_source:.3f}, result {repeated_result:.3f}"
    check = _at_most("repetition", repeated_result - repeated_source, rule.repetition, detail)
    return _texts(original.source, prompts.tolist(), source_ids, result_ids), check


def _steps(stage: str, total: int, options: RunOptions) -> Iterator[None]:
    for done in range(1, total + 1):
        options.progress(stage, done, total)
        yield


def repetition(tokens: Sequence[int]) -> float:
    """Share of the 4-grams of a continuation that occurred in it before: 0 for no repetition, near
    1 for a loop."""
    grams = Counter(tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1))
    total = sum(grams.values())
    return 1.0 - len(grams) / total if total else 0.0


def _texts(
    source: ModelSource,
    prompts: Sequence[Sequence[int]],
    source_ids: Sequence[Sequence[int]],
    result_ids: Sequence[Sequence[int]],
) -> tuple[Continuation, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path)
    rows = zip(prompts, source_ids, result_ids, strict=True)
    return tuple(Continuation(*(str(tokenizer.decode(list(ids))) for ids in r)) for r in rows)


# ------------------------------------------------------------------------------------------- reload


def _reload(
    result: StreamedModel,
    plan: CompressionPlan,
    directory: Path,
    tokens: Sequence[int],
    options: RunOptions,
) -> Check:
    """Load the checkpoint as a user would, in its own process: engines patch what they import."""
    options.progress("reload", 0, 1)
    batch = torch.tensor([list(tokens)])
    states = result.embed([batch])
    for layer in range(result.source.layer_count):
        states = result.run_layer(layer, result.load_layer(layer), states)
    expected = next(result.logits(states)).cpu()
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.json"
        answer = Path(scratch) / "logits.safetensors"
        request.write_text(json.dumps({"tokens": list(tokens), "target": plan.target}))
        command = [sys.executable, "-m", "se_compress.reload", str(directory), scratch]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        options.progress("reload", 1, 1)
        if process.returncode != 0:
            return _reload_failure(process)
        from safetensors.torch import load_file

        logits = load_file(answer)["logits"]
    error = float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
    return _at_most("reload", error, RELOAD_LIMIT, f"logits through {plan.target}")


def _reload_failure(process: "subprocess.CompletedProcess[str]") -> Check:
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"exit code {process.returncode}"
    if process.returncode == NOT_RUN_EXIT_CODE:
        return Check("reload", None, RELOAD_LIMIT, None, f"not run: {last}")
    return Check("reload", None, RELOAD_LIMIT, False, f"loading failed: {last[:300]}")
