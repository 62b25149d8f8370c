"""What is asked before the hours: memory within every limit, positions, where to write."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import tiny
from sourced import source_formats

from se_compress.artifacts import ModelSource
from se_compress.errors import RecipeError, ResourceError
from se_compress.opening.source import open_source
from se_compress.running.footprint import largest_stage
from se_compress.running.memory import MACHINE, available_memory
from se_compress.running.preflight import check_memory, check_place, check_positions

UNLIMITED_V1 = "9223372036854771712"


def tree(
    root: Path, membership: str, groups: Mapping[str, Mapping[str, object]]
) -> tuple[Path, Path]:
    """Files of control groups below `root`, and a process that is in `membership`."""
    mount, process = root / "cgroup", root / "process"
    process.mkdir()
    (process / "cgroup").write_text(membership)
    (process / "statm").write_text("1000 500 1 1 0 1 0")
    mount.mkdir()
    for name, files in groups.items():
        directory = mount / name
        directory.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (directory / file).write_text(f"{content}\n")
    return mount, process


def v2(limit: object, used: int = 0, cache: int = 0, high: object = "max") -> dict[str, object]:
    stat = f"anon 1\nactive_file 5\ninactive_file {cache}"
    return {
        "memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat,
    }  # fmt: skip


def v1(limit: object, used: int = 0, cache: int = 0) -> dict[str, object]:
    stat = f"inactive_file 7\ntotal_inactive_file {cache}"
    return {
        "memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat,
    }  # fmt: skip


HYBRID = "12:cpu,cpuacct:/\n9:memory:/a/b\n0::/a/b\n"


@pytest.mark.parametrize(
    ("membership", "groups", "left", "group"),
    [
        ("0::/\n", {"": v2(300_000)}, 300_000, "/"),
        ("0::/a/b\n", {"a/b": v2(500_000, used=200_000)}, 300_000, "/a/b"),
        ("0::/a/b\n", {"a/b": v2("max"), "a": v2(500_000, used=100_000)}, 400_000, "/a"),
        ("0::/a/b\n", {"a/b": v2(9000), "a": v2(500_000), "": v2(700)}, 700, "/"),
        ("0::/a/b\n", {"a/b": v2(500_000, used=400_000, cache=150_000)}, 250_000, "/a/b"),
        ("0::/a/b\n", {"a/b": v2(500_000, used=400_000, cache=10**9)}, 500_000, "/a/b"),
        ("0::/a/b\n", {"a/b": v2(100, used=400_000)}, 0, "/a/b"),
        ("0::/a/b\n", {"a/b": v2("max", high=2000, used=500)}, 1500, "/a/b"),
        ("0::/docker/1234\n", {"": v2(300_000)}, 300_000, "/"),  # its path on the host
        ("9:memory:/a\n", {"memory/a": v1(400_000, used=100_000, cache=50_000)}, 350_000, "/a"),
        ("9:memory:/a/b\n", {"memory/a/b": v1(UNLIMITED_V1), "memory/a": v1(7000)}, 7000, "/a"),
        ("9:cpu,memory:/a\n", {"memory": v1(123)}, 123, "/"),
        (HYBRID, {"memory/a/b": v1(9000), "unified/a": v2("max")}, 9000, "/a/b"),
    ],
)
def test_the_least_limit_of_any_group_around_counts(
    tmp_path: Path,
    membership: str,
    groups: Mapping[str, Mapping[str, object]],
    left: int,
    group: str,
) -> None:
    found = available_memory(*tree(tmp_path, membership, groups))
    assert found.size_bytes == left
    assert found.limit == f"within the memory limit of the control group {group}"


@pytest.mark.parametrize(
    ("membership", "groups"),
    [
        ("", {}),
        ("0::/a\n", {"a": v2("max"), "": v2("max")}),
        ("9:memory:/a\n", {"memory/a": v1(UNLIMITED_V1)}),
        ("9:cpu:/a\n", {"a": v2(5)}),
        ("nonsense\n0::\n", {"a": v2(5)}),
        ("0::/a\n", {"a": {"memory.max": "nonsense"}}),
    ],
)
def test_without_a_limit_it_is_what_the_machine_has(
    tmp_path: Path, membership: str, groups: Mapping[str, Mapping[str, object]]
) -> None:
    found = available_memory(*tree(tmp_path, membership, groups))
    assert found.limit == MACHINE
    assert found.size_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_limit_of_the_shell_counts() -> None:
    code = (
        "from se_compress.running.memory import available_memory; one = available_memory(); "
        "print(one.size_bytes, one.limit)"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 * 10**8, 2 * 10**8))

    done = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, check=True
    )
    size, _, words = done.stdout.strip().partition(" ")
    assert words == "within the limit on address space (ulimit -v)"
    assert 0 < int(size) < 2 * 10**8


def test_the_message_names_the_limit(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    recipe = tiny.recipe(source.path)
    check_memory(source, recipe, 256)
    small = available_memory(*tree(tmp_path, "0::/box\n", {"box": v2(300_000)}))
    monkeypatch.setattr("se_compress.running.preflight.available_memory", lambda: small)
    with pytest.raises(ResourceError, match=r"0\.3 MB of memory within .* control group /box are"):
        check_memory(source, recipe, 256)


def test_a_decoded_matrix_counts(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The largest one, in 16 bits, beside the layer."""
    path = source_formats.write("fp8", tiny_model("qwen3_moe"), tmp_path / "fp8", 16)
    needed = {}
    small = available_memory(*tree(tmp_path, "0::/box\n", {"box": v2(200_000)}))
    monkeypatch.setattr("se_compress.running.preflight.available_memory", lambda: small)
    monkeypatch.setattr("se_compress.running.preflight.in_units", lambda size: f"{int(size)} B")
    for model in (tiny_model("qwen3_moe"), path):
        with pytest.raises(ResourceError) as caught:
            check_memory(open_source(str(model)), tiny.recipe(model), 256)
        found = re.search(r"(\d+) B for a layer", str(caught.value))
        assert found
        needed[model] = int(found[1])
    largest = max(i.size_bytes for i in open_source(str(path)).tensors.values() if i.stored)
    assert largest == 2 * 64 * 64
    assert needed[path] - needed[tiny_model("qwen3_moe")] == largest


def test_what_refining_takes_is_counted(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    plain = tiny.recipe(source.path)
    refined = tiny.recipe(source.path, quantization={"group_size": 32, "refine": {"steps": 1}})
    rest = largest_stage(source, plain, 256).size_bytes
    enough = available_memory(*tree(tmp_path, "0::/box\n", {"box": v2(rest + 1_000_000)}))
    monkeypatch.setattr("se_compress.running.preflight.available_memory", lambda: enough)
    check_memory(source, plain, 256)
    with pytest.raises(ResourceError, match=r"refine takes .* MB for the largest layer .* leave"):
        check_memory(source, refined, 256)


@pytest.fixture
def source(tiny_model: Callable[[str], Path]) -> ModelSource:
    found = open_source(str(tiny_model("qwen3_moe")))
    assert found.config["max_position_embeddings"] == 256
    return found


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"calibration": {"sequence_length": 257}}, "calibration.sequence_length: 257 is more"),
        ({"validation": {"sequence_length": 512}}, "validation.sequence_length: 512 is more"),
        (
            {"validation": {"generation": {"prompt_tokens": 200, "tokens": 57}}},
            "validation.generation.prompt_tokens and tokens together: 257 is more",
        ),
    ],
)
def test_more_tokens_than_positions_are_refused(
    source: ModelSource, sections: dict[str, dict[str, object]], key: str
) -> None:
    texts = {"calibration": {"data": "a.txt"}, "validation": {"data": "b.txt"}}
    merged = {name: {"sequence_length": 64, **text, **sections.get(name, {})}
              for name, text in texts.items()}  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        check_positions(source, tiny.recipe(source.path, **merged))
    assert str(caught.value).startswith(key)
    assert "max_position_embeddings, 256" in str(caught.value)


def test_as_many_tokens_as_positions_are_fine_and_no_generation_takes_none(
    source: ModelSource,
) -> None:
    generation = {"prompt_tokens": 300, "tokens": 0}
    recipe = tiny.recipe(
        source.path,
        calibration={"data": "a.txt", "sequence_length": 256},
        validation={"data": "b.txt", "sequence_length": 256, "generation": generation},
    )
    check_positions(source, recipe)


def test_a_verdict_needs_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    (tmp_path / "loose").symlink_to("nowhere")
    check_place(tmp_path / "new" / "deep")
    check_place(tmp_path)
    for place in ("file", "file/below", "file/a/b", "loose", "loose/below"):
        with pytest.raises(RecipeError, match=r"is not a directory$"):
            check_place(tmp_path / place)
