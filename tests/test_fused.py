"""Fused experts are opened as the matrices of each expert, whatever their layout and code."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sourced import source_formats
from test_pipeline import Workplace
from test_pipeline import no_engine as no_engine
from tiny import CONFIGS, edit_weights, plain_model, random_tokens
from transformers import AutoModelForCausalLM

from se_compress.errors import SourceError
from se_compress.model.checkpoint import open_tensors, reserve, write_tensors
from se_compress.opening.encodings import Packing, decoded
from se_compress.opening.families import FAMILIES, Family
from se_compress.opening.fused import fused, unfused
from se_compress.opening.headers import Slot, lay_out, read_headers
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]
E, WIDTH, HIDDEN = 3, 32, 64
BF16 = torch.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_fused_by_transformers(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    """The names are then those in memory; the model is the same one, read from slices of it."""
    plain = open_source(str(tiny_model(name)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=BF16)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    source = open_source(str(tmp_path / "fused"))
    disk = read_headers(tmp_path / "fused")
    assert [n for n in disk if n.endswith("gate_up_proj")]
    assert source.tensors.keys() == plain.tensors.keys()
    assert source.experts.keys() == plain.experts.keys()
    read, expected = open_tensors(source.tensors), open_tensors(plain.tensors)
    for tensor, info in source.tensors.items():
        same = plain.tensors[tensor]
        assert (info.kind, info.layer, info.expert) == (same.kind, same.layer, same.expert)
        assert (info.role, info.shape) == (same.role, same.shape)
        assert info.stored is None  # no copy is made, and a result copies the bytes
        assert torch.equal(read(tensor), expected(tensor).to(read(tensor).dtype))
    assert source.size_bytes == sum(i.size_bytes for i in disk.values())


@pytest.mark.parametrize("form", ["fused-fp8", "mxfp4"])
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_fused_and_coded(tiny_model: TinyModel, tmp_path: Path, name: str, form: str) -> None:
    path = source_formats.write(form, tiny_model(name), tmp_path / form, 16)
    source, disk = open_source(str(path)), read_headers(path)
    read, raw = open_tensors(source.tensors), load_file(path / "model.safetensors")
    family = FAMILIES[name]
    for identity, roles in source.experts.items():
        if not isinstance(identity.expert, int):
            continue
        stem = family.expert.partition(".{expert}")[0].format(layer=identity.layer)
        gate_up, down = (one_expert(raw, f"{stem}.{part}_proj", identity.expert)
                         for part in ("gate_up", "down"))  # fmt: skip
        assert torch.equal(read(roles["gate"].name), gate_up[: len(gate_up) // 2])
        assert torch.equal(read(roles["up"].name), gate_up[len(gate_up) // 2 :])
        assert torch.equal(read(roles["down"].name), down)
    assert source.size_bytes == sum(info.size_bytes for info in disk.values())
    plain = open_source(str(tiny_model(name)))
    assert {n: i.shape for n, i in source.tensors.items()} == {
        n: i.shape for n, i in plain.tensors.items()
    }


def one_expert(raw: dict[str, torch.Tensor], name: str, expert: int) -> torch.Tensor:
    """The whole matrix of an expert, decoded value by value."""
    if name in raw:
        codes, scales = raw[name][expert], raw[f"{name}_scale_inv"][expert]
        row, column = torch.meshgrid(*(torch.arange(n) for n in codes.shape), indexing="ij")
        return (codes.float() * scales[row // 16, column // 16]).bfloat16()
    blocks, scales = raw[f"{name}_blocks"][expert], raw[f"{name}_scales"][expert]
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    pairs = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    found = values[pairs.long()] * torch.exp2(scales.float() - 127).unsqueeze(-1)
    return found.flatten(-2).bfloat16()


# --------------------------------------------------------------------------------- other layouts


def matrices(dtype: torch.dtype = BF16) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"gate": (E, WIDTH, HIDDEN), "up": (E, WIDTH, HIDDEN), "down": (E, HIDDEN, WIDTH)}
    return {role: torch.randn(s, generator=draw).to(dtype) for role, s in shapes.items()}


def as_fused(parts: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    gate, up, down = parts["gate"], parts["up"], parts["down"]
    gate_up = torch.cat([gate, up], 1)
    if family.transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    stem = "model.layers.5.mlp.experts."
    return {f"{stem}gate_up_proj": gate_up.contiguous(), f"{stem}down_proj": down.contiguous()}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_layouts(tmp_path: Path, transposed: bool, dtype: torch.dtype) -> None:
    biased = {"mlp.experts.gate_up_proj_bias": "gate_up_proj_bias",
              "mlp.experts.down_proj_bias": "down_proj_bias"}  # fmt: skip
    family = FAMILIES["qwen3_moe"]
    family = replace(family, transposed=transposed, fused={**family.fused, **biased})
    parts = matrices(dtype)
    biases = {role: tensor[:, :, 0].contiguous() for role, tensor in parts.items()}
    rows = torch.cat([biases["gate"], biases["up"]], 1)
    stem = "model.layers.5.mlp.experts."
    stored = {f"{stem}gate_up_proj_bias": rows, f"{stem}down_proj_bias": biases["down"]}
    save_file({**as_fused(parts, family), **stored}, tmp_path / "model.safetensors")
    disk = read_headers(tmp_path)
    found = unfused(disk, family)
    read = open_tensors(found)
    for expert in range(E):
        for role, tensor in parts.items():
            name = f"{stem}{expert}.{role}_proj"
            assert found[f"{name}.weight"].shape == tensor[expert].shape
            assert found[f"{name}.weight"].size_bytes == tensor[expert].nbytes
            assert read(f"{name}.weight").is_contiguous()
            assert torch.equal(read(f"{name}.weight"), tensor[expert])
            assert torch.equal(read(f"{name}.bias"), biases[role][expert])
    assert len(found) == 6 * E
    assert sum(i.disk_bytes for i in found.values()) == sum(i.size_bytes for i in disk.values())
    whole = [n for n, info in found.items() if info.stored is None]
    assert bool(whole) is (not transposed or bool([n for n in whole if n.endswith("bias")]))
    if not transposed:
        assert len(whole) == len(found)


def test_fp8_is_turned_where_the_family_is(tmp_path: Path) -> None:
    """Blocks of 16, over matrices [C, R]."""
    family = replace(FAMILIES["qwen3_moe"], transposed=True)
    stored = source_formats.fused_fp8(as_fused(matrices(), family), 16)
    save_file(stored, tmp_path / "model.safetensors")
    found = unfused(decoded(read_headers(tmp_path), Packing((16, 16)), "config.json"), family)
    read = open_tensors(found)
    stem = "model.layers.5.mlp.experts."
    for expert in range(E):
        gate_up = one_expert(stored, f"{stem}gate_up_proj", expert).T
        assert torch.equal(read(f"{stem}{expert}.gate_proj.weight"), gate_up[:WIDTH])
        assert torch.equal(read(f"{stem}{expert}.up_proj.weight"), gate_up[WIDTH:])


def test_mxfp4_has_rows_whatever_the_plain_layout(tmp_path: Path) -> None:
    """gpt-oss: the blocks are [E, rows, ...] though its plain matrices are transposed."""
    family = replace(FAMILIES["qwen3_moe"], transposed=True)
    plain = replace(family, transposed=False)
    stored = source_formats.in_mxfp4(as_fused(matrices(), plain))
    path = tmp_path / "model.safetensors"
    save_file(stored, path)
    found = unfused(decoded(read_headers(tmp_path), Packing(), "config.json"), family)
    read = open_tensors(found)
    for role, tensor in matrices().items():
        for expert in range(E):
            name = f"model.layers.5.mlp.experts.{expert}.{role}_proj.weight"
            blocks, scales = source_formats.to_mxfp4(tensor[expert])
            raw = {"x_blocks": blocks[None], "x_scales": scales[None]}
            assert torch.equal(read(name), one_expert(raw, "x", 0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 1000])
def test_written_into_fused_tensors(tmp_path: Path, transposed: bool, shard_bytes: int) -> None:
    """Matrix by matrix, in any order, each beside the others, and found where it was put."""
    family = FAMILIES["qwen3_moe"]
    family = replace(family, transposed=transposed, fused={
        **family.fused, "mlp.input_linear.weight": "gate_up_proj",
        "mlp.experts.gate_up_proj_bias": "gate_up_proj_bias",
    })  # fmt: skip
    parts, stem = matrices(), "model.layers.5.mlp.experts."
    single = {
        f"{stem}{e}.{role}_proj.weight": tensor[e].contiguous()
        for e in range(E)
        for role, tensor in parts.items()
    }
    single |= {n.replace("weight", "bias"): t[:, 0].contiguous() for n, t in single.items()
               if "down" not in n}  # fmt: skip
    single["model.norm.weight"] = torch.ones(HIDDEN, dtype=BF16)
    slots = {name: Slot(name, "BF16", tuple(t.shape)) for name, t in single.items()}
    whole = fused(slots, family)
    assert set(whole) == {f"{stem}down_proj", "model.layers.5.mlp.input_linear.weight",
                          f"{stem}gate_up_proj_bias", "model.norm.weight"}  # fmt: skip
    assert sum(s.size_bytes for s in whole.values()) == sum(s.size_bytes for s in slots.values())
    files = lay_out(whole.values(), tmp_path, shard_bytes)
    reserve(files)
    layout = unfused(files, family)
    for name in sorted(single, reverse=True):
        write_tensors(layout, {name: single[name]})
    found = read_headers(tmp_path)
    written = open_tensors(unfused(found, family))
    assert all(torch.equal(written(name), tensor) for name, tensor in single.items())
    disk, expected = open_tensors(found), as_fused(parts, family)
    gate_up = disk("model.layers.5.mlp.input_linear.weight")
    assert torch.equal(gate_up, expected[f"{stem}gate_up_proj"])
    assert torch.equal(disk(f"{stem}down_proj"), expected[f"{stem}down_proj"])


def test_experts_that_cannot_be_fused() -> None:
    names = [f"model.layers.5.mlp.experts.{e}.down_proj.weight" for e in range(2)]
    slots = {n: Slot(n, d, (4, 4)) for n, d in zip(names, ("BF16", "F32"), strict=True)}
    with pytest.raises(ValueError, match=r"experts\.down_proj would be fused of \[\('BF16', \(4,"):
        fused(slots, FAMILIES["qwen3_moe"])


NONE = ("target=transformers", "quantization={method: none}")


@pytest.mark.parametrize(
    ("form", "policy"),
    [
        ("fused", "{}"),
        ("plain", "{prune: {fraction: 0.25}}"),
        ("mxfp4", "{merge: {fraction: 0.5}}"),
        ("mxfp4", "{zero: random}"),
    ],
)
def test_results_of_families_that_are_published_fused(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, policy: str
) -> None:
    """The same model as single matrices would be, as transformers loads and runs both."""
    coded = source_formats.write(form, tiny_model("qwen3_moe"), tmp_path / "coded")
    place = Workplace(tmp_path, coded)
    single = shutil.copytree(place.run(*NONE, f"policy={policy}").directory, tmp_path / "single")
    shutil.rmtree(place.output)
    row = replace(FAMILIES["qwen3_moe"], published_fused=True)
    monkeypatch.setitem(FAMILIES, "qwen3_moe", row)  # type: ignore[arg-type]
    outcome = place.run(*NONE, f"policy={policy}", "shard_size=20000")
    assert outcome.published
    disk = read_headers(outcome.directory)
    assert all(len(i.shape) == 3 for n, i in disk.items() if ".experts." in n)
    found = open_tensors(unfused(disk, row))
    for name, tensor in load_file(single / "model.safetensors").items():
        assert torch.equal(found(name), tensor)
    report = outcome.validation
    assert report.size_bytes == place.plan().size_bytes
    assert report.expert_bytes == sum(i.size_bytes for n, i in disk.items() if ".experts." in n)
    tokens = torch.tensor(random_tokens(1, 8))
    with torch.no_grad():
        logits = plain_model(outcome.directory)(tokens).logits
        assert torch.equal(logits, plain_model(single)(tokens).logits)


@pytest.mark.parametrize("shape", [(8, 64), (8, 63, 64), (8, 0, 64), (8, 64, 64, 1)])
def test_extents_that_are_none_of_experts(
    tiny_model: TinyModel, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    path = shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "model")
    edit_weights(path, {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(shape, dtype=BF16)})
    with pytest.raises(SourceError, match=r"gate_up_proj is \[8, .*3 extents, with gate and up in"):
        open_source(str(path))


def test_a_copy_beside_the_fused_ones(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Which of the two is the model's? Neither is taken."""
    path = source_formats.write("fused", tiny_model("qwen3_moe"), tmp_path / "fused")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_weights(path, {name: torch.zeros(32, 64, dtype=BF16)})
    with pytest.raises(SourceError, match=rf"{name} is there twice, fused and by itself"):
        open_source(str(path))


def test_transformers_runs_the_fused_file_alike(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What the script writes is what transformers takes for the model."""
    path = source_formats.write("fused", tiny_model("qwen2_moe"), tmp_path / "fused")
    tokens = torch.tensor(random_tokens(1, 8))
    with torch.no_grad():
        expected = plain_model(tiny_model("qwen2_moe"))(tokens).logits
        assert torch.equal(plain_model(path)(tokens).logits, expected)
