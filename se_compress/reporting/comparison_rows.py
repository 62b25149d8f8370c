"""A variant as the comparison's page shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from se_compress.artifacts import CheckpointSummary, ComparedVariant
from se_compress.reporting.domains import DomainRow, Example, examples_of, rows_of
from se_compress.reporting.limits import missed
from se_compress.reporting.page import WORDS, CheckInWords, State, describe_check


@dataclass(frozen=True)
class Row:
    """A variant in words.

    share   its size, of the source's
    """

    variant: ComparedVariant
    share: float

    @property
    def checkpoint(self) -> CheckpointSummary:
        return self.variant.checkpoint

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def report(self) -> str:
        """Its own report, as a link from the page."""
        return f"{self.checkpoint.directory}/se_compress/report.html"

    @property
    def state(self) -> State:
        return "passed" if self.checkpoint.published else "failed"

    @property
    def symbol(self) -> str:
        return WORDS[self.state][0]

    @property
    def word(self) -> str:
        return "Passed" if self.checkpoint.published else "Rejected"

    @cached_property
    def gates(self) -> dict[str, CheckInWords]:
        return {check.name: describe_check(check) for check in self.checkpoint.checks}

    @property
    def divergence(self) -> float:
        """KL divergence to the source, in nats. 0 where it is not known."""
        return self.checkpoint.distance or 0.0

    @cached_property
    def domains(self) -> list[DomainRow]:
        one, checkpoint = self.variant, self.checkpoint
        perplexities = (checkpoint.perplexity_source, checkpoint.perplexity_result)
        return rows_of(one.domains, one.tail, checkpoint.checks, perplexities, one.texts)

    @cached_property
    def examples(self) -> list[Example]:
        """The worst position of each domain."""
        found = examples_of(self.variant.domains, self.variant.tail)
        firsts = {one.domain: one for one in reversed(list(found))}
        return list(reversed(firsts.values()))

    @property
    def not_run(self) -> list[str]:
        return [gate.title for gate in self.gates.values() if gate.state == "not-run"]

    @property
    def shippable(self) -> bool:
        return self.checkpoint.published and not self.variant.zeroed

    def missed(self, rows: Sequence["Row"]) -> list[str]:
        return missed(self.checkpoint, [row.checkpoint for row in rows])

    @property
    def no_limit(self) -> list[str]:
        return [gate.title for gate in self.gates.values() if gate.state == "no-limit"]

    @property
    def failed(self) -> list[CheckInWords]:
        return [gate for gate in self.gates.values() if gate.state == "failed"]
