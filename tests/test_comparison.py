"""The comparison: who is recommended, what the page says, and that it says nothing else."""

import json
from dataclasses import replace

import pytest
from artefacts_example import SUPER, example_comparison, example_profile, example_recipe
from pages import Node, check_form, parse

from se_compress.artifacts import (
    CheckpointSummary,
    ComparedVariant,
    Comparison,
    from_json,
    to_json,
)
from se_compress.reporting.comparison import closest, compare, recommend
from se_compress.reporting.comparison_page import PUBLISHED, cautions_of, render_comparison
from se_compress.tables import what_to_ship

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def page() -> Node:
    return parse(render_comparison(example_comparison()))


def changed(variant: ComparedVariant, **changes: object) -> ComparedVariant:
    """A variant with fields of its checkpoint changed; `divergence` sets that check's value."""
    checkpoint = variant.checkpoint
    if "divergence" in changes:
        value = changes.pop("divergence")
        checks = tuple(
            replace(check, value=value) if check.name == "kl_divergence" else check  # type: ignore[arg-type]
            for check in checkpoint.checks
        )
        checkpoint = replace(checkpoint, checks=checks)
    return replace(variant, checkpoint=replace(checkpoint, **changes))  # type: ignore[arg-type]


def of(*rows: tuple[str, int, float, bool]) -> list[ComparedVariant]:
    """Variants by name, size, divergence and whether they passed."""
    one = example_comparison().variants[0]
    return [
        changed(one, name=name, size_bytes=size, divergence=divergence, published=published)
        for name, size, divergence, published in rows
    ]


def only(comparison: Comparison, *names: str) -> Comparison:
    variants = [comparison.by_name[name] for name in names]
    return compare(example_recipe(), example_profile(), comparison.tokens, variants)


# ------------------------------------------------------------------------------------- the choice


def test_the_smallest_that_passed_is_recommended() -> None:
    found = of(("big", 200, 0.01, True), ("small", 100, 0.2, True), ("tiny", 50, 0.1, False))
    assert (recommend(found), closest(found)) == ("small", "big")


def test_of_the_same_size_the_nearer_one_is_recommended() -> None:
    found = of(("naive", 1000, 0.06, True), ("protected", 1020, 0.04, True))
    assert recommend(found) == "protected"
    assert recommend(of(("naive", 1000, 0.06, True), ("protected", 1021, 0.04, True))) == "naive"


def test_nothing_is_recommended_if_nothing_passed() -> None:
    found = of(("a", 100, 0.1, False))
    assert (recommend(found), closest(found)) == (None, None)


def test_an_experiment_is_not_recommended() -> None:
    whole, part = of(("part", 100, 0.0, True), ("whole", 200, 0.1, True))
    found = [replace(whole, zeroed=(SUPER,)), part]
    assert (recommend(found), closest(found)) == ("whole", "whole")


def test_a_variant_without_a_divergence_is_the_last_choice() -> None:
    one, other = of(("unknown", 100, 0.0, True), ("known", 101, 5.0, True))
    unknown = replace(one, checkpoint=replace(one.checkpoint, checks=()))
    assert recommend([unknown, other]) == "known"


def test_required_variants_decide_whether_it_passed() -> None:
    comparison = example_comparison()
    recipe = example_recipe()
    for required, passed in (((), True), (("naive-4",), True), (("naive-4", "naive-2"), False)):
        stricter = recipe.model_copy(update={"require": required})
        assert compare(stricter, example_profile(), 1, comparison.variants).passed is passed
    assert not only(comparison, "naive-2").passed


def test_a_comparison_survives_json() -> None:
    comparison = example_comparison()
    assert from_json(Comparison, to_json(comparison), "comparison.json") == comparison


# --------------------------------------------------------------------------------------- the page


def test_the_page_is_sound(page: Node) -> None:
    check_form(page, elsewhere=("/se_compress/report.html",))


def test_the_advice_comes_first_and_gives_its_reasons(page: Node) -> None:
    advice = page.first(id="advice").text
    assert advice.startswith("✓ Ship protected-4 It is the smallest that passed every gate: 163")
    assert "No super expert was lost." in advice
    assert "naive-4 is hardly smaller, but farther from the source." in advice
    assert "wide-8 is nearest to the source" in advice
    assert "Not run for protected-4: reload." in advice
    assert "Do not ship pruned: it lost 1 super expert; perplexity increase is" in advice
    assert "without" not in advice  # an experiment is nobody's candidate


def test_nothing_to_ship_is_said_first() -> None:
    page = parse(render_comparison(only(example_comparison(), "naive-2", "pruned")))
    advice = page.first(id="advice").text
    assert advice.startswith("✕ Ship none of them Every variant missed a gate")
    assert "Do not ship naive-2" in advice
    assert "The experiment" not in page.text


def test_experiments_that_passed_are_not_said_to_have_failed() -> None:
    comparison = example_comparison()
    names = [one.name for one in comparison.variants if one.zeroed]
    zeroed = only(comparison, *names)
    passed = [name for name in names if name in zeroed.published]
    assert passed
    assert passed != names
    page = parse(render_comparison(zeroed))
    advice = page.first(id="advice").text
    assert advice.startswith(
        "✓ Nothing here is to ship What passed its gates (2 variants of 3) has"
    )
    assert "missed a gate" not in advice
    assert "Size against distance" not in page.text  # nothing could be shipped
    assert what_to_ship(zeroed) == "nothing to ship, what passed has experts set to zero"
    rejected = only(comparison, "naive-2", "pruned")
    assert what_to_ship(rejected) == "nothing to ship, no variant passed its gates"
    assert what_to_ship(comparison).startswith("ship protected-4")


def test_a_caution_that_is_for_all_is_told_once() -> None:
    comparison = example_comparison()
    alike = [replace(one, cautions=("caution: the same",)) for one in comparison.variants]
    own = replace(alike[0], cautions=("caution: the same", "caution: one more"))
    told = cautions_of(replace(comparison, variants=(own, *alike[1:])))
    assert told == [("all variants", "caution: the same"), (own.name, "caution: one more")]
    some = replace(comparison, variants=(replace(own, cautions=()), *alike[1:]))
    names = ", ".join(one.name for one in some.variants[1:])
    assert f"Caution, {names}: the same." in parse(render_comparison(some)).text


def test_a_required_variant_that_failed_is_named() -> None:
    comparison = replace(example_comparison(), passed=False, required=("naive-2",))
    advice = parse(render_comparison(comparison)).first(id="advice").text
    assert advice.startswith("✕ Ship protected-4")
    assert "The recipe requires naive-2 to pass, which did not." in advice


def test_every_gate_that_was_missed_has_a_line(page: Node) -> None:
    rejected = page.first(id="rejected")
    missed = [
        (variant.name, check.value)
        for variant in example_comparison().variants
        for check in variant.checkpoint.checks
        if check.passed is False
    ]
    rows = rejected.all("tbody")[0].all("tr")
    assert [(row.all("a")[0].text, row.data[0]) for row in rows] == missed
    clean = parse(render_comparison(only(example_comparison(), "protected-4", "naive-4")))
    assert "every variant passed all of its gates" in clean.first(id="rejected").text


def test_the_papers_experiment_stands_beside_what_was_published(page: Node) -> None:
    section = page.first(id="ablation")
    assert "That is the published pattern" in section.text
    rows = {one.name: one for one in example_comparison().variants if one.zeroed}
    for name, variant in rows.items():
        row = section.first(data_ablation=name)
        ratio = variant.checkpoint.perplexity_result / variant.checkpoint.perplexity_source
        assert ratio in row.data
    assert all(one.model in section.text for one in PUBLISHED)
    assert "arXiv:2507.23279" in section.text


def test_an_experiment_that_shows_something_else_is_not_talked_up() -> None:
    comparison = example_comparison()
    variants = tuple(
        changed(variant, perplexity_result=60.0) if variant.zeroed else variant
        for variant in comparison.variants
    )
    page = parse(render_comparison(replace(comparison, variants=variants)))
    assert "That is not the published pattern" in page.first(id="ablation").text
    half = only(comparison, "protected-4", "without-super-expert")
    section = parse(render_comparison(half)).first(id="ablation")
    assert "needs both" in section.text


def test_each_curve_is_also_a_table_with_a_column_for_each_variant(page: Node) -> None:
    comparison = example_comparison()
    figures = json.loads(page.first(id="figures").text)
    assert set(figures) == {"trade", "stream", "sinks", "decay", "hidden", "turned"}
    names = [variant.name for variant in comparison.variants]
    for key, first in (("stream", ["source"]), ("sinks", ["source"]), ("hidden", [])):
        assert [trace["name"] for trace in figures[key]["data"]] == [*first, *names]
    tables = page.first(id="layers").all("table")
    headings = [heading.text for heading in tables[0].all("thead")[0].all("th")]
    assert headings == ["Layer", "source", *names]
    assert len(tables[0].all("tbody")[0].all("tr")) == len(comparison.variants[0].layers)


def test_a_variant_that_could_not_be_run_has_a_place() -> None:
    comparison = example_comparison()
    account = replace(comparison.variants[0].checkpoint.by_name["tensors_accounted"], passed=False)
    broken: CheckpointSummary = replace(
        comparison.variants[0].checkpoint, name="broken", published=False, checks=(account,)
    )
    variant = replace(comparison.variants[0], checkpoint=broken, layers=())
    both = replace(comparison, variants=(*comparison.variants, variant))
    row = parse(render_comparison(both)).first(data_variant="broken")
    assert "Rejected" in row.text
    assert row.text.count("not run") == 4


def test_nothing_from_the_artefacts_is_markup() -> None:
    comparison = example_comparison()
    variant = replace(comparison.variants[0], changes={EVIL: EVIL})
    html = render_comparison(
        replace(comparison, model=EVIL, closest="protected-4", variants=(variant,))
    )
    assert EVIL not in html


def test_settings_are_shown_where_they_differ(page: Node) -> None:
    rows = page.first(id="settings").all("tbody")[0].all("tr")
    assert rows[1].text.startswith('naive-4 gptqmodel policy.protect: "none"')
    assert "nothing: the recipe as it stands" in rows[0].text
    assert rows[4].text.endswith("2")
