"""One layer, compressed: what the plan wants of it, what becomes of it, how far it strayed.

Two models pass the layer: the source and the one that is being compressed. They are one and the
same, and so are their hidden states, until something is changed. After that a few sequences of the
source's are enough, unless the recipe refines: then every row has the source's to be held to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from se_compress.artifacts import (
    Check,
    ExpertDecision,
    ExpertId,
    ExpertRecord,
    RefineRecord,
    RepairRecord,
    Scheme,
)
from se_compress.compression.early_warning import Side, early_warning, overflow_warning
from se_compress.compression.experts import quantize_experts
from se_compress.compression.linears import SolvedLinear, quantize_linears, quantize_shared
from se_compress.compression.refine import aim_of
from se_compress.compression.repair import repair_of
from se_compress.compression.stacks import Packed
from se_compress.engines.blueprint import Blueprint
from se_compress.errors import RecipeError
from se_compress.model.checkpoint import TORCH_DTYPES
from se_compress.model.experts import outputs_of
from se_compress.model.measures import relative_distance
from se_compress.model.observers import Observer, RoutingCapture, SinkCapture
from se_compress.model.overflow import check_states
from se_compress.model.states import States, hidden_of, leading
from se_compress.model.streaming import StreamedModel
from se_compress.opening.families import FAMILIES
from se_compress.recipe import Recipe

# Tokens of the source's own stream that are kept to compare with: its leading sequences.
WITNESS_TOKENS = 1024


@dataclass(frozen=True)
class Streams:
    """States after the last layer that is done, of each batch.

    source   those of the source: of all sequences while nothing has been changed, or if the recipe
             refines; otherwise of a few leading ones
    changed  those of the model compressed so far; None while nothing in it has been changed
    """

    source: list[States]
    changed: list[States] | None = None

    @property
    def result(self) -> list[States]:
        """Those of the model compressed so far, which may be the source's."""
        return self.source if self.changed is None else self.changed

    @property
    def are_one(self) -> bool:
        return self.changed is None


@dataclass(frozen=True)
class Models:
    """The two models that are run, a layer at a time.

    source   the source
    reduced  what surgery left of it; the source itself without any
    """

    source: StreamedModel
    reduced: StreamedModel

    @property
    def are_one(self) -> bool:
        return self.source is self.reduced


@dataclass
class Made:
    """What became of one layer.

    result   the states after it, of each batch
    experts  records of its experts, by the ids of the reduced model
    linears  its quantised linears of attention and dense MLP
    refined  how refining its routed experts went
    repaired  how repairing them went
    """

    result: list[States]
    experts: list[ExpertRecord] = field(default_factory=list)
    linears: list[SolvedLinear] = field(default_factory=list)
    refined: RefineRecord | None = None
    repaired: RepairRecord | None = None


@dataclass(frozen=True)
class CompressedLayer:
    """One layer, done.

    made          what became of it
    streams       the hidden states after it
    hidden_error  relative distance of the two streams
    failed        the gate that the result fails already
    """

    made: Made
    streams: Streams
    hidden_error: float = 0.0
    failed: Check | None = None


# ------------------------------------------------------------------------------ what the plan wants


@dataclass(frozen=True)
class LayerPlan:
    """What the plan quantises of a layer; false if that is nothing.

    experts    its routed experts
    shared     gate and up, then down, of its shared expert: name of the weight -> its bits
    attention  the same for linears of attention, all of them at once
    dense      the same for a dense MLP, gate and up, then down
    repaired   the routed experts that make up for those that went, with the dtype in which their
               down_proj is stored; float32 of one that is quantised
    """

    layer: int
    experts: tuple[ExpertDecision, ...]
    shared: tuple[Mapping[str, int], ...]
    attention: Mapping[str, int]
    dense: tuple[Mapping[str, int], ...]
    repaired: Mapping[int, torch.dtype]

    @property
    def changes_routed(self) -> bool:
        """Whether its routed experts are not those of the source's that are left, as they were."""
        return bool(self.experts or self.repaired)

    def __bool__(self) -> bool:
        return bool(self.changes_routed or any(self.shared) or self.attention or any(self.dense))


def plan_of_layer(blueprint: Blueprint, layer: int) -> LayerPlan:
    """What a blueprint packs of one layer, in the stages in which it is solved."""
    down = f".{FAMILIES[blueprint.source.family].projections[2]}.weight"
    bits: dict[str, dict[str, int]] = {}
    for tensor in blueprint.of_layer(layer):
        if tensor.making == "packed":
            info = tensor.info
            kind = info.kind + (" down" if info.name.endswith(down) else "")
            bits.setdefault(kind, {})[info.name] = tensor.bits
    return LayerPlan(
        layer=layer,
        experts=tuple(
            d
            for d in blueprint.plan.experts
            if d.layer == layer and d.action == "quantize" and d.expert != "shared"
        ),
        shared=(bits.get("shared_expert", {}), bits.get("shared_expert down", {})),
        attention=bits.get("attention", {}),
        dense=(bits.get("dense_mlp", {}), bits.get("dense_mlp down", {})),
        repaired=_repaired(blueprint, layer) if blueprint.plan.repaired else {},
    )


def _repaired(blueprint: Blueprint, layer: int) -> dict[int, torch.dtype]:
    """The experts of a layer that are repaired, see LayerPlan."""
    return {
        tensor.info.expert: torch.float32
        if tensor.making == "packed"
        else TORCH_DTYPES[tensor.info.dtype]
        for tensor in blueprint.of_layer(layer)
        if tensor.info.role == "down" and isinstance(tensor.info.expert, int)
        if ExpertId(layer, tensor.info.expert) not in blueprint.plan.protected
    }


# ---------------------------------------------------------------------------------- past the layer


def compress_layer(
    models: Models,
    blueprint: Blueprint,
    layer: int,
    streams: Streams,
    recipe: Recipe,
    put: Callable[[Packed], None],
    written: Callable[[], StreamedModel],
) -> CompressedLayer:
    """Run both models past one layer, quantising what the plan wants of it.

    put      takes packed matrices, by the names of their weights, as soon as they are done
    written  opens the result as far as it is written, this layer included

    Raises SourceError if the source's own states overflow, or a weight of the layer is bad.
    """
    plan = plan_of_layer(blueprint, layer)
    if streams.are_one and models.are_one and not plan:
        return _pass_unchanged(models.source, layer, streams)
    module = models.source.load_layer(layer)
    # first, for the weights are about to change
    refines = recipe.quantization.refine is not None
    before = streams.source if refines else leading(streams.source, WITNESS_TOKENS)
    source, behind = _source_side(models.source, layer, module, before)
    whole = models.source.run_layer(layer, module, streams.result) if plan.repaired else None
    if not models.are_one:
        del module  # one layer in memory
        module = models.reduced.load_layer(layer)
    limits = recipe.validation
    compared = leading(streams.result, WITNESS_TOKENS) if limits.early_stop else []
    turn = _Turn(
        model=models.reduced,
        module=module,
        plan=plan,
        before=streams.result,
        watch=_Watch(compared, runs_experts=not plan.changes_routed),
        scheme=blueprint.plan.scheme,
        recipe=recipe,
        wanted=behind if refines else None,
        whole=whole,
        put=put,
    )
    made = _quantize_layer(turn)
    after = leading(made.result, WITNESS_TOKENS)
    failed = overflow_warning(layer, hidden_of(made.result), limits)
    if limits.early_stop and not failed:
        origin = blueprint.shrunk.origin
        result = Side(
            model=written,
            before=compared,
            after=after,
            sinks=turn.watch.sink_mass,
            source_expert=lambda expert: origin[ExpertId(layer, expert)][0].expert,
        )
        failed = early_warning(layer, source, result, limits)
    now = Streams(behind, made.result)
    strayed = relative_distance(hidden_of(after), hidden_of(source.after))
    return CompressedLayer(made, now, strayed, failed)


def _pass_unchanged(model: StreamedModel, layer: int, streams: Streams) -> CompressedLayer:
    """Nothing is changed so far: the states of both models stay one."""
    watch = _Watch([], runs_experts=True)
    states = model.run_layer(layer, model.load_layer(layer), streams.result, watch)
    return CompressedLayer(Made(states), Streams(states))


def _source_side(
    model: StreamedModel, layer: int, module: nn.Module, before: list[States]
) -> tuple[Side, list[States]]:
    """The source around a layer, for a few leading sequences. Beside it, what it makes of all that
    it is given."""
    compared = leading(before, WITNESS_TOKENS)
    sinks = _LeadingSinks()
    sinks.compared = compared
    after = model.run_layer(layer, module, before, sinks)
    check_states(model, layer, hidden_of(after))
    some = leading(after, WITNESS_TOKENS)
    return Side(lambda: model, compared, some, sinks.sink_mass), after


class _LeadingSinks(SinkCapture):
    """The sinks of each batch's leading sequences, which are `compared` with the other model's."""

    compared: Sequence[States] = ()

    def watched(self, sequences: int) -> int:
        return len(self.compared[self.batch]) if self.batch < len(self.compared) else 0


class _Watch(RoutingCapture, _LeadingSinks):
    """What a layer's experts see, and those sinks."""

    def __init__(self, compared: Sequence[States], *, runs_experts: bool) -> None:
        super().__init__(runs_experts=runs_experts)
        self.compared = compared


# -------------------------------------------------------------------------------------- quantising


@dataclass(frozen=True)
class _Turn:
    """One layer whose turn it is to be quantised.

    module  the layer; its linears are quantised in place
    before  what comes into it, of each batch
    watch   sees it run once attention and dense MLP are quantised
    wanted  what should come out of it, if the recipe refines
    whole   what comes out of the source's layer for `before`, if the plan repairs
    put     takes packed matrices on the rank that made them
    """

    model: StreamedModel
    module: nn.Module
    plan: LayerPlan
    before: Sequence[States]
    watch: _Watch
    scheme: Scheme
    recipe: Recipe
    wanted: Sequence[States] | None
    whole: Sequence[States] | None
    put: Callable[[Packed], None]

    def put_once(self, packed: Packed) -> None:
        """Take packed matrices that every rank has made."""
        if self.model.ranks.rank == 0:
            self.put(packed)

    def run(self, observer: Observer | None) -> list[States]:
        """The states behind the layer as it is now."""
        return self.model.run_layer(self.plan.layer, self.module, self.before, observer)


def _quantize_layer(turn: _Turn) -> Made:
    """Quantise what the plan wants of a layer."""
    made = _quantize_plain(turn)
    shared: list[ExpertRecord] = []
    if any(turn.plan.shared):
        identity = ExpertId(turn.plan.layer, "shared")
        tensors, record = quantize_shared(
            turn.module, turn.model.linear_path, identity, turn.plan.shared,
            turn.watch.shared_hidden, turn.scheme, turn.recipe.quantization,
        )  # fmt: skip
        turn.put_once(tensors)
        shared = [record]
        # the first run had the shared expert of the source
        made.result = turn.run(_without_experts() if turn.plan.changes_routed else None)
    if turn.plan.changes_routed:
        _quantize_routed(turn, made)
    made.experts += shared
    return made


def _quantize_plain(turn: _Turn) -> Made:
    """Quantise linears of attention and dense MLP, and run the layer behind them; its routed
    experts are left out if they are quantised next."""
    linears: list[SolvedLinear] = []
    for stages in ((turn.plan.attention,), turn.plan.dense):
        seeing = _without_experts()
        seeing.everywhere = True  # the linears tell what they see
        see = partial(turn.run, seeing)
        linears += quantize_linears(
            turn.module, turn.model.linear_path, stages, see, turn.scheme, turn.recipe.quantization
        )
    for linear in linears:
        turn.put_once(linear.tensors)
    return Made(turn.run(turn.watch), linears=linears)


def _quantize_routed(turn: _Turn, made: Made) -> None:
    """Repair and quantise the routed experts, and add what they do to what is `made` of the layer
    so far, without them.

    Raises RecipeError if they are to be refined or repaired, and what they put out is not added as
    it is.
    """
    model, module, layer, watch = turn.model, turn.module, turn.plan.layer, turn.watch
    experts, others, aim, repair = model.layer_experts(module), hidden_of(made.result), None, None
    for key, states in (("quantization.refine", turn.wanted), ("policy.repair", turn.whole)):
        if states is not None and not model.adds_routed(module, layer, turn.before):
            raise RecipeError(
                f"{key}: layer {layer} does not add what its routed experts put out to its states "
                "as it is; leave it out for this model"
            )
    if turn.wanted is not None:
        aim = aim_of(watch.hidden, watch.experts, watch.weights, hidden_of(turn.wanted), others)
    if turn.whole is not None:
        output = watch.summed(experts.each(partial(outputs_of, watch), ranks=model.ranks))
        repair = repair_of(
            layer, hidden_of(turn.whole), others, output, turn.plan.repaired, watch.store
        )
    alone = aim is None and repair is None
    done = quantize_experts(
        model.source.weight_of, experts, watch, turn.plan.experts, turn.scheme, turn.recipe,
        turn.put if alone else turn.put_once, aim, model.ranks, repair,
    )  # fmt: skip
    made.experts += done.records
    made.refined = done.refined
    made.repaired = repair.record if repair else None
    made.result = model.add_routed(layer, module, turn.before, made.result, done.output)


def _without_experts() -> Observer:
    observer = Observer()
    observer.runs_experts = False
    return observer
