"""The files that a result and a comparison are told in: reports, model card, JSON beside them.

The pages are imported when they are written: what draws them takes a second to import, which a dry
run does not have.
"""

from pathlib import Path

from se_compress.artifacts import (
    OURS,
    Comparison,
    ExpertProfile,
    StabilityStudy,
    to_json,
    write_atomically,
)
from se_compress.recipe import Recipe, resolved
from se_compress.reporting.licence import licence_of
from se_compress.request import Outcome, Request


def write_reports(directory: Path, outcome: Outcome, request: Request, model: Path) -> None:
    """All that is told of a result, into `directory`, where its weights may not yet be published.

    model   directory of the source, whose licence is passed on
    """
    from se_compress.reporting.report import render_model_card, render_report

    recipe, profile = request.recipe, outcome.profile
    plan, validation = outcome.plan, outcome.validation
    files = {
        f"{OURS}/recipe.yaml": request.recipe_text,
        f"{OURS}/recipe-resolved.yaml": resolved(recipe),
        f"{OURS}/profile.json": to_json(profile),
        f"{OURS}/plan.json": to_json(plan),
        f"{OURS}/validation.json": to_json(validation),
        f"{OURS}/report.html": render_report(recipe, profile, plan, validation),
        "README.md": render_model_card(recipe, licence_of(model), profile, plan, validation),
    }
    for name, text in files.items():
        write_atomically(directory / name, text)


def write_profile(place: Path, recipe: Recipe, profile: ExpertProfile) -> None:
    """profile.json and profile.html of a profile without a result."""
    from se_compress.reporting.profile_page import render_profile

    write_atomically(place / "profile.json", to_json(profile))
    write_atomically(place / "profile.html", render_profile(recipe, profile))


def write_study(place: Path, study: StabilityStudy) -> None:
    """stability.json and stability.html."""
    from se_compress.reporting.profile_page import render_study

    write_atomically(place / "stability.json", to_json(study))
    write_atomically(place / "stability.html", render_study(study))


def write_comparison(output: Path, comparison: Comparison) -> None:
    """comparison.json and comparison.html."""
    from se_compress.reporting.comparison_page import render_comparison

    write_atomically(output / "comparison.json", to_json(comparison))
    write_atomically(output / "comparison.html", render_comparison(comparison))
