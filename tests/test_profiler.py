"""The criterion gives the published super experts, and every number of a profile equals that of a
slow twin which runs the plain model, one sequence and one token at a time."""

import json
import random
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    BOS,
    CONFIGS,
    MASSIVE,
    LayerWatch,
    edit_weights,
    plain_model,
    plant,
    random_tokens,
    recipe,
    starve,
)
from torch import Tensor, nn

from se_compress.artifacts import (
    PROJECTION_GROUPS,
    Ablation,
    ExpertId,
    ExpertIndex,
    ExpertProfile,
    ExpertStats,
    LayerStats,
    ModelSource,
    RunOptions,
    to_json,
)
from se_compress.opening.families import FAMILIES
from se_compress.opening.source import open_source
from se_compress.profiling import losses, profiler
from se_compress.profiling.confirm import control_for
from se_compress.profiling.criterion import (
    Proposal,
    cancelling_layers,
    forming_layers,
    mark_layers,
    over_thresholds,
    percentile,
    propose,
    select_super_experts,
)
from se_compress.profiling.profiler import profile_experts
from se_compress.profiling.sensitivity import SENSITIVITY_BITS
from se_compress.quant.grid import Grid, dequantize, rtn
from se_compress.recipe import SuperExperts

TinyModel = Callable[[str], Path]

TOKENS = [[BOS, *row] for row in random_tokens(5, 19)]
WIDE = {"percentile": 80.0}  # of 24 experts, the 99.5th percentile lets one pass whatever they do


# -------------------------------------------------------------------------- published super experts


@dataclass(frozen=True)
class Published:
    """A model of arXiv:2507.23279v3: table 1 (peaks on C4), tables 2, 7, 8 and 10 (super experts),
    appendix C (experts of the last layers with large outputs, which are no super experts).

    Table 1 gives values without experts. The super experts get the largest ones in the order of
    their layers; the values after them, as far as printed, go to experts of other layers.
    tenth, top       the values of rank 10 and of the last rank within 0.5 %
    """

    layers: Sequence[int]
    routed: int
    shared: bool
    supers: Mapping[ExpertId, float]
    others: Mapping[ExpertId, float]
    tenth: float
    top: float

    @property
    def forming(self) -> Collection[int]:
        return {identity.layer for identity in self.supers}

    def peaks(self) -> dict[ExpertId, float]:
        """All experts of the model; what was not published is filled in below what was."""
        experts: list[ExpertIndex] = [*range(self.routed), *(["shared"] if self.shared else [])]
        ids = [ExpertId(layer, expert) for layer in self.layers for expert in experts]
        known = {**self.supers, **self.others}
        rest = [identity for identity in ids if identity not in known]
        draw = random.Random(0)
        draw.shuffle(rest)
        count = len(ids) * 5 // 1000
        values = [self.tenth + (min(known.values()) - self.tenth) * 0.5] * max(0, 9 - len(known))
        values += [self.tenth] * max(0, 10 - len(known) - len(values))
        below = min(self.tenth, 0.1 * max(known.values()))  # else it would be a super expert
        values += [draw.uniform(self.top, below) for _ in range(count - len(known) - len(values))]
        values += [draw.uniform(0, self.top) for _ in range(len(rest) - len(values))]
        return known | dict(zip(rest, values, strict=True))


def ids(*pairs: tuple[int, ExpertIndex]) -> list[ExpertId]:
    return [ExpertId(layer, expert) for layer, expert in pairs]


PUBLISHED = {
    "Qwen3-30B-A3B": Published(
        layers=range(48),
        routed=128,
        shared=False,
        supers=dict(zip(ids((1, 68), (2, 92), (3, 82)), (744, 540, 430), strict=True)),
        others=dict(zip(ids((47, 48), (47, 100)), (63.5, 19.1), strict=True)),
        tenth=12.1,
        top=7.3,
    ),
    "DeepSeek-V2-Lite-Chat": Published(
        layers=range(1, 27),
        routed=64,
        shared=True,
        supers=dict(zip(ids((3, 54), (4, 38)), (1424, 462), strict=True)),
        others=dict(zip(ids((25, 11), (25, 39), (24, 0)), (112.5, 89.5, 37.5), strict=True)),
        tenth=24.0,
        top=24.0,  # printed as 34.5, more than its value of rank 10
    ),
    "Mixtral-8x7B-Instruct-v0.1": Published(
        layers=range(32),
        routed=8,
        shared=False,
        supers={ExpertId(1, 3): 5600},
        others=dict(
            zip(ids((31, 0), (31, 1), (30, 2), (30, 3)), (302, 286, 258, 253), strict=True)
        ),
        tenth=139,
        top=139,  # printed as 5600, the maximum
    ),
    "DeepSeek-R1": Published(
        layers=range(3, 61),
        routed=256,
        shared=True,
        supers=dict(
            zip(
                ids(
                    (8, 24),
                    (8, "shared"),
                    (12, 190),
                    (13, 64),
                    (14, 202),
                    (14, "shared"),
                    (22, "shared"),
                    (33, 64),
                    (33, "shared"),
                    (35, "shared"),
                ),
                (616, 536, 171, 143, 143, 130, 115, 100, 85, 67.0),  # ranks 6 to 9 not published
                strict=True,
            )
        ),
        others={},
        tenth=67.0,
        top=36.75,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_super_experts(name: str) -> None:
    model = PUBLISHED[name]
    assert select_super_experts(model.peaks(), model.forming) == sorted(model.supers)


def test_the_filled_in_tables_are_the_published_ones() -> None:
    counts = {name: len(model.peaks()) for name, model in PUBLISHED.items()}
    assert counts == {
        "Qwen3-30B-A3B": 6144,
        "DeepSeek-V2-Lite-Chat": 26 * 65,  # the paper counts dense layer 0 and both shared experts
        "Mixtral-8x7B-Instruct-v0.1": 256,
        "DeepSeek-R1": 58 * 257,
    }
    for model in PUBLISHED.values():
        ordered = sorted(model.peaks().values(), reverse=True)
        assert ordered[9] == pytest.approx(model.tenth)
        assert ordered[max(10, len(ordered) * 5 // 1000)] <= model.top


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_outputs_of_the_last_layer_are_no_super_experts(name: str) -> None:
    model = PUBLISHED[name]
    loud = ExpertId(model.layers[-1], 5)
    peaks = model.peaks() | {loud: 0.5 * max(model.peaks().values())}
    assert loud in over_thresholds(peaks, 99.0, 0.1)[0]
    assert select_super_experts(peaks, model.forming, percent=99.0) == sorted(model.supers)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("Qwen3-30B-A3B", ExpertId(3, 82)),
        ("DeepSeek-V2-Lite-Chat", ExpertId(4, 38)),
        ("DeepSeek-R1", ExpertId(35, "shared")),
    ],
)
def test_a_percentile_over_the_forming_layers_alone_would_lose_one(
    name: str, lost: ExpertId
) -> None:
    """Algorithm 1 of the paper, taken at its word."""
    model = PUBLISHED[name]
    pool = {i: peak for i, peak in model.peaks().items() if i.layer in model.forming}
    chosen, _, _ = over_thresholds(pool, 99.5, 0.1)
    assert lost not in chosen
    assert lost in over_thresholds(model.peaks(), 99.5, 0.1)[0]


def test_the_fourth_value_of_qwen3_needs_the_layers() -> None:
    """Table 9 calls the result stable down to 0.08 of the maximum, where 63.5 is over both."""
    model = PUBLISHED["Qwen3-30B-A3B"]
    chosen, _, _ = over_thresholds(model.peaks(), 99.5, 0.08)
    assert chosen == sorted([*model.supers, ExpertId(47, 48)])
    assert select_super_experts(model.peaks(), model.forming, fraction=0.08) == sorted(model.supers)


def test_leaving_layers_out_of_the_pool_moves_the_percentile() -> None:
    """Mixtral: of the first 75 % of the layers, the percentile lets one expert pass, of all two."""
    model = PUBLISHED["Mixtral-8x7B-Instruct-v0.1"]
    peaks = model.peaks() | {ExpertId(1, 4): 4000.0}
    early = {i: peak for i, peak in peaks.items() if i.layer < 24}
    assert over_thresholds(early, 99.5, 0.1)[0] == [ExpertId(1, 3)]
    assert over_thresholds(peaks, 99.5, 0.1)[0] == [ExpertId(1, 3), ExpertId(1, 4)]


def test_experts_that_were_never_routed_count() -> None:
    peaks = {ExpertId(0, i): float(i > 190) * i for i in range(200)}
    assert select_super_experts(peaks, {0}) == [ExpertId(0, 199)]
    routed_only = {i: peak for i, peak in peaks.items() if peak}
    assert percentile(routed_only.values(), 50) > percentile(peaks.values(), 50) == 0


def test_the_thresholds_are_strict() -> None:
    peaks = {ExpertId(0, 0): 100.0, ExpertId(0, 1): 10.0, ExpertId(0, 2): 10.5}
    chosen, by_percentile, by_fraction = over_thresholds(peaks, 1, 0.1)
    assert (by_percentile, by_fraction) == (pytest.approx(10.01), 10)
    assert chosen == ids((0, 0), (0, 2))
    assert over_thresholds(dict.fromkeys(peaks, 5.0), 50, 0.1)[0] == []


@pytest.mark.parametrize("size", [1, 2, 3, 7, 200, 1001])
@pytest.mark.parametrize("percent", [0.1, 37.0, 50.0, 99.5, 99.99])
def test_percentile_equals_that_of_numpy(size: int, percent: float) -> None:
    values = np.random.default_rng(size).normal(size=size)
    expected = float(np.percentile(values, percent))
    assert percentile(values.tolist(), percent) == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------------------- layers, made by hand


def layer(index: int, peak: float, rise: float, fall: float = 0.5, **more: Any) -> LayerStats:
    median = more.pop("median", 0.2)
    return LayerStats(
        layer=index,
        moe=more.get("mlp_peak") is None,
        peak=peak,
        position=0,
        channel=7,
        token_id=1,
        median=median,
        rise=rise,
        fall=fall,
        massive=peak > 100 and peak >= 1000 * median,
        forming=False,
        cancelling=False,
        mlp_peak=more.get("mlp_peak"),
        sink_mass=(0.5,),
        sink_rate=1.0,
    )


BUILD_UP = [  # as in Qwen3-30B-A3B: three rises, then carried, then taken away
    layer(0, 3, 2),
    layer(1, 700, 700),
    layer(2, 1230, 530),
    layer(3, 1650, 420),
    *(layer(i, 1650 + i, 6) for i in range(4, 10)),
    layer(10, 90, 20, fall=1580),
]


def test_a_build_up_over_three_layers() -> None:
    assert forming_layers(BUILD_UP) == {1, 2, 3}
    assert cancelling_layers(BUILD_UP) == {10}


def test_a_layer_that_cancels_only_in_part_forms_nothing() -> None:
    layers = [*BUILD_UP[:-1], layer(10, 600, 20, fall=1050)]
    assert forming_layers(layers) == {1, 2, 3}
    assert cancelling_layers(layers) == {10}


def test_a_layer_that_cancels_more_than_it_adds_forms_nothing() -> None:
    """smollm2-moe on fiction, whose layer 28 adds 5.02 % of what layer 11 does."""
    peaks = [layer(10, 130, 40, median=1.6), layer(11, 29005, 28939, median=1.7)]
    last = layer(28, 12139, 1452, median=10.4, fall=16446)
    assert forming_layers([*peaks, last]) == {11}
    assert cancelling_layers([*peaks, last]) == {28}
    assert forming_layers([*peaks, replace(last, fall=1000.0)]) == {11, 28}


def test_a_second_channel_formed_below_the_first() -> None:
    """The maximum does not move, the layer adds to another element all the same."""
    layers = [layer(0, 3, 2), layer(1, 1500, 1500), layer(2, 1500, 900), layer(3, 1502, 4)]
    assert forming_layers(layers) == {1, 2}


def test_nothing_is_massive() -> None:
    for layers in (
        [layer(0, 3, 2), layer(1, 90, 88), layer(2, 95, 5)],  # below 100
        [layer(0, 300, 280, median=0.5), layer(1, 320, 20, median=0.5)],  # below 1000 medians
    ):
        assert forming_layers(layers) == frozenset()
        assert cancelling_layers(layers) == frozenset()


def test_the_last_layer_of_a_model_without_massive_activations_stays_harmless() -> None:
    """A late peak alone: huge, but only there; the rule asks what that layer adds, and it does."""
    layers = [layer(0, 3, 2), layer(1, 4, 2), layer(2, 400, 396)]
    assert forming_layers(layers) == {2}


def test_no_layers_at_all() -> None:
    assert forming_layers([]) == cancelling_layers([]) == frozenset()


def expert(layer: int, index: ExpertIndex, peak: float) -> ExpertStats:
    return ExpertStats(layer, index, peak, peak, 7, 0, BOS, 9, 0.5, 1.0, 0.5, {}, {})


def select(layers: Sequence[LayerStats], experts: Sequence[ExpertStats]) -> Proposal:
    return propose(mark_layers(layers), experts, SuperExperts(**WIDE))


QUIET = [expert(at, i, 1.0 + i) for at in range(11) for i in range(3)]


def test_selection_names_super_experts_and_outliers() -> None:
    loud = [expert(1, 60, 800), expert(3, "shared", 430), expert(7, 61, 300), expert(10, 62, 900)]
    found = select(BUILD_UP, QUIET + loud)
    assert [s.id for s in found.super_experts] == ids((1, 60), (3, "shared"))
    assert {o.id: o.reason for o in found.outliers} == {
        ExpertId(7, 61): "layer forms no massive activation",
        ExpertId(10, 62): "cancels",
    }
    assert found.fraction_value == pytest.approx(90)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("layer 2 forms massive activations (adds 530.0)")
    assert "no one expert" in found.notes[0]


def test_a_dense_layer_as_the_source() -> None:
    layers = [layer(0, 900, 900, mlp_peak=880.0), *(layer(i, 905, 5) for i in range(1, 11))]
    found = select(layers, [*QUIET, expert(9, 60, 200)])
    assert found.super_experts == ()
    assert {o.reason for o in found.outliers} == {"layer forms no massive activation"}
    assert len(found.notes) == 1
    assert (
        "layer 0 forms massive activations (adds 900.0), by its dense MLP (peak 880.0)"
        in (found.notes[0])
    )


def test_no_massive_activation_no_super_expert() -> None:
    layers = [layer(i, 20.0 + i, 2, median=0.5) for i in range(11)]
    found = select(layers, [*QUIET, expert(4, 60, 5000)])
    assert found.super_experts == ()
    assert {(o.id, o.reason) for o in found.outliers} == {(ExpertId(4, 60), "model has none")}
    assert len(found.notes) == 1
    assert found.notes[0].startswith("no massive activation: the residual peaks at 30.0 after lay")
    assert "60 times the median" in found.notes[0]
    assert found.notes[0].endswith("there is no super expert")


# ------------------------------------------------------------------------------------ the slow twin


class Twin:
    """The plain model, run sequence by sequence; what happens in it is kept.

    inputs, outputs   per sequence and layer, hidden states [T, H] before and after
    mlp               per sequence and layer, input [T, H] of the MLP block
    routing           per sequence and layer, chosen experts and weights [T, k]
    attention         per sequence and layer [heads, T, T]
    """

    def __init__(self, path: Path, tokens: Sequence[Sequence[int]]) -> None:
        self.source: ModelSource = open_source(str(path))
        self.weights = {n: t.float() for n, t in load_file(path / "model.safetensors").items()}
        self.tokens = tokens
        count = self.source.layer_count
        self.inputs, self.outputs, self.mlp = ([[] for _ in range(count)] for _ in range(3))
        self.routing: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(count)]
        model = plain_model(path)
        for at, block in enumerate(model.model.layers):
            block.register_forward_hook(self._keep_layer(at))
            block.mlp.register_forward_pre_hook(self._keep(self.mlp[at]))
            if at in self.source.moe_layers:
                block.mlp.experts.register_forward_pre_hook(self._keep_routing(at))
        with torch.no_grad():
            outputs = [model(torch.tensor([row]), output_attentions=True) for row in tokens]
        self.attention = [[layer[0] for layer in output.attentions] for output in outputs]
        self.logits = [output.logits[0] for output in outputs]

    def _keep(self, into: list[Tensor]) -> Callable[..., None]:
        return lambda module, inputs: into.append(inputs[0][0])

    def _keep_layer(self, at: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            self.inputs[at].append(inputs[0][0])
            self.outputs[at].append((output[0] if isinstance(output, tuple) else output)[0])

        return hook

    def _keep_routing(self, at: int) -> Callable[..., None]:
        return lambda module, inputs: self.routing[at].append((inputs[1], inputs[2]))

    def output(self, identity: ExpertId, token: Tensor) -> Tensor:
        """What one expert makes of one token [H], from the checkpoint's tensors."""
        roles = self.source.experts[identity]
        gate, up, down = (self.weights[roles[role].name] for role in ("gate", "up", "down"))
        return down @ (nn.functional.silu(gate @ token) * (up @ token))

    def visits(self, identity: ExpertId) -> list[tuple[int, int, float]]:
        """Sequence, position and weight of every token that the expert gets."""
        at, index = identity.layer, identity.expert
        found = []
        for sequence, hidden in enumerate(self.mlp[at]):
            for position in range(len(hidden)):
                if index == "shared":
                    found.append((sequence, position, self._gate(at, hidden[position])))
                    continue
                experts, weights = self.routing[at][sequence]
                for slot, chosen in enumerate(experts[position].tolist()):
                    if chosen == index:
                        found.append((sequence, position, float(weights[position, slot])))
        return found

    def _gate(self, at: int, token: Tensor) -> float:
        name = FAMILIES[self.source.family].shared_gate.format(layer=at)
        return float(torch.sigmoid(self.weights[name][0] @ token)) if name else 1.0

    def expert(self, identity: ExpertId) -> dict[str, float]:
        stats: dict[str, float] = {"peak": 0.0, "weighted_peak": 0.0, "tokens": 0}
        stats |= {"channel": -1, "position": -1, "token_id": -1}
        weight_sum = norm_sum = saliency_sum = 0.0
        for sequence, position, weight in self.visits(identity):
            output = self.output(identity, self.mlp[identity.layer][sequence][position])
            strongest = int(output.abs().argmax())
            if float(output[strongest].abs()) > stats["peak"]:
                stats["peak"], stats["channel"] = float(output[strongest].abs()), strongest
                stats["position"] = position
                stats["token_id"] = self.tokens[sequence][position]
            weighted = float(output[strongest].abs()) * weight
            stats["weighted_peak"] = max(stats["weighted_peak"], weighted)
            stats["tokens"] += 1
            weight_sum += weight
            norm_sum += float(output.norm())
            saliency_sum += weight * float(output.norm())
        count = max(stats["tokens"], 1)
        return stats | {
            "gate_mass": weight_sum / sum(len(row) for row in self.tokens),
            "mean_output_norm": norm_sum / count,
            "saliency": saliency_sum / count,
        }

    def losses(self, identity: ExpertId, grid: Grid) -> dict[str, float]:
        """What rounding gate and up, or down, puts into the stream, token by token."""
        roles = self.source.experts[identity]
        gate, up, down = (self.weights[roles[role].name] for role in ("gate", "up", "down"))
        visits = self.visits(identity)
        tokens = [self.mlp[identity.layer][s][p] for s, p, _ in visits]
        inner = [nn.functional.silu(gate @ token) * (up @ token) for token in tokens]

        def rounded(weight: Tensor, inputs: list[Tensor]) -> Tensor:
            power = torch.stack(inputs).square().mean(dim=0)
            return dequantize(rtn(weight[None], grid, power[None]))[0]

        gate_q, up_q = rounded(torch.cat([gate, up]), tokens).chunk(2)
        down_q, lost = rounded(down, inner), {"gate_up": 0.0, "down": 0.0}
        for (sequence, position, weight), token, through in zip(visits, tokens, inner, strict=True):
            size = self.outputs[identity.layer][sequence][position].norm()
            changed = nn.functional.silu(gate_q @ token) * (up_q @ token)
            parts = {"gate_up": down @ (changed - through), "down": (down_q - down) @ through}
            for part, error in parts.items():
                lost[part] += float((weight * error.norm() / size) ** 2)
        return {part: total / sum(map(len, self.tokens)) for part, total in lost.items()}

    def layer(self, at: int) -> dict[str, Any]:
        before, after = torch.stack(self.inputs[at]).abs(), torch.stack(self.outputs[at]).abs()
        sequence, position, channel = np.unravel_index(int(after.argmax()), after.shape)
        middle = [sorted(states.flatten().tolist()) for states in after]
        sinks = torch.stack([self.attention[s][at][:, :, 0] for s in range(len(self.tokens))])
        return {
            "layer": at,
            "moe": at in self.source.moe_layers,
            "peak": float(after.max()),
            "position": int(position),
            "channel": int(channel),
            "token_id": self.tokens[int(sequence)][int(position)],
            "median": float(np.mean([row[(len(row) - 1) // 2] for row in middle])),
            "rise": float((after - before).max()),
            "fall": float((before - after).max()),
            "mlp_peak": self.dense_peak(at),
            "sink_mass": sinks[:, :, 8:].mean(dim=(0, 2)).tolist(),
            "sink_rate": float((self._received(at) > 0.3).float().mean()),
        }

    def _received(self, at: int) -> Tensor:
        """Per head, attention to position 0, averaged over all queries and sequences."""
        return torch.stack([a[at][:, :, 0].mean(dim=1) for a in self.attention]).mean(dim=0)

    def dense_peak(self, at: int) -> float | None:
        if at in self.source.moe_layers:
            return None
        names = [f"model.layers.{at}.mlp.{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = (self.weights[name] for name in names)
        hidden = torch.cat(self.mlp[at])
        inner = nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
        return float((inner @ down.T).abs().max())


def assert_alike(found: Mapping[str, Any], expected: Mapping[str, Any], loss: float = 0.05) -> None:
    """Floats to round-off, everything else exactly. Losses come from the best of many scales, and
    where two are as good as equal, round-off decides between them."""
    assert set(found) == set(expected)
    for key, value in expected.items():
        relative = loss if ".loss_" in key else 1e-4
        same = pytest.approx(value, rel=relative) if isinstance(value, float) else value
        assert found[key] == same, key


def profile(
    path: Path, tokens: Any = TOKENS, options: Any = None, **sections: Any
) -> ExpertProfile:
    settings = recipe(path, quantization={"group_size": 32}, **sections)
    return profile_experts(open_source(str(path)), tokens, settings, options or RunOptions())


@pytest.mark.parametrize("name", [*CONFIGS, "qwen2_moe-sparse-step"])
def test_every_number_equals_that_of_the_slow_twin(tiny_model: TinyModel, name: str) -> None:
    twin, found = Twin(tiny_model(name), TOKENS), profile(tiny_model(name))
    assert [stats.id for stats in found.experts] == list(twin.source.experts)
    for stats in found.experts:
        expected = twin.expert(stats.id)
        assert_alike({key: getattr(stats, key) for key in expected}, expected)
    assert sum(e.tokens for e in found.experts if e.expert != "shared") == (
        len(twin.source.moe_layers) * 100 * twin.source.top_k
    )
    assert [stats.layer for stats in found.layers] == list(range(twin.source.layer_count))
    for stats in found.layers:
        expected = twin.layer(stats.layer)
        sinks = expected.pop("sink_mass")
        assert_alike({key: getattr(stats, key) for key in expected}, expected)
        assert stats.sink_mass == pytest.approx(sinks, rel=1e-3)


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_losses_equal_those_of_the_slow_twin(tiny_model: TinyModel, name: str) -> None:
    twin, found = Twin(tiny_model(name), TOKENS), profile(tiny_model(name))
    sensitivity = {stats.layer: stats.sensitivity for stats in found.layers}
    for stats in found.experts:
        if stats.expert == "shared":
            assert (stats.loss_gate_up, stats.loss_down) == ({}, {})
        elif stats.tokens and stats.expert in (0, 3):
            for bits in (2, 3, 4, 8):
                expected = twin.losses(stats.id, Grid(bits, 32, True))
                for part, loss in expected.items():
                    relative = stats.loss_of(part, bits) / sensitivity[stats.layer]  # type: ignore[arg-type]
                    same = pytest.approx(
                        loss, rel=0.3 if bits == 8 else 0.1
                    )  # of equal scales any one
                    assert relative == same, (part, bits)


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
def test_sensitivities_equal_those_of_the_slow_twin(tiny_model: TinyModel, name: str) -> None:
    """One layer's experts rounded in a plain model: what that does to the layer's output, and to
    the prediction."""
    twin, found = Twin(tiny_model(name), TOKENS), profile(tiny_model(name))
    grid = Grid(SENSITIVITY_BITS, 32, True)
    for at in twin.source.moe_layers:
        model = plain_model(tiny_model(name))
        outputs: list[Tensor] = []
        layer = model.model.layers[at]
        for identity in twin.source.experts:
            if identity.layer == at and isinstance(identity.expert, int):
                tokens = [twin.mlp[at][s][p] for s, p, _ in twin.visits(identity)]
                round_expert(layer.mlp.experts, identity.expert, tokens, grid)
        layer.register_forward_hook(
            lambda module, inputs, output, kept=outputs: kept.append(
                (output[0] if isinstance(output, tuple) else output)[0]
            )
        )
        with torch.no_grad():
            logits = [model(torch.tensor([row])).logits[0] for row in TOKENS]
        error = torch.cat(
            [
                ((new - old).norm(dim=1) / old.norm(dim=1)) ** 2
                for new, old in zip(outputs, twin.outputs[at], strict=True)
            ]
        ).mean()
        divergence = torch.cat(
            [
                (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
                for p, q in zip(twin.logits, logits, strict=True)
            ]
        ).mean()
        assert found.layers[at].sensitivity == pytest.approx(float(divergence / error), rel=0.02)
    dense = [s.sensitivity for s in found.layers if not s.moe]
    assert set(dense) <= {1.0}


@torch.no_grad()
def round_expert(experts: Any, expert: int, tokens: list[Tensor], grid: Grid) -> None:
    gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    inputs = torch.stack(tokens) if tokens else torch.zeros(1, gate_up.shape[1])
    gate, up = (inputs @ gate_up.T).chunk(2, dim=1)
    inner = nn.functional.silu(gate) * up
    for weight, seen in ((gate_up, inputs), (down, inner)):
        power = seen.square().mean(dim=0)
        weight.copy_(dequantize(rtn(weight[None], grid, power[None]))[0])


@pytest.mark.parametrize(
    ("many", "strongest", "counts", "least"),
    [
        ("LOSS_TOKENS", "LOSS_STRONGEST", (30, 10), 0.6),
        ("LOSS_ROWS", "LOSS_STRONGEST_ROWS", (32, 8), 0.7),
    ],
)
def test_losses_from_some_of_the_tokens_or_rows_stand_for_all(
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    many: str,
    strongest: str,
    counts: tuple[int, int],
    least: float,
) -> None:
    every = profile(tiny_model("mixtral"))
    monkeypatch.setattr(losses, many, counts[0])
    monkeypatch.setattr(losses, strongest, counts[1])
    some = profile(tiny_model("mixtral"))
    ratios = [
        some.by_id[stats.id].loss_of(part, bits) / stats.loss_of(part, bits)
        for stats in every.experts
        for part in PROJECTION_GROUPS
        for bits in (2, 4)
    ]
    assert all(least < ratio < 1 / least for ratio in ratios)
    assert median(ratios) == pytest.approx(1.0, abs=0.06)


def test_sink_rates_of_short_sequences(tiny_model: TinyModel) -> None:
    """Where the first position gets much attention, as nobody has much else to look at."""
    tokens = [row[:10] for row in TOKENS]
    twin, found = (
        Twin(tiny_model("deepseek_v3"), tokens),
        profile(tiny_model("deepseek_v3"), tokens),
    )
    rates = [stats.sink_rate for stats in found.layers]
    assert rates == [twin.layer(at)["sink_rate"] for at in range(3)]
    assert any(0 < rate < 1 for rate in rates)
    for stats in found.layers:
        assert stats.sink_mass == pytest.approx(twin.layer(stats.layer)["sink_mass"], rel=1e-3)


def test_the_peak_is_over_all_tokens_and_not_signed(tiny_model: TinyModel) -> None:
    """The published code reads one token per sequence, REAP the signed maximum."""
    twin, found = Twin(tiny_model("mixtral"), TOKENS), profile(tiny_model("mixtral"))
    first_only = signed = 0
    for stats in found.experts:
        visits = twin.visits(stats.id)
        outputs = [twin.output(stats.id, twin.mlp[stats.layer][s][p]) for s, p, _ in visits]
        first_of = dict(reversed([(s, o) for (s, *_), o in zip(visits, outputs, strict=True)]))
        first_only += max(float(o.abs().max()) for o in first_of.values()) < 0.999 * stats.peak
        signed += max(float(o.max()) for o in outputs) < 0.999 * stats.peak
    assert first_only > 0
    assert signed > 0


def test_an_expert_that_is_never_routed_is_in_the_profile(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_model("deepseek_v3"), tmp_path / "model")
    starve(path, 2, 4)
    stats = profile(path).by_id[ExpertId(2, 4)]
    assert (stats.peak, stats.weighted_peak, stats.tokens, stats.gate_mass) == (0, 0, 0, 0)
    assert (stats.channel, stats.position, stats.token_id) == (-1, -1, -1)
    assert stats.mean_output_norm == stats.saliency == 0


@pytest.mark.parametrize("batch_tokens", [1, 45])
def test_the_batch_size_does_not_matter(tiny_model: TinyModel, batch_tokens: int) -> None:
    found = [
        json.loads(
            to_json(profile(tiny_model("deepseek_v2"), options=RunOptions(batch_tokens=size)))
        )
        for size in (batch_tokens, 4096)
    ]
    # Hardly more than round-off is lost at 8 bits: that is where another scale shows most.
    assert_alike(flat(found[0]), flat(found[1]), loss=0.3)


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Every leaf of nested lists and mappings, by its path."""
    if isinstance(value, dict):
        return {
            k: v for name, item in value.items() for k, v in flat(item, f"{key}.{name}").items()
        }
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{key}.{i}").items()}
    return {key: value}


def test_the_same_from_run_to_run(planted: Path) -> None:
    first, second = (to_json(profile(planted, super_experts=WIDE)) for _ in range(2))
    assert first == second


# ---------------------------------------------------------------------------- planted super experts


@pytest.fixture(scope="module")
def planted(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with a super expert (1, 5). Beside it, expert (1, 2) is as loud but hardly counts, as
    its routing weight is tiny; so is (0, 3) in a layer that forms nothing; (2, 6) cancels."""
    path = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(tiny_model("qwen3_moe"), path)
    plant(path, 1, 5)
    plant(path, 1, 2, writes=MASSIVE + 1, weight=1e-5)
    plant(path, 0, 4, size=0)  # only takes the weight away from the next
    plant(path, 0, 3, writes=MASSIVE + 2, weight=1e-5)
    plant(path, 2, 6, reads=MASSIVE, size=-3300)
    return path


def test_a_planted_super_expert_is_found_and_confirmed(planted: Path) -> None:
    found = profile(planted, super_experts=WIDE)
    assert found.massive
    assert [s.id for s in found.super_experts] == ids((1, 2), (1, 5))
    real = found.super_experts[1]
    assert real.confirmed is True
    assert (real.position, real.token_id, real.channel) == (0, BOS, MASSIVE)
    assert real.peak > 1000
    assert real.zeroed is not None
    assert real.control is not None
    assert real.zeroed.rise_removed > 0.99
    assert real.zeroed.massive_activation < 0.1
    assert real.control.expert not in (2, 5)
    assert real.control.layer == 1
    assert real.control.rise_removed < 0.01
    assert real.control.massive_activation == pytest.approx(1, abs=0.01)
    assert [s.forming for s in found.layers] == [False, True, False]
    assert [s.cancelling for s in found.layers] == [False, False, True]
    assert found.layers[1].position == 0
    assert found.layers[1].channel == MASSIVE
    reasons = {o.id: o.reason for o in found.outliers}
    assert reasons[ExpertId(2, 6)] == "cancels"
    assert reasons[ExpertId(0, 3)] == "layer forms no massive activation"


def test_a_candidate_that_causes_nothing_is_not_confirmed(planted: Path) -> None:
    found = profile(planted, super_experts=WIDE)
    beside = found.super_experts[0]
    assert beside.confirmed is False
    assert beside.peak > 1000
    assert beside.zeroed is not None
    assert beside.zeroed.rise_removed < 0.01
    doubts = [note for note in found.notes if "not confirmed" in note]
    assert len(doubts) == 1
    assert doubts[0].startswith(
        "expert (1, 2) meets the criterion, but zeroing it takes away only 0%"
    )


def test_the_control_is_no_candidate(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("mixtral")))
    everyone = ids((1, 0), (1, 1), (1, 2), (1, 3))
    for left in everyone[1:]:
        candidates = [identity for identity in everyone if identity != left]
        arguments = (candidates, source, recipe(source.path))
        assert control_for(everyone[0], *arguments) == left
    assert control_for(everyone[0], everyone, source, recipe(source.path)) is None


def test_confirming_is_optional(planted: Path) -> None:
    found = profile(planted, super_experts={**WIDE, "confirm": False})
    assert [(s.confirmed, s.zeroed, s.control) for s in found.super_experts] == [(None,) * 3] * 2


def test_only_some_of_the_tokens_make_it(planted: Path) -> None:
    """Without BOS in front there is no massive activation, and therefore no super expert."""
    found = profile(planted, random_tokens(5, 20))
    assert not found.massive
    assert found.super_experts == ()
    assert found.notes[0].startswith("no massive activation: ")


@pytest.mark.parametrize(
    ("name", "where", "expected"),
    [
        ("mixtral", 2, ["(1, 2)"]),
        ("olmoe", 6, ["(1, 6)"]),
        ("deepseek_v2", 4, ["(1, 4)"]),
        ("qwen2_moe", "shared", ["(1, shared)"]),
        ("deepseek_v2", "shared", ["(1, shared)"]),
        ("deepseek_v3", "shared", ["(1, shared)"]),
    ],
)
def test_planted_in_every_family(
    tiny_model: TinyModel, tmp_path: Path, name: str, where: ExpertIndex, expected: list[str]
) -> None:
    path = shutil.copytree(tiny_model(name), tmp_path / "model")
    plant(path, 1, where)
    found = profile(path)
    assert [(str(s.id), s.position, s.confirmed) for s in found.super_experts] == [
        (identity, 0, True) for identity in expected
    ]
    assert found.super_experts[0].control is not None
    assert isinstance(found.super_experts[0].control.expert, int)


def test_planted_in_a_dense_layer(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model("deepseek_v3"), tmp_path / "model")
    plant(path, 0, None)
    found = profile(path)
    assert found.massive
    assert found.super_experts == ()
    assert [stats.forming for stats in found.layers] == [True, False, False]
    assert any("layer 0 forms" in note and "by its dense MLP" in note for note in found.notes)


def test_nothing_planted_nothing_found(tiny_model: TinyModel) -> None:
    found = profile(tiny_model("qwen3_moe"))
    assert not found.massive
    assert found.super_experts == ()
    assert {outlier.reason for outlier in found.outliers} == {"model has none"}
    assert found.threshold == max(found.percentile_value, found.fraction_value)
    peaks = [stats.peak for stats in found.experts]
    assert found.percentile_value == pytest.approx(float(np.percentile(peaks, 99.5)))
    assert found.fraction_value == pytest.approx(0.1 * max(peaks))


@pytest.mark.parametrize(("name", "where"), [("qwen3_moe", 5), ("deepseek_v2", "shared")])
def test_confirmation_equals_zeroing_in_the_plain_model(
    tiny_model: TinyModel, tmp_path: Path, name: str, where: ExpertIndex
) -> None:
    path = shutil.copytree(tiny_model(name), tmp_path / "model")
    plant(path, 1, where)
    candidate = profile(path, options=RunOptions(batch_tokens=45)).super_experts[0]
    before = Twin(path, TOKENS)
    for ablation in candidate.zeroed, candidate.control:
        assert ablation is not None
        zeroed = shutil.copytree(path, tmp_path / f"zeroed-{ablation.expert}")
        down = before.source.experts[ExpertId(1, ablation.expert)]["down"].name
        edit_weights(zeroed, {down: torch.zeros_like(before.weights[down])})
        assert_ablation(ablation, before, Twin(zeroed, TOKENS))


def assert_ablation(found: Ablation, before: Twin, after: Twin) -> None:
    rises = removed = 0.0
    for old, new, silent in zip(before.inputs[1], before.outputs[1], after.outputs[1], strict=True):
        rise = new.abs() - old.abs()
        at = np.unravel_index(int(rise.argmax()), rise.shape)
        rises += float(rise[at])
        removed += float(new[at].abs() - silent[at].abs())
    assert found.rise_removed == pytest.approx(removed / rises, abs=1e-4)
    peaks = [max(float(states.abs().max()) for states in layer) for layer in before.outputs]
    strongest = max(range(len(peaks)), key=lambda at: peaks[at])
    left = max(float(states.abs().max()) for states in after.outputs[strongest])
    assert found.massive_activation == pytest.approx(left / peaks[strongest], rel=1e-3)
    mass = [
        sum(float(a[at][:, 8:, 0].mean()) for a in twin.attention for at in (2,))
        for twin in (before, after)
    ]
    assert found.sink_mass == pytest.approx(mass[1] / mass[0], rel=1e-3)
    divergences = [
        float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())
        for p, q in zip(before.logits, after.logits, strict=True)
    ]
    assert found.kl_divergence == pytest.approx(float(np.mean(divergences)), rel=1e-2, abs=1e-6)


# ------------------------------------------------------------------------------------------- resume


class Stop(Exception):
    """What a kill looks like from the inside."""


def stop_at(stage: str, step: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if (name, done) == (stage, step):
            raise Stop

    return progress


@pytest.mark.parametrize(
    ("stage", "step", "again"),
    [
        ("profile", 0, 3 * [0, 1, 2]),
        ("profile", 1, [1, 2, *2 * [0, 1, 2]]),
        ("profile", 2, [2, *2 * [0, 1, 2]]),
        ("sensitivity", 1, 2 * [0, 1, 2]),
        ("confirm", 1, 2 * [0, 1, 2]),
    ],
)
def test_an_interrupted_profile_is_taken_up_again(
    planted: Path, tmp_path: Path, layer_watch: LayerWatch, stage: str, step: int, again: list[int]
) -> None:
    uninterrupted = to_json(profile(planted, super_experts=WIDE))
    with pytest.raises(Stop):
        profile(
            planted,
            super_experts=WIDE,
            options=RunOptions(work=tmp_path, progress=stop_at(stage, step)),
        )
    layer_watch.loaded.clear()
    assert (
        to_json(profile(planted, super_experts=WIDE, options=RunOptions(work=tmp_path)))
        == uninterrupted
    )
    assert layer_watch.loaded == again
    # Whoever saves the profile drops the states: before that, a kill would cost the whole profile.
    assert [file.name for file in tmp_path.glob("*.safetensors")] == [profiler.STATES_FILE]


def test_killed_between_a_record_and_its_states(
    planted: Path, tmp_path: Path, layer_watch: LayerWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = to_json(profile(planted, super_experts=WIDE))
    original = profiler.save_states

    def save_states(path: Path, at: int, streams: dict[str, list[Tensor]]) -> None:
        if at == 1:
            path.with_name(path.name + ".writing").write_bytes(b"half a file")
            raise Stop
        original(path, at, streams)

    with monkeypatch.context() as patch:
        patch.setattr(profiler, "save_states", save_states)
        with pytest.raises(Stop):
            profile(planted, super_experts=WIDE, options=RunOptions(work=tmp_path))
    layer_watch.loaded.clear()
    assert (
        to_json(profile(planted, super_experts=WIDE, options=RunOptions(work=tmp_path)))
        == uninterrupted
    )
    assert layer_watch.loaded == [1, 2, *2 * [0, 1, 2]]


def test_no_more_than_one_layer_is_in_memory(planted: Path, layer_watch: LayerWatch) -> None:
    assert profile(planted, super_experts=WIDE).super_experts[1].confirmed
    assert layer_watch.loaded == 3 * [0, 1, 2]
    assert layer_watch.most == 1


def test_progress_is_told_in_order(tiny_model: TinyModel) -> None:
    steps: list[tuple[str, int, int]] = []
    profile(tiny_model("olmoe"), options=RunOptions(progress=lambda *step: steps.append(step)))
    assert steps == [(stage, i, 3) for stage in ("profile", "sensitivity") for i in range(4)]


# ------------------------------------------------------------------------------------------- digest


def test_the_digest_covers_what_decides_the_profile(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("mixtral")))
    base = recipe(source.path)
    changed = [
        (source, TOKENS, base),
        (source, TOKENS[:-1], base),
        (replace(source, contents=lambda: "another"), TOKENS, base),
        (source, TOKENS, recipe(source.path, super_experts={"percentile": 99.0})),
        (source, TOKENS, recipe(source.path, quantization={"group_size": 32})),
        (source, TOKENS, recipe(source.path, compute_dtype="bfloat16")),
    ]
    digests = [profiler.profile_digest(*inputs) for inputs in changed]
    assert len(set(digests)) == len(digests)
    same = recipe(source.path, "elsewhere", policy={"bits": [2]})
    assert profiler.profile_digest(source, TOKENS, same) == digests[0]


def test_mean_outputs_are_compared_only_for_a_recipe_that_merges(tiny_model: TinyModel) -> None:
    path = tiny_model("mixtral")
    source = open_source(str(path))
    tokens = random_tokens(4, 24)
    plain = recipe(path)
    merging = recipe(path, policy={"merge": {"fraction": 0.5}})
    assert profiler.profile_digest(source, tokens, plain) != profiler.profile_digest(
        source, tokens, merging
    )
    assert not profile_experts(source, tokens, plain, RunOptions()).similarities
    found = profile_experts(source, tokens, merging, RunOptions()).similarities
    seen: list[Tensor] = []
    model = plain_model(path)
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.tensor(tokens))
    for layer, (inputs, similarity) in enumerate(zip(seen, found, strict=True)):
        experts, means = model.model.layers[layer].mlp.experts, []
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            gate, up = (inputs @ gate_up.T).chunk(2, dim=-1)
            means.append(((torch.nn.functional.silu(gate) * up) @ down.T).mean(dim=0))
        apart = [(means[i] - means[j]).norm().item() for i in range(4) for j in range(i + 1, 4)]
        assert similarity.layer == layer
        assert similarity.distances == pytest.approx(apart, rel=1e-3)
