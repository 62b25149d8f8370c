"""What a model's tokenizer is, is named in one line, and no code of the model's own runs."""

import json
import os
from pathlib import Path

import pytest
from tiny import save_tokenizer

from se_compress.errors import SourceError
from se_compress.text.tokenizer import load_tokenizer

FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2"]
# Both are named: what transformers takes from the config, and what lies in the directory.
CODE = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_x.TikTokenTokenizer", None]},
}
PIECES = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"


def model(path: Path, family: str = "mixtral", **files: object) -> Path:
    """A directory with a config and `files`; "__" in a name stands for its dot."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": family}))
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        raw = text if isinstance(text, bytes) else text.encode()
        (path / name.replace("__", ".")).write_bytes(raw)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) - len(str(path)) < 330
    assert "Exception" not in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [None, "LlamaTokenizer", "Qwen2Tokenizer", "CanineTokenizer"])
def test_none_at_all(tmp_path: Path, family: str, kind: str | None) -> None:
    """transformers makes an empty tokenizer of nothing for some of these, and reads on."""
    files = {"tokenizer_config__json": {"tokenizer_class": kind}} if kind else {}
    path = model(tmp_path, family, **files)
    assert refusal(path) == f"{path}: there is no tokenizer.json in it"


@pytest.mark.parametrize("family", FAMILIES)
def test_sentencepiece_only(tmp_path: Path, family: str) -> None:
    message = refusal(model(tmp_path, family, tokenizer__model=PIECES))
    assert (
        "its tokenizer is of sentencepiece (tokenizer.model) and has no tokenizer.json" in message
    )
    assert message.endswith("put a tokenizer.json beside it")


@pytest.mark.parametrize("name", ["qwen__tiktoken", "tekken__json"])
def test_other_formats_only(tmp_path: Path, name: str) -> None:
    message = refusal(model(tmp_path, **{name: "{}"}))
    assert name.replace("__", ".") in message
    assert message.endswith("put a tokenizer.json beside it")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": CODE},
        {"tokenizer_config__json": CODE | {"auto_map": ["tokenization_x.TikTokenTokenizer", None]}},
        {"tokenizer_config__json": {"tokenizer_class": "Unheard"}},
        {"tokenizer_config__json": CODE, "vocab__json": {"a": 0}, "merges__txt": "#version: 0.2\n"},
        {"qwen__tiktoken": "YQ== 0\n"},
    ],
)
def test_code_of_its_own_is_named_and_not_run(
    tmp_path: Path, family: str, files: dict[str, object]
) -> None:
    mark = tmp_path / "mark"
    path = model(tmp_path / "m", family, **files, tokenization_x__py=f"open({str(mark)!r}, 'w')")
    assert "its tokenizer is code of its own (tokenization_x" in refusal(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"tokenizer__json": ""}, "tokenizer.json is not JSON"),
        ({"tokenizer__json": b"\xff\xfe\x00"}, "tokenizer.json is not JSON"),
        ({"tokenizer__json": "[" * 100_000}, "tokenizer.json is not JSON"),
        ({"tokenizer__json": "[]"}, "tokenizer.json is not a JSON object"),
        ({"tokenizer__json": "{}"}, "tokenizer.json has no model in it"),
        ({"tokenizer__json": {"model": {"type": "BPE"}}}, "unusable tokenizer: "),
        ({"tokenizer__json": POINTER}, "is a Git LFS pointer, not the file that it stands for"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config__json": "[1]"}, "tokenizer_config.json is not a JSON object"),
        ({"tokenizer_config__json": {"tokenizer_class": 5}}, "tokenizer_class is 5, not a name"),
        ({"vocab__json": {"h": 0}, "merges__txt": "#version: 0.2\nh e\n"}, "unusable tokenizer: "),
    ],
)
def test_corrupt_files(tmp_path: Path, files: dict[str, object], problem: str) -> None:
    if not {"tokenizer__json", "vocab__json"} & files.keys():
        save_tokenizer(tmp_path)
    assert problem in refusal(model(tmp_path, "qwen2_moe", **files))


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
     "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model"],
)  # fmt: skip
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = model(save_tokenizer(tmp_path), "qwen2_moe")
    file = path / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    assert f"{name}: is a device or pipe, not a file" in refusal(path)
    file.unlink()
    file.symlink_to("nowhere")
    assert f"{name}: is a link to nowhere" in refusal(path)
    file.unlink()
    file.mkdir()
    assert f"{name}: is a directory, not a file" in refusal(path)


def test_a_class_that_does_not_fit_is_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    settings = {"tokenizer_class": "T5Tokenizer"}
    path = model(tmp_path, "qwen3_moe", tokenizer_config__json=settings)
    assert "(its class is T5Tokenizer)" in refusal(path)


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Unheard", None])
def test_a_tokenizer_json_is_enough(tmp_path: Path, kind: str | None) -> None:
    save_tokenizer(tmp_path)
    settings = {"tokenizer_class": kind} if kind else {}
    path = model(tmp_path, "deepseek_v2", tokenizer_config__json=settings)
    assert load_tokenizer(path)("the", add_special_tokens=False)["input_ids"]
