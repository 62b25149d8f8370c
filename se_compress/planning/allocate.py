"""Widths under a budget: at how many bits every expert is stored. Pure Python, no torch.

What has a width of its own is a *unit*. The target's granularity says what that is: gate and up of
an expert together and its down apart ("projection"), an expert, or all routed experts of a layer or
of the model.
Units with a protected expert are fixed. The others are the items of a multiple-choice knapsack: a
width costs the bytes that the file will hold for it, and loses what the profile predicts.

The budget of the items is what the given one leaves: a plan with every item at the least width is
measured by its blueprint, to the byte.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor

from se_compress.artifacts import (
    PARTS,
    SOURCE_BITS,
    CompressionPlan,
    CurvePoint,
    ExpertDecision,
    ExpertId,
    ExpertProfile,
    ModelSource,
    OtherDecision,
    Part,
    Scheme,
    TensorInfo,
)
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.targets import (
    TargetRules,
    check_grid,
    find_rules,
    is_other_linear,
    stored_bytes,
    unpackable,
    widths_of,
)
from se_compress.errors import RecipeError
from se_compress.planning.knapsack import Option, choose, sweep
from se_compress.recipe import Recipe

CURVE_POINTS = 9
_PREDICTED = {
    "model": "one width for all: predicted loss",
    "layer": "predicted loss of the whole layer",
    "expert": "predicted loss",
}

# What has one width: parts of experts.
Unit = tuple[tuple[ExpertId, Part], ...]
# The widths of gate and up, and of down.
Widths = Mapping[ExpertId, tuple[int, int]]


def _rules(recipe: Recipe) -> TargetRules:
    rule = recipe.quantization
    return find_rules(recipe.target, rule.method, rule.format, rule.symmetric)


def scheme_of(recipe: Recipe) -> Scheme:
    """How the recipe stores what it quantises."""
    rule, rules = recipe.quantization, _rules(recipe)
    if rules.format == "bitsandbytes":
        block = (-1, None) if rule.data_type == "int8" else (rule.block_size, rule.double_quant)
        return Scheme(rules.format, rule.method, block[0], True, rule.data_type, block[1])
    return Scheme(rules.format, rule.method, rule.group_size, rule.symmetric)


def allocate(
    source: ModelSource,
    profile: ExpertProfile | None,
    recipe: Recipe,
    protected: Mapping[ExpertId, str],
) -> CompressionPlan:
    """The plan of least predicted loss for all experts of a model.

    profile    None before the first one: the widths are then an estimate, the widest that fits all
    protected  the experts that keep `policy.protected_bits`, and why

    Raises RecipeError for what the target cannot load and for a budget that cannot be met.
    """
    rules = _rules(recipe)
    if recipe.quantization.method == "none":
        return _unquantized(_Task(source, profile, recipe, rules, {}, {}))
    check_grid(source, rules, scheme_of(recipe))
    _check_widths(rules, recipe)
    lifted = _lifted(source, recipe, rules, protected)
    task = _Task(source, profile, recipe, rules, protected, lifted)
    widths, notes = _solve(task)
    return _assemble(task, widths, (*notes, *_price_of_protection(task, widths)))


def cost_curve(
    source: ModelSource,
    profile: ExpertProfile | None,
    recipe: Recipe,
    protected: Mapping[ExpertId, str],
) -> tuple[CurvePoint, ...]:
    """Sizes against predicted loss, the protected experts kept: every width that the target loads,
    for all other experts alike; and with a profile and several widths, mixtures of `policy.bits` at
    equal steps between the least and the most."""
    rules = _rules(recipe)
    lifted = _lifted(source, recipe, rules, protected) if rules.widths else {}
    task = _Task(source, profile, recipe, rules, protected, lifted)
    loadable = widths_of(task.scheme, rules)
    points = [_point(task, (width,), _uniform(task, width)) for width in loadable]
    if loadable and profile is not None and len(task.allowed) > 1:
        least, most = (sum(options[k].cost for options in task.items) for k in (0, -1))
        steps = range(CURVE_POINTS)
        budgets = [least + (most - least) * i // (CURVE_POINTS - 1) for i in steps]
        for choice in sweep(task.items, budgets):
            points.append(_point(task, tuple(task.allowed), _mixed(task, choice.picks)))
    return tuple(sorted(points, key=lambda point: (point.size_bytes, len(point.widths))))


# ------------------------------------------------------------------------------ what is loadable


def _check_widths(rules: TargetRules, recipe: Recipe) -> None:
    scheme = scheme_of(recipe)
    accepted = (*widths_of(scheme, rules), SOURCE_BITS)
    files = f"{rules.format} {scheme.data_type or ''}".rstrip()
    wanted = [("policy.bits lists", bits) for bits in recipe.policy.bits]
    wanted.append(("policy.protected_bits is", recipe.policy.protected_bits))
    wanted.append(("policy.other_bits is", recipe.policy.other_bits))
    for key, bits in wanted:
        if bits not in accepted:
            raise RecipeError(
                f"{key} {bits}; target {rules.target} loads {files} files of "
                f"{', '.join(map(str, accepted))} bits"
            )


def _check_one_width(recipe: Recipe, rules: TargetRules, protected: Mapping[ExpertId, str]) -> None:
    bits = recipe.policy.protected_bits
    routed = sorted(identity for identity in protected if identity.expert != "shared")
    if routed and set(recipe.policy.bits) != {bits}:
        raise RecipeError(
            f"expert {routed[0]} keeps {bits} bits; as {rules.format}, target {rules.target} loads "
            "one width for all experts of a model: accepted are policy.protect none and another "
            "quantization.format"
        )


def _lifted(
    source: ModelSource, recipe: Recipe, rules: TargetRules, protected: Mapping[ExpertId, str]
) -> dict[ExpertId, str]:
    """Where the target takes one width per layer: the other experts of a layer with a protected
    one, and why they get its width. That is expensive: it needs the policy's leave."""
    if rules.granularity == "model":
        _check_one_width(recipe, rules, protected)
    if rules.granularity != "layer":
        return {}
    bits, least = recipe.policy.protected_bits, min(recipe.policy.bits)
    first = {i.layer: i for i in sorted(protected, reverse=True) if i.expert != "shared"}
    layers = sorted(first)
    whole = [i for i in _routed(source) if i.layer in first]
    lifted = {
        i: f"lifted to {bits} bits with expert {first[i.layer]}: target {rules.target} loads one "
        "width per layer"
        for i in whole
        if i not in protected
    }
    if lifted and not recipe.policy.lift_layers and set(recipe.policy.bits) != {bits}:
        scheme = scheme_of(recipe)
        parts = _parts(whole)
        more = _cost(source, scheme, parts, bits) - _cost(source, scheme, parts, least)
        alike = "policy.protected_bits: 8, " if set(recipe.policy.bits) == {8} else ""
        raise RecipeError(
            f"target {rules.target} loads one width per layer: for the protected "
            f"{', '.join(map(str, first.values()))} all experts of layer "
            f"{', '.join(map(str, layers))} would have to be lifted from {least} to {bits} bits, "
            f"{more / 1e6:.1f} MB or {8 * more / _weights(source, _routed(source)):.3f} bits per "
            f"expert weight; accepted are policy.lift_layers: true, {alike}policy.protect: none, "
            "and a target with a width per expert"
        )
    return lifted


# ----------------------------------------------------------------------------------- the problem


@dataclass(frozen=True)
class _Task:
    """One allocation; `protected` and `lifted` are the experts of fixed width, and why."""

    source: ModelSource
    profile: ExpertProfile | None
    recipe: Recipe
    rules: TargetRules
    protected: Mapping[ExpertId, str]
    lifted: Mapping[ExpertId, str]

    @cached_property
    def kept(self) -> dict[ExpertId, str]:
        return {**self.lifted, **self.protected}

    @cached_property
    def allowed(self) -> list[int]:
        return sorted(self.recipe.policy.bits)

    @cached_property
    def scheme(self) -> Scheme:
        return scheme_of(self.recipe)

    @cached_property
    def units(self) -> list[Unit]:
        """The units of free width, in the order of their experts."""
        free = [i for i in _routed(self.source) if i not in self.kept]
        if self.rules.granularity == "model":
            return [_parts(free)]
        if self.rules.granularity == "layer":
            layers = sorted({identity.layer for identity in free})
            return [_parts(i for i in free if i.layer == layer) for layer in layers]
        if self.rules.granularity == "expert":
            return [_parts([identity]) for identity in free]
        return [(part,) for part in _parts(free)]

    @cached_property
    def items(self) -> list[list[Option]]:
        """For every unit an option for each allowed width; without a profile nothing is lost."""
        return [
            [
                Option(_cost(self.source, self.scheme, unit, width), _loss(self, unit, width))
                for width in self.allowed
            ]
            for unit in self.units
        ]

    @cached_property
    def predicted(self) -> dict[ExpertId, str]:
        """What each width is predicted to cost, where an expert has one width."""
        said = ((unit, _predicted(self, unit)) for unit in self.units)
        return {identity: text for unit, text in said for identity, _ in unit}

    @cached_property
    def least(self) -> CompressionPlan:
        """The plan with every free unit at the least width."""
        return _assemble(self, _uniform(self, self.allowed[0]), ())


def _routed(source: ModelSource) -> list[ExpertId]:
    return [identity for identity in source.experts if identity.expert != "shared"]


def _parts(experts: Iterable[ExpertId]) -> Unit:
    return tuple((identity, part) for identity in experts for part in PARTS)


def _weights(source: ModelSource, experts: Iterable[ExpertId]) -> int:
    return sum(
        info.shape[0] * info.shape[1]
        for identity in experts
        for info in source.experts[identity].values()
    )


def _cost(source: ModelSource, scheme: Scheme, unit: Unit, width: int) -> int:
    """Bytes of a unit at a width."""
    return sum(
        stored_bytes(source.experts[identity][role], width, scheme)
        for identity, part in unit
        for role in PARTS[part]
    )


def _loss(task: _Task, unit: Unit, width: int) -> float:
    if task.profile is None:
        return 0.0
    known = task.profile.by_id
    return sum(known[identity].loss_of(part, width) for identity, part in unit)


def _routed_bytes(source: ModelSource, plan: CompressionPlan) -> int:
    """Bytes of all routed experts."""
    return sum(
        stored_bytes(info, plan.bits_of(info), plan.scheme)
        for identity in _routed(source)
        for info in source.experts[identity].values()
    )


# --------------------------------------------------------------------------------------- solving


def _solve(task: _Task) -> tuple[Widths, tuple[str, ...]]:
    """Widths within the budget, and what is to be said of them."""
    room = _room(task)
    if room is not None and sum(options[0].cost for options in task.items) > room:
        raise RecipeError(_impossible(task))
    if len(task.allowed) == 1:
        return _uniform(task, task.allowed[0]), ()
    if room is None:
        raise RecipeError(
            f"policy.bits lists the widths {task.allowed}: a budget is needed to choose, "
            "policy.bits_per_weight or policy.size"
        )
    if task.profile is None:
        note = "no profile yet: the widths are an estimate, the widest that fits all"
        return _uniform(task, _widest(task, room)), (note,)
    choice = choose(task.items, room)
    if choice is None:
        raise RuntimeError("no choice of widths fits, though the least width does")
    gap = choice.loss / choice.bound - 1 if choice.bound > 0 else 0.0
    note = (
        f"widths {task.allowed} mixed within the budget: predicted loss {choice.loss:.4g}, at most "
        f"{gap:.2%} from the optimum; {room - choice.cost:,} bytes of the budget are left"
    )
    return _mixed(task, choice.picks), (note,)


def _unquantized(task: _Task) -> CompressionPlan:
    policy = task.recipe.policy
    if policy.other_bits != SOURCE_BITS:
        raise RecipeError(
            f"policy.other_bits is {policy.other_bits}; quantization.method none keeps "
            f"{SOURCE_BITS}"
        )
    plan = _assemble(task, _uniform(task, SOURCE_BITS), ())
    over_size = policy.size is not None and plan.size_bytes > policy.size
    over_bits = policy.bits_per_weight is not None and plan.bits_per_weight > policy.bits_per_weight
    if over_size or over_bits:
        raise RecipeError(
            over_budget(task.recipe, plan, "quantization.method none keeps every weight")
        )
    return plan


def _room(task: _Task) -> int | None:
    """Bytes that the budget leaves for the free units; None if the recipe sets no budget."""
    policy, source, least = task.recipe.policy, task.source, task.least
    spent = sum(options[0].cost for options in task.items)
    if policy.size is not None:
        return policy.size - (least.size_bytes - spent)
    if policy.bits_per_weight is None:
        return None
    limit = floor(policy.bits_per_weight * _weights(source, _routed(source)) / 8)
    return limit - (_routed_bytes(source, least) - spent)


def _widest(task: _Task, room: int) -> int:
    fitting = [
        width
        for k, width in enumerate(task.allowed)
        if sum(options[k].cost for options in task.items) <= room
    ]
    return fitting[-1]


def _uniform(task: _Task, width: int) -> Widths:
    """The widths of the routed experts if every free one had this."""
    kept = task.recipe.policy.protected_bits
    return {
        identity: (kept, kept) if identity in task.kept else (width, width)
        for identity in _routed(task.source)
    }


def _mixed(task: _Task, picks: Sequence[int]) -> Widths:
    """The widths if unit i has the allowed width `picks[i]`."""
    widths = dict(_uniform(task, task.allowed[0]))
    for unit, pick in zip(task.units, picks, strict=True):
        width = task.allowed[pick]
        for identity, part in unit:
            gate_up, down = widths[identity]
            widths[identity] = (gate_up, width) if part == "down" else (width, down)
    return widths


def _impossible(task: _Task) -> str:
    """Why the budget cannot be met; the least is rounded up, so that it is possible as written."""
    kept = f"{_kept(task)} at {task.recipe.policy.protected_bits} bits and all other "
    why = (
        f"{kept if task.kept else 'all '}experts at {task.allowed[0]} bits, with scales in groups "
        f"of {task.scheme.group_size}"
    )
    return over_budget(task.recipe, task.least, why)


def over_budget(recipe: Recipe, least: CompressionPlan, why: str) -> str:
    if recipe.policy.size is None:
        bits = f"{ceil(least.bits_per_weight * 1000) / 1000:.3f}"
        given = str(recipe.policy.bits_per_weight)
        return f"policy.bits_per_weight is {given}, but {bits} is the least possible: {why}"
    unit, scale = ("GB", 10**9) if least.size_bytes >= 10**9 else ("MB", 10**6)
    size = f"{ceil(least.size_bytes * 10_000 / scale) / 10_000:.4f} {unit}"
    return (
        f"policy.size is {recipe.policy.size / scale:.4f} {unit}, but {size} is the least "
        f"possible: {why}, the rest of the model unchanged"
    )


def _kept(task: _Task) -> str:
    lifted = f" and {len(task.lifted)} lifted with them" if task.lifted else ""
    return f"{len(task.protected)} protected{lifted}"


# ------------------------------------------------------------------------------------ the outcome


def _assemble(task: _Task, widths: Widths, notes: tuple[str, ...]) -> CompressionPlan:
    plan = CompressionPlan(
        target=task.recipe.target,
        scheme=task.scheme,
        bits_per_weight=0.0,
        size_bytes=0,
        source_size_bytes=task.source.size_bytes,
        protected=tuple(sorted(task.protected)),
        profile_digest=task.profile.digest if task.profile else "",
        notes=notes,
        experts=tuple(_decide(task, identity, widths) for identity in task.source.experts),
        others=tuple(_others(task)),
    )
    return with_sizes(plan, task.source)


def with_sizes(plan: CompressionPlan, source: ModelSource) -> CompressionPlan:
    """The plan with its sizes worked out anew."""
    blueprint = draw_blueprint(source, plan)
    return replace(
        plan,
        bits_per_weight=blueprint.bits_per_weight,
        size_bytes=blueprint.size_bytes,
        source_size_bytes=source.size_bytes,
    )


def _others(task: _Task) -> Iterator[OtherDecision]:
    """The linears of attention and dense MLPs; no lines for them where all keep their precision."""
    bits = task.recipe.policy.other_bits
    for info in task.source.tensors.values() if bits != SOURCE_BITS else ():
        if is_other_linear(info):
            width, reason = _other_width(task, [info])
            yield OtherDecision(info.name, width, reason)


def _other_width(task: _Task, matrices: Iterable[TensorInfo]) -> tuple[int, str]:
    """`policy.other_bits`, or SOURCE_BITS where one of the matrices cannot be packed, and why."""
    bits = task.recipe.policy.other_bits
    for info in matrices:
        if bits != SOURCE_BITS and (obstacle := unpackable(info, task.rules, task.scheme)):
            return SOURCE_BITS, f"kept in {SOURCE_BITS} bits: {obstacle}"
    return bits, f"policy.other_bits is {bits}"


def _decide(task: _Task, identity: ExpertId, widths: Widths) -> ExpertDecision:
    bits, down = widths.get(identity, (SOURCE_BITS, SOURCE_BITS))
    reason = task.kept.get(identity)
    if identity.expert == "shared" and reason is None:
        bits, reason = _other_width(task, task.source.experts[identity].values())
        down, reason = bits, f"shared expert, every token passes it: {reason}"
    return ExpertDecision(
        identity.layer,
        identity.expert,
        "keep" if bits == down == SOURCE_BITS else "quantize",
        bits,
        reason or _reason(task, identity, bits),
        down_bits=down if down != bits else None,
    )


def _reason(task: _Task, identity: ExpertId, bits: int) -> str:
    if task.recipe.quantization.method == "none":
        return "quantization.method is none"
    if len(task.allowed) == 1 or task.profile is None:
        return f"uniform width {bits}"
    if task.rules.granularity != "projection":
        return f"{_PREDICTED[task.rules.granularity]} {task.predicted[identity]}"
    gate_up, down = (_predicted(task, (part,)) for part in _parts([identity]))
    return f"predicted loss of gate and up {gate_up}; of down {down}"


def _predicted(task: _Task, unit: Unit) -> str:
    losses = ", ".join(f"{_loss(task, unit, width):.3g} at {width}" for width in task.allowed)
    return f"{losses} bits"


def _price_of_protection(task: _Task, widths: Widths) -> tuple[str, ...]:
    """What the experts of fixed width take beyond the average of the others."""
    kept = [identity for identity in widths if identity in task.kept]
    others = [identity for identity in widths if identity not in task.kept]
    if not kept or not others:
        return ()
    average = _stored(task, others, widths) / _weights(task.source, others)
    more = _stored(task, kept, widths) - average * _weights(task.source, kept)
    share = 8 * more / _weights(task.source, widths)
    return (
        f"protection: {_kept(task)} at {task.recipe.policy.protected_bits} bits; {more:,.0f} bytes "
        f"or {share:.4f} bits per expert weight more than at the others' average of "
        f"{8 * average:.3f} bits",
    )


def _stored(task: _Task, experts: Iterable[ExpertId], widths: Widths) -> int:
    return sum(
        _cost(task.source, task.scheme, ((identity, part),), width)
        for identity in experts
        for part, width in zip(PARTS, widths[identity], strict=True)
    )


def _point(task: _Task, label: tuple[int, ...], widths: Widths) -> CurvePoint:
    """Sizes by what differs from the least plan, which is measured to the byte."""
    experts, least = _routed(task.source), _uniform(task, task.allowed[0])
    more = _stored(task, experts, widths) - _stored(task, experts, least)
    loss = sum(
        _loss(task, ((identity, part),), width)
        for identity, pair in widths.items()
        for part, width in zip(PARTS, pair, strict=True)
    )
    return CurvePoint(
        label,
        8 * (_routed_bytes(task.source, task.least) + more) / _weights(task.source, experts),
        task.least.size_bytes + more,
        loss if task.profile is not None else None,
    )
