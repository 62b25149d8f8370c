"""transformers loads our bitsandbytes checkpoints: `import se_compress`, then `from_pretrained`.

Importing this module registers the method "se-compress" with transformers; the package's
`__init__` sees to it that this happens as soon as transformers' own table of quantizers is there.

transformers fuses the experts of a layer into two tensors, and its own bitsandbytes integration
leaves them as they are. Here each expert stays three linears, packed or in 16 bits, and one
projection is unpacked for as long as it is used, by bitsandbytes' kernels.

transformers initialises at random what a file lacks, and says so in a table at most; with any
quantizer it does not even compare shapes. So names, shapes and dtypes are compared with the headers
first, and a checkpoint that does not fit is refused.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from se_compress.artifacts import Scheme, TensorInfo
from se_compress.errors import SourceError
from se_compress.formats import FORMATS
from se_compress.model.checkpoint import TORCH_DTYPES
from se_compress.model.routing import sum_routed
from se_compress.opening.families import FAMILIES, Family, live_name, live_prefix
from se_compress.opening.headers import read_header
from se_compress.quant.bnb import dequantize_bnb

if TYPE_CHECKING:  # at run time they may be half imported: theirs is the import that brings us in
    from transformers.core_model_loading import WeightRenaming, WeightTransform
    from transformers.modeling_utils import PreTrainedModel

METHOD = "se-compress"
VERSION = 1


@register_quantization_config(METHOD)
class SeCompressConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    in_16_bit   matrices of routed experts that are not packed, by their names without ".weight"
    others      packed matrices that are not of routed experts
    """

    def __init__(
        self,
        version: int,
        data_type: str,
        in_16_bit: Sequence[str],
        others: Sequence[str] = (),
        block_size: int = -1,
        double_quant: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if version != VERSION:
            raise SourceError(
                f"quantization_config.version is {version}, this se-compress reads {VERSION}"
            )
        self.quant_method: Any = METHOD
        self.format = "bitsandbytes"
        self.version = version
        self.data_type, self.block_size, self.double_quant = data_type, block_size, double_quant
        self.in_16_bit, self.others = list(in_16_bit), list(others)


@register_quantizer(METHOD)
class SeCompressQuantizer(HfQuantizer):
    """Builds the packed modules, checks the files against them, and lets transformers load."""

    requires_calibration = True  # only finished checkpoints are loaded

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError("this checkpoint needs bitsandbytes (pip install 'se-compress[bnb]')")

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def update_weight_conversions(
        self, weight_conversions: "list[WeightTransform]"
    ) -> "list[WeightTransform]":
        """Renamings only: nothing is fused. A buffer's name cannot hold bitsandbytes' dots."""
        from transformers.core_model_loading import WeightRenaming

        own = [WeightRenaming(r"\.weight\.(absmax|nested_absmax|nested_offset)$", r".weight_\1")]
        return [*(c for c in weight_conversions if isinstance(c, WeightRenaming)), *own]

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        pack_model(model, cast(SeCompressConfig, self.quantization_config))
        self._dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
        if checkpoint_files is None:
            raise SourceError("a se-compress checkpoint is loaded from its files, not from memory")
        _check_files(model, self, [Path(file) for file in checkpoint_files])

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        # transformers keeps the file's dtype for a tensor that a quantizer loads and that has
        # another name in memory: all of Mixtral's router and experts.
        for name, weight in model.named_parameters():
            weight.data = weight.data.to(self._dtypes[name])


# ------------------------------------------------------------------------------------------ modules


class PackedLinear(nn.Module):
    """A linear whose weight [R, C] is kept as bitsandbytes packed it and unpacked for each call."""

    def __init__(self, shape: tuple[int, int], scheme: Scheme, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.shape, self.scheme, self.bias = shape, scheme, bias
        bits = 8 if scheme.data_type == "int8" else 4
        self.parts = {}
        for part, dtype, extents in FORMATS["bitsandbytes"].parts(*shape, bits, scheme):
            self.parts[part] = part.replace(".", "_")
            self.register_buffer(
                self.parts[part], torch.empty(extents, dtype=TORCH_DTYPES[dtype], device="meta")
            )

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight [R, C]."""
        parts = {part: self.get_buffer(name) for part, name in self.parts.items()}
        return dequantize_bnb(parts, self.shape, self.scheme, dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.unpack(inputs.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """The parts go to another device, but keep their dtypes: they are no weights."""
        packed = [id(buffer) for buffer in self.buffers(recurse=False)]

        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in packed and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call]


class PackedExperts(nn.Module):
    """Stands in for the fused experts of a layer: per expert gate, up and down, in that order."""

    def __init__(self, fused: nn.Module, experts: Sequence[Mapping[str, nn.Module]]) -> None:
        super().__init__()
        # For what lies between up and down; its own weights are gone, and it is no submodule.
        del fused.gate_up_proj, fused.down_proj
        self.__dict__["fused"] = fused
        for index, projections in enumerate(experts):
            self.add_module(str(index), nn.ModuleDict(projections))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts = [cast(nn.ModuleDict, expert).values() for expert in self._modules.values()]

        def run(expert: int, rows: Tensor, weights: Tensor) -> Tensor:
            gate, up, down = experts[expert]
            states = hidden[rows]
            fused = cast(Any, self.__dict__["fused"])
            inner = fused._apply_gate(torch.cat([gate(states), up(states)], dim=-1))
            return cast(Tensor, down(inner))

        return sum_routed(hidden, top_k_index, top_k_weights, len(experts), run)


def pack_model(model: "PreTrainedModel", config: SeCompressConfig) -> None:
    """Replace the fused experts of a model on the meta device, and the linears that `others` lists.

    Raises SourceError if the family is not known, its layout is not, or a listed name does not
    exist.
    """
    model_type = model.config.get_text_config().model_type  # of a composite's language model
    family = FAMILIES.get(model_type)
    if family is None:
        raise SourceError(f"model_type {model_type!r} is not known to se-compress")
    scheme = Scheme(
        *("bitsandbytes", "bitsandbytes", config.block_size, True),
        data_type=config.data_type,
        double_quant=config.double_quant,
    )
    # In files of composites more may precede `layers.N.` than in the family's names.
    stems = (*config.in_16_bit, *config.others, family.expert)
    prefix = stems[0].partition("layers.")[0]
    family, plain = family.at(prefix), set(config.in_16_bit)
    for name, fused in _fused_experts(model):
        layer = int(re.findall(r"layers\.(\d+)\.", name)[-1])
        experts = list(_expert_modules(fused, family, layer, scheme, plain))
        model.set_submodule(name, PackedExperts(fused, experts))
    if plain:
        raise SourceError(f"quantization_config.in_16_bit: no expert has {sorted(plain)[0]}")
    for stem in config.others:
        name = _in_memory(model, family, stem)
        linear = cast(nn.Linear, model.get_submodule(name))
        shape = (linear.out_features, linear.in_features)
        model.set_submodule(name, PackedLinear(shape, scheme, linear.bias))


def _fused_experts(model: nn.Module) -> list[tuple[str, Any]]:
    found = [
        (name, cast(Any, module))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
    ]
    for name, module in found:
        if getattr(module, "is_transposed", True) or module.has_bias or not module.has_gate:
            raise SourceError(f"{name}: this layout of fused experts is not supported")
    return found


def _expert_modules(
    fused: Any, family: Family, layer: int, scheme: Scheme, plain: set[str]
) -> Iterator[dict[str, nn.Module]]:
    """Per expert, its projections by name; those found in `plain` are taken off it."""
    count, hidden, inner = fused.down_proj.shape
    dtype = fused.down_proj.dtype
    for expert in range(count):
        projections: dict[str, nn.Module] = {}
        for projection in family.projections:
            stem = family.expert.format(layer=layer, expert=expert, projection=projection)
            stem = stem.removesuffix(".weight")
            down = projection == family.projections[2]
            shape = (hidden, inner) if down else (inner, hidden)
            if stem in plain:
                plain.remove(stem)
                linear = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
                projections[projection] = linear
            else:
                projections[projection] = PackedLinear(shape, scheme, None)
        yield projections


def _in_memory(model: "PreTrainedModel", family: Family, stem: str) -> str:
    name = live_name(family, f"{stem}.weight", live_prefix(model.config.to_dict()))
    name, prefix = name.removesuffix(".weight"), f"{model.base_model_prefix}."
    return name if hasattr(model, model.base_model_prefix) else name.removeprefix(prefix)


# ------------------------------------------------------------------------------------------- checks


def _check_files(model: "PreTrainedModel", quantizer: HfQuantizer, files: Sequence[Path]) -> None:
    """Raises SourceError unless the files hold exactly the tensors of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    expected = model.state_dict()
    renamings = cast("list[WeightRenaming]", get_model_conversion_mapping(model, None, quantizer))
    found: dict[str, TensorInfo] = {}
    for info in (info for file in files for info in read_header(file)):
        name, _ = rename_source_key(info.name, renamings, [], model.base_model_prefix, expected)
        found[name] = info
    where = files[0].parent
    for name in sorted(expected.keys() - found.keys() - model.all_tied_weights_keys.keys()):
        raise SourceError(f"{where}: {name} is missing")
    for name, info in found.items():
        if name not in expected:
            if not _is_harmless(model, name):
                raise SourceError(f"{where}: {info.name} belongs to nothing in the model")
        elif not _fits(info, expected[name]):
            wanted = expected[name]
            raise SourceError(
                f"{where}: {info.name} is {info.dtype} {list(info.shape)}, "
                f"the model needs {str(wanted.dtype).removeprefix('torch.')} {list(wanted.shape)}"
            )


def _fits(info: TensorInfo, wanted: Tensor) -> bool:
    """Weights may change their dtype when they are loaded, packed parts may not."""
    dtype = TORCH_DTYPES.get(info.dtype)
    either_float = dtype is not None and dtype.is_floating_point and wanted.is_floating_point()
    return info.shape == tuple(wanted.shape) and (either_float or dtype == wanted.dtype)


def _is_harmless(model: "PreTrainedModel", name: str) -> bool:
    """Layers behind the decoder (multi-token prediction), a head that the class does not have, and
    what transformers ignores itself."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= model.config.num_hidden_layers:
        return True
    if name.startswith("lm_head.") and model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        return True
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    return any(re.search(pattern, name) for pattern in ignored)
