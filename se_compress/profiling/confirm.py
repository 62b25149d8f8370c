"""Confirm super experts by their cause: silence them, and see what becomes of the stream.

States are lists of batches, in the model's dtype.
"""

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from se_compress.artifacts import (
    Ablation,
    ExpertId,
    ExpertIndex,
    ModelSource,
    RunOptions,
    SuperExpert,
)
from se_compress.model.measures import peak_of
from se_compress.model.observers import SinkCapture
from se_compress.model.states import States, batches_of, hidden_of
from se_compress.model.streaming import StreamedModel
from se_compress.profiling.divergence import mean_divergence
from se_compress.recipe import Recipe

# A candidate is confirmed if zeroing it takes away this share of its layer's rise, and its control
# less. Not more, because several experts of one layer may share the work (DeepSeek-R1, layer 14:
# two).
CONFIRMING_SHARE = 0.25
# Every silenced expert has a copy of the stream of so many sequences in memory.
CONFIRM_SEQUENCES = 8


@dataclass
class _Variant:
    """A copy of the stream in which one expert is silent, or the source's own.

    silent        the silenced expert; layer -1 for the source's stream
    states        those after the last layer that was run, of each batch
    rise_removed  share of the layer's rise that is gone, see `_rise_removed`
    peaks         layer from the fork on -> greatest |h| after it
    sinks         layer from the fork on -> attention to position 0, mean over heads and sequences
    divergence    KL divergence of the next token from the source's, in nats, mean over positions
    """

    silent: ExpertId
    states: list[States] = field(default_factory=list)
    rise_removed: float = 0.0
    peaks: dict[int, float] = field(default_factory=dict)
    sinks: dict[int, float] = field(default_factory=dict)
    divergence: float = 0.0


class _SinkWatch(SinkCapture):
    """Attention to the sink, with some experts of the layer silent."""

    def __init__(self, silent: Iterable[ExpertIndex] = ()) -> None:
        super().__init__()
        self.silenced = frozenset(silent)

    @property
    def mean(self) -> float:
        """Attention to position 0, mean over heads and sequences; 0 without softmax attention."""
        return float(self.sink_mass.mean()) if len(self.sink_mass) else 0.0


def confirm(
    model: StreamedModel,
    tokens: Sequence[Sequence[int]],
    candidates: Sequence[SuperExpert],
    recipe: Recipe,
    options: RunOptions,
) -> tuple[SuperExpert, ...]:
    """The candidates with evidence: every one is silenced, and so is a random expert beside it.

    One pass: the source's stream and one copy for each silenced expert, forked at its layer.

    tokens      sequences of token ids, all of one length
    candidates  experts that the criterion proposes
    """
    candidate_ids = {candidate.id for candidate in candidates}
    pairs = {c.id: control_for(c.id, candidate_ids, model.source, recipe) for c in candidates}
    variants = [_Variant(i) for pair in pairs.items() for i in pair if i is not None]
    base = _Variant(ExpertId(-1, -1))
    batches = batches_of(tokens, options.batch_tokens)
    base.states = model.embed(batches)
    for layer in range(model.source.layer_count):
        options.progress("confirm", layer, model.source.layer_count)
        _confirm_layer(model, layer, base, variants)
    options.progress("confirm", model.source.layer_count, model.source.layer_count)
    for variant in variants:
        variant.divergence = mean_divergence(model, base.states, variant.states)
    results = {variant.silent: _ablation(base, variant) for variant in variants}
    return tuple(_with_evidence(c, results, pairs[c.id]) for c in candidates)


def control_for(
    candidate: ExpertId, candidates: Collection[ExpertId], source: ModelSource, recipe: Recipe
) -> ExpertId | None:
    """A routed expert of the candidate's layer that is no candidate; None if there is none.

    Drawn from the recipe's seed and the candidate: the same from run to run.
    """
    others = [ExpertId(candidate.layer, expert) for expert in range(source.expert_count)]
    others = [identity for identity in others if identity not in candidates]
    chooser = random.Random(f"{recipe.calibration.seed} {candidate}")
    return chooser.choice(others) if others else None


def _confirm_layer(
    model: StreamedModel, layer: int, base: _Variant, variants: Sequence[_Variant]
) -> None:
    """Run a layer over the source's stream and over every copy that is forked at it or before."""
    module, before = model.load_layer(layer), base.states
    runs = [(base, before, _SinkWatch())]
    for variant in variants:
        if variant.silent.layer <= layer:
            forks = variant.silent.layer == layer
            watch = _SinkWatch([variant.silent.expert] if forks else [])
            runs.append((variant, before if forks else variant.states, watch))
    found = model.run_streams(layer, module, [(states, watch) for _, states, watch in runs])
    for (variant, _, watch), after in zip(runs, found, strict=True):
        variant.states = after
        variant.peaks[layer], variant.sinks[layer] = peak_of(hidden_of(after)), watch.mean
        if variant.silent.layer == layer:
            around = (before, base.states, after)
            variant.rise_removed = _rise_removed(*map(hidden_of, around))


def _rise_removed(
    before: Sequence[Tensor], after: Sequence[Tensor], silenced: Sequence[Tensor]
) -> float:
    """1 - (rise with the expert silent) / rise, at each sequence's element that rises most.

    before, after  the source's states around the layer, [B, T, H] for each batch
    silenced       those after the layer with the expert silent
    """
    rises = removed = 0.0
    for old, new, silent in zip(before, after, silenced, strict=True):
        rise = (new.float().abs() - old.float().abs()).flatten(1)
        without = (silent.float().abs() - old.float().abs()).flatten(1)
        at = rise.argmax(dim=1, keepdim=True)  # [B, 1], in T * H flattened
        rises += float(rise.gather(1, at).sum())
        removed += float((rise - without).gather(1, at).sum())
    return removed / rises if rises else 0.0


def _ablation(base: _Variant, variant: _Variant) -> Ablation:
    """What silencing has done, as shares of the source.

    The massive activation is compared after the layer where the source's is greatest, the sinks in
    the layers behind the silenced expert: its own attention came before it.
    """
    strongest = max(variant.peaks, key=lambda layer: base.peaks[layer])
    later = [layer for layer in variant.sinks if layer > variant.silent.layer]
    before = sum(base.sinks[layer] for layer in later)
    return Ablation(
        layer=variant.silent.layer,
        expert=variant.silent.expert,
        rise_removed=variant.rise_removed,
        massive_activation=variant.peaks[strongest] / base.peaks[strongest],
        sink_mass=sum(variant.sinks[layer] for layer in later) / before if before else 1.0,
        kl_divergence=variant.divergence,
    )


def _with_evidence(
    candidate: SuperExpert, results: Mapping[ExpertId, Ablation], control: ExpertId | None
) -> SuperExpert:
    """The candidate, confirmed or not: its absence has to matter, and its control's must not."""
    zeroed = results[candidate.id]
    beside = results[control] if control else None
    confirmed = zeroed.rise_removed >= CONFIRMING_SHARE and (
        beside is None or beside.rise_removed < CONFIRMING_SHARE
    )
    return replace(candidate, confirmed=confirmed, zeroed=zeroed, control=beside)


def doubts(candidates: Sequence[SuperExpert]) -> tuple[str, ...]:
    """A note for each candidate that was silenced and is not confirmed."""
    return tuple(
        f"expert {candidate.id} meets the criterion, but zeroing it takes away only "
        f"{max(0.0, candidate.zeroed.rise_removed):.0%} of its layer's rise: it is protected, not "
        "confirmed"
        for candidate in candidates
        if candidate.zeroed and not candidate.confirmed
    )
