"""Parts of validation.json: the text that a result was judged on, its domains, and the tail."""

from dataclasses import dataclass, field

from se_compress.artifacts.checks import Check
from se_compress.artifacts.gates import DISTANCE
from se_compress.artifacts.ids import UNLESS_NONE


@dataclass(frozen=True)
class Departure:
    """A held-out position at which source and result disagree much.

    sequence       which held-out sequence, from 0
    position       of the predicted token in it
    divergence     KL(source || result) of that token, nats
    before         the text in front of the token
    token          the token itself, which both had to predict
    after          the text that follows
    source, result   the token that each of them holds most likely
    source_share, result_share   the probability that it gives to that token
    """

    sequence: int
    position: int
    divergence: float
    before: str
    token: str
    after: str
    source: str
    source_share: float
    result: str
    result_share: float


@dataclass(frozen=True)
class Tail:
    """What the mean KL divergence does not tell, over all predicted tokens.

    median      of KL(source || result) by token, nats
    p90, p99    what 90 and 99 percent of the tokens stay below
    most        the largest
    agreement   share of the tokens of which both hold the same one most likely
    worst       where they disagree most, one for each sequence at most
    """

    median: float
    p90: float
    p99: float
    most: float
    agreement: float
    worst: tuple[Departure, ...]


@dataclass(frozen=True)
class DomainReport:
    """What a result is worth on the held-out text of one domain.

    name           as the recipe calls it
    checks         the gates that behaviour decides, by the limits of this domain
    perplexity_*   as in validation.json, of this domain alone
    tokens         predicted tokens
    tail           beside the mean
    """

    name: str
    checks: tuple[Check, ...]
    perplexity_source: float
    perplexity_result: float
    tokens: int
    tail: Tail

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    @property
    def distance(self) -> float | None:
        """From the source; None if it was not measured."""
        return next((check.value for check in self.checks if check.name == DISTANCE), None)


@dataclass(frozen=True)
class TextRecord:
    """Text that was drawn for a run.

    role       calibration, or held-out
    domain     as the recipe calls it; "" if it names none
    sources    files and data sets
    sequences  how many were drawn
    digest     of their tokens
    repeated   sequences that stand in the calibration text as well, whole; None of that itself
    seen       share of its tokens, in runs, that calibration saw too; None of calibration itself
    calibrated  whether calibration has text of a domain of this name; None where names are missing
    """

    role: str
    domain: str
    sources: tuple[str, ...]
    sequences: int
    digest: str
    repeated: int | None = field(default=None, metadata=UNLESS_NONE)
    seen: float | None = field(default=None, metadata=UNLESS_NONE)
    calibrated: bool | None = field(default=None, metadata=UNLESS_NONE)


@dataclass(frozen=True)
class TaskReport:
    """One task of lm_eval on source and result: who got what right, sample by sample.

    name            as lm_eval calls it
    metric          that says whether a sample is right
    samples         how many both models answered
    source, result  share that is right
    gained, lost    samples that only the result has right, and only the source
    p_value         how likely it is to lose as many or more, were a change as likely either way:
                    the exact test of McNemar, one-sided; 1 without any change
    """

    name: str
    metric: str
    samples: int
    source: float
    result: float
    gained: int
    lost: int
    p_value: float
