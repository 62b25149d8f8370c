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

B sequences of a batch, T positions, H channels, V words of the vocabulary. Hidden states are a list
of batches [B, T, H] in the model's dtype, on its device.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from se_compress.artifacts import ROLES, ExpertId, ModelSource, Role
from se_compress.errors import SourceError
from se_compress.model.attention import attention_forward
from se_compress.model.checkpoint import Reader, check_finite
from se_compress.model.experts import dense_hook, experts_forward, shared_hook
from se_compress.model.observers import Observer
from se_compress.opening.families import FAMILIES, Family
from se_compress.opening.modelfiles import shown

# What our experts and attention functions are called in transformers' tables.
IMPLEMENTATION = "se_compress"


def _register() -> None:
    """Enter our functions in transformers' tables. Doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


@dataclass(frozen=True)
class _Call:
    """What a decoder layer is called with beside the hidden states: masks, position embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a decoder layer and remembers how it was called. Hidden states pass through."""

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
        # Neither is a submodule: `model` holds this one, and `layer` has no weights to count.
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

    Raises SourceError if transformers builds no model from the source's config.

    source  config and tensors of the checkpoint
    read    reads a tensor by its name in the source; its values may be those of a compressed model
    device  of weights and hidden states
    dtype   of weights and hidden states
    model   the transformers model: weights of decoder layers, embeddings and head stay on the meta
            device, everything else is real
    layers  its decoder layers, on the meta device
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
        """A copy of decoder layer `layer` with its weights, on the device.

        Raises SourceError for a weight that is NaN or infinite.
        """
        module = copy.deepcopy(self.layers[layer])
        self._materialise(module, f"model.layers.{layer}.", skip=())
        return module

    def _materialise(self, module: nn.Module, prefix: str, skip: tuple[str, ...]) -> None:
        """Give every meta parameter and buffer of `module` its value, in place.

        prefix  what transformers puts before the module's own names
        skip    beginnings of names that are left on the meta device
        """
        persistent = set(module.state_dict().keys())
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if not name.startswith(skip):
                self._fill(module, name, value, prefix, name in persistent)
        for child in module.modules():
            # Buffers that no checkpoint has (rotary frequencies) are computed by transformers.
            computed = child._non_persistent_buffers_set
            if computed and not next(iter(child.buffers())).is_meta:
                self.model._init_weights(child)

    def _fill(
        self, module: nn.Module, name: str, value: Tensor, prefix: str, persistent: bool
    ) -> None:
        """Put a real tensor in the place of the meta tensor `value`, read if it is `persistent`."""
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        is_parameter = leaf in owner._parameters
        # Floating buffers are router biases and rotary frequencies: float32 in any model.
        dtype = value.dtype if is_parameter or not value.is_floating_point() else torch.float32
        real = torch.empty(value.shape, dtype=dtype, device=self.device)
        if persistent:
            self._read_into(real, prefix + name)
        if is_parameter:
            owner._parameters[leaf] = nn.Parameter(real, requires_grad=False)
        else:
            owner._buffers[leaf] = real

    def _read_into(self, target: Tensor, name: str) -> None:
        """Fill `target` with the tensor that transformers calls `name`, in the target's dtype.

        Fused experts, [E, 2I, H] or [E, H, I], are stacked from the matrices of the checkpoint.
        Raises SourceError for a value that is NaN or infinite.
        """
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            target.copy_(check_finite(name, self.read(self._on_disk(name))))
            return
        layer = int(name.split(".")[2])
        projections = dict(zip(ROLES, self.family.projections, strict=True))
        roles: tuple[Role, ...] = ("down",) if name.endswith("down_proj") else ("gate", "up")
        for expert in range(target.shape[0]):
            matrices = target[expert].chunk(len(roles), dim=0)  # gate above up: [I, H] each
            for matrix, role in zip(matrices, roles, strict=True):
                stored = self.family.expert.format(
                    layer=layer, expert=expert, projection=projections[role]
                )
                matrix.copy_(check_finite(stored, self.read(stored)))

    def _on_disk(self, name: str) -> str:
        """What the checkpoint calls the tensor that transformers calls `name`."""
        for disk, memory in self.family.renames:
            candidate = name.replace(memory, disk)
            if candidate in self.source.tensors:
                return candidate
        if name == "lm_head.weight" and name not in self.source.tensors:
            return "model.embed_tokens.weight"  # tied
        return name

    def experts_module(self, module: nn.Module) -> Any:
        """The fused routed experts of a loaded MoE layer.

        A transformers module with gate_up_proj [E, 2I, H] and down_proj [E, H, I] in the model's
        dtype; `experts.expert_inner` computes what lies between them.
        """
        return next(m for m in module.modules() if hasattr(m, "gate_up_proj"))

    # -- running

    @cached_property
    def _embeddings(self) -> Tensor:
        """[V, H], dtype as on disk, checked: a map of the file that takes no memory of its own."""
        name = "model.embed_tokens.weight"
        return check_finite(name, self.read(name))

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings [B, T, H] of each batch of token ids, int64 [B, T].

        Raises SourceError for an embedding that is NaN or infinite.
        """
        return [self._embeddings[batch].to(self.device, self.dtype) for batch in batches]

    @torch.no_grad()
    def run_layer(
        self,
        layer: int,
        module: nn.Module,
        hidden: Sequence[Tensor],
        observer: Observer | None = None,
    ) -> list[Tensor]:
        """The hidden states [B, T, H] of each batch after a layer. The input is not changed.

        layer     index of the layer
        module    the layer itself, from `load_layer`
        hidden    hidden states before it, [B, T, H] for each batch
        observer  is told what happens inside; without one nobody is
        """
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
        """Add the routed experts' output [N, H] to what `run_layer` returned without it, in place.

        N rows are those of all batches `hidden` [B, T, H], in order. In every family of the table
        the output enters the stream as it is.
        """
        parts = torch.split(output, [states.shape[0] * states.shape[1] for states in hidden])
        for states, part in zip(hidden, parts, strict=True):
            states += part.view_as(states).to(states.dtype)

    def _attach(self, layer: int, module: nn.Module, observer: Observer) -> list[RemovableHandle]:
        """Tell the parts of a layer whom to report to; returns the hooks to remove afterwards.

        Routed experts and attention find the observer as an attribute. Plain MLPs (shared experts,
        dense layers) have no interface for that and get a hook.
        """
        for child in module.modules():
            child.observer = observer  # type: ignore[assignment]
        if layer not in self.source.moe_layers:
            down = self.family.projections[2]
            return [module.get_submodule(f"mlp.{down}").register_forward_hook(dense_hook)]
        if ExpertId(layer, "shared") not in self.source.experts:
            return []
        within_layer = self.family.shared.removeprefix("model.layers.{layer}.")
        shared = module.get_submodule(within_layer.partition(".{projection}")[0])
        gate = self.family.shared_gate.removeprefix("model.layers.{layer}.").removesuffix(".weight")
        hook = shared_hook(module.get_submodule(gate) if gate else None)
        return [shared.register_forward_hook(hook)]

    def _call(self, layer: int, states: Tensor) -> _Call:
        """What `layer` is called with for a batch of the shape of `states` [B, T, H]."""
        shape = (states.shape[0], states.shape[1])
        if shape not in self._calls:
            self._calls[shape] = self._record(states)
        return self._calls[shape][layer]

    def _record(self, states: Tensor) -> list[_Call]:
        """Run transformers' own decoder over `states` [B, T, H], with no layer doing anything."""
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

    def _head(self) -> Tensor:
        """The weight [V, H] that makes logits of hidden states, in the model's dtype."""
        head = torch.empty(self.model.lm_head.weight.shape, dtype=self.dtype, device=self.device)
        self._read_into(head, "lm_head.weight")
        return head

    @torch.no_grad()
    def logits(self, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """Float32 logits [B, T, V] of each batch, from the last layer's [B, T, H]."""
        head = self._head()
        for states in hidden:
            normed = self.model.model.norm(states)
            yield nn.functional.linear(normed, head).float()

    @torch.no_grad()
    def generate(
        self, prompts: Tensor, tokens: int, on_token: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Greedy continuations, int64 [B, tokens] on the CPU. Every step loads every layer once.

        No token ends a continuation early, so that models can be compared.

        prompts   token ids of equal length, int64 [B, P]
        tokens    how many are generated
        on_token  called after each step
        """
        from transformers import DynamicCache

        decoder, head = self.model.model, self._head()
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
