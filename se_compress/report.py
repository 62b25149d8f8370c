"""The page and the model card that say what was done and whether it may be trusted.

Nothing is measured here. This module judges, selects and draws; the templates hold the words. A
chart is Plotly's own JSON without colours: the page takes them from its style sheet, so that they
follow the reader's light or dark scheme. One rule comes before all others: a check that was not run
is never shown as passed.
"""

import html
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from se_compress.artifacts import (
    Check,
    CompressionPlan,
    Continuation,
    ExpertDecision,
    ExpertId,
    ExpertIndex,
    ExpertProfile,
    ExpertRecord,
    LayerComparison,
    Scheme,
    ValidationReport,
)
from se_compress.recipe import Recipe

Figure = dict[str, Any]
State = Literal["passed", "failed", "not-run"]

SOURCE_BITS = 16
LISTED_EXPERTS = 60
TABLE_ROWS = 15
NO_BREAK = "\u00a0"
SIZE_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
WORDS: Mapping[State, tuple[str, str]] = {
    "passed": ("✓", "Passed"),
    "failed": ("✕", "Failed"),
    "not-run": ("○", "Not run"),
}


class Wording(NamedTuple):
    """How a check is put to a reader. `bound`: the side of the limit on which good values lie."""

    title: str
    meaning: str
    bound: str = ""
    share: bool = False


WORDINGS: Mapping[str, Wording] = {
    "perplexity_increase": Wording(
        "Perplexity increase",
        "How much worse the result predicts held-out text than the source does.",
        "at most",
        share=True,
    ),
    "kl_divergence": Wording(
        "KL divergence to the source",
        "How far the next-token probabilities moved, in nats per token; 0 means not at all.",
        "at most",
    ),
    "massive_activation_ratio": Wording(
        "Massive activation kept",
        "How well the result keeps the huge value that super experts write into the stream; the "
        "worst layer counts.",
        "at least",
        share=True,
    ),
    "sink_decay": Wording(
        "Attention sink lost",
        "Share of the attention to the first token that went elsewhere.",
        "at most",
        share=True,
    ),
    "router_agreement": Wording(
        "Router agreement",
        "Share of the experts chosen by the source that the result chooses too.",
        "at least",
        share=True,
    ),
    "repetition": Wording(
        "Added repetition",
        "Repeated four-token runs in the continuations, as a share: result minus source.",
        "at most",
    ),
    "tensors_accounted": Wording(
        "Tensors accounted for",
        "Share of the planned tensors that are in the files as planned.",
        "at least",
        share=True,
    ),
    "reload": Wording(
        "Reload",
        "Relative distance of the logits of the target engine from those that were judged here.",
        "at most",
    ),
}


@dataclass(frozen=True)
class Gate:
    """One check in words. `value` and `limit` stay as they are, for machines that read the page."""

    name: str
    wording: Wording
    value: float | None
    value_text: str
    limit: float | None
    limit_text: str
    state: State
    detail: str

    @property
    def title(self) -> str:
        return self.wording.title

    @property
    def symbol(self) -> str:
        return WORDS[self.state][0]

    @property
    def word(self) -> str:
        return WORDS[self.state][1]


@dataclass(frozen=True)
class Verdict:
    """`state` "not-run" means that no check could be run, so that nothing is proven."""

    state: State
    symbol: str
    word: str
    sentences: tuple[str, ...]


def render_report(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> str:
    """The report as one HTML file that needs nothing beside it: style, data and Plotly included."""
    context = _shared_context(recipe, profile, plan, validation)
    context |= _remarkable(recipe, profile, validation)
    ranked = sorted(profile.experts, key=lambda stats: (-stats.peak, stats.id))
    return _template("report.html.j2").render(
        context,
        figures=_figures(profile, plan, validation),
        largest=ranked[:TABLE_ROWS],
        median_peak=statistics.median(stats.peak for stats in ranked) if ranked else None,
        roles=_layer_roles(profile),
        widths=sorted({decision.bits or 0 for decision in plan.experts}),
        experts_by_layer=_counts_by_layer(plan),
        samples=[_sample(continuation) for continuation in validation.continuations],
        recipe_yaml=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
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
    return _template("model_card.md.j2").render(
        _shared_context(recipe, profile, plan, validation),
        front_matter=yaml.safe_dump(matter, sort_keys=False, allow_unicode=True),
        name=_directory_name(recipe.output),
        base_model=matter["base_model"],
        on_hub=_hub_id(recipe.model) is not None,
        source_license=source_license,
    )


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("se_compress", "templates"),
        autoescape=lambda template: template is None or not template.endswith(".md.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "size": size,
        "count": count,
        "listed": listed,
        "width": _width,
        "fate": _fate,
        "scheme": _scheme,
        "mean": lambda values: statistics.fmean(values),
        "plain": _plain_text,
    }
    return environment.get_template(name)


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
        "sizes": (
            ("Whole checkpoint", validation.source_size_bytes, validation.size_bytes),
            ("Routed experts alone", validation.source_expert_bytes, validation.expert_bytes),
        ),
    }


# ------------------------------------------------------------------------------ numbers for people


def number(value: float | None, apart_from: float | None = None) -> str:
    """Three significant digits, thousands grouped; more where two different numbers would otherwise
    look the same, such as a value just beyond its limit."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    for digits in range(3, 17):
        text = _rounded(value, digits)
        if apart_from is None or value == apart_from or text != _rounded(apart_from, digits):
            break
    return text


def _rounded(value: float, digits: int) -> str:
    decimals = max(0, digits - 4)
    if round(abs(value), decimals) >= 1000:
        return f"{value:,.{decimals}f}"
    return f"{value:.{digits}g}"


def percent(value: float | None, apart_from: float = 1.0) -> str:
    """A share as a percentage; "100 %" is kept for what is exactly all of it."""
    if value is None or not math.isfinite(value):
        return number(value)
    return number(100 * value, 100 * apart_from) + f"{NO_BREAK}%"


def size(value: float) -> str:
    """Bytes in decimal units, as disks and download pages count."""
    for unit, factor in SIZE_UNITS:
        if value >= factor:
            return f"{number(value / factor)}{NO_BREAK}{unit}"
    return f"{value:.0f}{NO_BREAK}B"


def count(amount: int, thing: str) -> str:
    """ "1 expert", "2 experts"."""
    return f"{amount:,} {thing}" if amount == 1 else f"{amount:,} {thing}s"


def listed(identities: Iterable[object]) -> str:
    """Names in a row; of very many the first, and how many more there are."""
    names = [str(identity) for identity in identities]
    more = len(names) - LISTED_EXPERTS
    return ", ".join(names[:LISTED_EXPERTS]) + (f" and {more:,} more" if more > 0 else "")


def _width(bits: int | None) -> str:
    if not bits:
        return "pruned"
    return "16 bits (as in the source)" if bits == SOURCE_BITS else f"{bits} bits"


def _scheme(scheme: Scheme) -> str:
    """A plan's scheme in words."""
    if scheme.method == "none":
        return scheme.method
    scales = "one scale per row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    if scheme.data_type is None:
        zeros = "symmetric" if scheme.symmetric else "asymmetric"
        return f"{scheme.method}, {scales}, {zeros}"
    double = ", double quantisation" if scheme.double_quant else ""
    return f"{scheme.method} {scheme.data_type}, {scales.replace('groups', 'blocks')}{double}"


def _fate(decision: ExpertDecision | None) -> str:
    if decision is None:
        return "has no line in the plan"
    if decision.action in ("prune", "merge"):
        return {"prune": "was pruned", "merge": "was merged"}[decision.action]
    if decision.bits == SOURCE_BITS:
        return "keeps the source's precision"
    return f"has {decision.bits} bits"


def _plain_text(text: object) -> str:
    """Text of which neither Markdown nor HTML makes anything."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escaped)


# ------------------------------------------------------------------------------------ the verdict


def describe_gates(validation: ValidationReport) -> tuple[Gate, ...]:
    """Every check in words; a name that only `not_run` knows gets a line too."""
    known = {check.name for check in validation.checks}
    missing = [Check(name, None, None, None) for name in validation.not_run if name not in known]
    return tuple(_gate(check) for check in (*validation.checks, *missing))


def _gate(check: Check) -> Gate:
    wording = WORDINGS.get(check.name, Wording(check.name.replace("_", " ").capitalize(), ""))
    value, limit = check.value, check.limit
    apart = math.inf if limit is None else limit
    states: dict[bool | None, State] = {True: "passed", False: "failed", None: "not-run"}
    return Gate(
        name=check.name,
        wording=wording,
        value=value,
        value_text=percent(value, apart) if wording.share else number(value, apart),
        limit=limit,
        limit_text=percent(limit) if wording.share else number(limit),
        state=states[check.passed],
        detail=check.detail.removeprefix("not run: "),
    )


def judge(gates: Sequence[Gate], validation: ValidationReport) -> Verdict:
    """Failed if anything failed, passed only if something passed; otherwise nothing is proven."""
    titles = {state: [gate.title for gate in gates if gate.state == state] for state in WORDS}
    failed, not_run = titles["failed"], titles["not-run"]
    everything = count(len(gates), "check")
    state: State = "passed"
    if failed or not validation.passed:
        state = "failed"
        named = f": {', '.join(failed)}" if failed else ", yet the validation did not pass"
        first = f"{len(failed)} of {everything} failed{named}. This checkpoint was not published."
    elif not titles["passed"]:
        state = "not-run"
        first = "No check could be run, so nothing is known about this checkpoint."
    elif not_run:
        first = f"{len(titles['passed'])} of {everything} passed and none failed."
    else:
        first = f"All {everything} passed."
    symbol, word = WORDS[state]
    remainder = (f"Not run: {', '.join(not_run)}.",) if not_run else ()
    return Verdict(state, symbol, "Not proven" if state == "not-run" else word, (first, *remainder))


# --------------------------------------------------------------------------------------- selection


def _remarkable(
    recipe: Recipe, profile: ExpertProfile, validation: ValidationReport
) -> dict[str, Any]:
    """Experts that a reader should hear of: the worst, the rare, those treated differently."""
    records = [record for layer in validation.records for record in layer.experts]
    rare = [record for record in records if record.shrinkage > 0]
    fallbacks: dict[str, list[ExpertId]] = {}
    for record in records:
        if record.fallback:
            fallbacks.setdefault(record.fallback, []).append(record.id)
    return {
        "worst": sorted(records, key=_by_error),
        "rare": sorted(rare, key=lambda record: (-record.shrinkage, record.id)),
        "fallbacks": fallbacks,
        "damped": [r.id for r in records if r.damping > 1.001 * recipe.quantization.damping],
        "unrouted": [stats.id for stats in profile.experts if stats.tokens == 0],
        "rows": TABLE_ROWS,
    }


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
        shown={d.id: f"{d.action}, {_width(d.bits)}" for d in plan.experts},
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
    figures = {"stream": stream, "sinks": sinks, "hidden": hidden}
    if routed:
        figures["routers"] = _lines(profile, routed, "same experts", result="router_agreement")
        figures["routers"]["layout"]["yaxis"] |= {"range": [0, 1.02], "tickformat": ".0%"}
    for side in ("source", "result"):
        heads = [getattr(layer, f"sink_heads_{side}") for layer in layers]
        figures[f"heads-{side}"] = _head_figure([layer.layer for layer in layers], heads)
    return figures


def _head_figure(layers: Sequence[int], heads: Sequence[Sequence[float]]) -> Figure:
    layout = _layout(_heat_height(len(layers)), "head", "layer")
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
        "z": [[_short(value) for value in row] for row in heads],
        "coloraxis": "coloraxis",
        "hovertemplate": "layer %{y}, head %{x}<br>%{z:.1%}<extra></extra>",
    }
    return {"data": [trace], "layout": layout}


def _lines(
    profile: ExpertProfile, layers: Sequence[LayerComparison], quantity: str, **fields: str
) -> Figure:
    """One line per model, from the named field; the source broad and behind. Dotted lines mark the
    layers of super experts."""
    layout = _layout(300, "layer", quantity)
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
        | {"y": [_short(getattr(layer, field)) for layer in layers]}
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
    layout = _layout(_heat_height(len(layers)), "", "layer")
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


def _layout(height: int, across: str, upwards: str) -> dict[str, Any]:
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 52, "r": 12, "t": 12, "b": 48},
        "font": {"size": 12},
        "showlegend": False,
        "xaxis": {"title": {"text": across}, "showgrid": False},
        "yaxis": {"title": {"text": upwards}, "automargin": True},
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


def _short(value: float) -> float | None:
    """Four significant digits: what a chart can show. JSON has neither infinity nor NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


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
