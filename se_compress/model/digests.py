"""What was written, known again: short hashes of the tensors that compression makes.

A tensor that is copied can be compared with the source for ever. One that is made (packed parts,
the rows and experts that surgery makes) has nothing to be compared with but its hash, taken from
memory before it goes to disk. DIGITS hex digits of SHA-256 tell any accident.

A model has tens of thousands of them and their names repeat themselves, so the hashes are kept by
owner: of model.layers.3.mlp.experts.5.up_proj.scales that is model.layers.3.mlp.experts.5. An
owner's are one string, in the order of the tensors' names.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from se_compress.artifacts import TensorInfo
from se_compress.model.checkpoint import read_tensor

DIGITS = 12
_READ_BYTES = 2**24


def digest_of_tensor(tensor: Tensor) -> str:
    """DIGITS hex digits of the bytes that a tensor of any shape and dtype has on disk."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()[:DIGITS]


def digest_on_disk(info: TensorInfo) -> str:
    """The same of a tensor that is in a file. A file that ends too early has another hash."""
    if info.stored is not None:
        return digest_of_tensor(read_tensor(info))
    digest, remaining = hashlib.sha256(), info.size_bytes
    with open(info.file, "rb") as stream:
        stream.seek(info.begin)
        while remaining and (data := stream.read(min(remaining, _READ_BYTES))):
            digest.update(data)
            remaining -= len(data)
    return digest.hexdigest()[:DIGITS]


def by_owner(digests: Mapping[str, str]) -> dict[str, str]:
    """Owner -> the hashes of its tensors as one string, from name of a tensor -> its hash."""
    owners = _owned(digests)
    return {owner: "".join(digests[name] for name in names) for owner, names in owners.items()}


def by_name(digests: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Name of a tensor -> its hash, from owner -> hashes: the inverse of `by_owner`.

    Tensors of an owner that has more or fewer hashes than tensors are left out.
    """
    found: dict[str, str] = {}
    for owner, owned in _owned(names).items():
        text = digests.get(owner, "")
        if len(text) == DIGITS * len(owned):
            parts = (text[at : at + DIGITS] for at in range(0, len(text), DIGITS))
            found |= dict(zip(owned, parts, strict=True))
    return found


def _owned(names: Iterable[str]) -> dict[str, list[str]]:
    """Owner -> the names of its tensors, sorted."""
    owners = defaultdict[str, list[str]](list)
    for name in sorted(names):
        owners[name.rsplit(".", 2)[0]].append(name)
    return dict(owners)
