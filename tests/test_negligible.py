"""Experts that are next to nothing, as merged models have them, do not fail a sound result; what is
broken fails as before. Experts of several dtypes are merged."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, edit_weights, random_tokens, recipe
from torch import Tensor

from se_compress.artifacts import ModelSource, ValidationReport
from se_compress.compression.execute import compress
from se_compress.compression.stacks import BELOW_GRID
from se_compress.model.checkpoint import TORCH_DTYPES
from se_compress.model.splice import open_shrunk
from se_compress.model.surgery import shrink
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.validation.validator import validate

TOKENS, HELD_OUT = random_tokens(6, 20), random_tokens(3, 16, seed=3)
SCHEMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gptq": ("gptqmodel", {"method": "gptq", "group_size": 32}),
    "rtn": ("gptqmodel", {"method": "rtn", "group_size": 32}),
    "compressed-tensors": ("vllm", {"method": "gptq", "group_size": 32}),
    "auto-round": ("transformers", {"method": "rtn", "group_size": 32, "format": "auto-round"}),
    "nf4": ("transformers", {"method": "bitsandbytes", "block_size": 32}),
}
# Name -> the beginnings of the names of what is next to nothing.
WHICH: Mapping[str, tuple[str, ...]] = {
    "an expert": ("model.layers.1.mlp.experts.2.",),
    "a matrix": ("model.layers.1.mlp.experts.2.down_proj",),
    "most of a layer": tuple(f"model.layers.1.mlp.experts.{e}." for e in range(6)),
    "a layer": ("model.layers.1.mlp.experts.",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("small") / "model", "olmoe", num_hidden_layers=2)


def changed(model: Path, to: Path, change: Callable[[str, Tensor], Tensor]) -> ModelSource:
    shutil.copytree(model, to)
    weights = load_file(model / "model.safetensors")
    edit_weights(to, {name: change(name, weight) for name, weight in weights.items()})
    return open_source(str(to))


def judged(
    source: ModelSource,
    directory: Path,
    scheme: str,
    damage: Callable[[Path], None] = lambda directory: None,
    **policy: Any,
) -> ValidationReport:
    target, quantization = SCHEMES.get(scheme, ("transformers", {"method": "none"}))
    settings = recipe(
        source.path,
        target=target,
        policy={"bits": [4], "protect": "none", **policy},
        quantization=quantization,
        validation={"data": "unused.txt", "generation": {"tokens": 0}},
    )
    plan = make_plan(source, None, settings)
    compress(source, plan, TOKENS, settings, directory)
    found = read_headers(directory)
    assert plan.size_bytes == sum(info.size_bytes for info in found.values())
    damage(directory)
    return validate(source, plan, directory, HELD_OUT, settings, reload=False)


@pytest.mark.parametrize(
    ("scheme", "which", "factor"),
    [
        *(("rtn", which, factor) for which in WHICH for factor in (0.0, 1e-8, 1e-6, 1e-4, 1e-3)),
        *((scheme, "an expert", 1e-6) for scheme in SCHEMES),
        *((scheme, "a layer", 1e-3) for scheme in SCHEMES),
    ],
)
def test_what_is_next_to_nothing_may_be_rounded_away(
    scheme: str, which: str, factor: float, model: Path, tmp_path: Path
) -> None:
    source = changed(
        model,
        tmp_path / "model",
        lambda name, weight: weight * factor if name.startswith(WHICH[which]) else weight,
    )
    report = judged(source, tmp_path / "out", scheme)
    small = sum(name.startswith(WHICH[which]) for name in source.tensors)
    cosine = report.check("weight_cosine")
    assert cosine.passed
    assert (cosine.value or 0.0) > 0.9
    assert report.check("weight_gain").passed
    assert report.check("tensors_accounted").passed
    told = f"{small} of less than 1% of the usual size are left out"
    assert (told in cosine.detail) is (factor > 0)
    lost = [r for layer in report.records for r in layer.experts if r.fallback == BELOW_GRID]
    assert bool(lost) is (0 < factor <= 1e-6 and scheme != "nf4")


def exchange(directory: Path, first: str, second: str) -> None:
    file = next(directory.glob("*.safetensors"))
    weights = load_file(file)
    parts = [name.removeprefix(first) for name in weights if name.startswith(first)]
    swap = {first + part: weights[second + part] for part in parts}
    swap |= {second + part: weights[first + part] for part in parts}
    edit_weights(directory, {name: weight.clone() for name, weight in swap.items()})


@pytest.mark.parametrize("scheme", ["gptq", "compressed-tensors", "nf4"])
@pytest.mark.parametrize("expert", [2, 3])
def test_an_expert_that_is_nothing_in_the_place_of_another_fails(
    expert: int, scheme: str, model: Path, tmp_path: Path
) -> None:
    stem = "model.layers.1.mlp.experts."
    source = changed(
        model,
        tmp_path / "model",
        lambda name, weight: weight * (1e-6 if name.startswith(f"{stem}2.") else 1.0),
    )
    report = judged(
        source,
        tmp_path / "out",
        scheme,
        lambda directory: exchange(directory, f"{stem}{expert}.", f"{stem}5."),
    )
    assert report.check("weight_cosine").passed is False
    assert f"{stem}" in report.check("weight_cosine").detail
    assert report.check("tensors_accounted").passed is False


def test_something_that_came_out_of_zeros_fails(model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    source = changed(
        model, tmp_path / "model", lambda n, weight: weight * 0 if n == name else weight
    )
    shutil.copytree(model, tmp_path / "out")
    report = validate(
        source,
        None,
        tmp_path / "out",
        HELD_OUT,
        recipe(source.path, validation={"data": "unused.txt", "generation": {"tokens": 0}}),
        reload=False,
    )
    check = report.check("weight_cosine")
    assert (check.value, check.passed, check.detail) == (0.0, False, f"least in {name}")


# --------------------------------------------------------------------------------- several dtypes


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("scheme", ["none", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_members_of_several_dtypes_become_one_expert(
    fraction: float, scheme: str, model: Path, tmp_path: Path
) -> None:
    def mixed(name: str, weight: Tensor) -> Tensor:
        if ".experts." not in name:
            return weight
        expert, last = int(name.split(".")[5]), "down" in name
        return weight.to(DTYPES[(expert + last) % 3])

    source = changed(model, tmp_path / "model", mixed)
    report = judged(source, tmp_path / "out", scheme, merge={"fraction": fraction})
    assert report.check("tensors_accounted").passed
    assert report.check("tensors_accounted").detail == ""
    found = read_headers(tmp_path / "out")
    assert report.size_bytes == sum(info.size_bytes for info in found.values())
    if scheme == "none":  # the first members of equal shares: experts 0 and on
        stem = "model.layers.1.mlp.experts.0."
        assert found[f"{stem}up_proj.weight"].dtype == "BF16"
        assert found[f"{stem}down_proj.weight"].dtype == "F16"


def test_the_dtype_of_a_merged_expert_is_that_of_the_largest_share(
    model: Path, tmp_path: Path
) -> None:
    source = changed(
        model,
        tmp_path / "model",
        lambda name, weight: weight.half() if ".experts.1." in name else weight,
    )
    settings = recipe(
        source.path,
        policy={"protect": "none", "merge": {"fraction": 0.125}},
        quantization={"method": "none"},
    )
    plan = make_plan(source, None, settings)
    for shares, dtype in (((0.5, 0.5), "BF16"), ((0.4, 0.6), "F16"), ((0.6, 0.4), "BF16")):
        by_member = dict(zip((0, 1), shares, strict=True))
        experts = tuple(
            replace(d, share=by_member[d.expert]) if d.action == "merge" else d
            for d in plan.experts
        )
        small = shrink(source, replace(plan, experts=experts))
        info = small.source.tensors["model.layers.1.mlp.experts.0.up_proj.weight"]
        assert info.dtype == dtype
        made = open_shrunk(small)(info.name)
        assert made.dtype == TORCH_DTYPES[dtype]
        assert info.size_bytes == made.numel() * made.element_size()
