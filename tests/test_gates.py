"""A gate is one row: whatever has to know of it finds it there."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from field_docs import field_docs

from se_compress.artifacts import GATES, Check, unlimited
from se_compress.errors import RecipeError
from se_compress.recipe import Validation, parse_recipe

ROOT = Path(__file__).parents[1]
# A throw-away gate, put into the table before anything has read it.
ADDED = """
import sys
from dataclasses import replace
sys.path[:0] = ["benchmarks", "tools", "tests"]
from se_compress.artifacts import GATES, Check
GATES["warmth"] = replace(
    GATES["sink_decay"], name="warmth", definition="mean warmth of a token",
    title="Warmth kept", short="warm", side="at least", limit=0.25, harmless=0.0,
)
import gates, json_schemas
from field_docs import field_docs
from se_compress.errors import RecipeError
from se_compress.recipe import Validation, parse_recipe
from se_compress.reporting.page import describe_check
from se_compress.validation.checks import judged
from se_compress.validation.verdict import alone

recipe = {"model": "m", "output": "o", "calibration": {"data": "a"}, "validation": {"data": "b"}}
limits = parse_recipe(recipe, "r").validation
assert limits.limit("warmth") == 0.25
assert field_docs(Validation, ["warmth"])["warmth"].endswith("mean warmth of a token")
try:
    parse_recipe({**recipe, "validation": {"data": "b", "warmth": 2.0}}, "r")
except RecipeError as error:
    assert str(error) == "r: validation.warmth is 2.0: input should be less than or equal to 1"
else:
    raise AssertionError("a limit beyond all values was taken")
assert judged(limits, "warmth", 0.3).passed and not judged(limits, "warmth", 0.2).passed
assert "warmth" in [check.name for check in alone(Check("reload", None, 0.1, False), "not run")]
shown = describe_check(Check("warmth", 0.5, 0.0, True))
assert (shown.title, shown.value_text, shown.word) == ("Warmth kept", "50\\u00a0%", "No limit")
assert "warmth" in json_schemas.text_of(json_schemas.ValidationReport)
assert "| warm |" in gates.table({}, limits)
"""


def test_an_added_row_is_known_everywhere() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADDED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_keys_of_a_recipe_are_the_rows_in_their_order() -> None:
    keys = [name for name in Validation.model_fields if name in GATES and GATES[name].in_recipe]
    assert keys == [gate.name for gate in GATES.values() if gate.in_recipe]
    for name in keys:
        default = None if GATES[name].optional else GATES[name].limit
        assert Validation.model_fields[name].default == default
        assert GATES[name].definition in field_docs(Validation, [name])[name]


def test_a_limit_that_no_recipe_sets_is_the_row_s() -> None:
    limits = Validation(data="unused.txt")
    assert limits.limit("tensors_accounted") == 1.0
    assert limits.limit("text_alike") == 1.0
    assert limits.limit("reload") == 0.1
    assert Validation(data="unused.txt", loops=0.75).limit("loops") == 0.75
    with pytest.raises(KeyError):
        limits.limit("loop")


@pytest.mark.parametrize("name", [gate.name for gate in GATES.values() if gate.in_recipe])
def test_a_recipe_takes_limits_of_the_row_s_range_only(name: str) -> None:
    low, high = (0.0, 1.0) if GATES[name].fraction else (1e-9, math.inf)
    for limit in (low, high):
        assert parsed(name, limit).limit(name) == limit
    for limit in (-1e-9, *([1.0 + 1e-9] if GATES[name].fraction else [0.0])):
        with pytest.raises(RecipeError, match=f"validation.{name} is "):
            parsed(name, limit)


def parsed(name: str, limit: float) -> Validation:
    held_out = {"data": "b", "tasks": {"names": "t"}, name: limit}
    text = {"calibration": {"data": "a"}, "validation": held_out}
    return parse_recipe({"model": "m", "output": "o", **text}, "r").validation


@pytest.mark.parametrize("name", GATES)
def test_nothing_misses_a_harmless_limit(name: str) -> None:
    gate = GATES[name]
    assert unlimited(gate.judge(gate.harmless, gate.harmless))
    assert not unlimited(gate.judge(gate.limit, gate.limit)), "the default decides something"


@pytest.mark.parametrize("name", GATES)
def test_the_good_side_of_a_limit(name: str) -> None:
    gate = GATES[name]
    good, bad = (0.1, 0.9) if gate.side == "at most" else (0.9, 0.1)
    assert gate.meets(good, 0.5)
    assert gate.meets(0.5, 0.5)
    assert not gate.meets(bad, 0.5)
    assert not gate.meets(math.nan, 0.5)
    assert gate.is_stricter(good, bad)
    assert not gate.is_stricter(0.5, 0.5)


@pytest.mark.parametrize("name", GATES)
def test_an_interval_around_the_limit_tells_nothing(name: str) -> None:
    gate = GATES[name]
    for interval, told in (((0.4, 0.6), True), ((0.6, 0.7), False), ((0.1, 0.2), False)):
        check = gate.judge(0.5, 0.5, "why", interval)
        assert ("too small to tell" in check.detail) is told
        assert (check.low, check.high) == interval
    assert gate.judge(0.5, 0.5, "why") == Check(name, 0.5, 0.5, True, "why")
