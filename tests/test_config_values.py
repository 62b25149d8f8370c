"""Values of a config are taken for what they are, or refused in one line; what is taken,
transformers takes too."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from se_compress.errors import SourceError
from se_compress.model.checkpoint import open_tensors
from se_compress.model.streaming import StreamedModel
from se_compress.opening.config_values import (
    ACTIVATIONS,
    KINDS,
    ROPE_TYPES,
    flag,
    integer,
    number,
    real,
)
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]


@pytest.fixture
def model_of(tiny_model: TinyModel, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny model that a test may break."""
    return lambda name: shutil.copytree(tiny_model(name), tmp_path / "model")


def set_config(path: Path, **changes: object) -> None:
    """As `edit_config`, but None is written as null; `...` removes a key."""
    file = path / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refusal(path: Path, match: str) -> None:
    with pytest.raises(SourceError, match=match) as caught:
        open_source(str(path))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("take", "taken", "refused"),
    [
        (integer, {8: 8, 9.0: 9, "8": 8, " 8 ": 8, "8.0": 8, "-3": -3, "+3": 3},
         [True, "8.5", 8.5, "", "eight", "0x8", "1_0", float("inf"), float("nan"), 10**30, "9" * 99,
          1e300, None, [8], {}]),
        (real, {1: 1.0, 1.5: 1.5, "1e-6": 1e-6, ".5": 0.5, "1.": 1.0},
         [True, "nan", "inf", "1_0", "", "one", float("inf"), float("nan"), 10**400, None, [1.0]]),
        (number, {1: 1, "32": 32, 1.5: 1.5, "1.5": 1.5}, [True, "inf", None]),
        (flag, {True: True, False: False, "true": True, "False": False},
         [2, "yes", None, [], 0.5]),
    ],
)  # fmt: skip
def test_what_a_value_is(
    take: Callable[[object], object], taken: Mapping[object, object], refused: list[object]
) -> None:
    for value, expected in taken.items():
        found = take(value)
        assert found == expected
        assert type(found) is type(expected)
    assert [value for value in refused if take(value) is not None] == []


def neighbours(value: object) -> list[object]:
    """What people and converters write in place of a value, and what they do not."""
    other: list[object] = [
        None,
        str(value),
        "",
        "x",
        [value],
        {"a": value},
        True,
        -1,
        0,
        1.5,
        10**30,
    ]
    if isinstance(value, (int, float)):
        other += [float(value), int(value), value + 1, f"{float(value)}"]
    if isinstance(value, list):
        other += [[], [None], ["x"], [1.0], ["1"], [True]]
    if isinstance(value, dict):
        other += [{}, {**value, "rope_type": None}, {**value, "rope_type": "unknown"}]
        other += [{**value, key: part} for key in value for part in ("4", None, "x", -1, [], True)]
    return other


def one_line(error: SourceError, path: Path) -> bool:
    assert str(error).isprintable()
    assert len(str(error)) < 400 + len(str(path))
    return True


def is_taken(path: Path, run: set[str]) -> bool:
    """Whether the model opens. If so, transformers has to run a layer of every kind of it; configs
    that did are in `run`."""
    try:
        source = open_source(str(path))
    except SourceError as error:
        return not one_line(error, path)
    config = json.dumps(source.config, sort_keys=True)
    if config in run:
        return True
    run.add(config)
    model = StreamedModel(source, open_tensors(source.tensors))
    hidden = model.embed([torch.arange(2, 14)[None]])
    for layer in sorted({0, source.moe_layers[0]}):
        hidden = model.run_layer(layer, model.load_layer(layer), hidden)
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*CONFIGS, "deepseek_v3-yarn", "deepseek_v2-grouped"])
def test_no_value_ends_in_a_traceback(model_of: Callable[[str], Path], name: str) -> None:
    path = model_of(name)
    config = json.loads((path / "config.json").read_text())
    verdicts, run = {True: 0, False: 0}, set[str]()
    for key, value in config.items():
        for other in neighbours(value):
            set_config(path, **{key: other})
            verdicts[is_taken(path, run)] += 1
        set_config(path, **{key: ...})
        verdicts[is_taken(path, run)] += 1
        set_config(path, **{key: value})
    assert is_taken(path, run)
    assert min(verdicts.values()) > 100, verdicts


def test_the_activations_are_those_of_transformers() -> None:
    assert set(ACTIVATIONS) == set(ACT2CLS) - {"prelu", "xielu"}  # these two have weights


def test_the_rope_types_are_those_of_transformers() -> None:
    assert set(ROPE_TYPES) == {"default", *ROPE_INIT_FUNCTIONS} - {"proportional"}  # partial
    assert {"hidden_size", "num_experts", "rms_norm_eps"} <= set(KINDS)


# ------------------------------------------------------------------ values that do not fit others

GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
LLAMA = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
         "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; accepted is 1 to 8"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5; accepted is 1 to 4"),
        ("olmoe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0; accepted is an integer"),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 16}, "these are one number"),
        ("qwen2_moe", {"num_experts": 8, "n_routed_experts": 4}, "these are one number"),
        ("mixtral", {"num_local_experts": 4, "n_routed_experts": 5}, "these are one number"),
        ("deepseek_v2", {"num_local_experts": 7}, "these are one number"),
        ("deepseek_v3", {"num_mtp_layers": 1}, "these are one number"),
        ("deepseek_v3", {"n_group": 8}, "n_group is 8; accepted is a divisor .* 2 or more"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3; accepted is a divisor"),
        ("deepseek_v3", {"n_group": 0}, "n_group is 0; accepted is a divisor"),
        ("deepseek_v3", {"n_group": None}, "n_group is None; accepted is a divisor"),
        ("deepseek_v3", {"n_group": ...}, "n_group is missing, which means 8; accepted is"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group is 5; accepted is 1 to 4, as n_group says"),
        ("deepseek_v3", {"topk_group": 0}, "topk_group is 0; accepted is 1 to 4"),
        ("deepseek_v3", {"topk_group": None}, "topk_group is None; accepted is 1 to 4"),
        ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok is 3; accepted is 1 to 2"),
        ("deepseek_v2", {**GROUPED, "n_group": 5}, "n_group is 5; accepted is a divisor"),
        ("deepseek_v2", {**GROUPED, "topk_group": 1}, "num_experts_per_tok is 3; accepted is 1 to"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; accepted is"),
        ("deepseek_v2", {"topk_method": "best"}, "topk_method is 'best'; accepted is one of"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True; accepted is false"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads is 2; accepted is num_"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "head_dim is 8; accepted is 7"),
        ("deepseek_v3", {"head_dim": 24}, "head_dim is 24; accepted is 8, by"),
        ("qwen2_moe", {"num_attention_heads": 5}, "num_key_value_heads is 2; accepted is a div"),
        ("olmoe", {"num_attention_heads": 3, "num_key_value_heads": 3}, "a divisor of hidden_size"),
        ("olmoe", {"head_dim": 32}, "head_dim is 32; accepted is 16"),
        ("qwen3_moe", {"head_dim": 15}, "head_dim is 15; accepted is an even number"),
        ("qwen3_moe", {"hidden_act": "silly"}, "hidden_act is 'silly'; accepted is one of gelu"),
        ("mixtral", {"hidden_act": "prelu"}, "hidden_act is 'prelu'"),
        ("mixtral", {"sliding_window": 0}, "sliding_window is 0; accepted is an integer from 1"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types is"),
        ("qwen2_moe", {"layer_types": ["linear_attention"] * 3}, "layer_types is"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; accepted is an"),
        ("qwen2_moe", {"mlp_only_layers": "0"}, "mlp_only_layers is '0'; accepted is a list"),
        ("olmoe", {"pad_token_id": 288}, "pad_token_id is 288; accepted is a token below"),
        ("olmoe", {"torch_dtype": "float8"}, "torch_dtype is 'float8'; accepted is bfloat16"),
        ("olmoe", {"rope_parameters": {"rope_type": "ropey"}}, "rope_type is 'ropey'; accepted"),
        ("olmoe", {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.type is 'su'"),
        ("olmoe", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        ("olmoe", {"rope_scaling": {**YARN, "factor": "four"}}, "rope_scaling.factor is 'four'"),
        ("olmoe", {"rope_scaling": {**YARN, "factor": 0}}, "rope_scaling.factor is 0; accepted is"),
        ("olmoe", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; accepted is a mapping"),
        ("olmoe", {"rope_scaling": {"full_attention": YARN}}, "rope_scaling.full_attention is a"),
        ("olmoe", {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "accepted is 1"),
        ("olmoe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; accepted is 1"),
        ("olmoe", {"rope_scaling": LONG}, "short_factor has 3 numbers; 8 are needed"),
        ("deepseek_v3", {"rope_scaling": LONG}, "factor of the longrope is missing"),
        ("mixtral", {"rope_scaling": {**LLAMA, "low_freq_factor": 9}}, "low_freq_factor is not"),
        ("mixtral", {"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor is miss"),
        ("olmoe", {"rope_theta": -1}, "rope_theta is -1; accepted is a number above 1"),
        ("olmoe", {"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; accepted is a number from 0"),
        ("mixtral", {"is_causal": "yes"}, "is_causal is 'yes'; accepted is true or false"),
        ("qwen3_moe", {"auto_map": ["modeling.py"]}, r"auto_map is .*; accepted is a mapping"),
        ("olmoe", {"hidden_size": "x" * 10**6}, r"hidden_size is 'x+\.\.\.'; accepted is"),
        ("olmoe", {"hidden_size": [0] * 10**5}, "hidden_size is a list of 100000 entries"),
        ("olmoe", {"hidden_size": 10**1000}, "hidden_size is an integer of 3322 bits"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(
    model_of: Callable[[str], Path], name: str, changes: Mapping[str, object], match: str
) -> None:
    path = model_of(name)
    set_config(path, **changes)
    refusal(path, rf"config\.json: .*{match}")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "qwen3_moe",
            {"num_experts_per_tok": "2", "num_hidden_layers": 3.0},
            {"num_hidden_layers": 3},
        ),
        ("qwen3_moe", {"hidden_size": "64", "rms_norm_eps": 1}, {"rms_norm_eps": 1.0}),
        ("qwen3_moe", {"num_local_experts": ..., "n_routed_experts": 8}, {"num_experts": 8}),
        ("mixtral", {"num_local_experts": ..., "n_routed_experts": 4}, {"num_local_experts": 4}),
        ("deepseek_v2", {"n_routed_experts": ..., "num_experts": "8"}, {"num_experts": 8}),
        ("olmoe", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ("olmoe", {"head_dim": None, "clip_qkv": 8}, {"clip_qkv": 8.0}),
        ("olmoe", {"torch_dtype": "torch.bfloat16"}, {"torch_dtype": "bfloat16"}),
        ("olmoe", {"rope_scaling": None, "rope_theta": "10000"}, {"rope_theta": 10000}),
        ("olmoe", {"tie_word_embeddings": "false"}, {"tie_word_embeddings": False}),
        ("mixtral", {"auto_map": None, "is_causal": 1}, {"is_causal": True}),
        ("qwen2_moe", {"is_causal": None, "is_decoder": "false"}, {"is_decoder": False}),
        ("deepseek_v3", {"norm_topk_prob": None}, {"norm_topk_prob": False}),
        ("deepseek_v2", {"n_group": 3, "topk_group": 0}, {"topk_method": "greedy"}),
    ],
)
def test_values_taken_for_what_they_are(
    model_of: Callable[[str], Path],
    name: str,
    changes: Mapping[str, object],
    expected: Mapping[str, object],
) -> None:
    path = model_of(name)
    set_config(path, **changes)
    assert is_taken(path, set())
    config = open_source(str(path)).config
    for key, value in expected.items():
        assert config[key] == value
        assert type(config[key]) is type(value)


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        # as Qwen/Qwen3-Coder-30B-A3B-Instruct is published
        ("qwen3_moe", {"shared_expert_intermediate_size": 0, "qkv_bias": False}),
        ("qwen3_moe", {"first_k_dense_replace": 1, "kv_lora_rank": "none", "clip_qkv": "x"}),
        ("qwen2_moe", {"n_shared_experts": 0, "topk_method": "top", "n_group": -1}),
        ("olmoe", {"moe_intermediate_size": 0, "decoder_sparse_step": 0, "mlp_only_layers": [0]}),
        ("mixtral", {"moe_intermediate_size": -1, "decoder_sparse_step": 2, "mlp_bias": True}),
        ("deepseek_v2", {"shared_expert_intermediate_size": 0, "mlp_only_layers": 0}),
        ("deepseek_v3", {"decoder_sparse_step": 2, "topk_method": "my_own", "mlp_bias": True}),
    ],
)
def test_keys_of_other_families_mean_nothing(
    model_of: Callable[[str], Path], name: str, foreign: Mapping[str, object]
) -> None:
    path = model_of(name)
    plain = open_source(str(path))
    set_config(path, **foreign)
    assert is_taken(path, set())
    source = open_source(str(path))
    assert source.moe_layers == plain.moe_layers
    assert source.tensors == plain.tensors
    assert {key: source.config[key] for key in foreign} == foreign


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            '{"model_type": "olmoe", "model_type": "mixtral"}',
            "the key model_type stands in it twice",
        ),
        ("[" * 10**5, "nested without end"),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", "nested without end"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        (" " * (2**23 + 1), "is larger than 8 MB"),
    ],
)
def test_a_config_that_is_none(model_of: Callable[[str], Path], text: str, match: str) -> None:
    path = model_of("olmoe")
    (path / "config.json").write_text(text)
    refusal(path, rf"config\.json: .*{match}")


def test_a_config_that_transformers_cannot_build(model_of: Callable[[str], Path]) -> None:
    """A key that is none of ours, but a method of the config class."""
    path = model_of("olmoe")
    set_config(path, num_labels=3, id2label={"x": "y"})
    source = open_source(str(path))
    with pytest.raises(SourceError, match=r"config\.json: transformers builds no model from it"):
        StreamedModel(source, open_tensors(source.tensors))
