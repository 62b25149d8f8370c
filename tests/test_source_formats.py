"""Models in the forms in which they are published, through the whole flow: each comes out as the
plain model that it stands for would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sourced import source_formats
from test_pipeline import Workplace
from test_pipeline import no_engine as no_engine
from tiny import plain_model, plant, random_tokens, save_tokenizer

from se_compress.artifacts import ExpertId, ExpertProfile, from_json
from se_compress.model.checkpoint import open_tensors
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.pipeline import preview

TinyModel = Callable[[str], Path]
FORMS = ["fused", "fp8", "fused-fp8", "mxfp4", "int4"]
SUPER = ExpertId(1, 3)
NONE = ("target=transformers", "quantization={method: none}", "policy={}")
PRUNED = ("target=transformers", "quantization={method: none}", "policy={prune: {fraction: 0.25}}")
GPTQ = ("target=transformers",)


def in_form(form: str, name: str, tiny_model: TinyModel, directory: Path) -> tuple[Path, Path]:
    """A tiny model with a super expert in a form, and the same model decoded, both on disk."""
    model = source_formats.write("plain", tiny_model(name), directory / "planted")
    plant(model, SUPER.layer, 3)
    save_tokenizer(model, bos=True)
    coded = source_formats.write(form, model, directory / "coded", 16)
    decoded = source_formats.write("plain", model, directory / "decoded")
    source = open_source(str(coded))
    read = open_tensors(source.tensors)
    tensors = {tensor: read(tensor).clone() for tensor in source.tensors}
    save_file(tensors, decoded / "model.safetensors", metadata={"format": "pt"})
    return coded, decoded


def result_of(model: Path, directory: Path, recipe: tuple[str, ...]) -> tuple[Workplace, Any]:
    directory.mkdir()
    place = Workplace(directory, model)
    planned = preview(place.request(*recipe)).plan
    outcome = place.run(*recipe)
    assert outcome.published, outcome
    return place, planned


def whole(directory: Path) -> int:
    """Bytes of all tensors."""
    return sum(info.size_bytes for info in read_headers(directory).values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3-next-token"])
def test_unquantised(tiny_model: TinyModel, tmp_path: Path, name: str, form: str) -> None:
    """The decoded model, which transformers loads; sizes are planned to the byte."""
    coded, decoded = in_form(form, name, tiny_model, tmp_path)
    place, planned = result_of(coded, tmp_path / "out", NONE)
    found = load_file(place.output / "model.safetensors")
    expected = load_file(decoded / "model.safetensors")
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        assert values.dtype == found[tensor].dtype
        assert torch.equal(values, found[tensor]), tensor
    assert (planned.source_size_bytes, planned.size_bytes) == (whole(coded), whole(place.output))
    noted = any("written in 16 bits" in note for note in planned.notes)
    assert noted is (form != "fused")
    tokens = torch.tensor(random_tokens(2, 12))
    with torch.no_grad():
        logits, theirs = (plain_model(path)(tokens).logits for path in (place.output, decoded))
    assert torch.equal(logits, theirs)


@pytest.mark.parametrize("recipe", [PRUNED, GPTQ], ids=["pruned", "gptq"])
@pytest.mark.parametrize("form", ["fp8", "fused-fp8", "mxfp4"])
def test_the_result_is_that_of_the_decoded_model(
    tiny_model: TinyModel, tmp_path: Path, form: str, recipe: tuple[str, ...]
) -> None:
    coded, decoded = in_form(form, "qwen2_moe", tiny_model, tmp_path)
    place, _ = result_of(coded, tmp_path / "a", recipe)
    plain, _ = result_of(decoded, tmp_path / "b", recipe)
    found = load_file(place.output / "model.safetensors")
    expected = load_file(plain.output / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    configs = [json.loads((p.output / "config.json").read_text()) for p in (place, plain)]
    assert configs[0] == configs[1]
    assert place.plan().size_bytes == whole(place.output)
    profile = (place.output / "se_compress" / "profile.json").read_text()
    super_experts = from_json(ExpertProfile, profile, "profile.json").super_experts
    assert [one.id for one in super_experts] == [SUPER]
