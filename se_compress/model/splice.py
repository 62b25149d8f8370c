"""Make the tensors of a smaller model from those of the original: see surgery.py.

A merged expert is the average of its members, weighted by their shares. The neurons of an expert
have no order. So those of each member are first put into the order in which they match the neurons
of the anchor best, the member of the largest share: the assignment that maximises the sum over
neurons of the inner products of their gate, up and down weights (I x I for I neurons, see
scipy.optimize.linear_sum_assignment). The rows of the router, and other tensors with a row per
expert, are averaged with the same shares.

H channels, I neurons of an expert, E experts of a layer: gate and up are [I, H], down is [H, I].
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from se_compress.artifacts import ROLES, ExpertId, Role, TensorInfo
from se_compress.model.checkpoint import TORCH_DTYPES, Reader, open_tensors
from se_compress.model.surgery import Shrunk, anchor_of, is_made

# The three matrices of an expert: gate and up [I, H], down [H, I].
Weights = Mapping[Role, Tensor]


def open_shrunk(small: Shrunk) -> Reader:
    """Reader of the smaller model by its own names.

    What the source does not have is a bias of zero (engines/adapting.py). What merely moved is read
    where it is. Router rows, and every other tensor that has a row per expert, are those of the
    experts that are left. A merged expert is the average of its members. The down_proj of a zeroed
    expert is zero. Dtypes are the source's, of merged experts the
    anchor's; shapes are those of `small.source.tensors`.
    """
    source = small.original
    read_source, read_moved = open_tensors(source.tensors), open_tensors(small.source.tensors)

    @lru_cache(maxsize=1)  # three reads in a row are of one expert
    def merged(identity: ExpertId) -> Weights:
        members = small.origin[identity]
        weights = [
            {role: read_source(info.name) for role, info in source.experts[member].items()}
            for member in members
        ]
        return merge_experts(weights, [small.shares[member] for member in members])

    def read(name: str) -> Tensor:
        info = small.source.tensors.get(name)
        if info is None or not is_made(info):
            return read_moved(name)
        if name not in source.tensors:
            return torch.zeros(info.shape, dtype=TORCH_DTYPES[info.dtype])
        if info.role is None:
            return _rows(read_source(name), small, info)
        identity = _identity(info)
        if len(small.origin[identity]) > 1:
            return merged(identity)[info.role]
        return torch.zeros_like(read_source(source.experts[small.origin[identity][0]]["down"].name))

    return read


def merge_experts(members: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """The average of experts, summed in float32 after aligning their neurons to the anchor's.

    The anchor is the member of the largest share; its dtypes are the result's.
    """
    anchor = members[anchor_of(shares)]
    total = {role: torch.zeros_like(anchor[role], dtype=torch.float32) for role in ROLES}
    for member, share in zip(members, shares, strict=True):
        # down has a column for each neuron, gate and up have a row.
        order = slice(None) if member is anchor else align(anchor, member)
        for role in ROLES:
            weight = member[role].float()
            total[role] += share * (weight[:, order] if role == "down" else weight[order])
    return {role: total[role].to(anchor[role].dtype) for role in ROLES}


def align(anchor: Weights, member: Weights) -> Tensor:
    """Neurons of `member` in the order in which they match those of `anchor`, int64 [I]."""
    from scipy.optimize import linear_sum_assignment

    likeness = torch.zeros(())  # becomes [I, I]: a row for each neuron of the anchor
    for role in ROLES:
        first, second = anchor[role].float(), member[role].float()
        likeness = likeness + (first.T @ second if role == "down" else first @ second.T)
    return torch.from_numpy(linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1])


def _identity(info: TensorInfo) -> ExpertId:
    """The expert that a tensor belongs to. Only for tensors of experts."""
    assert info.layer is not None
    assert info.expert is not None
    return ExpertId(info.layer, info.expert)


def _rows(rows: Tensor, small: Shrunk, info: TensorInfo) -> Tensor:
    """Of a tensor with a row per expert of the source, [E, ...], the rows of the smaller model."""
    kept = [
        members
        for identity, members in small.origin.items()
        if identity.layer == info.layer and identity.expert != "shared"
    ]
    return torch.stack([_row(rows, members, small.shares) for members in kept])


def _row(rows: Tensor, members: Sequence[ExpertId], shares: Mapping[ExpertId, float]) -> Tensor:
    """The row [...] of one expert of the result, from those of its members in [E, ...]."""
    found = rows[[member.expert for member in members if isinstance(member.expert, int)]]
    if len(members) == 1:
        return found[0]
    weights = torch.tensor([shares[member] for member in members])
    mean: Tensor = torch.tensordot(weights, found.float(), dims=1)
    return mean.to(rows.dtype)
