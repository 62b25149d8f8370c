"""What each target engine loads, each fact with its source, and the words that recipes have for it.

A new target is a word in `Target`, a row in ENGINES, and a row in TARGETS for each format that it
loads. A new format is a word in `Format`, unless a method of its own brings it, and a row for
each engine that loads it; the rest of it is a file of formats/ and a view in
engines/engine_view.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Target = Literal["transformers", "gptqmodel", "vllm", "sglang"]
Method = Literal["gptq", "rtn", "bitsandbytes", "none"]
Format = Literal["auto", "gptq", "gptq_v2", "auto-round", "compressed-tensors"]
Loader = Literal["transformers", "gptqmodel"]
Granularity = Literal["projection", "expert", "layer", "model"]


@dataclass(frozen=True)
class Engine:
    """What loads the files of a target, whatever their format.

    loader          what loads them here, to see whether they can be (reload.py)
    stands_in       the loader is not the engine itself, which is not run here
    in_bfloat16     how a user asks it for bfloat16
    biased          config keys of attention biases that it takes for true, whatever they say: where
                    they are false the result gets biases of zero, and the key is true
    asks_for        keys of config.json without which it fails, or computes something else: written
                    where they are missing and the family implies a value (families.py)
    fuses           it looks the experts of a layer up once, and fuses linears beside each other:
                    settings are read by the names of what comes of it (engine_view.py)
    """

    loader: Loader
    stands_in: bool
    in_bfloat16: str
    biased: tuple[str, ...] = ()
    asks_for: tuple[str, ...] = ()
    fuses: bool = False


@dataclass(frozen=True)
class TargetRules:
    """What one engine loads of one format.

    methods          quantisation methods whose codes the format holds
    widths           bits that experts may have, beside SOURCE_BITS
    granularity      what may have a width of its own: a projection; an expert; a layer, all experts
                     and projections alike; or nothing, all experts of the model alike
    group_sizes      columns that may share a scale; -1 is a whole row
    asymmetric       it loads groups with a zero point of their own
    row_multiple     a matrix needs this many rows (or a multiple) to be packed
    column_multiple  and this many columns
    unfused_names    tensors go by their names in the live model with its experts unfused
    source           where the facts are from
    dense_mlp        it loads packed matrices of dense MLPs
    fused            plain linears that it loads as one: those of a layer need one width
    falls_back       where it computes in float16, whatever config.json says; "" for nowhere
    """

    target: str
    format: str
    methods: tuple[str, ...]
    widths: tuple[int, ...]
    granularity: Granularity
    group_sizes: tuple[int, ...]
    asymmetric: bool
    row_multiple: int
    column_multiple: int
    unfused_names: bool
    source: str
    dense_mlp: bool = True
    fused: tuple[frozenset[str], ...] = ()
    falls_back: str = ""


_GPTQMODEL = TargetRules(
    target="gptqmodel",
    format="gptq",
    methods=("gptq", "rtn"),
    widths=(2, 3, 4, 8),
    granularity="projection",
    group_sizes=(-1, 32, 64, 128, 256),
    asymmetric=False,
    row_multiple=32,
    column_multiple=32,
    unfused_names=True,
    source="GPTQModel 7.6: `dynamic` is looked up per module, so per expert and projection; its"
    " qlinears pack whole int32 words along both axes; a Mixtral file with w1, w3, w2 is refused,"
    " and so is GPTQ v1 with sym false unless it claims to be GPTQModel's own; 4 bits in groups of"
    " 16 load, and fail in its CPU kernel. Scales may be negative: its kernels multiply. It"
    " knows no dense MLP in Qwen models and leaves a packed one uninitialised, without an error",
    dense_mlp=False,
    falls_back="GPTQModel 7.6 takes float16 on Apple's and Intel's GPUs",
)
_AUTO_ROUND = replace(
    _GPTQMODEL,
    target="transformers",
    format="auto-round",
    asymmetric=True,
    dense_mlp=True,
    source="auto-round 0.15.1 under transformers 5.17: `extra_config` is looked up per module"
    " (inference/convert_model.py); packing auto_round holds 2, 3, 4 and 8 bits in whole words of"
    " 32 rows and columns, zeros as they are (inference/backend.py, auto_round:torch); experts are"
    " unfused to gate_proj, up_proj, down_proj. It writes negative scales itself",
    falls_back="auto-round 0.15 takes float16 where a kernel has no bfloat16",
)
_VLLM = TargetRules(
    target="vllm",
    format="compressed-tensors",
    methods=("gptq", "rtn"),
    widths=(4, 8),
    granularity="layer",
    group_sizes=(32, 64, 128),
    asymmetric=False,
    row_multiple=32,
    column_multiple=32,
    unfused_names=False,
    source="vLLM 0.32: the scheme of expert 0 is that of its layer, and its three projections must"
    " agree (compressed_tensors_moe.py); Marlin and Triton hold 4 and 8 bits"
    " (oracle/int_wna16.py), Marlin in groups of 32, 64, 128 (marlin_utils.py); scales per row need"
    " Marlin, zero points 4 bits, so neither is offered; Mixtral is read as w1, w3, w2 of"
    " block_sparse_moe. Scales multiply codes less 8 or 128: they may be negative. What"
    " packed_modules_mapping of a model lists is one linear, under the scheme of its first part"
    " (compressed_tensors/utils.py)",
    fused=(
        frozenset(("q_proj", "k_proj", "v_proj")),
        frozenset(("gate_proj", "up_proj")),
        frozenset(("q_a_proj", "kv_a_proj_with_mqa")),
    ),
)
_AS_IT_IS = TargetRules(
    target="transformers",
    format="source",
    methods=("none",),
    widths=(),
    granularity="expert",
    group_sizes=(),
    asymmetric=False,
    row_multiple=1,
    column_multiple=1,
    unfused_names=False,
    source="transformers 5.17: unquantised experts load through AutoModelForCausalLM; a GPTQ file"
    " of experts would be re-initialised at random without an error",
)

# Without the first, vLLM 0.32 ends in a KeyError of e_score_correction_bias if the model has one;
# without the second it takes softmax for sigmoid (models/deepseek_v2.py). SGLang 0.5.23 reads both
# as attributes of the config (models/deepseek_v2.py).
_ROUTER_KEYS = ("topk_method", "scoring_func")
ENGINES: Mapping[str, Engine] = {
    "gptqmodel": Engine("gptqmodel", False, "GPTQModel.load(..., dtype=torch.bfloat16)"),
    "transformers": Engine("transformers", False, "from_pretrained(..., dtype=torch.bfloat16)"),
    # vLLM 0.32 gives every Qwen2-MoE biases of q, k and v (models/qwen2_moe.py) and leaves them
    # uninitialised if the checkpoint has none: every logit is NaN, without an error.
    "vllm": Engine(
        "transformers",
        stands_in=True,
        in_bfloat16="vllm serve --dtype bfloat16",
        biased=("qkv_bias",),
        asks_for=_ROUTER_KEYS,
        fuses=True,
    ),
    "sglang": Engine(
        "transformers",
        stands_in=True,
        in_bfloat16="--dtype bfloat16",
        asks_for=_ROUTER_KEYS,
        fuses=True,
    ),
}
# For a target, method and symmetry the first row that holds them is taken.
TARGETS: tuple[TargetRules, ...] = (
    _GPTQMODEL,
    replace(
        _GPTQMODEL,
        format="gptq_v2",
        asymmetric=True,
        source="GPTQModel 7.6: like gptq, zeros stored as they are (FORMAT.GPTQ_V2), sym false too",
    ),
    _AUTO_ROUND,
    replace(
        _VLLM,
        target="transformers",
        widths=(2, 3, 4, 8),
        granularity="model",
        fused=(),
        group_sizes=(-1, 32, 64, 128, 256),
        source="transformers 5.17 unpacks all experts by one scheme, without zero points"
        " (integrations/compressed_tensors.py): another width is read wrong, without an error",
    ),
    TargetRules(
        target="transformers",
        format="bitsandbytes",
        methods=("bitsandbytes",),
        widths=(4, 8),
        granularity="projection",
        group_sizes=(-1, 32, 64, 128, 256, 512, 1024),
        asymmetric=False,
        row_multiple=1,
        column_multiple=1,
        unfused_names=False,
        source="our own quantizer for transformers, loading.py; bitsandbytes 0.50.2 takes these"
        " block sizes (functional.py), and its CPU kernel reads blocks that run on into the next"
        " row with the wrong maxima; -1 is int8, which has one maximum per row",
    ),
    _AS_IT_IS,
    _VLLM,
    replace(_AS_IT_IS, target="vllm", source="vLLM 0.32 reads what transformers writes"),
    replace(
        _VLLM,
        target="sglang",
        source="SGLang: schemes are looked up per layer (get_moe_scheme, pull request 29761 of June"
        " 2026), 4 and 8 bits, symmetric only (compressed_tensors_wNa16_moe.py). Read, not run",
    ),
    replace(_AS_IT_IS, target="sglang", source="SGLang reads what transformers writes. Not run"),
)
