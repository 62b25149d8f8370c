"""The digest stands for what a model is: contents, and neither times nor places."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_config, edit_weights

from se_compress.opening import digest
from se_compress.opening.headers import INDEX_FILE
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]
NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(params=["whole", "sampled"])
def model(
    request: pytest.FixtureRequest,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A copy that a test may change; small enough to be read whole, or as if it were not."""
    if request.param == "sampled":
        monkeypatch.setattr(digest, "WHOLE_BYTES", 0)
    return shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "model")


def digest_of(path: Path) -> str:
    return open_source(str(path)).digest


def swap(path: Path, changes: Mapping[str, torch.Tensor]) -> None:
    """Other weights in a file of the same size and time, as `cp -p` leaves it."""
    file = path / "model.safetensors"
    before = file.stat()
    edit_weights(path, changes)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_times_and_places_do_not_count(model: Path) -> None:
    first = digest_of(model)
    assert digest_of(model) == first
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert digest_of(model) == first
    subprocess.run(["cp", "-r", model, model.with_name("copy")], check=True)
    assert digest_of(model.with_name("copy")) == first
    model.with_name("link").symlink_to(model)
    assert digest_of(model.with_name("link")) == first


def test_a_config_counts_as_what_it_means(model: Path) -> None:
    first = digest_of(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts": "8"}, indent=9))
    assert digest_of(model) == first
    edit_config(model, rms_norm_eps=0.5)
    assert digest_of(model) != first


@pytest.mark.parametrize("name", [NORM, EXPERT, "lm_head.weight", "model.embed_tokens.weight"])
def test_other_weights_of_the_same_size_and_time(model: Path, name: str) -> None:
    first = digest_of(model)
    weight = load_file(model / "model.safetensors")[name]
    swap(model, {name: weight * 1.25})
    changed = digest_of(model)
    assert changed != first
    swap(model, {name: weight})
    assert digest_of(model) == first


def test_headers_count(model: Path) -> None:
    first = digest_of(model)
    tensors = load_file(model / "model.safetensors")
    edit_weights(model, {NORM: tensors[NORM].half()})
    halved = digest_of(model)
    weight_map = dict.fromkeys(tensors, "one.safetensors")
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "one.safetensors")
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert len({first, halved, digest_of(model)}) == 3


def test_a_byte_of_a_small_model_counts(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model("mixtral"), tmp_path / "model")
    first = digest_of(path)
    file = path / "model.safetensors"
    for place in (1, file.stat().st_size // 3, file.stat().st_size // 2):
        content = bytearray(file.read_bytes())
        content[-place] ^= 1
        file.write_bytes(content)
        try:
            assert digest_of(path) != first
        finally:
            content[-place] ^= 1
            file.write_bytes(content)
    assert digest_of(path) == first


def test_the_name_of_a_blob_counts(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the size that is read whole, the hash that the Hub's cache names a file by."""
    monkeypatch.setattr(digest, "WHOLE_BYTES", 0)
    found = set()
    for letter in "ab":
        home = tmp_path / letter / "models--owner--name"
        snapshot = shutil.copytree(tiny_model("mixtral"), home / "snapshots" / ("c" * 40))
        (home / "blobs").mkdir()
        blob = home / "blobs" / (letter * 64)
        (snapshot / "model.safetensors").rename(blob)
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
        found.add(digest_of(snapshot))
    assert len(found) == 2


def test_no_weight_is_read_before_the_digest_is_wanted(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> str:
        raise AssertionError("the digest was worked out")

    monkeypatch.setattr("se_compress.opening.source.contents_digest", never)
    source = open_source(str(model))
    with pytest.raises(AssertionError, match="the digest was worked out"):
        _ = source.digest
