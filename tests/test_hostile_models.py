"""Mutated headers, configs and index files, of a fixed seed: a model opens, or it is refused in one
short line, in little time."""

import copy
import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS

from se_compress.errors import SourceError
from se_compress.opening.headers import INDEX_FILE
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, float("nan"),
    float("inf"), "", "0", "8", "8.0", "1e9", "x", "x" * 5000, "a\nb", "\ud800", "../x",
    "/dev/zero",
    "F32", "BF16", "F8_E4M3", "I4", [], [[]], [0], [1, 2, 3], [0] * 3000, {}, {"a": {}}, [None],
    ["x"], [1.5], [-1, 4], [0, 2**64],
)  # fmt: skip


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value: its container, and key or index."""
    found = []
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += spots(value[key])
    return found


def mutate(value: Any, chance: random.Random) -> None:
    """Replace, remove, double, rename or exchange something somewhere."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        places = spots(value)
        if not places:
            return
        container, key = chance.choice(places)
        other, other_key = chance.choice(places)
        match chance.randrange(6):
            case 0 | 1:
                container[key] = copy.deepcopy(chance.choice(VALUES))
            case 2:
                del container[key]
            case 3 if isinstance(container, dict):
                container[chance.choice(("", "x" * 3000, "a\nb", key + "x"))] = container.pop(key)
            case 4 if isinstance(container[key], (int, float)):
                container[key] = container[key] * chance.choice((-1, 0.5, 2, 1000)) + 1
            case _ if other_key in other if isinstance(other, dict) else other_key < len(other):
                container[key] = copy.deepcopy(other[other_key])


def damage(text: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut off, put in or nested."""
    place = chance.randrange(len(text))
    match chance.randrange(4):
        case 0:
            return text[:place] + bytes([chance.randrange(256)]) + text[place + 1 :]
        case 1:
            return text[:place]
        case 2:
            return text[:place] + chance.choice((b"[" * 5000, b'{"a":' * 5000, b"9" * 5000)) + text
        case _:
            return text[:place] + text[place + chance.randrange(40) :]


def opens(path: Path) -> bool:
    start = time.process_time()
    try:
        open_source(str(path))
    except SourceError as error:
        message = str(error)
        taken = False
    else:
        message, taken = "", True
    assert time.process_time() - start < 2
    assert message.isprintable()
    assert len(message) < 500
    return taken


def mutants(text: bytes, chance: random.Random, count: int) -> list[bytes]:
    """A third of them damaged as bytes, the others as JSON."""
    made = []
    for number in range(count):
        value = json.loads(text)
        mutate(value, chance)
        made.append(damage(text, chance) if number % 3 == 0 else json.dumps(value).encode())
    return made


@pytest.fixture(params=["qwen2_moe", "mixtral", "deepseek_v3"])
def path(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model(request.param), tmp_path / "model")


def test_headers(path: Path) -> None:
    file = path / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    taken = 0
    for text in mutants(header, random.Random(0), 120):
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        taken += opens(path)
    file.write_bytes(content)
    assert opens(path)
    assert taken < 60  # most of them are nothing that a loader should take


def test_configs(path: Path) -> None:
    file = path / "config.json"
    text = file.read_bytes()
    taken = 0
    for mutant in mutants(text, random.Random(1), 250):
        file.write_bytes(mutant)
        taken += opens(path)
    file.write_bytes(text)
    assert opens(path)
    assert 0 < taken < 200


def test_indexes(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    (path / "model.safetensors").rename(path / "one.safetensors")
    weight_map = {name: "one.safetensors" for name in header if name != "__metadata__"}
    text = json.dumps({"metadata": {"total_size": 5}, "weight_map": weight_map}).encode()
    for mutant in [*mutants(text, random.Random(2), 100), text]:
        (path / INDEX_FILE).write_bytes(mutant)
        taken = opens(path)
    assert taken


@pytest.mark.parametrize("name", CONFIGS)
def test_huge_numbers(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(tiny_model(name), tmp_path / "model")
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key in [key for key, value in config.items() if type(value) is int]:
        for value in (10**9, 2**40, 10**18):
            file.write_text(json.dumps({**config, key: value}))
            opens(path)
