"""What families.json says of a model type is complete: by the facts alone, experts change places on
disk and the model computes the same."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_types import CONFIGS, NAMES
from torch import Tensor

from se_compress.artifacts import (
    SOURCE_BITS,
    Action,
    CompressionPlan,
    ExpertDecision,
    ModelSource,
    Scheme,
)
from se_compress.model.splice import merge_experts
from se_compress.model.surgery import renumbered
from se_compress.opening.families import FAMILIES
from se_compress.opening.source import open_source

TinyType = Callable[[str], Path]
TOKENS = torch.tensor(tiny.random_tokens(2, 40, seed=3))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_type_has_its_place(tiny_type: TinyType, name: str) -> None:
    source = open_source(str(tiny_type(name)))
    family = FAMILIES[source.family]
    count, layers = source.expert_count, source.moe_layers
    assert source.top_k == CONFIGS[source.family].get("num_experts_per_tok", 2)
    assert layers
    for identity, roles in source.experts.items():
        assert tuple(sorted(roles)) == tuple(sorted(family.roles)), identity
    routed = [i for i in source.experts if i.expert != "shared"]
    assert len(routed) == count * len(layers)
    of_all = [info for info in source.tensors.values() if info.axis is not None]
    assert {info.layer for info in of_all} == set(layers)
    for info in of_all:
        assert info.axis is not None
        assert info.shape[info.axis] >= count
        assert info.kind == "router"


# ------------------------------------------------------------------------------------ permutation


def order_of(source: ModelSource) -> dict[int, list[int]]:
    """For each layer another order of its experts, within the groups of the router."""
    orders = {}
    for layer in source.moe_layers:
        generator = torch.Generator().manual_seed(layer)
        size = source.expert_count // source.group_count
        order = []
        for group in range(source.group_count):
            order += [group * size + int(i) for i in torch.randperm(size, generator=generator)]
        orders[layer] = (
            order if order != sorted(order) else order[1:size] + order[:1] + order[size:]
        )
    return orders


def permuted(
    source: ModelSource, orders: Mapping[int, Sequence[int]], skip: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """The tensors on disk with the experts in other orders; those of `skip` as they were."""
    family = FAMILIES[source.family].at(source.prefix)
    found = load_file(source.path / "model.safetensors")
    changed = dict(found)
    for name, tensor in found.items():
        layer, _, rest = name.removeprefix(f"{source.prefix}layers.").partition(".")
        if name in skip or not layer.isdigit() or int(layer) not in orders:
            continue
        order = orders[int(layer)]
        info = source.tensors.get(name)
        if rest in family.fused:
            changed[name] = tensor[order]
        elif rest in family.ids:
            changed[name] = torch.tensor(order).argsort()[tensor]
        elif info is not None and info.axis is not None:
            whole = [*order, *range(len(order), info.shape[info.axis])]
            changed[name] = tensor.index_select(info.axis, torch.tensor(whole))
        elif info is not None and isinstance(info.expert, int):
            number = f"experts.{info.expert}."
            old = name.replace(number, f"experts.{order[info.expert]}.")
            changed[name] = found[old]
    return changed


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = tiny.plain_model(path)(TOKENS, use_cache=False).logits
    return found


def changed_logits(source: ModelSource, tensors: Mapping[str, Tensor], path: Path) -> Tensor:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_bytes((source.path / "config.json").read_bytes())
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
    return logits(path)


def difference(found: Tensor, expected: Tensor) -> float:
    """Of the logits [B, T, V], relative, the median over all positions."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("name", NAMES)
def test_experts_change_places_on_disk_and_the_model_does_not(
    tiny_type: TinyType, tmp_path: Path, name: str
) -> None:
    """Without the router's tensors it does, and without any kind of them alone."""
    source = open_source(str(tiny_type(name)))
    orders, expected = order_of(source), logits(source.path)
    found = changed_logits(source, permuted(source, orders), tmp_path / "all")
    assert difference(found, expected) < 1e-5
    family = FAMILIES[source.family]
    of_all = {i.name for i in source.tensors.values() if i.axis is not None}
    of_all |= {n for n in source.tensors if n.partition("layers.")[2][2:] in family.ids}
    without = permuted(source, orders, skip=frozenset(of_all))
    assert difference(changed_logits(source, without, tmp_path / "none"), expected) > 1e-2
    for kind in {n.partition("layers.")[2][2:] for n in of_all}:
        skip = frozenset(n for n in of_all if n.endswith(f".{kind}"))
        without = permuted(source, orders, skip=skip)
        told = difference(changed_logits(source, without, tmp_path / "one"), expected)
        assert told > 1e-3, kind


# ------------------------------------------------------------------------------------------ pruning


def sliced(source: ModelSource, small: Any, kept: Mapping[int, Sequence[int]]) -> Any:
    """A small model with the weights of the source, experts taken out in memory, whatever the names
    on disk: where the two differ in an extent, the kept ones are left there. Tables of the experts
    of each token are the small model's own."""
    state, own = tiny.plain_model(source.path).state_dict(), small.state_dict()
    for name, tensor in state.items():
        axes = [
            i for i, (a, b) in enumerate(zip(tensor.shape, own[name].shape, strict=True)) if a != b
        ]
        if name.endswith("tid2eid"):
            state[name] = own[name]
        elif axes:
            layer = int(name.partition("layers.")[2].partition(".")[0])
            behind = range(source.expert_count, tensor.shape[axes[0]])
            left = torch.tensor([*kept[layer], *behind])
            state[name] = tensor.index_select(axes[0], left)
    small = copy.deepcopy(small)
    small.load_state_dict(state)
    return small.eval()


def plan_of(source: ModelSource, kept: Mapping[int, Sequence[int]]) -> CompressionPlan:
    """A plan for plain transformers that keeps these experts of each layer, unquantised."""
    decisions = []
    for identity in source.experts:
        gone = identity.expert != "shared" and identity.expert not in kept[identity.layer]
        action: Action = "prune" if gone else "keep"
        bits = None if gone else SOURCE_BITS
        decisions.append(ExpertDecision(identity.layer, identity.expert, action, bits, "told to"))
    return CompressionPlan(
        target="transformers",
        scheme=Scheme(format="source", method="none", group_size=-1, symmetric=True),
        bits_per_weight=32.0,
        size_bytes=0,
        source_size_bytes=source.size_bytes,
        protected=(),
        profile_digest="",
        notes=(),
        experts=tuple(renumbered(decisions)),
    )


# Two of the eight experts have to stay in each of its four groups: see test_surgery.
PRUNED = [name for name in NAMES if name != "deepseek_v3"]


def kept_of(source: ModelSource) -> dict[int, list[int]]:
    """Two experts of each group go, others in each layer."""
    size = source.expert_count // source.group_count
    return {
        layer: [
            expert
            for expert in range(source.expert_count)
            if expert % size not in (layer % size, (layer + 1) % size)
        ]
        for layer in source.moe_layers
    }


@pytest.mark.parametrize("name", PRUNED)
def test_a_pruned_model_is_that_of_transformers_sliced(
    tiny_type: TinyType, tmp_path: Path, name: str
) -> None:
    source = open_source(str(tiny_type(name)))
    kept = kept_of(source)
    tiny.write_result(source, plan_of(source, kept), tmp_path / "out")
    found = tiny.plain_model(tmp_path / "out")
    expected = sliced(source, found, kept)
    with torch.no_grad():
        ours, theirs = (m(TOKENS, use_cache=False).logits for m in (found, expected))
    assert torch.isfinite(theirs).all()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(theirs, logits(source.path), atol=1e-2)
    again = open_source(str(tmp_path / "out"))
    assert again.expert_count == len(kept[source.moe_layers[0]])
    assert again.top_k == min(source.top_k, again.expert_count)


def test_the_experts_of_each_token_get_their_new_numbers(
    tiny_type: TinyType, tmp_path: Path
) -> None:
    source = open_source(str(tiny_type("deepseek_v4")))
    kept = kept_of(source)
    tiny.write_result(source, plan_of(source, kept), tmp_path / "out")
    name = "model.layers.0.ffn.gate.tid2eid"
    before, after = (
        load_file(path / "model.safetensors")[name].tolist()
        for path in (source.path, tmp_path / "out")
    )
    for old, new in zip(before, after, strict=True):
        assert len(set(new)) == len(new) == source.top_k
        assert {kept[0].index(e) for e in old if e in kept[0]} <= set(new)
        assert set(new) <= set(range(len(kept[0])))


@pytest.mark.parametrize("name", PRUNED)
def test_a_zeroed_expert_adds_nothing(tiny_type: TinyType, tmp_path: Path, name: str) -> None:
    source = open_source(str(tiny_type(name)))
    last, size = source.moe_layers[-1], source.expert_count // source.group_count
    plan = plan_of(source, {layer: range(source.expert_count) for layer in source.moe_layers})
    zeroed = [
        replace(d, action="zero", bits=None) if (d.layer, d.expert) == (last, size - 1) else d
        for d in plan.experts
    ]
    tiny.write_result(source, replace(plan, experts=tuple(zeroed)), tmp_path / "zeroed")
    expected = tiny.plain_model(source.path)
    experts = [m for m in expected.modules() if hasattr(m, "is_transposed")][-1]
    with torch.no_grad():
        experts.down_proj[size - 1] = 0
        if experts.has_bias:
            experts.down_proj_bias[size - 1] = 0
        theirs = expected(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits(tmp_path / "zeroed"), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [("up", "down"), ("gate", "up", "down")])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_that_are_the_same_but_for_the_order_of_neurons_merge_into_it(
    parts: tuple[str, ...], biased: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate": (12, 8), "up": (12, 8), "down": (8, 12)}
    wanted = [*parts, *(f"{part} bias" for part in parts if biased)]
    first = {
        part: torch.randn(
            shapes[part.split()[0]][: 1 if "bias" in part else 2], generator=generator
        )
        for part in wanted
    }
    order = torch.randperm(12, generator=generator)
    second = {
        part: weight
        if part == "down bias"
        else weight[:, order]
        if part == "down"
        else weight[order]
        for part, weight in first.items()
    }
    merged = merge_experts([second, first], [0.25, 0.75])
    torch.testing.assert_close(dict(merged), first)
