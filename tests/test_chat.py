"""Rows of chat in the shapes that people have are read or told, and a template cannot hold a run
up: whatever it does ends in one line."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import save_tokenizer
from transformers import AutoTokenizer

from se_compress.text import chat
from se_compress.text.chat import Template, Unreadable, as_messages

HELLO = {"role": "user", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


# --------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ("Hello", [HELLO]),
        (" [1, 2] ", [{"role": "user", "content": " [1, 2] "}]),
        ('{"a": 1}', [{"role": "user", "content": '{"a": 1}'}]),
        ("[", [{"role": "user", "content": "["}]),
        ("[]", [{"role": "user", "content": "[]"}]),
        *(
            (text, [{"role": "user", "content": text}])
            for text in ('"Hello"', '"role": "user"', '{"a": 1', "[Hello], 'role': x", '"[1, 2]"')
        ),
        ('{"from": "Bern"}', [{"role": "user", "content": '{"from": "Bern"}'}]),
        ('[{"role": "x"}]', [{"role": "user", "content": '[{"role": "x"}]'}]),
        ({**HELLO, "messages": None}, [HELLO]),
        ([HELLO], [HELLO]),
        (HELLO, [HELLO]),
        ({"messages": [HELLO]}, [HELLO]),
        ({"conversations": [{"from": "human", "value": "Hello"}]}, [HELLO]),
        (json.dumps([HELLO]), [HELLO]),
        (json.dumps({"messages": [HELLO]}), [HELLO]),
        (json.dumps([{"from": "human", "value": "Hello"}]), [HELLO]),
        ([{"from": "human", "value": "Hello", "role": None}], [HELLO]),
        (
            [{"from": w, "value": w} for w in ("system", "human", "gpt", "tool", "observation")],
            [
                {"role": "system", "content": "system"},
                {"role": "user", "content": "human"},
                {"role": "assistant", "content": "gpt"},
                {"role": "tool", "content": "tool"},
                {"role": "tool", "content": "observation"},
            ],
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], [HELLO]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hel", "image": None}, "lo"]}],
            [HELLO],
        ),
        ([{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
        (
            [{"role": "assistant", "tool_calls": [CALL]}],
            [{"role": "assistant", "tool_calls": [CALL]}],
        ),
        (
            [{"role": "assistant", "content": None, "name": None, "tool_calls": [CALL]}],
            [{"role": "assistant", "tool_calls": [CALL]}],
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {
                                "name": "f",
                                "arguments": {"x": 1, "y": None, "z": {"u": None}},
                            },
                        }
                    ],
                }
            ],
            [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "f", "arguments": {"x": 1, "z": {}}},
                        }
                    ],
                }
            ],
        ),
    ],
)
def test_shapes_that_are_read(row: object, messages: object) -> None:
    assert as_messages(row) == messages


def nested(depth: int) -> object:
    value: object = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (5, "where text or a list of {role, content} messages is expected"),
        (b"Hello", "where text or a list of {role, content} messages is expected"),
        (["Hello"], "where text or a list of {role, content} messages is expected"),
        ([[HELLO]], "where text or a list of {role, content} messages is expected"),
        ([HELLO, None], "where text or a list of {role, content} messages is expected"),
        ([], "where at least one message is expected"),
        (json.dumps([HELLO, {"role": "assistant"}]), "message 2 (assistant) has no content"),
        ({"messages": []}, "where at least one message is expected"),
        ({}, "message 1 has no role"),
        ([HELLO, {"content": "x"}], "message 2 has no role"),
        ([{"speaker": "a", "text": "b"}], "message 1 has no role"),
        ([{"role": 5, "content": "x"}], "message 1 has a int as role"),
        ([{"role": ["user"], "content": "x"}], "message 1 has a list as role"),
        ([{"role": "assistant"}], "message 1 (assistant) has no content"),
        ([HELLO, {"role": "assistant", "content": None}], "message 2 (assistant) has no content"),
        ([{"role": "assistant", "tool_calls": []}], "message 1 (assistant) has no content"),
        ([{"role": "user", "content": 5}], "message 1 has a int as content"),
        ([{"role": "user", "content": {"text": "x"}}], "message 1 has a dict as content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has a part of type 'image'"),
        ([{"role": "user", "content": [5]}], "has a part of type 'int'"),
        ([{"from": "martian", "value": "x"}], "message 1 is from 'martian'"),
        ([{"from": "function_call", "value": "{}"}], "message 1 is from 'function_call'"),
        ([{"from": 5, "value": "x"}], "message 1 is from 5"),
        ([{"from": "human", "value": None}], "message 1 (human) has no value"),
        ([{"from": "gpt", "text": "x"}], "message 1 (gpt) has no value"),
        (str([HELLO]), "that begins like messages, but is not JSON of them"),
        (str({"conversations": [HELLO]}), "that begins like messages"),
        (json.dumps([HELLO, HELLO])[:-9], "that begins like messages"),
        (json.dumps(json.dumps([HELLO])), "that begins like messages"),
        (f" {json.dumps(HELLO)}\n{json.dumps(HELLO)}\n", "that begins like messages"),
        ([{"role": "user", "content": "x", "more": nested(100_000)}], "nested too deeply"),
    ],
)
def test_shapes_that_are_told(row: object, problem: str) -> None:
    with pytest.raises(Unreadable) as caught:
        as_messages(row)
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 200


# -------------------------------------------------------------------------------------- templates

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """What a chat template makes of HELLO."""
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    monkeypatch.setattr(chat, "MEMORY", 1 << 28)

    def written(text: str) -> str:
        tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, template=text))
        with Template(lambda m: tokenizer.apply_chat_template(m, tokenize=False)) as template:
            return template.write([HELLO])

    return written


@pytest.mark.parametrize(
    "text",
    [
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ range(10**9)|list }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[5].role.x }}",
        "{{ messages[0].content.foo.bar }}",
        "{{ foo() }}",
        "{{ 1|foo }}",
        "{{ strftime_now(5) }}",
        "{{ raise_exception('no') }}",
        "{% include 'x' %}",
        "{% if %}",
        "{{",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ],
)
def test_a_template_may_raise_anything(write: Write, text: str) -> None:
    with pytest.raises(Unreadable, match="that the chat template refuses: ") as caught:
        write(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 'a'|center(10**10) }}",
        "{{ '{:>10000000000}'.format('x') }}",
        "{{ messages|tojson(indent=10**10) }}",
        "{{ lipsum(10**9) }}",
        "{% set n = namespace(a=[]) %}{% for i in range(99999) %}"
        "{% set n.a = n.a + ['x' * 10**6 ~ i] %}{% endfor %}",
    ],
)
def test_a_template_cannot_hold_up_or_eat_the_memory(write: Write, text: str) -> None:
    start = time.monotonic()
    with pytest.raises(Unreadable, match=r"refuses: it (takes more than|computes for more than)"):
        write(text)
    assert time.monotonic() - start < 20


def test_a_template_process_that_dies_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        Template(lambda messages: os.kill(os.getpid(), signal.SIGKILL)) as template,
        pytest.raises(Unreadable, match="its process ended with -9"),
    ):
        template.write([HELLO])
    assert capfd.readouterr() == ("", "")


def test_one_process_writes_many_rows_and_goes() -> None:
    with Template(lambda messages: f"{os.getpid()} {messages[0]['content']}") as template:
        first, second = (template.write([{"role": "user", "content": c}]) for c in "ab")
    pid = int(first.split()[0])
    assert pid != os.getpid()
    assert second == f"{pid} b"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_goes_with_its_owner(capfd: pytest.CaptureFixture[str]) -> None:
    """Also if the owner is killed while the template computes, and cannot end it."""
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:  # what is left open in the processes below keeps the pipe open
        os.close(reading)
        with Template(lambda messages: time.sleep(0.2)) as template:
            threading.Thread(target=template.write, args=([HELLO],), daemon=True).start()
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    os.waitpid(owner, 0)
    with os.fdopen(reading, "rb") as stream:
        assert stream.read() == b""
    assert capfd.readouterr() == ("", "")
