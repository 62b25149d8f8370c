"""The smaller model that a plan leaves, as a checkpoint of its own, before any byte is read.

Experts that are pruned are gone, experts that are merged are one, experts that are zeroed have a
down_proj of zeros. What is left is renumbered and described as any other model is: a `ModelSource`
with names, shapes and a config that agree, and a plan in its own ids that only keeps and quantises.
Everything downstream works on these two; only records and reports speak of the source's ids, and
`Shrunk.origin` leads back to them.

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
from se_compress.opening.config_rules import NEXT_TOKEN_KEYS
from se_compress.opening.families import (
    COUNT_KEYS,
    FAMILIES,
    Family,
    is_grouped,
    per_expert_tensors,
    setting,
)
from se_compress.opening.headers import ITEM_BYTES

SURGICAL: tuple[Action, ...] = ("prune", "merge", "zero")


@dataclass(frozen=True)
class Shrunk:
    """What a plan leaves of a source.

    original the source
    source   the smaller model; the original itself if no expert is pruned, merged or zeroed
    plan     the plan for it in its own ids, with actions keep and quantize only
    origin   each of its experts -> those of the original that it stands for: one, or the members
             that were merged into it, in order of id
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
        tensors={info.name: info for info in _tensors(source, plan, count)},
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

    What members of a merged expert lose by rounding adds up. A zeroed expert loses nothing.
    """
    experts = []
    for new, members in small.origin.items():
        stats = [profile.by_id[member] for member in members]
        silent = plan.by_id[members[0]].action == "zero"
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
    """The config with `count` experts in a layer and `top_k` per token.

    Layers for multi-token prediction have experts too, but are not run and so not measured. As one
    config speaks for all layers, they go.
    """
    family, config = FAMILIES[source.family], dict(source.config)
    if count == source.expert_count:
        return config
    config |= {key: count for key in COUNT_KEYS if key in config}
    config["num_experts_per_tok"] = top_k
    config |= {key: 0 for key in NEXT_TOKEN_KEYS if setting(config, key)}
    if not is_grouped(family, config):
        # Groups that the router does not look at; some engines do, and they have to fit the count.
        config |= {key: 1 for key in ("n_group", "topk_group") if config.get(key)}
    return config


def behind_decoder(source: ModelSource) -> list[str]:
    """Names of the tensors of layers behind the last decoder layer (multi-token prediction)."""
    pattern = re.compile(r"model\.layers\.(\d+)\.")
    matches = ((name, pattern.match(name)) for name in source.tensors)
    return [name for name, match in matches if match and int(match[1]) >= source.layer_count]


def _tensors(source: ModelSource, plan: CompressionPlan, count: int) -> Iterator[TensorInfo]:
    """The tensors of the smaller model, with `count` experts in a layer; no name comes twice."""
    family = FAMILIES[source.family]
    dropped = set(behind_decoder(source)) if count != source.expert_count else set()
    dtypes = _merged_dtypes(source, plan)
    seen: set[str] = set()
    for info in source.tensors.values():
        if info.name in dropped:
            continue
        if info.role is not None and info.layer is not None and info.expert is not None:
            decision = plan.by_id[ExpertId(info.layer, info.expert)]
            moved = _expert_tensor(info, decision, family)
            if moved is not None and moved.name not in seen:
                seen.add(moved.name)
                if moved.name in dtypes:
                    moved = without_file(replace(moved, dtype=dtypes[moved.name]))
                yield moved
        elif (
            count != source.expert_count
            and info.layer is not None
            and info.name in per_expert_tensors(family, info.layer)
        ):
            yield without_file(replace(info, shape=(count, *info.shape[1:])))
        else:
            yield info


def anchor_of(shares: Sequence[float]) -> int:
    """Place of the anchor among the members of a merged expert: the largest share, the first.

    The other members are aligned to the anchor, and the merged expert has its dtypes.
    """
    return max(range(len(shares)), key=lambda member: shares[member])


def _merged_dtypes(source: ModelSource, plan: CompressionPlan) -> dict[str, str]:
    """Name of each tensor of a merged expert -> its dtype: members may have several."""
    members: dict[ExpertId, list[ExpertDecision]] = {}
    for decision in sorted(plan.experts, key=lambda d: d.id):
        new = resulting_id(decision)
        if decision.action == "merge" and new is not None:
            members.setdefault(new, []).append(decision)
    family, dtypes = FAMILIES[source.family], dict[str, str]()
    for merged in members.values():
        anchor = merged[anchor_of([decision.share or 0.0 for decision in merged])]
        for info in source.experts[anchor.id].values():
            moved = _expert_tensor(info, anchor, family)
            if moved is not None:
                dtypes[moved.name] = info.dtype
    return dtypes


def _expert_tensor(info: TensorInfo, decision: ExpertDecision, family: Family) -> TensorInfo | None:
    """What becomes of a tensor of an expert of the source; None if the expert is pruned."""
    new = resulting_id(decision)
    if new is None:
        return None
    projection = info.name.split(".")[-2]
    if isinstance(new.expert, int):
        name = family.expert.format(layer=new.layer, expert=new.expert, projection=projection)
        info = replace(info, name=name, expert=new.expert)
    made = decision.action == "merge" or (decision.action == "zero" and info.role == "down")
    return without_file(info) if made else info


def without_file(info: TensorInfo) -> TensorInfo:
    """The tensor without a file, its bytes counted from 0."""
    items = 1
    for extent in info.shape:
        items *= extent
    return replace(info, file="", begin=0, end=items * ITEM_BYTES[info.dtype], stored=None)
