"""Decide which experts go and which fall silent, before any width is chosen. Pure Python: no torch.

The same number goes from every layer, and from every routing group where the router is
group-limited: nothing else makes a checkpoint that loads. Protected experts stay. Ties are broken
by id, so equal inputs give an equal choice.
"""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence

from se_compress.artifacts import (
    SOURCE_BITS,
    Action,
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    ExpertProfile,
    ExpertStats,
    ModelSource,
)
from se_compress.errors import RecipeError
from se_compress.model.surgery import in_unrun_layers
from se_compress.opening.config_rules import LEAST_IN_GROUP
from se_compress.planning.units import Task
from se_compress.recipe import ExpertName

SCORES: Mapping[str, str] = {
    "reap": "saliency {:.4g}",
    "frequency": "{:.0f} tokens",
    "gate": "gate mass {:.4g}",
}


def score_of(stats: ExpertStats, score: str) -> float:
    """What an expert is worth by one of the scores of a recipe's `policy.prune`."""
    return {"reap": stats.saliency, "frequency": float(stats.tokens), "gate": stats.gate_mass}[
        score
    ]


def steps(task: Task) -> list[int]:
    """How many experts can go from each routing group, 0 first: the protected ones stay, and enough
    for the router to choose from."""
    groups = _groups(task.source)
    least = LEAST_IN_GROUP if task.source.group_count > 1 else 1
    kept = max((len(members & task.protected.keys()) for members in groups), default=0)
    return list(range(_group_size(task.source) - max(least, kept) + 1))


def prune(task: Task, score: str, count: int) -> list[ExpertDecision]:
    """Drop `count` experts of every routing group of every layer, those of the least score first.
    Without a profile the last ones, which makes no difference to the sizes."""
    decisions, profile = [], task.profile
    for members in _groups(task.source) if count else ():
        worth = {
            identity: score_of(profile.by_id[identity], score) if profile else 0.0
            for identity in members - task.protected.keys()
        }
        ranked = sorted(worth, key=lambda i: (worth[i], i) if profile else (0.0, _reversed(i)))
        gone, rest = ranked[:count], ranked[count:]
        kept = SCORES[score].format(worth[rest[0]]) if rest else "protected"
        decisions += [
            _gone(i, "prune", f"pruned: {SCORES[score].format(worth[i])}, least kept {kept}")
            if profile
            else _gone(i, "prune", "pruned in this estimate: no profile yet")
            for i in gone
        ]
    return decisions


def merge(task: Task, count: int) -> list[ExpertDecision]:
    """Merge experts of every routing group of every layer, so that `count` fewer are left: the
    groups of average linkage on the distances of their mean outputs (HC-SMoE). The weight of each
    in the average is its share of the group's tokens. Without a profile that measured them the
    first ones are merged, which makes no difference to the sizes."""
    profile, experts = task.profile, task.source.expert_count
    distances = {found.layer: found.distances for found in profile.similarities} if profile else {}
    decisions = []
    for members in _groups(task.source):
        free = sorted(members - task.protected.keys())
        if distances and free:
            known = distances[free[0].layer]
            apart = [_distance(known, experts, *pair) for pair in pairs(free)]
            clusters = _clusters(free, apart, len(free) - count)
        else:
            clusters = [free[: count + 1]]
        for cluster in clusters:
            if len(cluster) > 1:
                decisions += _merged(cluster, profile)
    return decisions


def pairs(experts: Sequence[ExpertId]) -> list[tuple[ExpertId, ExpertId]]:
    """All pairs, in the order of scipy's condensed distances."""
    return list(itertools.combinations(experts, 2))


def _distance(distances: Sequence[float], count: int, first: ExpertId, second: ExpertId) -> float:
    assert isinstance(first.expert, int)
    assert isinstance(second.expert, int)
    i, j = first.expert, second.expert
    return distances[i * count - i * (i + 1) // 2 + j - i - 1]


def _clusters(
    experts: Sequence[ExpertId], distances: Sequence[float], count: int
) -> list[list[ExpertId]]:
    """Exactly `count` clusters, by average linkage."""
    from scipy.cluster.hierarchy import average, cut_tree

    if count >= len(experts):
        return [[expert] for expert in experts]
    labels = cut_tree(average(distances), n_clusters=count)[:, 0]
    found: dict[int, list[ExpertId]] = {}
    for expert, label in zip(experts, labels.tolist(), strict=True):
        found.setdefault(label, []).append(expert)
    return list(found.values())


def _merged(cluster: Sequence[ExpertId], profile: ExpertProfile | None) -> list[ExpertDecision]:
    shares = _token_shares(cluster, profile)
    first, names = cluster[0].expert, ", ".join(str(i.expert) for i in cluster)
    assert isinstance(first, int)
    reason = f"merged: experts {names}, by their outputs"
    return [
        ExpertDecision(i.layer, i.expert, "merge", None, reason, becomes=first, share=share)
        for i, share in zip(cluster, shares, strict=True)
    ]


def count_of(task: Task, fraction: float, key: str) -> int:
    """A fraction of each routing group in experts. Raises RecipeError, naming the recipe's `key`,
    if that is none or more than can go."""
    each = _group_size(task.source)
    count = int(fraction * each + 1e-9)
    most = steps(task)[-1]
    unit = f"routing group of {each}" if task.source.group_count > 1 else f"layer of {each}"
    if count < 1:
        raise RecipeError(
            f"{key} is {fraction}, less than one expert of a {unit}; the least is {1 / each:.4g}"
        )
    if count > most:
        raise RecipeError(
            f"{key} is {fraction}: {count} experts of each {unit}, but {most} is the most that can "
            "go: protected experts stay, and enough for the router to choose from"
        )
    return count


def zero(task: Task) -> list[ExpertDecision]:
    """Silence the experts of `policy.zero`. Without a profile no super expert is known."""
    policy = task.terms.policy
    if isinstance(policy.zero, tuple):
        chosen = listed(task.source, policy.zero, "policy.zero")
        why = "listed in policy.zero"
    else:
        chosen = [expert.id for expert in task.profile.super_experts] if task.profile else []
        why = "super expert"
    if policy.zero == "random":
        chosen = _others(task.source, chosen, policy.zero_seed)
        why = "random, in place of a super expert of its layer"
    if policy.zero == "random-anywhere":
        chosen = _anywhere(task.source, chosen, policy.zero_seed)
        why = "random, in place of a super expert"
    return [_gone(identity, "zero", f"zeroed: {why}") for identity in sorted(set(chosen))]


def average(task: Task) -> list[ExpertDecision]:
    """Make the experts of `policy.average` the average of themselves and, in each layer, the other
    one whose mean outputs are nearest to those of any of them; the weight of each is its share of
    the tokens. Without a profile no super expert is known, and the first other one is nearest."""
    profile, decisions = task.profile, []
    chosen = [identity for identity in _to_average(task) if identity.expert != "shared"]
    for layer in sorted({identity.layer for identity in chosen}):
        few = sorted({identity for identity in chosen if identity.layer == layer})
        decisions += _averaged([*few, _nearest(task, few)], profile)
    return decisions


def _to_average(task: Task) -> list[ExpertId]:
    named = task.terms.policy.average
    if isinstance(named, tuple):
        return listed(task.source, named, "policy.average")
    return [expert.id for expert in task.profile.super_experts] if task.profile else []


def average_notes(task: Task) -> tuple[str, ...]:
    """A line on what is to be averaged and cannot be."""
    shared = [str(identity) for identity in _to_average(task) if identity.expert == "shared"]
    if not shared:
        return ()
    return (f"not averaged, for its layer has no other shared expert: {', '.join(shared)}",)


def _nearest(task: Task, few: Sequence[ExpertId]) -> ExpertId:
    """The expert of their layer that is most like any of them."""
    layer, count = few[0].layer, task.source.expert_count
    others = [i for i in (ExpertId(layer, e) for e in range(count)) if i not in few]
    if not others:
        raise RecipeError(f"policy.average: layer {layer} has no other expert left")
    found = task.profile.similarities if task.profile else ()
    known = next((one.distances for one in found if one.layer == layer), None)
    if known is None:
        return others[0]
    return min(
        others, key=lambda other: min(_distance(known, count, *sorted((one, other))) for one in few)
    )


def _averaged(members: Sequence[ExpertId], profile: ExpertProfile | None) -> list[ExpertDecision]:
    names = ", ".join(str(i.expert) for i in sorted(members))
    reason = f"averaged: experts {names}, each in its place"
    return [
        ExpertDecision(i.layer, i.expert, "average", None, reason, share=share)
        for i, share in zip(members, _token_shares(members, profile), strict=True)
    ]


def _token_shares(members: Sequence[ExpertId], profile: ExpertProfile | None) -> list[float]:
    """The share of each in the tokens of all; equal ones where there are none."""
    tokens = [profile.by_id[i].tokens if profile else 0 for i in members]
    total = sum(tokens)
    return [count / total for count in tokens] if total else [1 / len(members)] * len(members)


def listed(source: ModelSource, names: Sequence[ExpertName], key: str) -> list[ExpertId]:
    """The experts that a recipe names under `key`. Raises RecipeError for one that is not there."""
    identities = []
    for i, name in enumerate(names):
        identity = ExpertId(name.layer, name.expert)
        if identity not in source.experts:
            layers = source.moe_layers
            raise RecipeError(
                f"{key}.{i}: there is no expert {identity}; expert layers are {layers[0]} "
                f"to {layers[-1]}, experts 0 to {source.expert_count - 1}"
            )
        identities.append(identity)
    return identities


def _others(source: ModelSource, experts: Iterable[ExpertId], seed: int) -> list[ExpertId]:
    """As many routed experts of the same layers, none of `experts`; an expert takes another's place
    once."""
    experts = set(experts)
    chosen: list[ExpertId] = []
    for layer in sorted({identity.layer for identity in experts}):
        there = (ExpertId(layer, expert) for expert in range(source.expert_count))
        free = [identity for identity in there if identity not in experts]
        wanted = sum(identity.layer == layer for identity in experts)
        if len(free) < wanted:
            raise RecipeError(f"policy.zero is random, but layer {layer} has no other expert left")
        chosen += _draw(free, wanted, seed, f"layer {layer}")
    return chosen


def _anywhere(source: ModelSource, experts: Sequence[ExpertId], seed: int) -> list[ExpertId]:
    """As many routed experts of any layers, none of `experts`."""
    free = [i for i in source.experts if i.expert != "shared" and i not in experts]
    return _draw(sorted(free), min(len(experts), len(free)), seed, "anywhere")


def _draw(free: Sequence[ExpertId], count: int, seed: int, purpose: str) -> list[ExpertId]:
    """The experts lie in one random order, which the purpose alone decides. A seed takes `count` of
    them, the next seed the `count` that follow; behind the last one comes the first. So no two
    seeds have an expert in common until all were drawn."""
    dice = random.Random(purpose)
    place = {identity: dice.random() for identity in free}  # the same on every machine
    order = sorted(free, key=lambda identity: place[identity])
    return [order[(seed * count + i) % len(order)] for i in range(count)]


def notes(source: ModelSource, count: int, verb: str) -> tuple[str, ...]:
    """What taking `count` experts from each routing group does beside: a line for each."""
    if not count:
        return ()
    gone = count * source.group_count
    left = source.expert_count - gone
    lines = [f"{gone} of {source.expert_count} experts of each layer {verb}: {left} left"]
    if (top_k := source.top_k_of(left)) < source.top_k:
        lines.append(
            f"num_experts_per_tok is lowered from {source.top_k} to {top_k}, all that the router "
            "can choose from"
        )
    if unrun := in_unrun_layers(source):
        lines.append(
            f"layers for multi-token prediction are not run, and their experts ({len(unrun)} "
            "tensors) not measured: they lose those of the same numbers as the last decoder layer"
        )
    return tuple(lines)


def new_names(plan: CompressionPlan) -> tuple[str, ...]:
    """What the protected experts are called in the result, where that is something else."""
    renamed = [
        plan.by_id[i] for i in plan.protected if plan.by_id[i].becomes not in (None, i.expert)
    ]
    if not renamed:
        return ()
    names = ", ".join(f"{d.id} is expert {d.becomes} of layer {d.layer}" for d in renamed)
    return (f"protected experts have new numbers in the result: {names}",)


def _gone(identity: ExpertId, action: Action, reason: str) -> ExpertDecision:
    return ExpertDecision(identity.layer, identity.expert, action, None, reason)


def _group_size(source: ModelSource) -> int:
    """Experts of a routing group."""
    return source.expert_count // source.group_count


def _groups(source: ModelSource) -> list[set[ExpertId]]:
    """The routed experts of each layer and routing group."""
    found: dict[tuple[int, int], set[ExpertId]] = {}
    for identity in source.experts:
        if identity.expert != "shared":
            place = identity.layer, source.group_of(identity.expert)
            found.setdefault(place, set()).add(identity)
    return list(found.values())


def _reversed(identity: ExpertId) -> ExpertId:
    assert isinstance(identity.expert, int)
    return ExpertId(identity.layer, -identity.expert)


def complete(source: ModelSource, decisions: Sequence[ExpertDecision]) -> list[ExpertDecision]:
    """With a line for every expert of the source; those without one are kept."""
    given = {decision.id: decision for decision in decisions}
    return [
        given.get(i) or ExpertDecision(i.layer, i.expert, "keep", SOURCE_BITS, "")
        for i in source.experts
    ]
