"""Compare what was written with what it was made from, on text that neither has been fitted to.

Everything is read back from disk. Source and result run side by side, one layer of each in memory.
The measures are defined in `measures.py`; these are the gates:

    perplexity_increase       exp(mean cross-entropy) of the next token, result / source - 1
    kl_divergence             mean over positions of KL(source || result) of the next token, nats
    massive_activation_ratio  least retention of any massive activation of the source: per layer,
                              position and channel, if it is common to half of the sequences
    sink_token_error          most that the residual of the tokens with a massive activation changes
                              in a layer, relative to its size
    sink_decay                share of the attention to position 0 that is gone, queries from
                              position 8 on, all layers, heads with a sink
    router_agreement          share of the experts that the source chose for a token which the
                              result chose too, by their identity in the source: a merged expert
                              stands for all its members, a pruned one is never chosen; mean over
                              tokens and layers; `router_agreement_least` is that of the worst layer
    repetition                share of 4-grams of a greedy continuation that occurred in it before;
                              result - source, mean over prompts
    loops                     share of the continuations that end in a loop, result - source
    weight_cosine             least cosine between a quantised matrix and what it was made from:
                              experts, layers or files that took each other's place. One that is
                              next to nothing in both is left out
    weight_gain               spread of the gains of a matrix's rows (`measures.gain_spread`),
                              median over the matrices of one kind in a layer, worst layer: scales
                              that belong to other rows
    tensors_accounted         share of the planned tensors that are in the result as planned,
                              unchanged ones byte for byte, packed ones by the hash of what was
                              written, those that surgery makes (router rows of the experts that
                              are left, merged and zeroed weights) value for value, with nothing
                              else beside them; and all of them numbers
    reload                    relative error of the logits after loading the result with its target
                              engine, against those that were validated here; median over positions,
                              as round-off that sends a few tokens to another expert is no fault

Perplexity and KL divergence come with a 95 % interval: wholly within the limit is a pass, wholly
beyond it a failure, and in between the value decides and the detail says that the sample is too
small to tell. The default limits are calibrated by `benchmarks/gates.py`.
"""

import importlib.metadata
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from se_compress.artifacts import (
    COMPRESSION_FILE,
    Check,
    Compressed,
    CompressionPlan,
    Continuation,
    LayerComparison,
    LayerRecord,
    ModelSource,
    RunOptions,
    Scheme,
    SinkPosition,
    TensorInfo,
    ValidationReport,
    from_json,
)
from se_compress.engines.accounting import account, is_complete, leading, same_bytes
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.reloading import RELOAD_LIMIT, check_reload
from se_compress.errors import SourceError
from se_compress.formats import FORMATS, UNQUANTISED
from se_compress.model.checkpoint import Reader, check_finite, open_result, open_tensors
from se_compress.model.measures import (
    COMMON_SHARE,
    SINK_HEAD_FLOOR,
    bootstrap_interval,
    cross_entropy,
    distinct,
    find_loop,
    gain_spread,
    is_massive,
    kl_divergence,
    massive_elements,
    massive_places,
    median_of,
    peak_of,
    relative_distance,
    sink_decay,
    sink_rate,
    sink_token_change,
    weight_cosine,
)
from se_compress.model.overflow import check_logits, check_states
from se_compress.model.splice import open_shrunk
from se_compress.model.streaming import (
    PIECE_TOKENS,
    RoutingCapture,
    SinkCapture,
    StreamedModel,
    batches_of,
    in_pieces,
)
from se_compress.model.surgery import Shrunk
from se_compress.opening.families import FAMILIES, unfused_name
from se_compress.opening.headers import read_headers
from se_compress.opening.source import read_config
from se_compress.recipe import Recipe, Validation

LEAST_PARTS = 3  # of a packed matrix; what else may follow has a default
# A matrix below this share of its kind's usual norm is judged by what the model does alone.
NEGLIGIBLE = 0.01
LISTED_ELEMENTS, LISTED_SINKS = 8, 4
GATES = (
    "perplexity_increase",
    "kl_divergence",
    "massive_activation_ratio",
    "sink_token_error",
    "sink_decay",
    "router_agreement",
    "router_agreement_least",
    "repetition",
    "loops",
    "weight_cosine",
    "weight_gain",
    "tensors_accounted",
    "reload",
)
PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "gptqmodel",
    "bitsandbytes",
    "datasets",
    "se-compress",
)


def validate(
    source: ModelSource,
    plan: CompressionPlan | None,
    directory: Path,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    *,
    original: "Original | None" = None,
    reload: bool = True,
) -> ValidationReport:
    """Judge the checkpoint in `directory`, made from `source` by `plan`.

    plan      None for a checkpoint that somebody else made of the source, in one of `_form_of`'s
              formats. Every tensor has to be there, but may have changed
    tokens    held-out sequences of token ids, all of one length
    original  the source's side, if several results are judged on the same tokens
    reload    whether its engine is to load it; without that, the check is not run

    What `compress` left in the directory goes into the report. If it stopped early, the result is
    not whole, and the gate that stopped it is all that is reported.

    Raises SourceError if the checkpoint cannot be read.
    """
    found = read_headers(directory)
    records = _records(directory)
    if records and (stopped := records[-1].failed):
        reason = f"not run: compressing stopped after layer {records[-1].layer}"
        return _report(source, _alone(stopped, reason), None, (), records, found)
    if plan:
        stored = _planned(source, plan, directory, found, records)
    else:
        stored = _foreign(source, directory, found)
    if not stored.complete:
        reason = "not run: a result with tensors missing cannot be run"
        return _report(source, _alone(stored.accounted, reason), None, (), records, found)
    original = original or Original(source, tokens, recipe, options)
    try:
        return _judge_stored(stored, original, directory, records, found, recipe, options, reload)
    except _Unusable as error:
        reason = "not run: a tensor of the result cannot be used"
        return _report(source, _alone(stored.not_usable(error), reason), None, (), records, found)


def _judge_stored(
    stored: "_Stored",
    original: "Original",
    directory: Path,
    records: Sequence[LayerRecord],
    found: Mapping[str, TensorInfo],
    recipe: Recipe,
    options: RunOptions,
    reload: bool,
) -> ValidationReport:
    """All gates of a checkpoint that is whole. Raises _Unusable."""
    result = _streamed(stored.source, stored.read, recipe, options)
    judged = _judge(original, result, stored.small, recipe.validation, options)
    reloaded = Check("reload", None, RELOAD_LIMIT, None, "not run: left out by the caller")
    if reload:
        tokens = original.tokens
        reloaded = _reload(result, stored.target, directory, found, tokens, options)
    weights = _weight_checks(stored.changed, stored.intended, stored.read, recipe.validation)
    checks = [*judged.checks, *weights, stored.accounted, reloaded]
    source = original.model.source
    return _report(source, checks, judged.compared, judged.continuations, records, found)


def _records(directory: Path) -> tuple[LayerRecord, ...]:
    """What `compress` said of each layer; nothing of a checkpoint that it did not make."""
    file = directory / COMPRESSION_FILE
    if not file.exists():
        return ()
    return from_json(Compressed, file.read_text(encoding="utf-8"), str(file)).layers


def try_again(
    source: ModelSource,
    plan: CompressionPlan,
    directory: Path,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    options: RunOptions,
    report: ValidationReport,
) -> ValidationReport:
    """The report on a result with its reload checked once more, and all else as it was."""
    found = read_headers(directory)
    stored = _planned(source, plan, directory, found, report.records)
    result = _streamed(stored.source, stored.read, recipe, options)
    again = _reload(result, stored.target, directory, found, tokens, options)
    checks = tuple(again if check.name == again.name else check for check in report.checks)
    return replace(
        report,
        passed=all(check.passed is not False for check in checks),
        checks=checks,
        not_run=tuple(check.name for check in checks if check.passed is None),
    )


def judge(
    original: "Original",
    read: Reader,
    recipe: Recipe,
    options: RunOptions,
    intended: Reader | None = None,
) -> tuple[Check, ...]:
    """Every gate that behaviour and weights of a model decide. `read` gives its tensors by the
    names of the source, `intended` what they were made from, if that is not the source; nothing has
    to be on disk."""
    source = original.model.source
    result = _streamed(source, read, recipe, options)
    judged = _judge(original, result, None, recipe.validation, options).checks
    intended = intended or original.model.read
    weights = _weight_checks(source.tensors.values(), intended, read, recipe.validation)
    return (*judged, *weights)


def _alone(check: Check, reason: str) -> list[Check]:
    """All gates in their order, of which only one could be run."""
    return [
        check if name == check.name else Check(name, None, None, None, reason) for name in GATES
    ]


def _report(
    source: ModelSource,
    checks: Sequence[Check],
    compared: "_Compared | None",
    continuations: tuple[Continuation, ...],
    records: Sequence[LayerRecord],
    found: Mapping[str, TensorInfo],
) -> ValidationReport:
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
        expert_bytes=sum(i.size_bytes for i in found.values() if ".experts." in i.name),
        source_expert_bytes=sum(
            i.size_bytes for i in source.tensors.values() if i.kind == "expert"
        ),
        layers=compared.layers if compared else (),
        sinks=compared.sinks if compared else (),
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


@dataclass(frozen=True)
class _Stored:
    """A checkpoint on disk. `source` and `small` describe it as a model, `read` gives its tensors
    by the names of that and raises _Unusable, `intended` what they were made from; of `changed` the
    values may differ. `target` is the engine that should load it."""

    source: ModelSource
    small: Shrunk | None
    target: str
    accounted: Check
    complete: bool
    read: Reader
    intended: Reader
    changed: tuple[TensorInfo, ...]

    def not_usable(self, error: "_Unusable") -> Check:
        """The account of a checkpoint with a tensor that is no weight."""
        value = min(self.accounted.value or 0.0, 1.0 - 1.0 / len(self.source.tensors))
        detail = "; ".join(filter(None, [str(error), self.accounted.detail]))
        return replace(self.accounted, value=value, passed=False, detail=detail)


class _Unusable(Exception):
    """A tensor of the result cannot be unpacked, or holds NaN or infinity."""


def _usable(read: Reader, names: Mapping[str, str]) -> Reader:
    """The same reader of a result, which raises _Unusable: what it holds is the result's fault,
    while `check_finite` speaks of the source."""

    def checked(name: str) -> Tensor:
        where = names[name]
        try:
            return check_finite(where, read(name))
        except SourceError as error:
            raise _Unusable(str(error)) from None
        except (ValueError, IndexError, RuntimeError) as error:  # words that no unpacker can read
            if "memory" in str(error):  # torch has no class of its own for that on a CPU
                raise
            reason = str(error).partition("\n")[0]
            raise _Unusable(f"{where} cannot be unpacked: {reason[:200]}") from None

    return checked


def _planned(
    source: ModelSource,
    plan: CompressionPlan,
    directory: Path,
    found: Mapping[str, TensorInfo],
    records: Sequence[LayerRecord],
) -> _Stored:
    blueprint = draw_blueprint(source, plan)
    model = blueprint.source
    read = open_result(found, model.tensors, plan.scheme, blueprint.names)
    return _Stored(
        source=model,
        small=blueprint.shrunk,
        target=plan.target,
        accounted=account(blueprint, directory, found, records),
        complete=is_complete(blueprint, found),
        read=_usable(read, blueprint.names),
        intended=open_shrunk(blueprint.shrunk),
        changed=tuple(tensor.info for tensor in blueprint.packed()),
    )


def _foreign(source: ModelSource, directory: Path, found: Mapping[str, TensorInfo]) -> _Stored:
    """Tensors are looked for by the source's names, and by those of GPTQModel."""
    form, target = _form_of(directory)
    suffixes = FORMATS[form].suffixes if form != UNQUANTISED else ()
    family = FAMILIES[source.family]
    names = {name: name if name in found else unfused_name(family, name) for name in source.tensors}
    problems, known, same = [], set[str](), 0
    for name, info in source.tensors.items():
        stem = names[name].removesuffix(".weight")
        whole = found.get(names[name])
        parts = [part for part in (f"{stem}.{suffix}" for suffix in suffixes) if part in found]
        known |= {names[name], *parts}
        if whole is not None and whole.shape != info.shape:
            problems.append(f"{names[name]} is {list(whole.shape)}, not {list(info.shape)}")
        elif whole is None and len(parts) < LEAST_PARTS:
            problems.append(f"{names[name]} is missing")
        elif whole is not None and whole.dtype == info.dtype:
            same += same_bytes(info, whole)
    complete = not problems
    problems += [f"{name} is not in the source" for name in found if name not in known]
    copied = f"{same} of {len(names)} are the source's own bytes"
    detail = "; ".join([copied, *leading(problems)])
    share = max(0.0, 1.0 - len(problems) / len(names))
    return _Stored(
        source=source,
        small=None,
        target=target,
        accounted=Check("tensors_accounted", share, 1.0, not problems, detail),
        complete=complete,
        read=_usable(open_result(found, source.tensors, Scheme(form, "", -1, True), names), names),
        intended=open_tensors(source.tensors),
        changed=tuple(source.tensors.values()),
    )


def _form_of(directory: Path) -> tuple[str, str]:
    """The format of a checkpoint and the engine that loads it, by its config. Raises SourceError
    for a format that is not read."""
    settings = read_config(directory).get("quantization_config")
    if not settings:
        return UNQUANTISED, "transformers"
    if not isinstance(settings, dict):
        raise SourceError(f"{directory}/config.json: quantization_config is not a JSON object")
    method = settings.get("quant_method", "unknown")
    layout = settings.get("checkpoint_format", settings.get("format"))
    read = [form for form in FORMATS.values() if form.layout]
    for form in read:
        if (form.quant_method, form.layout) == (method, layout):
            return form.name, form.engine
    accepted = ", ".join(f"{form.quant_method} (format {form.layout})" for form in read)
    raise SourceError(
        f"{directory}: quant_method {method} (format {layout}) is not read without a plan of ours; "
        f"accepted are unquantised checkpoints, {accepted}"
    )


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the result beside what it was made from. `kind` is its projection; `cosine` is
    None if it was zero and still is; `before` and `after` are Frobenius norms."""

    name: str
    layer: int | None
    kind: str
    cosine: float | None
    spread: float
    before: float
    after: float


def _weight_checks(
    changed: Iterable[TensorInfo], intended: Reader, read: Reader, rule: Validation
) -> tuple[Check, Check]:
    """Every matrix that may have changed, beside what it was made from. One that was next to
    nothing and still is has lost nothing, whatever its direction: the grid, whose least scale is
    that of float16, may round it to zero."""
    matrices = [
        _compare_matrix(info, intended(info.name).float(), read(info.name).float())
        for info in changed
        if len(info.shape) == 2
    ]
    usual = _usual_norms(matrices)
    judged = [m for m in matrices if max(m.before, m.after) > NEGLIGIBLE * usual[m.kind]]
    cosines = [(m.cosine, m.name) for m in judged if m.cosine is not None]
    least, name = min(cosines, key=lambda pair: _sortable(pair[0]), default=(1.0, ""))
    spreads = defaultdict[tuple[int | None, str], list[float]](list)
    for matrix in judged:
        spreads[matrix.layer, matrix.kind].append(matrix.spread)
    of_kind = {key: median(values) for key, values in spreads.items()}
    worst = max(of_kind, key=lambda key: _sortable(of_kind[key], math.inf), default=None)
    most = of_kind[worst] if worst else 0.0
    left_out = len([m for m in matrices if m.before > 0]) - len([m for m in judged if m.before > 0])
    details = (f"least in {name}" if least < 1.0 or math.isnan(least) else "", _left_out(left_out))
    detail = f"most in {worst[1]} of layer {worst[0]}" if worst and most else ""
    return (
        _at_least("weight_cosine", least, rule.weight_cosine, "; ".join(filter(None, details))),
        _at_most("weight_gain", most, rule.weight_gain, detail),
    )


def _compare_matrix(info: TensorInfo, before: Tensor, after: Tensor) -> _Matrix:
    sizes = float(before.norm()), float(after.norm())
    cosine = weight_cosine(before, after)
    if cosine is None and sizes[1] > 0:
        cosine = 0.0  # something came out of nothing
    kind = info.name.removesuffix(".weight").rpartition(".")[2]
    return _Matrix(info.name, info.layer, kind, cosine, gain_spread(before, after), *sizes)


def _usual_norms(matrices: Iterable[_Matrix]) -> dict[str, float]:
    """By kind, over all layers: the upper quartile, so that neither a few large ones nor a
    majority that is next to nothing decide it."""
    norms = defaultdict[str, list[float]](list)
    for matrix in matrices:
        norms[matrix.kind].append(matrix.before)
    return {kind: sorted(sizes)[3 * (len(sizes) - 1) // 4] for kind, sizes in norms.items()}


def _left_out(count: int) -> str:
    return f"{count} of less than {NEGLIGIBLE:.0%} of the usual size are left out" if count else ""


# ---------------------------------------------------------------------------------------- comparing


class _Watch(RoutingCapture, SinkCapture):
    """Routing and attention sinks of one layer of one model."""


@dataclass(frozen=True)
class _Seen:
    """What one model showed of one layer: hidden states after it, sinks, and in a MoE layer the
    chosen experts [N, k]."""

    states: list[Tensor]
    sink_mass: Tensor
    received: Tensor
    experts: Tensor | None


class Original:
    """The source's side of a comparison. With `keep`, what its layers showed stays in memory, so
    that several results of a small model are judged at the cost of theirs alone."""

    def __init__(
        self,
        source: ModelSource,
        tokens: Sequence[Sequence[int]],
        recipe: Recipe,
        options: RunOptions,
        keep: bool = False,
    ) -> None:
        read = open_tensors(source.tensors)
        self.model = _streamed(source, read, recipe, options)
        self.tokens = tokens
        self.batches = batches_of(tokens, options.batch_tokens)
        self._seen: list[_Seen] | None = list(self._walk()) if keep else None
        self._continuations: dict[int, list[list[int]]] = {}

    def walk(self) -> Iterable[_Seen]:
        return self._seen if self._seen is not None else self._walk()

    def _walk(self) -> Iterator[_Seen]:
        for batch in self.batches:
            check_states(self.model, -1, self.model.embed([batch]))
        for layer, seen in enumerate(_walk(self.model, self.batches)):
            check_states(self.model, layer, seen.states)
            yield seen

    def generate(
        self, prompts: Tensor, count: int, on_token: Callable[[], None]
    ) -> list[list[int]]:
        if count not in self._continuations:
            self._continuations[count] = self.model.generate(prompts, count, on_token).tolist()
        return self._continuations[count]


def _streamed(
    source: ModelSource, read: Reader, recipe: Recipe, options: RunOptions
) -> StreamedModel:
    dtype = getattr(torch, recipe.compute_dtype)
    return StreamedModel(source, read, torch.device(options.device), dtype)


def _walk(model: StreamedModel, batches: Sequence[Tensor]) -> Iterator[_Seen]:
    states = model.embed(batches)
    for layer in range(model.source.layer_count):
        watch = _Watch()
        states = model.run_layer(layer, model.load_layer(layer), states, watch)
        experts = watch.experts if watch.saw_experts else None
        yield _Seen(states, watch.sink_mass, watch.received, experts)


@dataclass(frozen=True)
class _Predictions:
    """Sums over the predicted tokens of each sequence [S], in nats, and the number of these."""

    tokens: Tensor
    loss_source: Tensor
    loss_result: Tensor
    divergence: Tensor

    @property
    def perplexities(self) -> tuple[float, float]:
        total = self.tokens.sum()
        source, result = (loss.sum() / total for loss in (self.loss_source, self.loss_result))
        return _exp(float(source)), _exp(float(result))


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class _Compared:
    """What the two streams showed. `received_*` [heads, T], mean over all layers."""

    layers: tuple[LayerComparison, ...]
    sinks: tuple[SinkPosition, ...]
    predictions: _Predictions


def _compare(
    original: Original, result: StreamedModel, small: Shrunk | None, options: RunOptions
) -> _Compared:
    layers: list[LayerComparison] = []
    sinks = _SinkSums()
    count = result.source.layer_count
    options.progress("validate", 0, count)
    pairs = zip(original.walk(), _walk(result, original.batches), strict=True)
    for layer, (old, new) in enumerate(pairs):
        layers.append(
            _compare_layer(layer, old, new, _new_ids(small, layer, result.source.expert_count))
        )
        sinks.add(old, new)
        options.progress("validate", layer + 1, count)
    return _Compared(
        tuple(layers), sinks.strongest(), _compare_predictions(original, result, old, new)
    )


def _compare_layer(
    layer: int, old: _Seen, new: _Seen, new_ids: Mapping[int, int]
) -> LayerComparison:
    places = massive_places(old.states)
    cosine, error = sink_token_change(old.states, new.states, places)
    return LayerComparison(
        layer=layer,
        peak_source=peak_of(old.states),
        peak_result=peak_of(new.states),
        sink_mass_source=float(old.sink_mass.mean()),
        sink_mass_result=float(new.sink_mass.mean()),
        sink_heads_source=tuple(old.sink_mass.tolist()),
        sink_heads_result=tuple(new.sink_mass.tolist()),
        hidden_error=relative_distance(new.states, old.states),
        router_agreement=_agreement(old.experts, new.experts, new_ids),
        massive=massive_elements(old.states, new.states, places)[:LISTED_ELEMENTS],
        massive_result=is_massive(peak_of(new.states), median_of(new.states)),
        sink_cosine=cosine,
        sink_error=error,
        sink_rate_source=float(sink_rate(old.received)[0]),
        sink_rate_result=float(sink_rate(new.received)[0]),
    )


def _new_ids(small: Shrunk | None, layer: int, count: int) -> Mapping[int, int]:
    """What the result calls each routed expert of the source's layer that it still has; the same
    without surgery."""
    if small is None:
        return {expert: expert for expert in range(count)}
    return {
        member.expert: new.expert
        for new, members in small.origin.items()
        for member in members
        if new.layer == layer and isinstance(new.expert, int) and isinstance(member.expert, int)
    }


def _agreement(old: Tensor | None, new: Tensor | None, new_ids: Mapping[int, int]) -> float | None:
    if old is None or new is None:
        return None
    renamed = torch.full((int(old.max()) + 1,), -1, device=old.device)
    for expert in range(len(renamed)):
        renamed[expert] = new_ids.get(expert, -1)
    return float((renamed[old][:, :, None] == new[:, None, :]).any(dim=2).float().mean())


@dataclass
class _SinkSums:
    """Over the layers: rate and mass of each position that enough queries can see."""

    layers: int = 0
    sums: Tensor | None = None

    def add(self, old: _Seen, new: _Seen) -> None:
        half = (old.received.shape[1] + 1) // 2
        parts = [
            part[:half]
            for received in (old.received, new.received)
            for part in (received.mean(dim=0), sink_rate(received))
        ]
        stacked = torch.stack(parts).double()
        self.sums = stacked if self.sums is None else self.sums + stacked
        self.layers += 1

    def strongest(self) -> tuple[SinkPosition, ...]:
        assert self.sums is not None
        means = self.sums / self.layers
        at = means[[0, 2]].amax(dim=0).topk(min(LISTED_SINKS, means.shape[1])).indices.tolist()
        rows = ((position, *means[:, position].tolist()) for position in at)
        return tuple(
            SinkPosition(position, mass, mass_after, rate, rate_after)
            for position, mass, rate, mass_after, rate_after in rows
        )


def _compare_predictions(
    original: Original, result: StreamedModel, old: _Seen, new: _Seen
) -> _Predictions:
    sequences = [row[1:] for batch in original.batches for row in batch]
    pieces = [(i, part) for i, row in enumerate(sequences) for part in row.split(PIECE_TOKENS)]
    ours = in_pieces([states[:, :-1] for states in old.states])
    predictions = zip(
        pieces,
        (check_logits(original.model, logits) for logits in original.model.logits(ours)),
        result.logits(in_pieces([states[:, :-1] for states in new.states])),
        strict=True,
    )
    sums = torch.zeros(4, len(sequences), dtype=torch.float64)
    for (sequence, target), source_logits, result_logits in predictions:
        wanted = target[None].to(source_logits.device)
        sums[0, sequence] += target.numel()
        for row, part in enumerate(
            (
                cross_entropy(source_logits, wanted),
                cross_entropy(result_logits, wanted),
                kl_divergence(source_logits, result_logits),
            )
        ):
            sums[row + 1, sequence] += float(part.double().sum())
    return _Predictions(*sums)


# -------------------------------------------------------------------------------------------- gates


@dataclass(frozen=True)
class _Judged:
    """The gates that the two models' behaviour decides, and what they were decided on."""

    checks: tuple[Check, ...]
    compared: _Compared
    continuations: tuple[Continuation, ...]


def _judge(
    original: Original,
    result: StreamedModel,
    small: Shrunk | None,
    rule: Validation,
    options: RunOptions,
) -> _Judged:
    compared = _compare(original, result, small, options)
    continuations, repetition = _generate(original, result, rule, options)
    checks = (
        *_prediction_checks(compared.predictions, rule),
        *_massive_checks(compared.layers, rule),
        _sink_check(compared, rule),
        *_router_checks(compared.layers, rule),
        *repetition,
    )
    return _Judged(checks, compared, continuations)


def _at_most(
    name: str,
    value: float,
    limit: float,
    detail: str = "",
    interval: tuple[float, float] | None = None,
) -> Check:
    """With an interval the check passes or fails if all of it does; where it holds the limit, the
    value decides, and the detail says so. NaN fails."""
    if interval is None:
        return Check(name, value, limit, value <= limit, detail)
    low, high = interval
    if low <= limit < high:
        detail = "; ".join(filter(None, [detail, "the sample is too small to tell"]))
    return Check(name, value, limit, value <= limit, detail, low, high)


def _at_least(name: str, value: float, limit: float, detail: str = "") -> Check:
    return Check(name, value, limit, value >= limit, detail)


def _prediction_checks(found: _Predictions, rule: Validation) -> tuple[Check, Check]:
    total = float(found.tokens.sum())
    loss = found.loss_result - found.loss_source
    loss_interval = bootstrap_interval(loss, found.tokens)
    increase = (_exp(loss_interval[0]) - 1, _exp(loss_interval[1]) - 1) if loss_interval else None
    few = "" if loss_interval else f"{len(loss)} sequences are too few for an interval"
    return (
        _at_most(
            "perplexity_increase",
            _exp(float(loss.sum()) / total) - 1,
            rule.perplexity_increase,
            few,
            increase,
        ),
        _at_most(
            "kl_divergence",
            float(found.divergence.sum()) / total,
            rule.kl_divergence,
            few,
            bootstrap_interval(found.divergence, found.tokens),
        ),
    )


def _massive_checks(layers: Sequence[LayerComparison], rule: Validation) -> tuple[Check, Check]:
    common = [(e, c) for c in layers for e in c.massive if e.share >= COMMON_SHARE]
    if not common:
        none = "not applicable: the source has no massive activation"
        return (
            Check("massive_activation_ratio", None, rule.massive_activation_ratio, None, none),
            Check("sink_token_error", None, rule.sink_token_error, None, none),
        )
    element, layer = min(common, key=lambda pair: _sortable(pair[0].retention))
    where = f"position {element.position}" if element.position >= 0 else "several positions"
    worst = max((c for _, c in common), key=lambda c: _sortable(c.sink_error, math.inf))
    return (
        _at_least(
            "massive_activation_ratio",
            element.retention,
            rule.massive_activation_ratio,
            f"least in layer {layer.layer}, {where}, channel {element.channel}",
        ),
        _at_most(
            "sink_token_error",
            worst.sink_error,
            rule.sink_token_error,
            f"most in layer {worst.layer}, where the cosine is {worst.sink_cosine:.4f}",
        ),
    )


def _sortable(value: float, instead: float = -math.inf) -> float:
    return instead if math.isnan(value) else value


def _sink_check(compared: _Compared, rule: Validation) -> Check:
    decay = sink_decay(
        pair
        for layer in compared.layers
        for pair in zip(layer.sink_heads_source, layer.sink_heads_result, strict=True)
    )
    sinks = ", ".join(
        f"position {sink.position} ({sink.rate_source:.2f} -> {sink.rate_result:.2f})"
        for sink in compared.sinks[:2]
    )
    if decay is None:
        reason = f"not applicable: no head of the source gives position 0 {SINK_HEAD_FLOOR}"
        return Check("sink_decay", None, rule.sink_decay, None, reason)
    return _at_most("sink_decay", decay, rule.sink_decay, f"sink rates: {sinks}")


def _router_checks(layers: Sequence[LayerComparison], rule: Validation) -> tuple[Check, Check]:
    shares = {c.layer: c.router_agreement for c in layers if c.router_agreement is not None}
    worst = min(shares, key=lambda layer: _sortable(shares[layer]))
    mean = sum(shares.values()) / len(shares)
    return (
        _at_least("router_agreement", mean, rule.router_agreement),
        _at_least(
            "router_agreement_least",
            shares[worst],
            rule.router_agreement_least,
            f"layer {worst}",
        ),
    )


# --------------------------------------------------------------------------------------- generation


def _generate(
    original: Original, result: StreamedModel, rule: Validation, options: RunOptions
) -> tuple[tuple[Continuation, ...], tuple[Check, Check]]:
    wanted, tokens = rule.generation, original.tokens
    if not wanted.tokens:
        reason = "not run: validation.generation.tokens is 0"
        limits = {"repetition": rule.repetition, "loops": rule.loops}
        repetition, loops = (Check(n, None, at, None, reason) for n, at in limits.items())
        return (), (repetition, loops)
    step = max(1, len(tokens) // wanted.prompts)
    prompts = torch.tensor([s[: wanted.prompt_tokens] for s in tokens[::step][: wanted.prompts]])
    steps = _steps("generate", 2 * wanted.tokens, options)
    source_ids = original.generate(prompts, wanted.tokens, lambda: next(steps))
    result_ids = result.generate(prompts, wanted.tokens, lambda: next(steps)).tolist()
    continuations = _continuations(original.model.source, prompts.tolist(), source_ids, result_ids)
    return continuations, _repetition_checks(source_ids, result_ids, rule)


def _steps(stage: str, total: int, options: RunOptions) -> Iterator[None]:
    for done in range(1, total + 1):
        options.progress(stage, done, total)
        yield


def _repetition_checks(
    source_ids: Sequence[Sequence[int]], result_ids: Sequence[Sequence[int]], rule: Validation
) -> tuple[Check, Check]:
    count = len(source_ids)
    old, new = (sum(1 - distinct(ids) for ids in side) / count for side in (source_ids, result_ids))
    before, after = ([find_loop(ids) for ids in side] for side in (source_ids, result_ids))
    loops_before, loops_after = (sum(map(bool, loops)) for loops in (before, after))
    detail = f"source {loops_before} of {count}, result {loops_after}"
    added = [loop for was, loop in zip(before, after, strict=True) if loop and not was]
    if added:
        worst = max(added, key=lambda loop: loop.length)
        detail += f"; one says the same {worst.period} tokens for {worst.length}"
    excess = (loops_after - loops_before) / count
    return (
        _at_most("repetition", new - old, rule.repetition, f"source {old:.3f}, result {new:.3f}"),
        _at_most("loops", excess, rule.loops, detail),
    )


def _continuations(
    source: ModelSource,
    prompts: Sequence[Sequence[int]],
    source_ids: Sequence[Sequence[int]],
    result_ids: Sequence[Sequence[int]],
) -> tuple[Continuation, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source.path, local_files_only=True, trust_remote_code=False
    )
    return tuple(
        Continuation(
            prompt=str(tokenizer.decode(list(prompt))),
            source=str(tokenizer.decode(list(old))),
            result=str(tokenizer.decode(list(new))),
            distinct_source=distinct(old),
            distinct_result=distinct(new),
            loop_source=find_loop(old),
            loop_result=find_loop(new),
        )
        for prompt, old, new in zip(prompts, source_ids, result_ids, strict=True)
    )


# ------------------------------------------------------------------------------------------- reload


def _reload(
    result: StreamedModel,
    target: str,
    directory: Path,
    found: Mapping[str, TensorInfo],
    tokens: Sequence[Sequence[int]],
    options: RunOptions,
) -> Check:
    """On the first held-out sequence, in a process of its own: engines patch what they import."""
    return check_reload(result, target, directory, found.values(), tokens[0], options)
