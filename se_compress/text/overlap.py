"""Is the held-out text really held out, and is it of more than one kind?

What calibration has seen as well proves less. It is told and not refused: whose only text is one
file draws both from it, mostly from different places. And what one domain shows of a pruned or
merged model may not hold in another.
"""

import filecmp
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from se_compress.artifacts import CompressionPlan, TextRecord, digest_of
from se_compress.errors import one_line
from se_compress.recipe import DataSource, Recipe

FILES = (".txt", ".jsonl", ".parquet")  # what ends so is a file, and no data set of the Hub
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


def missing_text(recipe: Recipe) -> tuple[str, ...]:
    """Files of text that are not there: a dry run needs none of them, a run all."""
    sections = {"calibration": recipe.calibration, "validation": recipe.validation}
    return tuple(
        f"{name}.data: {one_line(source.data)} does not exist; a run stops there with exit code 3"
        for name, section in sections.items()
        for source in section.data
        if Path(source.data).suffix.lower() in FILES and not os.path.exists(source.data)
    )


def cautions(calibration: Tokens, held_out: Tokens | Mapping[str, Tokens]) -> tuple[str, ...]:
    """What is to be told of the text that was drawn; nothing of a domain of which calibration saw
    less than TOLD_SHARE."""
    return tuple(
        _seen_in_words(share, name)
        for name, text in by_domain(held_out).items()
        if (share := share_seen(calibration, text)) >= TOLD_SHARE
    )


def _seen_in_words(share: float, domain: str) -> str:
    percent = f"{share:.0%}".replace("%", " %")
    whose = f" of domain {domain}" if domain else ""
    return (
        f"caution: calibration saw {percent} of the held-out text{whose} (runs of {RUN} tokens), "
        "so the gates judge the result in part on what it was made from; give validation.data "
        "other text"
    )


def by_domain(held_out: Tokens | Mapping[str, Tokens]) -> Mapping[str, Tokens]:
    """Held-out text by domain; without names it is one text, called ""."""
    return held_out if isinstance(held_out, Mapping) else {"": held_out}


def text_records(
    recipe: Recipe, calibration: Tokens, held_out: Tokens | Mapping[str, Tokens]
) -> tuple[TextRecord, ...]:
    """Which text a run drew for what, and what of the held-out text calibration saw."""
    seen = {digest_of(sequence) for sequence in calibration}
    named = recipe.calibration.domain_names
    records = [
        TextRecord(
            role="calibration",
            domain=", ".join(named),
            sources=tuple(source.data for source in recipe.calibration.data),
            sequences=len(calibration),
            digest=digest_of(calibration),
        )
    ]
    for name, text in by_domain(held_out).items():
        records.append(
            TextRecord(
                role="held-out",
                domain=name,
                sources=tuple(source.data for source in recipe.validation.of(name).data),
                sequences=len(text),
                digest=digest_of(text),
                repeated=sum(digest_of(sequence) in seen for sequence in text),
                seen=share_seen(calibration, text),
                calibrated=name in named if name and named else None,
            )
        )
    return tuple(records)


def domain_cautions(plan: CompressionPlan, recipe: Recipe) -> tuple[str, ...]:
    """What the domains of the held-out text cannot tell."""
    return (*_twins(recipe), *_narrow(plan, recipe))


def _twins(recipe: Recipe) -> Iterator[str]:
    """Two names for one text make one domain of it."""
    for one, other in combinations(recipe.validation.data, 2):
        if one.domain != other.domain and one.column == other.column and _same(one, other):
            yield (
                f"caution: domains {one.domain} and {other.domain} of validation.data are one "
                f"text, {one_line(other.data)}, so the second tells nothing new; give it other text"
            )


def _narrow(plan: CompressionPlan, recipe: Recipe) -> tuple[str, ...]:
    """What one domain cannot tell of a result that has fewer experts."""
    gone = {one.action for one in plan.experts} & {"prune", "merge"}
    if not gone or len(recipe.validation.domain_names) > 1:
        return ()
    done = "pruned" if "prune" in gone else "merged"
    return (
        f"caution: experts were {done}, and the result was judged on one domain of text alone; "
        "elsewhere it may be far worse (measured by others on a 35B model: KL 0.033 in the domain "
        "that calibration saw, 0.483 in another); name several domains in validation.data",
    )
