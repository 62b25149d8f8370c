"""A model with fewer experts is an ordinary checkpoint, and computes what the original computes
with the other experts masked out of its router."""

import itertools
import json
import random
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import artefacts_example as example
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, edit_weights, plain_model, random_tokens, recipe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from se_compress.artifacts import (
    CompressionPlan,
    ExpertId,
    ExpertProfile,
    LayerRecord,
    LayerSimilarity,
    ModelSource,
    RunOptions,
)
from se_compress.compression.execute import compress
from se_compress.engines.blueprint import draw_blueprint
from se_compress.errors import RecipeError
from se_compress.model.checkpoint import open_result
from se_compress.model.surgery import Shrunk, shrink
from se_compress.opening.families import COUNT_KEYS, FAMILIES, per_expert_tensors, routing_groups
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.check import check_plan
from se_compress.planning.policy import make_plan
from se_compress.reporting.page import fate
from se_compress.validation.validator import validate

TinyModel = Callable[[str], Path]
TOKENS = random_tokens(4, 20)

# Name -> the variant of tiny.py and what differs, so that something is left in every routing group.
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
    "mixtral": ("mixtral", {}),
    "mixtral, all experts at once": ("mixtral", {"num_experts_per_tok": 4}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2, groups": ("deepseek_v2-grouped", {"n_routed_experts": 16}),
    "deepseek_v3, groups": ("deepseek_v3", {"n_routed_experts": 16}),
    "deepseek_v3, next token": ("deepseek_v3-next-token", {"n_routed_experts": 16}),
}


def profile_of(source: ModelSource, *super_experts: ExpertId) -> ExpertProfile:
    """Experts worth something that is different in every layer: the scores are made up."""
    stats = example.example_profile().experts[0]
    experts = []
    for identity in source.experts:
        number = identity.expert if isinstance(identity.expert, int) else 99
        worth = float((number * 5 + identity.layer * 3) % 17 + 1)
        experts.append(
            replace(
                stats,
                layer=identity.layer,
                expert=identity.expert,
                saliency=worth,
                tokens=int(100 * worth) if number else 7,
                gate_mass=1 / worth,
                loss_gate_up={bits: worth / 2 * 4.0 ** (2 - bits) for bits in (2, 3, 4, 8)},
                loss_down={0: 10 * worth}
                | {bits: worth / 2 * 4.0 ** (2 - bits) for bits in (2, 3, 4, 8)},
            )
        )
    found = [
        replace(example.example_profile().super_experts[0], layer=e.layer, expert=e.expert)
        for e in super_experts
    ]
    return replace(
        example.example_profile(),
        experts=tuple(experts),
        super_experts=tuple(found),
        similarities=tuple(made_up_similarity(source, layer) for layer in source.moe_layers),
    )


def made_up_similarity(source: ModelSource, layer: int) -> LayerSimilarity:
    dice = random.Random(layer)
    pairs = source.expert_count * (source.expert_count - 1) // 2
    return LayerSimilarity(layer, tuple(dice.uniform(1, 10) for _ in range(pairs)))


# The layer behind the decoder's last in the tiny models that have one.
NOT_RUN = "model.layers.3."


@dataclass(frozen=True)
class Made:
    """A smaller checkpoint in `directory`, and what went into it."""

    source: ModelSource
    plan: CompressionPlan
    small: Shrunk
    directory: Path
    records: Sequence[LayerRecord]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {n: t for f in self.directory.glob("*.safetensors") for n, t in load_file(f).items()}

    @property
    def gone(self) -> set[ExpertId]:
        return {d.id for d in self.plan.experts if d.action == "prune"}


def make(path: Path, directory: Path, **policy: Any) -> Made:
    """Plan and write a checkpoint for plain transformers."""
    source = open_source(str(path))
    settings = recipe(path, quantization={"method": "none"}, policy=policy)
    protected = ExpertId(source.moe_layers[-1], 1)
    plan = make_plan(source, profile_of(source, protected), settings)
    return write(source, plan, directory)


def write(source: ModelSource, plan: CompressionPlan, directory: Path) -> Made:
    settings = recipe(source.path, quantization={"method": "none"}, shard_size=150_000)
    records = compress(source, plan, TOKENS, settings, directory).layers
    return Made(source, plan, shrink(source, plan), directory, records)


@contextmanager
def masked(model: Any, source: ModelSource, gone: Collection[ExpertId]) -> Iterator[None]:
    """The model's routers give `gone` a logit of minus infinity, and a bias that never wins."""
    routers: list[tuple[Tensor, list[int]]] = []
    for layer in source.moe_layers:
        router = model.model.layers[layer].mlp.gate
        experts = [i.expert for i in gone if i.layer == layer and isinstance(i.expert, int)]
        routers.append((router.weight, experts))
        if FAMILIES[source.family].per_expert:
            router.e_score_correction_bias[experts] = -1e9
    linear = nn.functional.linear

    def masking(inputs: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        out: Tensor = linear(inputs, weight, *rest)
        for router, experts in routers:  # some families cast their router, so by value
            if weight.shape == router.shape and torch.equal(weight, router):
                out[..., experts] = float("-inf")
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", masking)
        yield


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.tensor(TOKENS)).logits
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_is_the_original_with_experts_masked_out(name: str, tmp_path: Path) -> None:
    variant, differs = MODELS[name]
    made = make(
        build(tmp_path / "model", variant, **differs), tmp_path / "out", prune={"fraction": 0.5}
    )
    assert len(made.gone) == len(made.source.moe_layers) * made.source.expert_count // 2
    _, info = AutoModelForCausalLM.from_pretrained(made.directory, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "mismatched_keys"))
    assert all(name.startswith(NOT_RUN) for name in info["unexpected_keys"])
    twin = plain_model(made.source.path)
    with masked(twin, made.source, made.gone):
        expected = logits(twin)
    assert torch.isfinite(expected).all()
    found = logits(plain_model(made.directory))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits(plain_model(made.source.path)), atol=1e-2)
    # It is a source like any other: headers, config and names agree, and no tensor is left over.
    again = open_source(str(made.directory))
    assert (again.expert_count, again.top_k) == (
        made.small.source.expert_count,
        made.small.source.top_k,
    )
    assert {n: i.shape for n, i in again.tensors.items()} == {
        n: i.shape for n, i in made.small.source.tensors.items()
    }
    others = [info for info in again.tensors.values() if info.kind == "other"]
    assert all(info.name.startswith(NOT_RUN) for info in others)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_a_pruned_model_is_known_in_the_source(name: str, tmp_path: Path) -> None:
    variant, differs = MODELS[name]
    path = build(tmp_path / "model", variant, **differs)
    made = make(path, tmp_path / "out", prune={"fraction": 0.5, "score": "gate"})
    before, after, family = (
        load_file(path / "model.safetensors"),
        made.tensors,
        FAMILIES[made.source.family],
    )
    left = {layer: [] for layer in made.source.moe_layers}
    for decision in made.plan.experts:
        if isinstance(decision.expert, int) and decision.action != "prune":
            assert decision.becomes == len(left[decision.layer])
            left[decision.layer].append(decision.expert)
    for layer, experts in left.items():
        for new, old in enumerate(experts):
            for projection in family.projections:
                stem = family.expert.format(layer=layer, expert="{}", projection=projection)
                assert torch.equal(after.pop(stem.format(new)), before[stem.format(old)])
        for tensor in per_expert_tensors(family, layer):
            assert torch.equal(after.pop(tensor), before[tensor][experts])
        if layer == made.source.moe_layers[-1] and f"{NOT_RUN}mlp.gate.weight" in after:
            check_next_token_layer(before, after, experts)
        groups = routing_groups(family, made.source.config)
        each = made.source.expert_count // groups
        assert {sum(e // each == g for e in experts) for g in range(groups)} == {
            len(experts) // groups
        }
    assert after  # attention, norms, embeddings, shared experts and dense layers as they were
    assert all(torch.equal(tensor, before[tensor_name]) for tensor_name, tensor in after.items())


def check_next_token_layer(
    before: Mapping[str, Tensor], after: dict[str, Tensor], experts: Sequence[int]
) -> None:
    """It has kept the experts of the same numbers as the last decoder layer; takes them out."""
    for rest in ("mlp.gate.weight", "mlp.gate.e_score_correction_bias"):
        assert torch.equal(after.pop(NOT_RUN + rest), before[NOT_RUN + rest][experts])
    for new, old in enumerate(experts):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            stem = f"{NOT_RUN}mlp.experts.{{}}.{projection}.weight"
            assert torch.equal(after.pop(stem.format(new)), before[stem.format(old)])
    assert f"{NOT_RUN}eh_proj.weight" in after


# ------------------------------------------------------------------------------------------ zeroing


def test_a_zeroed_expert_has_a_down_proj_of_zeros_and_nothing_else_changes(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tiny_model("qwen2_moe")
    listed = [{"layer": 1, "expert": 5}, {"layer": 2, "expert": "shared"}]
    made = make(path, tmp_path / "out", zero=listed)
    before, after = load_file(path / "model.safetensors"), made.tensors
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "model.layers.1.mlp.experts.5.down_proj.weight",
        "model.layers.2.mlp.shared_expert.down_proj.weight",
    }
    assert not any(after[name].any() for name in changed)
    assert made.small.source.config == made.source.config


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_zeroed_expert_stays_zero_when_it_is_quantised(
    tiny_model: TinyModel, tmp_path: Path, method: str
) -> None:
    path = tiny_model("olmoe")
    source = open_source(str(path))
    settings = recipe(
        path,
        target="gptqmodel",
        quantization={"method": method, "group_size": 32},
        policy={"zero": [{"layer": 1, "expert": 5}], "protect": "none"},
        validation={"data": "unused.txt", "early_stop": False},
    )
    plan = make_plan(source, None, settings)
    assert plan.by_id[ExpertId(1, 5)].bits == 4
    records = compress(source, plan, TOKENS, settings, tmp_path / "out").layers
    record = next(e for r in records for e in r.experts if e.id == ExpertId(1, 5))
    assert (record.error_down, record.fallback) == (0.0, "")
    blueprint = draw_blueprint(source, plan)
    found = read_headers(tmp_path / "out")
    read = open_result(found, blueprint.source.tensors, plan.scheme, blueprint.names)
    assert not read("model.layers.1.mlp.experts.5.down_proj.weight").any()
    assert read("model.layers.1.mlp.experts.5.up_proj.weight").any()


@pytest.mark.parametrize("protect", ["super-experts", "none"])
def test_super_experts_and_as_many_random_others_can_be_zeroed(
    tiny_model: TinyModel, protect: str
) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    supers = (ExpertId(1, 3), ExpertId(2, 0), ExpertId(2, 7))

    def zeroed(word: str, seed: int = 0) -> set[ExpertId]:
        policy = {"zero": word, "zero_seed": seed, "protect": protect}
        settings = recipe("m", quantization={"method": "none"}, policy=policy)
        plan = make_plan(source, profile_of(source, *supers), settings)
        silent = {d.id for d in plan.experts if d.action == "zero"}
        assert not silent & set(plan.protected)
        return silent

    assert zeroed("super-experts") == set(supers)
    draws = [zeroed("random", seed) for seed in range(5)]
    for draw in draws:
        assert sorted(i.layer for i in draw) == [1, 2, 2]
        assert not draw & set(supers)
    assert draws[0] == zeroed("random", 0)
    in_layer_2 = [{i for i in draw if i.layer == 2} for draw in draws]
    assert len(set().union(*in_layer_2[:3])) == 6, "all others, before one comes twice"
    assert in_layer_2[3] == in_layer_2[0]


# --------------------------------------------------------------------------------------- the choice


def plan_for(path: Path, target: str = "gptqmodel", **policy: Any) -> CompressionPlan:
    source = open_source(str(path))
    grid = {"method": "rtn", "group_size": 32} if target == "gptqmodel" else {"method": "none"}
    settings = recipe(path, target=target, quantization=grid, policy=policy)
    return make_plan(source, profile_of(source, ExpertId(1, 3)), settings)


@pytest.mark.parametrize("score", ["reap", "frequency", "gate"])
def test_those_with_the_least_score_go_and_protected_ones_stay(
    tiny_model: TinyModel, score: str
) -> None:
    path = tiny_model("qwen3_moe")
    known = profile_of(open_source(str(path))).by_id
    worth = {"reap": "saliency", "frequency": "tokens", "gate": "gate_mass"}[score]
    for protect, kept in (("none", set()), ("super-experts", {ExpertId(1, 3)})):
        plan = plan_for(path, prune={"fraction": 0.4, "score": score}, protect=protect)
        for layer in range(3):
            free = [d.id for d in plan.experts if d.layer == layer and d.id not in kept]
            free.sort(key=lambda i: (getattr(known[i], worth), i))
            gone = [d.id for d in plan.experts if d.layer == layer and d.action == "prune"]
            assert gone == sorted(free[:3])  # 0.4 of 8, rounded down


def test_pruning_comes_first_and_widths_are_those_of_what_is_left(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3_moe")
    plan = plan_for(path, prune={"fraction": 0.5}, bits=[2, 3, 4], bits_per_weight=6.0)
    left = [d for d in plan.experts if d.action != "prune"]
    assert {d.bits for d in plan.experts if d.action == "prune"} == {None}
    assert plan.by_id[ExpertId(1, 3)].bits == 16
    assert len({d.bits for d in left}) > 2
    assert 5.8 < plan.bits_per_weight <= 6.0  # of the weights that are left
    source = open_source(str(path))
    assert plan.size_bytes == draw_blueprint(source, plan).size_bytes
    assert check_plan(plan, source, "plan.json") == plan
    new = plan.by_id[ExpertId(1, 3)].becomes
    assert new not in (None, 3)
    assert f"numbers in the result: (1, 3) is expert {new} of layer 1" in "; ".join(plan.notes)
    assert (
        fate(plan.by_id[ExpertId(1, 3)]) == f"keeps the source's precision and is now expert {new}"
    )


def test_the_budget_may_choose_how_much_is_pruned(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3_moe")
    source = open_source(str(path))
    whole = plan_for(path, bits=4).size_bytes
    policy = {"bits": [2, 3, 4], "size": whole - 60_000}
    auto = plan_for(path, prune={"fraction": "auto"}, **policy)
    known = profile_of(source)
    losses = {}
    for count in range(8):
        fraction = {"prune": {"fraction": count / 8}} if count else {}
        try:
            plan = plan_for(path, **fraction, **policy)
        except RecipeError:
            continue
        losses[count] = sum(
            known.by_id[d.id].loss_of("down", 0)
            if d.action == "prune"
            else known.by_id[d.id].loss_of("gate_up", d.bits_of("gate") or 0)
            + known.by_id[d.id].loss_of("down", d.bits_of("down") or 0)
            for d in plan.experts
            if d.bits != 16
        )
    best = min(losses, key=lambda count: losses[count])
    assert len(losses) > 2
    assert best > 0
    assert sum(d.action == "prune" for d in auto.experts) == 3 * best
    assert auto.size_bytes <= policy["size"]
    assert f"{losses[best]:.4g} with {best}" in auto.notes[0]


def test_sizes_are_known_before_the_first_profile(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("deepseek_v2-grouped")))
    settings = recipe("m", quantization={"method": "none"}, policy={"prune": {"fraction": 0.5}})
    with pytest.raises(RecipeError, match="0 is the most that can go"):
        make_plan(source, None, settings)  # two experts to a group are the least
    source = open_source(str(tiny_model("olmoe")))
    estimate = make_plan(source, None, settings)
    assert estimate.size_bytes == make_plan(source, profile_of(source), settings).size_bytes
    assert "no profile yet" in estimate.experts[-1].reason


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"prune": {"fraction": 0.1}}, "less than one expert of a layer of 8; the least is 0.125"),
        ({"prune": {"fraction": 0.95}, "protect": [{"layer": 1, "expert": e} for e in range(3)]},
         "7 experts of each layer of 8, but 5 is the most"),
        ({"zero": [{"layer": 7, "expert": 0}]}, r"policy.zero.0: there is no expert \(7, 0\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(
    tiny_model: TinyModel, policy: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_for(tiny_model("qwen3_moe"), "transformers", **policy)


# ------------------------------------------------------------------------------------------ merging


def clusters_of(plan: CompressionPlan, layer: int) -> list[set[int]]:
    """Experts of a layer that are one in the result, the largest cluster first."""
    found: dict[int, set[int]] = {}
    for decision in plan.experts:
        if decision.layer == layer and isinstance(decision.expert, int):
            assert decision.becomes is not None
            found.setdefault(decision.becomes, set()).add(decision.expert)
    return sorted(found.values(), key=lambda c: (-len(c), min(c)))


def average_linkage(
    experts: Sequence[int], apart: Mapping[frozenset[int], float], count: int
) -> Any:
    """The obvious loop: join the two clusters whose members are nearest on average."""
    clusters = [{expert} for expert in experts]
    while len(clusters) > count:
        one, other = min(
            itertools.combinations(clusters, 2),
            key=lambda pair: (
                sum(apart[frozenset(p)] for p in itertools.product(*pair))
                / (len(pair[0]) * len(pair[1]))
            ),
        )
        clusters = [c for c in clusters if c not in (one, other)] + [one | other]
    return clusters


def test_the_most_alike_are_merged_and_protected_ones_stay_alone(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3_moe")
    source = open_source(str(path))
    plan = plan_for(path, "transformers", merge={"fraction": 0.5})
    for layer in range(3):
        free = [e for e in range(8) if (layer, e) != (1, 3)]
        distances = made_up_similarity(source, layer).distances
        apart = dict(
            zip(map(frozenset, itertools.combinations(range(8), 2)), distances, strict=True)
        )
        expected = average_linkage(free, apart, 4 - (layer == 1)) + [{3}] * (layer == 1)
        assert clusters_of(plan, layer) == sorted(expected, key=lambda c: (-len(c), min(c)))
    tokens = profile_of(source).by_id
    for decision in plan.experts:
        if decision.action == "merge":
            cluster = next(c for c in clusters_of(plan, decision.layer) if decision.expert in c)
            total = sum(tokens[ExpertId(decision.layer, e)].tokens for e in cluster)
            assert decision.share == pytest.approx(tokens[decision.id].tokens / total)


def test_merging_an_expert_with_a_shuffled_copy_of_itself_changes_nothing(tmp_path: Path) -> None:
    """The neurons of an expert have no order: the copy's are put back before the average."""
    path = build(tmp_path / "model", "mixtral")
    tensors = load_file(path / "model.safetensors")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    stem = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    for layer in range(3):
        for projection, axis in (("w1", 0), ("w3", 0), ("w2", 1)):
            weight = tensors[stem.format(layer, 0, projection)]
            shuffled = weight.index_select(axis, order).contiguous()
            tensors[stem.format(layer, 2, projection)] = shuffled
    edit_weights(path, tensors)
    source = open_source(str(path))
    settings = recipe(path, quantization={"method": "none"}, policy={"protect": "none"})
    plan = make_plan(source, profile_of(source), settings)
    lines = [
        replace(d, action="merge", becomes=0, share=0.25 if d.expert else 0.75)
        if d.expert in (0, 2)
        else d
        for d in plan.experts
    ]
    plan = check_plan(replace(plan, experts=tuple(lines)), source, "plan.json")
    made = write(source, plan, tmp_path / "out")
    after = made.tensors
    for layer in range(3):
        for projection in ("w1", "w2", "w3"):
            merged = after[stem.format(layer, 0, projection)]
            # Ties between the copies may exchange neurons of equal likeness, never their values.
            torch.testing.assert_close(merged, tensors[stem.format(layer, 0, projection)])
        router = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"].float()
        mean = (0.75 * router[0] + 0.25 * router[2]).bfloat16()
        expected = torch.stack([mean, router[1].bfloat16(), router[3].bfloat16()])
        found = after[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        torch.testing.assert_close(found, expected, atol=0, rtol=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_is_an_ordinary_checkpoint_and_accounted_for(
    name: str, tmp_path: Path, judge: Callable[[Made], Any]
) -> None:
    variant, differs = MODELS[name]
    path = build(tmp_path / "model", variant, **differs)
    made = make(path, tmp_path / "out", merge={"fraction": 0.5})
    _, info = AutoModelForCausalLM.from_pretrained(made.directory, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "mismatched_keys"))
    assert all(name.startswith(NOT_RUN) for name in info["unexpected_keys"])
    assert open_source(str(made.directory)).expert_count == made.source.expert_count // 2
    report = judge(made)
    assert report.check("tensors_accounted").passed
    assert report.check("kl_divergence").value > 0


def test_a_merged_expert_stands_for_all_its_members_in_routing(
    tiny_model: TinyModel, tmp_path: Path, judge: Callable[[Made], Any]
) -> None:
    """With everything merged into one expert, whatever the source chose was chosen."""
    made = make(tiny_model("mixtral"), tmp_path / "out", merge={"fraction": 0.75}, protect="none")
    assert made.small.source.expert_count == 1
    assert judge(made).check("router_agreement").value == 1.0


# ------------------------------------------------------------------------------ plans from a file


def changed(plan: CompressionPlan, identity: ExpertId, **fields: Any) -> CompressionPlan:
    lines = [replace(d, **fields) if d.id == identity else d for d in plan.experts]
    return replace(plan, experts=tuple(lines))


def test_a_plan_edited_by_hand_is_renumbered_and_checked(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3_moe")
    source = open_source(str(path))
    plan = plan_for(path, "transformers", prune={"fraction": 0.5})
    gone = next(d for d in plan.experts if d.action == "prune" and d.layer == 0)
    left = next(d for d in plan.experts if d.action == "keep" and d.layer == 0)
    swapped = changed(plan, gone.id, action="keep", bits=16)
    with pytest.raises(RecipeError, match="4 experts are left in group 0 of layer 1, but 5 in"):
        check_plan(swapped, source, "plan.json")
    swapped = changed(swapped, left.id, action="prune", bits=None)
    checked = check_plan(swapped, source, "plan.json")
    numbers = [d.becomes for d in checked.experts if d.layer == 0 and d.action != "prune"]
    assert numbers == [0, 1, 2, 3]
    assert checked.size_bytes == plan.size_bytes
    with pytest.raises(RecipeError, match=r"\(1, 3\) is protected, but its action is prune"):
        check_plan(changed(plan, ExpertId(1, 3), action="prune", bits=None), source, "plan.json")


# -------------------------------------------------------------------------------------- validation


@pytest.fixture
def judge() -> Callable[[Made], Any]:
    """Validates what was made; loading it again is tested above."""

    def run(made: Made) -> Any:
        text = {"data": "unused.txt", "generation": {"tokens": 0}}
        settings = recipe(made.source.path, validation=text)
        return validate(made.source, made.plan, made.directory, TOKENS, settings, reload=False)

    return run


def test_a_pruned_checkpoint_is_accounted_for_to_the_last_tensor(
    tiny_model: TinyModel, tmp_path: Path, judge: Callable[[Made], Any]
) -> None:
    made = make(tiny_model("mixtral"), tmp_path / "out", prune={"fraction": 0.5})
    assert judge(made).check("tensors_accounted").passed
    name = "model.layers.1.block_sparse_moe.gate.weight"
    edit = made.tensors[name].clone()
    edit[0, 0] += 1
    broken = write(made.source, made.plan, tmp_path / "broken")
    for file in sorted(broken.directory.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            save_file({**tensors, name: edit}, file, metadata={"format": "pt"})
    check = judge(broken).check("tensors_accounted")
    assert not check.passed
    assert check.detail == f"{name} differs from what was written"


def test_routing_is_compared_by_what_experts_are_in_the_source(
    tiny_model: TinyModel, tmp_path: Path, judge: Callable[[Made], Any]
) -> None:
    path = tiny_model("qwen3_moe")
    made = make(path, tmp_path / "out", prune={"fraction": 0.25})
    chosen = {at: [] for at in (path, made.directory)}
    for at, found in chosen.items():
        model = plain_model(at)
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(
                lambda m, i, out, found=found: found.append(out[2])
            )
        logits(model)
    for layer, (before, after) in enumerate(zip(*chosen.values(), strict=True)):
        names = {d.becomes: d.expert for d in made.plan.experts if d.layer == layer}
        shares = [
            len(set(old) & {names[e] for e in new}) / len(old)
            for old, new in zip(before.tolist(), after.tolist(), strict=True)
        ]
        found = judge(made).layers[layer].router_agreement
        assert found == pytest.approx(sum(shares) / len(shares))
        assert 0.3 < found < 0.99


def test_records_speak_of_the_experts_of_the_source(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("olmoe")
    source = open_source(str(path))
    plan = plan_for(path, prune={"fraction": 0.5}, bits=4)
    settings = recipe(path, target="gptqmodel", quantization={"method": "rtn", "group_size": 32})
    records = compress(source, plan, TOKENS, settings, tmp_path / "out").layers
    found = {expert.id for record in records for expert in record.experts}
    assert found == {d.id for d in plan.experts if d.action == "quantize"}
    assert min(record.hidden_error for record in records) > 0


@pytest.mark.parametrize("policy", [{"prune": {"fraction": 0.5}}, {"merge": {"fraction": 0.5}}])
def test_an_interrupted_run_of_a_smaller_model_ends_with_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path, policy: Mapping[str, Any]
) -> None:
    path = tiny_model("qwen2_moe")
    source = open_source(str(path))
    plan = plan_for(path, bits=4, **policy)
    settings = recipe(path, target="gptqmodel", quantization={"method": "gptq", "group_size": 32})

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Stop

    def run(name: str, options: RunOptions) -> dict[str, bytes]:
        directory = tmp_path / name
        compress(source, plan, TOKENS, settings, directory, options)
        return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}

    whole = run("whole", RunOptions())
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(Stop):
        run("parts", RunOptions(work=work, progress=stop))
    assert (work / "compress-states.safetensors").exists()
    assert run("parts", RunOptions(work=work)) == whole


def say(path: Path, **changes: object) -> None:
    """Add to config.json, nulls left as they are."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("key", ["n_routed_experts", "num_experts", "num_local_experts"])
@pytest.mark.parametrize("name", ["qwen2_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3"])
def test_every_spelling_of_the_count_follows_a_pruning(
    tiny_model: TinyModel, tmp_path: Path, name: str, key: str
) -> None:
    """transformers listens to some of the keys, engines to others."""
    path = shutil.copytree(tiny_model(name), tmp_path / "model")
    ungrouped = {"n_group": 1, "topk_group": 1} if name == "deepseek_v3" else {}
    say(path, **{key: open_source(str(path)).expert_count}, **ungrouped)
    half = open_source(str(path)).expert_count // 2
    made = make(path, tmp_path / "out", prune={"score": "reap", "fraction": 0.5})
    result = json.loads((tmp_path / "out" / "config.json").read_text())
    said = {k: result[k] for k in COUNT_KEYS if k in result}
    assert key in said
    assert set(said.values()) == {half}
    assert open_source(str(made.directory)).expert_count == half


def test_groups_that_a_greedy_router_does_not_look_at(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """A quarter of 8 experts goes, though they are in 4 groups by the config: the router chooses
    among all, and no engine is left with groups that do not fit."""
    path = shutil.copytree(tiny_model("deepseek_v2"), tmp_path / "model")
    say(path, n_group=4, topk_group=2)
    made = make(path, tmp_path / "out", prune={"score": "reap", "fraction": 0.25})
    assert made.small.source.expert_count == 6
    assert made.small.source.top_k == 3
    result = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (result["n_group"], result["topk_group"]) == (1, 1)
    say(path, topk_method="group_limited_greedy")
    with pytest.raises(RecipeError, match="less than one expert of a routing group"):
        make(path, tmp_path / "none", prune={"score": "reap", "fraction": 0.25})
