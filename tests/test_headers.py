"""Headers and layouts are those of the safetensors library, and a damaged file is named."""

import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from se_compress.artifacts import TensorInfo
from se_compress.errors import SourceError
from se_compress.opening.headers import (
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


def test_a_single_file_beside_foreign_ones(tmp_path: Path) -> None:
    """transformers loads model.safetensors, whatever else is there."""
    for name in "model", "adapter_model", "consolidated", "model-00001-of-00002":
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    assert list(read_headers(tmp_path)) == ["model"]


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


PLAIN = entry("F32", [2], 0, 8)
NESTED = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": %s%s}}'
# Header, what is wrong with it: the safetensors library refuses all of them for 8 bytes of data.
CORRUPT: list[tuple[object, str]] = [
    (b"not json at all", "Expecting value"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_off', "Unterminated string"),
    (b'{"a": "\xff\xfe"}', "can't decode byte 0xff"),
    (json.dumps({"a": PLAIN}).encode("utf-16"), "can't decode byte"),
    (b"\xef\xbb\xbf" + json.dumps({"a": PLAIN}).encode(), "BOM"),
    (json.dumps({"a": PLAIN}).encode() + b"\0\0", "Extra data"),
    (b'{"a\x01": 5}', "Invalid control character"),
    ([], "no mapping of tensors"),
    ({"a": 5}, "a has not a dtype, a shape and two data_offsets, but 5"),
    ({"a": None}, "a has not a dtype"),
    ({"a": {"dtype": "F32", "shape": [1]}}, "a has not a dtype"),
    ({"a": {"shape": [1], "data_offsets": [0, 8]}}, "a has not a dtype"),
    ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, "a has the shape 1"),
    ({"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, "a has the shape"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "two data_offsets"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "two data_offsets"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": None}}, "two data_offsets"),
    ({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, "a has the shape"),
    ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "a has the shape"),
    ({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "a has the shape"),
    ({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, "a has the shape"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8]}}, "a has the data_offsets"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", 8]}}, "a has the data_offsets"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [False, 8]}}, "a has the data_offsets"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "a has the data_offsets"),
    ({"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}, "an unknown dtype, X9"),
    ({"a": {"dtype": "f32", "shape": [2], "data_offsets": [0, 8]}}, "an unknown dtype"),
    ({"a": {"dtype": None, "shape": [2], "data_offsets": [0, 8]}}, "an unknown dtype"),
    ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "an unknown dtype"),
    ({"a": entry("F4", [3], 0, 2)}, r"a is F4 \[3\] but has 2 bytes"),
    ({"a": entry("F32", [2], 0, 2**70)}, r"a is F32 \[2\] but has 1180591620717411303424 bytes"),
    ({"a": entry("F32", [2**40, 2**40, 0], 0, 0)}, "more items than can be counted"),
    ({"a": entry("F32", [10**30], 0, 8)}, "more items than can be counted"),
    ({"a": PLAIN, "b": PLAIN}, "b begins at byte 0 of the data, which overlaps"),
    ({"a": entry("F32", [1], 0, 4), "b": entry("U8", [1], 7, 8)}, "leaves a hole before it"),
    ({"a": entry("F32", [1], 4, 8)}, "leaves a hole before it"),
    ({"a": PLAIN, "z": entry("F32", [0, 5], 3, 3)}, "overlaps"),
    ({"__metadata__": {"a": 1}, "a": PLAIN}, "__metadata__ is no mapping of words to words"),
    ({"__metadata__": [1], "a": PLAIN}, "__metadata__ is no mapping"),
    (b'{"__metadata__": {}, "__metadata__": {}}', "the key __metadata__ stands in it twice"),
    (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "surrogates"),
    (NESTED % (b"NaN", b""), "NaN is no JSON"),
    (NESTED % (b"[" * 200, b"]" * 200), "nested without end"),
    (NESTED % (b"[" * 100_000, b"]" * 100_000), "nested without end"),
    (b"[" * 1_000_000, "nested without end"),
]


@pytest.mark.parametrize(("header", "reason"), CORRUPT, ids=range(len(CORRUPT)))
def test_a_corrupt_header(tmp_path: Path, header: object, reason: str) -> None:
    file = write_file(tmp_path / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    match = rf"^{re.escape(str(file))}: has a corrupt safetensors header \(.*{reason}.*\)$"
    with pytest.raises(SourceError, match=match) as caught:
        read_header(file)
    assert len(str(caught.value)) < 400


def test_one_name_for_two_tensors(tmp_path: Path) -> None:
    """The library takes the second of them; which one was meant nobody knows."""
    once = json.dumps(PLAIN)
    file = write_file(
        tmp_path / "a.safetensors", f'{{"a": {once}, "a": {once}}}'.encode(), b"8" * 8
    )
    with pytest.raises(SourceError, match="the key a stands in it twice"):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        {"a": PLAIN},
        {"__metadata__": None, "a": PLAIN},
        {"a": {**PLAIN, "more": [1]}},
        {"a": entry("F32", [1], 4, 8), "b": entry("F32", [1], 0, 4), "z": entry("I8", [0], 4, 4)},
        {"a": PLAIN, "z": entry("F32", [0, 5], 8, 8)},
        {"a": entry("C64", [1], 0, 8)},
        {"a": entry("F4", [16], 0, 8)},
        {"a": entry("F6_E2M3", [4], 0, 3), "b": entry("F8_E8M0", [5], 3, 8)},
        {"a": entry("F8_E4M3FNUZ", [4], 0, 4), "b": entry("F8_E5M2FNUZ", [4], 4, 8)},
        b"\n  " + json.dumps({"": entry("F64", [], 0, 8)}).encode() + b"   ",
    ],
    ids=range(10),
)
def test_what_the_library_takes(tmp_path: Path, header: object) -> None:
    file = write_file(tmp_path / "model.safetensors", header, b"\0" * 8)
    with safe_open(file, "pt") as reference:
        names = set(reference.keys())
    assert {info.name for info in read_header(file)} == names


def test_a_header_that_would_fill_memory(tmp_path: Path) -> None:
    text = b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"
    file = write_file(tmp_path / "model.safetensors", text)
    with pytest.raises(SourceError, match="30000010 bytes for few tensors"):
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
    [
        "{",
        "[]",
        '{"metadata": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 5}}',
        "\x00",
        '{"weight_map": {}}',
        '{"weight_map": null}',
        '{"weight_map": {"a": null}}',
        "[" * 10**5,
        '{"weight_map": {"a": "b", "a": "c"}}',
        '{"weight_map": {"a": ["b"]}}',
        "",
    ],
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    match = rf"{INDEX_FILE}: (cannot be read as an index|is not JSON)"
    with pytest.raises(SourceError, match=match):
        read_headers(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    for name in "one", "two":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    weight_map = {"one": "two.safetensors", "two": "one.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match=r"places one in two\.safetensors, which does not hold"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../stolen.safetensors", "/etc/stolen.safetensors", "a/../../stolen.safetensors", "..",
     "link.safetensors", "folder/stolen.safetensors"],
)  # fmt: skip
def test_an_index_that_leads_out_of_the_directory(tmp_path: Path, shard: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "stolen.safetensors")
    (model / "link.safetensors").symlink_to(tmp_path / "stolen.safetensors")
    (model / "folder").symlink_to(tmp_path)
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(SourceError, match="leads out of the model's directory"):
        read_headers(model)


def test_a_single_file_that_leads_out_of_the_directory(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "stolen.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to("../stolen.safetensors")
    with pytest.raises(SourceError, match="leads out of the model's directory"):
        read_headers(tmp_path / "model")


@pytest.mark.parametrize("shard", ["", "x\0y", "x\ny", "x" * 300, "\ud800", "x/", "/"])
def test_a_shard_that_no_file_can_be(tmp_path: Path, shard: str) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(SourceError, match="which no file is called") as caught:
        read_headers(tmp_path)
    assert len(str(caught.value)) < 400


def test_a_link_within_the_directory_is_a_shard(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "parts" / "one.safetensors")
    (tmp_path / "two.safetensors").symlink_to("parts/one.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    assert set(read_headers(tmp_path)) == {"a"}


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in "one", "two":
        save_file({"a": torch.ones(2), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    weight_map = {"a": "one.safetensors", "one": "one.safetensors", "two": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match=r"a is in two shards, one\.safetensors and two\.safe"):
        read_headers(tmp_path)


def test_a_tensor_that_the_index_leaves_out(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(SourceError, match=r"one\.safetensors: holds b, which .*json leaves out"):
        read_headers(tmp_path)


@pytest.mark.parametrize("also", [{}, {"b": "model.safetensors"}])
def test_an_index_beside_a_single_file(tmp_path: Path, also: dict[str, str]) -> None:
    """transformers would load model.safetensors and never look at the shards."""
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    weight_map = {"a": "one.safetensors", **also}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match=r"which transformers would load, .* one of the two has"):
        read_headers(tmp_path)


def test_an_index_of_the_single_file(tmp_path: Path) -> None:
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"b": "model.safetensors"}}))
    assert set(read_headers(tmp_path)) == {"b"}


def unreadable(file: Path, kind: str) -> str:
    """Put something in the place of a file; what is to be said of it."""
    file.unlink(missing_ok=True)
    if kind == "directory":
        file.mkdir()
        return "is a directory, not a file"
    if kind == "pipe":
        os.mkfifo(file)
        return "is a device or pipe, not a file"
    if kind == "pointer":
        oid = "0" * 64
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 9\n")
        return "is a Git LFS pointer, not the file that it stands for; fetch it"
    file.symlink_to({"nowhere": "../blobs/none", "itself": file.name, "zero": "/dev/zero"}[kind])
    return "is a device or pipe" if kind == "zero" else "is a link to nowhere"


@pytest.mark.parametrize("kind", ["directory", "pipe", "pointer", "nowhere", "itself", "zero"])
@pytest.mark.parametrize("name", ["model.safetensors", "one.safetensors", INDEX_FILE])
def test_what_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    if name != "model.safetensors":
        save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    told = unreadable(tmp_path / name, kind)
    with pytest.raises(SourceError, match=rf"{re.escape(name)}: {told}"):
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
