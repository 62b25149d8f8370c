"""The pages of profiles without a result: one profile, and what several have in common."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from se_compress.artifacts import (
    Choice,
    ExpertId,
    ExpertProfile,
    LayerStats,
    StabilityStudy,
    surprise,
)
from se_compress.engines.serving import beyond_float16
from se_compress.recipe import Recipe, resolved
from se_compress.reporting.experts_section import experts_context
from se_compress.reporting.page import template
from se_compress.reporting.report_charts import profile_figures


@dataclass(frozen=True)
class Forming:
    """A layer that forms massive activations, and who does it there.

    by          experts, its dense MLP, or that it is undecided
    confirmed   by zeroing; "" where there is nothing to confirm
    """

    layer: LayerStats
    by: str
    confirmed: str


def render_profile(recipe: Recipe, profile: ExpertProfile) -> str:
    """profile.html: one file that needs nothing beside it."""
    stability = profile.stability
    return template("profile.html.j2").render(
        experts_context(profile, None),
        recipe=recipe,
        surprise=surprise(profile, recipe.super_experts.expected_ids),
        overflow=beyond_float16(profile),
        forming=list(_forming(profile)),
        figures=profile_figures(profile),
        thresholds=_by_percentile(stability.thresholds) if stability else {},
        choice=choice_text(profile),
        halves=_halves(profile),
        recipe_yaml=resolved(recipe),
        plotly_js=Markup(get_plotlyjs()),
    )


def render_study(study: StabilityStudy) -> str:
    """stability.html, without charts."""
    columns = [*study.common, *study.sometimes]
    peaks = {
        one.name: {expert.id: expert for expert in one.super_experts} for one in study.profiles
    }
    return template("stability.html.j2").render(study=study, columns=columns, peaks=peaks)


def _forming(profile: ExpertProfile) -> Iterator[Forming]:
    words = {True: "yes", False: "no", None: "not asked"}
    for layer in profile.layers:
        if not layer.forming:
            continue
        here = [one for one in profile.super_experts if one.layer == layer.layer]
        by = f"its dense MLP, peak {layer.mlp_peak or 0.0:,.0f}" if not layer.moe else "undecided"
        named = ", ".join(str(one.id) for one in here)
        yield Forming(layer, named or by, ", ".join(words[one.confirmed] for one in here))


def _by_percentile(choices: tuple[Choice, ...]) -> Mapping[float, list[Choice]]:
    rows: dict[float, list[Choice]] = {}
    for one in choices:
        rows.setdefault(one.percentile, []).append(one)
    return rows


def choice_text(profile: ExpertProfile) -> Mapping[tuple[ExpertId, ...], str]:
    """Each choice of super experts that other thresholds make, beside the profile's own."""
    own = {one.id for one in profile.super_experts}
    choices = profile.stability.thresholds if profile.stability else ()
    return {one.experts: _difference(own, set(one.experts)) for one in choices}


def _difference(own: set[ExpertId], other: set[ExpertId]) -> str:
    if own == other:
        return "the same"
    signs = [f"+ {one}" for one in sorted(other - own)] + [
        f"− {one}" for one in sorted(own - other)
    ]
    return ", ".join(signs[:6]) + (f" and {len(signs) - 6} more" if len(signs) > 6 else "")


def _halves(profile: ExpertProfile) -> str:
    halves = profile.stability.halves if profile.stability else ()
    if len(halves) < 2:
        return "There is one sequence, so it has no halves."
    first, second = halves
    if first == second == tuple(one.id for one in profile.super_experts):
        return "Each half of the calibration text alone gives the same super experts."
    listed = [", ".join(map(str, half)) or "none" for half in halves]
    return (
        f"The halves of the calibration text do not agree: {listed[0]} in the sequences of even "
        f"index, {listed[1]} in those of odd index. More text would tell."
    )
