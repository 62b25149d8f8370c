"""Headers and layouts are those of the safetensors library, and a damaged file is named."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from se_compress.artifacts import TensorInfo
from se_compress.errors import SourceError
from se_compress.headers import (
    INDEX_FILE,
    ITEM_BYTES,
    Slot,
    header_bytes,
    lay_out,
    read_header,
    read_headers,
)

SLOTS = [
    Slot("b", "BF16", (3, 5)),
    Slot("a", "F32", (7,)),
    Slot("mask", "BOOL", (3,)),
    Slot("scalar", "F64", ()),
    Slot("empty", "I32", (0, 4)),
    Slot("c", "I32", (2, 2)),
    Slot("eight", "F8_E4M3", (5,)),
]


def write_file(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ----------------------------------------------------------------------------------------- reading


def test_a_header_is_read_as_the_library_wrote_it(tmp_path: Path) -> None:
    tensors = {
        "model.norm.weight": torch.arange(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "lm_head.weight": torch.randn(4, 3),
        "packed": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "nothing": torch.empty(0, 2),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    found = {info.name: info for info in read_header(file)}
    assert set(found) == set(tensors)
    content = file.read_bytes()
    with safe_open(file, "pt") as reference:
        for name, tensor in tensors.items():
            info = found[name]
            assert (info.dtype, list(info.shape)) == (
                reference.get_slice(name).get_dtype(),
                reference.get_slice(name).get_shape(),
            )
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            assert content[info.begin : info.end] == raw
            assert info.file == str(file)


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3), "c": torch.ones(1)}, tmp_path / "two.safetensors")
    save_file({"stale": torch.ones(3)}, tmp_path / "left-over.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    found = read_headers(tmp_path)
    assert {name: Path(info.file).name for name, info in found.items()} == weight_map


def test_the_index_decides_between_two_copies(tmp_path: Path) -> None:
    for name in "one", "two":
        save_file({"a": torch.ones(2), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    weight_map = {"a": "one.safetensors", "one": "one.safetensors", "two": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert Path(read_headers(tmp_path)["a"].file).name == "one.safetensors"


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08\x00\x00", struct.pack("<Q", 0), struct.pack("<Q", 2**60) + b"{}", b"\x80" * 64],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    match = rf"^{re.escape(str(file))}: is truncated or not a safetensors file$"
    with pytest.raises(SourceError, match=match):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b'{"a": {"dtype": "F32", "shape": [1], "data_off',
        b'{"a": "\xff\xfe"}',
        [],
        {"a": 5},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
    ],
    ids=range(9),
)
def test_a_corrupt_header(tmp_path: Path, header: object) -> None:
    file = write_file(tmp_path / "model.safetensors", header, b"\0" * 4)
    match = rf"^{re.escape(str(file))}: has a corrupt safetensors header$"
    with pytest.raises(SourceError, match=match):
        read_header(file)


@pytest.mark.parametrize("missing", [1, 7, 16])
def test_a_truncated_file(tmp_path: Path, missing: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, file)
    content = file.read_bytes()
    file.write_bytes(content[:-missing])
    match = f"is {len(content) - missing} bytes long, but its header describes {len(content)}"
    with pytest.raises(SourceError, match=match):
        read_header(file)


def test_a_file_that_is_too_long(tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.safetensors", {"a": entry("F32", [1], 0, 4)}, b"\0" * 5)
    with pytest.raises(SourceError, match="its header describes"):
        read_header(file)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (entry("F32", [2], 0, 4), r"a is F32 \[2\] but has 4 bytes"),
        (entry("BF16", [2, 3], 0, 4), r"a is BF16 \[2, 3\] but has 4 bytes"),
        (entry("F32", [1], 4, 0), r"a is F32 \[1\] but has -4 bytes"),
    ],
)
def test_an_extent_that_does_not_fit_the_shape(
    tmp_path: Path, wrong: dict[str, object], match: str
) -> None:
    header = {"a": wrong, "last": entry("U8", [1], 3, 4)}
    file = write_file(tmp_path / "a.safetensors", header, b"\0" * 4)
    with pytest.raises(SourceError, match=match):
        read_header(file)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 5}}', "\x00"],
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(SourceError, match=rf"{INDEX_FILE}: cannot be read as an index"):
        read_headers(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    for name in "one", "two":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    weight_map = {"one": "two.safetensors", "two": "one.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match=r"places one in two\.safetensors, which does not hold"):
        read_headers(tmp_path)


# ------------------------------------------------------------------------------------------ layout


def places(layout: dict[str, TensorInfo]) -> dict[str, list[TensorInfo]]:
    """File name -> its tensors in the order of their bytes."""
    files: dict[str, list[TensorInfo]] = {}
    for info in sorted(layout.values(), key=lambda i: (i.file, i.begin, i.end)):
        files.setdefault(Path(info.file).name, []).append(info)
    return files


def test_one_shard(tmp_path: Path) -> None:
    layout = lay_out(SLOTS, tmp_path, 10**9)
    assert set(layout) == {slot.name for slot in SLOTS}
    for slot in SLOTS:
        placed = layout[slot.name]
        assert (placed.dtype, placed.shape) == (slot.dtype, slot.shape)
        assert placed.size_bytes == slot.size_bytes
        assert placed.begin % ITEM_BYTES[slot.dtype] == 0
    assert {info.file for info in layout.values()} == {str(tmp_path / "model.safetensors")}


def test_the_data_has_no_holes_and_follows_the_header(tmp_path: Path) -> None:
    for tensors in places(lay_out(SLOTS, tmp_path, 40)).values():
        start = tensors[0].begin
        header = header_bytes(tensors, start)
        assert len(header) == start
        assert start % 8 == 0
        ends = [start, *(info.end for info in tensors)]
        assert [info.begin for info in tensors] == ends[:-1]


def test_a_laid_out_file_reads_back_as_its_layout(tmp_path: Path) -> None:
    layout = lay_out(SLOTS, tmp_path, 10**9)
    tensors = places(layout)["model.safetensors"]
    size = max(info.end for info in tensors)
    header = header_bytes(tensors, tensors[0].begin)
    (tmp_path / "model.safetensors").write_bytes(header.ljust(size, b"\0"))
    assert {info.name: info for info in read_header(tmp_path / "model.safetensors")} == layout
    with safe_open(tmp_path / "model.safetensors", "pt") as reference:
        assert reference.metadata() == {"format": "pt"}
        assert set(reference.keys()) == set(layout)


def test_shards_are_filled_in_order(tmp_path: Path) -> None:
    slots = [Slot(f"t{i}", "F32", (size,)) for i, size in enumerate([10, 10, 5, 100, 1, 24, 1])]
    files = places(lay_out(slots, tmp_path, 100))
    held = {file: sorted(info.name for info in tensors) for file, tensors in files.items()}
    assert held == {
        "model-00001-of-00004.safetensors": ["t0", "t1", "t2"],
        "model-00002-of-00004.safetensors": ["t3"],  # larger than a shard may be: alone
        "model-00003-of-00004.safetensors": ["t4", "t5"],
        "model-00004-of-00004.safetensors": ["t6"],
    }


def test_the_layout_does_not_depend_on_the_directory_name(tmp_path: Path) -> None:
    short, long = (lay_out(SLOTS, tmp_path / name, 40) for name in ("a", "a" * 99))
    assert [(i.begin, i.end) for i in short.values()] == [(i.begin, i.end) for i in long.values()]
