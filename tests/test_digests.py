"""Damage to a finished checkpoint, of every kind and in every format, fails the account of its
tensors by name; and what was written is known by its hashes alone."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, edit_weights, random_tokens, recipe
from torch import Tensor

from se_compress.artifacts import (
    COMPRESSION_FILE,
    Compressed,
    CompressionPlan,
    LayerRecord,
    ModelSource,
    RunOptions,
    TensorInfo,
    ValidationReport,
    from_json,
    to_json,
)
from se_compress.compression.execute import compress
from se_compress.model.digests import DIGITS, by_name, by_owner, digest_of_tensor, digest_on_disk
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.recipe import Recipe
from se_compress.validation.validator import Original, validate

TinyModel = Callable[[str], Path]
Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]

TOKENS, HELD_OUT = random_tokens(6, 20), random_tokens(3, 16, seed=3)
RTN: Mapping[str, Any] = {"method": "rtn", "group_size": 32}
# Format -> target, quantization, and what follows the name of a module: codes, scales, the rest.
FORMATS: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, str, str]]] = {
    "gptq": ("gptqmodel", {**RTN, "format": "gptq"}, ("qweight", "scales", "g_idx")),
    "gptq_v2": ("gptqmodel", {**RTN, "format": "gptq_v2"}, ("qweight", "scales", "qzeros")),
    "auto-round": (
        "transformers",
        {**RTN, "format": "auto-round"},
        ("qweight", "scales", "qzeros"),
    ),
    "compressed-tensors": ("vllm", RTN, ("weight_packed", "weight_scale", "weight_shape")),
    "bitsandbytes": (
        "transformers",
        {"method": "bitsandbytes", "block_size": 32},
        ("weight", "weight.nested_absmax", "weight.absmax"),
    ),
}
STEM, OTHER = (f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in (2, 5))


@dataclass(frozen=True)
class Made:
    """One compressed checkpoint, and the source's side of its validation."""

    source: ModelSource
    plan: CompressionPlan
    settings: Recipe
    directory: Path
    records: tuple[LayerRecord, ...]
    original: Original

    def validate(self, directory: Path | None = None) -> ValidationReport:
        return validate(
            self.source,
            self.plan,
            directory or self.directory,
            HELD_OUT,
            self.settings,
            original=self.original,
            reload=False,
        )


def make(path: Path, directory: Path, form: str, **policy: Any) -> Made:
    target, quantization, _ = FORMATS[form]
    source = open_source(str(path))
    loose = {
        "data": "unused.txt",
        "perplexity_increase": 1e9,
        "kl_divergence": 1e9,
        "router_agreement": 0.0,
        "router_agreement_least": 0.0,
        "weight_gain": 1e9,
        "generation": {"tokens": 0},
    }
    settings = recipe(
        path,
        target=target,
        policy={"bits": [4], "protect": "none", **policy},
        quantization=quantization,
        validation=loose,
    )
    plan = make_plan(source, None, settings)
    records = compress(source, plan, TOKENS, settings, directory).layers
    original = Original(source, HELD_OUT, settings, RunOptions(), keep=True)
    return Made(source, plan, settings, directory, records, original)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "model"
    return build(path, "olmoe", num_hidden_layers=2, num_experts=6)


@pytest.fixture(scope="module", params=FORMATS)
def made(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Made, str]:
    directory = tmp_path_factory.mktemp("made") / "result"
    return make(model, directory, request.param), request.param


def with_value(name: str, value: float | None, times: float = 1.0) -> Damage:
    """One element is set, or all are multiplied."""

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = tensors[name].clone()
        if value is None:
            changed.mul_(times)
        else:
            changed.view(-1)[len(changed.view(-1)) // 2] = value
        return {name: changed}

    return damage


def with_byte(name: str, at: int) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = tensors[name].clone()
        flat = changed.view(-1).view(torch.uint8)
        flat[at] = int(flat[at]) ^ 0x10
        return {name: changed}

    return damage


def exchanged(first: str, second: str) -> Damage:
    """All parts of two modules in each other's place."""

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = [name.removeprefix(first) for name in tensors if name.startswith(first + ".")]
        assert parts
        swapped = {first + part: tensors[second + part].clone() for part in parts}
        return swapped | {second + part: tensors[first + part].clone() for part in parts}

    return damage


KINDS: Mapping[str, Callable[[str, str, str], Damage]] = {
    "a scale is zero": lambda codes, scales, rest: with_value(scales, 0.0),
    "a scale is negative": lambda codes, scales, rest: with_value(scales, -0.01),
    "a scale is NaN": lambda codes, scales, rest: with_value(scales, float("nan")),
    "a scale is infinite": lambda codes, scales, rest: with_value(scales, float("inf")),
    "a matrix times 1.3": lambda codes, scales, rest: with_value(scales, None, 1.3),
    "the first byte of the codes": lambda codes, scales, rest: with_byte(codes, 0),
    "a byte of the codes": lambda codes, scales, rest: with_byte(codes, 77),
    "the last byte of the codes": lambda codes, scales, rest: with_byte(codes, -1),
    "a byte of a scale": lambda codes, scales, rest: with_byte(scales, 0),
    "the first byte of the rest": lambda codes, scales, rest: with_byte(rest, 0),
    "the last byte of the rest": lambda codes, scales, rest: with_byte(rest, -1),
    "all codes are zero": lambda codes, scales, rest: lambda t: {codes: torch.zeros_like(t[codes])},
    "experts": lambda codes, scales, rest: exchanged(STEM, OTHER),
    "gate and up": lambda codes, scales, rest: exchanged(
        STEM.replace("up_proj", "gate_proj"), STEM
    ),
    "layers": lambda codes, scales, rest: exchanged(STEM.replace("layers.1", "layers.0"), STEM),
    "the router": lambda codes, scales, rest: with_byte("model.layers.1.mlp.gate.weight", 5),
    "a norm that overflows": lambda codes, scales, rest: with_value(
        "model.layers.0.post_attention_layernorm.weight", None, 1e30
    ),
    "a norm": lambda codes, scales, rest: with_value(
        "model.layers.0.input_layernorm.weight", float("nan")
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_any_kind_fails_the_account_by_name(
    kind: str, made: tuple[Made, str], tmp_path: Path
) -> None:
    result, form = made
    shutil.copytree(result.directory, tmp_path / "damaged")
    before = load_file(tmp_path / "damaged" / "model.safetensors")
    parts = (f"{STEM}.{part}" for part in FORMATS[form][2])
    changes = KINDS[kind](*parts)(before)
    changed = [n for n, t in changes.items() if digest_of_tensor(t) != digest_of_tensor(before[n])]
    assert changed
    edit_weights(tmp_path / "damaged", changes)
    report = result.validate(tmp_path / "damaged")
    check = report.check("tensors_accounted")
    assert not report.passed
    assert check.passed is False
    assert (check.value or 0.0) < 1.0
    told = [name for name in changed if f"{name} differs from" in check.detail]
    assert len(told) == min(len(changed), 3)
    assert ("more" in check.detail) is (len(changed) > 3)
    to_json(report)


def test_what_was_written_passes_and_is_compared_throughout(made: tuple[Made, str]) -> None:
    result, _ = made
    report = result.validate()
    assert report.check("tensors_accounted").passed
    assert report.check("tensors_accounted").detail == ""
    assert report.passed


def test_the_digests_are_those_of_the_files(made: tuple[Made, str]) -> None:
    result, _ = made
    found = read_headers(result.directory)
    digests = {k: v for record in result.records for k, v in record.digests.items()}
    packed = [name for name in found if ".experts." in name]
    written = by_name(digests, packed)
    assert sorted(written) == sorted(packed)
    for name, info in found.items():
        whole = Path(info.file).read_bytes()[info.begin : info.end]
        assert digest_on_disk(info) == hashlib.sha256(whole).hexdigest()[:DIGITS]
        assert written.get(name, digest_on_disk(info)) == digest_on_disk(info)


def test_records_without_digests_say_what_was_not_compared(
    made: tuple[Made, str], tmp_path: Path
) -> None:
    result, _ = made
    text = to_json(replace(result.records[1], digests={})).replace(
        '"digests": {}', '"failed": null'
    )
    old = from_json(LayerRecord, text, "of an earlier version")
    shutil.copytree(result.directory, tmp_path / "old")
    records = Compressed((result.records[0], old, *result.records[2:]))
    (tmp_path / "old" / COMPRESSION_FILE).write_text(to_json(records), encoding="utf-8")
    check = result.validate(tmp_path / "old").check("tensors_accounted")
    count = sum(".layers.1.mlp.experts." in name for name in read_headers(result.directory))
    assert check.passed
    assert check.detail == (
        f"not compared: {count} tensors that were made here, no digests of them were found"
    )


@pytest.mark.parametrize("policy", [{"prune": {"fraction": 0.25}}, {"merge": {"fraction": 0.5}}])
@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_what_surgery_makes_is_accounted_for(
    policy: Mapping[str, Any], form: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    result = make(tiny_model("olmoe"), tmp_path / "result", form, **policy)
    report = result.validate()
    assert report.check("tensors_accounted").passed
    assert report.check("tensors_accounted").detail == ""
    router = "model.layers.1.mlp.gate.weight"
    for name in (router, f"model.layers.1.mlp.experts.2.up_proj.{FORMATS[form][2][0]}"):
        shutil.copytree(tmp_path / "result", tmp_path / name)
        edit_weights(
            tmp_path / name,
            with_byte(name, 3)(load_file(next((tmp_path / name).glob("*.safetensors")))),
        )
        check = result.validate(tmp_path / name).check("tensors_accounted")
        assert check.passed is False
        assert f"{name} differs from what was written" in check.detail


# -------------------------------------------------------------------------------- the digests alone


def test_digests_are_kept_by_owner_and_found_by_name() -> None:
    names = [
        *(f"layers.0.experts.{e}.{p}.{t}" for e in range(3) for p in "gud" for t in ("q", "s")),
        "layers.0.router.weight",
        "alone",
    ]
    each = {name: digest_of_tensor(torch.tensor([i])) for i, name in enumerate(names)}
    kept = by_owner(each)
    assert len(kept) == 5
    assert len(kept["layers.0.experts.1"]) == 6 * DIGITS
    assert by_name(kept, reversed(names)) == each
    assert by_name(kept, names[1:]) == {n: d for n, d in each.items() if "experts.0" not in n}
    assert by_name({}, names) == {}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(7, 3),
        torch.randn(6, 4).T,
        torch.randn(5).bfloat16(),
        torch.arange(9, dtype=torch.int32)[::2],
        torch.tensor(1.5),
        torch.empty(0, 4),
        torch.tensor([True, False]),
    ],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
)
def test_a_digest_is_that_of_the_bytes_on_disk(tensor: Tensor, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3), "b": tensor.contiguous()}, tmp_path / "model.safetensors")
    assert digest_on_disk(read_headers(tmp_path)["b"]) == digest_of_tensor(tensor)


def test_a_file_that_has_become_shorter_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    whole = TensorInfo("a", "U8", (3,), str(tmp_path / "short"), 0, 3)
    assert digest_on_disk(whole) != digest_on_disk(replace(whole, end=4, begin=1))


def test_the_digests_of_ten_thousand_experts_stay_small() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}.{part}"
        for layer in range(40)
        for expert in range(256)
        for projection in ("down_proj", "gate_proj", "up_proj")
        for part in ("qweight", "qzeros", "scales", "g_idx")
    ]
    kept = by_owner({name: digest_of_tensor(torch.tensor(1)) for name in names})
    record = LayerRecord(0, 1.0, 0.0, (), digests=kept)
    assert len(to_json(record)) < 200 * 10_240  # 2 MB; their other records take more
