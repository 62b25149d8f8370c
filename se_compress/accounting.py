"""Is every tensor of a result what it should be? Nothing is run: bytes and hashes are compared."""

from collections.abc import Mapping, Sequence

import torch

from se_compress.artifacts import Check, LayerRecord, ModelSource, TensorInfo
from se_compress.checkpoint import open_tensors
from se_compress.digests import by_name, digest_on_disk
from se_compress.headers import Slot
from se_compress.splice import open_shrunk
from se_compress.surgery import Shrunk, is_made
from se_compress.targets import planned_bits, result_name, result_slots

LISTED_PROBLEMS = 3


def account(
    source: ModelSource,
    small: Shrunk,
    found: Mapping[str, TensorInfo],
    records: Sequence[LayerRecord],
) -> Check:
    """Every slot of the plan is there with its dtype and shape, unchanged tensors are the source's
    own bytes, packed ones are what was written, made ones have the values that surgery gives them,
    and there is nothing else."""
    expected = {slot.name: slot for slot in result_slots(small.source, small.plan)}
    kept = {
        result_name(small.source, small.plan, name): info
        for name, info in small.source.tensors.items()
        if planned_bits(small.plan, info) == 16
    }
    new = [name for name in expected if name not in kept or is_made(kept[name])]
    digests = {owner: text for record in records for owner, text in record.digests.items()}
    written = by_name(digests, new)
    made, stored = open_shrunk(source, small), open_tensors(found)
    problems = [f"{name} is not planned" for name in found if name not in expected]
    for name, slot in expected.items():
        info = found.get(name)
        if info is None:
            problems.append(f"{name} is missing")
        elif Slot(name, info.dtype, info.shape) != slot:
            problems.append(f"{name} is {info.dtype} {list(info.shape)}")
        elif name in written and digest_on_disk(info) != written[name]:
            problems.append(f"{name} differs from what was written")
        elif name not in kept:
            continue  # a part of a packed weight
        elif is_made(kept[name]):
            if not torch.equal(stored(name), made(kept[name].name)):
                problems.append(f"{name} differs from what surgery makes")
        elif not same_bytes(kept[name], info):
            problems.append(f"{name} differs from the source")
    share = 1.0 - len(problems) / max(len(expected), 1)
    unknown = sum(name not in kept and name not in written for name in expected)
    detail = "; ".join([*leading(problems), *_not_compared(unknown)])
    return Check("tensors_accounted", max(share, 0.0), 1.0, not problems, detail)


def leading(problems: Sequence[str]) -> list[str]:
    """The first LISTED_PROBLEMS, and how many more there are."""
    more = len(problems) - LISTED_PROBLEMS
    return [*problems[:LISTED_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]


def _not_compared(count: int) -> tuple[str, ...]:
    """What the account cannot say of tensors without a digest."""
    if not count:
        return ()
    return (f"not compared: {count} packed tensors, validation.json has no digests of them",)


def is_complete(small: Shrunk, found: Mapping[str, TensorInfo]) -> bool:
    """Every slot of the plan is there with its dtype and shape."""
    there = {Slot(info.name, info.dtype, info.shape) for info in found.values()}
    return there.issuperset(result_slots(small.source, small.plan))


def same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
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
