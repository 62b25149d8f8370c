"""Repair: the experts that surgery has left in a layer make up for those that went.

What an expert adds to a token is linear in its down_proj. So what the layer of the source would put
out for the same tokens, and the smaller one does not, is a problem of least squares; solved for one
expert after the other, each on what those before it have left:

    D = argmin  sum_t c_t |r_t - w_t a_t D|^2 + ridge |D|^2,    down_proj += D^T,    r -= w a D

for the tokens t that are routed to the expert, with routing weight w_t, input of down_proj a_t [I]
and what is still missing r_t [H]. c_t makes errors relative to the stream, as the norms of later
layers see them: a token with a massive activation would outweigh all others otherwise. Structured
pruning refits what is left in this way (ZipLM, arXiv:2302.04089; SlimGPT, arXiv:2412.18110); a
system for all experts of a layer together would not fit into memory for a large model, and this
goes block by block.

Sequences of the calibration text are in folds (folds.py). Least squares see `tuning`; an expert is
changed only if the error on its tokens of `selection` falls; `report` says how it went.

N rows (tokens) with H channels, experts of I neurons, n rows of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from se_compress.artifacts import RepairRecord
from se_compress.compression.folds import rows_of_folds
from se_compress.model.experts import RoutedExperts
from se_compress.model.observers import RoutingCapture
from se_compress.model.routing import padded
from se_compress.model.store import Store

RIDGE = 0.3  # of the mean square of a neuron; 0.1 follows the calibration text more, and gains less
LEAST = torch.finfo(torch.float32).tiny


@dataclass
class Repair:
    """The repair of one layer, and how far it is.

    layer     decoder layer, absolute
    missing   [N, H] float32: what its routed experts do not put out of what they should, by now
    counts    [N] float32: what the squared error of a row counts
    folds     bool [N] each: the rows of a fold
    stored    the experts that may be changed, with the dtype in which their down_proj is stored;
              float32 if it is quantised afterwards
    before    error on `report` before anything was repaired
    changed   the experts that were changed
    """

    layer: int
    missing: Tensor
    counts: Tensor
    folds: Mapping[str, Tensor]
    stored: Mapping[int, torch.dtype]
    before: float = 0.0
    changed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before = self.error()

    def error(self) -> float:
        """Of the stream behind the layer, relative, root mean square over the rows of `report`."""
        rows = self.folds["report"]
        return float(self._squares(self.missing[rows], self.counts[rows]).mean().sqrt())

    @staticmethod
    def _squares(missing: Tensor, counts: Tensor) -> Tensor:
        return missing.square().sum(1) * counts

    def helps(self, rows: Tensor, effect: Tensor) -> bool:
        """Whether an effect [n, H] on some rows, int64 [n], is one for the better."""
        chosen = self.folds["selection"][rows]
        missing, counts = self.missing[rows[chosen]], self.counts[rows[chosen]]
        after = self._squares(missing - effect[chosen], counts)
        return bool(after.sum() < self._squares(missing, counts).sum())

    @property
    def record(self) -> RepairRecord:
        return RepairRecord(len(self.changed), len(self.stored), self.before, self.error())


def repair_of(
    layer: int,
    wanted: Sequence[Tensor],
    others: Sequence[Tensor],
    output: Tensor,
    stored: Mapping[int, torch.dtype],
    store: Store,
) -> Repair:
    """The repair of a layer, before anything is done.

    layer   decoder layer, absolute
    wanted  what the source's layer makes of the states before it, [B, T, H] a batch
    others  what the smaller one does, without what its routed experts add
    output  what these add, [N, H] float32
    stored  as in Repair
    store   keeps what is missing
    """
    sizes = [states.shape[0] * states.shape[1] for states in wanted]
    missing, counts = store.empty(output.shape, output), output.new_empty(len(output))
    parts = (torch.split(tensor, sizes) for tensor in (output, missing, counts))
    for behind, beside, added, left, each in zip(wanted, others, *parts, strict=True):
        left.copy_(behind.flatten(0, 1).float() - beside.flatten(0, 1).float() - added)
        each.copy_(1 / behind.flatten(0, 1).float().square().sum(1).clamp(min=LEAST))
    folds, lengths = {}, [states.shape[1] for states in wanted for _ in range(states.shape[0])]
    for fold, rows in rows_of_folds(lengths).items():
        folds[fold] = torch.zeros(len(output), dtype=torch.bool, device=output.device)
        folds[fold][rows.to(output.device)] = True
    return Repair(layer, missing, counts, folds, stored)


@torch.no_grad()
def repair_block(block: RoutedExperts, capture: RoutingCapture, repair: Repair) -> None:
    """Repair the experts of a block, in place.

    capture  what the experts of the smaller layer see
    """
    for expert in block.ids:
        rows, weights = capture.rows_of(expert)
        if expert not in repair.stored or not len(rows):
            continue
        inner = block.inner(expert, padded(capture.hidden[rows]))[: len(rows)]
        seen = inner.float() * weights[:, None].float()
        down = block.down_proj[block.place(expert)]
        change = _least_squares(seen, rows, repair)
        after = (down + change.T).to(repair.stored[expert]).to(down.dtype)
        effect = seen @ (after.float() - down.float()).T
        if repair.helps(rows, effect):
            repair.missing.index_add_(0, rows, effect, alpha=-1)
            repair.changed.append(expert)
            down.copy_(after)


def _least_squares(seen: Tensor, rows: Tensor, repair: Repair) -> Tensor:
    """What is to be added to down_proj, [I, H], from what the expert sees, [n, I]: its inner values
    times their routing weights."""
    counted = seen * (repair.counts * repair.folds["tuning"])[rows, None]
    moments = seen.T @ counted
    ridge = RIDGE * moments.diagonal().mean().clamp(min=LEAST)
    moments.diagonal().add_(ridge)
    change: Tensor = torch.linalg.solve(moments, counted.T @ repair.missing[rows])
    return change
