"""How a result is served: the command of each engine, and what a model's activations ask of the
dtype. No torch.

Float16 ends at 65,504. An activation beyond it is infinite in float16, and NaN one layer later; a
massive one is what the model's attention sinks hang on, and sits in every prompt. Nothing of this
shows in a float32 or bfloat16 run.

Read of the engines: GPTQModel 7.6 takes the config's dtype, float32 as bfloat16, but bfloat16 on
every CPU and float16 on every Apple and Intel GPU (utils/model.py, auto_dtype); its Marlin, Triton
and torch kernels compute in either (SUPPORTS_DTYPES). auto-round 0.15 turns the model to float16
where a kernel has no bfloat16 (inference/convert_model.py). Scales stored in float16 are no
obstacle: they multiply weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from se_compress.artifacts import CompressionPlan, ExpertProfile, ModelSource
from se_compress.artifacts.target_rules import Need, TargetRules
from se_compress.artifacts.targets import ENGINES, targets_of
from se_compress.engines.targets import rows_of, rules_of


@dataclass(frozen=True)
class Serving:
    """How one engine serves a result.

    target   the engine
    versions for which this holds
    loads    what it takes a width of, and the format of the file
    needs    what the widths in the file ask of the machine, a part each
    command  that serves it over HTTP; "" if the engine has none
    proven   what was run of such files; "" if the engine's code was read only
    """

    target: str
    versions: str
    loads: str
    needs: tuple[str, ...]
    command: str
    proven: str

    @property
    def sentence(self) -> str:
        proof = f"run {self.proven}" if self.proven else "read in its code, not run"
        parts = (
            f"{self.target} ({self.versions}; {proof}) loads {self.loads}",
            *self.needs,
            self.command,
        )
        return "; ".join(filter(None, parts))


def serving_of(plan: CompressionPlan, model: str = ".") -> tuple[Serving, ...]:
    """How each target of a plan serves its result, which lies in the directory `model`."""
    return tuple(_serving(plan, rules, model) for rules in rows_of(plan))


def _serving(plan: CompressionPlan, rules: TargetRules, model: str) -> Serving:
    used = {bits for d in plan.experts for bits in (d.bits, d.down_bits) if bits is not None}
    used |= {decision.bits for decision in plan.others}
    routed = {d.bits for d in plan.experts if d.expert != "shared" and d.bits is not None}
    needs = [need for need in rules.needs if not need.widths or used & {*need.widths}]
    flags = (need.flag for need in needs if not need.mixed or len(routed) > 1)
    command = ENGINES[rules.target].serve.format(model=model)
    return Serving(
        rules.target,
        rules.versions,
        f"{rules.format}, one width per {rules.granularity}" if rules.widths else "16 bits",
        tuple(_asked(need, used) for need in needs),
        " ".join([command, *dict.fromkeys(filter(None, flags))]) if command else "",
        rules.proven,
    )


def _asked(need: Need, used: set[int]) -> str:
    widths = ", ".join(str(bits) for bits in need.widths if bits in used)
    return f"{widths} bits: {need.hardware}" if widths else need.hardware


FLOAT16_LARGEST = 65504.0
HEADROOM = 2.0


def beyond_float16(profile: ExpertProfile) -> str:
    """A warning if the model cannot be served in float16 at all; "" if nothing was seen beyond."""
    size, where = max(_peaks(profile), default=(0.0, ""))
    if size <= FLOAT16_LARGEST:
        return ""
    return (
        f"activations reach {size:,.0f} ({where}), and float16 ends at 65,504: serve the model in "
        "bfloat16 or float32"
    )


def float16_notes(
    source: ModelSource, plan: CompressionPlan, profile: ExpertProfile | None
) -> tuple[str, ...]:
    """A warning if an activation of the source is beyond float16; where config.json asks for that
    dtype, also if one is within HEADROOM of it, as the calibration text is a sample. None without a
    profile."""
    size, where = max(_peaks(profile), default=(0.0, "")) if profile else (0.0, "")
    found = f"activations reach {size:,.0f} ({where}), and float16 ends at 65,504"
    if source.dtype == "float16" and size * HEADROOM > FLOAT16_LARGEST:
        beyond = size > FLOAT16_LARGEST
        becomes = "they are infinite" if beyond else "other text may take them beyond"
        ways = (ENGINES[target].in_bfloat16 for target in targets_of(plan.target))
        how = " or ".join(dict.fromkeys(ways))
        return (
            f"{found}: in float16, the dtype in config.json, {becomes}; serve in bfloat16: {how}",
        )
    if size > FLOAT16_LARGEST:
        falls_back = rules_of(plan).falls_back
        return (f"{found}: serve in bfloat16 or float32{'; ' if falls_back else ''}{falls_back}",)
    return ()


def _peaks(profile: ExpertProfile) -> Iterator[tuple[float, str]]:
    for layer in profile.layers:
        yield layer.peak, f"after layer {layer.layer}"
        if layer.mlp_peak is not None:
            yield layer.mlp_peak, f"the dense MLP of layer {layer.layer}"
    for expert in profile.experts:
        yield expert.peak, f"the output of expert {expert.id}"
