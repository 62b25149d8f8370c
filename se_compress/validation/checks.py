"""The gates on behaviour: what was measured, held to the limits of the recipe."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from se_compress.artifacts import GATES, Check, LayerComparison, SinkPosition
from se_compress.model.measures import COMMON_SHARE, SINK_HEAD_FLOOR, bootstrap_interval, sink_decay
from se_compress.recipe import Validation
from se_compress.validation.predictions import Predictions, bounded_exp
from se_compress.validation.side_by_side import Compared


def judged(
    validation: Validation,
    gate: str,
    value: float,
    detail: str = "",
    interval: tuple[float, float] | None = None,
) -> Check:
    """The check of a gate's value by the limit of the recipe. NaN fails."""
    return GATES[gate].judge(value, validation.limit(gate), detail, interval)


def not_judged(validation: Validation, gate: str, reason: str) -> Check:
    """The check of a gate that could not be run."""
    return Check(gate, None, validation.limit(gate), None, reason)


def worst_of(domains: Mapping[str, Sequence[Check]]) -> tuple[Check, ...]:
    """Of each gate the domain that decides it: one that failed before one that passed, one that
    passed before one that could not be judged, and of these the one with the worst value."""
    rank = {False: 0, True: 1, None: 2}
    rows: dict[str, list[tuple[str, Check]]] = {}
    for domain, checks in domains.items():
        for check in checks:
            rows.setdefault(check.name, []).append((domain, check))
    found = []
    for name in (name for name in GATES if name in rows):
        domain, check = min(rows[name], key=lambda row: (rank[row[1].passed], _badness(row[1])))
        where = "; ".join(filter(None, [f"domain {domain}", check.detail]))
        found.append(replace(check, detail=check.detail if check.passed is None else where))
    return tuple(found)


def _badness(check: Check) -> float:
    """Less is worse."""
    if check.value is None or math.isnan(check.value):
        return -math.inf
    return -check.value if GATES[check.name].side == "at most" else check.value


def prediction_checks(found: Predictions, validation: Validation) -> tuple[Check, ...]:
    """Perplexity and KL divergence, with intervals over the sequences if these are enough; of the
    tail what has a limit."""
    total = float(found.tokens.sum())
    loss = found.loss_result - found.loss_source
    loss_interval = bootstrap_interval(loss, found.tokens)
    increase = (
        (bounded_exp(loss_interval[0]) - 1, bounded_exp(loss_interval[1]) - 1)
        if loss_interval
        else None
    )
    few = "" if loss_interval else f"{len(loss)} sequences are too few for an interval"
    return (
        judged(
            validation,
            "perplexity_increase",
            bounded_exp(float(loss.sum()) / total) - 1,
            few,
            increase,
        ),
        judged(
            validation,
            "kl_divergence",
            float(found.divergence.sum()) / total,
            few,
            bootstrap_interval(found.divergence, found.tokens),
        ),
        *_tail_checks(found, validation),
    )


def _tail_checks(found: Predictions, validation: Validation) -> Iterator[Check]:
    each = {"kl_divergence_99": found.each.quantile(0.99), "top_1_agreement": found.each.agreement}
    for gate in filter(validation.asks, each):
        yield judged(validation, gate, each[gate])


def massive_checks(
    layers: Sequence[LayerComparison], validation: Validation
) -> tuple[Check, Check]:
    """The massive activations and the tokens that carry them, each by its worst layer."""
    common = [(e, c) for c in layers for e in c.massive if e.share >= COMMON_SHARE]
    if not common:
        none = "not applicable: the source has no massive activation"
        return (
            not_judged(validation, "massive_activation_ratio", none),
            not_judged(validation, "sink_token_error", none),
        )
    element, layer = min(common, key=lambda pair: sortable(pair[0].retention))
    where = f"position {element.position}" if element.position >= 0 else "several positions"
    worst = max((c for _, c in common), key=lambda c: sortable(c.sink_error, math.inf))
    return (
        judged(
            validation,
            "massive_activation_ratio",
            element.retention,
            f"least in layer {layer.layer}, {where}, channel {element.channel}",
        ),
        judged(
            validation,
            "sink_token_error",
            worst.sink_error,
            f"most in layer {worst.layer}, where the cosine is {worst.sink_cosine:.4f}",
        ),
    )


def sortable(value: float, instead: float = -math.inf) -> float:
    """The value, or `instead` of NaN: no order holds among numbers that are none."""
    return instead if math.isnan(value) else value


def sink_check(compared: Compared, validation: Validation) -> Check:
    """Attention to position 0 that is gone, over all layers and heads with a sink there."""
    decay = sink_decay(
        pair
        for layer in compared.layers
        for pair in zip(layer.sink_heads_source, layer.sink_heads_result, strict=True)
    )
    if not compared.sinks:
        reason = "not applicable: no layer has softmax attention"
        return not_judged(validation, "sink_decay", reason)
    if decay is None:
        reason = f"not applicable: no head of the source gives position 0 {SINK_HEAD_FLOOR}"
        return not_judged(validation, "sink_decay", reason)
    return judged(validation, "sink_decay", decay, _strongest(compared.sinks[:2]))


def _strongest(sinks: Sequence[SinkPosition]) -> str:
    """Where attention goes: rates, or masses where learned sinks leave rates without meaning."""
    if any(sink.rate_source is None for sink in sinks):
        masses = (
            f"position {sink.position} ({sink.mass_source:.3f} -> {sink.mass_result:.3f})"
            for sink in sinks
        )
        return f"beside learned sinks, mass of {', '.join(masses)}"
    rates = (
        f"position {sink.position} ({sink.rate_source:.2f} -> {sink.rate_result:.2f})"
        for sink in sinks
    )
    return f"sink rates: {', '.join(rates)}"


def router_checks(layers: Sequence[LayerComparison], validation: Validation) -> tuple[Check, Check]:
    """Agreement of the routers, mean over the MoE layers and in the worst of them."""
    shares = {c.layer: c.router_agreement for c in layers if c.router_agreement is not None}
    worst = min(shares, key=lambda layer: sortable(shares[layer]))
    mean = sum(shares.values()) / len(shares)
    return (
        judged(validation, "router_agreement", mean),
        judged(
            validation,
            "router_agreement_least",
            shares[worst],
            f"layer {worst}",
        ),
    )
