"""The measures of the validator against their definitions, written out over two plain models."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from se_compress.artifacts import GATES, RunOptions, ValidationReport
from se_compress.errors import SourceError
from se_compress.model import measures
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.validation import validator as validation

TinyModel = Callable[[str], Path]
TOKENS = tiny.random_tokens(6, 24, seed=3)
FIRST_QUERY, HEAD_FLOOR = 8, 0.05


class Seen:
    """What a plain transformers model computes for TOKENS, layer by layer."""

    def __init__(self, directory: Path) -> None:
        model = tiny.plain_model(directory)
        self.states: list[Tensor] = []
        self.chosen: list[Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda m, i, out: self.states.append(out))
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(lambda m, i, out: self.chosen.append(out[2]))
        with torch.no_grad():
            out = model(torch.tensor(TOKENS), output_attentions=True)
        self.logits, self.attentions = out.logits.double(), out.attentions


@pytest.fixture
def judged(
    tiny_model: TinyModel, tmp_path: Path
) -> Callable[[str, float], tuple[Seen, Seen, ValidationReport]]:
    """Validates an altered copy of a family's model; loading it again has tests of its own."""

    def judge(name: str, noise: float) -> tuple[Seen, Seen, ValidationReport]:
        path = tiny_model(name)
        result = tiny.noisy_copy(path, tmp_path / "altered", noise)
        source = open_source(str(path))
        recipe = tiny.recipe(
            path,
            quantization={"method": "none"},
            validation={"data": "unused.txt", "generation": {"tokens": 0}},
        )
        plan = make_plan(source, None, recipe)
        options = RunOptions(batch_tokens=50)  # two sequences at a time
        report = validation.validate(source, plan, result, TOKENS, recipe, options, reload=False)
        return Seen(path), Seen(result), report

    return judge


def cross_entropy(logits: Tensor) -> float:
    total = count = 0.0
    for sequence, tokens in zip(logits, TOKENS, strict=True):
        for position in range(len(tokens) - 1):
            probabilities = sequence[position].softmax(-1)
            total -= math.log(float(probabilities[tokens[position + 1]]))
            count += 1
    return total / count


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_measures_are_what_their_definitions_say(family: str, judged: Any) -> None:
    old, new, report = judged(family, 0.3)
    value = {check.name: check.value for check in report.checks}
    loss_old, loss_new = cross_entropy(old.logits), cross_entropy(new.logits)
    assert report.perplexity_source == pytest.approx(math.exp(loss_old), rel=1e-4)
    assert report.perplexity_result == pytest.approx(math.exp(loss_new), rel=1e-4)
    increase = math.exp(loss_new - loss_old) - 1
    assert value["perplexity_increase"] == pytest.approx(increase, abs=1e-4)
    p, q = old.logits[:, :-1].softmax(-1), new.logits[:, :-1].softmax(-1)
    divergence = float((p * (p / q).log()).sum(-1).mean())
    assert divergence > 1e-4, "an alteration that shows"
    assert value["kl_divergence"] == pytest.approx(divergence, rel=1e-3)
    assert value["router_agreement"] == pytest.approx(agreement(old, new), abs=1e-6)
    assert value["router_agreement"] < 1
    for layer, (a, b) in enumerate(zip(old.states, new.states, strict=True)):
        compared = report.layers[layer]
        assert compared.peak_source == pytest.approx(float(a.abs().max()), rel=1e-4)
        assert compared.peak_result == pytest.approx(float(b.abs().max()), rel=1e-4)
        error = float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean())
        assert compared.hidden_error == pytest.approx(error, rel=1e-3, abs=1e-6)
        first = float(((b - a).norm(dim=-1) / a.norm(dim=-1))[:, 0].mean())
        assert compared.sink_error == pytest.approx(first, rel=1e-3, abs=1e-6)
        cosine = torch.nn.functional.cosine_similarity(a[:, 0], b[:, 0], dim=-1)
        assert compared.sink_cosine == pytest.approx(float(cosine.mean()), rel=1e-4)
    for compared, before, after in zip(report.layers, old.attentions, new.attentions, strict=True):
        for heads, rate, attention in (
            (compared.sink_heads_source, compared.sink_rate_source, before),
            (compared.sink_heads_result, compared.sink_rate_result, after),
        ):
            mass = attention[:, :, FIRST_QUERY:, 0].mean(dim=(0, 2))
            assert list(heads) == pytest.approx(mass.tolist(), abs=1e-5)
            assert rate == pytest.approx(rates(attention)[0])
    assert value["router_agreement_least"] == pytest.approx(min(agreements(old, new)), abs=1e-6)


def agreement(old: Seen, new: Seen) -> float:
    shares = agreements(old, new)
    return sum(shares) / len(shares)


def agreements(old: Seen, new: Seen) -> list[float]:
    shares = []
    for before, after in zip(old.chosen, new.chosen, strict=True):
        pairs = list(zip(before.tolist(), after.tolist(), strict=True))
        same = [len(set(a) & set(b)) / len(a) for a, b in pairs]
        shares.append(sum(same) / len(same))
    return shares


def rates(attention: Tensor) -> list[float]:
    """Gu's sink rate of one layer at each position, from probabilities [B, heads, T, T]."""
    sequences, heads, length, _ = attention.shape
    found = []
    for k in range(length):
        over = 0
        for head in range(heads):
            paid = [float(attention[b, head, k:, k].mean()) for b in range(sequences)]
            over += sum(paid) / sequences > 0.3
        found.append(over / heads)
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_the_strongest_sinks_over_all_positions(family: str, judged: Any) -> None:
    old, new, report = judged(family, 0.5)
    half = len(TOKENS[0]) // 2

    def over_layers(seen: Seen) -> list[tuple[float, float]]:
        rows = [rates(a) for a in seen.attentions]
        rate = [sum(row[k] for row in rows) / len(rows) for k in range(half)]
        mass = [
            sum(float(a[:, :, k:, k].mean()) for a in seen.attentions) / len(rows)
            for k in range(half)
        ]
        return list(zip(mass, rate, strict=True))

    before, after = over_layers(old), over_layers(new)
    by_mass = sorted(range(half), key=lambda k: -max(before[k][0], after[k][0]))
    assert [sink.position for sink in report.sinks] == by_mass[:4]
    for sink in report.sinks:
        assert (sink.mass_source, sink.rate_source) == pytest.approx(before[sink.position])
        assert (sink.mass_result, sink.rate_result) == pytest.approx(after[sink.position])


def test_perplexity_and_divergence_have_intervals_over_sequences(judged: Any) -> None:
    old, new, report = judged("olmoe", 0.3)
    p, q = old.logits[:, :-1].softmax(-1), new.logits[:, :-1].softmax(-1)
    each = (p * (p / q).log()).sum(-1).mean(dim=1)
    check = report.check("kl_divergence")
    expected = measures.bootstrap_interval(each, torch.ones(len(each)))
    assert (check.low, check.high) == pytest.approx(expected, rel=1e-3)
    assert check.low < check.value < check.high
    perplexity = report.check("perplexity_increase")
    assert perplexity.low < perplexity.value < perplexity.high


@pytest.mark.parametrize(
    ("limit", "passed", "doubt"),
    [(0.9, True, False), (0.6, True, True), (0.45, False, True), (0.3, False, False)],
)
def test_a_limit_within_the_interval_is_said_to_be_undecided(
    limit: float, passed: bool, doubt: bool
) -> None:
    check = GATES["kl_divergence"].judge(0.5, limit, "why", (0.4, 0.7))
    assert check.passed is passed
    assert check.detail == ("why; the sample is too small to tell" if doubt else "why")
    assert (check.low, check.high) == (0.4, 0.7)


def test_sink_decay_is_weighted_by_mass_and_leaves_small_heads_out(judged: Any) -> None:
    old, new, report = judged("qwen3_moe", 1.0)
    before = after = 0.0
    for a, b in zip(old.attentions, new.attentions, strict=True):
        mass_old = a[:, :, FIRST_QUERY:, 0].mean(dim=(0, 2))
        mass_new = b[:, :, FIRST_QUERY:, 0].mean(dim=(0, 2))
        counted = mass_old >= HEAD_FLOOR
        before += float(mass_old[counted].sum())
        after += float(mass_new[counted].sum())
    check = report.check("sink_decay")
    assert before > 0
    assert check.value == pytest.approx(1 - after / before, abs=1e-5)


def test_an_equal_copy_has_no_loss_at_all(judged: Any) -> None:
    _, _, report = judged("olmoe", 0.0)
    value = {check.name: check.value for check in report.checks}
    assert value["perplexity_increase"] == 0
    assert value["kl_divergence"] == pytest.approx(0, abs=1e-7)
    assert value["router_agreement"] == 1
    assert value["tensors_accounted"] == 1
    assert report.passed
    assert report.not_run == (
        "massive_activation_ratio",
        "sink_token_error",
        "repetition",
        "loops",
        "reload",
    )


def test_other_bytes_fail_the_account_and_are_measured_all_the_same(judged: Any) -> None:
    _, _, report = judged("olmoe", 0.1)
    check = report.check("tensors_accounted")
    assert check.passed is False
    assert "differs from the source" in check.detail
    assert not report.passed
    assert report.check("kl_divergence").value


# ---------------------------------------------------------------------------- a result of another's


@pytest.fixture
def judge_foreign(tiny_model: TinyModel, tmp_path: Path) -> Callable[..., ValidationReport]:
    """Validates an altered copy without a plan, after tensors of it have been replaced."""

    def judge(name: str, noise: float = 0.2, **changes: Tensor | None) -> ValidationReport:
        path = tiny_model(name)
        result = tiny.noisy_copy(path, tmp_path / "foreign", noise)
        tiny.edit_weights(result, changes)
        settings = tiny.recipe(path, validation={"data": "unused.txt", "generation": {"tokens": 0}})
        source = open_source(str(path))
        return validation.validate(source, None, result, TOKENS, settings, reload=False)

    return judge


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_without_a_plan_changed_weights_are_judged_by_what_they_do(
    family: str, judge_foreign: Callable[..., ValidationReport], judged: Any
) -> None:
    report, (_, _, planned) = judge_foreign(family), judged(family, 0.2)
    value = planned.check("kl_divergence").value
    assert report.check("kl_divergence").value == pytest.approx(value, rel=1e-5)
    accounted = report.check("tensors_accounted")
    assert accounted.passed
    same = re.fullmatch(r"(\d+) of (\d+) are the source's own bytes", accounted.detail)
    assert same
    assert 0 < int(same[1]) < int(same[2])


def test_without_a_plan_every_tensor_has_to_be_there_all_the_same(
    judge_foreign: Callable[..., ValidationReport],
) -> None:
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    report = judge_foreign("qwen3_moe", **{lost: None})
    accounted = report.check("tensors_accounted")
    assert accounted.passed is False
    assert f"{lost} is missing" in accounted.detail
    assert report.check("kl_divergence").detail.startswith("a result with tensors missing")


def test_two_experts_in_each_others_place_are_seen_by_their_weights(
    judge_foreign: Callable[..., ValidationReport], tiny_model: TinyModel
) -> None:
    weights = load_file(tiny_model("qwen3_moe") / "model.safetensors")
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (2, 5)]
    swapped = dict(zip(names, (weights[name] for name in names[::-1]), strict=True))
    check = judge_foreign("qwen3_moe", **swapped).check("weight_cosine")
    assert check.passed is False
    assert abs(check.value or 1.0) < 0.1
    assert check.detail.removeprefix("least in ") in names


def test_noise_leaves_a_matrix_its_direction_and_its_rows_their_size(
    judge_foreign: Callable[..., ValidationReport],
) -> None:
    report = judge_foreign("qwen3_moe", noise=0.2)
    assert report.check("weight_cosine").value == pytest.approx(1 / math.sqrt(1.04), abs=0.01)
    assert report.check("weight_gain").value < 0.05  # type: ignore[operator]
    assert report.check("weight_cosine").passed
    assert report.check("weight_gain").passed


def test_scales_of_other_rows_are_seen_by_the_sizes_of_rows(
    judge_foreign: Callable[..., ValidationReport], tiny_model: TinyModel
) -> None:
    weights = load_file(tiny_model("qwen3_moe") / "model.safetensors")
    off = {}
    for expert in range(8):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        gain = torch.tensor([0.6, 1.4]).repeat(len(weights[name]) // 2)[:, None]
        off[name] = (weights[name].float() * gain).to(weights[name].dtype)
    check = judge_foreign("qwen3_moe", **off).check("weight_gain")
    assert check.passed is False
    assert check.value == pytest.approx(0.4, abs=0.01)
    assert check.detail == "most in down_proj of layer 1"


def test_without_a_plan_shapes_and_strangers_are_named(
    judge_foreign: Callable[..., ValidationReport],
) -> None:
    router = "model.layers.1.mlp.gate.weight"
    report = judge_foreign("olmoe", **{router: torch.ones(7, tiny.HIDDEN), "stray": torch.ones(2)})
    detail = report.check("tensors_accounted").detail
    assert f"{router} is [7, 64], not [8, 64]" in detail
    assert "stray is not in the source" in detail
    assert not report.passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.experts.1.down_proj.weight", "model.norm.weight"]
)
def test_what_is_no_number_in_a_result_is_not_the_source_s_fault(
    name: str,
    value: float,
    judge_foreign: Callable[..., ValidationReport],
    tiny_model: TinyModel,
) -> None:
    weight = load_file(tiny_model("olmoe") / "model.safetensors")[name]
    weight.view(-1)[3] = value
    report = judge_foreign("olmoe", **{name: weight})
    check = report.check("tensors_accounted")
    assert check.passed is False
    assert f"{name}: 1 of {weight.numel()} values are NaN or infinite" in check.detail
    assert {c.detail for c in report.checks if c is not check} == {
        "a tensor of the result cannot be used"
    }


def test_a_format_that_is_not_read_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = open_source(str(tiny_model("olmoe")))
    shutil.copytree(source.path, tmp_path / "other")
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    tiny.edit_config(tmp_path / "other", quantization_config=settings)
    with pytest.raises(SourceError, match=r"compressed-tensors \(format float-quantized\)"):
        validation.validate(source, None, tmp_path / "other", TOKENS, tiny.recipe("m"))


def test_a_value_that_is_no_number_fails() -> None:
    assert GATES["kl_divergence"].judge(math.nan, 1.0).passed is False
    assert GATES["router_agreement"].judge(math.nan, 0.0).passed is False
