"""The charts of a comparison: what a variant costs against its size, and its course by layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from se_compress.artifacts import ComparedVariant, Comparison, LayerComparison
from se_compress.reporting.comparison_rows import Row
from se_compress.reporting.page import Figure, chart_layout, number, percent, short

LINE_COLOURS = 10
# Of attention to the first token: ratios of less are noise (heads that are all but blind to it).
LEAST_MASS = 0.01
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "pentagon")


@dataclass(frozen=True)
class Line:
    """One curve of a chart: the value after each layer, and as a person reads it."""

    name: str
    rejected: bool
    values: dict[int, float]
    texts: dict[int, str]


@dataclass(frozen=True)
class Curve:
    """One chart of all variants, layer by layer."""

    key: str
    title: str
    summary: str
    layers: tuple[int, ...]
    lines: tuple[Line, ...]


def curves_of(comparison: Comparison) -> list[Curve]:
    """What is drawn layer by layer. Nothing if no variant could be run."""
    compared = [variant for variant in comparison.variants if variant.layers]
    if not compared:
        return []
    top = max(compared[0].layers, key=lambda layer: layer.peak_source)
    last = compared[0].layers[-1].layer
    return [
        _curve(
            "stream",
            "Massive activation: largest value in the residual stream",
            f"In the source it is largest after layer {top.layer}, {number(top.peak_source)}.",
            compared,
            "peak",
        ),
        _curve(
            "sinks",
            "Attention sink: attention to the first token",
            "Mean over the heads, of queries at position 8 and later.",
            compared,
            "sink_mass",
        ),
        _decay(compared),
        _curve(
            "hidden",
            "Error of the hidden states",
            f"Distance from the source's, relative to their length. The last layer is {last}.",
            compared,
            "hidden_error",
        ),
        _curve(
            "turned",
            "Change of the sink tokens' state",
            "How far their hidden state moved, direction included: low widths turn it long before "
            "they make it smaller.",
            compared,
            "sink_error",
        ),
    ]


def _decay(compared: Sequence[ComparedVariant]) -> Curve:
    rates = [{one.layer: decay_rate(one) for one in variant.layers} for variant in compared]
    lines = [
        Line(v.name, not v.checkpoint.published, rate, {at: percent(x) for at, x in rate.items()})
        for v, rate in zip(compared, rates, strict=True)
    ]
    return Curve(
        "decay",
        "Attention sink decay rate",
        f"1 - mean over heads of result / source (arXiv:2507.23279, eq. 7), of heads that pay "
        f"{percent(LEAST_MASS)} or more to the first token in the source.",
        tuple(layer.layer for layer in compared[0].layers),
        tuple(lines),
    )


def decay_rate(layer: LayerComparison) -> float:
    """Of one layer; NaN where no head of the source has a sink worth the name."""
    ratios = [
        result / source
        for source, result in zip(layer.sink_heads_source, layer.sink_heads_result, strict=True)
        if source >= LEAST_MASS
    ]
    return 1 - sum(ratios) / len(ratios) if ratios else math.nan


def _curve(
    key: str, title: str, summary: str, compared: Sequence[ComparedVariant], field: str
) -> Curve:
    text = number if field == "peak" else percent

    def line(name: str, rejected: bool, attribute: str, of: ComparedVariant) -> Line:
        values = {layer.layer: float(getattr(layer, attribute)) for layer in of.layers}
        return Line(name, rejected, values, {at: text(value) for at, value in values.items()})

    paired = hasattr(compared[0].layers[0], f"{field}_source")
    lines = [line("source", False, f"{field}_source", compared[0])] if paired else []
    attribute = f"{field}_result" if paired else field
    lines += [line(v.name, not v.checkpoint.published, attribute, v) for v in compared]
    layers = tuple(layer.layer for layer in compared[0].layers)
    return Curve(key, title, summary, layers, tuple(lines))


def curve_figure(curve: Curve) -> Figure:
    """A line for each model; the source's is broad and behind, a rejected one's is dashed."""
    layout = _legend_layout(380, "layer", {"stream": "largest |h|"}.get(curve.key, ""))
    layout["hovermode"] = "x unified"
    if curve.key == "stream":
        layout["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "none"}
        layout["yaxis"]["separatethousands"] = True
    elif curve.key == "sinks":
        layout["yaxis"] |= {"rangemode": "tozero", "tickformat": ".0%"}
    else:
        layout["yaxis"] |= {"rangemode": "tozero", "tickformat": "~%"}
    data = []
    others = [line.name for line in curve.lines if line.name != "source"]
    for line in curve.lines:
        look: dict[str, Any] = {"mode": "lines", "line": {"width": 7}, "opacity": 0.5}
        tone = "source"
        if line.name != "source":
            tone = f"line-{others.index(line.name) % LINE_COLOURS}"
            dash = "dash" if line.rejected else "solid"
            look = {"mode": "lines+markers", "line": {"width": 2, "dash": dash}}
            look["marker"] = {"size": 5, "symbol": SYMBOLS[others.index(line.name) % len(SYMBOLS)]}
        trace = {"type": "scatter", "name": line.name, "meta": tone, **look}
        trace |= {"x": list(line.values), "y": [short(v) for v in line.values.values()]}
        data.append(trace)
    return {"data": data, "layout": layout}


def trade_figure(rows: Sequence[Row]) -> Figure:
    """Size across, KL divergence upwards on a logarithmic scale.

    Each variant that could have been shipped is a point.
    """
    ticks = [digit * 10.0**decade for decade in range(-6, 3) for digit in (1, 3)]
    layout = _legend_layout(360, "size, MB", "KL to the source, nats")
    layout["showlegend"] = False
    layout["yaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
    layout["xaxis"] |= {"showgrid": True}
    data = []
    for state, symbol in (("passed", "circle"), ("failed", "x")):
        points = [
            row
            for row in rows
            if row.state == state and row.divergence > 0 and not row.variant.zeroed
        ]
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "meta": state,
                "x": [row.checkpoint.size_bytes / 1e6 for row in points],
                "y": [short(row.divergence) for row in points],
                "text": [row.name for row in points],
                "textposition": [
                    ("top center", "bottom center")[i % 2] for i in range(len(points))
                ],
                "textfont": {"size": 12},
                "cliponaxis": False,
                "marker": {"symbol": symbol, "size": 11},
                "hovertemplate": "%{text}<br>%{x:.1f} MB, %{y:.3g} nats<extra></extra>",
            }
        )
    return {"data": data, "layout": layout}


def _legend_layout(height: int, across: str, upwards: str) -> dict[str, Any]:
    layout = chart_layout(height, across, upwards)
    layout["showlegend"] = True
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    layout["margin"]["t"] = 34
    return layout
