"""A limit that nothing can miss decides nothing, and is not called passed anywhere."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from artefacts_example import (
    example_comparison,
    example_plan,
    example_profile,
    example_recipe,
    example_validation,
)
from pages import parse

from se_compress.artifacts import GATES, Check, ComparedVariant, ValidationReport, unlimited
from se_compress.recipe import Validation
from se_compress.reporting.comparison import closest, recommend
from se_compress.reporting.comparison_page import render_comparison
from se_compress.reporting.limits import missed
from se_compress.reporting.page import describe_check, judge
from se_compress.reporting.report import render_model_card, render_report
from se_compress.screen import Screen

HARMLESS = [
    ("perplexity_increase", math.inf), ("perplexity_increase", 1e9), ("kl_divergence", math.inf),
    ("massive_activation_ratio", 0.0), ("sink_decay", 1.0), ("sink_token_error", math.inf),
    ("router_agreement", 0.0), ("router_agreement_least", 0.0), ("repetition", 1.0),
    ("loops", 10.0), ("weight_gain", math.inf),
]  # fmt: skip


def test_no_default_limit_is_harmless() -> None:
    fields = Validation.model_fields
    # `reload` says what loads the result, and is no limit
    limits = {name: fields[name].default for name in set(GATES) & set(fields) - {"reload"}}
    assert limits
    for name, limit in limits.items():
        assert not unlimited(Check(name, 0.0, limit, True)), name


@pytest.mark.parametrize(("name", "limit"), HARMLESS)
def test_what_nothing_can_miss_is_no_limit(name: str, limit: float) -> None:
    gate = describe_check(Check(name, 0.5, limit, True))
    assert (gate.state, gate.word) == ("no-limit", "No limit")
    assert describe_check(Check(name, math.nan, limit, False)).state == "failed", "NaN fails"
    assert describe_check(Check(name, None, limit, None)).state == "not-run"


@pytest.mark.parametrize(
    ("name", "limit"),
    [("sink_decay", 0.99), ("massive_activation_ratio", 0.01), ("weight_cosine", 0.0),
     ("perplexity_increase", 100.0), ("router_agreement", 1e-3), ("reload", 0.1)],
)  # fmt: skip
def test_a_loose_limit_is_one(name: str, limit: float) -> None:
    assert describe_check(Check(name, 0.5, limit, True)).state == "passed"


def validation(*limits: tuple[str, float]) -> ValidationReport:
    given = dict(limits)
    found = example_validation()
    checks = tuple(replace(c, limit=given.get(c.name, c.limit)) for c in found.checks)
    return replace(found, checks=checks)


def test_report_card_and_terminal_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    loose = validation(("kl_divergence", math.inf), ("sink_decay", 1.0))
    arguments = (example_profile(), example_plan(), loose)
    report = parse(render_report(example_recipe(), *arguments))
    assert "No limit" in report.first(data_check="kl_divergence").text
    assert "Passed" not in report.first(data_check="sink_decay").text
    assert "Passed" in report.first(data_check="perplexity_increase").text
    card = render_model_card(example_recipe(), None, *arguments)
    line = next(line for line in card.splitlines() if line.startswith("| KL divergence"))
    assert line.endswith("| at most infinite | No limit |")
    assert "No limit, so nothing was decided: KL divergence to the source, Attention sink" in card
    Screen.of(quiet=False, json=False).show_validation(loose, Path("out"), Path("seen"))
    rows = [row for row in capsys.readouterr().out.splitlines() if "no limit" in row]
    assert [row.split()[1] for row in rows] == ["kl_divergence", "sink_decay"]


def test_no_limit_at_all_proves_nothing() -> None:
    gates = [describe_check(Check(name, 0.5, limit, True)) for name, limit in HARMLESS]
    verdict = judge(gates, example_validation())
    assert (verdict.state, verdict.word) == ("not-run", "Not proven")


# ----------------------------------------------------------------------- limits of several variants


def variant(
    name: str, size: int, kl: float, limit: float, published: bool = True
) -> ComparedVariant:
    one = example_comparison().variants[0]
    checks = tuple(
        replace(c, value=kl, limit=limit, passed=published) if c.name == "kl_divergence" else c
        for c in one.checkpoint.checks
    )
    checkpoint = replace(
        one.checkpoint, name=name, size_bytes=size, published=published, checks=checks
    )
    return replace(one, checkpoint=checkpoint)


STRICT, LOOSE = 0.2, 0.8


def advice(*variants: ComparedVariant) -> str:
    comparison = replace(
        example_comparison(),
        variants=variants,
        recommended=recommend(variants),
        closest=closest(variants),
    )
    return parse(render_comparison(comparison)).first(id="advice").text


def test_of_equals_the_one_with_stricter_limits_is_recommended() -> None:
    loose, strict = variant("loose", 100, 0.1, LOOSE), variant("strict", 100, 0.1, STRICT)
    for order in ([loose, strict], [strict, loose]):
        assert (recommend(order), closest(order)) == ("strict", "strict")
    unlimited_one = variant("unlimited", 100, 0.1, math.inf)
    assert recommend([unlimited_one, loose]) == "loose"


def test_a_smaller_one_that_only_its_own_limits_let_pass_is_not_recommended() -> None:
    found = [variant("loose", 50, 0.5, LOOSE), variant("strict", 100, 0.1, STRICT)]
    assert recommend(found) == "strict"
    text = advice(*found)
    assert "Ship strict It is the only one that passed every gate" in text
    assert "loose passed by looser limits only: a result at least as good is held" in text


def test_looser_limits_do_no_harm_to_what_meets_the_strictest() -> None:
    found = [variant("loose", 50, 0.15, LOOSE), variant("strict", 100, 0.1, STRICT)]
    assert recommend(found) == "loose"
    assert "looser" not in advice(*found)


def test_if_all_passed_by_looser_limits_it_is_said() -> None:
    found = [variant("loose", 50, 0.5, LOOSE), variant("strict", 100, 0.5, STRICT, False)]
    assert recommend(found) == "loose"
    assert "loose passed by looser limits than a result at least as good" in advice(*found)
    everything = [one.checkpoint for one in found]
    assert missed(everything[0], everything) == ["kl_divergence"]
    assert missed(everything[1], everything) == []


def test_an_equal_that_was_rejected_by_stricter_limits_counts_too() -> None:
    found = [
        variant("loose", 50, 0.5, LOOSE),
        variant("strict", 50, 0.5, STRICT, False),
        variant("good", 100, 0.1, LOOSE),
    ]
    assert recommend(found) == "good"


def test_a_worse_one_with_stricter_limits_holds_up_nobody() -> None:
    found = [variant("fine", 50, 0.1, STRICT), variant("worse", 40, 0.3, 1e-9, False),
             variant("whole", 200, 0.0, STRICT)]  # fmt: skip
    assert recommend(found) == "fine"
    assert "looser" not in advice(*found)
