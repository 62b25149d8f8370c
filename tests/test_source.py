"""A model is opened from headers alone, its tensors are accounted for, each refusal is one line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, VARIANTS, edit_config, edit_weights

from se_compress.artifacts import ROLES, ExpertId
from se_compress.errors import SourceError
from se_compress.opening.headers import INDEX_FILE
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def model(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "model")


def refusal(path: Path | str, match: str) -> None:
    with pytest.raises(SourceError, match=match) as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value)
    assert str(path).partition("@")[0] in str(caught.value)


# ----------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_and_expert_is_accounted_for(tiny_model: TinyModel, name: str) -> None:
    source = open_source(str(tiny_model(name)))
    family, differs, _ = VARIANTS[name]
    stored = load_file(tiny_model(name) / "model.safetensors")
    assert source.family == family
    assert set(source.tensors) == set(stored)
    assert source.size_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert source.layer_count == {**CONFIGS[family], **differs}["num_hidden_layers"]
    assert source.top_k == CONFIGS[family]["num_experts_per_tok"]
    routed = {i for i in source.experts if i.expert != "shared"}
    assert routed == {
        ExpertId(layer, e) for layer in source.moe_layers for e in range(source.expert_count)
    }
    shared = {i.layer for i in source.experts if i.expert == "shared"}
    assert shared == (set(source.moe_layers) if family[:5] in ("deeps", "qwen2") else set())
    assert list(source.experts) == sorted(source.experts)
    assert all(set(roles) == set(ROLES) for roles in source.experts.values())


def test_torch_is_not_needed(tiny_model: TinyModel) -> None:
    code = (
        "import sys; from se_compress.opening.source import open_source; "
        f"open_source({str(tiny_model('mixtral'))!r}); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_shards(tiny_model: TinyModel, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {name: f"shard-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, model / file)
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    source, single = open_source(str(model)), open_source(str(tiny_model("qwen2_moe")))
    assert set(source.tensors) == set(single.tensors)
    assert set(source.experts) == set(single.experts)
    assert source.size_bytes == single.size_bytes


@pytest.mark.parametrize(
    "name",
    ["model.layers.3.mlp.experts.0.up_proj.weight", "model.layers.3.eh_proj.weight"],
)
def test_layers_behind_the_decoder_are_other(tiny_model: TinyModel, name: str) -> None:
    source = open_source(str(tiny_model("deepseek_v3-next-token")))
    info = source.tensors[name]
    assert (info.kind, info.layer, info.role) == ("other", None, None)
    assert source.moe_layers == (1, 2)
    assert {identity.layer for identity in source.experts} == {1, 2}


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_spellings_of_the_qwen3_expert_count(
    tiny_model: TinyModel, tmp_path: Path, key: str
) -> None:
    """transformers 5 saves num_local_experts; the published checkpoints say num_experts."""
    path = shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "model")
    edit_config(path, num_experts=None, num_local_experts=None)
    edit_config(path, **{key: 8})
    assert open_source(str(path)).expert_count == 8


def test_a_null_quantization_config_is_none(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert open_source(str(model)).family == "qwen2_moe"


# ------------------------------------------------------------------------- the expert set is wrong


def test_missing_expert(model: Path) -> None:
    edit_weights(model, {EXPERT: None})
    refusal(model, rf"{EXPERT} is missing")


def test_missing_shared_expert(model: Path) -> None:
    edit_weights(model, {"model.layers.2.mlp.shared_expert.down_proj.weight": None})
    refusal(model, r"layers\.2\.mlp\.shared_expert\.down_proj\.weight is missing")


def test_wrong_shape(model: Path) -> None:
    edit_weights(model, {EXPERT: torch.zeros(64, 32)})
    refusal(model, rf"{EXPERT} is \[64, 32\], but config\.json says \[32, 64\]")


def test_wrong_width_in_the_config(model: Path) -> None:
    edit_config(model, moe_intermediate_size=48)
    refusal(model, r"experts\.0\.gate_proj\.weight is \[32, 64\], .* \[48, 64\]")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2_moe", "model.layers.1.mlp.gate.weight"),
        ("qwen2_moe", "model.layers.2.mlp.shared_expert_gate.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
)
def test_missing_router(tiny_model: TinyModel, tmp_path: Path, family: str, name: str) -> None:
    model = shutil.copytree(tiny_model(family), tmp_path / "model")
    edit_weights(model, {name: None})
    refusal(model, rf"{name} is missing")


# ------------------------------------------------------------------------------------- the config


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    refusal(model, r"has no config\.json")


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "\x00"])
def test_a_config_that_is_not_json(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    refusal(model, r"config\.json: is not JSON")


def test_a_config_that_is_not_text(model: Path) -> None:
    (model / "config.json").write_bytes(b"\xff\xfe\x00")
    refusal(model, r"config\.json: is not JSON")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("directory", "is a directory, not a file"),
        ("pipe", "is a device or pipe, not a file"),
        ("pointer", "is a Git LFS pointer"),
        ("../nowhere", "is a link to"),
        ("config.json", "is a link to"),
        ("/dev/zero", "is a device or pipe, not a file"),
        ("../outside.json", "leads out of the model's directory"),
    ],
)
def test_a_config_that_is_no_file(model: Path, kind: str, told: str) -> None:
    file = model / "config.json"
    file.rename(model.parent / "outside.json")
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    else:
        file.symlink_to(kind)
    refusal(model, rf"config\.json:? {told}")


def test_the_root_of_a_cached_model(cached: str, offline_cache: Path) -> None:
    root = offline_cache / "models--owner--name"
    refusal(
        root, r"is a repository in the Hub's cache; give the model's id .* \(\S+/snapshots/a+\)"
    )
    assert open_source(str(root / "snapshots" / ("a" * 40))).family == "olmoe"


def test_a_config_that_is_no_object(model: Path) -> None:
    (model / "config.json").write_text("[]")
    refusal(model, r"config\.json: is not a JSON object")


def test_not_a_mixture_of_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    refusal(tmp_path, r"model_type 'llama' is no Mixture-of-Experts model; recipes/MODELS.md lists")


def test_an_unknown_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_os", "num_local_experts": 4}')
    refusal(tmp_path, r"model_type 'gpt_os' is not supported; .* close to this name are gpt_oss")


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "num_experts_per_tok", "moe_intermediate_size"]
)
def test_a_missing_key(model: Path, key: str) -> None:
    edit_config(model, **{key: None})
    refusal(model, rf"config\.json: {key} is missing; an integer from 1 is needed")


def test_a_key_of_the_wrong_type(model: Path) -> None:
    edit_config(model, num_experts="eight")
    refusal(model, r"config\.json: num_experts is 'eight'")


def test_no_layer_has_experts(model: Path) -> None:
    edit_config(model, mlp_only_layers=[0, 1, 2])
    refusal(model, r"config\.json: no layer has experts")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "gptq"}, r"already quantised \(gptq\); give the original checkpoint, or"),
        ({"bits": 4}, r"already quantised \(unknown\)"),
        ("awq", r"already quantised \(awq\)"),
        ({"quant_method": ["a"] * 10**5}, r"already quantised \(a list of 100000 entries\)"),
    ],
)
def test_already_quantised(model: Path, settings: object, told: str) -> None:
    edit_config(model, quantization_config=settings)
    refusal(model, rf"config\.json: .*{told}")


# ------------------------------------------------------------------------------------ the weights


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refusal(model, r"holds no \.safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_only(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"\x80\x02}q\x00.")
    refusal(model, rf"the weights are pickles \({name}\), which can run code")


def test_a_truncated_file(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    refusal(model, r"model\.safetensors: is \d+ bytes long, but its header describes \d+")


def test_a_corrupt_header(model: Path) -> None:
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:16] = b"\x00" * 8
    file.write_bytes(content)
    refusal(model, r"model\.safetensors: has a corrupt safetensors header")


def test_an_index_that_names_a_missing_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    refusal(model, r"names model-00001-of-00002\.safetensors, which is missing")


def test_an_index_that_names_a_tensor_not_in_its_shard(model: Path) -> None:
    names = [*load_file(model / "model.safetensors"), "model.layers.0.gone"]
    weight_map = dict.fromkeys(names, "model.safetensors")
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    refusal(model, r"places model\.layers\.0\.gone in model\.safetensors, which does not hold it")


def test_several_files_and_no_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    save_file({"more": torch.ones(1)}, model / "more.safetensors")
    refusal(model, rf"several weight files \(.*more\.safetensors.*\) but no {INDEX_FILE}")


# ---------------------------------------------------------------------------- where the model is


def test_a_file_instead_of_a_directory(model: Path) -> None:
    refusal(model / "config.json", r"is a file; a model is a directory or a Hub id")


@pytest.mark.parametrize("name", ["gone", "/no/such/place", "a/b/c", "own er/name", "@main"])
def test_neither_directory_nor_hub_id(name: str) -> None:
    refusal(name, r"there is no such directory, and a Hub id is owner/name")


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hugging Face's own offline mode, with an empty cache of models."""
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("name", ["owner/gone", "owner/gone@v1", "models/mistyped-directory"])
def test_an_unreachable_hub(offline_cache: Path, name: str) -> None:
    refusal(name, r"there is no such directory, and as a Hub id: the Hub cannot be reached")


def test_a_pinned_commit_when_the_network_is_down(
    cached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub asks the Hub for a commit's files without looking for it in the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_source(f"{cached}@{'b' * 40}").config["note"] == "an older one"
    refusal(f"{cached}@{'c' * 40}", r"the Hub cannot be reached and its local cache does not")


@pytest.mark.parametrize("name", ["./gone", "../gone", "owner/-name-", "a--b/c", "owner/name.git"])
def test_what_the_hub_would_not_accept_as_an_id(offline_cache: Path, name: str) -> None:
    refusal(name, r"there is no such directory, and")


@pytest.fixture
def cached(tiny_model: TinyModel, offline_cache: Path) -> str:
    """A model in the cache as huggingface_hub lays it out: blobs, snapshots of links, refs. The
    revision v1 has one more key in its config than main."""
    repository = offline_cache / "models--owner--name"
    for revision, commit in {"main": "a" * 40, "v1": "b" * 40}.items():
        snapshot = repository / "snapshots" / commit
        blobs = shutil.copytree(tiny_model("olmoe"), repository / "blobs" / commit)
        if revision == "v1":
            edit_config(blobs, note="an older one")
        snapshot.mkdir(parents=True)
        for file in blobs.iterdir():
            (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return "owner/name"


@pytest.mark.parametrize(
    ("revision", "note"),
    [("", None), ("@main", None), ("@v1", "an older one"), ("@" + "b" * 40, "an older one")],
)
def test_a_cached_model_is_taken_offline(cached: str, revision: str, note: str | None) -> None:
    source = open_source(cached + revision)
    assert source.family == "olmoe"
    assert source.name == cached + revision
    assert source.config.get("note") == note
    assert len(source.experts) == 24


def test_a_revision_that_is_not_cached(cached: str) -> None:
    refusal(f"{cached}@v2", r"the Hub cannot be reached and its local cache does not hold it")


def test_a_directory_comes_before_the_hub(
    cached: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    (model.parent / "owner").mkdir()
    shutil.copytree(model, model.parent / cached)
    assert open_source(cached).family == "qwen2_moe"
