"""Distilling: gradients are those of finite differences, what is written is what was measured, and
it is undone where it does not help."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_execute import Stop, timeless
from tiny import plain_model, random_tokens, recipe
from torch import Tensor

from se_compress.artifacts import (
    COMPRESSION_FILE,
    Compressed,
    CompressionPlan,
    ModelSource,
    RunOptions,
    from_json,
)
from se_compress.compression import distill, trained
from se_compress.compression.execute import compress
from se_compress.compression.folds import folds_of
from se_compress.compression.teacher import FILE, Predictions, predictions_of
from se_compress.compression.trained import norms_of, routers_of, scales_of
from se_compress.engines.accounting import account
from se_compress.engines.blueprint import draw_blueprint
from se_compress.engines.distilling import parts_to_distill
from se_compress.errors import RecipeError, ResourceError
from se_compress.model.checkpoint import TORCH_DTYPES, open_result, open_tensors
from se_compress.model.whole import WholeModel, load_whole
from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.profiling.profiler import profile_experts
from se_compress.quant.grid import Grid, dequantize, rtn
from se_compress.quant.tuned import ScaledStack
from se_compress.recipe import Distill, Recipe
from se_compress.running import preflight
from se_compress.running.memory import MACHINE, Available

TinyModel = Callable[[str], Path]
TOKENS = random_tokens(48, 24)
CPU = torch.device("cpu")
FORMATS = (
    ("gptq", "gptqmodel", True),
    ("gptq_v2", "gptqmodel", False),
    ("auto-round", "transformers", False),
    ("auto-round-gptq", "vllm", True),
    ("compressed-tensors", "sglang", True),
    ("compressed-tensors", "vllm", False),
)
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "prune": {"prune": {"fraction": 0.25}},
    "merge": {"merge": {"fraction": 0.25}},
}


def settings_of(
    path: Path,
    bits: int = 3,
    surgery: str = "",
    tokens: list[list[int]] = TOKENS,
    policy: Mapping[str, Any] | None = None,
    **more: Any,
) -> Recipe:
    quantization: dict[str, Any] = {"method": "rtn", "group_size": 32}
    if bits == 16:
        quantization = {"method": "none"}
    widths = {"bits": [bits]} if bits != 16 else {}
    policy = {**widths, "protect": "none", **CHANGES.get(surgery, {}), **(policy or {})}
    return recipe(
        path,
        target="transformers" if bits == 16 else "gptqmodel",
        policy=policy,
        calibration={
            "data": "unused.txt",
            "samples": len(tokens),
            "sequence_length": len(tokens[0]),
        },
        **{"quantization": quantization, **more},
    )


class Made:
    """One checkpoint, distilled or not."""

    def __init__(
        self,
        path: Path,
        directory: Path,
        settings: Recipe,
        tokens: list[list[int]] = TOKENS,
        **options: Any,
    ) -> None:
        self.source, self.recipe = open_source(str(path)), settings
        surgical = settings.policy.prune or settings.policy.merge
        profile = profile_experts(self.source, tokens, settings) if surgical else None
        self.plan = make_plan(self.source, profile, settings)
        self.directory, self.notices = directory, list[str]()
        run = RunOptions(notice=self.notices.append, **options)
        compress(self.source, self.plan, tokens, settings, directory, run)
        self.made = from_json(Compressed, (directory / COMPRESSION_FILE).read_text(), "it")
        self.blueprint = draw_blueprint(self.source, self.plan)

    @property
    def bytes(self) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in sorted(self.directory.glob("*.safetensors"))}

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = read_headers(self.directory)
        return {name: open_tensors(found)(name).clone() for name in found}

    def whole(self) -> WholeModel:
        """The result, read from its files."""
        found, small = read_headers(self.directory), self.blueprint
        read = open_result(found, small.source.tensors, small.plan.scheme, small.names)
        return load_whole(small.source, read, CPU)


DISTILL = {"steps": 24, "sequences": 8}


@pytest.fixture(scope="module")
def both(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """Scales, routers and norms of a pruned and quantised model, without distilling and with it."""
    path, work = tiny_model("qwen2_moe"), tmp_path_factory.mktemp("distil")
    plain = Made(path, work / "plain", settings_of(path, 3, "prune"))
    return plain, Made(path, work / "made", settings_of(path, 3, "prune", distill=DISTILL))


# ----------------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3", "olmoe"])
def test_a_whole_model_computes_what_transformers_does(tiny_model: TinyModel, name: str) -> None:
    source = open_source(str(tiny_model(name)))
    model = load_whole(source, open_tensors(source.tensors), CPU)
    with torch.no_grad():
        expected = plain_model(source.path)(torch.tensor(TOKENS)).logits
        found = model.logits(torch.tensor(TOKENS))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    routers = model.router_weights()
    assert len(routers) == len(source.moe_layers)
    assert all(weight.shape[0] == source.expert_count for weight in routers.values())


def test_the_divergence_is_that_of_a_loop_over_words() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(2, 3, 300, generator=draw, dtype=torch.float64) for _ in range(2))
    logs, words = logits.log_softmax(-1).topk(128, dim=-1)
    aim = Predictions(torch.zeros(2, 3), logs, words.int())
    p, q, total = logits.softmax(-1), other.softmax(-1), 0.0
    for sequence in range(2):
        for position in range(3):
            one, two = p[sequence, position], q[sequence, position]
            rest = [1.0, 1.0]
            for word in one.argsort(descending=True)[:128].tolist():
                total += float(one[word] * (one[word] / two[word]).log())
                rest = [rest[0] - float(one[word]), rest[1] - float(two[word])]
            total += rest[0] * float(torch.tensor(rest[0] / rest[1]).log())
    assert float(aim.divergence(other, [0, 1])) == pytest.approx(total / 6, rel=1e-6)
    assert float(aim.divergence(logits, [0, 1])) == pytest.approx(0.0, abs=1e-9)


def test_predictions_are_kept_and_taken_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, ran = open_source(str(tiny_model("qwen3_moe"))), list[int]()

    def predict(tokens: Any) -> Predictions:
        ran.clear()
        return predictions_of(source, tokens, CPU, tmp_path, lambda done, _: ran.append(done))

    first = predict(TOKENS)
    assert len(ran) == len(TOKENS)
    again = predict(TOKENS)
    assert not ran
    assert torch.equal(first.logs, again.logs)
    assert torch.equal(first.words, again.words)
    predict(TOKENS[:8])  # another text
    assert len(ran) == 8
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:100])
    predict(TOKENS[:8])  # damaged
    assert len(ran) == 8
    with torch.no_grad():
        expected = plain_model(source.path)(torch.tensor(TOKENS)).logits.log_softmax(-1)
    found = expected.gather(-1, first.words.long())
    torch.testing.assert_close(first.logs, found, atol=1e-4, rtol=1e-3)
    assert float((expected.topk(128).values - found).abs().max()) < 1e-4


# --------------------------------------------------------------------------------------- gradients


def test_the_gradient_of_scales_is_that_of_autograd() -> None:
    draw = torch.Generator().manual_seed(0)
    for grid in (Grid(3, 16, True), Grid(4, -1, False), Grid(2, 32, False, torch.bfloat16)):
        stack = rtn(torch.randn(2, 5, 40, generator=draw), grid)
        towards = torch.randn(2, 5, 40, generator=draw)
        scaled = ScaledStack(stack)
        scaled.follow(towards)
        ratios = torch.zeros_like(stack.scales, requires_grad=True)
        size = grid.width(40)
        weight = torch.empty(2, 5, 40)
        for column in range(40):
            at = column // size
            steps = stack.codes[..., column].float() - stack.zeros[..., at]
            weight[..., column] = steps * stack.scales[..., at] * (1 + ratios[..., at])
        (weight * towards).sum().backward()
        torch.testing.assert_close(scaled.ratios.grad, ratios.grad)
        assert torch.equal(dequantize(scaled.hardened()), dequantize(stack))


@pytest.mark.parametrize(("kind", "size"), [("scales", 0.02), ("routers", 1e-3), ("norms", 1e-3)])
def test_gradients_are_those_of_finite_differences(
    both: tuple[Made, Made], kind: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the parameters that count most, through the whole model; a step is one that float16 holds
    of a scale, and less of what the file holds in bfloat16, which is not rounded here."""
    monkeypatch.setattr(distill, "PRODUCTS", torch.float32)
    monkeypatch.setattr(trained, "TORCH_DTYPES", dict.fromkeys(TORCH_DTYPES, torch.float32))
    made = both[0]
    aim = predictions_of(made.source, TOKENS, CPU, None, lambda *_: None)
    model, found = made.whole(), read_headers(made.directory)
    parts = list(
        scales_of(model, made.blueprint, found)
        if kind == "scales"
        else {"routers": routers_of, "norms": norms_of}[kind](model, made.blueprint)
    )
    members = list(range(8))
    distill._add_gradients(model, aim, members)
    for part in parts:
        part.follow()
    checked = 0
    for part in parts:
        gradient = part.parameter.grad
        assert gradient is not None
        place = int(gradient.abs().argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), gradient.shape))
        values = []
        for step in (size, -size):
            part.parameter[at] = step
            part.put()
            values.append(distill._divergence(model, aim, members))
        part.parameter[at] = 0.0
        part.put()
        slope = (values[0] - values[1]) / (2 * size)
        checked += float(gradient[at]) == pytest.approx(slope, rel=0.15, abs=2e-5)
    # a token that is routed otherwise after a step is no slope
    assert checked >= 0.7 * len(parts), f"{checked} of {len(parts)}"


# ---------------------------------------------------------------------------------- what is written


def test_the_file_is_what_was_measured(both: tuple[Made, Made]) -> None:
    """The divergences of the record are those of the files, read anew."""
    plain, made = both
    record = made.made.distilled
    assert record is not None
    assert record.step > 0
    assert record.trained == ("scales", "routers", "norms")
    assert record.selection < record.selection_before
    aim, folds = predictions_of(made.source, TOKENS, CPU, None, lambda *_: None), folds_of(48)
    for one, values in (
        (plain, (record.selection_before, record.report_before)),
        (made, (record.selection, record.report)),
    ):
        whole = one.whole()
        found = tuple(distill._divergence(whole, aim, folds[f]) for f in ("selection", "report"))
        assert found == values
    assert record.covered == aim.covered
    assert f"from {record.report_before:.4f} to {record.report:.4f}" in made.notices[-1]


def test_only_scales_of_experts_routers_and_norms_change(both: tuple[Made, Made]) -> None:
    before, after = both[0].tensors, both[1].tensors
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    scales = {name for name in changed if name.endswith(".scales")}
    assert scales
    assert all(".experts." in name for name in scales)
    assert {name.split(".", 3)[3] for name in changed - scales} == {
        "mlp.gate.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
    }  # fmt: skip
    folds = both[1].made.folds
    assert folds is not None
    assert [fold.sequences for fold in folds] == [39, 6, 3]
    told = {name for record in both[1].made.layers for name in record.distilled or ()}
    assert changed <= told
    assert "distilled" not in (both[0].directory / COMPRESSION_FILE).read_text()


def test_every_tensor_is_accounted_for(both: tuple[Made, Made]) -> None:
    made = both[1]
    layers = made.made.layers
    found = made.blueprint.found_in(read_headers(made.directory))
    check = account(made.blueprint, made.directory, found, layers)
    assert (check.value, check.passed, check.detail) == (1.0, True, "")
    # without its record, a router is not what surgery makes; with it, its bytes have to be its own
    bare = [replace(record, distilled=None) for record in layers]
    assert not account(made.blueprint, made.directory, found, bare).passed
    name = next(n for n in layers[-1].distilled or () if n.endswith("gate.weight"))
    info = found[name]
    before = Path(info.file).read_bytes()
    spoiled = bytearray(before)
    spoiled[info.begin] ^= 1
    Path(info.file).write_bytes(spoiled)
    check = account(made.blueprint, made.directory, found, layers)
    Path(info.file).write_bytes(before)
    assert check.detail == f"{name} differs from what was written"


@pytest.mark.parametrize(("form", "target", "symmetric"), FORMATS)
def test_packed_again_without_a_step_it_is_the_same(
    tiny_model: TinyModel, tmp_path: Path, form: str, target: str, symmetric: bool
) -> None:
    path = tiny_model("qwen3_moe")
    quantization = {"method": "rtn", "group_size": 32, "format": form, "symmetric": symmetric}
    settings = settings_of(path, 4, quantization=quantization)
    made = Made(path, tmp_path / "made", settings.model_copy(update={"target": target}))
    found = read_headers(made.directory)
    parts = [*scales_of(made.whole(), made.blueprint, found)]
    stored = {name: tensor for part in parts for name, tensor in part.stored().items()}
    packed = {slot.name for tensor in made.blueprint.packed() for slot in tensor.stored}
    assert stored.keys() == packed
    assert all(torch.equal(tensor, made.tensors[name]) for name, tensor in stored.items())


# --------------------------------------------------------------------------- undone, again, surgery


def test_what_does_not_help_is_undone(
    both: tuple[Made, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "RATES", {"scales": 0.3, "routers": 1.0, "norms": 1.0})
    plain, path = both[0], both[0].source.path
    made = Made(path, tmp_path / "made", settings_of(path, 3, "prune", distill=DISTILL))
    record = made.made.distilled
    assert record is not None
    assert (record.step, record.selection) == (0, record.selection_before)
    assert made.bytes == plain.bytes
    assert "was undone" in made.notices[-1]
    assert all(record.distilled is None for record in made.made.layers)


def test_a_killed_run_ends_with_the_same_bytes(both: tuple[Made, Made], tmp_path: Path) -> None:
    made, work = both[1], tmp_path / "work"
    work.mkdir()
    settings = settings_of(made.source.path, 3, "prune", distill=DISTILL)

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("distill", 7) and total == DISTILL["steps"]:
            raise Stop

    with pytest.raises(Stop):
        Made(made.source.path, tmp_path / "made", settings, work=work, progress=stop)
    stages: list[str] = []
    again = Made(
        made.source.path, tmp_path / "made", settings, work=work,
        progress=lambda stage, done, total: stages.append(f"{stage} {total}"),
    )  # fmt: skip
    assert f"distill {len(TOKENS)}" not in stages  # the source's predictions were there
    assert again.bytes == made.bytes
    assert timeless(again.made.layers) == timeless(made.made.layers)


@pytest.mark.parametrize("surgery", ["prune", "merge"])
def test_routers_and_norms_are_trained_after_surgery(
    tiny_model: TinyModel, tmp_path: Path, surgery: str
) -> None:
    path = tiny_model("mixtral")
    made = Made(path, tmp_path / "made", settings_of(path, 16, surgery, distill={"steps": 8}))
    record = made.made.distilled
    assert record is not None
    assert record.trained == ("routers", "norms")
    assert record.selection <= record.selection_before
    norms = [n for n, i in made.source.tensors.items() if i.kind == "norm" and i.layer is not None]
    told = {name for layer in made.made.layers for name in layer.distilled or ()}
    assert len(told) == (len(made.source.moe_layers) + len(norms) if record.step else 0)
    found = made.blueprint.found_in(read_headers(made.directory))
    check = account(made.blueprint, made.directory, found, made.made.layers)
    assert check.passed, check.detail


# ---------------------------------------------------------------------------------------- refusals


def planned(path: Path, settings: Recipe) -> tuple[ModelSource, CompressionPlan]:
    source = open_source(str(path))
    return source, make_plan(source, None, settings)


def test_what_cannot_be_trained_is_told_beforehand(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3_moe")
    bnb = {"method": "bitsandbytes", "block_size": 32}
    settings = settings_of(path, 4, quantization=bnb).model_copy(update={"target": "transformers"})
    small = draw_blueprint(*planned(path, settings))
    with pytest.raises(RecipeError, match="format bitsandbytes has no scales that could be tuned"):
        parts_to_distill(small, Distill(steps=1))
    assert parts_to_distill(small, Distill(steps=1, train=("routers",))) == ("routers",)
    whole = draw_blueprint(*planned(path, settings_of(path, 16)))
    with pytest.raises(RecipeError, match="nothing to train: no routed expert is quantised"):
        parts_to_distill(whole, Distill(steps=1))
    with pytest.raises(RecipeError, match=r"distill\.train: scales cannot be trained: no routed"):
        parts_to_distill(whole, Distill(steps=1, train=("scales", "routers")))


def test_the_keys_are_checked(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3_moe")
    with pytest.raises(RecipeError, match="'biases' is not one of auto, scales, routers, norms"):
        settings_of(path, distill={"steps": 1, "train": ["biases"]})
    few = {"data": "unused.txt", "samples": 4}
    with pytest.raises(RecipeError, match="distill sets some calibration samples apart"):
        recipe(path, calibration=few, distill={"steps": 1})


def test_sequences_of_several_lengths_are_refused(both: tuple[Made, Made]) -> None:
    made, run = both[1], RunOptions()
    found = read_headers(made.directory)
    with pytest.raises(RecipeError, match="sequences are not of equal length"):
        distill.distill(made.blueprint, [[1, 2], [1]] * 4, made.recipe, found, run)


def test_a_model_that_does_not_fit_is_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model("qwen3_moe")
    settings = settings_of(path, distill={"steps": 1})
    source = open_source(str(path))
    monkeypatch.setattr(preflight, "available_memory", lambda: Available(10**9, MACHINE))
    monkeypatch.setattr(preflight, "PIECE_TOKENS", 10**6)
    preflight.check_memory(source, settings_of(path), 384)
    with pytest.raises(ResourceError, match="distill trains the whole model in memory: it takes"):
        preflight.check_memory(source, settings, 384)
