"""Super experts that are known of a model, against those that a profile found."""

from collections.abc import Collection, Iterable

from se_compress.artifacts.ids import ExpertId
from se_compress.artifacts.profile import ExpertProfile


def surprise(profile: ExpertProfile, expected: Collection[ExpertId]) -> str:
    """A sentence if the profile found others than expected; "" if it did not, or nothing was
    expected."""
    found = {one.id for one in profile.super_experts}
    missing, others = set(expected) - found, found - set(expected)
    if not expected or not (missing or others):
        return ""
    said = [f"not found: {_listed(missing)}"] if missing else []
    said += [f"found beside: {_listed(others)}"] if others else []
    return (
        f"UNEXPECTED SUPER EXPERTS: super_experts.expected lists {_listed(expected)}; "
        f"{'; '.join(said)}. Is it that model, unchanged, and text enough? The plan follows the "
        "profile"
    )


def _listed(experts: Iterable[ExpertId]) -> str:
    return ", ".join(map(str, sorted(experts)))
