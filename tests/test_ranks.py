"""The ranks of torch.distributed: results are those of one process, byte for byte."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_worker import make
from tiny import CONFIGS, edit_weights, random_tokens

from se_compress.artifacts import ALONE, Ranks
from se_compress.model.experts import _even_parts
from se_compress.running.ranks import exchange, first, owners, spread

WORKER = Path(__file__).with_name("ranks_worker.py")
# What a case has beside a model: sections of its recipe. Together they pass every place where ranks
# share something.
INTEGER = {"group_size": 32}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "gptq": {},
    "rtn": {"quantization": {**INTEGER, "method": "rtn"}},
    "mixed": {"policy": {"bits": [2, 3, 4, 8], "bits_per_weight": 4.5}},
    "everything": {"policy": {"bits": [4], "other_bits": 8}},
    "all-tokens": {"calibration": {"data": "unused.txt", "routing": "all"}},
    "refined": {"quantization": {**INTEGER, "refine": {"steps": 4, "tokens": 32}}},
    "pruned": {"policy": {"prune": {"fraction": 0.25}, "bits": [4]}},
    "repaired": {"policy": {"prune": {"fraction": 0.25}, "repair": True, "bits": [4]}},
    "merged": {"policy": {"merge": {"fraction": 0.5}, "bits": [4]}},
    "unquantised": {"quantization": {"method": "none"}, "policy": {"prune": {"fraction": 0.5}}},
    "bitsandbytes": {
        "target": "transformers",
        "quantization": {"method": "bitsandbytes", "data_type": "nf4", "block_size": 32},
    },
    "compressed-tensors": {
        "target": "transformers",
        "quantization": {**INTEGER, "format": "compressed-tensors"},
    },
    "auto-round": {"target": "transformers", "policy": {"bits": [2, 4], "bits_per_weight": 4.0}},
    "bfloat16": {"compute_dtype": "bfloat16"},
}
# Every family one way, one family every way, and types whose layers are run again with the output
# of their experts or are no MoE layers.
CASES = {
    **{f"{family}-gptq": (family, "gptq") for family in CONFIGS},
    **{f"qwen2_moe-{way}": ("qwen2_moe", way) for way in WAYS},
    "deepseek_v3-everything": ("deepseek_v3", "everything"),
    "flex_olmo-unquantised": ("flex_olmo", "unquantised"),
    "granitemoehybrid-unquantised": ("granitemoehybrid", "unquantised"),
}


@pytest.fixture(scope="module")
def cases(
    tiny_model: Callable[[str], Path],
    tiny_type: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    text: dict[str, Any] = {"data": "unused.txt"}
    held_out = {**text, "generation": {"tokens": 3, "prompt_tokens": 8}}
    base = {"output": "out", "calibration": text, "validation": held_out, "quantization": INTEGER}
    broken = Path(shutil.copytree(tiny_model("mixtral"), tmp_path_factory.mktemp("broken") / "m"))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    edit_weights(broken, {name: torch.full((64, 64), torch.nan, dtype=torch.bfloat16)})
    models = {f: (tiny_model if f in CONFIGS else tiny_type)(f) for f, _ in CASES.values()}
    found = {
        name: {"recipe": {**base, **WAYS[way], "model": str(models[family])}}
        for name, (family, way) in CASES.items()
    }
    found["broken"] = {"recipe": {**base, "model": str(broken)}}
    tokens = {"tokens": random_tokens(8, 32), "held_out": random_tokens(5, 32, seed=1)}
    return {name: {**case, **tokens} for name, case in found.items()}


@pytest.fixture(scope="module")
def alone(
    cases: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("alone")
    for name, case in cases.items():
        make(case, root / name)
    return {name: contents(root / name) for name in cases}


@pytest.fixture(scope="module", params=[2, 3])
def together(
    request: pytest.FixtureRequest,
    cases: dict[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("together")
    (root / "cases.json").write_text(json.dumps(cases))
    started = [start(rank, request.param, root) for rank in range(request.param)]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * request.param, said
    return {name: contents(root / "made" / name) for name in cases}


def start(rank: int, count: int, root: Path) -> "subprocess.Popen[str]":
    port = root / "port"
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port.write_text(str(free.getsockname()[1]))
    where = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, WORKER, root / "cases.json", root / "made"],
        env={**os.environ, **where, "MASTER_PORT": port.read_text()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, of JSON files without what they say of time."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(without_time(file)).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def without_time(file: Path) -> bytes:
    if file.suffix != ".json":
        return file.read_bytes()
    return json.dumps(timeless(json.loads(file.read_text()))).encode()


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key != "seconds"}
    return [timeless(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", [*CASES, "broken"])
def test_every_file_is_that_of_one_process(
    alone: dict[str, dict[str, str]], together: dict[str, dict[str, str]], name: str
) -> None:
    """The result, and profile and verdict; of a model that cannot be read, what is said of it."""
    assert together[name] == alone[name]
    assert ("error.txt" in alone[name]) == (name == "broken")
    assert name == "broken" or {"model.safetensors", "validation.json"} <= alone[name].keys()


# ----------------------------------------------------------------------------------------- joining

LONELY = """
from datetime import timedelta
from se_compress.running import ranks
ranks.START = timedelta(seconds=2)
try:
    ranks.join()
except ranks.RecipeError as error:
    print(error)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_like_never_come_does_not_wait_for_ever(rank: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", LONELY],
        env={**os.environ, **where, "MASTER_PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith("RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: ")
    assert "timed out" in done.stdout.lower()


# ------------------------------------------------------------------------------------------ rounds


def test_one_alone_does_all() -> None:
    assert exchange(ALONE, lambda: 3) == [3]
    assert list(spread(ALONE, [1, 2, 3], lambda number: number * number)) == [1, 4, 9]
    assert first(ALONE, lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        exchange(ALONE, lambda: 1 / 0)


def test_blocks_are_of_about_one_size() -> None:
    for count, size in ((16, 3), (128, 3), (5, 4), (1, 8), (8, 8), (0, 3)):
        ids = range(10, 10 + count)
        parts = _even_parts(ids, size)
        assert [expert for part in parts for expert in part] == list(ids)
        assert len(parts) == -(-count // size)
        sizes = {len(part) for part in parts}
        assert not sizes or max(sizes) <= size
        assert not sizes or max(sizes) - min(sizes) <= 1


def test_owners_have_about_as_much_to_do() -> None:
    costs = [7.0, 1, 1, 5, 3, 3, 2, 2]
    found = owners(Ranks(0, 3), costs)
    loads = [sum(c for c, owner in zip(costs, found, strict=True) if owner == r) for r in range(3)]
    assert sorted(loads) == [8, 8, 8]
    assert owners(Ranks(2, 3), costs) == found, "all know the same"
    assert owners(ALONE, costs) == [0] * 8
