"""transformers loads our bitsandbytes files: `import se_compress`, then plain `from_pretrained`.

The proof does not share code with the writer: bitsandbytes' own functions read the file back, the
weights go into an ordinary checkpoint, and transformers alone runs that.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from se_compress.artifacts import CompressionPlan, ModelSource
from se_compress.compression.execute import compress
from se_compress.engines import loading
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.loading import PackedLinear
from se_compress.errors import SourceError
from se_compress.model.checkpoint import open_result
from se_compress.model.streaming import StreamedModel
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan

TinyModel = Callable[[str], Path]
TYPES = ("nf4", "fp4", "int8")
TOKENS = tiny.random_tokens(2, 24, seed=5)


@dataclass(frozen=True)
class Result:
    """A tiny model, compressed as the pipeline does it."""

    source: ModelSource
    plan: CompressionPlan
    directory: Path


def write(model: Path, directory: Path, data_type: str, **policy: Any) -> Result:
    source = open_source(str(model))
    protect = [{"layer": source.moe_layers[-1], "expert": 2}]
    quantization: dict[str, Any] = {"method": "bitsandbytes", "data_type": data_type}
    if data_type != "int8":
        quantization["block_size"] = 32
    recipe = tiny.recipe(
        source.name,
        policy={"protect": protect, "bits": 8 if data_type == "int8" else 4, **policy},
        quantization=quantization,
    )
    plan = make_plan(source, None, recipe)
    compress(source, plan, TOKENS, recipe, directory)
    return Result(source, plan, directory)


@pytest.fixture(scope="module")
def result(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Result:
    root = tmp_path_factory.mktemp("nf4")
    return write(tiny_model("qwen3_moe"), root / "result", "nf4")


@pytest.fixture
def copy(result: Result, tmp_path: Path) -> Path:
    return Path(shutil.copytree(result.directory, tmp_path / "copy"))


def load(directory: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    return AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **settings)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor(TOKENS)).logits
    return found


def streamed_logits(result: Result) -> Tensor:
    """What the validator sees."""
    found, scheme = read_headers(result.directory), result.plan.scheme
    model = StreamedModel(result.source, open_result(found, result.source.tensors, scheme))
    states = model.embed([torch.tensor(TOKENS)])
    for layer in range(result.source.layer_count):
        states = model.run_layer(layer, model.load_layer(layer), states)
    return next(model.logits(states))


def unpacked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], kind: str) -> Tensor:
    """One matrix of the file, through bitsandbytes and its own way of storing a state."""
    if kind == "int8":
        maxima = tensors[name.replace(".weight", ".SCB")]
        return functional.int8_vectorwise_dequant(tensors[name].view(shape), maxima)
    stored = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(name)}
    state = {
        **{key: tensor for key, tensor in stored.items() if key != name},
        "quant_type": kind,
        "blocksize": 32,
        "quant_map": functional.get_4bit_type(kind, device="cpu"),
        "dtype": "float32",
        "shape": shape,
        "nested_blocksize": 256,
        "nested_quant_map": functional.create_dynamic_map(),
        "nested_dtype": "float32",
    }
    quant_state = functional.QuantState.from_dict(state, torch.device("cpu"))
    return functional.dequantize_4bit(tensors[name], quant_state)


def plain_model(result: Result, directory: Path) -> Any:
    """The source's checkpoint with every packed matrix replaced by what the file says it is."""
    shutil.copytree(result.source.path, directory)
    kind = str(result.plan.scheme.data_type)
    tensors = load_file(result.directory / "model.safetensors")
    weights, packed = load_file(directory / "model.safetensors"), 0
    for name, original in weights.items():
        if tensors[name].dtype in (torch.uint8, torch.int8):
            weights[name] = unpacked(tensors, name, tuple(original.shape), kind)
            packed += 1
        else:
            assert torch.equal(tensors[name], original)
            weights[name] = original.float()
    assert packed == len([*draw_blueprint(result.source, result.plan).packed()])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return tiny.plain_model(directory)


@pytest.mark.parametrize("data_type", TYPES)
@pytest.mark.parametrize("name", [*tiny.CONFIGS, "deepseek_v3-next-token", "qwen3_moe-tied"])
def test_the_file_means_what_bitsandbytes_and_transformers_alone_make_of_it(
    tiny_model: TinyModel, tmp_path: Path, name: str, data_type: str
) -> None:
    result = write(tiny_model(name), tmp_path / "result", data_type)
    model, info = load(result.directory, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    behind = f"model.layers.{result.source.layer_count}."  # next-token layers, which nobody loads
    assert all(key.startswith(behind) for key in info["unexpected_keys"])
    expected = logits(plain_model(result, tmp_path / "plain"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), streamed_logits(result), rtol=1e-4, atol=1e-4)
    # Far from the source's: these are the quantised weights, and not the original ones.
    source = logits(tiny.plain_model(result.source.path))
    assert (expected - source).abs().max() > 0.01


# -------------------------------------------------------------------------------- the loaded model


def test_memory_holds_the_bytes_of_the_file(result: Result) -> None:
    model, _ = load(result.directory, dtype="auto")
    logits(model)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert sum(held.values()) == result.plan.size_bytes
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 3 * (len(result.source.experts) - 1)
    # transformers' own bitsandbytes leaves the experts as they are.
    assert result.plan.size_bytes < 0.7 * result.source.size_bytes


def test_another_dtype_changes_weights_and_not_the_packed_parts(result: Result) -> None:
    model, _ = load(result.directory, dtype=torch.float32)
    halved, _ = load(result.directory, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        is_packed = "absmax" in name or "nested_offset" in name
        wanted = before[name].dtype if is_packed or before[name].dtype == torch.uint8 else None
        assert tensor.dtype == (wanted or torch.bfloat16), name
        torch.testing.assert_close(tensor, halved.state_dict()[name], rtol=0, atol=0)
    # Not the whole model: `to` casts transformers' own position frequencies, loading does not.
    states = torch.randn(24, tiny.HIDDEN).bfloat16()
    chosen, weights = torch.arange(48).view(24, 2) % 8, torch.full((24, 2), 0.5).bfloat16()
    first, second = (
        m.model.layers[2].mlp.experts(states, chosen, weights) for m in (model, halved)
    )
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)
    assert logits(model).isfinite().all()


def test_it_generates_what_the_plain_model_does(result: Result, tmp_path: Path) -> None:
    prompt = {"input_ids": torch.tensor(TOKENS), "attention_mask": torch.ones(2, 24).long()}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.EOS}
    model, _ = load(result.directory, dtype=torch.float32)
    expected = plain_model(result, tmp_path / "plain").generate(**prompt, **settings)
    assert torch.equal(model.generate(**prompt, **settings), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_what_transformers_saves_again_is_the_same_checkpoint(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    result = write(tiny_model(name), tmp_path / "result", "nf4")
    model, _ = load(result.directory, dtype="auto")
    model.save_pretrained(tmp_path / "again")
    first = load_file(result.directory / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    again, _ = load(tmp_path / "again", dtype="auto")
    assert torch.equal(logits(again), logits(model))


def test_the_model_without_its_head_loads_as_well(result: Result) -> None:
    base = AutoModel.from_pretrained(result.directory, dtype=torch.float32)
    whole, _ = load(result.directory, dtype=torch.float32)
    with torch.no_grad():
        states = base(torch.tensor(TOKENS)).last_hidden_state
    torch.testing.assert_close(whole.lm_head(states), logits(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v2", "mixtral"])
def test_attention_dense_mlps_and_shared_experts_can_be_packed_too(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    result = write(tiny_model(name), tmp_path / "result", "nf4", other_bits=4)
    model, info = load(result.directory, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model.model.layers[1].self_attn.o_proj, PackedLinear)
    torch.testing.assert_close(logits(model), streamed_logits(result), rtol=1e-4, atol=1e-4)
    expected = logits(plain_model(result, tmp_path / "plain"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- what is refused


def edit_quantization(directory: Path, **changes: Any) -> None:
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    tiny.edit_config(directory, quantization_config={**settings, **changes})


EXPERT = "model.layers.1.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{EXPERT}.weight.absmax": None}, f"{EXPERT}.weight_absmax is missing"),
        ({f"{EXPERT}.weight": None}, f"{EXPERT}.weight is missing"),
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({f"{EXPERT}.bias": torch.ones(2)}, f"{EXPERT}.bias belongs to nothing in the model"),
        (
            {"model.layers.2.mlp.experts.8.up_proj.weight": torch.ones(2, 2)},
            r"model.layers.2.mlp.experts.8.up_proj.weight belongs to nothing in the model",
        ),
        (
            {f"{EXPERT}.weight": torch.ones(1024, dtype=torch.uint8)},
            rf"{EXPERT}.weight is U8 \[1024\], the model needs uint8 \[1024, 1\]",
        ),
        (
            {f"{EXPERT}.weight": torch.ones(1024, 1, dtype=torch.int8)},
            rf"{EXPERT}.weight is I8 \[1024, 1\], the model needs uint8 \[1024, 1\]",
        ),
        (
            {"model.layers.2.mlp.experts.2.up_proj.weight": torch.ones(1024, 1).byte()},
            r"experts.2.up_proj.weight is U8 \[1024, 1\], the model needs float32 \[32, 64\]",
        ),
    ],
    ids=range(8),
)
def test_a_file_that_does_not_fit_is_refused(
    copy: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    tiny.edit_weights(copy, changes)
    with pytest.raises(SourceError, match=message):
        load(copy, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "quantization_config.version is 2, this se-compress reads 1"),
        ({"in_16_bit": ["model.layers.9.mlp.experts.0.up_proj"]}, "no expert has model.layers.9"),
        ({"data_type": "int8"}, "SCB is missing"),
        ({"double_quant": False}, "weight.nested_absmax belongs to nothing in the model"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    edit_quantization(copy, **changes)
    with pytest.raises(SourceError, match=message):
        load(copy, dtype=torch.float32)


def test_a_family_that_is_not_known_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "FAMILIES", {})
    with pytest.raises(SourceError, match="model_type 'qwen3_moe' is not known to se-compress"):
        load(copy)


def test_without_bitsandbytes_the_remedy_is_named(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'se-compress\[bnb\]'"):
        load(copy)


def test_nothing_is_quantised_while_it_loads(tiny_model: TinyModel) -> None:
    config = loading.SeCompressConfig(1, "nf4", [], block_size=32, double_quant=True)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        load(tiny_model("qwen3_moe"), quantization_config=config)


# ---------------------------------------------------------------------------------- registration

LOAD = "; print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).quantization_method)"
TRANSFORMERS = "import sys; from transformers import AutoModelForCausalLM"
TABLE = "; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as t; print(*[*t][-1:])"


@pytest.mark.parametrize(
    "program",
    [
        f"import se_compress; {TRANSFORMERS}{LOAD}",
        f"{TRANSFORMERS}; AutoModelForCausalLM.from_pretrained; import se_compress{LOAD}",
        f"import se_compress.engines.loading{TABLE}",
    ],
)
def test_the_order_of_imports_does_not_matter(result: Result, program: str) -> None:
    command = [sys.executable, "-c", program, str(result.directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "se-compress\n", done.stderr[-2000:]


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(directory)
    except RuntimeError:
        print("refused")
"""


def test_without_se_compress_transformers_fails_loudly(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """With an expert in 16 bits and without: nobody gets a model of random or misread experts."""
    cases = [("nf4", {}), ("nf4", {"protect": "none"}), ("int8", {"protect": "none"})]
    results = [
        write(tiny_model(name), tmp_path / f"{name}-{number}", data_type, **policy)
        for name in ("mixtral", "qwen3_moe")
        for number, (data_type, policy) in enumerate(cases)
    ]
    command = [sys.executable, "-c", WITHOUT, *(str(result.directory) for result in results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n" * len(results), done.stderr[-2000:]
