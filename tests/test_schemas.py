"""The JSON Schemas: the committed ones are the generated ones, and real files keep to them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import json_schemas as schemas
import pytest
from artefacts_example import (
    example_comparison,
    example_plan,
    example_profile,
    example_validation,
    failed_validation,
    mixed_plan,
    quiet_profile,
    unproven_validation,
)
from jsonschema import Draft202012Validator, ValidationError

from se_compress.artifacts import (
    Check,
    Compressed,
    RunResult,
    ValidationReport,
    from_json,
    to_json,
    to_json_line,
)

NAMES = (
    "comparison", "compression", "plan", "profile", "run-result", "stability", "validation",
)  # fmt: skip


def schema(name: str) -> dict[str, Any]:
    text = (schemas.DIRECTORY / f"{name}.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def check(name: str, text: str) -> None:
    Draft202012Validator(schema(name)).validate(json.loads(text))


def test_the_committed_schemas_are_those_of_the_dataclasses() -> None:
    assert sorted(p.name for p in schemas.DIRECTORY.iterdir()) == [
        f"{name}.schema.json" for name in NAMES
    ]
    for name, root in schemas.ROOTS.items():
        written = (schemas.DIRECTORY / f"{name}.schema.json").read_text(encoding="utf-8")
        assert written == schemas.text_of(root), "run: python tools/json_schemas.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_one(name: str) -> None:
    Draft202012Validator.check_schema(schema(name))
    assert "description" in schema(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_property_is_described(name: str) -> None:
    found = schema(name)
    for kind in (found, *found.get("$defs", {}).values()):
        for field, told in kind.get("properties", {}).items():
            assert len(told["description"].split()) > 1, f"{kind.get('title')}.{field}"


def test_artefacts_keep_to_their_schema() -> None:
    for profile in (example_profile(), quiet_profile()):
        check("profile", to_json(profile))
    for plan in (example_plan(), mixed_plan()):
        check("plan", to_json(plan))
    for validation in (example_validation(), failed_validation(), unproven_validation()):
        check("validation", to_json(validation))
    check("comparison", to_json(example_comparison()))
    check("compression", to_json(Compressed(example_validation().records)))
    checkpoints = tuple(variant.checkpoint for variant in example_comparison().variants)
    for result in (
        RunResult("published", 0, comparison="out/comparison.json", checkpoints=checkpoints),
        RunResult("failed", 2, "r.yaml: there is no such recipe"),
    ):
        check("run-result", to_json_line(result))


def test_what_is_no_number_is_json_all_the_same() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    made = example_validation()
    broken = (
        Check("kl_divergence", math.nan, 0.2, False),
        Check("perplexity_increase", math.inf, 0.1, False),
        Check("sink_decay", -math.inf, 0.1, True),
    )
    text = to_json(replace(made, checks=(*broken, *made.checks[3:]), perplexity_result=math.inf))
    plain = json.loads(text, parse_constant=refuse)
    assert [check["value"] for check in plain["checks"][:3]] == ["NaN", "Infinity", "-Infinity"]
    check("validation", text)
    again = from_json(ValidationReport, text, "validation.json")
    assert math.isnan(again.checks[0].value or 0.0)
    assert [c.value for c in again.checks[1:3]] == [math.inf, -math.inf]
    assert again.perplexity_result == math.inf
    assert to_json(again) == text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: plan.pop("experts"), "'experts' is a required property"),
        (lambda plan: plan.update(extra=1), "Additional properties are not allowed"),
        (lambda plan: plan.update(size_bytes="big"), "'big' is not of type 'integer'"),
        (lambda plan: plan["experts"][0].update(action="burn"), "'burn' is not one of"),
    ],
)
def test_a_file_that_says_something_else_is_refused(edit: Any, message: str) -> None:
    plan = json.loads(to_json(example_plan()))
    edit(plan)
    with pytest.raises(ValidationError, match=message):
        check("plan", json.dumps(plan))


def test_the_schemas_come_with_the_package() -> None:
    import se_compress

    assert schemas.DIRECTORY.parent == Path(se_compress.__file__).parent
