"""What a model's activations ask of the dtype that it is served in. No torch.

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

from se_compress.artifacts import CompressionPlan, ExpertProfile, ModelSource
from se_compress.artifacts.targets import ENGINES, targets_of
from se_compress.engines.targets import rules_of

FLOAT16_LARGEST = 65504.0
HEADROOM = 2.0


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
