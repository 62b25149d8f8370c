"""Profile only: what a model's experts do, which of them are super experts, and nothing else.

    OUTPUT.profile/profile.json, profile.html   with variants in a folder of each, and beside them
    OUTPUT.profile/stability.json, .html        what their profiles have in common

Variants may name other models of the same shape and other text. What would be measured alike is
measured once; a later run takes the profile from here.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from se_compress.artifacts import ExpertProfile, ModelSource, surprise
from se_compress.engines.serving import beyond_float16
from se_compress.errors import RecipeError
from se_compress.opening.source import open_source
from se_compress.reporting.files import write_profile, write_study
from se_compress.reporting.study import study_of
from se_compress.request import Profiled, Request, naming
from se_compress.reuse import find_profile
from se_compress.running.faults import telling_whose
from se_compress.running.preflight import check_memory, check_place, check_positions
from se_compress.running.records import RunSettings
from se_compress.running.run_directory import VERSION_KEY, discard, locked, prepare


def profile_only(request: Request, place: Path) -> Profiled:
    """Measure, and write what was found into `place`. Raises SeCompressError."""
    check_place(place)
    request = replace(request, profiles_in=place)
    requests = request.by_variant() if request.recipe.variants else {"": request}
    sources: dict[str, ModelSource] = {}
    for name, one in requests.items():
        with naming(name):
            sources[name] = open_source(one.recipe.model, request.keep_code, one.notice)
            check_positions(sources[name], one.recipe)
            _check_alike(sources)
    profiles: dict[str, ExpertProfile] = {}
    for name, one in requests.items():
        with naming(name):
            profiles[name] = _profile(one, sources[name], place / name, profiles)
    if len(profiles) > 1:
        write_study(place, study_of(profiles))
    expected = {name: one.recipe.super_experts.expected_ids for name, one in requests.items()}
    return Profiled(place, profiles, expected)


def _profile(
    request: Request, source: ModelSource, place: Path, measured: Mapping[str, ExpertProfile]
) -> ExpertProfile:
    """One profile, in its place.

    measured   what this run has measured already
    """
    from se_compress.profiling.profiler import profile_digest, profile_experts
    from se_compress.text.calibrate import draw_tokens

    recipe = request.recipe
    with telling_whose(source.path, place):
        tokens = draw_tokens(recipe.calibration, source)
        token_count = len(tokens) * len(tokens[0])
        request.notice(check_memory(source, recipe, token_count, request.options.on_disk))
        wanted = profile_digest(source, tokens, recipe)
        profile = next((one for one in measured.values() if one.digest == wanted), None)
        profile = profile or find_profile(wanted, request)
        if profile is None:
            settings = RunSettings(
                {VERSION_KEY: version("se-compress"), "the profile": wanted},
                frozenset({VERSION_KEY, "the profile"}),
            )
            with locked(place, request.notice) as work:
                prepare(place, settings, request.fresh, request.notice)
                profile = profile_experts(source, tokens, recipe, request.options_in(work))
                write_profile(place, recipe, profile)
                discard(work)
        else:
            write_profile(place, recipe, profile)
    said = surprise(profile, recipe.super_experts.expected_ids), beyond_float16(profile)
    for sentence in filter(None, said):
        request.notice(sentence)
    return profile


def _check_alike(sources: Mapping[str, ModelSource]) -> None:
    """Only experts of one shape of model have names in common. Raises RecipeError."""
    (first, base), *rest = sources.items()
    for _, other in rest:
        if other.experts.keys() != base.experts.keys():
            raise RecipeError(
                f"its model ({other.name}) has other layers or experts than that of variant "
                f"{first} ({base.name}), so their super experts cannot be compared"
            )
