"""The folds of the calibration text: what tunes, what selects and what is reported of.

Whatever is tuned on calibration text (refine.py, distill.py) takes its gradients from one fold,
chooses among the states it met on another, and says how it went on a third, which decided nothing.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from se_compress.artifacts import FoldRecord

FOLDS = ("tuning", "selection", "report")
SELECTION, REPORT = 8, 16  # of so many sequences one


def folds_of(count: int) -> dict[str, list[int]]:
    """Which of `count` sequences tune, select and report; ascending, the same every time.

    They are scattered by a hash, since sources of text may take turns.
    """
    drawn = sorted(range(count), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    selection, report = max(1, count // SELECTION), max(1, count // REPORT)
    cuts = pairwise((0, count - selection - report, count - report, count))
    return {fold: sorted(drawn[a:b]) for fold, (a, b) in zip(FOLDS, cuts, strict=True)}


def records_of_folds(tokens: Sequence[Sequence[int]]) -> tuple[FoldRecord, ...]:
    """What is recorded of the folds of calibration sequences of token ids."""
    records = []
    for fold, members in folds_of(len(tokens)).items():
        text = json.dumps([list(tokens[i]) for i in members])
        digest = hashlib.sha256(text.encode()).hexdigest()
        records.append(FoldRecord(fold, len(members), digest))
    return tuple(records)


def rows_of_folds(lengths: Sequence[int]) -> dict[str, Tensor]:
    """The rows of each fold, int64, of sequences that lie one after another."""
    ends = list(pairwise(accumulate(lengths, initial=0)))
    return {
        fold: torch.cat([torch.arange(*ends[i]) for i in members])
        for fold, members in folds_of(len(lengths)).items()
    }
