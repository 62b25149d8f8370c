"""profile.json: what was measured of a model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from se_compress.artifacts.ids import (
    SOURCE_BITS,
    UNLESS_NONE,
    ExpertId,
    ExpertIndex,
    ProjectionGroup,
)

OutlierReason = Literal["cancels", "layer forms no massive activation", "model has none"]
UndecidedReason = Literal["no one expert", "percentile", "no token"]


@dataclass(frozen=True)
class ExpertStats:
    """What one expert did over the calibration tokens.

    layer, expert     the expert, see ExpertId
    peak              max |down_proj output| before the routing weight, float32, all routed tokens
    weighted_peak     the same after the routing weight (or the shared expert's gate)
    channel, position, token_id   where the peak stands: residual channel, position in its
                      sequence, the token there; -1 if no token was routed here
    tokens            tokens routed to the expert
    gate_mass         sum of its routing weights over all tokens, divided by the number of tokens
    mean_output_norm  mean L2 norm of the down_proj output over its tokens
    saliency          mean of routing weight x output norm over its tokens (REAP, arXiv:2510.13999)
    loss_gate_up      bits -> KL divergence, in nats per token, that rounding gate_proj and up_proj
                      to that width (no GPTQ) is expected to cost: the layer's sensitivity x the
                      mean over all tokens of |weight x (output - quantised output)|^2 / |h|^2, h
                      the token's residual after the layer
    loss_down         the same for down_proj; 0 bits: nothing is left of the output
    half_peaks        the peak in the sequences of even and in those of odd index; empty where there
                      is one sequence
    """

    layer: int
    expert: ExpertIndex
    peak: float
    weighted_peak: float
    channel: int
    position: int
    token_id: int
    tokens: int
    gate_mass: float
    mean_output_norm: float
    saliency: float
    loss_gate_up: Mapping[int, float]
    loss_down: Mapping[int, float]
    half_peaks: tuple[float, ...] = ()

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)

    def loss_of(self, group: ProjectionGroup, bits: int) -> float:
        """What a width costs one projection group; the source's own precision costs nothing."""
        if bits == SOURCE_BITS:
            return 0.0
        return (self.loss_down if group == "down" else self.loss_gate_up)[bits]


@dataclass(frozen=True)
class LayerStats:
    """The residual stream after one decoder layer, and the layer's attention sinks.

    layer        decoder layer, absolute
    moe          whether it has routed experts
    peak, position, channel, token_id   the largest |h| over all tokens and where it stands
    median       median |h| over tokens and channels
    rise, fall   most that the layer adds to, takes from, any |h| (per token and channel)
    massive      Sun et al. (arXiv:2402.17762): peak > 100 and peak >= 1000 x median
    forming      the layer makes massive activations: see `criterion.forming_layers`
    cancelling   the layer takes away most of a massive activation: `criterion.cancelling_layers`
    mlp_peak     max |down_proj output| of the dense MLP; None in a MoE layer
    sink_mass    per head, mean attention that queries at position >= 8 pay to position 0; empty in
                 a layer without softmax attention, which has no sinks
    sink_rate    Gu et al. (arXiv:2410.10781): share of heads whose position-0 attention, averaged
                 over all queries, exceeds 0.3; None without softmax attention, and where learned
                 sinks take part of it, so that the threshold does not apply
    sensitivity  KL divergence of the next token, in nats, per squared relative error of the stream
                 after the layer: measured once, by rounding all its experts; 1 in a dense layer
    """

    layer: int
    moe: bool
    peak: float
    position: int
    channel: int
    token_id: int
    median: float
    rise: float
    fall: float
    massive: bool
    forming: bool
    cancelling: bool
    mlp_peak: float | None
    sink_mass: tuple[float, ...]
    sink_rate: float | None
    sensitivity: float = 1.0

    @property
    def mean_sink_mass(self) -> float:
        """Over the heads; NaN for a layer without attention probabilities."""
        return sum(self.sink_mass) / len(self.sink_mass) if self.sink_mass else math.nan


@dataclass(frozen=True)
class Ablation:
    """What happened when the output of one expert was set to zero.

    layer, expert        the expert, see ExpertId
    rise_removed         share of the layer's rise of the massive activation that vanished
    massive_activation   peak |h| at the model's strongest layer, after / before
    sink_mass            mean over layers and heads from the expert's layer on, after / before; 1 if
                         no later layer has softmax attention
    kl_divergence        mean KL(original || ablated) of the next-token distribution, nats
    """

    layer: int
    expert: ExpertIndex
    rise_removed: float
    massive_activation: float
    sink_mass: float
    kl_divergence: float


@dataclass(frozen=True)
class SuperExpert:
    """An expert that the criterion proposes.

    layer, expert   the expert, see ExpertId
    peak, channel, position, token_id   as in ExpertStats
    confirmed       what zeroing it showed; None if that was not asked for
    zeroed          what happened without it
    control         what happened without another expert of its layer
    """

    layer: int
    expert: ExpertIndex
    peak: float
    channel: int
    position: int
    token_id: int
    confirmed: bool | None = None
    zeroed: Ablation | None = None
    control: Ablation | None = None

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)


@dataclass(frozen=True)
class OutlierExpert:
    """An expert over the thresholds that is not a super expert.

    layer, expert   the expert, see ExpertId
    peak, channel, position   as in ExpertStats
    reason          why it is not: it cancels a massive activation, its layer forms none, or the
                    model has none
    """

    layer: int
    expert: ExpertIndex
    peak: float
    channel: int
    position: int
    reason: OutlierReason

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)


@dataclass(frozen=True)
class UndecidedLayer:
    """A layer of which the profile can say neither that it has a super expert nor that it has none.

    layer     decoder layer, absolute
    reason    "no one expert": it forms massive activations, and no expert is over the share of the
              greatest peak; "percentile": the experts are over that share and only the percentile
              holds them back, which lets 0.5 % of a model's experts pass whatever they do; "no
              token": no calibration token was routed to the experts
    experts   which; none for the first reason
    """

    layer: int
    reason: UndecidedReason
    experts: tuple[ExpertIndex, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The super experts that other thresholds would have chosen.

    percentile, fraction_of_max   as in the recipe's `super_experts`
    experts                       in order of id
    """

    percentile: float
    fraction_of_max: float
    experts: tuple[ExpertId, ...]


@dataclass(frozen=True)
class Stability:
    """What the choice of super experts hangs on, with the forming layers as they are.

    thresholds   other values of both thresholds, those of the paper's table 9
    halves       the recipe's own thresholds on the sequences of even and on those of odd index;
                 empty where there is one sequence
    """

    thresholds: tuple[Choice, ...]
    halves: tuple[tuple[ExpertId, ...], ...] = ()


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike the routed experts of a layer are: Euclidean distances of their mean outputs over
    a sample of the layer's tokens, those not routed to them included (HC-SMoE, arXiv:2410.08589).

    layer       decoder layer, absolute
    distances   of the pairs (0, 1), (0, 2) ... (1, 2) ...
    """

    layer: int
    distances: tuple[float, ...]


@dataclass(frozen=True)
class ExpertProfile:
    """profile.json: measured once, planned from often.

    model           what the recipe called it
    digest          of everything the profile was made from
    source_digest   of the model, see ModelSource
    tokens_digest   of the calibration tokens
    samples         calibration sequences
    sequence_length  tokens of each
    threshold       the peak that an expert has to exceed: max of the two clauses below
    percentile_value  the peak at `super_experts.percentile` of all experts
    fraction_value  `super_experts.fraction_of_max` of the largest peak
    massive         whether the model has massive activations at all
    super_experts   in order of id; empty with a note if the model has no massive activation
    outliers        experts over the threshold that are no super experts
    notes           what a reader has to know of how it was measured
    layers          one record a decoder layer
    experts         one record an expert, shared ones included
    similarities    measured only for a recipe that merges
    undecided       layers of which nothing can be said
    stability       what the choice hangs on
    """

    model: str
    digest: str
    source_digest: str
    tokens_digest: str
    samples: int
    sequence_length: int
    threshold: float
    percentile_value: float
    fraction_value: float
    massive: bool
    super_experts: tuple[SuperExpert, ...]
    outliers: tuple[OutlierExpert, ...]
    notes: tuple[str, ...]
    layers: tuple[LayerStats, ...]
    experts: tuple[ExpertStats, ...]
    similarities: tuple[LayerSimilarity, ...] = ()
    undecided: tuple[UndecidedLayer, ...] = ()
    stability: Stability | None = field(default=None, metadata=UNLESS_NONE)

    @cached_property
    def widths(self) -> frozenset[int]:
        """Whose losses were measured."""
        return frozenset().union(*(stats.loss_down for stats in self.experts))

    @cached_property
    def by_id(self) -> dict[ExpertId, ExpertStats]:
        return {stats.id: stats for stats in self.experts}
