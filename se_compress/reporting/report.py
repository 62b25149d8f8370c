"""The page and the model card that say what was done and whether it may be trusted.

Nothing is measured here. This module selects and draws; the templates hold the words.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from se_compress.artifacts import (
    CompressionPlan,
    Continuation,
    ExpertId,
    ExpertIndex,
    ExpertProfile,
    ExpertRecord,
    LayerComparison,
    ValidationReport,
)
from se_compress.recipe import Recipe
from se_compress.reporting.page import (
    Figure,
    chart_layout,
    describe_gates,
    judge,
    number,
    short,
    template,
    width,
)

TABLE_ROWS = 15


def render_report(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> str:
    """The report as one HTML file that needs nothing beside it: style, data and Plotly included."""
    context = _shared_context(recipe, profile, plan, validation)
    context |= _remarkable(recipe, profile, plan, validation)
    ranked = sorted(profile.experts, key=lambda stats: (-stats.peak, stats.id))
    return template("report.html.j2").render(
        context,
        figures=_figures(profile, plan, validation),
        largest=ranked[:TABLE_ROWS],
        median_peak=statistics.median(stats.peak for stats in ranked) if ranked else None,
        roles=_layer_roles(profile),
        widths=sorted({decision.bits or 0 for decision in plan.experts}),
        experts_by_layer=_counts_by_layer(plan),
        samples=[_sample(continuation) for continuation in validation.continuations],
        recipe_yaml=yaml.safe_dump(
            recipe.model_dump(mode="json", exclude={"variants", "require"}), sort_keys=False
        ),
        plotly_js=Markup(get_plotlyjs()),
    )


def render_model_card(
    recipe: Recipe,
    source_license: str | None,
    profile: ExpertProfile,
    plan: CompressionPlan,
    validation: ValidationReport,
) -> str:
    """README.md of the exported checkpoint, with front matter for the Hub."""
    matter = _front_matter(recipe, source_license, plan)
    return template("model_card.md.j2").render(
        _shared_context(recipe, profile, plan, validation),
        front_matter=yaml.safe_dump(matter, sort_keys=False, allow_unicode=True),
        name=_directory_name(recipe.output),
        base_model=matter["base_model"],
        on_hub=_hub_id(recipe.model) is not None,
        source_license=source_license,
    )


def _shared_context(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> dict[str, Any]:
    gates = describe_gates(validation)
    kinds = Counter((d.action, d.bits, d.reason) for d in plan.experts)
    return {
        "recipe": recipe,
        "profile": profile,
        "plan": plan,
        "validation": validation,
        "gates": gates,
        "verdict": judge(gates, validation),
        "decisions": kinds.most_common(),
        "others": Counter((d.bits, d.reason) for d in plan.others).most_common(),
        "sizes": (
            ("Whole checkpoint", validation.source_size_bytes, validation.size_bytes),
            ("Routed experts alone", validation.source_expert_bytes, validation.expert_bytes),
        ),
    }


# --------------------------------------------------------------------------------------- selection


def _remarkable(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> dict[str, Any]:
    """Experts and other linears that a reader should hear of: the worst, the rare, those treated
    differently."""
    records = [record for layer in validation.records for record in layer.experts]
    linears = [record for layer in validation.records for record in layer.linears]
    rare = [record for record in records if record.shrinkage > 0]
    limit = 1.001 * recipe.quantization.damping
    return {
        "worst": sorted(records, key=_by_error),
        "rare": sorted(rare, key=lambda record: (-record.shrinkage, record.id)),
        "fallbacks": _by_reason((r.id, r.fallback) for r in records),
        "damped": [r.id for r in records if r.damping > limit],
        "linears": sorted(linears, key=lambda record: (-record.error, record.name)),
        "linear_fallbacks": _by_reason((r.name, r.fallback) for r in linears),
        "damped_linears": [r.name for r in linears if r.damping > limit],
        "unpacked": [other.name for other in plan.others if other.bits == 16],
        "unrouted": [stats.id for stats in profile.experts if stats.tokens == 0],
        "rows": TABLE_ROWS,
    }


def _by_reason(reasons: Iterable[tuple[object, str]]) -> dict[str, list[object]]:
    """Who has which reason; those without one are left out."""
    found: dict[str, list[object]] = {}
    for name, reason in reasons:
        if reason:
            found.setdefault(reason, []).append(name)
    return found


def _by_error(record: ExpertRecord) -> tuple[float, ExpertId]:
    errors = (record.error_gate_up, record.error_down)
    return (-max(math.inf if math.isnan(error) else error for error in errors), record.id)


def _layer_roles(profile: ExpertProfile) -> dict[int, str]:
    names = {(True, False): "forms", (False, True): "cancels", (True, True): "forms and cancels"}
    return {one.layer: names.get((one.forming, one.cancelling), "") for one in profile.layers}


def _counts_by_layer(plan: CompressionPlan) -> dict[int, Counter[int]]:
    counts: dict[int, Counter[int]] = {}
    for decision in sorted(plan.experts, key=lambda d: d.id):
        counts.setdefault(decision.layer, Counter())[decision.bits or 0] += 1
    return counts


def _sample(continuation: Continuation) -> dict[str, object]:
    """Both texts, split where they part; whole words only."""
    source, result = (
        re.findall(r"\s*\S+|\s+$", t) for t in (continuation.source, continuation.result)
    )
    pairs = zip(source, result, strict=False)
    agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return {
        "prompt": continuation.prompt,
        "same": "".join(source[:agreed]),
        "source": "".join(source[agreed:]),
        "result": "".join(result[agreed:]),
        "agreed": agreed,
        "loops": (continuation.loop_source, continuation.loop_result),
        "identical": source == result,
    }


# ------------------------------------------------------------------------------------- the figures


def _figures(
    profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> dict[str, Figure]:
    """Plotly figures by the id of their place on the page; what was not measured has none."""
    figures = {}
    if profile.experts:
        figures["peaks"] = _peak_figure(profile)
    if plan.experts:
        figures["bits"] = _bits_figure(profile, plan)
    if validation.layers:
        figures |= _layer_figures(profile, validation.layers)
    return figures


def _peak_figure(profile: ExpertProfile) -> Figure:
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
        heads = [getattr(layer, f"sink_heads_{side}") for layer in layers]
        figures[f"heads-{side}"] = _head_figure([layer.layer for layer in layers], heads)
    return figures


def _head_figure(layers: Sequence[int], heads: Sequence[Sequence[float]]) -> Figure:
    layout = chart_layout(_heat_height(len(layers)), "head", "layer")
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["meta"] = {"scale": ["scale-low", "scale-mid", "scale-high"]}
    layout["coloraxis"] = {
        "cmin": 0,
        "cmax": 1.001,  # Plotly drops a tick at the very end
        "colorbar": _colorbar("attention to position 0", (0, 0.5, 1), ("0 %", "50 %", "100 %")),
    }
    trace = {
        "type": "heatmap",
        "y": list(layers),
        "z": [[short(value) for value in row] for row in heads],
        "coloraxis": "coloraxis",
        "hovertemplate": "layer %{y}, head %{x}<br>%{z:.1%}<extra></extra>",
    }
    return {"data": [trace], "layout": layout}


def _lines(
    profile: ExpertProfile, layers: Sequence[LayerComparison], quantity: str, **fields: str
) -> Figure:
    """One line per model, from the named field; the source broad and behind. Dotted lines mark the
    layers of super experts."""
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
    """Layers downwards, routed experts across, the shared experts in a column of their own."""
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


# --------------------------------------------------------------------------------- the model card

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(@[\w./-]+)?")


def _front_matter(
    recipe: Recipe, source_license: str | None, plan: CompressionPlan
) -> dict[str, object]:
    widths = {d.bits for d in plan.experts if d.action == "quantize" and d.bits is not None}
    tags = ["mixture-of-experts", "super-experts", "se-compress"]
    matter: dict[str, object] = {"base_model": _base_model(recipe.model)}
    if widths:
        matter["base_model_relation"] = "quantized"
        tags += [plan.scheme.method, *(f"{bits}-bit" for bits in sorted(widths))]
    return matter | {
        "license": (source_license or "unknown").lower(),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def _hub_id(model: str) -> str | None:
    """`owner/name` without its revision; None for a directory."""
    match = _HUB_ID.fullmatch(model)
    return match[1] if match and not Path(model).exists() else None


def _base_model(model: str) -> str:
    """The Hub's id; of a directory the name only, as where it lies is nobody's business."""
    return _hub_id(model) or _directory_name(model)


def _directory_name(path: str) -> str:
    return Path(path).name or path
