"""Artefacts survive JSON unchanged, and a file that is not one is refused with the field's name."""

import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import artefacts_example as example
import pytest

from se_compress import artifacts
from se_compress.artifacts import (
    Check,
    CompressionPlan,
    ExpertId,
    ExpertProfile,
    LayerRecord,
    TensorInfo,
    ValidationReport,
    digest_of,
    from_json,
    to_json,
    write_atomically,
)
from se_compress.errors import RecipeError

ARTEFACTS: list[Callable[[], object]] = [
    example.example_profile,
    example.quiet_profile,
    example.example_plan,
    example.mixed_plan,
    example.example_validation,
    example.failed_validation,
    example.unproven_validation,
    lambda: example.example_validation().records[4],
]


# ------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("make", ARTEFACTS)
def test_reading_back_gives_an_equal_artefact(make: Callable[[], object]) -> None:
    artefact = make()
    text = to_json(artefact)
    read = from_json(type(artefact), text, "x.json")
    assert read == artefact
    assert to_json(read) == text


@pytest.mark.parametrize("make", ARTEFACTS)
def test_equal_artefacts_give_equal_text(make: Callable[[], object]) -> None:
    assert to_json(make()) == to_json(make())


def test_each_expert_has_a_line_of_its_own() -> None:
    plan = example.example_plan()
    lines = [line for line in to_json(plan).splitlines() if '"action"' in line]
    assert len(lines) == len(plan.experts)
    assert json.loads(lines[0].rstrip(",")) == {
        "layer": 0, "expert": 0, "action": "quantize", "bits": 4, "reason": "uniform width",
    }  # fmt: skip


def test_text_that_is_not_ascii_stays_readable() -> None:
    report = example.example_validation()
    assert "\u201cThey are come,\u201d" in to_json(report)


def test_the_shared_expert_and_absent_values_survive() -> None:
    profile = from_json(ExpertProfile, to_json(example.quiet_profile()), "x.json")
    assert ExpertId(0, "shared") in profile.by_id
    plan = from_json(CompressionPlan, to_json(example.mixed_plan()), "x.json")
    assert [d.bits for d in plan.experts if d.action == "prune"] == [None]


def test_keys_of_a_mapping_become_numbers_again() -> None:
    profile = from_json(ExpertProfile, to_json(example.example_profile()), "x.json")
    assert set(profile.experts[0].loss_down) == {2, 3, 4, 8}


def test_a_whole_number_is_read_as_a_float() -> None:
    check = from_json(Check, '{"name": "a", "value": 1, "limit": null, "passed": true}', "x.json")
    assert isinstance(check.value, float)
    assert check == Check("a", 1.0, None, True)


def test_only_an_artefact_is_written() -> None:
    with pytest.raises(TypeError, match="tuple is not an artefact"):
        to_json((1, 2))


# ------------------------------------------------------------------------------------ strictness


def edited(change: Callable[[dict[str, object]], object]) -> str:
    data = json.loads(to_json(example.example_plan()))
    change(data)
    return json.dumps(data)


def first_expert(data: dict[str, object]) -> dict[str, object]:
    experts = data["experts"]
    assert isinstance(experts, list)
    row = experts[0]
    assert isinstance(row, dict)
    return row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(bitz=4), "plan.json.bitz is unknown; known are target, scheme, "),
        (lambda d: d["scheme"].pop("method"), "plan.json.scheme.method is missing"),
        (lambda d: d.update(target=7), "plan.json.target is 7, but text or a list is expected"),
        (
            lambda d: d.update(size_bytes=1.5),
            "plan.json.size_bytes is 1.5, but a whole number is expected",
        ),
        (
            lambda d: d.update(size_bytes=True),
            "plan.json.size_bytes is true, but a whole number is expected",
        ),
        (
            lambda d: d.update(bits_per_weight=False),
            "plan.json.bits_per_weight is false, but a number is expected",
        ),
        (
            lambda d: d.update(bits_per_weight=None),
            "plan.json.bits_per_weight is null, but a number is expected",
        ),
        (
            lambda d: d["scheme"].update(symmetric=1),
            "plan.json.scheme.symmetric is 1, but true or false is expected",
        ),
        (lambda d: d.update(experts={}), "plan.json.experts is {}, but a list"),
        (lambda d: d.update(experts=["x"]), 'plan.json.experts[0] is "x", but an object is'),
        (
            lambda d: first_expert(d).update(action="drop"),
            'plan.json.experts[0].action is "drop", but "keep" or "quantize" or "prune" or "merge"'
            ' or "zero" or "average" is expected',
        ),
        (
            lambda d: first_expert(d).update(expert="common"),
            'plan.json.experts[0].expert is "common", but a whole number or "shared" is expected',
        ),
        (
            lambda d: first_expert(d).update(bits="4"),
            'plan.json.experts[0].bits is "4", but a whole number is expected',
        ),
        (lambda d: first_expert(d).pop("layer"), "plan.json.experts[0].layer is missing"),
        (lambda d: d.update(protected=[{"layer": 1}]), "plan.json.protected[0].expert is missing"),
    ],
)
def test_a_wrong_field_is_named(
    change: Callable[[dict[str, object]], object], message: str
) -> None:
    with pytest.raises(RecipeError, match="^" + re.escape(message)):
        from_json(CompressionPlan, edited(change), "plan.json")


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\udc00\ud800"])
def test_text_that_no_file_can_hold_is_refused_where_it_stands(text: str) -> None:
    data = json.loads(to_json(example.example_plan()))
    for path, place in (("notes[0]", ("notes", 0)), ("experts[1].reason", ("experts", 1))):
        changed = json.loads(json.dumps(data))
        key, index = place
        changed["notes"] = ["a note"]
        if key == "notes":
            changed[key][index] = text
        else:
            changed[key][index]["reason"] = text
        with pytest.raises(RecipeError, match=re.escape(f"p.json.{path} holds half of a")):
            from_json(CompressionPlan, json.dumps(changed), "p.json")


def test_a_wrong_field_of_an_optional_record_is_named() -> None:
    data = json.loads(to_json(example.example_profile()))
    data["super_experts"][0]["zeroed"]["sink_mass"] = "low"
    message = 'profile.json.super_experts[0].zeroed.sink_mass is "low", but a number is expected'
    with pytest.raises(RecipeError, match=re.escape(message)):
        from_json(ExpertProfile, json.dumps(data), "profile.json")


def test_a_width_that_is_no_number_is_named() -> None:
    data = json.loads(to_json(example.example_profile()))
    data["experts"][3]["loss_down"] = {"four": 0.5}
    message = "profile.json.experts[3].loss_down has the keys four, but numbers are expected"
    with pytest.raises(RecipeError, match=re.escape(message)):
        from_json(ExpertProfile, json.dumps(data), "profile.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "v.json: not JSON (Expecting value, line 1)"),
        ('{"passed": true,\n', "v.json: not JSON ("),
        ("[]", "v.json is [], but an object is expected"),
    ],
)
def test_text_that_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match="^" + re.escape(message)):
        from_json(ValidationReport, text, "v.json")


def test_a_field_with_a_default_may_be_left_out() -> None:
    check = from_json(Check, '{"name": "a", "value": 0.5, "limit": 1, "passed": true}', "x.json")
    assert check.detail == ""


# -------------------------------------------------------------------------------------- identity


def test_experts_sort_by_layer_then_index_then_shared() -> None:
    shuffled = [ExpertId(1, "shared"), ExpertId(1, 10), ExpertId(0, "shared"), ExpertId(1, 9)]
    assert [str(i) for i in sorted(shuffled)] == ["(0, shared)", "(1, 9)", "(1, 10)", "(1, shared)"]


def test_every_record_about_an_expert_is_keyed_by_its_identity() -> None:
    profile, plan = example.example_profile(), example.example_plan()
    assert profile.by_id[example.SUPER].peak == profile.super_experts[0].peak
    assert profile.super_experts[0].id == example.SUPER
    assert profile.outliers[0].id == example.CANCELLER
    assert plan.by_id[example.SUPER].bits == 16
    assert example.example_validation().records[4].experts[0].id == ExpertId(4, 0)


def test_artefacts_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        example.example_plan().target = "vllm"  # type: ignore[misc]


def test_a_check_is_found_by_name() -> None:
    report = example.example_validation()
    assert report.check("sink_decay").limit == 0.10
    with pytest.raises(StopIteration):
        report.check("sinks")


def test_a_tensor_is_as_large_as_its_extent() -> None:
    assert TensorInfo("a", "BF16", (2, 3), "f", 100, 112).size_bytes == 12


# ------------------------------------------------------------------------------------- files


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "plan.json"
    write_atomically(file, "first \u201c\n")
    write_atomically(file, "second\n")
    assert file.read_bytes() == b"second\n"
    assert [entry.name for entry in file.parent.iterdir()] == ["plan.json"]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    write_atomically(file, "old\n")

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.codec.os, "fsync", broken)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new\n")
    assert file.read_text() == "old\n"


def test_a_digest_is_the_same_on_every_machine_and_in_every_order() -> None:
    assert digest_of({"b": 1, "a": [2.5, "\u00e9"]}, None) == "a5fc883f47c8b65a"
    assert digest_of({"a": [2.5, "\u00e9"], "b": 1}, None) == "a5fc883f47c8b65a"
    assert digest_of({"a": [2.5, "e"], "b": 1}, None) != "a5fc883f47c8b65a"


def test_a_changed_record_changes_the_text() -> None:
    record = example.example_validation().records[0]
    assert isinstance(record, LayerRecord)
    assert to_json(replace(record, hidden_error=0.5)) != to_json(record)
