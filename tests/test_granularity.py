"""What a coarse target costs in bytes, told before there is a profile: as plans made both ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan, price_of_granularity, task_of

TinyModel = Callable[[str], Path]
ONE = [{"layer": 1, "expert": 2}]


def told(path: Path, target: str | list[str], form: str = "auto", **policy: Any) -> str:
    recipe = tiny.recipe(
        path,
        target=target,
        policy={"lift_layers": True, **policy},
        quantization={"method": "rtn", "group_size": 32, "format": form},
    )
    source = open_source(str(path))
    return price_of_granularity(task_of(source, None, recipe), make_plan(source, None, recipe))


def size(path: Path, target: str, form: str, **policy: Any) -> int:
    quantization = {"method": "rtn", "group_size": 32, "format": form}
    recipe = tiny.recipe(path, target=target, policy=policy, quantization=quantization)
    return make_plan(open_source(str(path)), None, recipe).size_bytes


@pytest.mark.parametrize(("protect", "which"), [("super-experts", "super"), (ONE, "protected")])
def test_a_lifted_layer_is_told_in_bytes(
    tiny_model: TinyModel, protect: object, which: str
) -> None:
    path = tiny_model("qwen3_moe")
    text = told(path, "vllm", bits=4, protected_bits=8, protect=protect)
    plain = size(path, "vllm", "compressed-tensors", bits=4, protect="none")
    lifted = size(path, "vllm", "compressed-tensors", bits=4, protect=ONE, protected_bits=8,
                  lift_layers=True)  # fmt: skip
    more = lifted - plain
    source = open_source(str(path))
    weights = sum(
        info.shape[0] * info.shape[1]
        for roles in source.experts.values()
        for info in roles.values()
    )
    assert text == (
        f"one width per layer: a layer with a {which} expert is lifted from 4 to 8 bits as a "
        f"whole, {more / 1e6:.2f} MB or {8 * more / weights:.3f} bits per expert weight for each "
        f"such layer, where the expert alone would take {more // 8:,} bytes; what that costs in "
        "quality is known after the first profile"
    )


def test_steps_of_a_mixture_are_told_in_bytes(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3_moe")
    text = told(path, ["gptqmodel", "vllm"], bits=[2, 3, 4], bits_per_weight=4.5, protect="none")
    by_width = [size(path, "vllm", "gptq", bits=b, protect="none") for b in (3, 4)]
    layer = (by_width[1] - by_width[0]) // 3
    assert text.startswith(
        f"one width per layer: a mixture changes in steps of {layer:,} bytes at least, with a "
        f"width for each projection group of {layer // (8 * 3)} bytes; "
    )


@pytest.mark.parametrize(
    ("target", "policy"),
    [
        ("gptqmodel", {"bits": 4, "protected_bits": 8}),  # as fine as can be
        ("vllm", {"bits": 4, "protect": "none"}),  # one width, nothing lifted
        ("vllm", {"bits": 8, "protected_bits": 8}),
        ("transformers", {"bits": 4, "protected_bits": 8}),
    ],
)
def test_nothing_is_told_where_nothing_hangs_on_it(
    tiny_model: TinyModel, target: str, policy: dict[str, object]
) -> None:
    assert told(tiny_model("qwen3_moe"), target, **policy) == ""
