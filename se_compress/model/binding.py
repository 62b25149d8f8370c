"""Which tensors of a checkpoint fill which parameter of the model that transformers builds.

The names of a file go forward through transformers' own renamings and conversions, as its loader
takes them, onto the model on the meta device. So whatever transformers loads is bound here too, and
what it would ignore or draw at random is told. Nothing here reads a weight.

Live: of the model that transformers builds. Its `state_dict` has the parameters, and the buffers
that a checkpoint stores.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from se_compress.artifacts import ModelSource, TensorInfo
from se_compress.errors import SourceError
from se_compress.model.checkpoint import Reader
from se_compress.model.own_experts import with_interface
from se_compress.opening.modelfiles import shown

# Tensors that a running model has no place for, by what there is to say about them. Names as they
# are published; layers behind the decoder's last are told apart by their number.
_UNUSED: Mapping[str, re.Pattern[str]] = {
    "of multi-token prediction": re.compile(r"(model\.|language_model\.)*mtp(\.|_)"),
    "of a vision, audio or other tower": re.compile(
        r"(model\.)?(visual|vision\w*|audio\w*|multi_modal\w*|mm_\w+|embed_vision|embed_audio)\."
    ),
    "rotary frequencies, which are computed": re.compile(r".*rotary_emb\.inv_freq"),
}
# Config keys that change no weight and no logit: how the weights are coded, which kernels are
# wanted (maybe those of another machine), and what is returned beside the logits.
_OF_STORAGE_AND_CALLS = (
    "quantization_config", "attn_implementation", "_attn_implementation",
    "_experts_implementation", "return_dict", "output_attentions", "output_hidden_states",
    "output_router_logits",
)  # fmt: skip
_LAYER = re.compile(r"(?P<path>.*?\b(?:layers|blocks|h)\.(?P<layer>\d+))\.")


def meta_model(
    config: Mapping[str, Any],
    *,
    where: str = "config.json",
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    **changes: Any,
) -> Any:
    """The causal language model of a config, on the meta device: names and shapes, no weights.

    Of a composite model, its language model. Its routed experts are behind the experts interface
    (own_experts.py). Raises SourceError if transformers builds none.

    config     config.json; how its weights are coded, and what a call returns, is left out
    where      what an error calls it
    attention  transformers' name of the attention implementation; None: its own choice
    changes    keys of the (language model's) config that get another value
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        kind = CONFIG_MAPPING[str(config.get("model_type"))]
        built = kind.from_dict(kind._decode_special_floats(_of_the_model(config)))
        text = built.get_text_config()
        for key, value in changes.items():
            setattr(text, key, value)
        if attention is not None:
            built._attn_implementation = attention
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                built, dtype=dtype, attn_implementation=attention
            )
    except (
        ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError,
    ) as error:  # fmt: skip
        # What stands in a config beside the keys that `config_values` knows.
        raise SourceError(
            f"{where}: transformers builds no model from it ({shown(str(error), 200)})"
        ) from error
    return with_interface(model.eval())


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config without what it says of how the model is stored or called."""
    return {
        key: _of_the_model(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in config.items()
        if key not in _OF_STORAGE_AND_CALLS
    }


@dataclass(frozen=True)
class Bound:
    """What fills one live tensor, or the several that one conversion makes.

    live       the live tensor, of several the first
    sources    the checkpoint's tensors by the pattern that they match, in the loader's order
    converter  transformers' conversion; None: the one tensor is the value as it is
    """

    live: str
    sources: Mapping[str, tuple[str, ...]]
    converter: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint's tensors."""
        return tuple(name for names in self.sources.values() for name in names)

    @property
    def operations(self) -> tuple[Any, ...]:
        """What is done to them, transformers' ConversionOps in order."""
        return () if self.converter is None else tuple(self.converter.operations)

    def values(self, model: Any, read: Reader) -> dict[str, Tensor]:
        """The live tensors by name. Raises SourceError if the conversion does not take them."""
        if self.converter is None:
            return {self.live: read(self.names[0])}
        work = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                work.add_tensor(self.live, name, pattern, read(name))
        try:
            made = work.convert(self.live, model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise SourceError(
                f"{self.names[0]} and the {len(self.names) - 1} tensors that go with it do not "
                f"become {self.live} ({shown(str(error), 200)})"
            ) from error
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}


@dataclass(frozen=True)
class Binding:
    """A checkpoint's tensors and the model's, bound to each other.

    bound    live tensor -> what fills it
    strays   the checkpoint's tensors that fill nothing
    missing  live tensors that nothing fills, tied ones left out
    """

    bound: Mapping[str, Bound]
    strays: tuple[str, ...]
    missing: tuple[str, ...]

    @cached_property
    def live_of(self) -> dict[str, str]:
        """The checkpoint's tensor -> the live one that it fills, of several the first."""
        return {name: entry.live for entry in self.bound.values() for name in entry.names}


def bind(model: Any, names: Iterable[str]) -> Binding:
    """Bind the tensors of a checkpoint to a model, by their names, as transformers loads them.

    model  of `meta_model`
    names  as they are in the files
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    live = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    prefix = model.base_model_prefix
    sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    strays = []
    for name in sorted(names, key=dot_natural_key):
        found, pattern = rename_source_key(name, renamings, converters, prefix, live)
        if found not in live and name in live:
            found, pattern = rename_source_key(name, [], [], prefix, live)
        if found in live:
            sources[found][pattern or name].append(name)
        else:
            strays.append(name)
    bound: dict[str, Bound] = {}
    for first, parts in sources.items():
        converter = by_pattern.get(next(iter(parts)))
        entry = Bound(first, {key: tuple(part) for key, part in parts.items()}, converter)
        bound |= dict.fromkeys(_targets(entry, live), entry)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    missing = tuple(name for name in live if name not in bound and name not in tied)
    return Binding(bound, tuple(strays), missing)


def _targets(entry: Bound, live: Mapping[str, Tensor]) -> list[str]:
    """The live tensors that an entry fills."""
    if entry.converter is None or len(entry.converter.target_patterns) == 1:
        return [entry.live]
    first, *others = entry.converter.target_patterns
    found = [entry.live.replace(first, other) for other in others]
    return [entry.live, *(name for name in found if name in live)]


def experts_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules of fused routed experts, those of transformers' experts interface, by path."""
    # What `use_experts_implementation` gives them.
    return [
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    ]


def layer_of(name: str) -> int | None:
    """The decoder layer that a live tensor or module belongs to."""
    match = _LAYER.match(name + ".")
    return int(match["layer"]) if match else None


# -------------------------------------------------------------------------- at the start of a run


def check_source(source: ModelSource) -> None:
    """The same as `check_bound`, of the model of the source's own config."""
    model = meta_model(source.config, where=str(source.path / "config.json"))
    check_bound(model, bind_source(model, source), source)


def bind_source(model: Any, source: ModelSource) -> Binding:
    """What of a source fills what, its routed experts left out: `ModelSource.experts` has those."""
    return bind(model, (name for name, info in source.tensors.items() if not is_experts(info)))


def check_bound(model: Any, binding: Binding, source: ModelSource) -> None:
    """Every tensor of the model is filled, with its shape, and every tensor of the source is used.

    Raises SourceError, naming it, for the first one that is not, unless it is known to be no part
    of the running model: multi-token prediction, towers of a composite, computed frequencies.

    model    of `meta_model`
    binding  of `bind_source`
    """
    plain = {name: info.shape for name, info in source.tensors.items() if not is_experts(info)}
    live = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    filled = dict(_expert_shapes(model, source))
    for name in binding.missing:
        if name not in filled:
            raise SourceError(f"{source.path}: {name} is missing; the model of config.json has it")
    for name, entry in binding.bound.items():
        if name == entry.live:
            filled |= {n: tuple(t.shape) for n, t in entry.values(model, _meta(plain)).items()}
    for name, shape in filled.items():
        if live.get(name) != shape:
            raise SourceError(
                f"{source.path}: {name} is {shown(list(shape))}, but the model of config.json has "
                f"{shown(list(live[name])) if name in live else 'no such tensor'}"
            )
    for name in binding.strays:
        if why_unused(name, source.layer_count) is None:
            raise SourceError(
                f"{source.tensors[name].file}: {shown(name)} {shown(list(plain[name]))} does not "
                "belong to the model of config.json, which has no place for it"
            )


def is_experts(info: TensorInfo) -> bool:
    """The tensor is one of a routed expert of the running model: a projection, which
    `ModelSource.experts` finds by id, or the bias of one."""
    return isinstance(info.expert, int) and info.layer is not None


def why_unused(name: str, layer_count: int) -> str | None:
    """Why the running model has no place for a tensor of the checkpoint; None if nothing is known.

    name         as in the file
    layer_count  decoder layers; those behind them predict further tokens
    """
    layer = layer_of(name)
    if layer is not None and layer >= layer_count:
        return "of multi-token prediction"
    return next((why for why, pattern in _UNUSED.items() if pattern.match(name)), None)


def _meta(shapes: Mapping[str, tuple[int, ...]]) -> Reader:
    return lambda name: torch.empty(shapes[name], device="meta")


def _expert_shapes(model: Any, source: ModelSource) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The fused tensors that the routed experts of the source fill, with the shapes they give."""
    for path, module in experts_modules(model):
        layer = layer_of(path)
        experts = [roles for identity, roles in source.experts.items()
                   if identity.layer == layer and identity.expert != "shared"]  # fmt: skip
        if not experts:
            continue
        up, down = experts[0]["up"], experts[0]["down"]
        first = "gate_up_proj" if module.has_gate else "up_proj"
        rows = up.shape[0] * (1 + module.has_gate)
        for leaf, weight, height in ((first, up, rows), ("down_proj", down, down.shape[0])):
            fused = (height, weight.shape[1])
            yield (
                f"{path}.{leaf}",
                (len(experts), *(fused[::-1] if module.is_transposed else fused)),
            )
            if f"{weight.name.removesuffix('.weight')}.bias" in source.tensors:
                yield f"{path}.{leaf}_bias", (len(experts), height)
