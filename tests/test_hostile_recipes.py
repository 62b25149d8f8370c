"""Recipes and command lines that nobody would write: each ends in a Recipe, or in one short line
with the right exit code. Mutations are drawn with a fixed seed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from se_compress import cli
from se_compress.errors import MESSAGE_LENGTH, RecipeError, SeCompressError, brief, printable
from se_compress.pipeline import Preview, Request
from se_compress.recipe import Recipe, load_recipe, parse_recipe, recipe_of
from se_compress.recipe_file import RECIPE_BYTES, parse_yaml
from se_compress.running.faults import foreseen

ROOT = Path(__file__).parents[1]
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))]
LEAST = "model: some/model\noutput: out\ncalibration: {data: a.txt}\nvalidation: {data: b.txt}\n"
ALIASES = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)
MERGES = ALIASES.replace("[x, x, x, x, x, x, x, x, x]", "{x: 1}").replace("[*", "{<<: [*")
MERGES = MERGES.replace("]", "]}").replace("}]}", "}")
# Values to put in place of any other.
STRANGE = [
    *("0x_", "0b_", "2025-13-45", "2025-11-27", "!!int abc", "!!float x", "!!binary ////", "!!set"),
    *("!!python/object/apply:os.system [id]", "!!timestamp 1", "!!omap [a: 1]", "!!null x", "!x y"),
    *("9" * 5000, "0x" + "f" * 5000, "1e400", "-1e400", ".nan", ".inf", "-.inf", "-0", "-0.0"),
    *("{a: 1}", "[[4]]", "[{bits: 4}]", "{4: 8}", "? [a]", "&x [*x]", "*nothing", "<<", "=", "~"),
    *('"a\\0b"', '"\\e[31m"', '"\\ud800"', "''", "a" * 5000, "/" + "b" * 300, "[" * 3000),
    *("{" * 3000, "- " * 500, "1:99", "0o8", "yes", "no", "null", "[]", "{}", "[null]", "4.0"),
    *("0GB", "9" * 400 + "GB", "1e400GB", "-1GB", "٣GB", "1e309", str(2**63), str(-(2**70))),
    *("!!str", "|", ">", "'", '"', "%", "@", "`", "#", ": :", "? ", "- - -", "\t", "...", "---"),
]  # fmt: skip
BYTES = "{}[]:,&*!|>'\"%@`#?-\n\t 0aé\u202e\x00\ud800"


def outcome(call: Callable[[], Recipe]) -> str:
    """What the user reads: "" if it is a recipe."""
    try:
        assert isinstance(call(), Recipe)
    except RecipeError as error:
        message = str(error)
        assert message
        assert len(message) < 500
        assert message.isprintable(), message
        return message
    return ""


def mutations(seed: int, count: int) -> Iterator[str]:
    draw = random.Random(seed)
    for _ in range(count):
        text = draw.choice([*TEXTS, LEAST])
        kind = draw.randrange(4)
        if kind == 0:  # a value
            lines = text.splitlines()
            at = draw.choice([i for i, line in enumerate(lines) if ":" in line])
            lines[at] = lines[at].partition(":")[0] + ": " + draw.choice(STRANGE)
            yield "\n".join(lines)
        elif kind == 1:  # a key, or a line
            lines = text.splitlines()
            lines.insert(draw.randrange(len(lines)), draw.choice([*STRANGE, *lines]))
            yield "\n".join(lines)
        elif kind == 2:  # some characters
            for _ in range(draw.randrange(1, 6)):
                at = draw.randrange(len(text))
                text = text[:at] + draw.choice(BYTES) + text[at + draw.randrange(3) :]
            yield text
        else:
            yield text[: draw.randrange(len(text))]


@pytest.mark.parametrize("seed", range(4))
def test_any_text_is_a_recipe_or_one_line(seed: int) -> None:
    messages = [
        outcome(lambda text=text: recipe_of(text, "r.yaml")) for text in mutations(seed, 80)
    ]
    assert 10 < sum(map(bool, messages)), "it refuses"
    assert not all(messages), "and it accepts"


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


VALUES: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**64, 10**400, 1.5, float("nan"), float("inf"), -0.0, 1e308),
    *("", "a\0b", "\ud800", "\x1b[31m", "x" * 10**6, "/" * 5000, "y" * 300, [], {}, [[]], [{}]),
    *({"a": {"b": {"c": []}}}, [4, 4], [True], [None], {"layer": 1}, [{"layer": [], "expert": {}}]),
    *([{4: 4}], {"": ""}, {"x[0]": 1}, {"constrained-": 1}, ["auto"] * 1000, b"bytes", {1, 2}),
]  # fmt: skip


@pytest.mark.parametrize("text", [*TEXTS[:3], TEXTS[-1]])
def test_any_value_at_any_place_is_a_recipe_or_one_line(text: str) -> None:
    data = yaml.safe_load(text)
    draw = random.Random(0)
    for path in places(data):
        for value in draw.sample(VALUES, 12):
            changed = yaml.safe_load(text)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            outcome(lambda changed=changed: parse_recipe(changed, "r.yaml"))


@pytest.mark.parametrize("text", STRANGE)
@pytest.mark.parametrize(
    "key", ["policy.bits", "output", "policy.size", "validation.kl_divergence"]
)
def test_any_value_after_set_is_a_recipe_or_one_line(key: str, text: str) -> None:
    outcome(lambda: recipe_of(LEAST, "r.yaml", [f"{key}={text}"]))


@pytest.mark.parametrize(
    "key",
    ["a..b", ".", "", "a" * 5000, "policy.bits.0", "model.x", "variants.a.b.c", "\x1b[31m", "é"],
)
def test_odd_keys_after_set_are_refused(key: str) -> None:
    assert outcome(lambda: recipe_of(LEAST, "r.yaml", [f"{key}=1"]))


# ------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 0x_", "'0x_' is not an integer; in quotes it is text (line 1)"),
        ("a: 1\nb: !!int abc", "'abc' is not an integer; in quotes it is text (line 2)"),
        ("a: !!bool maybe", "'maybe' is not true or false (line 1)"),
        ("a: " + "9" * 5000, "a number of 5,000 characters (line 1)"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", "the key 'b' is given twice (line 4)"),
        ("a: 1\na: 1", "the key 'a' is given twice (line 2)"),
        ("1: 2", "the key '1' is read as 1; put it in quotes (line 1)"),
        ("null: 2", "the key 'null' is read as None; put it in quotes (line 1)"),
        ("no: 2", "the key 'no' is read as False; put it in quotes (line 1)"),
        ("? [a]\n: b", "a key is text, not a list or a mapping (line 1)"),
        ("[" * 3000, "nested deeper than 40 levels (line 1)"),
        ("- " * 3000, "nested deeper than 40 levels (line 1)"),
        ("&a [*a]", "aliases make it larger than a recipe can be (line 1)"),
        (ALIASES, "aliases make it larger than a recipe can be (line 1)"),
        ("<<: 3", "<< takes a mapping or a list of mappings (line 1)"),
    ],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_yaml(text)
    assert str(caught.value) == message


def test_merges_that_double_end(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert "larger than a recipe can be" in outcome(lambda: recipe_of(MERGES, "r.yaml"))
    assert time.monotonic() - begun < 20


def test_dates_are_text_and_aliases_and_merges_are_what_they_were() -> None:
    assert parse_yaml("a: 2025-13-45\nb: 2026-11-27") == {"a": "2025-13-45", "b": "2026-11-27"}
    text = "base: &b {x: 1, y: 2}\none: {<<: *b, y: 3}\ntwo: *b"
    assert parse_yaml(text) == {
        "base": {"x": 1, "y": 2}, "one": {"x": 1, "y": 3}, "two": {"x": 1, "y": 2},
    }  # fmt: skip


def test_an_alias_is_a_copy_so_that_set_changes_one_place_only() -> None:
    text = "model: m\noutput: o\ncalibration: &t {data: a.txt, samples: 8, sequence_length: 32}\n"
    recipe = recipe_of(text + "validation: *t\n", "r.yaml", ["validation.samples=2"])
    assert (recipe.calibration.samples, recipe.validation.samples) == (8, 2)


def test_a_quoted_value_is_short() -> None:
    for value in (10**5000, -(2**20000), "x" * 10**7, [["y" * 1000]] * 1000):
        assert len(brief(value)) <= 80


def test_a_message_is_short_keeps_its_end_and_steers_no_terminal() -> None:
    error = SeCompressError("begin \x1b[2J\u202e\ud800\n" + "x" * 10**6 + " the end")
    assert len(str(error)) <= MESSAGE_LENGTH
    assert str(error).isprintable()
    assert str(error).startswith(r"begin \x1b[2J\u202e\ud800 xxx")
    assert str(error).endswith("xxx the end")
    assert printable("größer als 3 µm: 模型") == "größer als 3 µm: 模型"


# ------------------------------------------------------------------------------------------ files


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    (tmp_path / "large.yaml").write_text("#" * (RECIPE_BYTES + 1))
    for path, reason in [
        (fifo, "it is a named pipe"),
        (link, "it is a named pipe"),
        (Path("/dev/zero"), "it is a device, no file"),
        (Path("/dev/null"), "it is a device, no file"),
        (tmp_path, "it is a directory"),
        (tmp_path / "large.yaml" / "below", "Not a directory"),
        (Path("n" * 300), "File name too long"),
    ]:
        found = outcome(lambda path=path: load_recipe(path))
        assert reason in found or "there is no such recipe" in found, path
    assert "is larger than 1 MiB" in outcome(lambda: load_recipe(tmp_path / "large.yaml"))


def test_a_recipe_comes_from_a_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def late() -> None:
        time.sleep(0.2)
        os.write(writer, LEAST.encode())
        os.close(writer)

    thread = threading.Thread(target=late)
    thread.start()
    assert load_recipe(Path(f"/dev/fd/{reader}")).model == "some/model"
    thread.join()
    os.close(reader)


def test_what_was_read_is_what_the_result_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe can be read only once, and the recipe lies verbatim in the result."""
    kept: list[str] = []

    def stop(request: Request) -> Preview:
        kept.append(request.recipe_text)
        raise RecipeError("far enough")

    reader, writer = os.pipe()
    os.write(writer, LEAST.encode())
    os.close(writer)
    monkeypatch.setattr(cli, "preview", stop)
    with pytest.raises(RecipeError, match="far enough"):
        cli.typer.main.get_command(cli.app).main(
            [f"/dev/fd/{reader}", "--dry-run"], standalone_mode=False
        )
    assert kept == [LEAST]


def test_a_plan_comes_from_a_pipe_once() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"{}")
    os.close(writer)
    request = Request(recipe_of(LEAST, "r.yaml"), LEAST, plan_file=Path(f"/dev/fd/{reader}"))
    assert (request.plan_text, request.plan_text) == ("{}", "{}")
    assert Request(request.recipe, LEAST).plan_text == ""


# ----------------------------------------------------------------------------------- command lines


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`se-compress WORDS`, in this process, where r.yaml names a model that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    (tmp_path / "r.yaml").write_text(LEAST.replace("some/model", "missing"))
    handler = signal.getsignal(signal.SIGINT)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["se-compress", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield call
    signal.signal(signal.SIGINT, handler)


WORDS = [
    *("r.yaml", "", ".", "/", "..", "-", "--", "--json", "--dry-run", "--quiet", "--fresh"),
    *("--set", "--output", "--plan", "--validate", "--device", "cpu", "--nothing", "--output="),
    *("--set=", "é"),
    *("model=x", "model=[", "=x", "a..b=1", "policy.bits.0=4", "n" * 300, "\udcff", "\x1b[31m"),
    *("out/run #2", "20261127", "/dev/null", "/dev/zero", "--json=1", "-x", "--validate=/"),
]  # fmt: skip


def test_any_command_line_ends_in_a_code_and_one_line(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    draw = random.Random(7)
    for _ in range(250):
        words = draw.choices(WORDS, k=draw.randrange(5))
        code, out, err = command(*words)
        assert code in (2, 3), words
        assert len(err.splitlines()) == 1, words
        assert len(err) < 520, words
        assert err[:-1].isprintable(), words
        if out:
            assert (json.loads(out)["exit_code"], json.loads(out)["outcome"]) == (code, "failed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.yaml"], "nothing is left behind"


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("r.yaml", "--json"), True),
        (("--json", "--nothing"), True),
        (("--set", "--json", "r.yaml"), False),
        (("--output", "--json", "r.yaml"), False),
        (("r.yaml", "--output=x", "--json", "--device"), True),
        (("r.yaml", "--", "--json"), False),
        (("r.yaml", "--output"), False),
    ],
)
def test_json_is_a_flag_and_no_word(
    command: Callable[..., tuple[int, str, str]], words: tuple[str, ...], asked: bool
) -> None:
    _, out, _ = command(*words)
    assert bool(out) == asked


@pytest.mark.parametrize(
    "name", ["out/run #2", "20261127", "yes", "{a: b}", "~", "2026-11-27", "[x"]
)
def test_a_flag_takes_its_word_as_it_is(name: str) -> None:
    assert recipe_of(LEAST, "r.yaml", (), name).output == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("",), "RECIPE is '': a path is needed"),
        (("r.yaml", "--output", ""), "r.yaml: output is '': string should have at least 1 char"),
        (("r.yaml", "--plan", ""), "--plan is '': a path is needed"),
        (("r.yaml", "--validate", ""), "--validate is '': a path is needed"),
        (("r.yaml", "--validate", "/"), "--validate /: give --output DIR for the verdict as well"),
        (("r.yaml", "--validate", "/.."), "--validate /..: give --output DIR for the verdict"),
        (("r.yaml", "--output", "."), "r.yaml: output: '.' is no name for a new directory"),
        (("r.yaml", "--output", "/"), "r.yaml: output: '/' is no name for a new directory"),
        (("r.yaml", "--output", "a/.."), "r.yaml: output: 'a/..' is no name for a new directory"),
        (("r.yaml", "--output", "a" * 250), "r.yaml: output: 'aaa"),
        (("r.yaml", "--output", "a/" * 2000), "r.yaml: output: 'a/a"),
        (("r.yaml", "--output", "a" * 300), "r.yaml: output: 'aaa"),
        (
            ("r.yaml", "--output", "a\udcff"),
            r"r.yaml: output is 'a\udcff': input should be a valid",
        ),
        (("r.yaml", "--set", 'output="a\\0b"'), r"r.yaml: output: 'a\x00b' holds the character"),
    ],
)
def test_paths_that_are_none(
    command: Callable[..., tuple[int, str, str]], words: tuple[str, ...], message: str
) -> None:
    code, _, err = command(*words)
    assert code == 2
    assert err.startswith(f"se-compress: {message}"), err


def test_the_verdict_on_this_directory_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "made")
    assert cli._beside(Path(".")) == tmp_path / "made.validation"
    assert cli._beside(Path("in/..")) == tmp_path / "made.validation"
    assert cli._beside(Path("in")) == Path("in.validation")


@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--validate", "x"), ("--json",)])
def test_a_current_directory_that_is_gone_is_told(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = command(str(tmp_path / "r.yaml"), *words)
    assert code == 2
    assert err.startswith("se-compress: the current directory is gone"), err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 5),
        (ImportError("x.so: failed to map segment from shared object: Operation not permitted"), 0),
        (OSError(12, "Cannot allocate memory"), 5),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 5),
        (MemoryError(), 5),
        (ImportError("No module named torch"), 0),
    ],
)
def test_memory_that_is_exhausted_is_told_whoever_says_so(error: Exception, code: int) -> None:
    told = foreseen(error)
    assert (told.exit_code if told else 0) == code


# ---------------------------------------------------------------------------------- where it prints


@pytest.mark.parametrize("flag", ["--help", "--version"])
@pytest.mark.parametrize("command", ["| true", "> /dev/full", "2> /dev/full", ">&-"])
def test_a_stdout_that_takes_nothing_is_no_traceback(command: str, flag: str) -> None:
    shell = f"{sys.executable} -m se_compress {flag} {command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
