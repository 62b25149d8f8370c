"""recipes/models: a recipe for each published model with known super experts, opened and planned on
headers of its real shapes. The files are sparse: nothing of their data is read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from published import write_sparse

from se_compress.artifacts import ExpertId, ExpertIndex
from se_compress.opening.account import places
from se_compress.opening.families import FAMILIES
from se_compress.opening.headers import Slot
from se_compress.opening.source import open_source
from se_compress.pipeline import preview
from se_compress.planning.policy import task_of
from se_compress.recipe import Recipe, load_recipe
from se_compress.request import Request

RECIPES = Path(__file__).parents[1] / "recipes" / "models"

# config.json of each, as far as shapes and routing hang on it.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "topk_method": "greedy", "n_group": 1,
        "topk_group": 1, "max_position_embeddings": 163840, "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "deepseek-r1": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 8, "topk_group": 4,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "max_position_embeddings": 131072, "attention_bias": True,
        "sliding_window": 128, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head",
            ],
        },
    },
}  # fmt: skip
# The same model for other engines.
CONFIGS = {**CONFIGS, "qwen3-30b-a3b-cpu": CONFIGS["qwen3-30b-a3b"]}
# Layers with experts, experts of a layer, and the super experts, from arXiv:2507.23279v3; those of
# gpt-oss from m333il/not-all-drift.
FACTS: Mapping[str, tuple[int, int, list[tuple[int, ExpertIndex]]]] = {
    "qwen3-30b-a3b": (48, 128, [(1, 68), (2, 92), (3, 82)]),
    "qwen3-30b-a3b-cpu": (48, 128, [(1, 68), (2, 92), (3, 82)]),
    "deepseek-v2-lite": (26, 64, [(3, 54), (4, 38)]),
    "mixtral-8x7b": (32, 8, [(1, 3)]),
    "deepseek-r1": (
        58, 256,
        [(8, 24), (8, "shared"), (12, 190), (13, 64), (14, 202), (14, "shared"), (22, "shared"),
         (33, 64), (33, "shared"), (35, "shared")],
    ),
    "gpt-oss-20b": (24, 32, [(6, 5), (17, 5)]),
}  # fmt: skip


def slots_of(config: Mapping[str, Any]) -> Iterator[Slot]:
    """Every tensor of the published files, with its dtype and shape."""
    if config["model_type"] == "gpt_oss":
        yield from gpt_oss_slots(config)
        return
    family = FAMILIES[config["model_type"]]
    table = [(place[0], place[1]) for place in places(family, config)]
    table += next_token_slots(config, table)
    for name, shape in table:
        packed = name.endswith("_proj.weight") or "kv_a_proj_with_mqa" in name
        if "quantization_config" not in config or not packed:
            yield Slot(name, "BF16", shape)
            continue
        blocks = tuple(-(-extent // 128) for extent in shape)
        yield Slot(name, "F8_E4M3", shape)
        yield Slot(f"{name}_scale_inv", "F32", blocks)


def next_token_slots(
    config: Mapping[str, Any], table: list[tuple[str, tuple[int, ...]]]
) -> list[tuple[str, tuple[int, ...]]]:
    """The layer behind the decoder, as DeepSeek publishes it: like the last one, and some more."""
    if not config.get("num_nextn_predict_layers"):
        return []
    count, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, behind = f"model.layers.{count - 1}.", f"model.layers.{count}."
    copies = [(n.replace(last, behind), s) for n, s in table if n.startswith(last)]
    vocabulary = (config["vocab_size"], hidden)
    return [
        *copies,
        (f"{behind}embed_tokens.weight", vocabulary),
        (f"{behind}enorm.weight", (hidden,)),
        (f"{behind}hnorm.weight", (hidden,)),
        (f"{behind}eh_proj.weight", (hidden, 2 * hidden)),
        (f"{behind}shared_head.norm.weight", (hidden,)),
        (f"{behind}shared_head.head.weight", vocabulary),
    ]


def gpt_oss_slots(config: Mapping[str, Any]) -> Iterator[Slot]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    experts, vocabulary = config["num_local_experts"], config["vocab_size"]
    heads, keys = config["num_attention_heads"] * 64, config["num_key_value_heads"] * 64
    yield Slot("model.embed_tokens.weight", "BF16", (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield Slot(f"{at}.input_layernorm.weight", "BF16", (hidden,))
        yield Slot(f"{at}.post_attention_layernorm.weight", "BF16", (hidden,))
        yield Slot(f"{at}.self_attn.sinks", "BF16", (config["num_attention_heads"],))
        for name, rows, columns in (
            ("self_attn.q_proj", heads, hidden), ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden), ("self_attn.o_proj", hidden, heads),
            ("mlp.router", experts, hidden),
        ):  # fmt: skip
            yield Slot(f"{at}.{name}.weight", "BF16", (rows, columns))
            yield Slot(f"{at}.{name}.bias", "BF16", (rows,))
        for name, rows, columns in (
            ("gate_up_proj", 2 * width, hidden),
            ("down_proj", hidden, width),
        ):
            stem, blocks = f"{at}.mlp.experts.{name}", columns // 32
            yield Slot(f"{stem}_blocks", "U8", (experts, rows, blocks, 16))
            yield Slot(f"{stem}_scales", "U8", (experts, rows, blocks))
            yield Slot(f"{stem}_bias", "BF16", (experts, rows))
    yield Slot("model.norm.weight", "BF16", (hidden,))
    yield Slot("lm_head.weight", "BF16", (vocabulary, hidden))


def write_headers(directory: Path, config: Mapping[str, Any]) -> None:
    write_sparse(directory, config, list(slots_of(config)), 50 * 10**9)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_recipe_of_a_published_model_knows_its_super_experts(tmp_path: Path, name: str) -> None:
    write_headers(tmp_path, CONFIGS[name])
    recipe = recipe_for(name, tmp_path)
    source = open_source(recipe.model)
    layers, experts, supers = FACTS[name]
    assert (len(source.moe_layers), source.expert_count) == (layers, experts)
    wanted = {ExpertId(layer, expert) for layer, expert in supers}
    assert set(recipe.super_experts.expected_ids) == wanted
    assert task_of(source, None, recipe).protected.keys() == wanted


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_planned_with_them_protected(tmp_path: Path, name: str) -> None:
    write_headers(tmp_path, CONFIGS[name])
    recipe = recipe_for(name, tmp_path)
    found = preview(Request(recipe, ""))
    if recipe.quantization.method == "none":  # a recipe for its profile: nothing to protect from
        assert {d.action for d in found.plan.experts} == {"keep"}
        return
    assert found.plan.protected == tuple(sorted(recipe.super_experts.expected_ids))
    bits = recipe.policy.protected_bits
    for identity in found.plan.protected:
        decision = found.plan.by_id[identity]
        assert (decision.bits, decision.down_bits) == (bits, None)
        assert decision.reason == f"protected at {bits} bits: expected, not profiled yet"
    # DeepSeek-R1 comes in 8 bits, the others in 16.
    share = 0.6 if name == "deepseek-r1" else 0.5
    assert found.plan.size_bytes < share * found.plan.source_size_bytes


def recipe_for(name: str, model: Path) -> Recipe:
    return load_recipe(
        RECIPES / f"{name}.yaml", [f"model={model}", f"output={model.parent / 'out'}"]
    )


def test_every_published_recipe_is_known_here() -> None:
    assert {file.stem for file in RECIPES.glob("*.yaml")} == set(CONFIGS) == set(FACTS)


def test_one_file_for_vllm_on_cpus_lifts_three_layers_and_says_what_that_takes(
    tmp_path: Path,
) -> None:
    write_headers(tmp_path, CONFIGS["qwen3-30b-a3b-cpu"])
    found = preview(Request(recipe_for("qwen3-30b-a3b-cpu", tmp_path), ""))
    widths = {d.layer: set[int | None]() for d in found.plan.experts}
    for decision in found.plan.experts:
        widths[decision.layer].add(decision.bits)
    assert {layer for layer, bits in widths.items() if bits == {16}} == {1, 2, 3}
    assert all(bits == {4} for layer, bits in widths.items() if layer not in (1, 2, 3))
    cpu, gpu = found.serving[2], found.serving[1]
    assert "4 bits: CPU with AMX; python -m vllm.entrypoints.openai.api_server" in cpu
    assert gpu.endswith(" --quantization humming")
    assert "0.246 bits per expert weight for each such layer" in found.finest
