"""Held-out text of several domains, each judged by itself; and the tail of the KL divergence."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard

from se_compress.artifacts import Check, RunOptions, ValidationReport, from_json
from se_compress.errors import RecipeError
from se_compress.opening.source import open_source
from se_compress.pipeline import Request, preview, run
from se_compress.recipe import Calibration, Recipe, flatten, load_recipe
from se_compress.text.calibrate import draw_sequences
from se_compress.validation import validator
from se_compress.validation.checks import worst_of
from se_compress.validation.predictions import BEFORE

TinyModel = Callable[[str], Path]
TEXTS = {
    "prose": tiny.random_tokens(5, 24, seed=3),
    "code": tiny.random_tokens(4, 24, seed=4),
}
LIMITS: dict[str, Any] = {
    "perplexity_increase": 1e9, "kl_divergence": 1e3, "router_agreement": 0.0,
    "router_agreement_least": 0.0, "sink_decay": 1.0, "repetition": 10.0, "loops": 10.0,
}  # fmt: skip


def section(**more: Any) -> dict[str, Any]:
    data = {name: f"{name}.txt" for name in TEXTS}
    return {"data": data, "generation": {"prompts": 2, "prompt_tokens": 8, "tokens": 6}, **more}


@pytest.fixture(scope="module")
def models(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a copy whose experts are off."""
    path, result = tiny_model("qwen3_moe"), tmp_path_factory.mktemp("domains") / "result"
    return path, tiny.noisy_copy(path, result, 0.3)


def judge(models: tuple[Path, Path], tokens: Any, recipe: Recipe) -> ValidationReport:
    source = open_source(str(models[0]))
    options = RunOptions(batch_tokens=50)
    return validator.validate(source, None, models[1], tokens, recipe, options, reload=False)


def test_each_domain_is_judged_as_if_it_were_alone(models: tuple[Path, Path]) -> None:
    recipe = tiny.recipe("m", validation=section())
    report = judge(models, TEXTS, recipe)
    assert [one.name for one in report.domains] == ["prose", "code"]
    for one in report.domains:
        alone = judge(models, TEXTS[one.name], recipe)
        on_text = {check.name: check for check in alone.checks}
        assert one.checks == tuple(on_text[check.name] for check in one.checks)
        assert len(one.checks) == 9
        assert (one.perplexity_source, one.perplexity_result) == (
            alone.perplexity_source,
            alone.perplexity_result,
        )
        assert (one.tail, one.tokens) == (alone.tail, alone.tokens)
    assert [c.domain for c in report.continuations] == ["prose"] * 2 + ["code"] * 2


def test_the_whole_is_that_of_all_text_together(models: tuple[Path, Path]) -> None:
    recipe = tiny.recipe("m", validation=section())
    report = judge(models, TEXTS, recipe)
    together = judge(models, [*TEXTS["prose"], *TEXTS["code"]], recipe)
    assert report.tokens == together.tokens == sum(one.tokens for one in report.domains)
    assert report.perplexity_result == pytest.approx(together.perplexity_result, rel=1e-6)
    assert report.tail is not None
    assert together.tail is not None
    assert report.tail.p99 == pytest.approx(together.tail.p99, rel=1e-4)
    for ours, theirs in zip(report.layers, together.layers, strict=True):
        assert ours.hidden_error == pytest.approx(theirs.hidden_error, rel=1e-5)
        assert ours.sink_heads_result == pytest.approx(theirs.sink_heads_result, rel=1e-4)
        assert ours.sink_rate_source == theirs.sink_rate_source
        assert ours.router_agreement == pytest.approx(theirs.router_agreement)
    assert together.domains == ()


def test_all_domains_pass_a_layer_while_it_is_in_memory(
    models: tuple[Path, Path], layer_watch: tiny.LayerWatch
) -> None:
    judge(models, TEXTS, tiny.recipe("m", validation=section(generation={"tokens": 0})))
    assert layer_watch.loaded == [0, 0, 1, 1, 2, 2], "each model's once"


def test_the_limit_of_a_domain_is_its_own_and_its_failure_the_result_s(
    models: tuple[Path, Path],
) -> None:
    easy = judge(models, TEXTS, tiny.recipe("m", validation=section(**LIMITS)))
    assert easy.passed
    limited = {"prose": "prose.txt", "code": {"data": "code.txt", "kl_divergence": 1e-6}}
    strict = judge(models, TEXTS, tiny.recipe("m", validation=section(**LIMITS, data=limited)))
    prose, code = strict.domains
    assert prose.passed
    assert [check.name for check in code.checks if check.passed is False] == ["kl_divergence"]
    check = strict.check("kl_divergence")
    assert not strict.passed
    assert (check.passed, check.limit) == (False, 1e-6)
    assert check.detail.startswith("domain code; ")


def test_the_worst_domain_decides() -> None:
    def row(*checks: Check) -> tuple[Check, ...]:
        return checks

    found = worst_of(
        {
            "a": row(Check("kl_divergence", 0.4, 0.5, True), Check("loops", None, 0.5, None, "no")),
            "b": row(
                Check("kl_divergence", 0.3, 0.2, False, "few"), Check("loops", 0.1, 0.5, True)
            ),
            "c": row(
                Check("kl_divergence", 0.1, 0.5, True),
                Check("loops", 0.2, 0.5, True),
                Check("router_agreement", math.nan, 0.5, False),
            ),
        }
    )
    assert [(c.name, c.value) for c in found][:1] == [("kl_divergence", 0.3)]
    assert found[0].detail == "domain b; few"
    by_name = {check.name: check for check in found}
    assert by_name["loops"].detail == "domain c"
    assert by_name["router_agreement"].detail == "domain c"


# ---------------------------------------------------------------------------------------- the tail


def test_the_tail_is_what_its_definition_says(models: tuple[Path, Path]) -> None:
    tokens = TEXTS["prose"]
    report = judge(models, tokens, tiny.recipe("m", validation=section()))
    source, result = (tiny.plain_model(path) for path in models)
    with torch.no_grad():
        p, q = (m(torch.tensor(tokens)).logits[:, :-1].double() for m in (source, result))
    divergence = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    ordered = sorted(divergence.flatten().tolist())
    tail = report.tail
    assert tail is not None
    assert tail.median == pytest.approx(ordered[math.ceil(len(ordered) / 2) - 1], rel=1e-3)
    assert tail.p90 == pytest.approx(ordered[math.ceil(0.9 * len(ordered)) - 1], rel=1e-3)
    assert tail.p99 == pytest.approx(ordered[math.ceil(0.99 * len(ordered)) - 1], rel=1e-3)
    assert tail.most == pytest.approx(ordered[-1], rel=1e-3)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert tail.agreement == pytest.approx(float(same))
    assert 0 < tail.agreement < 1

    limits = {"kl_divergence_99": 1e-3, "top_1_agreement": 0.0}
    judged = judge(models, tokens, tiny.recipe("m", validation=section(**limits)))
    assert judged.check("kl_divergence_99").value == tail.p99
    assert judged.check("kl_divergence_99").passed is False
    assert judged.check("top_1_agreement").value == tail.agreement
    assert not {check.name for check in report.checks} & limits.keys(), "not without a limit"

    worst = divergence.max(dim=1)
    order = worst.values.sort(descending=True).indices.tolist()
    assert [one.sequence for one in tail.worst] == order
    decode = validator.decoder_of(models[0])
    for one in tail.worst:
        at = int(worst.indices[one.sequence])
        row = tokens[one.sequence]
        assert one.position == at + 1
        assert one.divergence == pytest.approx(float(worst.values[one.sequence]), rel=1e-3)
        assert one.token == decode([row[at + 1]])
        assert one.before == decode(row[max(0, at + 1 - BEFORE) : at + 1])
        shares = p[one.sequence, at].softmax(-1)
        assert one.source == decode([int(shares.argmax())])
        assert one.source_share == pytest.approx(float(shares.max()), rel=1e-4)
        assert one.result == decode([int(q[one.sequence, at].argmax())])


def test_an_equal_copy_has_no_tail(tiny_model: TinyModel) -> None:
    path = tiny_model("olmoe")
    report = judge((path, path), TEXTS, tiny.recipe("m", validation=section()))
    assert report.tail is not None
    assert report.tail.most == pytest.approx(0, abs=1e-6)
    assert report.tail.agreement == 1


def test_a_model_without_a_tokenizer_shows_ids(models: tuple[Path, Path], tmp_path: Path) -> None:
    bare = tiny.noisy_copy(models[0], tmp_path / "bare", 0.0)
    for file in bare.glob("token*"):
        file.unlink()
    report = judge((bare, models[1]), TEXTS["code"], tiny.recipe("m", validation=section()))
    assert report.tail is not None
    one = report.tail.worst[0]
    assert one.token == f"[{TEXTS['code'][one.sequence][one.position]}]"


# -------------------------------------------------------------------------------------- the recipe


def parsed(data: object, **more: object) -> Recipe:
    return tiny.recipe("m", validation={"data": data, **more})


def test_domains_are_a_mapping_of_names() -> None:
    recipe = parsed(
        {
            "prose": "a.txt",
            "code": {
                "data": ["b.txt", {"data": "c.jsonl", "column": "code"}],
                "samples": 4,
                "kl_divergence": 0.3,
            },
        },
        samples=8,
        kl_divergence=0.1,
    )
    validation = recipe.validation
    assert validation.domain_names == ("prose", "code")
    assert [source.data for source in validation.of("code").data] == ["b.txt", "c.jsonl"]
    assert validation.of("code").data[1].column == "code"
    assert [validation.of(name).samples for name in validation.domain_names] == [8, 4]
    assert [validation.of(name).limit("kl_divergence") for name in ("prose", "code")] == [0.1, 0.3]
    again = tiny.recipe("m", validation=validation.model_dump(mode="json"))
    assert again.validation == validation, "what a report prints is a recipe"
    assert flatten(recipe)["validation.domains"] == {"code": {"kl_divergence": 0.3, "samples": 4}}


def test_one_text_without_a_name_is_no_domain() -> None:
    for data in ("a.txt", ["a.txt", "b.txt"], {"data": "a.txt", "column": "t"}):
        validation = parsed(data).validation
        assert validation.domain_names == ()
        assert validation.of("") is validation


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a b": "x.txt"}, "validation.data.0.domain: 'a b' is no name of a domain: letters"),
        ({"a": {"samples": 3}}, "validation.data.0.data is missing"),
        ({"a": {"data": "x", "kl_divergenc": 1}}, "did you mean kl_divergence?"),
        ({"a": {"data": "x", "colum": 1}}, "did you mean column?"),
        ({"a": {"data": "x", "kl_divergence": -1}}, "validation.domains.a.kl_divergence is -1: "),
        ({"a": {"data": "x", "weight_cosine": 0.5}}, "weight_cosine is not a known key"),
        ([{"data": "x", "domain": "a"}, "y.txt"], "'y.txt' has no domain, but others have"),
        ({}, "validation.data.0.data is missing"),
    ],
)
def test_what_is_no_domain_is_refused(data: object, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parsed(data)
    assert message in str(error.value)


def test_limits_of_a_domain_that_is_not_there_are_refused() -> None:
    with pytest.raises(RecipeError, match="'b' is no domain of data; these are a"):
        parsed({"a": "x"}, domains={"b": {"samples": 2}})


# ------------------------------------------------------------------------------- the whole road


@pytest.fixture
def place(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with texts, and in it r.yaml."""
    check = Check("reload", None, validator.RELOAD_LIMIT, None, "not in this test")
    monkeypatch.setattr(validator, "_reload", lambda *arguments: check)
    monkeypatch.chdir(tmp_path)
    for name, first in (("calibration", 0), ("prose", 4000), ("code", 8000)):
        text = " ".join(f"{n:05d}" for n in range(first, first + 3000))
        Path(f"{name}.txt").write_text(text, encoding="utf-8")
    return tiny_model("qwen2_moe")


def request(model: Path, validation: object, calibration: object = "calibration.txt") -> Request:
    settings = {
        "model": str(model),
        "output": "out",
        "calibration": {"data": calibration, "samples": 4, "sequence_length": 32},
        "policy": {"prune": {"fraction": 0.25}},
        "quantization": {"method": "none"},
        "validation": {
            "data": validation, "samples": 2, "sequence_length": 32,
            "generation": {"prompts": 1, "prompt_tokens": 8, "tokens": 4}, **LIMITS,
        },
    }  # fmt: skip
    Path("r.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    said: list[str] = []
    found = Request(load_recipe(Path("r.yaml")), Path("r.yaml").read_text("utf-8"))
    return replace(found, notice=said.append)


def test_a_pruned_result_judged_on_one_text_carries_a_caution(place: Path) -> None:
    asked = request(place, "prose.txt")
    said: list[str] = []
    told = run(replace(asked, notice=said.append))
    (caution,) = told.validation.cautions
    assert caution.startswith("caution: experts were pruned, and the result was judged on one")
    assert caution in said
    assert caution in preview(asked).cautions
    ours = told.directory / "se_compress"
    saved = from_json(ValidationReport, (ours / "validation.json").read_text("utf-8"), "v")
    assert saved.cautions == (caution,)
    wanted = "judged on one domain of text alone"
    assert wanted in (told.directory / "README.md").read_text("utf-8")
    assert wanted in (ours / "report.html").read_text("utf-8")


def test_two_names_for_one_text_are_no_two_domains(place: Path) -> None:
    (caution,) = preview(request(place, {"prose": "prose.txt", "more": "prose.txt"})).cautions
    assert "domains prose and more of validation.data are one text, prose.txt, so" in caution
    columns = [{"data": "x/y", "column": name, "domain": name} for name in ("question", "answer")]
    assert preview(request(place, columns)).cautions == ()


def test_two_domains_need_no_caution_and_the_text_is_accounted_for(place: Path) -> None:
    domains = {"prose": "prose.txt", "code": {"data": "code.txt", "samples": 3}}
    asked = request(place, domains, {"code": "calibration.txt"})
    told = run(asked)
    assert told.validation.cautions == ()
    calibration, prose, code = told.validation.texts
    assert (calibration.role, calibration.domain, calibration.sequences) == (
        "calibration",
        "code",
        4,
    )
    assert (prose.domain, prose.sequences, prose.calibrated) == ("prose", 2, False)
    assert (code.domain, code.sequences, code.calibrated) == ("code", 3, True)
    assert (prose.repeated, prose.seen, code.sources) == (0, 0.0, ("code.txt",))
    assert len({one.digest for one in told.validation.texts}) == 3
    page = (told.directory / "se_compress" / "report.html").read_text("utf-8")
    assert 'data-domain="code"' in page
    assert "| code | yes |" in (told.directory / "README.md").read_text("utf-8")


def test_rows_that_calibration_has_too_are_named(place: Path) -> None:
    same = {"data": "calibration.txt", "samples": 4}
    told = run(request(place, {"prose": "prose.txt", "code": same}))
    _, prose, code = told.validation.texts
    assert (prose.repeated, prose.seen) == (0, 0.0)
    assert (code.repeated, code.seen, code.calibrated) == (4, 1.0, None)
    (caution,) = told.validation.cautions
    assert "saw 100 % of the held-out text of domain code" in caution
    card = (told.directory / "README.md").read_text("utf-8")
    assert "saw 100 % of the held-out text of domain code" in card


def test_chat_and_plain_text_are_drawn_from_in_one_recipe(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    model = tiny.save_tokenizer(tmp_path / "model", bos=True, template="<s>" + template)
    plain, chat = tmp_path / "plain.txt", tmp_path / "chat.jsonl"
    plain.write_text("plain words " * 400, encoding="utf-8")
    row = '{"messages": [{"role": "user", "content": "Hello there"}]}\n'
    chat.write_text(row * 200, encoding="utf-8")
    text = Calibration.model_validate(
        {
            "data": {
                "prose": {"data": str(plain), "weight": 3},
                "chat": {"data": str(chat), "column": "messages", "chat_template": True},
            },
            "samples": 8,
            "sequence_length": 24,
        }
    )
    sequences = draw_sequences(text, model, "calibration")
    decode = validator.decoder_of(model)
    kinds = ["chat" if "<user>" in decode(one) else "plain" for one in sequences]
    assert kinds == ["plain", "plain", "chat", "plain", "plain", "plain", "chat", "plain"]


def test_the_hub_reads_the_numbers_at_the_head_of_the_card(place: Path) -> None:
    told = run(request(place, {"prose": "prose.txt", "code": "code.txt"}))
    card = ModelCard.load(told.directory / "README.md")
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for one in told.validation.domains:
        name = f"{one.name}: {one.name}.txt"
        assert found[name, "perplexity"] == pytest.approx(one.perplexity_result, rel=1e-4)
        assert found[name, "top_1_agreement"] == pytest.approx(one.tail.agreement, rel=1e-4)
        assert found[name, "kl_divergence_99"] == pytest.approx(one.tail.p99, rel=1e-4)
        assert found[name, "kl_divergence"] == pytest.approx(one.distance, rel=1e-4)
    assert len(found) == 8
    assert card.data.model_name == "out"
