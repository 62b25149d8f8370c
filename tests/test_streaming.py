"""Streaming computes what transformers computes, and observers see all of it.

The twin is always the plain model: float32, eager attention, eager experts, all layers in memory.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIGS, VARIANTS, LayerWatch, build, edit_weights, plain_model, random_tokens
from torch import Tensor, nn

from se_compress.artifacts import ExpertIndex, ModelSource
from se_compress.errors import SourceError
from se_compress.model.checkpoint import open_tensors
from se_compress.model.experts import Given, run_experts
from se_compress.model.measures import kl_divergence
from se_compress.model.observers import Observer, RoutingCapture
from se_compress.model.states import (
    States,
    batches_of,
    hidden_of,
    in_pieces,
    leading,
    load_states,
    save_states,
)
from se_compress.model.streaming import StreamedModel
from se_compress.opening.families import FAMILIES
from se_compress.opening.source import open_source

TinyModel = Callable[[str], Path]

TOKENS = [*random_tokens(3, 24), *random_tokens(1, 17, seed=1), *random_tokens(2, 24, seed=2)]
BATCH_TOKENS = 48  # batches of 2, 1, 1 and 2 sequences


def open_streamed(path: Path) -> StreamedModel:
    source = open_source(str(path))
    return StreamedModel(source, open_tensors(source.tensors))


def stream(
    model: StreamedModel,
    batches: list[Tensor],
    observer_of: Callable[[int], Observer] = lambda layer: Observer(),
) -> list[Tensor]:
    hidden = model.embed(batches)
    for layer in range(model.source.layer_count):
        hidden = model.run_layer(layer, model.load_layer(layer), hidden, observer_of(layer))
    return list(model.logits(hidden))


@torch.no_grad()
def plain_logits(model: Any, batches: list[Tensor]) -> list[Tensor]:
    return [model(batch).logits for batch in batches]


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


# ----------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_plain_model(tiny_model: TinyModel, name: str) -> None:
    batches = batches_of(TOKENS, BATCH_TOKENS)
    assert [tuple(batch.shape) for batch in batches] == [(2, 24), (1, 24), (1, 17), (2, 24)]
    found = stream(open_streamed(tiny_model(name)), batches)
    expected = plain_logits(plain_model(tiny_model(name)), batches)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs)
        assert float(theirs.std()) > 0.5  # else equality would say little


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_what_a_config_wants_returned_or_run_by_changes_nothing(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    directory = Path(shutil.copytree(tiny_model(name), tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    wanted = ("output_router_logits", "output_hidden_states", "output_attentions")
    config |= dict.fromkeys(wanted, True)
    config |= {"_attn_implementation": "flash_attention_2", "return_dict": False}
    (directory / "config.json").write_text(json.dumps(config))
    batches = batches_of(TOKENS, BATCH_TOKENS)
    found = stream(open_streamed(directory), batches)
    expected = stream(open_streamed(tiny_model(name)), batches)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_batch_is_its_sequences(tiny_model: TinyModel) -> None:
    model = open_streamed(tiny_model("deepseek_v3"))
    together = stream(model, [torch.tensor(TOKENS[:3])])[0]
    alone = stream(model, [torch.tensor([row]) for row in TOKENS[:3]])
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_continuations_equal_those_of_transformers(tiny_model: TinyModel, name: str) -> None:
    prompts = torch.tensor(random_tokens(2, 12, seed=3))
    plain = plain_model(tiny_model(name))
    plain.generation_config.eos_token_id = None
    expected = plain.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=9,
        pad_token_id=0,
    )[:, 12:]
    model = open_streamed(tiny_model(name))
    steps: list[None] = []
    found = model.generate(prompts, 9, lambda: steps.append(None))
    assert found.tolist() == expected.tolist()
    assert len(steps) == 9
    assert_close(stream(model, [prompts])[0], plain_logits(plain, [prompts])[0])  # left as it was


def test_bfloat16(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    model = StreamedModel(source, open_tensors(source.tensors), dtype=torch.bfloat16)
    batches = batches_of(TOKENS[:2], 100)
    assert model.embed(batches)[0].hidden.dtype == torch.bfloat16
    exact = stream(open_streamed(tiny_model("qwen3_moe")), batches)
    divergence = kl_divergence(exact[0], stream(model, batches)[0]).mean()
    assert 0 < float(divergence) < 0.05


def test_two_may_ask_for_logits_at_once(tiny_model: TinyModel) -> None:
    model = open_streamed(tiny_model("mixtral"))
    batches = batches_of(TOKENS, BATCH_TOKENS)
    expected = stream(model, batches)
    states = model.embed(batches)
    for layer in range(model.source.layer_count):
        states = model.run_layer(layer, model.load_layer(layer), states)
    for both, one in zip(
        zip(model.logits(states), model.logits(states), strict=True), expected, strict=True
    ):
        assert all(torch.equal(found, one) for found in both)
        assert not model.model.lm_head.weight.is_meta
    assert model.model.lm_head.weight.is_meta
    next(model.logits(states))  # and left
    assert model.model.lm_head.weight.is_meta


def test_tied_embeddings_have_no_head_of_their_own(tiny_model: TinyModel) -> None:
    model = open_streamed(tiny_model("qwen3_moe-tied"))
    assert "lm_head.weight" not in model.source.tensors
    hidden = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0))
    table = load_file(tiny_model("qwen3_moe-tied") / "model.safetensors")
    normed = nn.functional.rms_norm(hidden, (64,), table["model.norm.weight"], 1e-6)
    states = States(torch.tensor([[5, 6]]), hidden)
    assert_close(next(model.logits([states])), normed @ table["model.embed_tokens.weight"].T)


def test_a_tensor_that_is_gone_since_the_model_was_opened_is_named(
    tiny_model: TinyModel,
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    source = open_source(str(tiny_model("mixtral")))
    rest = {n: info for n, info in source.tensors.items() if n != name}
    model = StreamedModel(source, open_tensors(rest))
    with pytest.raises(SourceError, match=rf"^{name}: the checkpoint has no such tensor$"):
        model.load_layer(1)


# --------------------------------------------------------------------------------------- observers


class Recorder(Observer):
    """Keeps everything that it is told, by batch."""

    wants_attention = True
    wants_inner = True

    def __init__(self) -> None:
        super().__init__()
        self.routings: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.outputs: list[tuple[int, ExpertIndex, Tensor, Tensor, Tensor, Tensor]] = []
        self.denses: list[tuple[int, Tensor, Tensor]] = []
        self.attentions: list[tuple[int, Tensor, Tensor]] = []

    def routed(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
        self.routings.append((self.batch, hidden, experts, weights))

    def expert(
        self, expert: ExpertIndex, rows: Tensor, inner: Tensor, output: Tensor, weights: Tensor
    ) -> None:
        self.outputs.append((self.batch, expert, rows, inner, output, weights))

    def dense(self, inner: Tensor, output: Tensor) -> None:
        self.denses.append((self.batch, inner, output))

    def attention(self, first_key: Tensor, mean_received: Tensor) -> None:
        self.attentions.append((self.batch, first_key, mean_received))


class Recorded:
    """A tiny model streamed under observation, and what its plain twin did on the same batches.

    mlp   per layer and batch, input and output [N, H] of the plain model's whole MLP block
    """

    def __init__(self, path: Path) -> None:
        self.model = open_streamed(path)
        self.source: ModelSource = self.model.source
        self.batches = batches_of(TOKENS, BATCH_TOKENS)
        layers = range(self.source.layer_count)
        self.recorders = [Recorder() for _ in layers]
        self.logits = stream(self.model, self.batches, lambda layer: self.recorders[layer])
        self.weights = load_file(path / "model.safetensors")
        plain = plain_model(path)
        self.mlp: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        for layer in layers:
            plain.model.layers[layer].mlp.register_forward_hook(self._keep(layer))
        with torch.no_grad():
            outputs = [plain(batch, output_attentions=True) for batch in self.batches]
        self.attentions = [output.attentions for output in outputs]
        self.plain_logits = [output.logits for output in outputs]

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            result = output[0] if isinstance(output, tuple) else output
            self.mlp[layer].append((inputs[0].flatten(0, -2), result.flatten(0, -2)))

        return hook

    def expert(self, layer: int, expert: ExpertIndex, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of down_proj, from the checkpoint's own tensors by their roles."""
        family = FAMILIES[self.source.family]
        template = family.shared if expert == "shared" else family.expert
        return self.swiglu(template.format(layer=layer, expert=expert, projection="{}"), hidden)

    def swiglu(self, template: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        names = [template.format(p) for p in FAMILIES[self.source.family].projections]
        gate, up, down = (self.weights[name].float() for name in names)
        inner = nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
        return inner, inner @ down.T

    def shared_weight(self, layer: int, hidden: Tensor) -> Tensor:
        gate = FAMILIES[self.source.family].shared_gate
        if not gate:
            return torch.ones(len(hidden))
        return torch.sigmoid(hidden @ self.weights[gate.format(layer=layer)].float().T)[:, 0]


@pytest.fixture(scope="module", params=VARIANTS)
def recorded(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Recorded:
    return Recorded(tiny_model(request.param))


def test_observing_changes_nothing(recorded: Recorded) -> None:
    for ours, theirs in zip(recorded.logits, recorded.plain_logits, strict=True):
        assert_close(ours, theirs)


def test_every_routed_token_is_seen_exactly_once(recorded: Recorded) -> None:
    source = recorded.source
    for layer, recorder in enumerate(recorded.recorders):
        moe = layer in source.moe_layers
        assert [r[0] for r in recorder.routings] == (list(range(4)) if moe else [])
        for batch, hidden, experts, weights in recorder.routings:
            assert hidden.shape[0] == recorded.batches[batch].numel()
            assert experts.shape == weights.shape == (len(hidden), source.top_k)
            assert_close(hidden, recorded.mlp[layer][batch][0])
            pairs = [
                (int(row), expert)
                for index, expert, rows, *_ in recorder.outputs
                for row in rows
                if index == batch and expert != "shared"
            ]
            chosen = [(row, int(e)) for row in range(len(hidden)) for e in experts[row]]
            assert sorted(pairs) == sorted(chosen)
            assert len(set(chosen)) == len(chosen)


def test_experts_compute_what_the_roles_of_their_tensors_say(recorded: Recorded) -> None:
    """Catches gate and up swapped, a wrong activation, rows or weights out of place."""
    for layer in recorded.source.moe_layers:
        recorder = recorded.recorders[layer]
        for batch, hidden, experts, weights in recorder.routings:
            total = torch.zeros_like(hidden)
            for index, expert, rows, inner, output, gate in recorder.outputs:
                if index != batch:
                    continue
                expected_inner, expected = recorded.expert(layer, expert, hidden[rows])
                assert_close(inner, expected_inner)
                assert_close(output, expected)
                if expert != "shared":
                    slots = (experts[rows] == expert).float()
                    assert_close(gate, (weights[rows] * slots).sum(dim=1))
                total[rows] += gate[:, None] * output
            assert_close(total, recorded.mlp[layer][batch][1])


def test_the_shared_expert_is_seen_with_its_gate(recorded: Recorded) -> None:
    shared = {identity.layer for identity in recorded.source.experts if identity.expert == "shared"}
    for layer, recorder in enumerate(recorded.recorders):
        calls = [call for call in recorder.outputs if call[1] == "shared"]
        assert [call[0] for call in calls] == (list(range(4)) if layer in shared else [])
        for batch, _, rows, _, _, weights in calls:
            assert rows.tolist() == list(range(recorded.batches[batch].numel()))
            hidden = recorded.mlp[layer][batch][0]
            assert_close(weights, recorded.shared_weight(layer, hidden))


def test_dense_layers_report_their_mlp(recorded: Recorded) -> None:
    for layer, recorder in enumerate(recorded.recorders):
        dense = layer not in recorded.source.moe_layers
        assert [call[0] for call in recorder.denses] == (list(range(4)) if dense else [])
        for batch, inner, output in recorder.denses:
            template = f"model.layers.{layer}.mlp.{{}}.weight"
            expected_inner, expected = recorded.swiglu(template, recorded.mlp[layer][batch][0])
            assert_close(inner, expected_inner)
            assert_close(output, expected)
            assert_close(output, recorded.mlp[layer][batch][1])


def test_attention_equals_that_of_eager_attention(recorded: Recorded) -> None:
    for layer, recorder in enumerate(recorded.recorders):
        assert [call[0] for call in recorder.attentions] == list(range(4))
        for batch, first_key, mean_received in recorder.attentions:
            expected = recorded.attentions[batch][layer]  # [B, heads, queries, keys]
            # A softmax turns round-off of its scores, which reach 50 here, into relative errors.
            assert_close(first_key, expected[..., 0], 1e-4)
            seeing = (expected > 0).sum(dim=2)  # no probability underflows at this scale
            assert_close(mean_received, expected.sum(dim=2) / seeing, 1e-4)


def test_attention_is_left_out_unless_asked_for(tiny_model: TinyModel) -> None:
    recorder = Recorder()
    recorder.wants_attention = False
    stream(open_streamed(tiny_model("mixtral")), [torch.tensor(TOKENS[:1])], lambda _: recorder)
    assert recorder.outputs
    assert not recorder.attentions


# --------------------------------------------------------------------------------------- silencing


@pytest.mark.parametrize(
    ("name", "expert"),
    [*((name, 2) for name in CONFIGS), *((n, "shared") for n in CONFIGS if FAMILIES[n].shared)],
)
def test_silencing_an_expert_equals_zeroing_its_down_projection(
    tiny_model: TinyModel, tmp_path: Path, name: str, expert: ExpertIndex
) -> None:
    family = FAMILIES[name]
    path = shutil.copytree(tiny_model(name), tmp_path / "model")
    template = family.shared if expert == "shared" else family.expert
    down = template.format(layer=1, expert=expert, projection=family.projections[2])
    zeroed = load_file(path / "model.safetensors")[down] * 0
    edit_weights(path, {down: zeroed})
    batches = batches_of(TOKENS, BATCH_TOKENS)
    silencer = Observer()
    silencer.silenced = frozenset([expert])
    model = open_streamed(tiny_model(name))
    found = stream(model, batches, lambda layer: silencer if layer == 1 else Observer())
    expected = plain_logits(plain_model(path), batches)
    untouched = plain_logits(plain_model(tiny_model(name)), batches)
    for ours, theirs, before in zip(found, expected, untouched, strict=True):
        assert_close(ours, theirs)
        assert float((theirs - before).abs().max()) > 1e-3 * float(before.abs().max())


# ------------------------------------------------------------------------------------------ memory


def test_two_layers_are_counted_as_two(tiny_model: TinyModel, layer_watch: LayerWatch) -> None:
    model = open_streamed(tiny_model("mixtral"))
    kept = [model.load_layer(0), model.load_layer(1)]
    assert layer_watch.most == 2
    del kept
    assert layer_watch.alive() == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_no_more_than_one_layer_is_in_memory(
    tmp_path: Path, layer_watch: LayerWatch, name: str
) -> None:
    model = open_streamed(build(tmp_path / "model", name, num_hidden_layers=6))
    stream(model, batches_of(TOKENS, BATCH_TOKENS), lambda layer: RoutingCapture())
    assert layer_watch.loaded == list(range(6))
    assert layer_watch.most == 1
    assert layer_watch.alive() == 0


def test_a_layer_of_many_blocks_is_that_of_one_and_never_whole_in_memory(
    tmp_path: Path, layer_watch: LayerWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block is at work, one was, and one is read ahead."""
    directory = build(tmp_path / "model", "qwen3_moe", num_experts=24)
    batches = batches_of(TOKENS, BATCH_TOKENS)
    expected = stream(open_streamed(directory), batches)
    assert 4 <= layer_watch.most_experts <= 12
    layer_watch.most_experts = 0
    monkeypatch.setattr("se_compress.model.experts.BLOCK_ELEMENTS", 2 * 3 * 64 * 32)
    found = stream(open_streamed(directory), batches)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert 2 <= layer_watch.most_experts <= 6


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_experts_that_stay_in_memory_change_no_token(tiny_model: TinyModel, name: str) -> None:
    model = open_streamed(tiny_model(name))
    moe = model.source.moe_layers[0]
    module, states = model.load_layer(moe), model.embed(batches_of(TOKENS, BATCH_TOKENS))
    expected = model.run_layer(moe, module, states)
    model.layer_experts(module).keep()
    for ours, theirs in zip(model.run_layer(moe, module, states), expected, strict=True):
        assert torch.equal(ours.hidden, theirs.hidden)


@pytest.mark.parametrize("name", CONFIGS)
def test_streams_that_go_together_are_those_that_go_alone(tiny_model: TinyModel, name: str) -> None:
    model = open_streamed(tiny_model(name))
    states = model.embed(batches_of(TOKENS, BATCH_TOKENS))
    layer = model.source.moe_layers[-1]
    module, silent = model.load_layer(layer), Observer()
    silent.silenced = frozenset([1])
    streams = [(states, Observer()), (states[1:], silent)]
    together = model.run_streams(layer, module, streams)
    for found, (before, observer) in zip(together, streams, strict=True):
        alone = model.run_layer(layer, module, before, observer)
        for ours, theirs in zip(found, alone, strict=True):
            assert torch.equal(ours.hidden, theirs.hidden)
    assert not torch.equal(together[0][1].hidden, together[1][0].hidden)


def test_the_skeleton_holds_no_layer(tiny_model: TinyModel) -> None:
    model = open_streamed(tiny_model("deepseek_v3"))
    stream(model, [torch.tensor(TOKENS[:1])])
    real = {name for name, p in model.model.named_parameters() if not p.is_meta}
    assert real == {"model.norm.weight"}


# ------------------------------------------------------------------------------- batches and states


def test_batches_hold_neighbours_of_equal_length() -> None:
    rows = [[1, 2], [3, 4], [5, 6], [7], [8], [9, 10]]
    found = [batch.tolist() for batch in batches_of(rows, 4)]
    assert found == [[[1, 2], [3, 4]], [[5, 6]], [[7], [8]], [[9, 10]]]
    assert [batch.tolist() for batch in batches_of(rows[:2], 1)] == [[[1, 2]], [[3, 4]]]


def test_routing_capture_joins_the_batches() -> None:
    capture = RoutingCapture()
    assert not capture.saw_experts
    capture.routed(
        torch.ones(2, 3), torch.tensor([[0, 2], [1, 0]]), torch.tensor([[1.0, 2], [3, 4]])
    )
    capture.routed(torch.zeros(1, 3), torch.tensor([[2, 1]]), torch.tensor([[5.0, 6]]))
    assert capture.saw_experts
    assert capture.hidden.shape == (3, 3)
    found = {e: [part.tolist() for part in capture.rows_of(e)] for e in range(4)}
    assert found == {0: [[0, 1], [1, 4]], 1: [[1, 2], [3, 6]], 2: [[0, 2], [2, 5]], 3: [[], []]}


def states_of(stream: Tensor, *beside: Tensor) -> States:
    return States(
        torch.arange(stream.shape[0] * stream.shape[1]).view(stream.shape[:2]), stream, beside
    )


def parts_of(states: States) -> tuple[Tensor, ...]:
    return (states.tokens, states.stream, *states.beside)


def assert_same(found: States, expected: States) -> None:
    pairs = zip(parts_of(found), parts_of(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_states_survive_a_round_trip(tmp_path: Path) -> None:
    """Those of hyper-connections, and what goes beside the stream, too."""
    generator = torch.Generator().manual_seed(0)
    streams = {
        name: [
            states_of(
                torch.randn(1, i + 1, *shape, generator=generator),
                *(torch.full((1, i + 1, 2), i, dtype=torch.int32) for _ in range(beside)),
            )
            for i in range(12)
        ]
        for name, shape, beside in (("source", (4,), 0), ("result", (2, 4), 1))
    }
    save_states(tmp_path / "states", 7, streams)
    layer, loaded = load_states(tmp_path / "states", torch.device("cpu"), pytest.fail)
    assert layer == 7
    assert set(loaded) == set(streams)
    tokens = states_of(torch.zeros(1, 1, 4)).tokens  # may be one tensor in all streams
    shared = {name: [States(tokens, torch.zeros(1, 1, 4))] for name in streams}
    save_states(tmp_path / "shared", 0, shared)
    for name, batches in streams.items():
        for found, expected in zip(loaded[name], batches, strict=True):
            assert_same(found, expected)


def test_saving_replaces_the_old_states_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_states(tmp_path / "states", 0, {"source": [states_of(torch.zeros(1, 1, 2))]})

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_states(tmp_path / "states", 1, {"source": [states_of(torch.ones(1, 1, 2))]})
    layer, loaded = load_states(tmp_path / "states", torch.device("cpu"), pytest.fail)
    assert (layer, loaded["source"][0].stream.sum()) == (0, 0)


def test_no_states(tmp_path: Path) -> None:
    assert load_states(tmp_path / "states", torch.device("cpu"), pytest.fail) == (-1, {})


def test_leading_sequences_of_batches() -> None:
    shapes = ((2, 4, 3), (2, 4, 3), (1, 5, 3))
    batches = [states_of(torch.rand(shape), torch.rand(shape)) for shape in shapes]
    for tokens, sizes in [
        (1, [1]),
        (8, [2]),
        (11, [2]),
        (12, [2, 1]),
        (16, [2, 2]),
        (99, [2, 2, 1]),
    ]:
        found = leading(batches, tokens)
        assert [len(states) for states in found] == sizes
        for part, whole in zip(found, batches, strict=False):
            assert_same(part, whole.cut(slice(len(part))))
        assert len(leading(found, tokens)) == len(found)


def test_pieces_are_all_positions_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("se_compress.model.states.PIECE_TOKENS", 3)
    batches = [states_of(torch.rand(2, 8, 4)), states_of(torch.rand(1, 2, 2, 4))]
    pieces = in_pieces(batches)
    assert [states.length for states in pieces] == [3, 3, 2, 3, 3, 2, 2]
    assert all(len(states) == 1 for states in pieces)
    joined = torch.cat([states.tokens[0] for states in pieces])
    assert torch.equal(joined, torch.cat([states.tokens.flatten() for states in batches]))


def test_streams_side_by_side_are_one_hidden_state() -> None:
    stream = torch.arange(24.0).view(1, 2, 3, 4)
    states = states_of(stream)
    assert states.hidden.shape == (1, 2, 12)
    states.hidden[0, 1, 11] = -1
    assert stream[0, 1, 2, 3] == -1  # a view


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_added_afterwards_give_the_whole_layer(tiny_model: TinyModel, name: str) -> None:
    model = open_streamed(tiny_model(name))
    batches = batches_of(TOKENS, BATCH_TOKENS)
    hidden = model.embed(batches)
    for layer in range(model.source.layer_count):
        module = model.load_layer(layer)
        whole = model.run_layer(layer, module, hidden)
        capture = RoutingCapture(runs_experts=False)
        parts = model.run_layer(layer, module, hidden, capture)
        if layer in model.source.moe_layers:
            pairs = zip(hidden_of(parts), hidden_of(whole), strict=True)
            assert not any(torch.allclose(a, b) for a, b in pairs)
            assert capture.hidden.shape[0] == sum(batch.numel() for batch in batches)
            given = Given(Observer(), 0, capture.hidden, capture.experts, capture.weights)
            output = run_experts(model.layer_experts(module), [given])
            parts = model.add_routed(layer, module, hidden, parts, output)
        for ours, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(ours.hidden, expected.hidden)
        hidden = whole
