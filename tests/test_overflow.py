"""A model whose own activations overflow is refused, with the layer and the tensor, by whatever
meets it first; what overflows in the result is the result's."""

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, edit_weights, random_tokens, recipe
from torch import Tensor

from se_compress.artifacts import LayerRecord, ModelSource, OtherDecision, RunOptions
from se_compress.compression.early_warning import overflow_warning
from se_compress.compression.execute import compress
from se_compress.errors import SourceError
from se_compress.model.measures import overflows
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.profiling.profiler import profile_experts
from se_compress.recipe import Recipe
from se_compress.validation.validator import validate

TOKENS = random_tokens(3, 16)
LAYER, EXPERT = "model.layers.1.", "model.layers.1.mlp.experts.2."
Change = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def times(name: str, factor: float, more: str = "", other: float = 1.0) -> Change:
    """Tensors whose names begin with `name`, and with `more`, multiplied."""

    def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = {n: t * factor for n, t in tensors.items() if n.startswith(name)}
        return changed | {n: t * other for n, t in tensors.items() if more and n.startswith(more)}

    return change


# What is changed -> where it shows, and the tensor to which the message leads.
AFTER: Mapping[str, tuple[Change, str, str]] = {
    "a norm": (
        times(f"{LAYER}post_attention_layernorm", 1e25),
        "activations after layer 1",
        f"{LAYER}post_attention_layernorm.weight",
    ),
    "a norm of the first layer": (
        times("model.layers.0.post_attention_layernorm", 1e30),
        "activations after layer 0",
        "model.layers.0.post_attention_layernorm.weight",
    ),
    "an expert": (
        times(f"{EXPERT}down_proj", 1e38),
        "activations after layer 1",
        f"{EXPERT}down_proj.weight",
    ),
    "a size whose square is too much": (
        times(f"{EXPERT}down_proj", 1e24),
        "activations after layer 1",
        f"{EXPERT}down_proj.weight",
    ),
    "attention": (
        times(f"{LAYER}self_attn.o_proj", 1e30),
        "activations after layer 1",
        f"{LAYER}self_attn.o_proj.weight",
    ),
    "the embeddings": (
        times("model.embed_tokens", 1e30),
        "activations before layer 0",
        "model.embed_tokens.weight",
    ),
}
LOGITS: Mapping[str, tuple[Change, str, str]] = {
    "the head": (
        times("lm_head", 1e30, "model.norm", 1e20),
        "logits",
        "lm_head.weight",
    ),
}
# Only what calibrates sees these: the layer's output is as it was.
WITHIN: Mapping[str, tuple[Change, str, str]] = {
    "what experts are given": (
        times(f"{LAYER}post_attention_layernorm", 1e22, f"{LAYER}mlp.", 1e-22),
        "activations within layer 1",
        f"{LAYER}post_attention_layernorm.weight",
    ),
    "what a down_proj is given": (
        times(f"{EXPERT}up_proj", 1e25, f"{EXPERT}down_proj", 1e-25),
        "activations within expert (1, 2)",
        f"{EXPERT}up_proj.weight",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("small") / "model", "olmoe", num_hidden_layers=2)


@pytest.fixture
def changed(model: Path, tmp_path: Path) -> Callable[[Change], ModelSource]:
    def change(by: Change) -> ModelSource:
        shutil.copytree(model, tmp_path / "model")
        changes = by(load_file(model / "model.safetensors"))
        assert changes
        edit_weights(tmp_path / "model", changes)
        return open_source(str(tmp_path / "model"))

    return change


def settings_of(source: ModelSource, method: str = "gptq", **sections: object) -> Recipe:
    return recipe(
        source.path,
        target="gptqmodel",
        policy={"bits": [4], "protect": "none"},
        quantization={"method": method, "group_size": 32},
        validation={"data": "unused.txt", "generation": {"tokens": 0}},
        **sections,
    )


def assert_told(error: SourceError, where: str, tensor: str, dtype: str = "float32") -> None:
    how = (
        r"(are NaN or infinite for \d+ of \d+ tokens"
        r"|reach \S+, whose square is beyond float32)"
    )
    pattern = (
        rf".*model: the model's own {re.escape(where)} {how} \(computed in {dtype}\); "
        rf"the largest weight there is \S+, in {re.escape(tensor)}"
    )
    assert re.fullmatch(pattern, str(error))


@pytest.mark.parametrize("kind", [*AFTER, *LOGITS, *WITHIN])
def test_the_profile_names_where_the_source_overflows(
    kind: str, changed: Callable[[Change], ModelSource]
) -> None:
    change, where, tensor = {**AFTER, **LOGITS, **WITHIN}[kind]
    source = changed(change)
    with pytest.raises(SourceError) as caught:
        profile_experts(source, TOKENS, settings_of(source), RunOptions())
    assert_told(caught.value, where, tensor)


@pytest.mark.parametrize("kind", [*AFTER, *LOGITS])
def test_validation_names_it_as_well(kind: str, changed: Callable[[Change], ModelSource]) -> None:
    change, where, tensor = {**AFTER, **LOGITS}[kind]
    source = changed(change)
    with pytest.raises(SourceError) as caught:
        validate(source, None, source.path, TOKENS, settings_of(source), reload=False)
    assert_told(caught.value, where, tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.eh_proj.weight",
        "model.layers.3.mlp.experts.0.up_proj.weight",
        "model.layers.3.mlp.gate.weight",
    ],
)
def test_layers_that_are_only_copied_are_looked_at_too(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str, value: float
) -> None:
    path = Path(shutil.copytree(tiny_model("deepseek_v3-next-token"), tmp_path / "model"))
    weight = load_file(path / "model.safetensors")[name].clone()
    weight[0, 0] = value
    edit_weights(path, {name: weight})
    source = open_source(str(path))
    told = rf"{re.escape(name)}: 1 of \d+ values are NaN or infinite"
    with pytest.raises(SourceError, match=told):
        compressed(source, tmp_path / "out", settings_of(source, "rtn"))


def compressed(
    source: ModelSource, directory: Path, settings: Recipe, *others: str
) -> tuple[LayerRecord, ...]:
    plan = make_plan(source, None, settings)
    plan = replace(plan, others=tuple(OtherDecision(name, 4, "a test") for name in others))
    return compress(source, plan, TOKENS, settings, directory).layers


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("kind", ["a norm of the first layer", "attention"])
def test_compression_without_a_profile_names_it_as_well(
    kind: str, method: str, changed: Callable[[Change], ModelSource], tmp_path: Path
) -> None:
    change, where, tensor = AFTER[kind]
    source = changed(change)
    with pytest.raises(SourceError) as caught:
        compressed(source, tmp_path / "out", settings_of(source, method))
    assert_told(caught.value, where, tensor)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_linear_whose_inputs_overflow_is_named(
    method: str, changed: Callable[[Change], ModelSource], tmp_path: Path
) -> None:
    source = changed(times(f"{LAYER}self_attn.v_proj", 1e22, f"{LAYER}self_attn.o_proj", 1e-22))
    linear = f"{LAYER}self_attn.o_proj.weight"
    with pytest.raises(SourceError) as caught:
        compressed(source, tmp_path / "out", settings_of(source, method), linear)
    assert str(caught.value).startswith(
        f"{linear}: its inputs on the calibration text are so large"
    )


def test_bfloat16_has_the_range_of_float32(changed: Callable[[Change], ModelSource]) -> None:
    change, where, tensor = AFTER["a norm"]
    source = changed(change)
    settings = settings_of(source, compute_dtype="bfloat16")
    with pytest.raises(SourceError) as caught:
        profile_experts(source, TOKENS, settings, RunOptions())
    assert_told(caught.value, where, tensor, "bfloat16")


def test_large_activations_that_float32_holds_are_no_fault(
    changed: Callable[[Change], ModelSource],
) -> None:
    source = changed(times(f"{EXPERT}down_proj", 1e12))
    profile = profile_experts(source, TOKENS, settings_of(source), RunOptions())
    assert max(layer.peak for layer in profile.layers) > 1e11


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25])
def test_hidden_states_of_the_result_that_overflow_fail_a_gate(value: float) -> None:
    states = [torch.ones(2, 3, 4), torch.ones(1, 3, 4)]
    limits = recipe("m").validation
    assert overflow_warning(3, states, limits) is None
    states[1][0, 2, 1] = value
    check = overflow_warning(3, states, limits)
    assert check
    assert (check.name, check.passed) == ("kl_divergence", False)
    assert "after layer 3" in check.detail


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        ([0.0, 1e18], False),
        ([1e-30, -65504.0], False),
        ([1.5e19, 1.5e19], True),
        ([2e19, 0.0], True),
        ([math.nan, 0.0], True),
        ([-math.inf, 0.0], True),
    ],
)
def test_the_size_of_a_vector_has_to_be_a_float32(vector: list[float], expected: bool) -> None:
    assert overflows(torch.tensor([[0.0, 0.0], vector])) is expected
    assert overflows(torch.tensor([vector]).bfloat16()) is expected
