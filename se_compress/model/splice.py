"""Make the tensors of a smaller model from those of the original: see surgery.py.

A merged or averaged expert is the average of its members, weighted by their shares. The neurons of
an expert have no order. So those of each member are first put into the order in which they match
the neurons of the anchor best, the member of the largest share: the assignment that maximises the
sum over neurons of the inner products of their gate, up and down weights (I x I for I neurons, see
scipy.optimize.linear_sum_assignment). The rows of the router, and other tensors with a row per
expert, are averaged with the same shares.

H channels, I neurons of an expert, E experts of a layer: gate and up are [I, H], down is [H, I].
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor

from se_compress.artifacts import ROLES, ExpertId, ModelSource, TensorInfo
from se_compress.model.checkpoint import TORCH_DTYPES, Reader, open_tensors
from se_compress.model.surgery import (
    Shrunk,
    anchor_of,
    holds_ids,
    is_made,
    kept_in_unrun_layers,
)

# The matrices of an expert by role, gate and up [I, H], down [H, I], and its biases if it has any.
Weights = Mapping[str, Tensor]


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
        members = sorted(small.origin[identity])
        weights = [
            {part: read_source(name) for part, name in _parts(source, member)} for member in members
        ]
        return merge_experts(weights, [small.shares[member] for member in members])

    def read(name: str) -> Tensor:
        info = small.source.tensors.get(name)
        if info is None or not is_made(info):
            return read_moved(name)
        if name not in source.tensors:
            return torch.zeros(info.shape, dtype=TORCH_DTYPES[info.dtype])
        if info.expert is None:
            remap = _ids if holds_ids(source, info) else _rows
            return remap(read_source(name), small, info)
        identity = _identity(info)
        if len(small.origin[identity]) > 1:
            return merged(identity)[_part(small.source, info)]
        original = dict(_parts(source, small.origin[identity][0]))
        return torch.zeros_like(read_source(original[_part(small.source, info)]))

    return read


def merge_experts(members: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """The average of experts, summed in float32 after aligning their neurons to the anchor's.

    The anchor is the member of the largest share; its dtypes are the result's.
    """
    anchor = members[anchor_of(shares)]
    total = {part: torch.zeros_like(anchor[part], dtype=torch.float32) for part in anchor}
    for member, share in zip(members, shares, strict=True):
        order = slice(None) if member is anchor else align(anchor, member)
        for part in total:
            total[part] += share * _in_order(part, member[part].float(), order)
    return {part: total[part].to(anchor[part].dtype) for part in total}


def _in_order(part: str, weight: Tensor, order: Tensor | slice) -> Tensor:
    """A part of an expert with its neurons in an order. gate and up, and their biases, have a row
    for each, down has a column, its bias none of them."""
    if part == "down":
        return weight[:, order]
    return weight if part == "down bias" else weight[order]


def align(anchor: Weights, member: Weights) -> Tensor:
    """Neurons of `member` in the order in which they match those of `anchor`, int64 [I]."""
    from scipy.optimize import linear_sum_assignment

    likeness = torch.zeros(())  # becomes [I, I]: a row for each neuron of the anchor
    for role in (role for role in ROLES if role in anchor):
        first, second = anchor[role].float(), member[role].float()
        likeness = likeness + (first.T @ second if role == "down" else first @ second.T)
    return torch.from_numpy(linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1])


def _parts(source: ModelSource, expert: ExpertId) -> Iterator[tuple[str, str]]:
    """The parts of an expert with their names: its projections by role, and "{role} bias"."""
    for role, info in source.experts[expert].items():
        yield role, info.name
        bias = _bias_of(info)
        if bias in source.tensors:
            yield f"{role} bias", bias


def _bias_of(info: TensorInfo) -> str:
    return f"{info.name.removesuffix('.weight')}.bias"


def _identity(info: TensorInfo) -> ExpertId:
    """The expert that a tensor belongs to. Only for tensors of experts."""
    assert info.layer is not None
    assert info.expert is not None
    return ExpertId(info.layer, info.expert)


def _part(model: ModelSource, info: TensorInfo) -> str:
    """What a tensor of an expert of `model` is to it, as in `_parts`."""
    parts = {name: part for part, name in _parts(model, _identity(info))}
    return parts[info.name]


def _rows(rows: Tensor, small: Shrunk, info: TensorInfo) -> Tensor:
    """Of a tensor with an extent of E on the axis of the experts, those of the smaller model. What
    is behind the E experts stays."""
    assert info.axis is not None
    rows = rows.movedim(info.axis, 0)
    if info.layer is None:
        kept = torch.tensor([*kept_in_unrun_layers(small.origin).values()])
        left = rows[kept]
    else:
        layer = _of_layer(small, info.layer)
        left = torch.stack([_row(rows, members, small.shares) for members in layer])
    whole = torch.cat([left, rows[small.original.expert_count :]])
    return whole.movedim(0, info.axis).contiguous()


def _of_layer(small: Shrunk, layer: int) -> list[tuple[ExpertId, ...]]:
    """What each routed expert of a layer of the smaller model stands for."""
    return [
        members
        for identity, members in small.origin.items()
        if identity.layer == layer and identity.expert != "shared"
    ]


def _ids(ids: Tensor, small: Shrunk, info: TensorInfo) -> Tensor:
    """A table of the experts of each token, [V, k], in the numbers of the smaller model.

    An expert that is gone gives its place to the first one that the token does not have yet.
    """
    assert info.layer is not None
    new = torch.full((small.original.expert_count,), -1)
    for number, members in enumerate(_of_layer(small, info.layer)):
        new[[member.expert for member in members if isinstance(member.expert, int)]] = number
    table = new[ids.long()]
    width = info.shape[1]
    found = [_different(row, width, small.source.expert_count) for row in table.tolist()]
    return torch.tensor(found, dtype=ids.dtype)


def _different(row: Sequence[int], width: int, count: int) -> list[int]:
    """`width` different numbers below `count`, those of the row (but -1) first."""
    taken = [number for number in dict.fromkeys(row) if number >= 0]
    others = (number for number in range(count) if number not in taken)
    return [*taken, *islice(others, max(0, width - len(taken)))][:width]


def _row(rows: Tensor, members: Sequence[ExpertId], shares: Mapping[ExpertId, float]) -> Tensor:
    """The row [...] of one expert of the result, from those of its members in [E, ...]."""
    found = rows[[member.expert for member in members if isinstance(member.expert, int)]]
    if len(members) == 1:
        return found[0]
    weights = torch.tensor([shares[member] for member in members])
    mean: Tensor = torch.tensordot(weights, found.float(), dims=1)
    return mean.to(rows.dtype)
