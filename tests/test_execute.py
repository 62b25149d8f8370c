"""Every tensor of the plan is written, what is kept is kept byte for byte, and every number of a
record equals that of a slow twin: plain models whose experts are replaced layer by layer."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
    build,
    edit_weights,
    fragile,
    plain_model,
    random_tokens,
    recipe,
    starve,
)
from torch import Tensor, nn

from se_compress.artifacts import (
    ROLES,
    CompressionPlan,
    ExpertDecision,
    ExpertId,
    ExpertRecord,
    LayerRecord,
    ModelSource,
    OtherDecision,
    RunOptions,
    TensorInfo,
)
from se_compress.compression import execute, experts, stacks
from se_compress.compression.early_warning import SINK_COLLAPSE, Side, early_warning
from se_compress.compression.execute import compress
from se_compress.engines.blueprint import Blueprint, draw_blueprint
from se_compress.errors import SourceError
from se_compress.model.checkpoint import open_result, reserve
from se_compress.model.states import States
from se_compress.opening.headers import lay_out, read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.quant.grid import Grid, dequantize
from se_compress.recipe import Recipe

TinyModel = Callable[[str], Path]

TOKENS = random_tokens(12, 20)
PROTECTED = 1  # this expert of the first expert layer


@dataclass(frozen=True)
class Made:
    """One compressed checkpoint and everything that went into it."""

    source: ModelSource
    plan: CompressionPlan
    recipe: Recipe
    layout: Mapping[str, TensorInfo]
    directory: Path
    records: tuple[LayerRecord, ...]

    @property
    def experts(self) -> list[ExpertRecord]:
        return [expert for record in self.records for expert in record.experts]

    @property
    def files(self) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in sorted(self.directory.iterdir()) if f.is_file()}

    @property
    def blueprint(self) -> Blueprint:
        return draw_blueprint(self.source, self.plan)

    def stored(self, name: str) -> Tensor:
        """A tensor of the result by its name in the source, as the safetensors library reads it."""
        return self.tensors[self.blueprint.names[name]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {n: t for f in self.directory.glob("*.safetensors") for n, t in load_file(f).items()}

    def dequantised(self, info: TensorInfo) -> Tensor:
        """(code - zero) x scale, from the bits of the packed tensors, a column at a time."""
        planned, tensors = self.blueprint.tensors[info.name], self.tensors
        stem, bits = planned.module, planned.bits
        codes = unpacked(tensors[f"{stem}.qweight"].T, bits)
        zeros = unpacked(tensors[f"{stem}.qzeros"], bits).T + 1
        scales, group = tensors[f"{stem}.scales"].float().T, tensors[f"{stem}.g_idx"].tolist()
        weight = torch.empty(info.shape)
        for column, at in enumerate(group):
            steps = torch.from_numpy(codes[:, column] - zeros[:, at])
            weight[:, column] = steps.float() * scales[:, at]
        return weight


def with_others(plan: CompressionPlan, source: ModelSource, bits: int) -> CompressionPlan:
    """The plan with everything else quantised that can be packed in groups of 32."""
    fitting = [
        info
        for info in source.tensors.values()
        if len(info.shape) == 2 and not any(size % 32 for size in info.shape)
    ]
    others = [
        i.name for i in fitting if i.kind in ("attention", "dense_mlp") and i.layer is not None
    ]
    experts = [
        replace(d, action="quantize", bits=bits) if d.expert == "shared" else d
        for d in plan.experts
    ]
    decisions = tuple(OtherDecision(name, bits, "a test") for name in others)
    return replace(plan, experts=tuple(experts), others=decisions)


def unpacked(words: Tensor, bits: int) -> np.ndarray:
    """Rows of int32 words as rows of codes: a little-endian string of bits, `bits` to a code."""
    octets = np.ascontiguousarray(words.numpy()).view(np.uint8)
    string = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return (string.astype(np.int64) << np.arange(bits)).sum(axis=2)


def run(
    path: Path,
    directory: Path,
    method: str = "gptq",
    *,
    work: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    notice: Callable[[str], None] = lambda sentence: None,
    fill: int = 0,
    widths: Mapping[int, int | tuple[int, int]] | None = None,
    shard_bytes: int = 150_000,
    routing: str = "routed",
    others: int = 16,
    **quantization: Any,
) -> Made:
    """Compress into `directory`. `fill` is what every byte of the data holds beforehand; `widths`
    maps experts (of any layer) to other widths than 4: of all, or of gate and up and of down;
    `others` is the width of attention, dense MLPs and shared experts."""
    source = open_source(str(path))
    protect = {"layer": source.moe_layers[0], "expert": PROTECTED}
    settings = recipe(
        path,
        target="transformers" if method == "none" else "gptqmodel",
        policy={"bits": [4], "protect": [protect]},
        quantization={"method": method, "group_size": 32},
        calibration={"data": "unused.txt", "routing": routing},
    )
    plan = make_plan(source, None, settings)
    plan = replace(plan, experts=tuple(widened(d, widths or {}) for d in plan.experts))
    if others != 16:
        plan = with_others(plan, source, others)
    quantized = settings.quantization.model_copy(update=quantization)
    update = {"quantization": quantized, "shard_size": shard_bytes}
    settings = settings.model_copy(update=update)
    if fill:
        slots = draw_blueprint(source, plan).slots.values()
        overwrite_data(lay_out(slots, directory, shard_bytes), fill)
    options = RunOptions(work=work, progress=progress, notice=notice)
    records = compress(source, plan, TOKENS, settings, directory, options).layers
    return Made(source, plan, settings, read_headers(directory), directory, records)


def widened(
    decision: ExpertDecision, widths: Mapping[int, int | tuple[int, int]]
) -> ExpertDecision:
    if decision.action == "keep" or not isinstance(decision.expert, int):
        return decision
    width = widths.get(decision.expert, decision.bits)
    bits, down = width if isinstance(width, tuple) else (width, None)
    return replace(decision, bits=bits, down_bits=down)


def overwrite_data(layout: Mapping[str, TensorInfo], fill: int) -> None:
    reserve(layout)
    for info in layout.values():
        with open(info.file, "r+b") as stream:
            stream.seek(info.begin)
            stream.write(bytes([fill]) * info.size_bytes)


@pytest.fixture(
    scope="module", params=[(name, method) for name in CONFIGS for method in ("gptq", "rtn")]
)
def made(
    request: pytest.FixtureRequest,
    tiny_model: TinyModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    name, method = request.param
    return run(tiny_model(name), tmp_path_factory.mktemp(name) / "result", method)


# -------------------------------------------------------------------------------- what is written


def test_every_byte_of_the_layout_is_written(made: Made, tmp_path: Path) -> None:
    method = made.recipe.quantization.method
    other = run(made.source.path, tmp_path / "result", method, fill=0xA5)
    assert made.files == other.files
    assert len(made.files) > 2


def test_the_tensors_are_those_of_the_plan(made: Made) -> None:
    slots = made.blueprint.slots
    assert set(made.tensors) == set(slots)
    for name, tensor in made.tensors.items():
        assert tuple(tensor.shape) == slots[name].shape
    packed = sum(name.endswith(".qweight") for name in slots)
    count = made.source.expert_count * len(made.source.moe_layers)
    assert packed == 3 * (count - 1)  # all but the protected one


def test_what_is_kept_is_kept_byte_for_byte(made: Made) -> None:
    kept = [t.info for t in made.blueprint.tensors.values() if t.making == "copied"]
    assert {i.kind for i in kept} >= {"attention", "norm", "router", "embedding", "expert"}
    for info in kept:
        assert raw(info) == raw(made.layout[made.blueprint.names[info.name]])
    protected = ExpertId(made.source.moe_layers[0], PROTECTED)
    assert all(info in kept for info in made.source.experts[protected].values())


def raw(info: TensorInfo) -> bytes:
    return Path(info.file).read_bytes()[info.begin : info.end]


def test_the_result_is_read_as_an_independent_dequantisation_reads_it(made: Made) -> None:
    found, blueprint = read_headers(made.directory), made.blueprint
    read = open_result(found, made.source.tensors, made.plan.scheme, blueprint.names)
    original = load_file(made.source.path / "model.safetensors")
    for info in made.source.tensors.values():
        weight = original[info.name].float()
        if blueprint.tensors[info.name].making == "copied":
            assert torch.equal(read(info.name).float(), weight)
            continue
        expected = made.dequantised(info)
        assert torch.equal(read(info.name), expected)
        distance = float((expected - weight).norm() / weight.norm())
        assert 0.01 < distance < 0.25  # four bits, and every row and column in its place


# ----------------------------------------------------------------------------------- the slow twin


class Twin:
    """Two plain models: the source, and one whose experts become those of the result."""

    def __init__(self, made: Made) -> None:
        self.made = made
        self.source, self.result = (plain_model(made.source.path) for _ in range(2))

    def layer_outputs(self, model: Any, at: int) -> Tensor:
        kept: list[Tensor] = []
        hook = model.model.layers[at].register_forward_hook(
            lambda module, inputs, output: kept.append(output)
        )
        self._forward(model)
        hook.remove()
        return kept[0].flatten(0, 1)

    def routed(self, at: int) -> tuple[Tensor, Tensor]:
        """Input [N, H] of the compressed model's experts and the experts chosen [N, k]."""
        kept: list[tuple[Tensor, Tensor]] = []
        experts = self.result.model.layers[at].mlp.experts
        hook = experts.register_forward_pre_hook(
            lambda module, inputs: kept.append((inputs[0], inputs[1]))
        )
        self._forward(self.result)
        hook.remove()
        return kept[0]

    def _forward(self, model: Any) -> None:
        with torch.no_grad():
            model(torch.tensor(TOKENS))

    def weights(self, identity: ExpertId) -> tuple[Tensor, Tensor]:
        """gate and up [2I, H], down [H, I] of the source, by the roles of the checkpoint."""
        original = load_file(self.made.source.path / "model.safetensors")
        roles = self.made.source.experts[identity]
        gate, up, down = (original[roles[r].name].float() for r in ROLES)
        return torch.cat([gate, up]), down

    def replace_layer(self, at: int) -> None:
        """Let the second model have the result's experts in this layer."""
        experts = self.result.model.layers[at].mlp.experts
        with torch.no_grad():
            for identity in self.made.source.experts:
                if identity.layer == at and isinstance(identity.expert, int):
                    gate_up, down = self.rounded(identity)
                    experts.gate_up_proj[identity.expert] = gate_up
                    experts.down_proj[identity.expert] = down

    def rounded(self, identity: ExpertId) -> tuple[Tensor, Tensor]:
        gate_up, down = self.weights(identity)
        roles, decision = self.made.source.experts[identity], self.made.plan.by_id[identity]
        if decision.bits != 16:
            gate_up = torch.cat([self.made.dequantised(roles[r]) for r in ("gate", "up")])
        if decision.bits_of("down") != 16:
            down = self.made.dequantised(roles["down"])
        return gate_up, down


def hessian(own: Tensor, everyone: Tensor, enough: float = 1.0) -> tuple[Tensor, float]:
    """Mean of outer products, token by token; where there are fewer tokens than `enough` times the
    columns, the missing share comes from everyone's tokens."""
    share = max(0.0, 1 - len(own) / (enough * own.shape[1]))
    total = torch.zeros(own.shape[1], own.shape[1], dtype=torch.float64)
    for token in own.double():
        total += (1 - share) / len(own) * torch.outer(token, token)
    for token in everyone.double() if share else ():
        total += share / len(everyone) * torch.outer(token, token)
    return total, share


def relative_error(weight: Tensor, rounded: Tensor, second_moment: Tensor) -> float:
    change, whole = (rounded - weight).double(), weight.double()
    lost = torch.trace(change @ second_moment @ change.T)
    return float((lost / torch.trace(whole @ second_moment @ whole.T)).sqrt())


def test_records_equal_those_of_the_slow_twin(made: Made) -> None:
    assert_records(made)


def assert_records(made: Made) -> None:
    twin = Twin(made)
    recorded = {record.id: record for record in made.experts}
    quantized = {d.id for d in made.plan.experts if d.action == "quantize"}
    assert set(recorded) == quantized
    for at, record in enumerate(made.records):
        assert record.layer == at
        if at in made.source.moe_layers:
            hidden, chosen = twin.routed(at)
            for identity in quantized:
                if identity.layer == at:
                    assert_record(twin, recorded[identity], hidden, chosen)
            twin.replace_layer(at)
        result, source = (twin.layer_outputs(m, at) for m in (twin.result, twin.source))
        ratios = [
            float((new - old).norm() / old.norm()) for new, old in zip(result, source, strict=True)
        ]
        assert record.hidden_error == pytest.approx(float(np.mean(ratios)), rel=1e-3, abs=1e-6)
    assert made.records[-1].hidden_error > 0.01


def assert_record(twin: Twin, record: ExpertRecord, hidden: Tensor, chosen: Tensor) -> None:
    own = hidden[(chosen == record.expert).any(dim=1)]
    (gate_up, down), (new_gate_up, new_down) = twin.weights(record.id), twin.rounded(record.id)
    enough = twin.made.recipe.quantization.shrinkage
    second_moment, share = hessian(own, hidden, enough)
    inner, all_inner = swiglu(own, new_gate_up), swiglu(hidden, new_gate_up)
    inner_moment, inner_share = hessian(inner, all_inner, enough)
    assert record.tokens == len(own)
    assert record.prior_share == pytest.approx(max(share, inner_share))
    assert record.error_gate_up == pytest.approx(
        relative_error(gate_up, new_gate_up, second_moment), rel=5e-3
    )
    assert record.error_down == pytest.approx(
        relative_error(down, new_down, inner_moment), rel=5e-3
    )
    assert record.fallback == ""
    decision = twin.made.plan.by_id[record.id]
    assert (record.bits, record.down_bits) == (decision.bits, decision.down_bits)
    gptq = twin.made.recipe.quantization.method == "gptq"
    assert (record.damping >= 0.01) if gptq else (record.damping == 0)


def swiglu(hidden: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (hidden @ gate_up.T).chunk(2, dim=1)
    return nn.functional.silu(gate) * up


def test_gptq_loses_less_than_rounding(tiny_model: TinyModel, tmp_path: Path) -> None:
    lost = {
        method: [
            (r.error_gate_up, r.error_down)
            for r in run(tiny_model("qwen3_moe"), tmp_path / method, method).experts
            if r.layer == 0  # behind it, the two see different inputs
        ]
        for method in ("gptq", "rtn")
    }
    for ours, theirs in zip(lost["gptq"], lost["rtn"], strict=True):
        assert ours[0] < theirs[0]
    assert sum(o[1] for o in lost["gptq"]) < sum(t[1] for t in lost["rtn"])


def test_several_widths_in_one_layer(tiny_model: TinyModel, tmp_path: Path) -> None:
    widths = {0: 2, 2: 3, 3: 8}
    made = run(tiny_model("olmoe"), tmp_path / "result", "gptq", widths=widths, symmetric=False)
    original = load_file(made.source.path / "model.safetensors")
    distances: dict[int, list[float]] = {}
    for record in made.experts:
        assert record.bits == widths.get(int(record.expert), 4)
        info = made.source.experts[record.id]["gate"]
        weight = original[info.name].float()
        distance = float((made.dequantised(info) - weight).norm() / weight.norm())
        distances.setdefault(record.bits, []).append(distance)
    means = [float(np.mean(distances[bits])) for bits in (2, 3, 4, 8)]
    assert means == sorted(means, reverse=True)
    assert means[0] < 0.6
    assert means[3] < 0.01


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_gate_and_up_of_another_width_than_down(
    tiny_model: TinyModel, tmp_path: Path, method: str
) -> None:
    """Each part has its own width, also that of the source, and down is calibrated on what the
    quantised gate and up let through: all as the slow twin has it."""
    pairs = {0: (2, 8), 1: (8, 3), 2: (16, 4), 3: (3, 16)}
    made = run(tiny_model("qwen3_moe"), tmp_path / "result", method, widths=pairs)
    assert set(made.tensors) == {info.name for info in made.layout.values()}
    for info in made.source.tensors.values():
        if info.expert in pairs and info.layer != made.source.moe_layers[0]:
            gate_up, down = pairs[int(info.expert or 0)]
            planned = made.blueprint.tensors[info.name]
            assert planned.bits == (down if info.role == "down" else gate_up)
    by_expert = {record.id: record for record in made.experts}
    kept = by_expert[ExpertId(1, 2)], by_expert[ExpertId(1, 3)]
    assert (kept[0].bits, kept[0].down_bits, kept[0].error_gate_up) == (16, 4, 0.0)
    assert (kept[1].bits, kept[1].down_bits, kept[1].error_down) == (3, 16, 0.0)
    assert_records(made)


def test_an_expert_that_cannot_be_factorised_is_recovered_alone(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = stacks.gptq, []

    def with_a_bad_member(weight: Tensor, hessian: Tensor, *rest: Any, **options: Any) -> Any:
        if not calls:  # gate and up of the first layer; the second member is expert 2
            size = hessian.shape[1]
            hessian[1] = torch.ones(size, size).mul(-9).fill_diagonal_(1)
        calls.append(weight.shape)
        return plain(weight, hessian, *rest, **options)

    good = run(tiny_model("mixtral"), tmp_path / "good")
    monkeypatch.setattr(stacks, "gptq", with_a_bad_member)
    made = run(tiny_model("mixtral"), tmp_path / "result")
    first = {e.expert: e for e in made.records[0].experts}
    assert {e: r.fallback for e, r in first.items()} == {0: "", 2: stacks.NOT_FACTORED, 3: ""}
    assert first[2].damping == 1.0
    for expert in 0, 3:
        for role in ROLES:
            name = made.source.experts[ExpertId(0, expert)][role].name
            part = f"{made.blueprint.tensors[name].module}.qweight"
            assert torch.equal(made.tensors[part], good.tensors[part])
    assert all(not e.fallback for record in made.records[1:] for e in record.experts)


def test_the_size_of_blocks_matters_to_no_expert(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = run(tiny_model("mixtral"), tmp_path / "together")
    monkeypatch.setattr(experts, "BLOCK_ELEMENTS", {"cpu": 1, "cuda": 1})
    alone = run(tiny_model("mixtral"), tmp_path / "alone")
    assert [e.id for e in alone.experts] == [e.id for e in together.experts]
    for name, tensor in together.tensors.items():
        same = (alone.tensors[name] == tensor).float().mean() if tensor.numel() else 1.0
        assert same > 0.99, name  # sums in another order may tip a rounding


# ---------------------------------------------------- attention, dense MLPs and shared experts


@pytest.fixture(
    scope="module",
    params=[*((name, "gptq") for name in CONFIGS), ("qwen2_moe", "rtn")],
    ids="-".join,
)
def all_made(
    request: pytest.FixtureRequest,
    tiny_model: TinyModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """Everything quantised that can be packed."""
    name, method = request.param
    return run(tiny_model(name), tmp_path_factory.mktemp(name) / "result", method, others=4)


def inputs_of(model: Any, at: int, paths: Sequence[str]) -> dict[str, Tensor]:
    """What linears of a layer of the plain model see, [N, C]."""
    kept: dict[str, Tensor] = {}
    hooks = [
        model.model.layers[at]
        .get_submodule(path)
        .register_forward_pre_hook(
            lambda module, inputs, path=path: kept.update({path: inputs[0].flatten(0, -2)})
        )
        for path in paths
    ]
    with torch.no_grad():
        model(torch.tensor(TOKENS))
    for hook in hooks:
        hook.remove()
    return kept


def replace_linears(twin: Twin, at: int, infos: Mapping[str, TensorInfo]) -> dict[str, float]:
    """Give linears of the second model, by their paths, the result's weights; returns the relative
    errors of their outputs."""
    seen = inputs_of(twin.result, at, list(infos))
    errors = {}
    for path, info in infos.items():
        linear = twin.result.model.layers[at].get_submodule(path)
        moment, _ = hessian(seen[path], seen[path])
        rounded = twin.made.dequantised(info)
        errors[info.name] = relative_error(linear.weight.detach(), rounded, moment)
        with torch.no_grad():
            linear.weight.copy_(rounded)
    return errors


def test_other_linears_equal_those_of_the_slow_twin(all_made: Made) -> None:
    """Attention first; experts and MLPs see what the quantised attention lets through, and down
    what the quantised gate and up do."""
    made, twin = all_made, Twin(all_made)
    quantized = [tensor.info for tensor in made.blueprint.packed()]
    checked = 0
    for at, record in enumerate(made.records):
        stages: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
        for info in quantized:
            if info.layer == at and info.kind != "expert":
                path = info.name.removeprefix(f"model.layers.{at}.").removesuffix(".weight")
                stages.setdefault((info.kind, "down" in path), {})[path] = info
        errors = replace_linears(twin, at, stages.pop(("attention", False)))
        if at in made.source.moe_layers:
            hidden, chosen = twin.routed(at)
            for expert in record.experts:
                if expert.expert != "shared":
                    assert_record(twin, expert, hidden, chosen)
            twin.replace_layer(at)
        for key in sorted(stages):  # gate and up, then down
            errors |= replace_linears(twin, at, stages[key])
        for linear in record.linears:
            assert linear.error == pytest.approx(errors.pop(linear.name), rel=5e-3)
            assert (linear.bits, linear.tokens, linear.fallback) == (4, 240, "")
            checked += 1
        assert_shared(made, record, errors)
        result, source = (twin.layer_outputs(m, at) for m in (twin.result, twin.source))
        away = (result - source).norm(dim=1) / source.norm(dim=1)
        assert record.hidden_error == pytest.approx(float(away.mean()), rel=2e-3, abs=1e-6)
    assert checked == len(made.plan.others) > 3


def assert_shared(made: Made, record: LayerRecord, errors: Mapping[str, float]) -> None:
    """The errors that are left are those of the shared expert, gate and up together."""
    shared = [expert for expert in record.experts if expert.expert == "shared"]
    assert len(shared) == bool(errors)
    for expert in shared:
        gate, up, down = (errors[made.source.experts[expert.id][role].name] for role in ROLES)
        low, high = sorted((gate, up))
        assert low * 0.999 <= expert.error_gate_up <= high * 1.001
        assert expert.error_down == pytest.approx(down, rel=5e-3)
        assert (expert.bits, expert.tokens, expert.prior_share) == (4, 240, 0.0)


def test_every_other_linear_is_written(all_made: Made) -> None:
    assert set(all_made.tensors) == all_made.blueprint.slots.keys()
    original = load_file(all_made.source.path / "model.safetensors")
    for decision in all_made.plan.others:
        weight = original[decision.name].float()
        found = all_made.dequantised(all_made.source.tensors[decision.name])
        assert 0.01 < float((found - weight).norm() / weight.norm()) < 0.25


def test_what_sees_the_same_shares_a_hessian(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    plain = stacks.gptq

    def watched(weight: Tensor, hessian: Tensor, *rest: Any, **options: Any) -> Any:
        shapes.append((*weight.shape[:2], len(hessian)))
        return plain(weight, hessian, *rest, **options)

    monkeypatch.setattr(stacks, "gptq", watched)
    run(tiny_model("qwen2_moe"), tmp_path / "result", others=4, routing="all")
    dense = [(1, 128, 1), (1, 64, 1), (1, 192, 1), (1, 64, 1)]  # q k v | o | gate up | down
    # q k v | o | shared gate up | down | routed gate up, all see the same | down
    moe = [(1, 128, 1), (1, 64, 1), (1, 128, 1), (1, 64, 1), (7, 64, 1), (7, 64, 7)]
    assert shapes[:10] == dense + moe


# ------------------------------------------------------------------ calibration.routing: all


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_with_routing_all_every_expert_sees_every_token(
    tiny_model: TinyModel, tmp_path: Path, name: str, method: str
) -> None:
    made = run(tiny_model(name), tmp_path / "result", method, routing="all")
    twin = Twin(made)
    for at, record in enumerate(made.records):
        if record.experts:
            hidden, chosen = twin.routed(at)
            for expert in record.experts:
                everyone = torch.full_like(chosen, int(expert.expert))
                assert_record(twin, expert, hidden, everyone)
                assert (expert.tokens, expert.prior_share) == (240, 0.0)
            twin.replace_layer(at)
    routed = run(tiny_model(name), tmp_path / "routed", method)
    assert routed.files != made.files


def test_one_factorisation_for_all_gates_is_exact(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The codes are those of a solver that is given the layer's Hessian once per expert."""
    made = run(tiny_model("qwen3_moe"), tmp_path / "result", routing="all")
    twin, identity = Twin(made), ExpertId(0, 3)
    hidden, _ = twin.routed(0)
    weight, _ = twin.weights(identity)
    moment = hidden.T @ hidden / len(hidden)
    alone = stacks.gptq(weight[None], moment[None], Grid(4, 32, symmetric=True))
    found = twin.rounded(identity)[0]
    assert torch.isclose(dequantize(alone.stack)[0], found, atol=1e-6).float().mean() > 0.98


# ---------------------------------------------------------------------------- rarely hit experts


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_an_expert_that_saw_nothing_is_shrunk_and_reported(
    tiny_model: TinyModel, tmp_path: Path, name: str, method: str
) -> None:
    path = shutil.copytree(tiny_model(name), tmp_path / "model")
    starve(path, 1, 3)
    made = run(path, tmp_path / "result", method)
    by_id = {record.id: record for record in made.experts}
    rare = by_id[ExpertId(1, 3)]
    assert (rare.tokens, rare.prior_share, rare.fallback) == (0, 1.0, "")
    assert 0 < rare.error_gate_up < 0.5
    assert 0 < rare.error_down < 0.5
    assert sum(r.tokens for r in made.experts if r.layer == 1) > 100  # the others had them
    original = load_file(path / "model.safetensors")
    for info in made.source.experts[rare.id].values():
        weight, found = original[info.name].float(), made.dequantised(info)
        assert float((found - weight).norm() / weight.norm()) < 0.25


def test_shares_follow_the_number_of_tokens(made: Made) -> None:
    for record in made.experts:
        assert record.prior_share == pytest.approx(max(0.0, 1 - record.tokens / 64))
    shares = [record.prior_share for record in made.experts]
    assert all(0 <= share <= 1 for share in shares)


def test_shrinkage_says_how_many_tokens_are_enough(tiny_model: TinyModel, tmp_path: Path) -> None:
    made = run(tiny_model("olmoe"), tmp_path / "result", shrinkage=3.0)
    twin = Twin(made)
    for at, record in enumerate(made.records):
        hidden, chosen = twin.routed(at)
        for expert in record.experts:
            assert expert.prior_share == pytest.approx(max(0.0, 1 - expert.tokens / (3 * 64)))
            assert_record(twin, expert, hidden, chosen)
        twin.replace_layer(at)
    assert any(64 < expert.tokens < 3 * 64 for expert in made.experts)


def test_without_shrinkage_only_an_unused_expert_borrows(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "model")
    starve(path, 1, 3)
    made = run(path, tmp_path / "result", shrinkage=0.0)
    unused = {e.id for e in made.experts if not e.tokens}
    assert ExpertId(1, 3) in unused
    assert {e.id: e.prior_share for e in made.experts if e.prior_share} == dict.fromkeys(
        unused, 1.0
    )
    assert any(0 < expert.tokens < 64 for expert in made.experts)
    assert all(expert.fallback == "" for expert in made.experts)


def test_some_experts_need_no_shrinkage_and_some_do(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Else the test above would say little."""
    made = run(tiny_model("deepseek_v3"), tmp_path / "result", "rtn")
    shares = [record.prior_share for record in made.experts]
    assert 0.0 in shares
    assert any(0 < share < 1 for share in shares)


# --------------------------------------------------------------------------------- nothing to do


def test_without_quantisation_everything_is_copied(
    tiny_model: TinyModel, tmp_path: Path, layer_watch: LayerWatch
) -> None:
    made = run(tiny_model("deepseek_v2"), tmp_path / "result", "none", fill=0xA5)
    assert layer_watch.loaded == []
    assert [record.layer for record in made.records] == [0, 1, 2]
    assert made.experts == []
    original = load_file(made.source.path / "model.safetensors")
    assert set(made.tensors) == set(original)
    for name, tensor in original.items():
        assert made.tensors[name].dtype == tensor.dtype
        assert torch.equal(made.tensors[name], tensor)


def test_layers_behind_the_decoder_are_copied(tiny_model: TinyModel, tmp_path: Path) -> None:
    made = run(tiny_model("deepseek_v3-next-token"), tmp_path / "result", "rtn")
    original = load_file(made.source.path / "model.safetensors")
    behind = [name for name in original if ".layers.3." in name]
    assert len(behind) > 20
    assert all(torch.equal(made.stored(name), original[name]) for name in behind)


# ------------------------------------------------------------------------------------ early warning


@pytest.fixture
def fragile_model(tiny_model: TinyModel, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3_moe"), path)
    fragile(path, 1, 5)
    return path


def compress_fragile(path: Path, directory: Path, work: Path | None = None, **changes: Any) -> Any:
    source = open_source(str(path))
    settings = recipe(
        path,
        target="gptqmodel",
        policy={"bits": [2], "protect": changes.pop("protect", "none")},
        quantization={"method": "rtn", "group_size": 32, "scales": changes.pop("scales", "minmax")},
        validation={"data": "unused.txt", **changes},
    )
    plan = make_plan(source, None, settings)
    tokens = [[BOS, *row] for row in TOKENS]
    return compress(source, plan, tokens, settings, directory, RunOptions(work=work)).layers


def test_a_lost_massive_activation_stops_the_run_at_its_layer(
    fragile_model: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    records = compress_fragile(fragile_model, tmp_path / "broken", work)
    assert [record.layer for record in records] == [0, 1], "not on to layer 2"
    assert records[0].failed is None
    failed = records[1].failed
    assert failed is not None
    assert (failed.name, failed.limit, failed.passed) == ("massive_activation_ratio", 0.75, False)
    assert failed.value == pytest.approx(0, abs=1e-3)
    wrote = r"expert \(1, 5\) wrote \d{4}\.\d there, and now -?\d{1,2}\.\d"
    where = f"after layer 1 on calibration text, position 0, channel {MASSIVE}; "
    assert re.fullmatch(re.escape(where) + wrote, failed.detail)
    assert len(records[1].experts) == 8, "everything is kept for inspection"
    assert compress_fragile(fragile_model, tmp_path / "broken", work) == records, (
        "and found there again"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"early_stop": False},
        {"massive_activation_ratio": 0.0},
        {"scales": "activation"},
        {"protect": [{"layer": 1, "expert": 5}]},
    ],
    ids=str,
)
def test_a_run_goes_on_if_told_to_or_if_the_massive_activation_is_kept(
    fragile_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    records = compress_fragile(fragile_model, tmp_path / "whole", **changes)
    assert [record.layer for record in records] == [0, 1, 2]
    assert not any(record.failed for record in records)


@pytest.mark.parametrize(
    ("after", "passed"), [([0.9, 0.7], True), ([0.3, 0.2], False), ([0.9, float("nan")], False)]
)
def test_collapsed_sinks_stop_the_run_as_well(after: list[float], passed: bool) -> None:
    states = [States(torch.ones(2, 3).long(), torch.ones(2, 3, 4))]  # nothing massive
    source, result = (
        Side(None, states, states, torch.tensor(sinks), lambda: None)  # type: ignore[arg-type]
        for sinks in ([0.8, 0.6], after)
    )
    failed = early_warning(7, source, result, recipe("model").validation)
    assert (failed is None) is passed
    if failed is not None:
        assert (failed.name, failed.limit) == ("sink_decay", SINK_COLLAPSE)
        assert failed.detail == "after layer 7 on calibration text"


# ------------------------------------------------------------------------------------------- resume


class Stop(Exception):
    """What a kill looks like from the inside."""


def stop_at(step: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("compress", step):
            raise Stop

    return progress


def timeless(records: Sequence[LayerRecord]) -> list[LayerRecord]:
    return [replace(record, seconds=0.0) for record in records]


@pytest.mark.parametrize(
    ("name", "step"),
    [("mixtral", 0), ("mixtral", 1), ("mixtral", 2), ("deepseek_v2", 1), ("deepseek_v2", 2)],
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path, layer_watch: LayerWatch, name: str, step: int
) -> None:
    """deepseek_v2 begins with a dense layer, behind which both streams are still the same."""
    whole = run(tiny_model(name), tmp_path / "whole")
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(Stop):
        run(tiny_model(name), tmp_path / "parts", work=work, progress=stop_at(step))
    layer_watch.loaded.clear()
    parts = run(tiny_model(name), tmp_path / "parts", work=work)
    assert parts.files == whole.files
    assert timeless(parts.records) == timeless(whole.records)
    assert layer_watch.loaded == list(range(step, 3))
    layer_watch.loaded.clear()
    again = run(tiny_model(name), tmp_path / "parts", work=work)
    assert again.files == whole.files
    assert timeless(again.records) == timeless(whole.records)
    assert layer_watch.loaded == []


@pytest.mark.parametrize("function", ["write_tensors", "copy_tensor", "save_states"])
def test_killed_in_the_middle_of_a_layer(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    whole = run(tiny_model("qwen2_moe"), tmp_path / "whole", work=None)
    work = tmp_path / "work"
    work.mkdir()
    original, calls = getattr(execute, function), []

    def killed(*arguments: Any) -> None:
        calls.append(arguments)
        layer_of = {"write_tensors": 2, "copy_tensor": 25, "save_states": 2}[function]
        if len(calls) < layer_of:
            original(*arguments)
        elif function == "write_tensors":  # half of it
            layout, tensors = arguments
            original(layout, dict(list(tensors.items())[: len(tensors) // 2]))
            raise Stop
        else:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(execute, function, killed)
        with pytest.raises(Stop):
            run(tiny_model("qwen2_moe"), tmp_path / "parts", work=work)
    parts = run(tiny_model("qwen2_moe"), tmp_path / "parts", work=work)
    assert parts.files == whole.files
    assert timeless(parts.records) == timeless(whole.records)


def test_progress_is_told_in_order(tiny_model: TinyModel, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    path = tiny_model("qwen2_moe")
    run(path, tmp_path / "result", "rtn", progress=lambda *step: steps.append(step))
    assert steps == [("compress", i, 3) for i in range(4)]


def test_no_more_than_one_layer_is_in_memory(tmp_path: Path, layer_watch: LayerWatch) -> None:
    path = build(tmp_path / "model", "deepseek_v2", num_hidden_layers=6)
    run(path, tmp_path / "result")
    assert layer_watch.loaded == list(range(6))
    assert layer_watch.most == 1


def test_a_bad_weight_is_named_when_its_layer_comes(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model("mixtral"), tmp_path / "model")
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    weight = load_file(path / "model.safetensors")[name].clone()
    weight[5, 7] = float("nan")
    edit_weights(path, {name: weight})
    with pytest.raises(SourceError, match=rf"^{name}: 1 of {weight.numel()} values are NaN"):
        run(path, tmp_path / "result", "rtn")
