"""What the benchmarks say must be right: their own unpackers, and the file that they write."""

import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from artefacts_example import example_profile, mixed_plan
from packed import pack

from se_compress.artifacts import Check, ExpertId
from se_compress.model.checkpoint import open_tensors
from se_compress.model.streaming import StreamedModel
from se_compress.opening.source import open_source
from se_compress.recipe import Validation

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import accidents  # noqa: E402
import damages  # noqa: E402
import evaluate  # noqa: E402
import gates  # noqa: E402
import policy  # noqa: E402
import protection  # noqa: E402
import results  # noqa: E402
import source_formats  # noqa: E402


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacked_numbers_lie_one_after_another_in_the_stream(bits: int) -> None:
    numbers = torch.randint(2**bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    words = []
    for row in numbers.tolist():
        stream = sum(number << (bits * at) for at, number in enumerate(row))
        values = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(64 * bits // 32)]
        words.append([value - 2**32 if value >= 2**31 else value for value in values])
    found = evaluate.unpack(torch.tensor(words, dtype=torch.int32), 64, bits)
    assert torch.equal(found, numbers.float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_evaluator_reads_what_we_pack(bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (32, 96), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (32, 3), generator=draw, dtype=torch.uint8)
    scales = torch.rand(32, 3, generator=draw).half().float()
    packed = pack("gptq", codes, scales, zeros, bits=bits, group_size=32)
    found = evaluate.from_gptq(packed, bits, {"checkpoint_format": "gptq"})
    steps = codes.float() - zeros.float().repeat_interleave(32, 1)
    assert torch.equal(found, steps * scales.repeat_interleave(32, 1))


def test_compressed_tensors_are_signed_and_grouped() -> None:
    words = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)  # 0 ... 15
    parts = {
        "weight_packed": words,
        "weight_scale": torch.tensor([[2.0, 0.5]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([1, 16]),
    }
    expected = [2.0 * (code - 8) for code in range(8)] + [0.5 * code for code in range(8)]
    assert evaluate.from_compressed_tensors(parts, 4).tolist() == [expected]


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    results.write_section("one", "first\n\\1", file)
    results.write_section("two", "second", file)
    results.write_section("one", "third", file)
    text = file.read_text()
    assert text.startswith("# Results\n")
    assert "first" not in text
    assert text.index("third") < text.index("second")
    assert text.count("<!-- begin one -->") == text.count("<!-- end one -->") == 1


def judged(**values: float) -> list[Check]:
    """The gates of a version, each well within its limit unless a value says otherwise."""
    least = {name: 1.0 if gate.side == "at least" else 0.0 for name, gate in gates.COLUMNS.items()}
    return [Check(name, value, None, None) for name, value in {**least, **values}.items()]


def test_the_table_of_gates_says_what_was_missed_and_what_refused_without_need() -> None:
    limits = Validation(data="unused.txt")
    sound, broken, between = (
        next(case.name for case in gates.CASES if case.sound is kind)
        for kind in (True, False, None)
    )
    lost = judged(massive_activation_ratio=0.0, kl_divergence=9.0)
    right = {sound: judged(), broken: lost, between: judged(loops=1.0)}
    text = gates.table(right, limits)
    assert f"| {broken} | broken | 0.000 | **9.000** | **0.000** |" in text
    assert "caught by 2 |" in text
    assert "WRONG" not in text
    decided = "1 of 1 sound versions pass, 1 of 1 broken ones are caught. Not measured yet: "
    assert gates.summary(right, limits).startswith(decided)
    wrong = {sound: lost, broken: judged()}
    assert gates.table(wrong, limits).count("WRONG") == 2
    assert f"Not caught: {broken}. Refused without need: {sound}." in gates.summary(wrong, limits)


def test_the_table_of_protection_has_a_row_for_each_checkpoint() -> None:
    row = {"part": "nf4", "protected": "none", "found": "(11, 3)", "size": 191_230_000}
    row |= {"kl_divergence": 0.12345, "perplexity": 50.0, "massive_activation_ratio": None}
    text = protection.table({"nf4": [row], "gptq": [{**row, "protected": "super experts"}]})
    first, second = text.splitlines()[2:]
    assert first.startswith(
        "| GPTQ, 3 bits | super experts | 191.23 | (11, 3) | 0.1235 | 50.00 | -"
    )
    assert second.startswith("| bitsandbytes nf4 | none |")
    assert set(protection.TITLES) == set(protection.PARTS)


def test_an_inverted_plan_gives_the_most_bits_to_what_loses_least() -> None:
    plan, profile = mixed_plan(), example_profile()
    turned = policy.inverted(plan, profile)
    for group, roles in policy.PROJECTION_GROUPS.items():
        before, after = (
            {d.id: d.bits_of(roles[0]) for d in p.experts if d.expert != "shared"}
            for p in (plan, turned)
        )
        assert sorted(before.values()) == sorted(after.values())
        free = [d.id for d in plan.experts if d.action == "quantize" and d.expert != "shared"]
        by_loss = sorted(free, key=lambda i: (policy.loss_of(profile, i, group), i))
        widths = [after[identity] for identity in by_loss]
        assert widths == sorted(widths, reverse=True)
        assert len(set(widths)) > 1
        assert all(before[i] == after[i] for i in before.keys() - set(free))


def test_a_score_that_rises_with_depth_is_seen() -> None:
    profile = example_profile()
    experts = tuple(
        replace(e, loss_gate_up={3: float(e.layer)}, loss_down={3: 0.0}) for e in profile.experts
    )
    assert policy.rises_with_depth(replace(profile, experts=experts)) == 1.0


def test_the_table_of_published_forms_takes_their_own_rounding_off() -> None:
    def row(form: str, kl: float, *tensors: str) -> dict[str, object]:
        results_of = {
            method: {
                "own": 0.04,
                "plain": kl + (0.05 if method == "4 bit" else 0.0),
                "tensors": one,
            }
            for method, one in zip(source_formats.METHODS, tensors, strict=True)
        }
        return {"form": form, "size": 5 * 10**6, "super_experts": ["(11, 3)"], **results_of}

    text = source_formats.section([row("plain", 0.0, "a", "b"), row("fp8", 0.01, "c", "b")])
    assert "| plain | 5.0 | (11, 3) | 0.00000 | 0.04000 | 0.05000 | 0.05000 | none, 4 bit |" in text
    assert "| fp8 | 5.0 | (11, 3) | 0.01000 | 0.04000 | 0.06000 | 0.05000 | 4 bit |" in text


def test_every_damage_by_accident_changes_what_it_says(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3_moe"), path)
    tiny.save_tokenizer(path, template=damages.TEMPLATE)
    source = open_source(str(path))
    read = open_tensors(source.tensors)
    model = accidents.Model(
        source=source,
        read=read,
        recipe=tiny.recipe(path),
        super_expert=ExpertId(1, 2),
        favours=dict.fromkeys(source.experts, 1.0),
    )
    protected = set(model.names(model.super_expert))
    for damage in accidents.DAMAGES:
        if damage.made is accidents.memorised:
            continue  # which trains a model for it
        changed = damage.made(model, random.Random(1))
        assert changed is not None, damage.name
        changes = [n for n, weight in changed.items() if not torch.equal(weight, read(n).float())]
        of_files = damage.files and damages.beside(source, damage.files).passed is False
        done = bool(changes or damage.config(source) or of_files)
        assert done is (damage.name != "an equal copy"), damage.name
        assert all(weight.shape == read(n).shape for n, weight in changed.items())
        harmed = ("a shard of another revision", "the super expert set to zero")
        if damage.name not in (*harmed, "experts in 8-bit floats"):
            assert not protected & set(changes), damage.name
    base = accidents.other_base(source)
    assert base != source.config
    assert StreamedModel(replace(source, config=base), read).model.config.rope_parameters[
        "rope_theta"
    ] == pytest.approx(10 * StreamedModel(source, read).model.config.rope_parameters["rope_theta"])


def test_rates_count_what_the_gates_got_wrong() -> None:
    def version(damage: str, **values: float) -> dict[str, object]:
        return {"damage": damage, "seed": 0, "domains": values, "alone": {"kl_divergence": 0.0}}

    kept = [
        version("an equal copy", kl_divergence=0.1),
        version("an equal copy", kl_divergence=0.3),
        version("a domain lost", kl_divergence=0.3),
        version("a domain lost", kl_divergence=0.1),
        version("a shard of another revision", kl_divergence=0.1, tensors_accounted=0.9),
    ]
    assert damages.summary(kept) == (
        "False rejections: 1 of 2 (50 %) of sound versions; misses: 1 of 3 (33 %) of broken ones. "
        "What rejected sound ones: kl_divergence."
    )
    table = list(damages.rows(kept))
    assert "| an equal copy | sound | 2 | **1** | 1 | 0 |" in table
    assert "| a domain lost | broken | 2 | **1** | 1 | 0 |" in table
    assert "| a shard of another revision | broken | 1 | 1 | 0 | 0 |" in table
    assert "| KL | 0.2 | 0.300 |" in list(damages.margins({"tiny": kept}))
