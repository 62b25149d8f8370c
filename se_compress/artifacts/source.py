"""The model to compress, known from its config and headers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from se_compress.artifacts.ids import ExpertId, ExpertIndex, Role

TensorKind = Literal[
    "expert", "shared_expert", "router", "attention", "dense_mlp", "norm", "embedding", "other"
]


# How the values of a tensor are coded on disk; "plain" ones only lie otherwise.
Encoding = Literal["plain", "fp8", "mxfp4", "pack-quantized"]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a tensor is decoded from, where no file holds it as it is.

    encoding    how its values are coded
    parts       its tensors on disk, or the slices of fused ones, by what the encoding calls them
    size_bytes  of the tensor, in its own dtype and shape
    disk_bytes  of its parts; of a part that others share, its own share
    block       rows and columns that share a scale of FP8
    transposed  the parts hold [columns, rows]
    rows        first and end of its rows among those of the parts; None for all of them
    """

    encoding: Encoding
    parts: "Mapping[str, TensorInfo]"
    size_bytes: int
    disk_bytes: int
    block: tuple[int, int] = (1, 1)
    transposed: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, as its safetensors header has it, and what it is to the model.

    A tensor that is decoded when it is read is described as what comes out: name, dtype and shape
    are those of the weight, and the place in the file is that of its first part.

    name        as in the file
    dtype       safetensors' own name ("BF16", "F32", "I32" ...)
    shape       extents, outermost first
    file        path of the shard
    kind        what it is to the model
    begin, end  byte range of the data, from the start of the file
    layer       decoder layer, None for tensors outside the decoder layers
    expert      set for kinds "expert" and "shared_expert"
    role        which of the three projections; None for anything else (biases, gates, norms)
    axis        the axis that runs over the routed experts, where the tensor is of all of them
    stored      what it is decoded from; None if the file holds it as it is
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int
    kind: TensorKind = "other"
    layer: int | None = None
    expert: ExpertIndex | None = None
    role: Role | None = None
    axis: int | None = None
    stored: Stored | None = None

    @property
    def size_bytes(self) -> int:
        """In its own dtype and shape."""
        return self.end - self.begin if self.stored is None else self.stored.size_bytes

    @property
    def disk_bytes(self) -> int:
        """Of what holds it on disk, scales included."""
        return self.end - self.begin if self.stored is None else self.stored.disk_bytes


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint on disk, known from its config and headers only; no weight has been read.

    path            the directory
    name            what the recipe called it
    family          `model_type`, a row of families.py
    config          config.json
    tensors         every tensor by name
    layer_count     decoder layers, dense ones counted
    moe_layers      absolute indices of the layers with routed experts
    top_k           experts that a token is routed to
    expert_count    routed experts of each of these layers
    group_count     groups of these that the router chooses from first; 1: it looks at no groups
    chosen_groups   of these for a token
    text_key        key of config.json that holds the language model of a composite; "" for others
    prefix          what precedes `layers.N.` in names
    contents        works `digest` out, when it is wanted
    """

    path: Path
    name: str
    family: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    layer_count: int
    moe_layers: tuple[int, ...]
    expert_count: int
    top_k: int
    contents: Callable[[], str] = field(repr=False, compare=False)
    group_count: int = 1
    chosen_groups: int = 1
    text_key: str = ""
    prefix: str = "model."

    @cached_property
    def digest(self) -> str:
        """Of what the model is: config, headers and weights, but no time or place, so that a copy
        is the same model. All bytes of a small one (256 MB) count, of a larger one the middle of
        each tensor, both ends of each file, and the Hub's own hash where its cache holds the file:
        a change of a few weights elsewhere in a large model is missed, another model is not."""
        return self.contents()

    @cached_property
    def experts(self) -> dict[ExpertId, dict[Role, TensorInfo]]:
        """The weight matrices of every routed and shared expert, in the order of their ids."""
        found: dict[ExpertId, dict[Role, TensorInfo]] = {}
        for info in self.tensors.values():
            if info.role is not None and info.expert is not None and info.layer is not None:
                found.setdefault(ExpertId(info.layer, info.expert), {})[info.role] = info
        return {identity: found[identity] for identity in sorted(found)}

    @cached_property
    def router_weights(self) -> tuple[str, ...]:
        """The matrices by which routers score the experts, a row for each, by name. None of a
        layer that is not run, or of a router that works otherwise."""
        return tuple(
            name
            for name, info in self.tensors.items()
            if info.kind == "router"
            and info.layer in self.moe_layers
            and len(info.shape) == 2
            and info.shape[0] == self.expert_count > 1
            and info.dtype in ("F32", "BF16", "F16")
        )

    @property
    def text(self) -> Mapping[str, Any]:
        """What config.json says of the language model: all of it, or that part of a composite."""
        part: Mapping[str, Any] = self.config[self.text_key] if self.text_key else self.config
        return part

    @property
    def dtype(self) -> str:
        """The dtype that config.json asks engines for, e.g. "bfloat16"; "" if it asks for none.

        Older configs call it torch_dtype.
        """
        parts = (self.config, self.text)
        words = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
        found = next(filter(None, words), "")
        return str(found).removeprefix("torch.")

    def group_of(self, expert: ExpertIndex) -> int:
        """Number of the group in which the router finds a routed expert, from 0."""
        assert isinstance(expert, int)
        return expert * self.group_count // self.expert_count

    def top_k_of(self, count: int) -> int:
        """Experts per token with `count` experts left in a layer.

        As many as before, or as many as the router can choose from. Fewer than it asks for is what
        masking the others out of the router would give as well.
        """
        return min(self.top_k, count // self.group_count * self.chosen_groups)

    def weight_of(self, identity: ExpertId, role: Role) -> str:
        """Name of the weight of an expert's projection."""
        return self.experts[identity][role].name

    @cached_property
    def size_bytes(self) -> int:
        """All tensor data on disk, headers not counted."""
        return sum(info.disk_bytes for info in self.tensors.values())
