"""Experts that a file holds fused, as the matrices of each expert.

Whatever `Family.fused` lists is one tensor [E, ...] for the E experts of a layer: gate and up, one
above the other, and down; each with its rows as rows, or "transposed". Every expert gets matrices
[R, C] of its own, with the names that the family gives to those of one expert. A matrix that lies
in one piece is that piece of the file, and copied as any other tensor; of any other, and of coded
ones, `TensorInfo.stored` says how it is made. Standard library only.

Where rows of gate and up take turns (gpt-oss), what is called gate and up are the halves all the
same, with rows of both in each. They have the same inputs, and rows are rounded one by one, so that
nothing but the names depends on it; and engines that have a linear for each take the halves, and
set them one above the other again before the activation (defuser 0.0.28,
modeling/moe_experts_interface.py, _apply_expert_gate).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from se_compress.artifacts import ROLES, Role, Stored, TensorInfo
from se_compress.errors import SourceError
from se_compress.opening.families import Family
from se_compress.opening.headers import Slot
from se_compress.opening.modelfiles import shown

_LAYER = re.compile(r"(.*?\blayers\.\d+\.)(.+)")
# What is fused in a tensor, by its live name.
_ROLES: Mapping[str, tuple[Role, ...]] = {
    "gate_up_proj": ("gate", "up"),
    "up_proj": ("up",),
    "down_proj": ("down",),
}
Rows = tuple[int, int]


@dataclass(frozen=True)
class Lies:
    """How the rows of one projection lie in what is fused of an expert.

    rows        first and end
    transposed  the matrix has to be turned before it has these rows
    """

    rows: Rows
    transposed: bool


def unfused(found: Mapping[str, TensorInfo], family: Family) -> Mapping[str, TensorInfo]:
    """The tensors with fused ones taken apart, in the order of `found`. Raises SourceError for one
    that does not have the extents of such."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in found.items():
        match = _LAYER.fullmatch(name)
        live = family.fused.get(match[2]) if match else None
        if match is None or live is None:
            tensors[name] = info
            continue
        parts = {part.name: part for part in _taken_apart(info, family, match[1], live)}
        if twice := next((n for n in parts if n in found), None):
            raise SourceError(f"{info.file}: {shown(twice)} is there twice, fused and by itself")
        tensors |= parts
    if tensors.keys() == found.keys():
        return found
    # The file was saved under the names in memory, others than the published ones.
    renamed = (replace(info, name=_published(name, family)) for name, info in tensors.items())
    return {info.name: info for info in renamed}


def _published(name: str, family: Family) -> str:
    for disk, memory in family.renames:
        name = name.replace(f".{memory}", f".{disk}")
    return name


def _taken_apart(info: TensorInfo, family: Family, start: str, live: str) -> Iterator[TensorInfo]:
    """The matrices, or biases, of every expert.

    start  of the layer's names
    live   what transformers calls the tensor in its module
    """
    stem = live.removesuffix("_bias")
    bias, roles = stem != live, _ROLES[stem]
    # MXFP4 has its rows as rows in any family.
    mxfp4 = info.stored is not None and info.stored.encoding == "mxfp4"
    transposed = family.transposed and not bias and not mxfp4
    dimensions = 2 if bias else 3
    axis = 2 if transposed else 1
    if len(info.shape) != dimensions or 0 in info.shape or info.shape[axis] % len(roles):
        raise SourceError(
            f"{info.file}: {shown(info.name)} is {shown(list(info.shape))}; the experts of a layer "
            f"are {dimensions} extents, with {' and '.join(roles)} in the "
            f"{'last' if axis + 1 == dimensions else 'middle'} one"
        )
    template = family.expert.partition("{layer}.")[2].removesuffix(".weight")
    names = dict(zip(ROLES, family.projections, strict=True))
    for expert in range(info.shape[0]):
        for place, role in enumerate(roles):
            name = template.format(expert=expert, projection=names[role])
            name = f"{start}{name}.{'bias' if bias else 'weight'}"
            lies = Lies(_rows(info.shape[axis], len(roles), place), transposed)
            yield _part(replace(info, name=name), expert, lies, len(roles), place)


def _rows(count: int, roles: int, place: int) -> Rows:
    return place * count // roles, (place + 1) * count // roles


def _part(info: TensorInfo, expert: int, lies: Lies, roles: int, place: int) -> TensorInfo:
    """One projection of one expert.

    roles, place  projections that the tensor holds, and which one of them this is
    """
    first, end = lies.rows
    count = end - first
    shape = (count, *info.shape[2:])
    if lies.transposed:
        shape = (count, info.shape[1])
    whole = _of_expert(info, expert)
    if info.stored is None and not lies.transposed:
        row_bytes = whole.size_bytes // whole.shape[0]
        begin = whole.begin + first * row_bytes
        return replace(whole, shape=shape, begin=begin, end=begin + count * row_bytes)
    if info.stored is None:
        stored = Stored("plain", {"weight": whole}, 0, 0)
    else:
        parts = {p: _of_expert(part, expert) for p, part in info.stored.parts.items()}
        stored = replace(info.stored, parts=parts)
    on_disk = sum(part.size_bytes for part in stored.parts.values())
    stored = replace(
        stored,
        size_bytes=info.size_bytes // info.shape[0] // roles,
        # What cannot be halved goes to the first.
        disk_bytes=on_disk // roles + (on_disk % roles if place == 0 else 0),
        transposed=lies.transposed,
        rows=lies.rows if roles > 1 else None,
    )
    lead = next(iter(stored.parts.values()))
    return replace(info, shape=shape, begin=lead.begin, end=lead.end, stored=stored)


def _of_expert(info: TensorInfo, expert: int) -> TensorInfo:
    """The piece [...] of one expert of a tensor on disk [E, ...]."""
    size = (info.end - info.begin) // info.shape[0]
    begin = info.begin + expert * size
    return replace(info, shape=info.shape[1:], begin=begin, end=begin + size)


# ----------------------------------------------------------------------------------------- results


def fused(slots: Mapping[str, Slot], family: Family) -> dict[str, Slot]:
    """What a result holds on disk where the family is published fused, from the slots of its
    matrices: the inverse of `unfused`, which finds each of them again in the files.

    A fused tensor stands where its first matrix stood, under the name of published checkpoints.
    Raises ValueError for experts of several shapes or dtypes.
    """
    pattern, found = _pattern(family), dict[str, Slot]()
    groups: dict[str, list[Slot]] = {}
    for name, slot in slots.items():
        match = pattern.fullmatch(name)
        if match is None:
            found[name] = slot
            continue
        role = ROLES[family.projections.index(match["projection"])]
        stem = next(
            s for s, roles in _ROLES.items() if role in roles and s in family.fused.values()
        )
        live = stem + ("_bias" if match["leaf"] == "bias" else "")
        whole = match["start"] + _spelling(live, family)
        found.setdefault(whole, slot)
        groups.setdefault(whole, []).append(slot)
    return found | {name: _whole(name, group, family) for name, group in groups.items()}


def _pattern(family: Family) -> re.Pattern[str]:
    """Of the names of what belongs to one expert."""
    template = family.expert.partition("{layer}.")[2].removesuffix("weight")
    within = re.escape(template).replace(r"\{expert\}", r"\d+")
    names = "|".join(re.escape(name) for name in family.projections if name)
    within = within.replace(r"\{projection\}", f"(?P<projection>{names})")
    return re.compile(rf"(?P<start>.*\blayers\.\d+\.){within}(?P<leaf>weight|bias)")


def _spelling(live: str, family: Family) -> str:
    """What published checkpoints call a fused tensor: if not as in memory, then otherwise."""
    names = [name for name, parameter in family.fused.items() if parameter == live]
    return next((name for name in names if not name.endswith(f".{live}")), names[0])


def _whole(name: str, group: Sequence[Slot], family: Family) -> Slot:
    """The fused tensor of the parts of all experts."""
    parts = {(slot.dtype, slot.shape) for slot in group}
    if len(parts) != 1:
        raise ValueError(f"{name} would be fused of {sorted(parts)}")
    ((dtype, shape),) = parts
    experts = len({slot.name.rpartition(".experts.")[2].partition(".")[0] for slot in group})
    rows = shape[0] * len(group) // experts
    extents = (rows, *shape[1:])
    if family.transposed and len(shape) > 1:
        extents = (shape[1], rows)
    return Slot(name, dtype, (experts, *extents))
