"""The arithmetic of benchmarks/project.py: sizes, counts, owners, and what is named the limit."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import project
import reckoning
import units
from reckoning import DEEPSEEK, PLACES, QWEN3, STAGES, Place, Sizes

UNITS = units.Units(
    machine="a machine",
    device="cpu",
    threads=1,
    rates={"float32": 50e9},
    shares={
        "hessian float32": 0.6,
        "factorisation": 0.25,
        "update": 0.5,
        "forward float32": 0.8,
    },
    decoded=1e8,
    rounded=1e7,
    packed=1e8,
    read=5e8,
    copied=1e10,
)


def weights(sizes: Sizes) -> float:
    dense = sizes.dense_layers * (sizes.attention + sizes.dense)
    return sizes.moe_layers * sizes.layer + dense + 2 * sizes.vocabulary * sizes.hidden


@pytest.mark.parametrize(("sizes", "billions"), [(QWEN3, 235), (DEEPSEEK, 671)])
def test_sizes_are_those_that_models_are_named_for(sizes: Sizes, billions: int) -> None:
    assert weights(sizes) == pytest.approx(billions * 1e9, rel=0.01)


def test_the_longest_goes_first_to_the_least_busy() -> None:
    assert reckoning.longest_first([5.0, 4.0, 3.0, 3.0, 3.0], 2) == 10.0  # 5 + 3, 4 + 3 + 3
    assert reckoning.longest_first([1.0] * 8, 4) == 2.0
    for ranks in range(1, 6):
        costs = [float(n) for n in range(1, 12)]
        assert reckoning.longest_first(costs, ranks) >= sum(costs) / ranks
        assert reckoning.longest_first(costs, ranks) <= sum(costs) / ranks + max(costs)


def test_tokens_of_experts_are_all_of_them() -> None:
    seen = reckoning.tokens_of_experts(QWEN3, 1000)
    assert sum(seen) == pytest.approx(8000)
    assert max(seen) > 1.5 * min(seen)
    assert seen == reckoning.tokens_of_experts(QWEN3, 1000)


def test_the_count_of_the_solver_is_that_of_the_roofline() -> None:
    rows, columns = 2 * QWEN3.inner, QWEN3.hidden
    one = (5 + 4 * reckoning.ROUNDS) * columns**2 * rows
    other = (5 + 4 * reckoning.ROUNDS) * QWEN3.inner**2 * QWEN3.hidden
    assert reckoning.solver_flops(QWEN3) == one + other


def test_more_ranks_are_never_slower_and_only_they_send() -> None:
    for sizes in (QWEN3, DEEPSEEK):
        totals = [reckoning.project(sizes, place, UNITS) for place in PLACES]
        for fewer, more in itertools.pairwise(totals):
            assert more.seconds < fewer.seconds
            assert more.memory < fewer.memory
        assert [sum(c.traffic for c in t.stages.values()) > 0 for t in totals] == [0, 1, 1]
        read = [sum(c.read for c in t.stages.values()) for t in totals]
        assert read[0] == read[1] == read[2] > len(STAGES) * weights(sizes)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"disk": 1e6}, "disk"),
        ({"bus": 1e6}, "bus"),
        ({"cores": 1e-3}, "decoding"),
        ({"rates": {"float32": 1e9}}, "arithmetic"),
        ({"bandwidth": 1e6}, "rounding"),
    ],
)
def test_what_is_slowest_is_named(changes: dict[str, object], limit: str) -> None:
    place: Place = replace(PLACES[0], **changes)  # type: ignore[arg-type]
    assert reckoning.project(DEEPSEEK, place, UNITS).bottleneck.startswith(f"{limit} (")


def test_traffic_is_named_where_nodes_are_far_apart() -> None:
    place = replace(PLACES[2], net=1e6)
    total = reckoning.project(DEEPSEEK, place, UNITS)
    assert total.bottleneck.startswith("traffic (")
    assert reckoning.slowest_link(PLACES[0]) == float("inf")
    assert reckoning.slowest_link(PLACES[1]) == PLACES[1].link
    assert PLACES[2].net < reckoning.slowest_link(PLACES[2]) < PLACES[2].link


def test_the_table_says_that_it_is_a_projection_and_what_is_assumed() -> None:
    text = project.section(UNITS)
    assert "a projection, nothing of it was run" in text
    assert "67 TFLOP/s float32" in text
    rows = [line for line in text.splitlines() if line.startswith(("| Qwen3-235B", "| DeepSeek"))]
    assert len(rows) == 6  # the units have no bfloat16
    measured = replace(UNITS, device="cuda", machine="NVIDIA H100")
    assert "data sheet" not in project.section(measured)
    assert project.places_for(measured)[0].rates == UNITS.rates


def test_units_are_kept_and_asked_for(tmp_path: Path) -> None:
    units.save(UNITS, tmp_path / "units.json")
    assert units.load(tmp_path / "units.json") == UNITS
    with pytest.raises(SystemExit, match=r"roofline\.py measures it"):
        units.load(tmp_path / "none.json")
