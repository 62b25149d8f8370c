"""validation.json: source and result side by side, and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from se_compress.artifacts.checks import Check
from se_compress.artifacts.compression import LayerRecord
from se_compress.artifacts.held_out import DomainReport, Tail, TaskReport, TextRecord
from se_compress.artifacts.ids import UNLESS_NONE


@dataclass(frozen=True)
class MassiveElement:
    """A massive activation of the source (Sun's rule) after one layer, and what became of it.

    channel          of the residual stream
    position         in the sequence; -1: at several, none of them in half of the sequences
    share            elements per sequence
    source, result   mean h
    retention        see `measures.massive_elements`
    """

    position: int
    channel: int
    share: float
    source: float
    result: float
    retention: float


@dataclass(frozen=True)
class LayerComparison:
    """Source and result side by side after one layer.

    layer             decoder layer, absolute
    peak_*            largest |h| of the residual stream
    massive           massive activations of the source, the strongest first, eight at most
    massive_result    whether the result's residual stream is massive (Sun's rule)
    sink_cosine, sink_error   direction and size of the change of the sink tokens' residual, see
                      `measures.sink_token_change`
    sink_mass_*       mean over heads of the attention to position 0 from queries at position >= 8;
                      None in a layer without softmax attention
    sink_heads_*      the same per head; empty in such a layer
    sink_rate_*       share of the heads for which position 0 is a sink, see `measures.sink_rate`;
                      None in such a layer, and where learned sinks take part of the attention
    hidden_error      |h_result - h_source| / |h_source| over all tokens
    router_agreement  mean share of the top-k experts chosen by both; None in a dense layer
    """

    layer: int
    peak_source: float
    peak_result: float
    sink_mass_source: float | None
    sink_mass_result: float | None
    sink_heads_source: tuple[float, ...]
    sink_heads_result: tuple[float, ...]
    hidden_error: float
    router_agreement: float | None
    massive: tuple[MassiveElement, ...]
    massive_result: bool
    sink_cosine: float
    sink_error: float
    sink_rate_source: float | None
    sink_rate_result: float | None


@dataclass(frozen=True)
class SinkPosition:
    """A position that draws attention.

    position   in the sequence
    mass_*     mean attention to it over all layers and heads, in the source and the result
    rate_*     share of the layers and heads for which it is a sink, see `measures.sink_rate`; None
               where learned sinks take part of all attention, so that the threshold does not apply
    """

    position: int
    mass_source: float
    mass_result: float
    rate_source: float | None
    rate_result: float | None


@dataclass(frozen=True)
class Loop:
    """The end of a continuation that repeats itself, see `measures.find_loop`.

    period   tokens after which it repeats
    length   tokens of the repeating end
    """

    period: int
    length: int


@dataclass(frozen=True)
class Continuation:
    """One greedy continuation by both models.

    prompt       its text
    source, result   the text that each model went on with
    distinct_*   different 4-grams / 4-grams, see `measures.distinct`
    loop_*       None: it does not end in a loop
    domain       of the prompt; None where the recipe names none
    length_*     tokens until the end token, that one counted; None: it went on to the limit
    """

    prompt: str
    source: str
    result: str
    distinct_source: float | None = None
    distinct_result: float | None = None
    loop_source: Loop | None = field(default=None, metadata=UNLESS_NONE)
    loop_result: Loop | None = field(default=None, metadata=UNLESS_NONE)
    domain: str | None = field(default=None, metadata=UNLESS_NONE)
    length_source: int | None = field(default=None, metadata=UNLESS_NONE)
    length_result: int | None = field(default=None, metadata=UNLESS_NONE)


@dataclass(frozen=True)
class ValidationReport:
    """validation.json.

    passed         no check failed; one that was not run did not pass and did not fail
    checks         every gate; of domains the one that does worst decides
    not_run        names of the checks that could not be run
    perplexity_*   exp(mean cross-entropy) of the next token; NaN if the result could not be run
    tokens         predicted tokens, held out
    size_bytes, source_size_bytes   all tensor data of the result, of the source
    expert_bytes, source_expert_bytes   the routed experts' share of that
    layers         source and result after each layer
    sinks          the positions that draw most attention in the source or the result
    continuations  greedy ones of both, side by side
    records        what compressing said of each layer
    versions       package -> version
    tail           KL divergence beside its mean, and where it is largest; None if the result could
                   not be run
    domains        what each domain of the held-out text says; empty where the recipe names none
    texts          the text that was drawn, and what of it calibration saw
    tasks          what both models got right of each task of lm_eval
    cautions       what a reader should know before trusting the verdict
    """

    passed: bool
    checks: tuple[Check, ...]
    not_run: tuple[str, ...]
    perplexity_source: float
    perplexity_result: float
    tokens: int
    size_bytes: int
    source_size_bytes: int
    expert_bytes: int
    source_expert_bytes: int
    layers: tuple[LayerComparison, ...]
    sinks: tuple[SinkPosition, ...]
    continuations: tuple[Continuation, ...]
    records: tuple[LayerRecord, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    tail: Tail | None = None
    domains: tuple[DomainReport, ...] = ()
    texts: tuple[TextRecord, ...] = ()
    tasks: tuple[TaskReport, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def is_final(self) -> bool:
        """Whether another run of the same checks would say the same."""
        return not any(check.retry for check in self.checks)

    def check(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)
