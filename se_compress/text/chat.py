"""Chat: the shapes in which rows hold messages, and the template that writes them.

A template is a program that somebody else wrote. It runs in a process of its own, which the kernel
ends if it takes too long or too much memory: nothing inside one process can stop a loop that is
under way in C, such as `'x' * 10**10`.
"""

import json
import multiprocessing
import re
import resource
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from se_compress.errors import ResourceError, one_line

Message = dict[str, Any]
Render = Callable[[list[Message]], object]
SECONDS = 10  # of computing time that a template may take for one row
MEMORY = 1 << 30  # bytes that it may take beyond those of this process
_TOO_MUCH = "it takes more than 1 GB of memory"
CHAT_COLUMNS = ("messages", "conversations", "conversation")
# How messages begin that were written as text, by JSON, by JSON twice over or by Python's repr.
_LIKE_MESSAGES = re.compile(
    r"""\"?[\[{][\s\[{]*\\?["'](role|content|from|messages|conversations?)\\?["']\s*:"""
)
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


class Unreadable(ValueError):
    """What is wrong with a row's messages; to be put behind the place of the row."""


# ------------------------------------------------------------------------------------ the messages


def as_messages(value: object) -> list[Message]:
    """The messages of a row as transformers' templates expect them.

    Text is one message of the user, unless it is the JSON of messages. Lists of {role, content} are
    taken, of ShareGPT's {from, value}, and one message alone; content may be a list of text parts.
    Nulls inside a message count as absent: Arrow gives every message the keys of all the others.

    Raises Unreadable.
    """
    found = _messages_in_json(value) if isinstance(value, str) else value
    if found is None:
        return [{"role": "user", "content": value}]
    if isinstance(found, Mapping):
        found = _inside(found)
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise Unreadable("where text or a list of {role, content} messages is expected")
    if not found:
        raise Unreadable("where at least one message is expected")
    try:
        return [_message(_without_nulls(item), i) for i, item in enumerate(found, start=1)]
    except RecursionError:
        raise Unreadable("with messages that are nested too deeply") from None


def looks_like_chat(value: object) -> bool:
    """Whether a value that is no text may be a conversation."""
    return isinstance(value, list | Mapping)


def _messages_in_json(text: str) -> object:
    """What a text holds that is the JSON of messages; None if it is any other text. Raises
    Unreadable for messages in another notation, or cut off: no user has written these."""
    if text.lstrip()[:1] not in ("[", "{", '"'):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, (list, dict)):
        if _LIKE_MESSAGES.match(text.lstrip()):
            raise Unreadable("that begins like messages, but is not JSON of them") from None
        return None
    items = _inside(found) if isinstance(found, dict) else found
    first = items[0] if isinstance(items, list) and items else None
    forms = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
    is_chat = isinstance(first, dict) and any(form <= first.keys() for form in forms)
    return found if is_chat else None


def _inside(row: Mapping[str, Any]) -> object:
    """The messages of an object that has them under a key, or is one itself."""
    return next((row[key] for key in CHAT_COLUMNS if row.get(key) is not None), [row])


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _message(item: Message, number: int) -> Message:
    if "role" not in item and "from" in item:
        item = _from_sharegpt(item, number)
    role = item.get("role")
    if not isinstance(role, str):
        raise Unreadable(
            f"where text or a list of {{role, content}} messages is expected; message {number} has "
            + (f"a {type(role).__name__} as role" if role is not None else "no role")
        )
    if "content" in item:
        return {**item, "content": _text_of(item["content"], number)}
    if not any(v for k, v in item.items() if k not in ("role", "name")):
        raise Unreadable(f"whose message {number} ({one_line(role, 40)}) has no content")
    return item  # a tool call


def _from_sharegpt(item: Message, number: int) -> Message:
    speaker = item["from"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT:
        raise Unreadable(
            f"whose message {number} is from {one_line(repr(speaker), 40)}; of ShareGPT's, "
            "human, gpt, system and tool are known"
        )
    if "value" not in item:
        raise Unreadable(f"whose message {number} ({one_line(speaker, 40)}) has no value")
    rest = {k: v for k, v in item.items() if k not in ("from", "value")}
    return {"role": _SHAREGPT[speaker], "content": item["value"], **rest}


def _text_of(content: object, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unreadable(
            f"whose message {number} has a {type(content).__name__} as content; text is expected"
        )
    return "".join(_text_of_part(part, number) for part in content)


def _text_of_part(part: object, number: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise Unreadable(
        f"whose message {number} has a part of type {one_line(repr(kind), 40)}; text is expected"
    )


# ------------------------------------------------------------------------------------ the template


class Template:
    """A chat template, to be used in a `with` statement, which begins and ends its process."""

    def __init__(self, render: Render) -> None:
        context = multiprocessing.get_context("fork")  # has all that `render` needs at once
        self._here, there = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(render, there, self._here), daemon=True
        )
        try:
            self._process.start()
        except OSError as error:
            raise ResourceError(
                f"no process can be started for the chat template: {one_line(error)}"
            ) from None
        there.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._here.close()

    def write(self, messages: list[Message]) -> str:
        """What the template makes of them. Raises Unreadable."""
        try:
            self._here.send(messages)
            problem, text = self._here.recv()
        except RecursionError:
            problem = "they are nested too deeply"
        except (EOFError, ConnectionError):
            problem = self._end()
        if problem:
            raise Unreadable(f"that the chat template refuses: {problem}")
        return str(text)

    def _end(self) -> str:
        self._process.join()
        code = self._process.exitcode
        if code == 0:
            return _TOO_MUCH
        if code == -signal.SIGPROF:
            return f"it computes for more than {SECONDS} s"
        return f"its process ended with {code}"


def _serve(render: Render, there: "Connection[Any, Any]", here: "Connection[Any, Any]") -> None:
    here.close()  # else the end of the other process would not be seen
    _limit()
    try:
        while True:
            there.send(_try(render, there.recv()))
    except (EOFError, ConnectionError, MemoryError):  # the other process is gone, or it is too much
        return


def _limit() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to answer
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(
        resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )


def _try(render: Render, messages: list[Message]) -> tuple[str, str]:
    """("", text), or what is wrong and ""."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return "", str(render(messages))
    except MemoryError:
        return _TOO_MUCH, ""
    except Exception as error:  # a template may raise whatever Python raises
        return one_line(error), ""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
