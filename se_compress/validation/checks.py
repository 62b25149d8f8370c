"""The gates on behaviour: what was measured, held to the limits of the recipe."""

import math
from collections.abc import Sequence

from se_compress.artifacts import GATES, Check, LayerComparison
from se_compress.model.measures import COMMON_SHARE, SINK_HEAD_FLOOR, bootstrap_interval, sink_decay
from se_compress.recipe import Validation
from se_compress.validation.side_by_side import Compared, Predictions, bounded_exp


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


def prediction_checks(found: Predictions, validation: Validation) -> tuple[Check, Check]:
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
    )


def massive_checks(
    layers: Sequence[LayerComparison], validation: Validation
) -> tuple[Check, Check]:
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
    return instead if math.isnan(value) else value


def sink_check(compared: Compared, validation: Validation) -> Check:
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
        return not_judged(validation, "sink_decay", reason)
    return judged(validation, "sink_decay", decay, f"sink rates: {sinks}")


def router_checks(layers: Sequence[LayerComparison], validation: Validation) -> tuple[Check, Check]:
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
