"""Is every tensor of a result what it should be? Nothing is run: bytes and hashes are compared, and
the engine's settings with the file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from se_compress.artifacts import GATES, Check, LayerRecord, TensorInfo
from se_compress.engines.blueprint import Blueprint
from se_compress.engines.engine_view import misread
from se_compress.formats import PlannedTensor
from se_compress.model.checkpoint import Reader, open_tensors
from se_compress.model.digests import by_name, digest_on_disk
from se_compress.model.splice import open_shrunk
from se_compress.opening.headers import Slot
from se_compress.opening.source import read_config

LISTED_PROBLEMS = 3


def account(
    blueprint: Blueprint,
    directory: Path,
    found: Mapping[str, TensorInfo],
    records: Sequence[LayerRecord],
) -> Check:
    """`tensors_accounted`, failed as well where the engine takes a matrix of the result for
    something that it is not in the file."""
    accounted = _account_tensors(blueprint, found, records)
    settings = read_config(directory).get("quantization_config") or {}
    problems = misread(settings, blueprint, found.values())
    if not problems:
        return accounted
    share = (accounted.value or 0.0) - len(problems) / max(len(found), 1)
    detail = "; ".join(filter(None, [accounted.detail, *leading(problems)]))
    return replace(accounted, value=max(share, 0.0), passed=False, detail=detail)


def _account_tensors(
    blueprint: Blueprint, found: Mapping[str, TensorInfo], records: Sequence[LayerRecord]
) -> Check:
    """Every slot of the plan is there with its dtype and shape, unchanged tensors are the source's
    own bytes, packed and repaired ones are what was written, made ones have the values that surgery
    gives them, and there is nothing else."""
    gate, tensors = GATES["tensors_accounted"], blueprint.tensors.values()
    known = _known(blueprint, found, records)
    problems = [f"{name} is not planned" for name in found if name not in blueprint.slots]
    for tensor in tensors:
        misfits = [*filter(None, (_misfit(slot, found.get(slot.name)) for slot in tensor.stored))]
        problems += misfits or _changes(tensor, known)
    share = 1.0 - len(problems) / max(len(blueprint.slots), 1)
    new = [t for t in tensors if t.making in ("packed", "repaired")]
    unknown = sum(slot.name not in known.written for t in new for slot in t.stored)
    detail = "; ".join([*leading(problems), *_not_compared(unknown)])
    return Check(gate.name, max(share, 0.0), gate.limit, not problems, detail)


def change_since(
    blueprint: Blueprint, found: Mapping[str, TensorInfo], records: Sequence[LayerRecord]
) -> str:
    """The first tensor of the recorded layers that is not in the result as it was written, and
    why; "" if all are."""
    known = _known(blueprint, found, records)
    changes = (
        change
        for record in records
        for tensor in blueprint.of_layer(record.layer)
        for change in _changes(tensor, known)
    )
    return next(changes, "")


def _misfit(slot: Slot, info: TensorInfo | None) -> str:
    """What is wrong with the form of a stored tensor; "" if nothing is."""
    if info is None:
        return f"{slot.name} is missing"
    if Slot(slot.name, info.dtype, info.shape) != slot:
        return f"{slot.name} is {info.dtype} {list(info.shape)}"
    return ""


@dataclass(frozen=True)
class _Known:
    """What the account compares a result with.

    found    headers of the result
    written  stored tensor -> its digest, taken when it was made
    trained  of these, those that are known by nothing else: distilling has changed them
    made     reader of what surgery makes, by the names of the smaller model
    """

    found: Mapping[str, TensorInfo]
    written: Mapping[str, str]
    trained: frozenset[str]
    made: Reader


def _known(
    blueprint: Blueprint, found: Mapping[str, TensorInfo], records: Sequence[LayerRecord]
) -> _Known:
    trained = frozenset(name for record in records for name in record.distilled or ())
    made = [
        slot.name
        for tensor in blueprint.tensors.values()
        for slot in tensor.stored
        if tensor.making != "copied" or slot.name in trained
    ]
    digests = {owner: text for record in records for owner, text in record.digests.items()}
    written = by_name(digests, made)
    return _Known(found, written, trained & written.keys(), open_shrunk(blueprint.shrunk))


def _changes(tensor: PlannedTensor, known: _Known) -> list[str]:
    """What changed in a tensor whose stored parts are all there; nothing if it is as it was made
    or copied."""
    found, written, name = known.found, known.written, tensor.name
    changed = [
        f"{slot.name} differs from what was written"
        for slot in tensor.stored
        if slot.name in written and digest_on_disk(found[slot.name]) != written[slot.name]
    ]
    if changed or tensor.making in ("packed", "repaired") or name in known.trained:
        return changed
    if tensor.making == "copied":
        same = same_bytes(tensor.info, found[name])
        return [] if same else [f"{name} differs from the source"]
    same = torch.equal(open_tensors(found)(name), known.made(tensor.info.name))
    maker = "surgery makes" if tensor.making == "made" else "the source decodes to"
    return [] if same else [f"{name} differs from what {maker}"]


def leading(problems: Sequence[str]) -> list[str]:
    """The first LISTED_PROBLEMS, and how many more there are."""
    more = len(problems) - LISTED_PROBLEMS
    return [*problems[:LISTED_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]


def _not_compared(count: int) -> tuple[str, ...]:
    """What the account cannot say of tensors without a digest."""
    if not count:
        return ()
    return (f"not compared: {count} tensors that were made here, no digests of them were found",)


def is_complete(blueprint: Blueprint, found: Mapping[str, TensorInfo]) -> bool:
    """Every slot of the plan is there with its dtype and shape."""
    there = {Slot(info.name, info.dtype, info.shape) for info in found.values()}
    return there.issuperset(blueprint.slots.values())


def same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors on disk hold the same bytes; they have to be of one size."""
    with open(first.file, "rb") as one, open(second.file, "rb") as other:
        one.seek(first.begin)
        other.seek(second.begin)
        remaining = first.size_bytes
        while remaining:
            count = min(remaining, 2**24)
            if one.read(count) != other.read(count):
                return False
            remaining -= count
    return True
