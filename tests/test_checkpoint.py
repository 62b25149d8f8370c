"""What is written is what safetensors and transformers read; what is read is what is there."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import edit_weights, plain_model, random_tokens
from torch import Tensor

from se_compress.artifacts import Scheme, TensorInfo
from se_compress.errors import ResourceError, SourceError
from se_compress.model.checkpoint import (
    COPY_BYTES,
    check_finite,
    copy_tensor,
    open_result,
    open_tensors,
    reserve,
    write_tensors,
)
from se_compress.model.streaming import StreamedModel
from se_compress.opening.headers import INDEX_FILE, Slot, header_bytes, lay_out, read_headers
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]

TENSORS = {
    "bf16": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "f32": torch.arange(7, dtype=torch.float32),
    "f64": torch.tensor(0.1, dtype=torch.float64),
    "bool": torch.tensor([True, False, True]),
    "f8": torch.tensor([1.0, -2.0, 448.0]).to(torch.float8_e4m3fn),
    "i32": torch.arange(-3, 3, dtype=torch.int32).reshape(2, 3),
    "empty": torch.empty(0, 4, dtype=torch.int32),
    "f16": torch.ones(3, dtype=torch.float16),
    "transposed": torch.arange(6, dtype=torch.int64).reshape(2, 3).T,
}
NAMES = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32", torch.float16: "F16", torch.int64: "I64",
}  # fmt: skip


def slots_of(tensors: dict[str, Tensor]) -> list[Slot]:
    return [Slot(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def raw(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


# ----------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40, 1])
def test_what_is_written_is_what_the_library_reads(tmp_path: Path, max_shard_bytes: int) -> None:
    layout = lay_out(slots_of(TENSORS), tmp_path, max_shard_bytes)
    reserve(layout)
    names = list(TENSORS)
    write_tensors(layout, {name: TENSORS[name] for name in names[4:]})
    write_tensors(layout, {name: TENSORS[name] for name in names[:4]})
    stored: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= load_file(file)
    assert set(stored) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert stored[name].dtype == tensor.dtype
        assert stored[name].shape == tensor.shape
        assert raw(stored[name]) == raw(tensor)


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    layout = lay_out(slots_of(TENSORS), tmp_path, 40)
    reserve(layout)
    for name, info in read_headers(tmp_path).items():
        assert info.begin % TENSORS[name].element_size() == 0


def test_the_index(tmp_path: Path) -> None:
    layout = lay_out(slots_of(TENSORS), tmp_path, 40)
    reserve(layout)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(len(raw(t)) for t in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    assert len(set(index["weight_map"].values())) > 2
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, "pt") as file:
            assert name in set(file.keys())


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    reserve(lay_out(slots_of(TENSORS), tmp_path, 10**9))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_transformers_loads_the_shards(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("deepseek_v3")
    result = tmp_path / "result"
    shutil.copytree(source, result, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    layout = lay_out(slots_of(tensors), result, 100_000)
    reserve(layout)
    write_tensors(layout, tensors)
    assert len(list(result.glob("*.safetensors"))) > 3
    tokens = torch.tensor(random_tokens(1, 8))
    with torch.no_grad():
        assert torch.equal(plain_model(result)(tokens).logits, plain_model(source)(tokens).logits)


@pytest.mark.parametrize("wrong", [torch.zeros(7, dtype=torch.float64), torch.zeros(7, 1)])
def test_a_tensor_that_the_layout_does_not_expect(tmp_path: Path, wrong: Tensor) -> None:
    layout = lay_out(slots_of(TENSORS), tmp_path, 10**9)
    reserve(layout)
    with pytest.raises(ValueError, match=r"^f32 is torch\.float.* \(7,.*, not as in"):
        write_tensors(layout, {"f32": wrong})


# ------------------------------------------------------------------------------------ allocation


def test_allocating_again_leaves_the_data(tmp_path: Path) -> None:
    layout = lay_out(slots_of(TENSORS), tmp_path, 40)
    reserve(layout)
    write_tensors(layout, TENSORS)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    reserve(layout)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["header", "longer", "shorter"])
def test_a_file_of_another_layout_is_made_anew(tmp_path: Path, damage: str) -> None:
    layout = lay_out(slots_of(TENSORS), tmp_path, 10**9)
    reserve(layout)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek({"header": 20, "longer": size, "shorter": 0}[damage])
        stream.write(b"x" * 9)
        if damage == "shorter":
            stream.truncate(size - 5)
    assert (file.stat().st_size == size) is (damage == "header")
    reserve(layout)
    found = read_headers(tmp_path)
    assert found == layout
    assert file.stat().st_size == size
    assert not any(file.read_bytes()[min(i.begin for i in layout.values()) :])


def test_space_is_taken_at_once(tmp_path: Path) -> None:
    reserve(lay_out([Slot("a", "U8", (3_000_000,))], tmp_path, 10**9))
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 >= 3_000_000


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_not_enough_space(tmp_path: Path) -> None:
    slots = [Slot("small", "U8", (100,)), Slot("large", "U8", (2_500_000,))]
    layout = lay_out(slots, tmp_path / "checkpoint", 1_000_000)
    match = r"checkpoint: 0\.00 GB cannot be allocated \(.+\)$"
    with largest_file(1_000_000), pytest.raises(ResourceError, match=match):
        reserve(layout)
    left = [file.name for file in (tmp_path / "checkpoint").iterdir()]
    assert left == ["model-00001-of-00002.safetensors"]
    reserve(layout)
    assert read_headers(tmp_path / "checkpoint") == layout


# ----------------------------------------------------------------------------------------- reading


def test_reading_by_name(tmp_path: Path) -> None:
    tensors = {name: t.contiguous() for name, t in TENSORS.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    read = open_tensors(read_headers(tmp_path))
    for name, tensor in tensors.items():
        found = read(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert raw(found) == raw(tensor)


def test_a_tensor_beyond_the_first_pages(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((1000 + i,), i, dtype=torch.int32) for i in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    read = open_tensors(read_headers(tmp_path))
    assert all(torch.equal(read(name), tensor) for name, tensor in tensors.items())


def test_a_file_that_does_not_align_its_tensors(tmp_path: Path) -> None:
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "f32": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    data = b"\1\2\3" + np.array([1.5, -2.5], dtype="<f4").tobytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert open_tensors(read_headers(tmp_path))("f32").tolist() == [1.5, -2.5]


def test_nothing_that_is_done_to_a_tensor_reaches_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    open_tensors(read_headers(tmp_path))("a").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_tensor_outlives_its_reader(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    tensor = open_tensors(read_headers(tmp_path))("a")
    (tmp_path / "model.safetensors").unlink()
    assert float(tensor.sum()) == 499_500


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    slots = [Slot("huge", "U8", (3 * pages,)), Slot("small", "U8", (3,))]
    layout = lay_out(slots, tmp_path, 10**15)
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:  # a hole: takes no space
        stream.write(header_bytes(layout.values(), layout["huge"].begin))
        stream.truncate(layout["small"].end)
    write_tensors(layout, {"small": torch.tensor([1, 2, 3], dtype=torch.uint8)})
    assert open_tensors(read_headers(tmp_path))("small").tolist() == [1, 2, 3]


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^gone: the checkpoint has no such tensor$"):
        open_tensors({})("gone")


def test_a_dtype_that_torch_does_not_have() -> None:
    info = TensorInfo("a", "F4", (2,), "nowhere", 0, 1)
    with pytest.raises(SourceError, match=r"^a: dtype F4 cannot be read$"):
        open_tensors({"a": info})("a")


# ----------------------------------------------------------------------------------------- copying


def test_copying_moves_bytes_only(tmp_path: Path) -> None:
    """Even a dtype that nothing here can read, and more than one buffer of it."""
    size = COPY_BYTES + 12_345
    content = np.random.default_rng(0).bytes(size)
    source = TensorInfo("a", "F4", (2 * size,), str(tmp_path / "source"), 7, 7 + size)
    target = TensorInfo("a", "F4", (2 * size,), str(tmp_path / "target"), 3, 3 + size)
    (tmp_path / "source").write_bytes(b"-" * 7 + content + b"-")
    (tmp_path / "target").write_bytes(b"+" * (size + 8))
    copy_tensor(source, target)
    assert (tmp_path / "target").read_bytes() == b"+++" + content + b"+++++"


def test_copying_from_a_file_that_was_cut_meanwhile(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).write_bytes(b"1234")
    source = TensorInfo("a", "U8", (9,), str(tmp_path / "source"), 0, 9)
    with pytest.raises(SourceError, match=r"source: ended within a; it has changed"):
        copy_tensor(source, TensorInfo("a", "U8", (9,), str(tmp_path / "target"), 0, 9))


# ------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize(
    ("values", "bad"),
    [([1.0, float("nan"), 3.0], 1), ([float("inf"), float("-inf")], 2), ([float("-inf")], 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(values: list[float], bad: int, dtype: torch.dtype) -> None:
    match = rf"^a\.weight: {bad} of {len(values)} values are NaN or infinite$"
    with pytest.raises(SourceError, match=match):
        check_finite("a.weight", torch.tensor(values, dtype=dtype))


def test_finite_values_whose_sum_is_not() -> None:
    tensor = torch.full((4,), 3e38)
    assert check_finite("a", tensor) is tensor


def test_integers_are_finite() -> None:
    assert check_finite("a", torch.tensor([1, 2])).tolist() == [1, 2]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.5.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_model_with_a_bad_weight_names_it(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    path = shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "model")
    weight = load_file(path / "model.safetensors")[name].clone()
    weight.view(-1)[-1] = float("nan")
    edit_weights(path, {name: weight})
    source = open_source(str(path))
    with pytest.raises(SourceError, match=rf"^{name}: 1 of {weight.numel()} values are NaN"):
        run_all(StreamedModel(source, open_tensors(source.tensors)))


def run_all(model: StreamedModel) -> None:
    hidden = model.embed([torch.tensor(random_tokens(1, 8))])
    for layer in range(model.source.layer_count):
        module = model.load_layer(layer)
        hidden = model.run_layer(layer, module, hidden)
        if layer in model.source.moe_layers:  # also those that no token went to
            model.layer_experts(module).load(range(model.source.expert_count))
    list(model.logits(hidden))


# ------------------------------------------------------------------------------ packed weights


def packed_by_hand(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each row of codes as a little-endian string of bits, cut into int32 words [N, K*bits/32]."""
    as_bits = (codes[:, :, None] >> np.arange(bits)) & 1
    octets = np.packbits(as_bits.reshape(len(codes), -1).astype(np.uint8), 1, bitorder="little")
    return octets.view("<i4")


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_result_is_read_under_the_names_of_its_source(
    tmp_path: Path, bits: int, group_size: int
) -> None:
    rows, columns = 64, 96
    random = np.random.default_rng(bits)
    groups = 1 if group_size == -1 else columns // group_size
    group_of = np.arange(columns) // (columns if group_size == -1 else group_size)
    codes = random.integers(0, 2**bits, (rows, columns))
    zeros = random.integers(1, 2**bits, (rows, groups))
    scales = random.uniform(0.01, 1, (rows, groups)).astype(np.float16)
    save_file(
        {
            "q.qweight": torch.from_numpy(packed_by_hand(codes, bits).T.copy()),
            "q.qzeros": torch.from_numpy(packed_by_hand(zeros.T - 1, bits).copy()),
            "q.scales": torch.from_numpy(scales.T.copy()),
            "q.g_idx": torch.from_numpy(group_of.astype(np.int32)),
            "plain.weight": torch.ones(3, dtype=torch.bfloat16),
        },
        tmp_path / "model.safetensors",
    )
    source = {
        "q.weight": TensorInfo("q.weight", "BF16", (rows, columns), "unread", 0, 0),
        "plain.weight": TensorInfo("plain.weight", "BF16", (3,), "unread", 0, 0),
    }
    read = open_result(read_headers(tmp_path), source, Scheme("gptq", "gptq", 32, True))
    expected = np.empty((rows, columns), dtype=np.float32)
    for row in range(rows):
        for column in range(columns):
            group = group_of[column]
            step = float(codes[row, column] - zeros[row, group])
            expected[row, column] = np.float32(step) * np.float32(scales[row, group])
    assert read("q.weight").dtype == torch.float32
    np.testing.assert_array_equal(read("q.weight").numpy(), expected)
    assert read("plain.weight").tolist() == [1, 1, 1]
    assert read("plain.weight").dtype == torch.bfloat16
    with pytest.raises(SourceError, match=r"gone\.weight: the checkpoint has no such tensor"):
        read("gone.weight")
