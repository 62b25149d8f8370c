"""Is the held-out text really held out? What calibration has seen as well proves less.

It is told and not refused: whose only text is one file draws both from it, mostly from different
places.
"""

import filecmp
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from se_compress.recipe import DataSource, Recipe

RUN = 16  # tokens; shorter runs are phrases that any two texts share
TOLD_SHARE = 0.01  # less is what two texts of one kind have in common: headings, licences
Tokens = Sequence[Sequence[int]]


def common_sources(recipe: Recipe) -> tuple[str, ...]:
    """Held-out sources that calibration reads as well: the same data set, or the same file, under
    whatever name."""
    seen = recipe.calibration.data
    return tuple(
        source.data
        for source in recipe.validation.data
        if any(_same(source, other) for other in seen)
    )


def _same(one: DataSource, other: DataSource) -> bool:
    if not (os.path.isfile(one.data) and os.path.isfile(other.data)):
        return (one.data, one.split, one.config) == (other.data, other.split, other.config)
    sizes = {os.path.getsize(source.data) for source in (one, other)}
    if os.path.samefile(one.data, other.data):
        return True
    return len(sizes) == 1 and filecmp.cmp(Path(one.data), Path(other.data), shallow=False)


def share_seen(calibration: Tokens, held_out: Tokens) -> float:
    """The share of the held-out text, in runs of `RUN` tokens, that is in the calibration text."""
    wanted = list(_runs(held_out, RUN))
    sought = set(wanted)
    seen = {run for run in _runs(calibration, 1) if run in sought}
    return sum(run in seen for run in wanted) / len(wanted) if wanted else 0.0


def _runs(sequences: Tokens, step: int) -> Iterator[tuple[int, ...]]:
    for sequence in sequences:
        for begin in range(0, len(sequence) - RUN + 1, step):
            yield tuple(sequence[begin : begin + RUN])


def cautions_before(recipe: Recipe) -> tuple[str, ...]:
    """What the recipe alone tells, before any text is drawn."""
    if names := common_sources(recipe):
        return (
            f"calibration and held-out text come from one source, {', '.join(names)}: the run "
            "tells how much of it is drawn for both",
        )
    return ()


def cautions(calibration: Tokens, held_out: Tokens) -> tuple[str, ...]:
    """What is to be told of the text that was drawn; nothing if calibration saw less than
    TOLD_SHARE of it."""
    share = share_seen(calibration, held_out)
    if share < TOLD_SHARE:
        return ()
    percent = f"{share:.0%}".replace("%", " %")
    return (
        f"caution: calibration saw {percent} of the held-out text (runs of {RUN} tokens), "
        "so the gates judge the result in part on what it was made from; give validation.data "
        "other text",
    )
