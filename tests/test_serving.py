"""An activation that float16 does not hold is told, with a way to serve the model all the same."""

import importlib
from dataclasses import replace

import artefacts_example as example
import click
import pytest
import tiny

from se_compress.artifacts import ExpertProfile, ModelSource
from se_compress.artifacts.targets import ENGINES
from se_compress.engines.serving import Serving, float16_notes, serving_of
from se_compress.opening.source import open_source
from se_compress.planning.policy import cautions_of, make_plan


def with_peak(size: float, at: str = "layer") -> ExpertProfile:
    """A profile in which nothing is larger than `size`: after layer 2, of expert (1, 2), or of the
    dense MLP of layer 0."""
    profile = example.example_profile()
    layers = [replace(s, peak=1.0, mlp_peak=None) for s in profile.layers]
    experts = [replace(e, peak=1.0) for e in profile.experts]
    if at == "layer":
        layers[-1] = replace(layers[-1], peak=size)
    elif at == "expert":
        experts[-1] = replace(experts[-1], peak=size)
    else:
        layers[0] = replace(layers[0], mlp_peak=size)
    return replace(profile, layers=tuple(layers), experts=tuple(experts))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_source(str(tiny.build(tmp_path_factory.mktemp("m") / "model", "olmoe")))


def notes(source: ModelSource, profile: ExpertProfile | None, target: str, **config: object) -> str:
    quantization = {"group_size": 32}
    settings = tiny.recipe(
        "m", target=target, policy={"bits": 4, "protect": "none"}, quantization=quantization
    )
    plan = make_plan(source, None, settings)
    kept = {k: v for k, v in source.config.items() if k not in ("dtype", "torch_dtype")}
    source = replace(source, config={**kept, **config})
    return "; ".join(float16_notes(source, plan, profile))


@pytest.mark.parametrize("at", ["layer", "expert", "dense"])
@pytest.mark.parametrize("target", ["gptqmodel", "transformers", "vllm", "sglang"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_beyond_float16_the_dtype_of_the_config_is_warned_of(
    source: ModelSource, key: str, target: str, at: str
) -> None:
    profile = with_peak(1.25e6, at)
    where = {
        "layer": f"after layer {profile.layers[-1].layer}",
        "expert": f"the output of expert {profile.experts[-1].id}",
        "dense": f"the dense MLP of layer {profile.layers[0].layer}",
    }
    said = notes(source, profile, target, **{key: "float16"})
    assert said.startswith(f"activations reach 1,250,000 ({where[at]}), and float16 ends at 65,504")
    assert "they are infinite; serve in bfloat16: " in said
    assert "bfloat16" in said.rpartition(": ")[2]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (30_000.0, ""),
        (32_752.0, ""),
        (33_000.0, "other text may take them beyond"),
        (65_504.0, "other text may take them beyond"),
        (65_600.0, "they are infinite"),
        (1e9, "they are infinite"),
    ],
)
def test_what_comes_near_the_end_is_told_as_well(
    source: ModelSource, size: float, said: str
) -> None:
    found = notes(source, with_peak(size), "vllm", dtype="float16")
    assert said in found
    assert bool(found) is bool(said)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_another_dtype_is_told_to_stay(source: ModelSource, dtype: str | None) -> None:
    profile = with_peak(1e5)
    said = notes(source, profile, "vllm", dtype=dtype)
    assert said.endswith("float16 ends at 65,504: serve in bfloat16 or float32")
    said = notes(source, profile, "gptqmodel", dtype=dtype)
    assert said.endswith("; GPTQModel 7.6 takes float16 on Apple's and Intel's GPUs")
    assert notes(source, with_peak(60_000.0), "gptqmodel", dtype=dtype) == ""


def test_without_a_profile_nothing_is_known(source: ModelSource) -> None:
    assert notes(source, None, "vllm", dtype="float16") == ""


def test_a_plan_from_a_file_gets_the_warning_once(source: ModelSource) -> None:
    plan = make_plan(source, None, tiny.recipe("m", quantization={"method": "none"}))
    told = plan.noting(cautions_of(plan, source, with_peak(1e6)))
    assert told.notes[:-1] == plan.notes
    assert "65,504" in told.notes[-1]
    assert told.noting(cautions_of(told, source, with_peak(1e6))) == told


# ------------------------------------------------------------------------------------- commands


def served(source: ModelSource, target: object, **sections: object) -> dict[str, Serving]:
    settings: dict[str, object] = {
        "policy": {"bits": 4, "protect": "none"},
        "quantization": {"method": "rtn", "group_size": 32},
        **sections,
    }
    plan = make_plan(source, None, tiny.recipe("m", target=target, **settings))
    return {one.target: one for one in serving_of(plan, "out/x")}


def test_each_target_of_a_list_has_its_command(source: ModelSource) -> None:
    found = served(source, ["gptqmodel", "vllm", "sglang"])
    assert {target: one.command for target, one in found.items()} == {
        "gptqmodel": "",
        "vllm": "vllm serve out/x",
        "sglang": "python -m sglang.launch_server --model-path out/x --quantization humming",
    }
    assert found["vllm"].needs == ("4 bits: NVIDIA GPU (Marlin; Humming)",)
    assert found["gptqmodel"].sentence == (
        "gptqmodel (GPTQModel 7.6; run on a CPU) loads gptq, one width per projection; 4 bits: any "
        "machine"
    )
    assert "read in its code, not run" in found["sglang"].sentence


def test_several_widths_in_a_gptq_file_ask_vllm_for_humming(source: ModelSource) -> None:
    policy = {"bits": 4, "protect": [{"layer": 1, "expert": 0}], "lift_layers": True}
    found = served(source, ["gptqmodel", "vllm"], policy=policy)
    assert found["vllm"].command == "vllm serve out/x --quantization humming"
    plain = served(source, "vllm", policy=policy)
    assert plain["vllm"].command == "vllm serve out/x"


def test_a_width_says_what_it_needs(source: ModelSource) -> None:
    policy = {"bits": 3, "protect": "none", "other_bits": 8}
    found = served(source, "vllm", policy=policy)
    assert found["vllm"].needs == (
        "8 bits: NVIDIA or AMD GPU (Marlin, Triton, Humming)",
        "3 bits: NVIDIA GPU of SM75 or later (Humming)",
    )


def test_transformers_own_command_line_takes_the_command() -> None:
    """vLLM and SGLang are in no environment of ours: tools/vllm_check.py asks vLLM's parser."""
    command = importlib.import_module("transformers.cli.transformers").app
    program, name, *words = ENGINES["transformers"].serve.format(model="out/x").split()
    assert program == "transformers"
    assert isinstance(command, click.Group)
    serve = command.commands[name]
    context = serve.make_context(name, words, resilient_parsing=False)
    assert context.params["force_model"] == "out/x"
    with pytest.raises(click.ClickException):
        serve.make_context(name, [*words, "--no-such-flag"])
