"""What several profiles have in common."""

from collections.abc import Mapping

from se_compress.artifacts import ExpertProfile, StabilityStudy, StudiedProfile


def study_of(profiles: Mapping[str, ExpertProfile]) -> StabilityStudy:
    """The study of profiles of models of one shape, by the names of their variants."""
    found = [{one.id for one in profile.super_experts} for profile in profiles.values()]
    common, all_of_them = set.intersection(*found), set.union(*found)
    return StabilityStudy(
        common=tuple(sorted(common)),
        sometimes=tuple(sorted(all_of_them - common)),
        stable=common == all_of_them,
        profiles=tuple(_short(name, profile) for name, profile in profiles.items()),
    )


def _short(name: str, profile: ExpertProfile) -> StudiedProfile:
    return StudiedProfile(
        name=name,
        model=profile.model,
        source_digest=profile.source_digest,
        tokens_digest=profile.tokens_digest,
        samples=profile.samples,
        sequence_length=profile.sequence_length,
        massive=profile.massive,
        threshold=profile.threshold,
        super_experts=profile.super_experts,
        undecided=profile.undecided,
    )
