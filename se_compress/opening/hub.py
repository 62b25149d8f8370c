"""Where a model lies: a directory, or a repository of the Hub that is fetched or taken from its
cache. What the Hub answers is told as it is.

The libraries are imported where they are needed: a directory needs none of them.
"""

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from se_compress.errors import ResourceError, SeCompressError, SourceError, one_line

if TYPE_CHECKING:
    from httpx import Request, Response
    from huggingface_hub.errors import HfHubHTTPError

# What a loader may want beside the weights; pickles are left where they are.
HUB_PATTERNS = (
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "README.md"),
    *("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*"),
)
CODE_PATTERN = "*.py"  # only where the user wants the model's own code in the result
# Without these the model cannot be read, or would be another one; all others may lack.
_NEEDED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(
    r"(?!/)(?!.*(\.\.|//|@\{))[^\s\x00-\x1f\x7f~^:?*\[\\]+(?<![/.])"
)  # as git has it
_UNREACHED, _SILENT = "the Hub cannot be reached", "the Hub does not answer in time"
PATIENCE = 30.0  # seconds without a byte, and of tries without any answer
_MEANING = {
    401: "it does not exist or is private; check the name, or log in with `hf auth login`",
    403: "forbidden; log in with a token that may read it",
    404: "not found; check the name",
    429: "too many requests; wait a few minutes, or log in with `hf auth login`",
}


def locate(
    model: str, keep_code: bool = False, notice: Callable[[str], None] = lambda sentence: None
) -> Path:
    """The directory of a model; one of the Hub is fetched, or offline taken from its cache, with
    its Python files if they are wanted: nothing here runs them.

    notice   called with a sentence if the cache stands in for the Hub

    Raises SourceError if there is none, with what the Hub answered; ResourceError if the disk is
    full.
    """
    path = _local(model)
    if path is None:
        name, at, revision = model.partition("@")
        if not _HUB_ID.fullmatch(name):
            raise SourceError(
                f"{one_line(model)}: there is no such directory, and a Hub id is owner/name"
            )
        if at and not _REVISION.fullmatch(revision):
            raise SourceError(
                f"{one_line(model)}: there is no such directory, and {one_line(repr(revision))} is "
                "no revision of a Hub id; after the @ stands a branch, a tag or a commit"
            )
        path = _from_hub(name, revision or None, keep_code, notice)
    _check_links(path)
    return path


def _local(model: str) -> Path | None:
    """The directory of that name, None if there is nothing of it."""
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            _check_not_a_cache(path)
            return path
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, unreadable; ~ of nobody; NUL
        raise SourceError(f"{one_line(model)}: is no directory: {one_line(error)}") from None
    if exists:
        raise SourceError(f"{model}: is a file; a model is a directory or a Hub id")
    return None


def _check_not_a_cache(path: Path) -> None:
    """Refuse a repository's directory in the Hub's cache: it may hold several snapshots."""
    snapshots = path / "snapshots"
    if (path / "config.json").exists() or not snapshots.is_dir():
        return
    main = path / "refs" / "main"
    wanted = snapshots / main.read_text().strip() if main.is_file() else None
    found = sorted(snapshots.iterdir())
    if wanted not in found:
        wanted = found[0] if found else None
    identity = path.resolve().name.removeprefix("models--").replace("--", "/")
    raise SourceError(
        f"{path}: is a repository in the Hub's cache; give the model's id ({identity})"
        + (f" or a snapshot of it ({wanted})" if wanted else ", for no snapshot of it is left")
    )


def _is_needed(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _NEEDED)


def _check_links(path: Path) -> None:
    """Refuse links to nowhere among the files that a model needs: so a cleaned cache leaves it."""
    try:
        files = sorted(path.iterdir())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    gone = [f for f in files if f.is_symlink() and not f.exists() and _is_needed(f.name)]
    if gone:
        more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        raise SourceError(
            f"{path}: {gone[0].name}{more} is a link to {os.readlink(gone[0])}, which is gone; "
            "fetch the model's files again"
        )


# ----------------------------------------------------------------------------------------- the Hub


def _from_hub(
    name: str, revision: str | None, keep_code: bool, notice: Callable[[str], None]
) -> Path:
    from httpx import HTTPError
    from huggingface_hub.errors import IncompleteSnapshotError

    bound_waiting()
    try:
        return _snapshot(name, revision, keep_code, notice)
    except IncompleteSnapshotError as error:
        path = _part_that_suffices(name, Path(error.snapshot_path), error)
        why = answer_of(error) or _UNREACHED
        notice(f"{name}: taken from the Hub's cache, without files that nobody needs; {why}")
        return path
    except (HTTPError, OSError, ValueError) as error:
        raise _refusal(name, revision, error) from None
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        # huggingface_hub takes the answer to be of the Hub, whoever gave it.
        raise SourceError(
            f"{name}: there is no such directory, and what answers in place of the Hub is not the "
            f"Hub ({one_line(repr(error))}); check HF_ENDPOINT and the proxy"
        ) from None


def _snapshot(
    name: str, revision: str | None, keep_code: bool, notice: Callable[[str], None]
) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*HUB_PATTERNS, *([CODE_PATTERN] if keep_code else [])]
    fetch = partial(snapshot_download, name, revision=revision, allow_patterns=patterns)
    try:
        return Path(fetch())
    except RevisionNotFoundError:
        raise
    except (HTTPError, ConnectionError, TimeoutError) as error:
        refused = error
    try:  # of itself it seeks no commit in the cache
        path = Path(fetch(local_files_only=True))
        notice(f"{name}: taken from the Hub's cache; {answer_of(refused) or one_line(refused)}")
        return path
    except IncompleteSnapshotError as incomplete:
        raise incomplete from refused
    except LocalEntryNotFoundError:
        pass  # then it matters why the Hub did not give it
    raise refused


def _part_that_suffices(name: str, snapshot: Path, error: Exception) -> Path:
    """A snapshot that lacks files of the repository, unless the model needs one of them."""
    from huggingface_hub import get_cached_repo_tree

    promised = [file.path for file in get_cached_repo_tree(name, revision=snapshot.name)]
    missing = [p for p in promised if _is_needed(p) and not (snapshot / p).exists()]
    if not missing:
        return snapshot
    linked = any((snapshot / p).is_symlink() for p in missing)
    why = answer_of(error) or _UNREACHED
    raise SourceError(
        f"{name}: the Hub's cache lacks {one_line(', '.join(missing), 120)}"
        + (" (links are left, what they led to is gone)" if linked else "")
        + f", and {why}"
    )


def _refusal(name: str, revision: str | None, error: Exception) -> SeCompressError:
    if disk_is_full(error):
        return ResourceError(f"{name}: cannot be fetched from the Hub: {one_line(error)}")
    at = f"@{revision}" if revision else ""
    answer = answer_of(error) or one_line(error)
    if answer in (_UNREACHED, _SILENT):
        answer += " and its local cache does not hold it"
    return SourceError(f"{name}{at}: there is no such directory, and as a Hub id: {answer}")


def disk_is_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(isinstance(cause, OSError) and cause.errno in full for cause in _causes(error))


def answer_of(error: BaseException) -> str | None:
    """What the Hub answered, or that it did not, anywhere among the causes of an error."""
    return next(filter(None, map(_answer, _causes(error))), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, each once."""
    seen: list[BaseException] = []
    left: BaseException | None = error
    while left is not None and left not in seen:
        seen.append(left)
        left = left.__cause__ or left.__context__  # `datasets` hides what it rephrases
    return iter(seen)


def _answer(error: BaseException) -> str | None:
    from httpx import TimeoutException, TransportError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return _status(error)
    if isinstance(error, TimeoutException | TimeoutError):
        return _SILENT
    if isinstance(error, TransportError | ConnectionError):
        return _UNREACHED
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is None:
        return _UNREACHED
    if isinstance(error, json.JSONDecodeError):
        return "what answers is not the Hub, for it is not JSON; check HF_ENDPOINT and the proxy"
    return None


def _status(error: "HfHubHTTPError") -> str:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    code = error.response.status_code
    meaning = _MEANING.get(code, "a fault of its own; try again later" if code >= 500 else "")
    if isinstance(error, GatedRepoError):
        meaning = "gated; accept its conditions on its page, and log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        meaning = "no such revision; name a branch, a tag or a commit that is there"
    said = one_line(error.server_message, 120) if error.server_message else ""
    return f"the Hub answers {code}" + "".join(f": {part}" for part in (meaning, said) if part)


# -------------------------------------------------------------------------------------- the waiting


@dataclass
class _Patience:
    """Ends requests that would wait for ever, and retries of a Hub that never answers."""

    since: float | None = None  # when the first request was made that nothing was answered to

    def asked(self, request: "Request") -> None:
        now = time.monotonic()
        if self.since is not None and now - self.since > PATIENCE:
            raise TimeoutError(f"no answer within {PATIENCE} s")
        self.since = self.since or now
        limits = request.extensions["timeout"]
        limits.update({what: min(limit or PATIENCE, PATIENCE) for what, limit in limits.items()})

    def answered(self, response: "Response") -> None:
        self.since = None


_PATIENCE = _Patience()


def bound_waiting() -> None:
    """See to it that waiting for the Hub has an end: huggingface_hub sets a limit for some of its
    requests only, and tries again where they reach it."""
    from huggingface_hub import get_session

    _PATIENCE.since = None
    client = get_session()
    hooks = client.event_hooks
    if _PATIENCE.asked not in hooks["request"]:
        client.event_hooks = {
            "request": [*hooks["request"], _PATIENCE.asked],
            "response": [*hooks["response"], _PATIENCE.answered],
        }
