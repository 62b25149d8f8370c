"""Run a causal language model one decoder layer at a time.

transformers owns the mathematics of every family; this module owns the order of the work. The model
is built on the meta device. One pass with recording stand-ins shows what each decoder layer is
called with (masks, position embeddings). Then each real layer is loaded, run over all batches and
dropped, so that memory holds one layer and the hidden states, whatever the size of the model.

transformers 5 fuses a layer's experts into two tensors, and hooks on expert modules see nothing. It
does let one register an experts function and an attention function: ours compute the plain result
and tell an observer what happens inside. Every family that uses these interfaces is instrumented
that way.

Batches hold sequences of equal length and no padding, so a call depends on the batch's shape alone.
"""

import copy
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from se_compress.artifacts import ROLES, ExpertId, ExpertIndex, ModelSource
from se_compress.errors import SourceError
from se_compress.model.checkpoint import Reader, check_finite
from se_compress.model.measures import mean_over_sequences, sink_mass
from se_compress.opening.families import FAMILIES, Family
from se_compress.opening.modelfiles import shown

IMPLEMENTATION = "se_compress"
# oneDNN compiles and keeps a kernel for every number of rows that it meets: 1 ms and 0.7 MB each
# with bfloat16 on a CPU, half of the time of an expert's product. So experts see rounded numbers:
# multiples of this, or eight sizes an octave.
ROW_BLOCK = 64
PIECE_TOKENS = 256


class Observer:
    """What a run of a layer reports; override what is needed. Tensors are not to be changed.

    `batch` is set before each batch: its index among the batches. `wants_inner` asks for `expert`
    of shared experts, whose inner state has to be computed once more for that. Without
    `runs_experts` the routed experts are told of, not run: they add nothing.
    """

    batch: int = 0
    wants_attention = False
    wants_inner = False
    runs_experts = True
    silenced: frozenset[ExpertIndex] = frozenset()

    def routed(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
        """Input of the routed experts [N, H], chosen experts [N, k] and their weights [N, k];
        N = sequences x length, row = sequence * length + position."""

    def expert(
        self, expert: ExpertIndex, rows: Tensor, inner: Tensor, output: Tensor, weights: Tensor
    ) -> None:
        """One expert: its rows [n], input [n, I] and output [n, H] of down_proj, and the weights
        [n] with which the output enters the sum (the shared expert's: its gate, or 1)."""

    def dense(self, inner: Tensor, output: Tensor) -> None:
        """Input [N, I] and output [N, H] of a dense layer's down_proj."""

    def watched(self, sequences: int) -> int:
        """Of how many sequences of a batch, its leading ones, `attention` is told."""
        return sequences

    def attention(self, first_key: Tensor, mean_received: Tensor) -> None:
        """Attention probabilities on position 0, [B, heads, T] per query, and the mean that each
        key position receives from the queries that can see it, [B, heads, T]."""


class _Instrumented(Protocol):
    gate_up_proj: Tensor
    down_proj: Tensor
    is_transposed: bool
    has_bias: bool
    has_gate: bool
    observer: Observer | None

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


def experts_forward(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The routed experts' output [N, H], as transformers' own implementations compute it."""
    experts = cast(_Instrumented, module)
    if experts.is_transposed or experts.has_bias or not experts.has_gate:
        raise SourceError(f"{type(module).__name__}: this layout of fused experts is not supported")
    observer = cast(Observer | None, getattr(module, "observer", None)) or Observer()
    observer.routed(hidden, top_k_index, top_k_weights)
    if not observer.runs_experts:
        return torch.zeros_like(hidden)

    def run(expert: int, rows: Tensor, weights: Tensor) -> Tensor:
        inner = expert_inner(module, expert, select_rows(hidden, rows))
        output = nn.functional.linear(inner, experts.down_proj[expert])[: len(rows)]
        if expert in observer.silenced:
            output = torch.zeros_like(output)
        observer.expert(expert, rows, inner[: len(rows)], output, weights)
        return output

    return sum_routed(hidden, top_k_index, top_k_weights, experts.gate_up_proj.shape[0], run)


def expert_inner(module: nn.Module, expert: int, inputs: Tensor) -> Tensor:
    """The input [n, I] of a routed expert's down_proj, from inputs [n, H]."""
    experts = cast(_Instrumented, module)
    return experts._apply_gate(nn.functional.linear(inputs, experts.gate_up_proj[expert]))


def select_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden[rows], and after them repetitions of row 0 up to a number of which there are few."""
    block = max(ROW_BLOCK, 2 ** (len(rows).bit_length() - 4)) if len(rows) > ROW_BLOCK else 1
    missing = -len(rows) % block
    return hidden.index_select(0, nn.functional.pad(rows, (0, missing)))


def sum_routed(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    run: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """The weighted sum [N, H] of what the chosen experts make of `hidden` [N, H].

    `run` gets an expert, its rows [n] and their weights [n], and returns its output [n, H] before
    the weights. Tokens are sorted by expert once; each expert then works on its contiguous rows.
    The weighted outputs of a token are summed in float32 in the order of the experts, so the result
    is deterministic.
    """
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    routed = rows_by_expert(top_k_index, top_k_weights, experts)
    for expert, (rows, weights) in enumerate(routed):
        if len(rows):
            output = run(expert, rows, weights)
            total.index_add_(0, rows, output.float() * weights[:, None])
    return total.to(hidden.dtype)


def rows_by_expert(
    top_k_index: Tensor, top_k_weights: Tensor, experts: int
) -> list[tuple[Tensor, Tensor]]:
    """For each expert the rows [n] routed to it, ascending, and their weights [n]; from the chosen
    experts [N, k] of every row and their weights [N, k]."""
    chosen, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    counts = torch.bincount(chosen, minlength=experts).tolist()
    places = torch.split(torch.argsort(chosen, stable=True), counts)
    return [(mine // top_k_index.shape[-1], weights[mine]) for mine in places]


def _dense_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    observer = cast(Observer, module.observer)
    observer.dense(inputs[0].flatten(0, -2), output.flatten(0, -2))


def _shared_hook(gate: nn.Module | None, down: str) -> Callable[..., Tensor]:
    """A hook on the shared expert: reports it, and silences it if asked to."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        observer = cast(Observer, module.observer)
        hidden = inputs[0].flatten(0, -2)
        flat = output.flatten(0, -2)
        if "shared" in observer.silenced:
            return torch.zeros_like(output)
        if not observer.wants_inner:
            return output
        inner = module.act_fn(module.gate_proj(hidden)) * module.up_proj(hidden)  # type: ignore[operator]
        weights = torch.sigmoid(gate(hidden))[:, 0] if gate else hidden.new_ones(len(hidden))
        observer.expert("shared", torch.arange(len(hidden)), inner, flat, weights)
        return output

    return hook


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' "sdpa"; with an observer that asks for it, the probabilities are
    computed as well, in float32."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    observer = cast(Observer | None, getattr(module, "observer", None))
    if observer is not None and observer.wants_attention:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if count := observer.watched(len(query)):
            mask = None if attention_mask is None else attention_mask[:count]
            _report_attention(observer, query[:count], key[:count], mask, scale)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _report_attention(
    observer: Observer, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
) -> None:
    length = query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.matmul(query.float(), key.float().transpose(2, 3)) * scaling
    if mask is None:
        visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    else:  # boolean: `_register` asks for sdpa's masks
        visible = mask[..., :length]
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    observer.attention(probabilities[..., 0], probabilities.sum(dim=2) / visible.sum(dim=-2))


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


# --------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class _Call:
    """What a decoder layer is called with, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a decoder layer and remembers how it was called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: it has no weights to count
        self.call: _Call | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call = _Call(args, kwargs)
        return hidden


class _Streamed(nn.Module):
    """Stands in for a decoder layer and loads it anew for every call."""

    def __init__(self, model: "StreamedModel", index: int, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"], self.__dict__["layer"] = model, layer
        self.index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        model = cast(StreamedModel, self.__dict__["model"])
        return cast(Tensor, model.load_layer(self.index)(hidden, *args, **kwargs))


@dataclass
class StreamedModel:
    """A model whose weights come from `read`, a layer at a time.

    read    one tensor by its name in the source checkpoint: the source's own, or a compressed one
    dtype   of weights and hidden states
    """

    source: ModelSource
    read: Reader
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    _calls: dict[tuple[int, int], list[_Call]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        _register()
        self.family: Family = FAMILIES[self.source.family]
        try:
            config = CONFIG_MAPPING[self.source.family].from_dict(
                copy.deepcopy(dict(self.source.config))
            )
            config._attn_implementation = IMPLEMENTATION
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    config, dtype=self.dtype, attn_implementation=IMPLEMENTATION
                )
        except (
            ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError,
            ValueError,
        ) as error:  # fmt: skip
            # What stands in a config beside the keys that `config_values` knows.
            raise SourceError(
                f"{self.source.path / 'config.json'}: transformers builds no model from it "
                f"({shown(str(error), 200)})"
            ) from error
        model.set_experts_implementation(IMPLEMENTATION)
        self.model = model.eval()
        self.layers: list[nn.Module] = list(model.model.layers)
        self._materialise(model, "", skip=("model.layers.", "model.embed_tokens.", "lm_head."))

    # -- loading

    def load_layer(self, layer: int) -> nn.Module:
        """Decoder layer `layer` with its weights, on the device. Raises SourceError for NaN."""
        module = copy.deepcopy(self.layers[layer])
        self._materialise(module, f"model.layers.{layer}.", skip=())
        return module

    def _materialise(self, module: nn.Module, prefix: str, skip: tuple[str, ...]) -> None:
        """Give every meta parameter and buffer of `module`, but those under `skip`, its value."""
        persistent = set(module.state_dict().keys())
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if not name.startswith(skip) if skip else True:
                self._fill(module, name, value, prefix, name in persistent)
        for child in module.modules():
            computed = child._non_persistent_buffers_set
            if computed and not next(iter(child.buffers())).is_meta:
                self.model._init_weights(child)

    def _fill(
        self, module: nn.Module, name: str, value: Tensor, prefix: str, persistent: bool
    ) -> None:
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        is_parameter = leaf in owner._parameters
        dtype = value.dtype if is_parameter or not value.is_floating_point() else torch.float32
        real = torch.empty(value.shape, dtype=dtype, device=self.device)
        if persistent:
            self._read_into(real, prefix + name)
        if is_parameter:
            owner._parameters[leaf] = nn.Parameter(real, requires_grad=False)
        else:
            owner._buffers[leaf] = real

    def _read_into(self, target: Tensor, name: str) -> None:
        """Fill `target` with the tensor that transformers calls `name`, stacking experts."""
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            target.copy_(check_finite(name, self.read(self._on_disk(name))))
            return
        layer = int(name.split(".")[2])
        projections = dict(zip(ROLES, self.family.projections, strict=True))
        roles = ("down",) if name.endswith("down_proj") else ("gate", "up")
        for expert in range(target.shape[0]):
            parts = target[expert].chunk(len(roles), dim=0)
            for part, role in zip(parts, roles, strict=True):
                projection = projections[role]  # type: ignore[index]
                stored = self.family.expert.format(
                    layer=layer, expert=expert, projection=projection
                )
                part.copy_(check_finite(stored, self.read(stored)))

    def _on_disk(self, name: str) -> str:
        for disk, memory in self.family.renames:
            candidate = name.replace(memory, disk)
            if candidate in self.source.tensors:
                return candidate
        if name == "lm_head.weight" and name not in self.source.tensors:
            return "model.embed_tokens.weight"  # tied
        return name

    def experts_module(self, module: nn.Module) -> Any:
        """The fused routed experts of a loaded MoE layer: gate_up_proj [E, 2I, H], down_proj
        [E, H, I], and what lies between them."""
        return next(m for m in module.modules() if hasattr(m, "gate_up_proj"))

    # -- running

    @cached_property
    def _embeddings(self) -> Tensor:
        """[V, H], as on disk and checked: a map of the file that takes no memory of its own."""
        name = "model.embed_tokens.weight"
        return check_finite(name, self.read(name))

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings [B, T, H] of each batch of token ids [B, T]. Raises SourceError for NaN."""
        return [self._embeddings[batch].to(self.device, self.dtype) for batch in batches]

    @torch.no_grad()
    def run_layer(
        self,
        layer: int,
        module: nn.Module,
        hidden: Sequence[Tensor],
        observer: Observer | None = None,
    ) -> list[Tensor]:
        """The hidden states after `module`, for each batch. The input is not changed."""
        observer = observer or Observer()
        hooks = self._attach(layer, module, observer)
        results = []
        for index, states in enumerate(hidden):
            observer.batch = index
            call = self._call(layer, states)
            results.append(cast(Tensor, module(states, *call.args, **call.kwargs)))
        for hook in hooks:
            hook.remove()
        return results

    @staticmethod
    def add_routed(hidden: Sequence[Tensor], output: Tensor) -> None:
        """Complete, in place, what `run_layer` returned without the routed experts by their output
        [N, H]. In every family of the table it enters the stream as it is."""
        parts = torch.split(output, [states.shape[0] * states.shape[1] for states in hidden])
        for states, part in zip(hidden, parts, strict=True):
            states += part.view_as(states).to(states.dtype)

    def _attach(self, layer: int, module: nn.Module, observer: Observer) -> list[RemovableHandle]:
        """Tell the experts and the attention of a layer whom to report to; the plain MLPs (shared
        experts, dense layers) have no interface for that and get a hook on their down_proj."""
        for child in module.modules():
            child.observer = observer  # type: ignore[assignment]
        down = self.family.projections[2]
        if layer not in self.source.moe_layers:
            return [module.get_submodule(f"mlp.{down}").register_forward_hook(_dense_hook)]
        if ExpertId(layer, "shared") not in self.source.experts:
            return []
        path = self.family.shared.removeprefix("model.layers.{layer}.").partition(".{projection}")[
            0
        ]
        gate = self.family.shared_gate.removeprefix("model.layers.{layer}.").removesuffix(".weight")
        shared = module.get_submodule(path)
        hook = _shared_hook(module.get_submodule(gate) if gate else None, down)
        return [shared.register_forward_hook(hook)]

    def _call(self, layer: int, states: Tensor) -> _Call:
        shape = (states.shape[0], states.shape[1])
        if shape not in self._calls:
            self._calls[shape] = self._record(states)
        return self._calls[shape][layer]

    def _record(self, states: Tensor) -> list[_Call]:
        recorders = [_Recorder(layer) for layer in self.layers]
        decoder = self.model.model
        decoder.layers = nn.ModuleList(recorders)
        try:
            decoder(inputs_embeds=states, use_cache=False)
        finally:
            decoder.layers = nn.ModuleList(self.layers)
        calls = [recorder.call for recorder in recorders]
        if None in calls:
            raise RuntimeError(f"layer {calls.index(None)} was never called")
        return cast(list[_Call], calls)

    @torch.no_grad()
    def logits(self, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """Float32 logits [B, T, V] of each batch, from the hidden states after the last layer."""
        head = torch.empty(self.model.lm_head.weight.shape, dtype=self.dtype, device=self.device)
        self._read_into(head, "lm_head.weight")
        for states in hidden:
            normed = self.model.model.norm(states)
            yield nn.functional.linear(normed, head).float()

    @torch.no_grad()
    def generate(
        self, prompts: Tensor, tokens: int, on_token: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Greedy continuations [B, tokens] of prompts [B, P] of equal length; every step loads
        every layer once. No token ends a continuation early, so that models can be compared."""
        from transformers import DynamicCache

        decoder = self.model.model
        head = torch.empty(self.model.lm_head.weight.shape, dtype=self.dtype, device=self.device)
        self._read_into(head, "lm_head.weight")
        streamed = [_Streamed(self, i, layer) for i, layer in enumerate(self.layers)]
        decoder.layers = nn.ModuleList(streamed)
        cache, step, chosen = DynamicCache(config=self.model.config), prompts, []
        try:
            for _ in range(tokens):
                embedded = self.embed([step])[0]
                states = decoder(
                    inputs_embeds=embedded, past_key_values=cache, use_cache=True
                ).last_hidden_state
                step = nn.functional.linear(states[:, -1], head).argmax(-1, keepdim=True).cpu()
                chosen.append(step)
                on_token()
        finally:
            decoder.layers = nn.ModuleList(self.layers)
        return torch.cat(chosen, dim=1)


def batches_of(tokens: Sequence[Sequence[int]], batch_tokens: int) -> list[Tensor]:
    """Batches [B, T] of neighbouring sequences of equal length, at most `batch_tokens` tokens each
    (but at least one sequence)."""
    batches: list[list[Sequence[int]]] = []
    for sequence in tokens:
        full = batches and (len(batches[-1]) + 1) * len(sequence) > batch_tokens
        if not batches or full or len(batches[-1][0]) != len(sequence):
            batches.append([])
        batches[-1].append(sequence)
    return [torch.tensor(batch) for batch in batches]


def leading(hidden: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first sequences of batches [B, T, H], at most `tokens` tokens (but at least one)."""
    kept: list[Tensor] = []
    for states in hidden:
        count = min(len(states), tokens // states.shape[1])
        if count or not kept:
            kept.append(states[: max(1, count)])
        tokens -= max(1, count) * states.shape[1]
        if count < len(states):
            break
    return kept


def in_pieces(hidden: Sequence[Tensor]) -> list[Tensor]:
    """The same states [B, T, H] as pieces [1, n, H] of at most PIECE_TOKENS, in order: logits are
    wide, and what is computed from them position by position need not hold those of a batch."""
    pieces: list[Tensor] = []
    for states in hidden:
        for sequence in states:
            pieces += torch.split(sequence[None], PIECE_TOKENS, dim=1)
    return pieces


class RoutingCapture(Observer):
    """Keeps the input of a layer's routed experts and the routing, over all batches.

    After the run: `hidden` [N, H], `experts` [N, k], `weights` [N, k], rows in the order of the
    batches.
    """

    def __init__(self, *, runs_experts: bool = True) -> None:
        super().__init__()
        self.runs_experts = runs_experts
        self._hidden: list[Tensor] = []
        self._routings: list[tuple[Tensor, Tensor]] = []

    def routed(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> None:
        self._hidden.append(hidden.detach())
        self._routings.append((experts, weights))

    @property
    def saw_experts(self) -> bool:
        """False for a dense layer."""
        return bool(self._routings)

    @cached_property
    def hidden(self) -> Tensor:
        whole = torch.cat(self._hidden)
        self._hidden.clear()  # not twice in memory
        return whole

    @cached_property
    def experts(self) -> Tensor:
        return torch.cat([experts for experts, _ in self._routings])

    @cached_property
    def weights(self) -> Tensor:
        return torch.cat([weights for _, weights in self._routings])

    @cached_property
    def _by_expert(self) -> list[tuple[Tensor, Tensor]]:
        return rows_by_expert(self.experts, self.weights, 0)

    def rows_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Rows [n] routed to `expert`, ascending, and their routing weights [n]."""
        if expert < len(self._by_expert):
            return self._by_expert[expert]
        return self.experts.new_empty(0), self.weights.new_empty(0)  # behind the last one chosen


class SinkCapture(Observer):
    """Attention sinks of one layer, mean over the sequences of all batches.

    After the run: `sink_mass` [heads], see `measures.sink_mass`, and `received` [heads, T], the
    mean attention that each position receives from the queries that can see it.
    """

    wants_attention = True

    def __init__(self) -> None:
        super().__init__()
        self._mass: list[tuple[int, Tensor]] = []
        self._received: list[tuple[int, Tensor]] = []

    def attention(self, first_key: Tensor, mean_received: Tensor) -> None:
        sequences = first_key.shape[0]
        self._mass.append((sequences, sink_mass(first_key).cpu()))
        self._received.append((sequences, mean_received.mean(dim=0).cpu()))

    @property
    def sink_mass(self) -> Tensor:
        return mean_over_sequences(self._mass)

    @property
    def received(self) -> Tensor:
        return mean_over_sequences(self._received)


# ------------------------------------------------------------------------------------------- resume


def save_states(path: Path, layer: int, streams: dict[str, list[Tensor]]) -> None:
    """Write the hidden states after `layer`, atomically: the file is the old one or the new one.
    Streams that are still one and the same list are written once, and come back as one."""
    from safetensors.torch import save_file

    names = list(streams)
    same_as = {name: next(n for n in names if streams[n] is streams[name]) for name in names}
    tensors = {
        f"{name}.{index}": states.contiguous()
        for name, batches in streams.items()
        for index, states in enumerate(batches)
        if same_as[name] == name
    }
    partial = path.with_name(path.name + ".writing")
    sums = {key: _checksum(states) for key, states in tensors.items()}
    metadata = {
        "file": path.name,
        "layer": str(layer),
        "same_as": json.dumps(same_as),
        "checksums": json.dumps(sums),
    }
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def _checksum(states: Tensor) -> int:
    flat = states.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def load_states(
    path: Path, device: torch.device, notice: Callable[[str], None]
) -> tuple[int, dict[str, list[Tensor]]]:
    """The inverse of `save_states`; layer -1 and nothing if there is no file, and, with a word, if
    it is not what was saved."""
    from safetensors import SafetensorError

    if not path.exists():
        return -1, {}
    try:
        return _read_states(path, device)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        notice(f"{path} is damaged ({reason}): its stage starts again")
        return -1, {}


def _read_states(path: Path, device: torch.device) -> tuple[int, dict[str, list[Tensor]]]:
    """Raises one of many errors, ValueError among them, if the file is not what was saved."""
    from safetensors import safe_open

    streams: dict[str, list[Tensor]] = {}
    with safe_open(path, "pt") as file:
        metadata = cast(dict[str, str], file.metadata())
        sums = json.loads(metadata["checksums"])
        if metadata["file"] != path.name or sorted(file.keys()) != sorted(sums):
            raise ValueError("holds other states than it should")
        for key in sorted(sums, key=lambda k: (k.split(".")[0], int(k.split(".")[1]))):
            states = file.get_tensor(key)
            if _checksum(states) != sums[key]:
                raise ValueError(f"the checksum of {key} is wrong")
            streams.setdefault(key.split(".")[0], []).append(states.to(device))
    same_as = json.loads(metadata["same_as"])
    return int(metadata["layer"]), {name: streams[first] for name, first in same_as.items()}
