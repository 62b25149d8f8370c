"""The tables of targets, made from the rows of `se_compress/artifacts/targets.py`: a short one for
README.md, and for recipes/TARGETS.md one with all that a row says. `tools/references.py` writes
them.
"""

from collections.abc import Iterator, Sequence

from se_compress.artifacts.target_rules import Need, TargetRules
from se_compress.artifacts.targets import ENGINES, TARGETS

METHODS = {"gptq", "rtn"}


def short_table() -> str:
    """A line for each kind of file of each target; those that hold the same share one."""
    lines = ["| `target` | file | may differ | widths beside 16 | runs on | shown by |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [_short(rows) for rows in _alike() if rows[0].widths]
    plain = [rules for rules in TARGETS if not rules.widths]
    names = ", ".join(f"`{rules.target}`" for rules in plain)
    proofs: dict[str, list[str]] = {}
    for rules in plain:
        proofs.setdefault(_proof([rules]), []).append(f"`{rules.target}`")
    shown = "; ".join(f"{', '.join(whose)}: {proof}" for proof, whose in proofs.items())
    lines.append(f"| {names} | `method: none`: the source's own precision, pruned or merged | | | |"
                 f" {shown} |")  # fmt: skip
    return "\n".join(lines)


def _alike() -> list[list[TargetRules]]:
    """Rows of a target that hold the same widths at the same granularity."""
    found: dict[tuple[object, ...], list[TargetRules]] = {}
    for rules in TARGETS:
        key = (rules.target, rules.methods, rules.widths, rules.granularity, rules.proven)
        found.setdefault(key, []).append(rules)
    return sorted(found.values(), key=lambda rows: list(ENGINES).index(rows[0].target))


def _short(rows: Sequence[TargetRules]) -> str:
    first = rows[0]
    files = ", ".join(f"`{rules.format}`" for rules in rows)
    kinds = dict.fromkeys(need.hardware for rules in rows for need in rules.needs)
    cells = (f"`{first.target}`", files, _differs(first), _numbers(first.widths), "; ".join(kinds))
    return f"| {' | '.join(cells)} | {_proof(rows)} |"


def _differs(rules: TargetRules) -> str:
    words = {"projection": "expert and projection", "model": "nothing: one width for all"}
    return words.get(rules.granularity, rules.granularity)


def _proof(rows: Sequence[TargetRules]) -> str:
    return "; ".join(dict.fromkeys(f"run {rules.proven}" if rules.proven else "read, not run"
                                   for rules in rows))  # fmt: skip


def _numbers(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))


def full_table() -> str:
    """All rows, one after the other, with the source of every fact."""
    return "\n".join(line for rules in TARGETS for line in _full(rules))


def _full(rules: TargetRules) -> Iterator[str]:
    yield f"### `{rules.target}`, `{rules.format}`\n"
    yield f"* {rules.versions}; {_proof([rules])}"
    if rules.widths:
        zeros = "with zero points or without" if rules.asymmetric else "without zero points"
        sizes = ", ".join("a whole row" if size == -1 else str(size) for size in rules.group_sizes)
        one = "one width for all experts" if rules.granularity == "model" else ""
        yield f"* {one or f'a width for each {_differs(rules)}'}; groups of {sizes}; {zeros}"
    yield from (f"* {_need(need)}" for need in rules.needs)
    yield f"* {rules.source}\n"


def _need(need: Need) -> str:
    widths = f"{_numbers(need.widths)} bits: " if need.widths else ""
    when = " where layers are of several widths" if need.mixed else ""
    return f"{widths}{need.hardware}" + (f", with `{need.flag}`{when}" if need.flag else "")
