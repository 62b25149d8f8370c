"""compression.json: how compressing went, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from se_compress.artifacts.checks import Check
from se_compress.artifacts.ids import OURS, UNLESS_NONE, ExpertId, ExpertIndex

COMPRESSION_FILE = f"{OURS}/compression.json"


@dataclass(frozen=True)
class ExpertRecord:
    """How the quantisation of one expert went.

    layer, expert     the expert, by its id in the source
    bits, down_bits   as in ExpertDecision
    tokens      calibration tokens behind its Hessian
    prior_share  share of the layer's Hessian mixed in (0 = enough tokens of its own)
    damping     share of each column's mean square that was added to it (larger of the two Hessians)
    error_*     relative output error, sqrt(tr(dW H dW^T) / tr(W H W^T)), of gate and up, of down
    fallback    "", why another method had to be used, or that all is lost; a part that keeps 16
                bits has error 0
    """

    layer: int
    expert: ExpertIndex
    bits: int
    tokens: int
    prior_share: float
    damping: float
    error_gate_up: float
    error_down: float
    fallback: str
    down_bits: int | None = field(default=None, metadata=UNLESS_NONE)

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)


@dataclass(frozen=True)
class LinearRecord:
    """The same for a linear of attention or of a dense MLP; every token passes it.

    name      of its weight
    bits, tokens, damping, fallback   as in ExpertRecord
    error     relative output error
    """

    name: str
    bits: int
    tokens: int
    damping: float
    error: float
    fallback: str


@dataclass(frozen=True)
class RefineRecord:
    """How refining the routed experts of a layer went, on calibration text behind this layer.

    step               after which its state was kept; 0: refining did not help and was undone
    selection_before   distance of the hidden states from the source's, relative, root mean square
                       over the tokens by which a state is chosen, before refining
    selection          the same with the state that was kept
    report_before, report   the same of tokens that decided nothing
    codes_changed      share of the codes that are others now
    """

    step: int
    selection_before: float
    selection: float
    report_before: float
    report: float
    codes_changed: float


@dataclass(frozen=True)
class RepairRecord:
    """How repairing the experts that surgery has left in a layer went.

    changed   experts whose down_proj was changed: where it helped on text that it was not solved on
    experts   those that might have been
    report_before, report   distance of the hidden states behind the layer from what the source's
              layer makes of the same states before it, relative, root mean square over tokens that
              decided nothing
    """

    changed: int
    experts: int
    report_before: float
    report: float


@dataclass(frozen=True)
class FoldRecord:
    """A share of the calibration text: repairing, refining and distilling use it for one purpose.

    fold       tuning: gradients; selection: which state is kept; report: what is said of it
    sequences  their number
    digest     SHA-256 of their token ids, as a JSON list of lists
    """

    fold: str
    sequences: int
    digest: str


@dataclass(frozen=True)
class DistillRecord:
    """How distilling the whole result went, on calibration text.

    trained            what was trained: scales, routers, norms
    step               after which its state was kept; 0: distilling did not help and was undone
    selection_before   KL divergence from the source, mean over positions, nats, of the text by
                       which a state is chosen, before distilling
    selection          the same with the state that was kept
    report_before, report   the same of text that decided nothing
    covered            probability that the words have which the source's predictions keep, mean
                       over positions; all others count as one
    seconds            it took, the source's predictions included
    """

    trained: tuple[str, ...]
    step: int
    selection_before: float
    selection: float
    report_before: float
    report: float
    covered: float
    seconds: float


@dataclass(frozen=True)
class LayerRecord:
    """What compressing one layer did.

    layer          decoder layer, absolute
    seconds        it took
    experts        those that were quantised
    linears        the same of attention and dense MLP
    hidden_error   relative distance between the hidden states of the compressed stream and those of
                   the source after the layer
    failed         the gate that the compressed stream failed here: compressing stopped
    refined        how refining its routed experts went; their errors are those before it
    repaired       how repairing its experts went, before they were quantised
    digests        hashes of the tensors that were made and not copied, see digests.py
    distilled      names of the result's tensors that distilling has changed since, and that are
                   known by their hashes alone; none without it. hidden_error is that before it
    """

    layer: int
    seconds: float
    hidden_error: float
    experts: tuple[ExpertRecord, ...]
    linears: tuple[LinearRecord, ...] = ()
    failed: Check | None = field(default=None, metadata=UNLESS_NONE)
    refined: RefineRecord | None = field(default=None, metadata=UNLESS_NONE)
    repaired: RepairRecord | None = field(default=None, metadata=UNLESS_NONE)
    digests: Mapping[str, str] = field(default_factory=dict)
    distilled: tuple[str, ...] | None = field(default=None, metadata=UNLESS_NONE)


@dataclass(frozen=True)
class Compressed:
    """compression.json: what `compress` says of each layer, in order.

    layers      up to the last; if compressing stopped early, to the one behind which it did
    folds       of the calibration text, as refining and distilling used them; none without them
    distilled   how distilling the whole result went; none without it
    """

    layers: tuple[LayerRecord, ...]
    folds: tuple[FoldRecord, ...] | None = field(default=None, metadata=UNLESS_NONE)
    distilled: DistillRecord | None = field(default=None, metadata=UNLESS_NONE)

    @property
    def stopped(self) -> Check | None:
        """The gate that the compressed stream failed; None if the result is whole."""
        return self.layers[-1].failed if self.layers else None
