"""The account of a family whose names are known, but not its shapes as functions of the config.

Every tensor is told by its name, behind whatever precedes `layers.N.`, or explained, or refused;
each layer has what all its like have, each of its experts every projection in one shape, and what
runs over the experts fits their number. Other shapes are looked at when transformers builds the
model, at the start of a run (model/binding.py). Standard library only.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from se_compress.artifacts import ROLES, Role, TensorInfo, TensorKind
from se_compress.errors import SourceError
from se_compress.opening.config_rules import NEXT_TOKEN_KEYS
from se_compress.opening.families import HEADS, Family, Leaf, count_key, layer_count, setting
from se_compress.opening.modelfiles import shown

WEIGHTS, IDS = ("BF16", "F16", "F32"), ("I64", "I32")
# What precedes `layers.N.` in published checkpoints beside a family's own: composites, files saved
# under the names in memory, and those of a model without its head.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
# What a running language model has no place for, and why it is in the file. The names of the
# models' publishers; layers behind the decoder's last are told by their number.
_UNUSED: Mapping[str, re.Pattern[str]] = {
    "of multi-token prediction": re.compile(r"(model\.|language_model\.)*mtp[._]"),
    "of a vision, audio or other tower": re.compile(
        r"(model\.)?(visual|vision\w*|audio\w*|multi_modal\w*|mm_\w+|embed_vision|embed_audio)\."
    ),
    "rotary frequencies, which are computed": re.compile(r".*rotary_emb\.inv_freq"),
}
_LAYER_OF_MTP = re.compile(r".*?\bmtp\w*\.(?:layers\.)?\d+\.(?P<rest>.+)", re.ASCII)


@dataclass
class _Layer:
    """What a layer was found to have.

    live     names in the live model
    experts  role -> numbers of the experts that have it
    shapes   (role, shape) of these; one name of each
    """

    live: set[str] = field(default_factory=set)
    experts: dict[Role, set[int]] = field(default_factory=lambda: defaultdict(set))
    shapes: dict[tuple[Role, tuple[int, ...]], str] = field(default_factory=dict)


def prefix_of(found: Mapping[str, TensorInfo], family: Family) -> str:
    """What precedes `layers.N.` in the names of a checkpoint."""
    prefixes = (family.prefix, *_PREFIXES)
    starts = tuple(f"{prefix}layers." for prefix in prefixes)
    among = {name[: name.index("layers.")] for name in found if name.startswith(starts)}
    return next((prefix for prefix in prefixes if prefix in among), family.prefix)


def place(
    found: Mapping[str, TensorInfo], family: Family, config: Mapping[str, Any], path: Path
) -> dict[str, TensorInfo]:
    """The tensors with kind, layer, expert, role and axis filled in, in the order of `found`.

    family  its row for the prefix of the checkpoint, see `Family.at`
    config  what config.json says of the language model

    Raises SourceError for the first one that has no place, is missing or does not fit.
    """
    further = max((setting(config, key) or 0 for key in NEXT_TOKEN_KEYS), default=0)
    namer = _Namer(family, layer_count(config), family_count(family, config), further)
    placed = {name: namer.place(info) for name, info in found.items()}
    _check_outer(found, family, config, path)
    for layer in range(namer.layer_count):
        _check_layer(family, layer, namer.layers.get(layer, _Layer()), namer.count, path)
    if not any(layer.experts for layer in namer.layers.values()):
        raise SourceError(
            f"{path}: no layer has experts by the names that are known "
            f"({family.expert.format(layer='N', expert='E', projection=family.projections[1])})"
        )
    return placed


def family_count(family: Family, config: Mapping[str, Any]) -> int:
    """Routed experts of a layer."""
    return int(setting(config, count_key(family, config)))


def why_unused(name: str) -> str | None:
    """Why the running model has no place for a tensor; None if nothing is known of it."""
    return next((why for why, pattern in _UNUSED.items() if pattern.match(name)), None)


def unrun(info: TensorInfo, rest: str, family: Family, count: int) -> TensorInfo:
    """A tensor of a layer that is not run (multi-token prediction), but may have experts as others
    have: then it says of which one it is, or which axis runs over all.

    rest  of its name, behind the number of the layer
    """
    path = family.expert.partition("{layer}.")[2].partition("{expert}")[0]
    number, _, projection = rest.removeprefix(path).partition(".")
    if rest.startswith(path) and number.isascii() and number.isdigit() and projection:
        return _as(info, "other", expert=int(number))
    leaf = family.leaves.get(rest)
    axis = leaf.axis if leaf is not None else None
    whole = axis is not None and axis < len(info.shape) and info.shape[axis] == count
    return _as(info, "other", axis=axis if whole else None)


class _Namer:
    """Tells tensors by their names, and remembers what each layer has."""

    def __init__(self, family: Family, layer_count: int, count: int, further: int) -> None:
        self.family, self.layer_count, self.count = family, layer_count, count
        self.further = further  # layers behind the decoder's, for multi-token prediction
        self.layers: dict[int, _Layer] = defaultdict(_Layer)
        self._start = f"{family.prefix}layers."
        self._experts = family.expert.partition("{layer}.")[2].partition("{expert}")[0]
        names = zip(ROLES, family.projections, strict=True)
        self._roles: dict[str, Role] = {f"{name}.weight": role for role, name in names if name}
        self._biases = {f"{name}.bias" for name in family.projections if family.biased}

    def place(self, info: TensorInfo) -> TensorInfo:
        """What a tensor is to the model. Raises SourceError if it has no place in it."""
        if not info.name.startswith(self._start):
            return self._outside(info)
        number, _, rest = info.name.removeprefix(self._start).partition(".")
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise _no_place(info)
        layer = int(number)
        if layer >= self.layer_count:
            self._check_further(info, layer)
            return unrun(info, rest, self.family, self.count)
        if rest.startswith(self._experts) and rest[len(self._experts)].isdigit():
            return self._expert(info, layer, rest.removeprefix(self._experts))
        leaf = self.family.leaves.get(rest)
        if leaf is None:
            if why_unused(info.name):
                return _as(info, "other", layer)
            raise _no_place(info)
        self._check_axis(info, leaf)
        self._check_dtype(info, rest)
        self.layers[layer].live.add(leaf.live or rest)
        if leaf.role:
            return _as(info, leaf.kind, layer, "shared", leaf.role)
        return _as(info, leaf.kind, layer, axis=leaf.axis)

    def _check_further(self, info: TensorInfo, layer: int) -> None:
        last = self.layer_count + self.further - 1
        if layer > last:
            raise SourceError(
                f"{info.file}: {shown(info.name)} is of a layer that config.json does not know: "
                f"layers end at {self.layer_count - 1}"
                + (f", and at {last} with multi-token prediction" if self.further else "")
            )

    def _expert(self, info: TensorInfo, layer: int, rest: str) -> TensorInfo:
        """A tensor of one expert, `rest` being `{expert}.{projection}.weight`."""
        number, _, leaf = rest.partition(".")
        role, known = self._roles.get(leaf), self.layers[layer]
        expert = int(number) if number.isascii() and str(int(number)) == number else -1
        if not 0 <= expert < self.count or (role is None and leaf not in self._biases):
            raise _no_place(info)
        self._check_dtype(info, "")
        if role is None:
            return _as(info, "expert", layer, expert)
        known.experts[role].add(expert)
        known.shapes.setdefault((role, info.shape), info.name)
        return _as(info, "expert", layer, expert, role)

    def _outside(self, info: TensorInfo) -> TensorInfo:
        kind = self.family.outer.get(info.name)
        if kind is not None:
            self._check_dtype(info, "")
            return _as(info, kind)
        if match := _LAYER_OF_MTP.fullmatch(info.name):
            return unrun(info, match["rest"], self.family, self.count)
        if why_unused(info.name) or info.name in HEADS:
            return _as(info, "embedding" if info.name in HEADS else "other")
        raise _no_place(info)

    def _check_axis(self, info: TensorInfo, leaf: Leaf) -> None:
        if leaf.axis is None:
            return
        extent = info.shape[leaf.axis] if leaf.axis < len(info.shape) else 0
        if extent == self.count or (leaf.more and extent > self.count):
            return
        raise SourceError(
            f"{info.file}: {shown(info.name)} is {shown(list(info.shape))}, but config.json says "
            f"that there are {self.count} experts"
        )

    def _check_dtype(self, info: TensorInfo, rest: str) -> None:
        accepted = IDS if rest in self.family.ids else WEIGHTS
        if info.dtype not in accepted:
            raise SourceError(
                f"{info.file}: {shown(info.name)} is {info.dtype}; {', '.join(accepted)} can be "
                "read"
            )


def _as(
    info: TensorInfo,
    kind: TensorKind,
    layer: int | None = None,
    expert: Any = None,
    role: Role | None = None,
    axis: int | None = None,
) -> TensorInfo:
    return TensorInfo(
        *(info.name, info.dtype, info.shape, info.file, info.begin, info.end),
        *(kind, layer, expert, role, axis, info.stored),
    )


def _no_place(info: TensorInfo) -> SourceError:
    return SourceError(
        f"{info.file}: {shown(info.name)} {shown(list(info.shape))} does not belong to the model "
        "of config.json, which has no place for it"
    )


def _check_outer(
    found: Mapping[str, TensorInfo], family: Family, config: Mapping[str, Any], path: Path
) -> None:
    """Raises SourceError if there are no embeddings, or no head where one of its own is needed."""
    heads = [n for n, kind in family.outer.items() if kind == "embedding" and "head" in n]
    tables = [n for n, kind in family.outer.items() if kind == "embedding" and n not in heads]
    wanted = [(tables, "")]
    if not setting(config, "tie_word_embeddings") and heads:
        wanted.append((heads, ", and tie_word_embeddings is not true"))
    for names, why in wanted:
        if not any(name in found for name in names):
            raise SourceError(f"{path}: {names[0]} is missing{why}; config.json promises it")


def _check_layer(family: Family, number: int, layer: _Layer, count: int, path: Path) -> None:
    """Raises SourceError for what a layer lacks, and for experts of several shapes."""
    where = f"{family.prefix}layers.{number}."
    for rest in _needed(family, bool(layer.experts)):
        if rest not in layer.live:
            raise SourceError(f"{path}: {where}{rest} is missing; other layers have it")
    if not layer.experts:
        return
    for role in family.roles:
        lacking = set(range(count)) - layer.experts[role]
        if lacking:
            projection = family.projections[ROLES.index(role)]
            name = family.expert.format(layer=number, expert=min(lacking), projection=projection)
            raise SourceError(f"{path}: {name} is missing; config.json promises {count} experts")
    if len(layer.shapes) > len(family.roles):
        (role, shape), name = list(layer.shapes.items())[-1]
        raise SourceError(
            f"{path}: {name} is {shown(list(shape))}; other experts' {role} of this layer is not"
        )


def _needed(family: Family, has_experts: bool) -> Iterator[str]:
    """Live names that a layer has to have."""
    for rest, leaf in family.leaves.items():
        if leaf.where == "every" or (has_experts and leaf.where == "experts"):
            yield leaf.live or rest
