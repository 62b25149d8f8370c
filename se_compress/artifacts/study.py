"""stability.json: which super experts several profiles of one kind of model have in common."""

from dataclasses import dataclass

from se_compress.artifacts.ids import ExpertId
from se_compress.artifacts.profile import SuperExpert, UndecidedLayer


@dataclass(frozen=True)
class StudiedProfile:
    """One of the profiles, in short.

    name             of the variant
    model            what the recipe called it
    source_digest, tokens_digest   equal where the model, the text is the same
    samples, sequence_length       of the calibration text
    massive          whether the model has massive activations on this text
    threshold        the peak that an expert has to exceed
    super_experts    as in its profile.json
    undecided        as in its profile.json
    """

    name: str
    model: str
    source_digest: str
    tokens_digest: str
    samples: int
    sequence_length: int
    massive: bool
    threshold: float
    super_experts: tuple[SuperExpert, ...]
    undecided: tuple[UndecidedLayer, ...]


@dataclass(frozen=True)
class StabilityStudy:
    """stability.json: profiles of models of one shape, on several texts.

    common     super experts in every profile
    sometimes  in some of them only
    stable     none is in some of them only
    profiles   in the order of the recipe
    """

    common: tuple[ExpertId, ...]
    sometimes: tuple[ExpertId, ...]
    stable: bool
    profiles: tuple[StudiedProfile, ...]
