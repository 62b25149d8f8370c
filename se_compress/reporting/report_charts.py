"""The charts of a report: experts by layer, and source and result layer by layer.

Each is Plotly's own JSON without colours, which the page's style sheet has (page.py).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from se_compress.artifacts import (
    CompressionPlan,
    ExpertId,
    ExpertIndex,
    ExpertProfile,
    LayerComparison,
    LayerStats,
    ValidationReport,
)
from se_compress.reporting.page import Figure, chart_layout, number, short, width


def figures_of(
    profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> dict[str, Figure]:
    """Plotly figures by the id of their place on the page.

    What was not measured has none.
    """
    figures = {}
    if profile.experts:
        figures["peaks"] = _peak_figure(profile)
    if plan.experts:
        figures["bits"] = _bits_figure(profile, plan)
    if validation.layers:
        figures |= _layer_figures(profile, validation.layers)
    return figures


def profile_figures(profile: ExpertProfile) -> dict[str, Figure]:
    """The same of a profile alone."""
    layers = profile.layers
    figures = {"peaks": _peak_figure(profile)} if profile.experts else {}
    stream = _lines(profile, layers, "largest |h|", source="peak")
    stream["layout"]["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "none"}
    stream["layout"]["yaxis"]["separatethousands"] = True
    sinks = _lines(profile, layers, "attention", source="mean_sink_mass")
    sinks["layout"]["yaxis"] |= {"range": [0, 1], "tickformat": ".0%"}
    figures |= {"stream": stream, "sinks": sinks}
    heads = {layer.layer: layer.sink_mass for layer in layers if layer.sink_mass}
    if heads:
        figures["heads"] = _head_figure(heads)
    return figures


def _peak_figure(profile: ExpertProfile) -> Figure:
    """Peak of every expert, on a logarithmic scale, with a circle round super experts."""
    decades = {stats.id: _log10(stats.peak) for stats in profile.experts}
    known = [decade for decade in decades.values() if decade is not None] or [0.0]
    ticks = range(math.floor(min(known)), math.ceil(max(known)) + 1)
    figure = _expert_heat(
        decades,
        shown={stats.id: f"peak {number(stats.peak)}" for stats in profile.experts},
        marked=[one.id for one in profile.super_experts],
    )
    layout = figure["layout"]
    layout["meta"] = {"scale": ["scale-low", "scale-mid", "scale-high"]}
    layout["coloraxis"] = {
        "colorbar": _colorbar("peak", ticks, [f"{10.0**tick:,.10g}" for tick in ticks])
    }
    return figure


def _bits_figure(profile: ExpertProfile, plan: CompressionPlan) -> Figure:
    """Bits of every expert in the plan, with a circle round super experts."""
    widths = sorted({decision.bits or 0 for decision in plan.experts})
    names = [str(width) if width else "pruned" for width in widths]
    figure = _expert_heat(
        {d.id: float(widths.index(d.bits or 0)) for d in plan.experts},
        shown={d.id: f"{d.action}, {width(d.bits)}" for d in plan.experts},
        marked=[one.id for one in profile.super_experts],
    )
    layout = figure["layout"]
    layout["meta"] = {"steps": [f"bits-{name}" for name in names]}
    layout["coloraxis"] = {
        "cmin": -0.5,
        "cmax": len(widths) - 0.5,
        "colorbar": _colorbar("bits", range(len(widths)), names),
    }
    return figure


def _layer_figures(profile: ExpertProfile, layers: Sequence[LayerComparison]) -> dict[str, Figure]:
    """Source and result after each layer."""
    routed = [layer for layer in layers if layer.router_agreement is not None]
    stream = _lines(profile, layers, "largest |h|", source="peak_source", result="peak_result")
    stream["layout"]["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "none"}
    stream["layout"]["yaxis"]["separatethousands"] = True
    sinks = _lines(
        profile, layers, "attention", source="sink_mass_source", result="sink_mass_result"
    )
    sinks["layout"]["yaxis"] |= {"range": [0, 1], "tickformat": ".0%"}
    hidden = _lines(profile, layers, "relative distance", result="hidden_error")
    hidden["layout"]["yaxis"] |= {"rangemode": "tozero", "tickformat": "~%"}
    turned = _lines(profile, layers, "relative change", result="sink_error")
    turned["layout"]["yaxis"] |= {"rangemode": "tozero", "tickformat": "~%"}
    figures = {"stream": stream, "sinks": sinks, "hidden": hidden, "turned": turned}
    if routed:
        figures["routers"] = _lines(profile, routed, "same experts", result="router_agreement")
        figures["routers"]["layout"]["yaxis"] |= {"range": [0, 1.02], "tickformat": ".0%"}
    for side in ("source", "result"):
        heads = {layer.layer: getattr(layer, f"sink_heads_{side}") for layer in layers}
        figures[f"heads-{side}"] = _head_figure({at: row for at, row in heads.items() if row})
    return figures


def _head_figure(heads: Mapping[int, Sequence[float]]) -> Figure:
    """Attention to the first token, by layer and head.

    heads   a row for each layer that has softmax attention, a column for each head
    """
    layout = chart_layout(_heat_height(len(heads)), "head", "layer")
    most = max(map(len, heads.values()), default=0)
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["meta"] = {"scale": ["scale-low", "scale-mid", "scale-high"]}
    layout["coloraxis"] = {
        "cmin": 0,
        "cmax": 1.001,  # Plotly drops a tick at the very end
        "colorbar": _colorbar("attention to position 0", (0, 0.5, 1), ("0 %", "50 %", "100 %")),
    }
    trace = {
        "type": "heatmap",
        "y": list(heads),
        "z": [[*map(short, row), *[None] * (most - len(row))] for row in heads.values()],
        "coloraxis": "coloraxis",
        "hovertemplate": "layer %{y}, head %{x}<br>%{z:.1%}<extra></extra>",
    }
    return {"data": [trace], "layout": layout}


def _lines(
    profile: ExpertProfile,
    layers: Sequence[LayerComparison] | Sequence[LayerStats],
    quantity: str,
    **fields: str,
) -> Figure:
    """One line per model, the source's broad and behind.

    fields   name of the model -> field of a layer

    Dotted lines mark the layers of super experts.
    """
    layout = chart_layout(300, "layer", quantity)
    layout["margin"]["t"] = 34
    layout["hovermode"] = "x unified"
    layout["showlegend"] = len(fields) > 1
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    layout["shapes"] = [
        {
            "type": "line",
            "name": "mark",
            "layer": "below",
            "x0": layer,
            "x1": layer,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"dash": "dot", "width": 1.5},
        }
        for layer in sorted({one.layer for one in profile.super_experts})
    ]
    looks: dict[str, dict[str, Any]] = {
        "source": {"mode": "lines", "line": {"width": 7}, "opacity": 0.5},
        "result": {"mode": "lines+markers", "line": {"width": 2}, "marker": {"size": 5}},
    }
    data = [
        {"type": "scatter", "name": name, "meta": name, **looks[name]}
        | {"x": [layer.layer for layer in layers]}
        | {"y": [short(getattr(layer, field)) for layer in layers]}
        for name, field in fields.items()
    ]
    return {"data": data, "layout": layout}


def _expert_heat(
    values: Mapping[ExpertId, float | None],
    shown: Mapping[ExpertId, str],
    marked: Sequence[ExpertId],
) -> Figure:
    """A field for each expert: layers downwards, routed experts across.

    Shared experts have a column of their own.

    values   give the colour
    shown    text under the pointer
    marked   experts with a circle
    """
    layers = sorted({identity.layer for identity in values})
    routed = [identity.expert for identity in values if isinstance(identity.expert, int)]
    layout = chart_layout(_heat_height(len(layers)), "", "layer")
    # As the title of one of two axes it would run into the tick labels of a narrow chart.
    layout["annotations"] = [
        {"text": "expert", "xref": "paper", "yref": "paper", "x": 0.46, "y": 0, "yshift": -25}
        | {"xanchor": "center", "yanchor": "top", "showarrow": False, "font": {"size": 14}}
    ]
    layout["yaxis"] |= {"range": [layers[-1] + 0.5, layers[0] - 0.5], "showgrid": False}
    columns: dict[str, list[ExpertIndex]] = {}
    if routed:
        columns["x"] = list(range(max(routed) + 1))
        layout["xaxis"]["range"] = [-0.5, max(routed) + 0.5]
    if len(routed) < len(values):
        columns["x2"] = ["shared"]
        layout["xaxis"]["domain"] = [0, 0.93]
        layout["xaxis2"] = {"domain": [0.945, 1], "showgrid": False, "tickangle": 0}
    data: list[dict[str, Any]] = []
    for axis, experts in columns.items():
        grid = [[ExpertId(layer, expert) for expert in experts] for layer in layers]
        data.append(
            {
                "type": "heatmap",
                "xaxis": axis,
                "x": experts,
                "y": layers,
                "z": [[_three(values.get(identity)) for identity in row] for row in grid],
                "text": [[shown.get(identity, "") for identity in row] for row in grid],
                "coloraxis": "coloraxis",
                "hoverongaps": False,
                "hovertemplate": "layer %{y}, expert %{x}<br>%{text}<extra></extra>",
            }
        )
        data.append(_circles(axis, experts, marked))
    return {"data": data, "layout": layout}


def _circles(axis: str, experts: Sequence[ExpertIndex], marked: Sequence[ExpertId]) -> Figure:
    """A circle round each marked expert of one axis."""
    here = [identity for identity in marked if identity.expert in experts]
    columns = [experts.index(identity.expert) / len(experts) for identity in here]
    return {
        "type": "scatter",
        "mode": "markers+text" if axis == "x" else "markers",
        "meta": "mark",
        "xaxis": axis,
        "x": [identity.expert for identity in here],
        "y": [identity.layer for identity in here],
        "text": [str(identity) for identity in here],
        "textposition": [
            "middle right" if at < 0.1 else "middle left" if at > 0.9 else "top center"
            for at in columns
        ],
        "textfont": {"size": 12},
        "cliponaxis": False,
        "marker": {"symbol": "circle-open", "size": 15, "line": {"width": 2.5}},
        "hoverinfo": "skip",
    }


def _heat_height(rows: int) -> int:
    return 130 + min(720, max(160, rows * 13))


def _colorbar(title: str, ticks: Iterable[float], labels: Sequence[str]) -> dict[str, Any]:
    """The legend of a colour scale, above the chart."""
    return {
        "orientation": "h",
        "thickness": 10,
        "outlinewidth": 0,
        "xpad": 0,
        "ypad": 4,
        "tickangle": 0,
        "len": 0.6,
        "x": 0,
        "xanchor": "left",
        "y": 1.01,
        "yanchor": "bottom",
        "title": {"text": title, "side": "top"},
        "tickvals": list(ticks),
        "ticktext": list(labels),
    }


def _three(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _log10(value: float) -> float | None:
    return math.log10(value) if value > 0 and math.isfinite(value) else None
