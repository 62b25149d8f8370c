"""Models whose weights are coded: each is opened as the model that it decodes to, or refused."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sourced import source_formats
from tiny import edit_config, edit_weights, plain_model, random_tokens
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from se_compress.engines.targets import cautions
from se_compress.errors import SourceError
from se_compress.model.checkpoint import open_tensors
from se_compress.model.streaming import StreamedModel
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]
FAMILIES = ["qwen2_moe", "mixtral", "deepseek_v3-next-token"]
FORMS = ["fp8", "int4"]


@pytest.fixture
def coded(tiny_model: TinyModel, tmp_path: Path) -> Callable[..., Path]:
    """A tiny model in a form."""

    def make(family: str, form: str, block: int = 16) -> Path:
        return source_formats.write(form, tiny_model(family), tmp_path / form, block)

    return make


def slow(path: Path, block: int = 16) -> dict[str, torch.Tensor]:
    """Everything that a directory holds, decoded tensor by tensor."""
    tensors = load_file(path / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"]
            for axis in 0, 1:
                scale = scale.repeat_interleave(block, axis)
            scale = scale[: tensor.shape[0], : tensor.shape[1]]
            found[name] = (tensor.float() * scale).bfloat16()
        elif name.endswith("_packed"):
            stem = name.removesuffix("_packed")
            shifts = torch.arange(0, 32, 4)
            codes = (tensor.long().unsqueeze(-1) >> shifts & 15).flatten(-2) - 8
            scale = tensors[f"{stem}_scale"].float().repeat_interleave(32, 1)
            found[stem] = (codes * scale).bfloat16()
        elif not name.endswith(("_scale_inv", "_scale", "_shape", "_zero_point")):
            found[name] = tensor
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_that_it_decodes_to(
    coded: Callable[..., Path], tiny_model: TinyModel, family: str, form: str
) -> None:
    path = coded(family, form)
    source, plain = open_source(str(path)), open_source(str(tiny_model(family)))
    read, expected = open_tensors(source.tensors), slow(path)
    assert source.tensors.keys() == plain.tensors.keys() == expected.keys()
    for name, info in source.tensors.items():
        same = plain.tensors[name]
        assert (info.shape, info.kind) == (same.shape, same.kind)
        assert (info.layer, info.expert, info.role) == (same.layer, same.expert, same.role)
        assert torch.equal(read(name), expected[name])
        assert read(name).dtype == expected[name].dtype
        assert info.size_bytes == expected[name].nbytes
    assert any(info.stored for info in source.tensors.values())
    assert source.size_bytes == sum(i.size_bytes for i in read_headers(path).values())
    assert source.size_bytes < plain.size_bytes
    assert source.config == plain.config
    assert source.digest != plain.digest


@pytest.mark.parametrize("form", FORMS)
def test_the_forward_pass_is_that_of_the_decoded_model(
    coded: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    path = coded("qwen2_moe", form)
    source = open_source(str(path))
    decoded = shutil.copytree(path, tmp_path / "decoded")
    edit_config(decoded, quantization_config=None)
    edit_weights(decoded, dict.fromkeys(load_file(path / "model.safetensors")))
    edit_weights(decoded, slow(path))
    tokens = torch.tensor(random_tokens(2, 12))
    streamed = StreamedModel(source, open_tensors(source.tensors))
    hidden = streamed.embed([tokens])
    for layer in range(source.layer_count):
        hidden = streamed.run_layer(layer, streamed.load_layer(layer), hidden)
    with torch.no_grad():
        expected = plain_model(decoded)(tokens).logits
    found = next(streamed.logits(hidden))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_some_weights_may_be_plain(coded: Callable[..., Path], tiny_model: TinyModel) -> None:
    path = coded("mixtral", "fp8")
    plain = load_file(tiny_model("mixtral") / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_weights(path, {name: plain[name], f"{name}_scale_inv": None})
    tensors = open_source(str(path)).tensors
    assert tensors[name].stored is None
    assert tensors["model.layers.1.self_attn.k_proj.weight"].stored is not None


@pytest.mark.parametrize(
    ("scale", "settings"),
    [
        (torch.tensor(0.5), {"quant_method": "fp8"}),
        (torch.tensor([0.5]), {"quant_method": "fp8", "weight_block_size": [16, 16]}),
        (torch.full((64, 1), 0.5), {"quant_method": "fp8"}),
        (torch.full((64, 1), 0.5, dtype=torch.bfloat16), {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}},
        }),
        (torch.full((4, 4), 0.5), {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 8, "type": "float", "strategy": "block",
                "block_structure": [16, 16]}}},
        }),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_scales_of_a_tensor_a_row_or_a_block(
    tiny_model: TinyModel, tmp_path: Path, scale: torch.Tensor, settings: object, suffix: str
) -> None:
    path = shutil.copytree(tiny_model("olmoe"), tmp_path / "model")
    name = "model.layers.0.self_attn.o_proj.weight"
    codes = load_file(path / "model.safetensors")[name].to(torch.float8_e4m3fn)
    edit_weights(path, {name: codes, name + suffix: scale})
    edit_weights(path, {name.replace("weight", "input_scale"): torch.tensor(2.0)})
    edit_config(path, quantization_config=settings)
    source = open_source(str(path))
    assert torch.equal(open_tensors(source.tensors)(name), (codes.float() * 0.5).bfloat16())
    assert source.size_bytes == sum(i.size_bytes for i in read_headers(path).values())
    (note,) = cautions(source)
    assert note == (
        "one weight of the source is fp8; what is not quantised here is written in 16 bits; its "
        "scales of activations are not used"
    )


def test_names_and_codes_of_deepseek_v4(tiny_model: TinyModel, tmp_path: Path) -> None:
    """`X.scale` beside `X.weight`; FP4 in bytes and FP8 in one file."""
    path = shutil.copytree(tiny_model("olmoe"), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    narrow = "model.layers.1.mlp.experts.3.up_proj.weight"
    wide = "model.layers.1.self_attn.q_proj.weight"
    blocks, exponents = source_formats.to_mxfp4(tensors[narrow])
    codes, scales = source_formats.to_fp8(tensors[wide], 16)
    scales = torch.exp2(torch.log2(scales).ceil()).to(torch.float8_e8m0fnu)
    edit_weights(path, {
        narrow: blocks.flatten(-2).view(torch.int8), wide: codes,
        narrow.replace("weight", "scale"): exponents.view(torch.float8_e8m0fnu),
        wide.replace("weight", "scale"): scales,
    })  # fmt: skip
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"}
    edit_config(path, quantization_config=settings)
    source = open_source(str(path))
    stored = {name: source.tensors[name].stored for name in (narrow, wide)}
    assert {name: s.encoding for name, s in stored.items() if s} == {narrow: "mxfp4", wide: "fp8"}
    read = open_tensors(source.tensors)
    theirs = Fp8Dequantize(None)._dequantize_one
    whole = blocks.flatten(-2).view(torch.int8), exponents.view(torch.float8_e8m0fnu)
    assert torch.equal(read(narrow), theirs(*whole, torch.bfloat16))
    assert torch.equal(read(wide), theirs(codes, scales, torch.bfloat16))
    assert source.size_bytes == sum(i.size_bytes for i in read_headers(path).values())
    edit_weights(path, {narrow.replace("weight", "scale"): torch.ones(32, 3).to(torch.uint8)})
    refusal(path, r"does not go with .* \[32, 3\]: a scale goes with 32 values, two in a byte")
    edit_weights(path, {narrow.replace("weight", "scale"): None})
    refusal(path, r"up_proj\.weight is I8, of weights that are quantised with scales")


@pytest.mark.parametrize("where", ["top", "language model"])
def test_a_composite(tiny_type: TinyModel, tmp_path: Path, where: str) -> None:
    """The settings stand on top, or with those of the language model."""
    path = source_formats.write("fp8", tiny_type("qwen3_5_moe_text"), tmp_path / "fp8", 16)
    text = json.loads((path / "config.json").read_text())
    settings = text.pop("quantization_config")
    config = {"model_type": "qwen3_5_moe", "text_config": text}
    (text if where == "language model" else config)["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(config))
    source = open_source(str(path))
    assert "quantization_config" not in {**source.config, **source.config["text_config"]}
    read, expected = open_tensors(source.tensors), slow(path)
    assert all(torch.equal(read(name), expected[name]) for name in source.tensors)
    assert any(info.stored for info in source.tensors.values())


# ---------------------------------------------------------------------------------- what is refused


def refusal(path: Path, match: str) -> None:
    with pytest.raises(SourceError, match=match) as caught:
        open_source(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    assert str(path) in message


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({f"{Q}_scale_inv": None}, rf"{Q} is F8_E4M3, and beside it there is neither {Q}_scale"),
        ({f"{Q}_scale": torch.ones(4, 4)}, f"beside it there is {Q}_scale_inv and {Q}_scale; one"),
        ({Q: None}, rf"{Q}_scale_inv is F32, a part of a coded weight that is not there"),
        ({Q: torch.ones(64, 64)}, rf"{Q}_scale_inv is F32, a part of a coded .* or not coded"),
        ({f"{Q}_scale_inv": torch.ones(4, 5)}, r"does not go with .* \[4, 5\]: blocks are 16 x 16"),
        ({f"{Q}_scale_inv": torch.ones(4)}, r"does not go with .* \[4\]: blocks are 16 x 16"),
        ({f"{Q}_scale_inv": torch.ones(4, 4).int()}, r"is I32; read are F32, BF16, F16, F8_E8M0"),
        ({"model.layers.1.self_attn.k_scale": torch.ones(1)}, r"self_attn\.k_scale is F32, of"),
        ({"model.layers.1.self_attn.weight_scale_inv": torch.ones(1)}, r"not there, or not coded"),
        ({"model.layers.1.input_layernorm.weight": torch.ones(64).to(torch.float8_e4m3fn),
          "model.layers.1.input_layernorm.weight_scale": torch.ones(1)}, "only matrices are coded"),
    ],
)  # fmt: skip
def test_fp8_that_does_not_fit(
    coded: Callable[..., Path], changes: Mapping[str, torch.Tensor | None], told: str
) -> None:
    path = coded("mixtral", "fp8")
    edit_weights(path, changes)
    refusal(path, told)


W = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({f"{W}_scale": None}, rf"{W}_packed is coded, but {W}_scale is missing"),
        ({f"{W}_shape": None}, rf"{W}_packed is coded, but {W}_shape is missing"),
        ({f"{W}_packed": None}, rf"{W}_(scale|shape) is \w+, a part of a coded weight that is not"),
        ({f"{W}_scale": torch.ones(64, 3)}, r"does not go with .*: config.json has \(bits, group"),
        ({f"{W}_packed": torch.ones(64, 8)}, r"is F32; read are I32"),
        ({W: torch.ones(64, 64)}, r"a weight is there twice, coded and as it is"),
        ({f"{W}_g_idx": torch.ones(64).int()}, r"g_idx is I32, a part of a coded weight"),
        (
            {f"{W}_zero_point": torch.ones(8, 2).int()},
            r"config.json has .*symmetric\) \[\(4, 32, T",
        ),
    ],
)
def test_packed_words_that_do_not_fit(
    coded: Callable[..., Path], changes: Mapping[str, torch.Tensor | None], told: str
) -> None:
    path = coded("mixtral", "int4")
    edit_weights(path, changes)
    refusal(path, told)


@pytest.mark.parametrize(
    ("zeros", "told"),
    [
        (None, r"config\.json has \(bits, group size, symmetric\) \[\(4, 32, False\)"),
        (torch.ones(8, 3).int(), r"does not go with .* \[8, 3\]: zeros are packed down the rows"),
        (torch.ones(8, 2), r"zero_point is F32; read are I32"),
        (torch.full((8, 2), 0x11111111).int(), ""),
    ],
)
def test_packed_words_with_zeros(
    coded: Callable[..., Path], zeros: torch.Tensor | None, told: str
) -> None:
    path = coded("mixtral", "int4")
    settings = source_formats.settings_of("int4")
    assert settings is not None
    settings["config_groups"]["group_0"]["weights"]["symmetric"] = False
    settings["sparsity_config"] = None
    edit_config(path, quantization_config=settings)
    names = [n.removesuffix("_packed") for n in load_file(path / "model.safetensors")
             if n.endswith("_packed")]  # fmt: skip
    ones = torch.full((8, 2), 0x11111111).int()
    edit_weights(path, {f"{n}_zero_point": zeros if n == W else ones.clone() for n in names})
    if told:
        refusal(path, told)
        return
    centred = slow(path)[W].float()  # by a zero of 8, where each is 1
    scale = load_file(path / "model.safetensors")[f"{W}_scale"].float().repeat_interleave(32, 1)
    expected = ((centred / scale).round() + 7) * scale
    assert torch.equal(open_tensors(open_source(str(path)).tensors)(W), expected.bfloat16())


@pytest.mark.parametrize("shape", [[64, 63], [64, 128], [63, 64], [64, 0], [-64, 64]])
def test_a_shape_that_is_another_than_that_of_the_words(
    coded: Callable[..., Path], shape: list[int]
) -> None:
    """Its values are weights, as far as opening goes: they are seen when the matrix is read."""
    path = coded("mixtral", "int4")
    edit_weights(path, {f"{W}_shape": torch.tensor(shape)})
    read = open_tensors(open_source(str(path)).tensors)
    with pytest.raises(SourceError, match=rf"int4/model\.safetensors: {W} (cannot be )?decode"):
        read(W)


def test_a_config_that_promises_codes_of_plain_weights(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_model("olmoe"), tmp_path / "model")
    edit_config(path, quantization_config={"quant_method": "fp8"})
    refusal(path, r"config\.json: quantization_config says that weights are coded, but none is")


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "gptq"}, r"already quantised \(gptq\); give the original checkpoint"),
        ({"quant_method": "awq"}, r"\(awq\).*read are fp8, mxfp4 and, of compressed-tensors, pack"),
        ({"quant_method": "bitsandbytes"}, r"already quantised \(bitsandbytes\)"),
        ({"quant_method": "se-compress"}, r"already quantised \(se-compress\)"),
        ({"quant_method": "modelopt"}, r"already quantised \(modelopt\)"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "of fp8 .*a block is 128, where two"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "a block is .*, where two numbers"),
        ({"quant_method": "compressed-tensors"}, "of compressed-tensors cannot be read"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
          "config_groups": {}}, "format is 'nvfp4-pack-quantized'; read are pack-quantized"),
        *(({"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"num_bits": bits, "type": "int"}}}},
           "num_bits is .*; read are 1 to 8") for bits in (0, 9, "4", True)),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": [1]},
         "of compressed-tensors cannot be read"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized",
          "config_groups": {"a": GROUP}, "transform_config": {"a": 1}}, "transformed weights"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized",
          "config_groups": {"a": GROUP}, "sparsity_config": {"format": "sparse-24"}}, "sparse w"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized",
          "config_groups": {"a": {"weights": {**GROUP["weights"], "actorder": "group"}}}},  # type: ignore[dict-item]
         "columns out of order"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_read(
    coded: Callable[..., Path], settings: Mapping[str, Any], told: str
) -> None:
    path = coded("mixtral", "fp8")
    edit_config(path, quantization_config=settings)
    refusal(path, rf"config\.json: .*{told}")


def test_codes_without_a_word_in_the_config(coded: Callable[..., Path]) -> None:
    path = coded("mixtral", "fp8")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    refusal(path, rf"{re.escape('weight')}(_scale_inv)? is F\w+.* scales, of which config")
