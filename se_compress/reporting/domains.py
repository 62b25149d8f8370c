"""Domains, the tail of the KL divergence and the worst examples, as pages show them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from se_compress.artifacts import Check, Departure, DomainReport, Tail, TextRecord
from se_compress.reporting.page import WORDS, CheckInWords, State, describe_check

WHOLE = "all text"
LEAST_SHOWN = 1e-3  # nats
EXAMPLES = 3  # of each domain, where there are several


@dataclass(frozen=True)
class DomainRow:
    """One domain of a result, or all of its text where the recipe names none.

    calibrated   whether calibration has text of it; None where that is not known
    gates        those that are judged on text, by name
    """

    name: str
    calibrated: bool | None
    gates: dict[str, CheckInWords]
    tail: Tail
    perplexity_source: float | None
    perplexity_result: float | None

    @property
    def failed(self) -> list[CheckInWords]:
        return [gate for gate in self.gates.values() if gate.state == "failed"]

    @property
    def state(self) -> State:
        return "failed" if self.failed else "passed"

    @property
    def symbol(self) -> str:
        return WORDS[self.state][0]

    @property
    def word(self) -> str:
        return WORDS[self.state][1]

    @property
    def calibrated_word(self) -> str:
        return {True: "yes", False: "no", None: "not known"}[self.calibrated]


@dataclass(frozen=True)
class Example:
    """A departure with the domain that it is of; "" without one."""

    domain: str
    departure: Departure


def rows_of(
    domains: Sequence[DomainReport],
    tail: Tail | None,
    checks: Sequence[Check],
    perplexities: tuple[float | None, float | None],
    texts: Sequence[TextRecord] = (),
) -> list[DomainRow]:
    """A row for each domain; one for the whole text where there are none, and no row of a result
    that could not be run."""
    calibrated = {text.domain: text.calibrated for text in texts if text.role == "held-out"}
    if domains:
        return [
            DomainRow(
                name=one.name,
                calibrated=calibrated.get(one.name),
                gates=_in_words(one.checks),
                tail=one.tail,
                perplexity_source=one.perplexity_source,
                perplexity_result=one.perplexity_result,
            )
            for one in domains
        ]
    if tail is None:
        return []
    return [DomainRow(WHOLE, calibrated.get(""), _in_words(checks), tail, *perplexities)]


def _in_words(checks: Sequence[Check]) -> dict[str, CheckInWords]:
    return {check.name: describe_check(check) for check in checks}


def examples_of(domains: Sequence[DomainReport], tail: Tail | None) -> Iterator[Example]:
    """The worst positions: of each domain some, or of the whole text all that are listed. Where
    both predict the same there is nothing to see."""
    for one in domains:
        for departure in filter(_shows, one.tail.worst[:EXAMPLES]):
            yield Example(one.name, departure)
    if not domains and tail is not None:
        for departure in filter(_shows, tail.worst):
            yield Example("", departure)


def _shows(departure: Departure) -> bool:
    return not departure.divergence < LEAST_SHOWN  # NaN is shown
