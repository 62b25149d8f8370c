"""What lies beside the weights: copied by kind, refused, or left out by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from se_compress.errors import SourceError
from se_compress.opening.auxiliary import (
    LFS_POINTER,
    Auxiliary,
    copied_text,
    find_auxiliary,
    pretty,
    printable,
    result_config,
)

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "qwen.tiktoken",
    "tekken.json", "sentencepiece.bpe.model", "tokenizer.model.v3", "chat_template.jinja",
    "chat_template.json", "tool_use.jinja", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "configuration.json", "LICENSE", "LICENCE.txt", "License.md",
    "LICENSE-MODEL", "MODEL_LICENSE", "NOTICE", "Notice.txt", "COPYING", "USE_POLICY.md",
    "third_party_notices.txt",
)  # fmt: skip
LEFT_OUT = (
    "backup.zip", "model.tar.gz", "old.7z", "tokenizer.json.bak", "config.json~", "train.log",
    "events.out.tfevents.1", ".env", ".hf_token", "token", "hf_token.txt", "credentials.json",
    "id_rsa", "optimizer.pt", "scheduler.pt", "rng_state.pth", "stuff.pkl", "epoch.ckpt", "run.sh",
    "modeling_x.py", "setup.cfg", "pytorch_model.bin", "pytorch_model.bin.index.json", "x.gguf",
    "model.onnx", "weights.h5", "weights.msgpack", "params.json", "trainer_state.json",
    "training_args.bin", "notes.txt", "optimizer.model", "adapter_config.json", "license_key.pem",
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    return directory


def find(model: Path, keep_code: bool = False, **config: Any) -> Auxiliary:
    return find_auxiliary(model, config, keep_code)


@pytest.mark.parametrize("name", COPIED)
def test_what_a_loader_or_a_user_wants_is_copied(model: Path, name: str) -> None:
    (model / name).write_text("{}", encoding="utf-8")
    found = find(model)
    assert found.files == {name: model / name}
    assert (found.left_out, found.notes, found.size_bytes) == ((), (), 2)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_anything_else_is_left_out_and_named(model: Path, name: str) -> None:
    (model / name).write_text("{}", encoding="utf-8")
    found = find(model)
    assert found.files == {}
    assert found.left_out == (name,)
    assert found.notes == (
        f"what lies beside the weights and no loader wants stays out of the result: {name}",
    )


@pytest.mark.parametrize(
    "name",
    ["config.json", "README.md", "model.safetensors", "model.safetensors.index.json",
     "model-00001-of-00002.safetensors", ".gitattributes", "quantize_config.json"],
)  # fmt: skip
def test_what_the_result_has_of_its_own_is_neither_copied_nor_missed(
    model: Path, name: str
) -> None:
    (model / name).write_text("{}", encoding="utf-8")
    assert find(model) == Auxiliary({}, (), (), ())


def test_templates_of_a_directory_are_copied_with_it(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("x", encoding="utf-8")
    (model / "additional_chat_templates" / "run.py").write_text("x", encoding="utf-8")
    assert list(find(model).files) == ["additional_chat_templates/rag.jinja"]


def test_the_sentence_stays_short_whatever_the_names(model: Path) -> None:
    names = [f"{letter * 200}\n.log" for letter in "abcdefg"]
    for name in names:
        (model / name).write_text("x", encoding="utf-8")
    (model / os.fsdecode(b"\xff.log")).write_text("x", encoding="utf-8")
    found = find(model)
    assert len(found.left_out) == 8
    (note,) = found.notes
    assert len(note) < 300
    assert "\n" not in note
    assert "stays out of the result (8 entries): " in note
    assert note.endswith("and 4 more")
    note.encode()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain-1.txt", "plain-1.txt"),
        ("a\x1b[31mb", "a??31mb"),
        (os.fsdecode(b"\xff"), "?"),
        ("[x](http:y)<b>`", "?x??http?y??b??"),
        ("größe.log", "größe.log"),
    ],
)
def test_names_are_printable(name: str, shown: str) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize("depth", [400, 600, 900])
def test_configs_that_cannot_be_copied_later_are_refused_now(model: Path, depth: int) -> None:
    config = json.loads('{"a":' * depth + "1" + "}" * depth)
    refusal = ""
    try:
        find(model, **config)
    except SourceError as error:
        refusal = str(error)
    if not refusal:  # how deep is too deep is Python's affair
        assert json.loads(pretty(result_config(config, keep_code=False))) == config
    else:
        assert "nested too deep" in refusal


def test_half_a_surrogate_pair_is_written_as_it_came() -> None:
    text = pretty({"a": "\ud800", "ä": 1})
    assert json.loads(text.encode()) == {"a": "\ud800", "ä": 1}


def test_a_config_of_gigabytes_is_not_read(model: Path) -> None:
    with (model / "tokenizer_config.json").open("wb") as file:
        file.truncate(2**40)
    assert "tokenizer_config.json: is larger than any config" in refused(model)


# ------------------------------------------------------------------------------------- refusals


def refused(model: Path, keep_code: bool = False, **config: Any) -> str:
    with pytest.raises(SourceError) as caught:
        find(model, keep_code, **config)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "LICENSE"])
def test_links_to_nowhere_are_refused(model: Path, name: str) -> None:
    (model / name).symlink_to("../../blobs/" + "0" * 64)
    assert refused(model) == (
        f"{model}: {name} is a link to nowhere; put the file there, or remove it"
    )


def test_a_link_to_itself_is_refused(model: Path) -> None:
    (model / "LICENSE").symlink_to("LICENSE")
    assert "LICENSE cannot be read (Too many levels" in refused(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenizer.model"])
def test_lfs_pointers_are_refused(model: Path, name: str) -> None:
    (model / name).write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 3\n")
    assert refused(model).startswith(f"{model}: {name} is a Git LFS pointer")


@pytest.mark.parametrize("target", ["/etc/hostname", "../private.txt", "../model2/LICENSE"])
def test_links_out_of_the_model_are_refused(model: Path, target: str) -> None:
    (model.parent / "model2").mkdir()
    for file in (model.parent / "private.txt", model.parent / "model2" / "LICENSE"):
        file.write_text("secret", encoding="utf-8")
    (model / "NOTICE").symlink_to(target)
    assert "NOTICE is a link out of the model's directory" in refused(model)


def test_links_within_the_model_are_followed(model: Path) -> None:
    (model / "texts").mkdir()
    (model / "texts" / "l").write_text("x", encoding="utf-8")
    (model / "LICENSE").symlink_to("texts/l")
    assert list(find(model).files) == ["LICENSE"]


def test_the_blobs_of_the_hub_s_cache_are_the_model_s(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / ("0" * 40)).write_text("x", encoding="utf-8")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/" + "0" * 40)
    assert list(find(snapshot).files) == ["tokenizer.json"]
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (other / ("1" * 40)).write_text("x", encoding="utf-8")
    (snapshot / "LICENSE").symlink_to("../../../models--owner--other/blobs/" + "1" * 40)
    assert "LICENSE is a link out of" in refused(snapshot)


def test_pipes_and_directories_are_refused_without_waiting(model: Path) -> None:
    os.mkfifo(model / "chat_template.jinja")
    assert "chat_template.jinja is not a plain file" in refused(model)
    (model / "chat_template.jinja").unlink()
    (model / "vocab.json").mkdir()
    assert "vocab.json is not a plain file" in refused(model)


@pytest.mark.parametrize("name", ["LICENSES", "licences", "NOTICES", "LICENSE"])
def test_a_directory_of_licences_is_left_out_and_named(model: Path, name: str) -> None:
    (model / name).mkdir()
    (model / name / "MIT.txt").write_text("text", encoding="utf-8")
    found = find(model)
    assert (found.files, found.left_out) == ({}, (name,))


def test_pipes_that_nobody_wants_are_left_out(model: Path) -> None:
    os.mkfifo(model / "pipe")
    (model / "nowhere.log").symlink_to("gone")
    assert find(model).left_out == ("nowhere.log", "pipe")


# ----------------------------------------------------------------------------------------- code

AUTO_MAP = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModelForCausalLM": "modeling_x.XForCausalLM",
    "AutoTokenizer": ["tokenization_x.XTokenizer", None],
    "AutoModel": "owner/name--modeling_y.Y",
}
CODE = {
    "configuration_x.py": "raise SystemExit('it ran')",
    "modeling_x.py": "from .configuration_x import X\nfrom .layers.norm import (\n  Norm,\n)\n",
    "layers/norm.py": "from . import deep\nfrom ..common import a\nimport torch\n",
    "layers/deep.py": "",
    "common.py": "from .package import b",
    "package/__init__.py": "",
    "tokenization_x.py": "",
    "unused.py": "",
}


@pytest.fixture
def with_code(model: Path) -> Path:
    for name, text in CODE.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text, encoding="utf-8")
    (model / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": AUTO_MAP, "chat": "x"}), encoding="utf-8"
    )
    return model


def test_code_is_neither_copied_nor_named_unless_it_is_asked_for(with_code: Path) -> None:
    found = find(with_code, auto_map=AUTO_MAP)
    assert list(found.files) == ["tokenizer_config.json"]
    assert found.code == ()
    assert found.notes[0] == (
        "the code that config.json, tokenizer_config.json names (auto_map) is not in the result, "
        "nor is it named there: transformers has the model itself; --keep-remote-code keeps both"
    )
    text = copied_text("tokenizer_config.json", with_code / "tokenizer_config.json", False)
    assert text is not None
    assert json.loads(text) == {"chat": "x"}


def test_code_that_is_asked_for_comes_with_all_that_it_imports(with_code: Path) -> None:
    found = find(with_code, True, auto_map=AUTO_MAP)
    assert found.code == tuple(sorted(CODE.keys() - {"unused.py"}))
    assert found.files.keys() == {*found.code, "tokenizer_config.json"}
    assert found.notes[0].startswith("kept on demand: what config.json, tokenizer_config.json")
    assert copied_text("tokenizer_config.json", with_code / "tokenizer_config.json", True) is None


@pytest.mark.parametrize(
    ("reference", "reason"),
    [("gone.X", "gone.py is named by auto_map and not there"),
     ("../x.X", "/x.py"),
     ("broken.X", "broken.py is not Python that can be read"),
     ("linked.X", "linked.py is a link out of the model's directory"),
     ("hole.X", "hole.py is a link to nowhere")],
)  # fmt: skip
def test_code_that_cannot_come_along_is_refused(
    with_code: Path, reference: str, reason: str
) -> None:
    (with_code.parent / "x.py").write_text("", encoding="utf-8")
    (with_code / "broken.py").write_text("def (", encoding="utf-8")
    (with_code / "linked.py").symlink_to("../x.py")
    (with_code / "hole.py").symlink_to("nothing.py")
    assert reason in refused(with_code, True, auto_map={"AutoConfig": reference})


@pytest.mark.parametrize(
    "config",
    [{"auto_map": AUTO_MAP}, {"text_config": {"auto_map": AUTO_MAP}},
     {"parts": [{"custom_pipelines": {"x": {"impl": "pipeline.X"}}}]}],
)  # fmt: skip
def test_a_config_is_rid_of_code_at_any_depth(config: dict[str, Any]) -> None:
    text = json.dumps(result_config(config, keep_code=False))
    assert "auto_map" not in text
    assert "custom_pipelines" not in text
    assert result_config(config, keep_code=True) == config


def test_a_word_of_the_vocabulary_is_no_code(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {"vocab": {"auto_map": 1}}}', encoding="utf-8")
    assert copied_text("tokenizer.json", model / "tokenizer.json", False) is None
    assert find(model).notes == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [("_attn_implementation", "flash_attention_2"), ("attn_implementation", "someone/kernel"),
     ("_experts_implementation", "deepgemm"), ("_attn_implementation_internal", {"": "x"})],
)  # fmt: skip
def test_what_only_the_machine_of_training_had_is_dropped_and_told(
    model: Path, key: str, value: object
) -> None:
    config = {"hidden_size": 4, key: value, "sub": {key: value}}
    assert result_config(config, keep_code=True) == {"hidden_size": 4, "sub": {}}
    assert any(key in note for note in find(model, **config).notes)


def test_what_every_machine_has_stays() -> None:
    config = {"_attn_implementation": "eager", "attn_implementation": "sdpa"}
    assert result_config(config, keep_code=False) == config
