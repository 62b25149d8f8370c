"""Made-up but plausible artefacts of a model like `smollm2-moe`, for whatever only reads them.

30 layers, a shared expert and 16 routed experts in each, one super expert (11, 3), cancelled in
layer 28, 9 attention heads. The counts can be set, to see what a large model looks like. Every
number comes from a seeded generator, so two calls give equal artefacts.
"""

import json
import math
import random
from dataclasses import replace

from se_compress.artifacts import (
    GATES,
    Ablation,
    Check,
    CheckpointSummary,
    ComparedVariant,
    Comparison,
    CompressionPlan,
    Continuation,
    Departure,
    DomainReport,
    ExpertDecision,
    ExpertId,
    ExpertIndex,
    ExpertProfile,
    ExpertRecord,
    ExpertStats,
    LayerComparison,
    LayerRecord,
    LayerStats,
    MassiveElement,
    OutlierExpert,
    Scheme,
    SinkPosition,
    SuperExpert,
    Tail,
    TaskReport,
    TextRecord,
    ValidationReport,
)
from se_compress.recipe import Recipe, parse_recipe
from se_compress.reporting.comparison import compare

SUPER = ExpertId(11, 3)
CONTROL = ExpertId(11, 7)
CANCELLER = ExpertId(28, 6)
CHANNEL = 507
PEAK = 33_536.0
UNLUCKY = ExpertId(17, 9)
RARE = (ExpertId(4, 12), ExpertId(11, 14), ExpertId(22, 5))


def example_recipe(**changes: object) -> Recipe:
    data = {
        "model": "models/smollm2-moe",
        "output": "out/quickstart",
        "target": "gptqmodel",
        "calibration": {"data": "text/calibration.txt", "samples": 64, "sequence_length": 512},
        "policy": {"bits": [4], "protected_bits": 16},
        "quantization": {"method": "gptq", "group_size": 64},
        "validation": {"data": "text/held-out.txt"},
    }
    return parse_recipe(data | changes, "example.yaml")


def example_profile(layers: int = 30, experts: int = 16, heads: int = 9) -> ExpertProfile:
    dice = random.Random(layers * 1000 + experts)
    super_expert = SuperExpert(
        SUPER.layer, SUPER.expert, 33_412.5, CHANNEL, 0, 1, True,
        Ablation(SUPER.layer, SUPER.expert, 0.9936, 0.0065, 0.3921, 2.7316),
        Ablation(CONTROL.layer, CONTROL.expert, 0.0004, 0.9998, 1.0011, 0.0052),
    )  # fmt: skip
    outlier = OutlierExpert(CANCELLER.layer, CANCELLER.expert, 13_702.0, CHANNEL, 0, "cancels")
    return ExpertProfile(
        model="models/smollm2-moe",
        digest="5be0c1f2a7d94e63",
        source_digest="0f3c9d2e11ab7784",
        tokens_digest="93aa64c0de5b1f07",
        samples=64,
        sequence_length=512,
        threshold=3341.25,
        percentile_value=612.4,
        fraction_value=3341.25,
        massive=True,
        super_experts=(super_expert,),
        outliers=(outlier,),
        notes=("3 experts saw fewer than 64 calibration tokens: (4, 12), (11, 14), (22, 5)",),
        layers=tuple(_layer_stats(layer, layers, heads, dice) for layer in range(layers)),
        experts=tuple(
            _expert_stats(identity, dice) for identity in _identities(layers, experts)
        ),
    )  # fmt: skip


def quiet_profile() -> ExpertProfile:
    """A model without massive activations, hence without super experts."""
    profile = example_profile()
    return replace(
        profile,
        massive=False,
        super_experts=(),
        outliers=(OutlierExpert(28, 6, 81.5, CHANNEL, 0, "model has none"),),
        notes=("the largest |h| is 81.5: no massive activation, so no expert is a super expert",),
        layers=tuple(
            replace(layer, peak=min(layer.peak, 81.5), forming=False, cancelling=False)
            for layer in profile.layers
        ),
        experts=tuple(replace(stats, peak=min(stats.peak, 81.5)) for stats in profile.experts),
    )


def example_plan(layers: int = 30, experts: int = 16) -> CompressionPlan:
    return CompressionPlan(
        target="gptqmodel",
        scheme=Scheme("gptq", "gptq", 64, True),
        bits_per_weight=4.5183,
        size_bytes=163_102_720,
        source_size_bytes=271_430_144,
        protected=(SUPER,),
        profile_digest="5be0c1f2a7d94e63",
        notes=("the shared experts keep the source's precision (policy.other_bits is 16)",),
        experts=tuple(_decision(identity) for identity in _identities(layers, experts)),
    )


def mixed_plan(layers: int = 30, experts: int = 16) -> CompressionPlan:
    """Every width, and one expert pruned."""
    dice = random.Random(5)
    plan = example_plan(layers, experts)
    changed = [
        replace(one, bits=dice.choice((2, 3, 4, 4, 4, 8)), reason="budget")
        if one.action == "quantize" else one
        for one in plan.experts
    ]  # fmt: skip
    changed[4] = replace(changed[4], action="prune", bits=None, reason="lowest saliency")
    return replace(plan, experts=tuple(changed), bits_per_weight=4.1027)


def example_validation(layers: int = 30, experts: int = 16, heads: int = 9) -> ValidationReport:
    dice = random.Random(9)
    checks = (
        Check("perplexity_increase", 0.0123, 0.10, True),
        Check("kl_divergence", 0.0443, 0.20, True, low=0.0409, high=0.0481),
        Check("massive_activation_ratio", 0.9871, 0.90, True, "least in layer 14"),
        Check("sink_decay", 0.0112, 0.10, True),
        Check("router_agreement", 0.9367, 0.70, True),
        Check("repetition", 0.0208, 0.25, True, "source 0.104, result 0.125"),
        Check("tensors_accounted", 1.0, 1.0, True),
        Check("reload", None, 0.05, None, "gptqmodel is not installed"),
    )
    return ValidationReport(
        passed=True,
        checks=checks,
        not_run=("reload",),
        perplexity_source=44.37,
        perplexity_result=44.9157,
        tokens=8192,
        size_bytes=163_104_256,
        source_size_bytes=271_430_144,
        expert_bytes=31_042_560,
        source_expert_bytes=106_168_320,
        layers=tuple(_comparison(layer, layers, heads, dice) for layer in range(layers)),
        sinks=(SinkPosition(0, 0.41, 0.40, 0.52, 0.51), SinkPosition(5, 0.06, 0.06, 0.0, 0.0)),
        continuations=_continuations(),
        records=tuple(_record(layer, experts, dice) for layer in range(layers)),
        versions={"se-compress": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0"},
        tail=_tail(),
        domains=tuple(_domain(name, checks) for name in ("prose", "a-domain-with-a-long-name")),
        texts=(
            TextRecord("calibration", "prose", ("text/calibration.txt",), 64, "93aa64c0de5b1f07"),
            TextRecord("held-out", "prose", ("p.txt",), 8, "0f3c9d2e11ab7784", 0, 0.002, True),
        ),
        tasks=(TaskReport("cloze", "acc", 200, 0.61, 0.595, 6, 9, 0.304),),
    )


def _tail() -> Tail:
    worst = Departure(3, 17, 2.25, "It is a truth", " universally", " acknowledged", " of", 0.4,
                      "\n", 0.6)  # fmt: skip
    return Tail(0.0113, 0.0921, 0.4312, 2.25, 0.931, (worst,))


def _domain(name: str, checks: tuple[Check, ...]) -> DomainReport:
    on_text = tuple(check for check in checks if GATES[check.name].on_text)
    return DomainReport(name, on_text, 44.37, 44.9157, 4096, _tail())


def failed_validation() -> ValidationReport:
    """The super expert was lost: sinks and massive activation are gone."""
    report = example_validation()
    lost = {
        "perplexity_increase": Check("perplexity_increase", 14.8035, 0.10, False),
        "kl_divergence": Check("kl_divergence", 2.7316, 0.20, False),
        "massive_activation_ratio": Check("massive_activation_ratio", 0.0065, 0.90, False),
    }
    return replace(
        report,
        passed=False,
        checks=tuple(lost.get(check.name, check) for check in report.checks),
        perplexity_result=701.2,
    )


def unproven_validation() -> ValidationReport:
    """Nothing could be run."""
    report = example_validation()
    checks = tuple(
        replace(check, value=None, passed=None, detail="no held-out text")
        for check in report.checks
    )
    not_run = tuple(check.name for check in checks)
    return replace(report, checks=checks, not_run=not_run, tail=None, domains=(), tasks=())


def _identities(layers: int, experts: int) -> list[ExpertId]:
    names: list[ExpertIndex] = [*range(experts), "shared"]
    return [ExpertId(layer, name) for layer in range(layers) for name in names]


def _expert_stats(identity: ExpertId, dice: random.Random) -> ExpertStats:
    shared = identity.expert == "shared"
    peak = dice.lognormvariate(2.2 if shared else 1.4, 0.8) * (1 + identity.layer / 12)
    peak = {SUPER: 33_412.5, CANCELLER: 13_702.0}.get(identity, peak)
    tokens = 32_768 if shared else 41 if identity in RARE else dice.randint(3_000, 24_000)
    mass = tokens / 32_768 / (1 if shared else 8)
    scale = 0.02 * dice.lognormvariate(0.0, 0.5)
    return ExpertStats(
        layer=identity.layer,
        expert=identity.expert,
        peak=peak,
        weighted_peak=peak * 0.16,
        channel=CHANNEL if peak > 1000 else dice.randrange(576),
        position=0 if peak > 1000 else dice.randrange(512),
        token_id=1 if peak > 1000 else dice.randrange(49_152),
        tokens=tokens,
        gate_mass=mass,
        mean_output_norm=peak / 9,
        saliency=peak / 60,
        loss_gate_up={bits: scale * 4.0 ** (4 - bits) for bits in (2, 3, 4, 8)},
        loss_down={bits: scale * 1.5 * 4.0 ** (4 - bits) for bits in (2, 3, 4, 8)},
    )


def _stream_peak(layer: int, last: int) -> float:
    """Small, a first rise in layers 1 and 2, the massive one from 11 on, gone at the end."""
    if layer >= last - 1:
        return 10_231.0 if layer == last - 1 else 48.0
    if layer >= SUPER.layer:
        return PEAK * (1 + 0.002 * math.sin(layer))
    return {0: 39.0, 1: 290.0, 2: 872.0}.get(layer, 780.0 * 0.79 ** (layer - 2))


def _sink(layer: int, head: int) -> float:
    base = 0.04 if layer < 3 else 0.35 if layer < SUPER.layer + 1 else 0.62
    return max(0.0, min(0.98, base + 0.28 * math.sin(2.3 * head + 0.9 * layer)))


def _layer_stats(layer: int, count: int, heads: int, dice: random.Random) -> LayerStats:
    last = count - 1
    peak = _stream_peak(layer, last)
    before = _stream_peak(layer - 1, last) if layer else 1.5
    sinks = tuple(_sink(layer, head) for head in range(heads))
    return LayerStats(
        layer=layer,
        moe=True,
        peak=peak,
        position=0,
        channel=CHANNEL,
        token_id=1,
        median=1.2 + 0.05 * layer + 0.1 * dice.random(),
        rise=max(0.0, peak - before),
        fall=max(0.0, before - peak),
        massive=peak > 2000,
        forming=layer in (1, 2, SUPER.layer),
        cancelling=layer >= last - 1,
        mlp_peak=None,
        sink_mass=sinks,
        sink_rate=sum(sink > 0.3 for sink in sinks) / heads,
    )


def _decision(identity: ExpertId) -> ExpertDecision:
    if identity == SUPER:
        return ExpertDecision(*_pair(identity), "keep", 16, "super expert")
    if identity.expert == "shared":
        return ExpertDecision(*_pair(identity), "keep", 16, "policy.other_bits")
    return ExpertDecision(*_pair(identity), "quantize", 4, "uniform width")


def _pair(identity: ExpertId) -> tuple[int, ExpertIndex]:
    return identity.layer, identity.expert


def _comparison(layer: int, count: int, heads: int, dice: random.Random) -> LayerComparison:
    peak = _stream_peak(layer, count - 1)
    source = tuple(_sink(layer, head) for head in range(heads))
    result = tuple(max(0.0, value - 0.012 * dice.random()) for value in source)
    return LayerComparison(
        layer=layer,
        peak_source=peak,
        peak_result=peak * (1 - 0.013 * dice.random()),
        sink_mass_source=sum(source) / heads,
        sink_mass_result=sum(result) / heads,
        sink_heads_source=source,
        sink_heads_result=result,
        hidden_error=0.004 + 0.0021 * layer + 0.002 * dice.random(),
        router_agreement=0.985 - 0.003 * layer + 0.01 * dice.random(),
        massive=_massive(peak, dice),
        massive_result=peak > 2000,
        sink_cosine=1 - 0.001 * dice.random(),
        sink_error=0.01 + 0.02 * dice.random(),
        sink_rate_source=sum(value > 0.3 for value in source) / heads,
        sink_rate_result=sum(value > 0.3 for value in result) / heads,
    )


def _massive(peak: float, dice: random.Random) -> tuple[MassiveElement, ...]:
    kept = 1 - 0.013 * dice.random()
    found = MassiveElement(0, CHANNEL, 1.0, -peak, -peak * kept, kept)
    return (found,) if peak > 2000 else ()


def _record(layer: int, experts: int, dice: random.Random) -> LayerRecord:
    found = []
    for expert in range(experts):
        identity = ExpertId(layer, expert)
        if identity == SUPER:
            continue
        rare = identity in RARE
        found.append(
            ExpertRecord(
                layer=layer,
                expert=expert,
                bits=4,
                tokens=41 if rare else dice.randint(3_000, 24_000),
                prior_share=0.61 if rare else 0.0,
                damping=1.0 if identity == UNLUCKY else 0.2,
                error_gate_up=0.05 + 0.03 * dice.random() + 0.05 * rare,
                error_down=0.07 + 0.04 * dice.random() + 0.06 * rare,
                fallback="rtn: the Hessian stayed singular" if identity == UNLUCKY else "",
            )
        )
    return LayerRecord(layer, 1.9 + dice.random(), 0.004 + 0.0021 * layer, tuple(found))


def _continuations() -> tuple[Continuation, ...]:
    prompt = "It was a truth universally acknowledged in the neighbourhood that"
    shared = " a young man of good fortune must be in want of"
    return (
        Continuation(
            prompt,
            shared + " a wife, and that his arrival would be talked of for a week.",
            shared + " a house, and that his arrival would be talked of at dinner.",
        ),
        Continuation(
            "The climate of the country is",
            " tropical; rainy season from May to November, dry season from December to April.",
            " tropical; rainy season from May to November, dry season from December to April.",
        ),
        Continuation(
            "She turned to the window, and",
            " saw the carriage drive up the lane.\n\n\u201cThey are come,\u201d said she.",
            " saw the carriages in the lane.\n\n\u201cThey are here,\u201d said her sister.",
        ),
    )


PRUNED = {"prune": {"fraction": 0.125}}
ZEROED, RANDOM_1, RANDOM_2 = (
    {"zero": "super-experts"},
    {"zero": "random", "zero_seed": 1},
    {"zero": "random", "zero_seed": 2},
)


def example_comparison() -> Comparison:
    """Two of the same width, a smaller one, two rejected, and the paper's experiment."""
    rows = (
        ("protected-4", True, 163_104_256, 4.5183, 0.0443, 44.92, 0.987, 0.011, 1, {}),
        ("naive-4", True, 162_996_000, 4.4900, 0.0571, 45.31, 0.961, 0.013, 1, {"protect": "none"}),
        ("wide-8", True, 190_205_120, 8.5102, 0.0061, 44.41, 0.998, 0.002, 1, {"bits": [8]}),
        ("naive-2", False, 148_340_736, 2.5100, 0.6120, 77.30, 0.932, 0.083, 1, {"bits": [2]}),
        ("pruned", False, 244_894_000, 16.0, 2.7316, 701.2, 0.0065, 0.608, 0, PRUNED),
        ("without-super-expert", False, 271_430_144, 16.0, 2.6904, 698.8, 0.0065, 0.61, 0, ZEROED),
        ("without-random-1", True, 271_430_144, 16.0, 0.0052, 44.39, 0.9998, 0.0, 1, RANDOM_1),
        ("without-random-2", True, 271_430_144, 16.0, 0.0061, 44.52, 1.0, 0.001, 1, RANDOM_2),
    )
    variants = tuple(_variant(*row) for row in rows)
    return compare(example_recipe(), example_profile(), 8192, variants)


def _variant(
    name: str,
    passed: bool,
    size_bytes: int,
    bits: float,
    divergence: float,
    perplexity: float,
    massive: float,
    decay: float,
    kept: int,
    policy: dict[str, object],
) -> ComparedVariant:
    report = example_validation()
    values = {
        "perplexity_increase": perplexity / 44.37 - 1,
        "kl_divergence": divergence,
        "massive_activation_ratio": massive,
        "sink_decay": decay,
    }
    checks = []
    for check in report.checks:
        value = values.get(check.name, check.value)
        limit = check.limit or 0.0
        good = None if value is None else value <= limit or check.limit in (0.7, 0.9, 1.0)
        if check.name == "massive_activation_ratio":
            good = massive >= limit
        ends = (None, None) if check.low is None else (0.9 * divergence, 1.1 * divergence)
        checks.append(
            replace(check, value=value, passed=good, detail="", low=ends[0], high=ends[1])
        )
    checkpoint = CheckpointSummary(
        name=name,
        directory=name if passed else f"{name}.rejected",
        published=passed,
        target="transformers" if bits == 16 else "gptqmodel",
        method="none" if bits == 16 else "gptq",
        size_bytes=size_bytes,
        source_size_bytes=271_430_144,
        bits_per_weight=bits,
        perplexity_source=44.37,
        perplexity_result=perplexity,
        super_experts=1,
        kept=kept,
        protected=1,
        checks=tuple(checks),
    )
    zeroed = {"without-super-expert": (SUPER,), "without-random-1": (CONTROL,)}
    zeroed["without-random-2"] = (ExpertId(11, 5),)
    faded = max(massive, 0.0065)
    return ComparedVariant(
        checkpoint=checkpoint,
        changes={f"policy.{key}": json.dumps(value) for key, value in policy.items()},
        removed=(SUPER, UNLUCKY) if name == "pruned" else (),
        zeroed=zeroed.get(name, ()),
        layers=tuple(
            replace(
                layer,
                peak_result=layer.peak_source * faded if layer.layer >= 11 else layer.peak_result,
                sink_mass_result=layer.sink_mass_source * (1 - decay),
                hidden_error=layer.hidden_error * (1 + 10 * divergence),
            )
            for layer in report.layers
        ),
        tail=report.tail,
        domains=tuple(_domain(name, tuple(checks)) for name in ("prose", "facts")),
        texts=(
            replace(report.texts[1], domain="prose"),
            replace(report.texts[1], domain="facts", calibrated=False),
        ),
        cautions=("caution: experts were pruned, so look at every domain",)
        if name == "pruned"
        else (),
    )
