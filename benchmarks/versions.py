"""Versions of a model, made by changing tensors in memory: what gates.py and damages.py share."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from se_compress.artifacts import GATES, Check, ExpertId, ModelSource
from se_compress.model.checkpoint import Reader
from se_compress.quant.grid import Grid, dequantize, rtn
from se_compress.recipe import Recipe

GROUP_SIZE = 64

# Tensors of a version that are not the source's, by name.
Changes = Mapping[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A source of which versions are made. `super_expert` is its strongest."""

    source: ModelSource
    read: Reader
    recipe: Recipe
    super_expert: ExpertId

    def names(self, expert: ExpertId) -> list[str]:
        return [info.name for info in self.source.experts[expert].values()]

    def routed(self) -> list[ExpertId]:
        return sorted(i for i in self.source.experts if i.expert != "shared")

    def others(self) -> list[ExpertId]:
        """Routed experts without the super expert."""
        return [i for i in self.routed() if i != self.super_expert]

    def drawn(self, count: int, dice: random.Random) -> list[ExpertId]:
        """Some of the others, at random."""
        return dice.sample(self.others(), count)


def reader(model: Model, changed: Changes) -> Reader:
    """The reader of a version, by the names of the source."""
    return lambda name: changed[name] if name in changed else model.read(name)


def rounded(model: Model, names: Sequence[str], bits: int) -> dict[str, Tensor]:
    """Matrices rounded to nearest, symmetric, in groups of GROUP_SIZE columns or, where a matrix
    has fewer, of whole rows."""
    changed = {}
    for name in names:
        weight = model.read(name).float()[None]
        grid = Grid(bits, min(GROUP_SIZE, weight.shape[-1]), symmetric=True)
        changed[name] = dequantize(rtn(weight, grid, None))[0]
    return changed


def silence(model: Model, experts: Sequence[ExpertId]) -> Changes:
    """Experts that write nothing."""
    names = [model.source.experts[identity]["down"].name for identity in experts]
    return {name: torch.zeros_like(model.read(name)) for name in names}


def account(model: Model, changed: Changes) -> Check:
    """The validator's accounting, for a plan that may change routed experts only."""
    planned = {name for identity in model.routed() for name in model.names(identity)}
    wrong = [n for n in changed if n not in planned and not torch.equal(changed[n], model.read(n))]
    share = 1.0 - len(wrong) / len(model.source.tensors)
    return Check("tensors_accounted", share, GATES["tensors_accounted"].limit, not wrong)
