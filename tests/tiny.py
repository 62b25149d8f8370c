"""Tiny random models of every family, built on the fly as ordinary Hugging Face directories.

One entry in CONFIGS per row of families.py, with transformers' own config classes; VARIANTS bend
one of them where a family has more than one shape. Weights are drawn at a scale where routing,
attention and logits are far from uniform, so that a wrong role, slot or mask shows at once.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from se_compress.artifacts import CompressionPlan, ExpertIndex, ModelSource, Scheme
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.export import checked_settings, export_config
from se_compress.formats import FORMATS
from se_compress.model.binding import experts_modules
from se_compress.model.checkpoint import copy_tensor, open_tensors, reserve, write_tensors
from se_compress.model.experts import RoutedExperts
from se_compress.model.live import Weights
from se_compress.model.own_experts import InterfacedExperts
from se_compress.model.splice import open_shrunk
from se_compress.model.streaming import StreamedModel
from se_compress.opening.families import FAMILIES
from se_compress.opening.headers import lay_out
from se_compress.opening.source import open_source
from se_compress.quant.grid import Grid, rtn
from se_compress.recipe import Recipe, parse_recipe

BOS, EOS = 0, 1
VOCABULARY = 288  # the tokenizer's 265 words, filled up to a multiple of 32
HIDDEN = 64
# Residual channels that `plant`, `starve` and `fragile` use.
MARK, MASSIVE, CONSTANT, DEAD = 3, 7, 11, 20

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_QWEN: Mapping[str, Any] = {
    **_COMMON,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
}
_DEEPSEEK: Mapping[str, Any] = {
    **_COMMON,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "qwen3_moe": {**_QWEN, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {**_COMMON, "intermediate_size": 32, "num_experts": 8, "num_key_value_heads": 4},
    "mixtral": {**_COMMON, "intermediate_size": 64, "num_local_experts": 4},
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {
        **_DEEPSEEK,
        "q_lora_rank": 48,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 0,
    },
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "beta_fast": 32,
    "beta_slow": 1,
}
# Name -> the family, what differs from its config, and the dtype in which the weights are saved.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any], torch.dtype]] = {
    **{family: (family, {}, torch.bfloat16) for family in CONFIGS},
    "qwen2_moe-sparse-step": (
        "qwen2_moe",
        {"mlp_only_layers": [], "decoder_sparse_step": 2, "num_hidden_layers": 4},
        torch.bfloat16,
    ),
    "qwen3_moe-tied": ("qwen3_moe", {"tie_word_embeddings": True}, torch.float32),
    "mixtral-sliding": ("mixtral", {"sliding_window": 12}, torch.float32),
    "deepseek_v2-grouped": (
        "deepseek_v2",
        {
            "q_lora_rank": 48,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": _YARN,
        },
        torch.float32,
    ),
    "deepseek_v3-yarn": ("deepseek_v3", {"rope_parameters": _YARN}, torch.float32),
    "deepseek_v3-next-token": ("deepseek_v3", {"num_nextn_predict_layers": 1}, torch.bfloat16),
}


def save_tokenizer(
    directory: Path, *, bos: bool = False, eos: bool = False, template: str = ""
) -> Path:
    """Byte-level BPE with a handful of merges: most characters are one token."""
    runs = ["Ġ" * n for n in (1, 2, 4, 8)]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), *zip(runs, runs, strict=True)]
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=("<s> " if bos else "") + "$A" + (" </s>" if eos else ""),
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=32
    )
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(directory)
    return directory


def build(directory: Path, name: str, **changes: Any) -> Path:
    """Save the tiny model `name` (a family or a variant), tokenizer included; `changes` go to the
    config. Equal calls give equal weights."""
    family, differs, dtype = VARIANTS[name]
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **differs, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for part, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "rotary" not in part:
                weight.copy_(_draw(part, weight.shape, generator))
    transformers_logging.disable_progress_bar()
    model.to(dtype).save_pretrained(directory)
    if config.tie_word_embeddings:
        assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    if extra := config.to_dict().get("num_nextn_predict_layers", 0):
        _append_next_token_layers(directory, config.num_hidden_layers, extra)
    return save_tokenizer(directory)


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.1 * noise
    if len(shape) == 1:  # biases
        return 0.2 * noise
    if "embed" in name:
        return noise
    sharp = 3.0 if ".gate.weight" in name or "q_" in name or "lm_head" in name else 1.5
    return noise * sharp / shape[-1] ** 0.5


def _append_next_token_layers(directory: Path, layers: int, extra: int) -> None:
    """Multi-token prediction as DeepSeek-V3 stores it: a copy of the last layer behind the decoder,
    with tensors of its own."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for index in range(layers, layers + extra):
        last = f"model.layers.{layers - 1}."
        copies = {n.replace(last, f"model.layers.{index}."): t.clone() for n, t in tensors.items()
                  if n.startswith(last)}  # fmt: skip
        tensors |= copies
        tensors[f"model.layers.{index}.eh_proj.weight"] = torch.ones(HIDDEN, 2 * HIDDEN)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_weights(directory: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a single-file model."""
    file = directory / "model.safetensors"
    tensors = {**load_file(file), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})


def noisy_copy(source: Path, directory: Path, noise: float) -> Path:
    """A copy whose expert weights are off by `noise` of their own spread."""
    shutil.copytree(source, directory)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(directory / "model.safetensors")
    off: dict[str, Tensor | None] = {
        name: (w + noise * w.float().std() * torch.randn(w.shape, generator=generator)).to(w.dtype)
        for name, w in weights.items()
        if ".experts." in name
    }
    edit_weights(directory, off)
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    """Set keys of config.json; None removes a key."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(kept), encoding="utf-8")


def plant(
    directory: Path,
    layer: int,
    expert: ExpertIndex | None,
    *,
    reads: int = MARK,
    writes: int = MASSIVE,
    size: float = 1e4,
    weight: float = 1.0,
) -> None:
    """Let one expert (None: the dense MLP) answer channel `reads` with about `size` on `writes`.

    Only BOS has anything on channel MARK, so that an expert which reads it writes at BOS alone. A
    routed expert gets every token that has the channel, with a routing weight of about `weight`.
    """
    source = open_source(str(directory))
    family = FAMILIES[source.family]
    tensors = {n: t.float() for n, t in load_file(directory / "model.safetensors").items()}
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, MARK] = 0
    embedding[BOS, MARK] = 20
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", f"{family.projections[2]}.weight")):
            tensor[MARK] = 0
        elif "norm" in name and len(tensor) == HIDDEN:
            tensor[[MARK, reads]] = 1
    stems = {
        None: "model.layers.{layer}.mlp.{projection}.weight",
        "shared": family.shared,
    }
    stem = stems.get(expert, family.expert)
    gate, up, down = (
        tensors[stem.format(layer=layer, expert=expert, projection=projection)]
        for projection in family.projections
    )
    seen = 7.3 if reads == MARK else 8.0  # of the channel, behind the norm
    for matrix in gate, up:
        matrix[0] = 0
        matrix[0, reads] = 4
    down[:, 0] = 0
    down[writes, 0] = size / (4 * seen) ** 2
    if isinstance(expert, int):
        router = tensors[family.router.format(layer=layer)]
        router[expert] = 0
        router[expert, reads] = 20 + math.log(weight) / seen
    elif expert == "shared" and family.shared_gate:
        tensors[family.shared_gate.format(layer=layer)][0, reads] = 4
    edit_weights(directory, tensors)


def fragile(directory: Path, layer: int, expert: int) -> None:
    """Plant a super expert that low widths break: a large weight on a channel that is zero
    throughout shares groups with those that make the massive activation, and scales from the
    largest weight round these to 0."""
    plant(directory, layer, expert)
    family = FAMILIES[open_source(str(directory)).family]
    tensors = {n: t.float() for n, t in load_file(directory / "model.safetensors").items()}
    tensors["model.embed_tokens.weight"][:, DEAD] = 0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", f"{family.projections[2]}.weight")):
            tensor[DEAD] = 0
    for projection in family.projections[:2]:
        name = family.expert.format(layer=layer, expert=expert, projection=projection)
        tensors[name][0, DEAD] = 100
    edit_weights(directory, tensors)


def starve(directory: Path, layer: int, expert: int) -> None:
    """Let the router never choose an expert: a channel that is 10 for every token keeps it away."""
    source = open_source(str(directory))
    family = FAMILIES[source.family]
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, CONSTANT] = 10
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", f"{family.projections[2]}.weight")):
            tensor[CONSTANT] = 0
        elif "norm" in name and len(tensor) == HIDDEN:
            tensor[CONSTANT] = 1
    router = tensors[family.router.format(layer=layer)]
    router[:, CONSTANT] = 0
    router[expert, CONSTANT] = -100
    for bias in family.per_expert:
        tensors[bias.format(layer=layer)][expert] = -10
    edit_weights(directory, tensors)


def write_result(
    source: ModelSource, plan: CompressionPlan, directory: Path, shard_bytes: int = 10**9
) -> Path:
    """The result of any plan, each matrix rounded to nearest for itself: no forward pass."""
    directory.mkdir()
    blueprint = draw_blueprint(source, plan)
    files = lay_out(blueprint.on_disk.values(), directory, shard_bytes)
    reserve(files)
    layout = blueprint.found_in(files)
    read, scheme = open_tensors(source.tensors), plan.scheme
    read_made = open_shrunk(blueprint.shrunk)
    for planned in blueprint.tensors.values():
        info, bits = planned.info, planned.bits
        if planned.making == "copied":
            copy_tensor(info, layout[planned.name])
            continue
        if planned.making in ("made", "decoded"):
            write_tensors(layout, {planned.name: read_made(info.name)})
            continue
        parts = _rounded(read(info.name), scheme, bits)
        stored = {f"{planned.module}.{part}": tensor for part, tensor in parts.items()}
        write_tensors(layout, stored)
    export_config(blueprint, checked_settings(blueprint), directory)
    return directory


def _rounded(weight: Tensor, scheme: Scheme, bits: int) -> dict[str, Tensor]:
    """The parts of a matrix, rounded to nearest."""
    form = FORMATS[scheme.format]
    if form.quantize is not None:
        return form.quantize(weight, scheme)
    grid = Grid(bits, scheme.group_size, scheme.symmetric, getattr(torch, str(form.scale_dtype)))
    stack = rtn(weight.float()[None], grid, torch.ones(1, weight.shape[1]))
    assert form.pack is not None
    return form.pack(*(part[0] for part in (stack.codes, stack.scales, stack.zeros)), grid)


def plain_model(directory: Path) -> Any:
    """The model as transformers alone runs it: float32, eager, nothing missing."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    for module in model.modules():
        if type(module).__name__ == "Llama4TextExperts":  # it does not say what others do
            module.has_gate, module.has_bias, module.is_transposed = True, False, True
            module._apply_gate = MethodType(InterfacedExperts._apply_gate, module)
    return model.eval()


def random_tokens(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Sequences of token ids, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 265, (count, length), generator=generator)
    return [[int(i) for i in row] for row in ids]


def recipe(model: Path | str, output: Path | str = "out", **sections: Any) -> Recipe:
    """A recipe for a tiny model; `sections` replace or add top-level keys."""
    text = {"data": "unused.txt"}
    data = {"model": str(model), "output": str(output), "calibration": text, "validation": text}
    return parse_recipe({**data, **sections}, "test")


class LayerWatch:
    """Watches the layers that StreamedModel loads, and their experts, by the storages of their
    weights.

    loaded        indices in the order of loading
    most          layers that were in memory at once, at the most
    most_experts  the same of experts
    """

    def __init__(self) -> None:
        self.loaded: list[int] = []
        self.most = self.most_experts = 0
        self._storages: list[list[StorageWeakRef]] = []
        self._blocks: list[tuple[int, StorageWeakRef]] = []
        self._load = StreamedModel.load_layer
        self._load_experts = Weights.experts

    def alive(self) -> int:
        return sum(any(not part.expired() for part in layer) for layer in self._storages)

    def load_layer(self, model: StreamedModel, layer: int) -> nn.Module:
        self.loaded.append(layer)
        module = self._load(model, layer)
        named = dict([*module.named_parameters(), *module.named_buffers()])
        fused = {path for path, _ in experts_modules(module)}
        assert all(n.rpartition(".")[0] in fused for n, part in named.items() if part.is_meta)
        parts = [part for part in named.values() if not part.is_meta]
        self._storages.append([StorageWeakRef(part.untyped_storage()) for part in parts])
        self.most = max(self.most, self.alive())
        return module

    def load_experts(
        self, weights: Weights, module: Any, path: str, ids: Sequence[int]
    ) -> RoutedExperts:
        block = self._load_experts(weights, module, path, ids)
        self._blocks.append((len(ids), StorageWeakRef(block.down_proj.untyped_storage())))
        self.most_experts = max(self.most_experts, self.experts_alive())
        return block

    def experts_alive(self) -> int:
        return sum(count for count, storage in self._blocks if not storage.expired())
