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
class LayerRecord:
    """What compressing one layer did.

    layer          decoder layer, absolute
    seconds        it took
    experts        those that were quantised
    linears        the same of attention and dense MLP
    hidden_error   relative distance between the hidden states of the compressed stream and those of
                   the source after the layer
    failed         the gate that the compressed stream failed here: compressing stopped
    digests        hashes of the tensors that were made and not copied, see digests.py
    """

    layer: int
    seconds: float
    hidden_error: float
    experts: tuple[ExpertRecord, ...]
    linears: tuple[LinearRecord, ...] = ()
    failed: Check | None = field(default=None, metadata=UNLESS_NONE)
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compressed:
    """compression.json: what `compress` says of each layer, in order.

    layers   up to the last; if compressing stopped early, to the one behind which it did
    """

    layers: tuple[LayerRecord, ...]

    @property
    def stopped(self) -> Check | None:
        """The gate that the compressed stream failed; None if the result is whole."""
        return self.layers[-1].failed if self.layers else None
