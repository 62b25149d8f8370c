"""The tokenizer of a model, from its directory: no network, and no code of the model's own.

transformers raises whatever its readers come upon, and makes an empty tokenizer where a model of
some classes has none. So the files are looked at first, and what they are is named.
"""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from se_compress.errors import SourceError, one_line
from se_compress.opening.modelfiles import check_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.*", "*.vocab")
# What transformers reads of a tokenizer beside its vocabulary.
_SETTINGS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip
_FORMATS = {
    "sentencepiece": ("*.model",),
    "tiktoken": ("*.tiktoken",),
    "mistral_common": ("tekken.json",),
}


def load_tokenizer(model_path: Path) -> "PreTrainedTokenizerBase":
    """Raises SourceError with what the tokenizer is, where it is none that can be used."""
    from transformers import AutoTokenizer

    for file in sorted(model_path.glob("*")):
        if any(file.match(pattern) for pattern in (*_VOCABULARIES, *_SETTINGS)):
            check_file(file)  # a pipe, say, is waited for without end
    settings = _read_object(model_path / "tokenizer_config.json") or {}
    fast = _read_object(model_path / "tokenizer.json")
    code = _code_of(model_path, settings)
    if code and fast is None and "auto_map" in settings:
        raise SourceError(f"{model_path}: {code}")  # and not read as what another class makes of it
    if not any(path for pattern in _VOCABULARIES for path in model_path.glob(pattern)):
        raise SourceError(f"{model_path}: " + (code or "there is no tokenizer.json in it"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_path, local_files_only=True, trust_remote_code=False
        )
        if not tokenizer("text", add_special_tokens=False)["input_ids"]:
            raise ValueError("it makes no tokens of a text")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library raises bare Exceptions, and panics no less
        why = code if code and fast is None else _why_unusable(model_path, settings, fast)
        kind = settings.get("tokenizer_class")
        cause = f"{one_line(error)}" + (f" (its class is {one_line(kind, 60)})" if kind else "")
        raise SourceError(f"{model_path}: {why or f'unusable tokenizer: {cause}'}") from None
    return tokenizer


def decoder_of(model_path: Path) -> Callable[[Sequence[int]], str]:
    """Token ids to text. Of a model whose tokenizer cannot be used, the ids themselves in brackets:
    what shows text to people then shows that."""
    try:
        tokenizer = load_tokenizer(model_path)
    except SourceError:
        return lambda ids: f"[{' '.join(map(str, ids))}]"
    return lambda ids: str(tokenizer.decode(list(ids)))


def _read_object(file: Path) -> dict[str, Any] | None:
    """A JSON file; None if there is none."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"{file}: unusable tokenizer: {error.strerror}") from None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{file.parent}: unusable tokenizer: {file.name} is not JSON ({one_line(error)})"
        ) from None
    if not isinstance(found, dict):
        raise SourceError(f"{file.parent}: unusable tokenizer: {file.name} is not a JSON object")
    return found


def _code_of(model_path: Path, settings: dict[str, Any]) -> str:
    """Says that the tokenizer is code of the model's own; "" if nothing points to it."""
    named = settings.get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    names = [name for name in named if name] if isinstance(named, list) else [named]
    scripts = sorted(path.name for path in model_path.glob("tokeniz*.py"))
    where = next((str(name) for name in names if name), None) or next(iter(scripts), None)
    if where is None:
        return ""
    return (
        f"its tokenizer is code of its own ({one_line(where, 80)}), which is not run; convert it "
        "to a tokenizer.json and put that beside it"
    )


def _why_unusable(model_path: Path, settings: dict[str, Any], fast: dict[str, Any] | None) -> str:
    """What the files say of a tokenizer that failed to load; "" if nothing special."""
    kind = settings.get("tokenizer_class")
    if kind is not None and not isinstance(kind, str):
        return f"unusable tokenizer: tokenizer_class is {one_line(repr(kind), 60)}, not a name"
    if fast is not None and not isinstance(fast.get("model"), dict):
        return "unusable tokenizer: tokenizer.json has no model in it"
    if fast is not None:
        return ""
    for package, patterns in _FORMATS.items():
        files = sorted(path.name for pattern in patterns for path in model_path.glob(pattern))
        if files:
            lacks = "" if find_spec(package) else f"install {package}, or "
            return (
                f"its tokenizer is of {package} ({files[0]}) and has no tokenizer.json; "
                f"{lacks}put a tokenizer.json beside it"
            )
    return ""
