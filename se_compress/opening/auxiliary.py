"""What lies beside the weights of a model, and what of it goes into the result. No torch.

Copied is what a loader or a user of the model wants, by kind: the tokenizer's files, templates,
configs, licences. Anything else (scripts, pickles, archives, logs, secrets, other formats of the
weights) stays where it is, and is named once.

A file of these kinds that cannot be copied as what it claims to be is an error, and one that leads
out of the model's directory would publish what its owner did not choose to. Code that a config
names (`auto_map`) goes along only where the user asks for it: otherwise the result does not name it
either, so that it opens with `trust_remote_code=True` as well as without.
"""

import ast
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from se_compress.errors import SourceError
from se_compress.opening.headers import INDEX_FILE

_TOKENIZER = (
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|tekken\.json|"
    r"vocab\.(json|txt|bpe)|merges\.txt|normalizer\.json|[\w.-]+\.(tiktoken|spm)|"
    r"[\w.-]*(tokenizer|spiece|sentencepiece|bpe)[\w.-]*\.model|tokenizer\.model\.v\w+"
)
_TEMPLATE = r"[\w.-]+\.(jinja|jinja2|j2)|chat_template\.json"
_CONFIG = r"(generation|preprocessor|processor|video_preprocessor)_config\.json|configuration\.json"
_LICENCE = (
    r"(?i:[\w-]*(licen[cs]es?|notices?|copying|copyright|use[-_]?policy)[\w-]*"
    r"(\.(txt|md|rst|html|pdf))?)"
)
WANTED = re.compile("|".join((_TOKENIZER, _TEMPLATE, _CONFIG, _LICENCE)))
_LICENCES = re.compile(_LICENCE)
_READS_TEXT = re.compile(f"{_TOKENIZER}|{_TEMPLATE}")
TEMPLATE_DIRECTORIES = ("additional_chat_templates", "chat_templates")
# Of the result's own making, or of no use to anybody.
REPLACED = ("config.json", "quantize_config.json", "README.md", INDEX_FILE)
HOUSEKEEPING = (".git", ".gitattributes", ".gitignore", ".cache")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CODE_KEYS = ("auto_map", "custom_pipelines")
# What every machine with transformers has; another one was that of the machine it was trained on.
PORTABLE = ("eager", "sdpa", "grouped_mm", "batched_mm")
_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
LISTED, LONGEST_NAME = 4, 40
LARGEST_CONFIG_BYTES = 2**26


@dataclass(frozen=True)
class Auxiliary:
    """Files to copy by their names in the result, what is left out, and sentences for the reader.

    code  names of the Python files among them; empty unless the user asked for it
    """

    files: Mapping[str, Path]
    code: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())


def find_auxiliary(path: Path, config: Mapping[str, Any], keep_code: bool = False) -> Auxiliary:
    """What of a model's directory is copied into its result.

    Raises SourceError for a file that would be copied but is a link to nowhere or out of the model,
    a Git LFS pointer, no file at all, or unreadable; with `keep_code` also for code that is named
    and not there. What can be copied now can be copied after the hours.
    """
    try:
        found = _find(path, config, keep_code)
        pretty(result_config(config, keep_code))
        for name, file in found.files.items():
            copied_text(name, file, keep_code)
    except RecursionError:
        raise SourceError(f"{path}: a config is nested too deep to be copied") from None
    return found


def _find(path: Path, config: Mapping[str, Any], keep_code: bool) -> Auxiliary:
    files = {name: _checked(path, name) for name in sorted(_wanted(path))}
    named = {"config.json": config, **_configs(files)}
    mapped = [name for name, value in named.items() if any(_mapped(value))]
    code = tuple(sorted(_code_of(path, named.values()))) if keep_code else ()
    files |= {name: path / name for name in code}
    left_out = tuple(_left_out(path, files))
    notes = [*_code_notes(mapped, code, keep_code), *_implementation_notes(config)]
    if left_out:
        count = f" ({len(left_out)} entries)" if left_out[1:] else ""
        notes.append(
            f"what lies beside the weights and no loader wants stays out of the result{count}: "
            f"{_listed(left_out)}"
        )
    return Auxiliary(files, code, left_out, tuple(notes))


def reads_text(name: str) -> bool:
    """Whether a file decides which tokens become of a text: of the tokenizer, or a template."""
    return _READS_TEXT.fullmatch(name.rpartition("/")[2]) is not None


def copied_text(name: str, file: Path, keep_code: bool) -> str | None:
    """A config without the code that it names; None if the file is copied as it is."""
    if keep_code or not name.endswith("_config.json"):
        return None
    value = _read_json(file)
    return pretty(without(value, CODE_KEYS)) if any(_mapped(value)) else None


def result_config(config: Mapping[str, Any], keep_code: bool) -> dict[str, Any]:
    """config.json less what only the machine of its origin has, and less code nobody asked for."""
    unportable = tuple({key for key, _ in _unportable(config)})
    plain: dict[str, Any] = without(config, unportable)
    return plain if keep_code else without(plain, CODE_KEYS)


def without(value: Any, keys: Iterable[str]) -> Any:
    """A JSON value without some keys, at any depth."""
    if isinstance(value, Mapping):
        return {k: without(v, keys) for k, v in value.items() if k not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value


def pretty(value: Mapping[str, Any]) -> str:
    """JSON that UTF-8 can hold: half a surrogate pair stays escaped, and all else with it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    return text + "\n"


# ---------------------------------------------------------------------------------------- the files


def _wanted(path: Path) -> Iterator[str]:
    for entry in _entries_of(path):
        if WANTED.fullmatch(entry.name) and entry.name not in REPLACED:
            if not (entry.is_dir() and _LICENCES.fullmatch(entry.name)):  # as REUSE has one
                yield entry.name
        elif entry.name in TEMPLATE_DIRECTORIES and entry.is_dir():
            inner = (file for file in _entries_of(entry) if file.suffix == ".jinja")
            yield from (f"{entry.name}/{file.name}" for file in inner)


def _entries_of(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise SourceError(f"{directory}: cannot be read ({error.strerror})") from None


def _checked(path: Path, name: str) -> Path:
    file = path / name
    where = f"{path}: {printable(name)}"
    try:
        kind = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(
            f"{where} is a link to nowhere; put the file there, or remove it"
        ) from None
    except OSError as error:
        raise SourceError(f"{where} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(kind):
        raise SourceError(f"{where} is not a plain file; put the file there, or remove it")
    if not is_of_model(path, file):
        raise SourceError(
            f"{where} is a link out of the model's directory, and would be published; "
            "put the file there, or remove it"
        )
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise SourceError(f"{where} cannot be read ({error.strerror})") from None
    if start == LFS_POINTER:
        raise SourceError(f"{where} is a Git LFS pointer, not the file (git lfs pull fetches it)")
    return file


def is_of_model(path: Path, file: Path) -> bool:
    """Whether a file lies in the model's directory, or in the Hub's cache behind it: there
    snapshots/COMMIT holds links into the blobs of the same repository."""
    root, real = path.resolve(), file.resolve()
    cached = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    return cached or real.is_relative_to(root)


def _left_out(path: Path, copied: Mapping[str, Path]) -> Iterator[str]:
    for entry in _entries_of(path):
        weights = entry.suffix == ".safetensors" and not entry.is_dir()
        known = entry.name in (*REPLACED, *HOUSEKEEPING, *TEMPLATE_DIRECTORIES)
        if not weights and not known and entry.name not in copied:
            yield entry.name


# ------------------------------------------------------------------------------------------ configs


def _configs(files: Mapping[str, Path]) -> dict[str, Any]:
    return {name: _read_json(file) for name, file in files.items() if name.endswith("_config.json")}


def _read_json(file: Path) -> Any:
    """None for what is no JSON: whoever needs the file says so."""
    if file.stat().st_size > LARGEST_CONFIG_BYTES:
        raise SourceError(f"{file}: is larger than any config ({LARGEST_CONFIG_BYTES} bytes)")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value and what it holds, at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _pairs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner)


def _mapped(value: Any) -> Iterator[Any]:
    return (inner for key, inner in _pairs(value) if key in CODE_KEYS)


def _unportable(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in _pairs(config):
        if _IMPLEMENTATIONS.fullmatch(key) and value is not None and value not in PORTABLE:
            yield key, value


# --------------------------------------------------------------------------------------------- code


def _code_of(path: Path, configs: Iterable[Any]) -> set[str]:
    """Names of the files that configs name as code, and of what these import beside them."""
    waiting = {
        f"{reference.rpartition('.')[0].replace('.', '/')}.py"
        for config in configs
        for mapped in _mapped(config)
        for reference in _strings(mapped)
        if "--" not in reference and "." in reference  # "owner/name--": of another repository
    }
    found = set[str]()
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= set(_imports(path, name)) - found
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(inner)


def _imports(path: Path, name: str) -> Iterator[str]:
    """What a file imports from its own directory, as names of files in the model's directory."""
    file = path / name
    where = f"{path}: {printable(name)}"
    if ".." in Path(name).parts or name.startswith("/"):
        raise SourceError(f"{where} lies outside of the model's directory")
    if not os.path.lexists(file):
        raise SourceError(
            f"{where} is named by auto_map and not there; --keep-remote-code needs it"
        )
    try:
        tree = ast.parse(_checked(path, name).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise SourceError(f"{where} is not Python that can be read ({error})"[:300]) from None
    here = Path(name).parent
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = here
        for _ in range(node.level - 1):
            base = base.parent
        if node.module:
            yield _module_file(path, base / node.module.replace(".", "/"))
        else:
            yield from (f"{base / alias.name}.py" for alias in node.names)


def _module_file(path: Path, module: Path) -> str:
    package = module / "__init__.py"
    return str(package) if (path / package).exists() else f"{module}.py"


# -------------------------------------------------------------------------------------------- notes


def _code_notes(mapped: list[str], code: tuple[str, ...], keep_code: bool) -> Iterator[str]:
    if mapped and keep_code:
        yield (
            f"kept on demand: what {_listed(mapped)} names as code ({_listed(code)}); whoever "
            "opens the result with trust_remote_code=True runs it"
        )
    elif mapped:
        yield (
            f"the code that {_listed(mapped)} names (auto_map) is not in the result, nor is it "
            "named there: transformers has the model itself; --keep-remote-code keeps both"
        )


def _implementation_notes(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in _unportable(config):
        yield (
            f"config.json: {key} {printable(str(value))} is not in the result, as another machine "
            "may not have it"
        )


def _listed(names: Iterable[str]) -> str:
    named = [printable(name) for name in names]
    more = f" and {len(named) - LISTED} more" if len(named) > LISTED else ""
    return ", ".join(named[:LISTED]) + more


def printable(name: str) -> str:
    """A name of any length and any bytes, as it may stand in a message or a page."""
    shown = re.sub(r"[^\w.+@=,~#/ -]", "?", name)
    return shown if len(shown) <= LONGEST_NAME else shown[: LONGEST_NAME - 3] + "..."
