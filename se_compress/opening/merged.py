"""Tensors that a running model has as one, and published checkpoints as several, one above the
other: `Family.merged`.

Loaders that take names as they are in memory look for the one tensor, so results for them hold it.
Standard library only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from se_compress.artifacts import TensorInfo
from se_compress.opening.families import Family
from se_compress.opening.headers import Slot


def merged(slots: Mapping[str, Slot], family: Family) -> dict[str, Slot]:
    """The slots of a result, those of `Family.merged` as one, where the first of them stood.

    Raises ValueError for parts of several dtypes or widths.
    """
    whole_of = {part: whole for whole, parts in _merged(slots, family) for part in parts}
    found: dict[str, Slot] = {}
    for name, slot in slots.items():
        whole = whole_of.get(name, name)
        before = found.get(whole)
        if before is None:
            found[whole] = replace(slot, name=whole)
            continue
        if (slot.dtype, slot.shape[1:]) != (before.dtype, before.shape[1:]):
            raise ValueError(f"{name} {slot.shape} does not go below {before.shape} of {whole}")
        found[whole] = replace(before, shape=(before.shape[0] + slot.shape[0], *slot.shape[1:]))
    return found


def parted(
    headers: Mapping[str, TensorInfo], slots: Mapping[str, Slot], family: Family
) -> dict[str, TensorInfo]:
    """Where the slots are in files that hold those of `Family.merged` as one: the inverse. A tensor
    that has not the extents of its parts stays whole."""
    parts_of = dict(_merged(slots, family))
    found: dict[str, TensorInfo] = {}
    for name, info in headers.items():
        parts = [slots[part] for part in parts_of.get(name, ())]
        if parts and sum(part.size_bytes for part in parts) == info.size_bytes:
            found |= _pieces(info, parts)
        else:
            found[name] = info
    return found


def _merged(slots: Mapping[str, Slot], family: Family) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What is merged -> its parts, of each layer that has all of them."""
    for rest, leaves in family.merged.items():
        for name in slots:
            stem = name.removesuffix(leaves[0])
            parts = tuple(stem + leaf for leaf in leaves)
            if stem != name and all(part in slots for part in parts):
                yield stem + rest, parts


def _pieces(info: TensorInfo, parts: list[Slot]) -> dict[str, TensorInfo]:
    found, begin = {}, info.begin
    for part in parts:
        end = begin + part.size_bytes
        found[part.name] = replace(info, name=part.name, shape=part.shape, begin=begin, end=end)
        begin = end
    return found
