"""The smaller model that a plan leaves, as a checkpoint of its own, before any byte is read.

Experts that are pruned are gone, experts that are merged are one, experts that are zeroed have a
down_proj of zeros, experts that are averaged are equal. What is left is renumbered and described as
any other model is: a `ModelSource` with names, shapes and a config that agree, and a plan in its
own ids that only keeps and quantises. Everything downstream works on these two; only records and
reports speak of the source's ids, and `Shrunk.origin` leads back to them.

A tensor that merely moved points at the source's own bytes. One that has to be made (router rows,
merged and zeroed weights) has no file; splice.py makes it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from se_compress.artifacts import (
    SOURCE_BITS,
    Action,
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    ExpertProfile,
    ExpertStats,
    ModelSource,
    TensorInfo,
    digest_of,
)
from se_compress.opening.families import COUNT_KEYS, FAMILIES, is_grouped
from se_compress.opening.headers import ITEM_BYTES

SURGICAL: tuple[Action, ...] = ("prune", "merge", "zero", "average")
# The number of an expert in the name of a tensor of it alone.
_EXPERT = re.compile(r"(\bexperts\.)\d+\.")


@dataclass(frozen=True)
class Shrunk:
    """What a plan leaves of a source.

    original the source
    source   the smaller model; the original itself if no expert is pruned, merged or zeroed
    plan     the plan for it in its own ids, with actions keep and quantize only
    origin   each of its experts -> those of the original that it stands for: one, or the members
             that were merged into it, in order of id; of an averaged one itself, then the others
    shares   each member of a merged expert -> its weight in the average
    """

    original: ModelSource
    source: ModelSource
    plan: CompressionPlan
    origin: Mapping[ExpertId, tuple[ExpertId, ...]]
    shares: Mapping[ExpertId, float]


def shrink(source: ModelSource, plan: CompressionPlan) -> Shrunk:
    """The smaller model that `plan` leaves of `source`.

    The plan has to be consistent, see `plan_checks.check_structure`. No tensor is read.
    """
    origin = _origin(source, plan)
    if not any(decision.action in SURGICAL for decision in plan.experts):
        return Shrunk(source, source, plan, origin, {})
    count = max(identity.expert for identity in origin if isinstance(identity.expert, int)) + 1
    top_k = source.top_k_of(count)
    structure = [(str(d.id), d.action, d.becomes, d.share) for d in plan.experts]
    small = replace(
        source,
        config=_config(source, count, top_k),
        tensors={info.name: info for info in _tensors(source, plan, origin, count)},
        expert_count=count,
        top_k=top_k,
        contents=lambda: digest_of(source.digest, structure),
    )
    shares = {d.id: d.share for d in plan.experts if d.share is not None}
    return Shrunk(source, small, _inner_plan(plan, origin), origin, shares)


def is_made(info: TensorInfo) -> bool:
    """Whether a tensor of the smaller model is in no file, so that it has to be made."""
    return not info.file


def resulting_id(decision: ExpertDecision) -> ExpertId | None:
    """The id that an expert of the source has in the result; None if it is pruned."""
    if decision.action == "prune":
        return None
    if decision.becomes is None:
        return decision.id
    return ExpertId(decision.layer, decision.becomes)


# --------------------------------------------------------------------------------- plans and ids


def renumbered(decisions: Iterable[ExpertDecision]) -> list[ExpertDecision]:
    """The decisions, by id, with `becomes` made anew.

    What is left of a layer is counted from 0 in the order of the source; a merged expert stands
    where its first member stood. Before, `becomes` only has to say which members belong together.
    """
    decisions = list(decisions)
    layers = {d.layer for d in decisions if d.action in ("prune", "merge")}
    next_free: Counter[int] = Counter()
    merged: dict[tuple[int, int | None], int] = {}
    result = []
    for decision in sorted(decisions, key=lambda d: d.id):
        if decision.layer not in layers or decision.expert == "shared":
            result.append(replace(decision, becomes=None))
            continue
        if decision.action == "prune":
            result.append(replace(decision, becomes=None))
            continue
        key = (decision.layer, decision.becomes)
        if decision.action == "merge" and key in merged:
            result.append(replace(decision, becomes=merged[key]))
            continue
        becomes = next_free[decision.layer]
        next_free[decision.layer] += 1
        if decision.action == "merge":
            merged[key] = becomes
        result.append(replace(decision, becomes=becomes))
    return result


def _origin(source: ModelSource, plan: CompressionPlan) -> dict[ExpertId, tuple[ExpertId, ...]]:
    """Expert of the smaller model -> those of the source that it stands for, by id."""
    found: dict[ExpertId, tuple[ExpertId, ...]] = {}
    for identity in source.experts:
        new = resulting_id(plan.by_id[identity])
        if new is not None:
            found[new] = (*found.get(new, ()), identity)
    averaged = sorted(d.id for d in plan.experts if d.action == "average")
    for identity in averaged:
        others = (i for i in averaged if i.layer == identity.layer and i != identity)
        found[identity] = (identity, *others)
    return {identity: found[identity] for identity in sorted(found)}


def _inner_plan(
    plan: CompressionPlan, origin: Mapping[ExpertId, tuple[ExpertId, ...]]
) -> CompressionPlan:
    """The plan in ids of the smaller model: what is left is kept or quantised."""
    decisions = []
    for new, members in origin.items():
        old = plan.by_id[members[0]]
        bits = {old.bits, old.down_bits} - {None}
        action: Action = "keep" if bits == {SOURCE_BITS} else "quantize"
        decisions.append(
            ExpertDecision(new.layer, new.expert, action, old.bits, old.reason, old.down_bits)
        )
    protected = [new for new, members in origin.items() if members[0] in plan.protected]
    return replace(plan, protected=tuple(protected), experts=tuple(decisions))


def restored(structure: CompressionPlan, inner: CompressionPlan) -> CompressionPlan:
    """A plan for the source from one for the smaller model.

    structure  plan for the source: what is done with each expert
    inner      plan for the smaller model: the bits of the experts that are left
    """
    decisions = []
    for decision in structure.experts:
        new = resulting_id(decision)
        if new is not None:
            chosen = inner.by_id[new]
            surgical = decision.action in SURGICAL
            decision = replace(
                decision,
                action=decision.action if surgical else chosen.action,
                bits=chosen.bits,
                down_bits=chosen.down_bits,
                reason=f"{decision.reason}; {chosen.reason}" if surgical else chosen.reason,
            )
        decisions.append(decision)
    return replace(
        inner,
        source_size_bytes=structure.source_size_bytes,
        protected=structure.protected,
        notes=structure.notes + inner.notes,
        experts=tuple(decisions),
    )


def shrunk_profile(profile: ExpertProfile, plan: CompressionPlan, small: Shrunk) -> ExpertProfile:
    """The profile as planning the smaller model needs it: statistics of its experts by their ids.

    What members of a merged expert lose by rounding adds up. A zeroed expert loses nothing, an
    averaged one what it would lose as it was.
    """
    experts = []
    for new, members in small.origin.items():
        action = plan.by_id[members[0]].action
        alone = action == "average"
        stats = [profile.by_id[member] for member in (members[:1] if alone else members)]
        silent = action == "zero"
        experts.append(_combined(new, stats, silent))
    return replace(profile, experts=tuple(experts))


def _combined(new: ExpertId, members: list[ExpertStats], silent: bool) -> ExpertStats:
    """The statistics of one expert of the smaller model from those of its members."""
    first = max(members, key=lambda stats: stats.tokens)
    factor = 0.0 if silent else 1.0
    groups = [[stats.loss_gate_up for stats in members], [stats.loss_down for stats in members]]
    gate_up, down = (
        {bits: factor * sum(loss[bits] for loss in losses) for bits in losses[0]}
        for losses in groups
    )
    return replace(
        first,
        layer=new.layer,
        expert=new.expert,
        tokens=sum(stats.tokens for stats in members),
        gate_mass=sum(stats.gate_mass for stats in members),
        loss_gate_up=gate_up,
        loss_down=down,
    )


# ------------------------------------------------------------------------------ config and tensors


def _config(source: ModelSource, count: int, top_k: int) -> dict[str, Any]:
    """The config with `count` experts in a layer and `top_k` per token, by all the names that these
    go by."""
    family, text = FAMILIES[source.family], dict(source.text)
    if count == source.expert_count:
        return dict(source.config)
    text |= {key: _same(text[key], count) for key in _named(text, COUNT_KEYS, family.count_keys)}
    keys = _named(text, ("num_experts_per_tok",), family.top_k_keys) or family.top_k_keys[:1]
    text |= {key: _at_most(text.get(key), top_k) for key in keys}
    if not is_grouped(family, text):
        # Groups that the router does not look at; some engines do, and they have to fit the count.
        text |= {key: 1 for key in ("n_group", "topk_group") if text.get(key)}
    return {**source.config, source.text_key: text} if source.text_key else text


def _named(config: Mapping[str, Any], common: Iterable[str], own: Iterable[str]) -> list[str]:
    return [key for key in dict.fromkeys((*own, *common)) if config.get(key) is not None]


def _same(value: Any, count: int) -> Any:
    """A number, or one for each layer, put in the place of a value of that form."""
    return [count] * len(value) if isinstance(value, list) else count


def _at_most(value: Any, most: int) -> Any:
    return [min(part, most) for part in value] if isinstance(value, list) else most


def in_unrun_layers(source: ModelSource) -> list[str]:
    """Names of the tensors that layers for multi-token prediction have of their experts.

    These layers are not run, and so not measured.
    """
    return [
        info.name
        for info in source.tensors.values()
        if info.layer is None and (info.axis is not None or info.expert is not None)
    ]


def kept_in_unrun_layers(origin: Mapping[ExpertId, tuple[ExpertId, ...]]) -> dict[int, int]:
    """Number of an expert in the smaller model -> in the original, of layers that are not run.

    One config speaks for all layers, so they have to lose as many experts. They keep those that
    the decoder's last layer keeps, of merged ones the first.
    """
    last = max(identity.layer for identity in origin)
    return {
        identity.expert: members[0].expert
        for identity, members in origin.items()
        if identity.layer == last
        if isinstance(identity.expert, int) and isinstance(members[0].expert, int)
    }


def holds_ids(source: ModelSource, info: TensorInfo) -> bool:
    """The values of a tensor are numbers of experts."""
    rest = info.name.removeprefix(f"{source.prefix}layers.").partition(".")[2]
    return info.layer is not None and rest in FAMILIES[source.family].ids


def _tensors(
    source: ModelSource,
    plan: CompressionPlan,
    origin: Mapping[ExpertId, tuple[ExpertId, ...]],
    count: int,
) -> Iterator[TensorInfo]:
    """The tensors of the smaller model, with `count` experts in a layer; no name comes twice."""
    dtypes = _merged_dtypes(source, plan, origin)
    unrun = {old: new for new, old in kept_in_unrun_layers(origin).items()}
    fewer = count != source.expert_count
    seen: set[str] = set()
    for info in source.tensors.values():
        if info.expert is not None and info.layer is not None and info.kind != "other":
            moved = _of_expert(source, info, plan.by_id[ExpertId(info.layer, info.expert)])
            if moved is not None and moved.name not in seen:
                seen.add(moved.name)
                if moved.name in dtypes:
                    moved = without_file(replace(moved, dtype=dtypes[moved.name]))
                yield moved
        elif fewer and isinstance(info.expert, int):
            if info.expert in unrun:
                yield _renumbered(info, unrun[info.expert])
        elif fewer and info.axis is not None:
            yield without_file(replace(info, shape=_fewer(info, source.expert_count - count)))
        elif fewer and holds_ids(source, info):
            top_k = min(info.shape[1], source.top_k_of(count))
            yield without_file(replace(info, shape=(info.shape[0], top_k)))
        else:
            yield info


def _fewer(info: TensorInfo, lost: int) -> tuple[int, ...]:
    """The extents of a tensor whose axis of experts has lost some."""
    return tuple(e - lost if axis == info.axis else e for axis, e in enumerate(info.shape))


def _renumbered(info: TensorInfo, expert: int) -> TensorInfo:
    """A tensor of one expert under another number."""
    name = _EXPERT.sub(lambda found: f"{found[1]}{expert}.", info.name)
    return replace(info, name=name, expert=expert)


def anchor_of(shares: Sequence[float]) -> int:
    """Place of the anchor among the members of a merged expert: the largest share, the first.

    The other members are aligned to the anchor, and the merged expert has its dtypes.
    """
    return max(range(len(shares)), key=lambda member: shares[member])


def anchor_among(members: Iterable[ExpertId], shares: Mapping[ExpertId, float]) -> ExpertId:
    """The anchor itself."""
    ordered = sorted(members)
    return ordered[anchor_of([shares[member] for member in ordered])]


def _merged_dtypes(
    source: ModelSource, plan: CompressionPlan, origin: Mapping[ExpertId, tuple[ExpertId, ...]]
) -> dict[str, str]:
    """Name of each tensor of a merged or averaged expert -> its dtype: members may have several."""
    dtypes: dict[str, str] = {}
    for new, members in origin.items():
        if len(members) > 1 and isinstance(new.expert, int):
            anchor = anchor_among(members, {i: plan.by_id[i].share or 0.0 for i in members})
            for info in source.experts[anchor].values():
                dtypes[_renumbered(info, new.expert).name] = info.dtype
    return dtypes


def _of_expert(
    source: ModelSource, info: TensorInfo, decision: ExpertDecision
) -> TensorInfo | None:
    """What becomes of a tensor of an expert of the source; None if the expert is pruned."""
    new = resulting_id(decision)
    if new is None:
        return None
    if isinstance(new.expert, int) and new.expert != info.expert:
        info = _renumbered(info, new.expert)
    last = info.role == "down" or is_down_bias(source, info)
    made = decision.action in ("merge", "average") or (decision.action == "zero" and last)
    return without_file(info) if made else info


def is_down_bias(source: ModelSource, info: TensorInfo) -> bool:
    """A bias of an expert that is added to what its down_proj gives."""
    down = FAMILIES[source.family].projections[2]
    return info.role is None and info.name.endswith(f".{down}.bias")


def without_file(info: TensorInfo) -> TensorInfo:
    """The tensor without a file, its bytes counted from 0."""
    items = 1
    for extent in info.shape:
        items *= extent
    return replace(info, file="", begin=0, end=items * ITEM_BYTES[info.dtype], stored=None)
