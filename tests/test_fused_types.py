"""Model types that exist with fused experts only: read, written and loaded in that form."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sourced import source_formats
from test_pipeline import Workplace
from test_pipeline import no_engine as no_engine
from tiny import plain_model, random_tokens, recipe, save_tokenizer
from tiny_types import build_composite
from transformers import AutoModelForCausalLM, Mxfp4Config

from se_compress.artifacts import RunOptions
from se_compress.compression.execute import compress
from se_compress.opening.families import FAMILIES
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan

TinyType = Callable[[str], Path]
PUBLISHED = [name for name, family in FAMILIES.items() if family.published_fused]


def as_it_is(model: Path, directory: Path) -> Path:
    """What `method: none` makes of a model."""
    source = open_source(str(model))
    chosen = recipe(model, directory, target="transformers", quantization={"method": "none"})
    plan = make_plan(source, None, chosen)
    compress(source, plan, [[1] * 8], chosen, directory, RunOptions())
    assert source.size_bytes == sum(info.size_bytes for info in read_headers(model).values())
    assert plan.size_bytes == sum(info.size_bytes for info in read_headers(directory).values())
    return directory


@pytest.mark.parametrize("name", PUBLISHED)
def test_taken_apart_and_put_together(tiny_type: TinyType, tmp_path: Path, name: str) -> None:
    """Every matrix and bias of every expert has its place: the file comes back."""
    result = as_it_is(tiny_type(name), tmp_path / "result")
    source = open_source(str(tiny_type(name)))
    before, after = (load_file(d / "model.safetensors") for d in (tiny_type(name), result))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    fused = [tensor for tensor in before if tensor not in source.tensors]
    assert len(fused) == len(source.moe_layers) * len(
        {t.rpartition(".layers.")[2][1:] for t in fused}
    )
    for identity, roles in source.experts.items():
        assert set(roles) == {"gate", "up", "down"}, identity


def gpt_oss(tiny_type: TinyType, directory: Path) -> Path:
    """As it is published: rows first, in blocks of 32 values."""
    path = shutil.copytree(tiny_type("gpt_oss"), directory)
    tensors = load_file(path / "model.safetensors")
    rows = {n: t.transpose(1, 2) if t.dim() == 3 else t for n, t in tensors.items()}
    made = {n: t.contiguous() for n, t in source_formats.in_mxfp4(rows).items()}
    save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = source_formats.settings_of("mxfp4")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_gpt_oss_in_mxfp4(tiny_type: TinyType, tmp_path: Path) -> None:
    """What comes out is what transformers makes of the same file when it dequantises it."""
    path = gpt_oss(tiny_type, tmp_path / "mxfp4")
    result = as_it_is(path, tmp_path / "result")
    theirs = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    ours = AutoModelForCausalLM.from_pretrained(result, dtype=torch.bfloat16)
    expected = theirs.state_dict()
    assert expected.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    config = json.loads((result / "config.json").read_text())
    assert "quantization_config" not in config
    with torch.no_grad():
        assert plain_model(result)(torch.tensor(random_tokens(1, 8))).logits.isfinite().all()


def test_gpt_oss_in_mxfp4_through_the_flow(tiny_type: TinyType, tmp_path: Path) -> None:
    """Two of eight experts of each layer go: slices of fused matrices and biases are left."""
    path = gpt_oss(tiny_type, tmp_path / "mxfp4")
    save_tokenizer(path, bos=True)
    place = Workplace(tmp_path, path)
    outcome = place.run("target=transformers", "quantization={method: none}",
                        "policy={prune: {fraction: 0.25}}")  # fmt: skip
    assert outcome.published
    found = load_file(outcome.directory / "model.safetensors")
    whole = load_file(as_it_is(path, tmp_path / "whole") / "model.safetensors")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        if "mlp." not in name:
            assert torch.equal(found[name], tensor)
            continue
        layer = int(name.split(".")[2])
        left = [d.expert for d in outcome.plan.experts if d.layer == layer and d.action == "keep"]
        assert len(left) == 6
        assert torch.equal(found[name], tensor[torch.tensor(left)]), name
    with torch.no_grad():
        tokens = torch.tensor(random_tokens(1, 8))
        assert plain_model(outcome.directory)(tokens).logits.isfinite().all()


def test_llama_4_through_the_flow(tmp_path: Path) -> None:
    """As it is published, with a vision tower: two of eight experts of a layer go."""
    path = build_composite(tmp_path / "model", "llama4")
    outcome = Workplace(tmp_path, path).run(
        "target=transformers", "quantization={method: none}", "policy={prune: {fraction: 0.25}}"
    )
    assert outcome.published
    before, found = (load_file(p / "model.safetensors") for p in (path, outcome.directory))
    assert before.keys() == found.keys()
    assert any(name.startswith("vision_model.") for name in found)
    for name, tensor in before.items():
        if ".experts." not in name and ".router." not in name:
            assert torch.equal(found[name], tensor)
            continue
        layer = int(name.partition("layers.")[2].partition(".")[0])
        left = [
            d.expert
            for d in outcome.plan.experts
            if d.layer == layer and d.action == "keep" and isinstance(d.expert, int)
        ]
        assert len(left) == 6
        assert torch.equal(found[name], tensor[torch.tensor(left)]), name
    config = json.loads((outcome.directory / "config.json").read_text())
    assert config["text_config"]["num_local_experts"] == 6
    with torch.no_grad():
        tokens = torch.tensor(random_tokens(1, 8))
        assert plain_model(outcome.directory)(tokens).logits.isfinite().all()
