"""The page and the model card that say what was done and whether it may be trusted.

Nothing is measured here. This module selects; report_charts.py draws; the templates have the
words.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
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
    ExpertProfile,
    ExpertRecord,
    ValidationReport,
    surprise,
)
from se_compress.artifacts.targets import spoken
from se_compress.engines.serving import serving_of
from se_compress.formats import FORMATS
from se_compress.recipe import Recipe, resolved
from se_compress.reporting.domains import examples_of, rows_of
from se_compress.reporting.experts_section import TABLE_ROWS, experts_context
from se_compress.reporting.hub_numbers import model_index
from se_compress.reporting.page import describe_gates, judge, template
from se_compress.reporting.report_charts import figures_of


def render_report(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> str:
    """The report as one HTML file that needs nothing beside it: style, data and Plotly included."""
    context = _shared_context(recipe, profile, plan, validation)
    context |= _remarkable(recipe, profile, plan, validation)
    context |= experts_context(profile, plan)
    return template("report.html.j2").render(
        context,
        figures=figures_of(profile, plan, validation),
        roles=_layer_roles(profile),
        widths=sorted({decision.bits or 0 for decision in plan.experts}),
        experts_by_layer=_counts_by_layer(plan),
        examples=list(examples_of(validation.domains, validation.tail)),
        samples=[_sample(continuation) for continuation in validation.continuations],
        recipe_yaml=resolved(recipe),
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
    if index := model_index(_directory_name(recipe.output), validation):
        matter["model-index"] = index
    return template("model_card.md.j2").render(
        _shared_context(recipe, profile, plan, validation),
        front_matter=yaml.safe_dump(matter, sort_keys=False, allow_unicode=True),
        name=_directory_name(recipe.output),
        base_model=matter["base_model"],
        on_hub=_hub_id(recipe.model) is not None,
        source_license=source_license,
        serving=serving_of(plan),
        package=_package(plan),
    )


def _package(plan: CompressionPlan) -> str:
    """What transformers needs to unpack the plan's format; "" for nothing."""
    form = FORMATS.get(plan.scheme.format)
    return form.package.replace("_", "-") if form else ""


def _shared_context(
    recipe: Recipe, profile: ExpertProfile, plan: CompressionPlan, validation: ValidationReport
) -> dict[str, Any]:
    """What the templates of report and model card both read."""
    gates = describe_gates(validation)
    kinds = Counter((d.action, d.bits, d.reason) for d in plan.experts)
    return {
        "recipe": recipe,
        "profile": profile,
        "plan": plan,
        "target": spoken(plan.target),
        "validation": validation,
        "gates": gates,
        "verdict": judge(gates, validation),
        "surprise": surprise(profile, recipe.super_experts.expected_ids),
        "domains": rows_of(
            validation.domains,
            validation.tail,
            validation.checks,
            (validation.perplexity_source, validation.perplexity_result),
            validation.texts,
        ),
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
    """Experts and other linears that a reader should hear of.

    These are the worst, the rare, and those treated differently.
    """
    records = [record for layer in validation.records for record in layer.experts]
    linears = [record for layer in validation.records for record in layer.linears]
    rare = [record for record in records if record.prior_share > 0]
    limit = 1.001 * recipe.quantization.damping
    return {
        "worst": sorted(records, key=_by_error),
        "rare": sorted(rare, key=lambda record: (-record.prior_share, record.id)),
        "fallbacks": _by_reason((r.id, r.fallback) for r in records),
        "damped": [r.id for r in records if r.damping > limit],
        "linears": sorted(linears, key=lambda record: (-record.error, record.name)),
        "linear_fallbacks": _by_reason((r.name, r.fallback) for r in linears),
        "damped_linears": [r.name for r in linears if r.damping > limit],
        "repaired": [record for record in validation.records if record.repaired],
        "refined": [record for record in validation.records if record.refined],
        "distilled": [n for record in validation.records for n in record.distilled or ()],
        "unpacked": [other.name for other in plan.others if other.bits == 16],
        "rows": TABLE_ROWS,
    }


def _by_reason(reasons: Iterable[tuple[object, str]]) -> dict[str, list[object]]:
    """Reason -> who has it. Those without one are left out."""
    found: dict[str, list[object]] = {}
    for name, reason in reasons:
        if reason:
            found.setdefault(reason, []).append(name)
    return found


def _by_error(record: ExpertRecord) -> tuple[float, ExpertId]:
    errors = (record.error_gate_up, record.error_down)
    return (-max(math.inf if math.isnan(error) else error for error in errors), record.id)


def _layer_roles(profile: ExpertProfile) -> dict[int, str]:
    """Layer -> what it does to the massive activation, in words."""
    names = {(True, False): "forms", (False, True): "cancels", (True, True): "forms and cancels"}
    return {one.layer: names.get((one.forming, one.cancelling), "") for one in profile.layers}


def _counts_by_layer(plan: CompressionPlan) -> dict[int, Counter[int]]:
    """Layer -> bits -> experts. Experts that are gone count as 0 bits."""
    counts: dict[int, Counter[int]] = {}
    for decision in sorted(plan.experts, key=lambda d: d.id):
        counts.setdefault(decision.layer, Counter())[decision.bits or 0] += 1
    return counts


def _sample(continuation: Continuation) -> dict[str, object]:
    """Both texts of a continuation, split where they part, between whole words."""
    source, result = (
        re.findall(r"\s*\S+|\s+$", t) for t in (continuation.source, continuation.result)
    )
    pairs = zip(source, result, strict=False)
    agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return {
        "prompt": continuation.prompt,
        "domain": continuation.domain,
        "same": "".join(source[:agreed]),
        "source": "".join(source[agreed:]),
        "result": "".join(result[agreed:]),
        "agreed": agreed,
        "loops": (continuation.loop_source, continuation.loop_result),
        "identical": source == result,
    }


# --------------------------------------------------------------------------------- the model card

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(@[\w./-]+)?")


def _front_matter(
    recipe: Recipe, source_license: str | None, plan: CompressionPlan
) -> dict[str, object]:
    """What the Hub reads at the head of a model card."""
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
    """`owner/name` of a model, without its revision. None for a directory."""
    match = _HUB_ID.fullmatch(model)
    return match[1] if match and not Path(model).exists() else None


def _base_model(model: str) -> str:
    """The Hub's id of a model.

    Of a directory only the name, as where it lies is nobody's business.
    """
    return _hub_id(model) or _directory_name(model)


def _directory_name(path: str) -> str:
    return Path(path).name or path
