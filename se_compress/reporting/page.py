"""What all pages share: numbers for people, checks in words, the verdict, templates and charts.

A chart is Plotly's own JSON without colours: the page takes them from its style sheet, so that they
follow the reader's light or dark scheme. One rule comes before all others: a check that was not run
is never shown as passed, nor is one whose limit nothing can miss.
"""

import html
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from se_compress.artifacts import (
    GATES,
    GONE,
    SOURCE_BITS,
    Check,
    ExpertDecision,
    Rescue,
    Scheme,
    Side,
    ValidationReport,
    unlimited,
)

Figure = dict[str, Any]
State = Literal["passed", "failed", "not-run", "no-limit"]

LISTED_EXPERTS = 60
NO_BREAK = "\u00a0"
SIZE_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
WORDS: Mapping[State, tuple[str, str]] = {
    "passed": ("✓", "Passed"),
    "failed": ("✕", "Failed"),
    "not-run": ("○", "Not run"),
    "no-limit": ("∞", "No limit"),
}


@dataclass(frozen=True)
class CheckInWords:
    """One check in words, with the title and the meaning of its gate. `value` and `limit` stay as
    they are, for machines that read the page; `side` and `interval` are "" where there is none."""

    name: str
    title: str
    meaning: str
    side: Side | Literal[""]
    value: float | None
    value_text: str
    limit: float | None
    limit_text: str
    state: State
    detail: str
    interval: str = ""

    @property
    def symbol(self) -> str:
        return WORDS[self.state][0]

    @property
    def word(self) -> str:
        return WORDS[self.state][1]


@dataclass(frozen=True)
class Verdict:
    """`state` "not-run" means that no check could be run, so that nothing is proven."""

    state: State
    symbol: str
    word: str
    sentences: tuple[str, ...]


def template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("se_compress.reporting", "templates"),
        autoescape=lambda template: template is None or not template.endswith(".md.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "size": size,
        "count": count,
        "listed": listed,
        "width": width,
        "fate": fate,
        "without": without_protection,
        "scheme": scheme,
        "mean": lambda values: statistics.fmean(values),
        "plain": plain_text,
        "token": token_text,
    }
    return environment.get_template(name)


# ------------------------------------------------------------------------------ numbers for people


def number(value: float | None, apart_from: float | None = None) -> str:
    """Three significant digits, thousands grouped; more where two different numbers would otherwise
    look the same, such as a value just beyond its limit."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    for digits in range(3, 17):
        text = _rounded(value, digits)
        if apart_from is None or value == apart_from or text != _rounded(apart_from, digits):
            break
    return text


def _rounded(value: float, digits: int) -> str:
    decimals = max(0, digits - 4)
    if round(abs(value), decimals) >= 1000:
        return f"{value:,.{decimals}f}"
    return f"{value:.{digits}g}"


def percent(value: float | None, apart_from: float = 1.0) -> str:
    """A share as a percentage; "100 %" is kept for what is exactly all of it."""
    if value is None or not math.isfinite(value):
        return number(value)
    return number(100 * value, 100 * apart_from) + f"{NO_BREAK}%"


def size(value: float) -> str:
    """Bytes in decimal units, as disks and download pages count."""
    for unit, factor in SIZE_UNITS:
        if value >= factor:
            return f"{number(value / factor)}{NO_BREAK}{unit}"
    return f"{value:.0f}{NO_BREAK}B"


def count(amount: int, thing: str) -> str:
    """ "1 expert", "2 experts"."""
    return f"{amount:,} {thing}" if amount == 1 else f"{amount:,} {thing}s"


def listed(identities: Iterable[object]) -> str:
    """Names in a row; of very many the first, and how many more there are."""
    names = [str(identity) for identity in identities]
    more = len(names) - LISTED_EXPERTS
    return ", ".join(names[:LISTED_EXPERTS]) + (f" and {more:,} more" if more > 0 else "")


def width(bits: int | None) -> str:
    if not bits:
        return "pruned"
    return "16 bits (as in the source)" if bits == SOURCE_BITS else f"{bits} bits"


def scheme(scheme: Scheme) -> str:
    """A plan's scheme in words."""
    if scheme.method == "none":
        return scheme.method
    scales = "one scale per row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    if scheme.data_type is None:
        zeros = "symmetric" if scheme.symmetric else "asymmetric"
        return f"{scheme.method}, {scales}, {zeros}"
    double = ", double quantisation" if scheme.double_quant else ""
    return f"{scheme.method} {scheme.data_type}, {scales.replace('groups', 'blocks')}{double}"


def fate(decision: ExpertDecision | None) -> str:
    if decision is None:
        return "has no line in the plan"
    if decision.action in GONE:
        return f"was {GONE[decision.action]}"
    new = f" and is now expert {decision.becomes}" if decision.becomes is not None else ""
    if decision.bits == SOURCE_BITS:
        return f"keeps the source's precision{new}"
    return f"has {decision.bits} bits{new}"


def without_protection(rescue: Rescue) -> str:
    if rescue.action in GONE:
        return f"would be {GONE[rescue.action]}"
    return f"would have {rescue.bits} bits"


def plain_text(text: object) -> str:
    """Text of which neither Markdown nor HTML makes anything."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escaped)


def token_text(text: str) -> str:
    """A token by itself, in which spaces and line ends can be seen."""
    return text.replace("\n", "⏎").replace(" ", "·") or "(nothing)"


# ------------------------------------------------------------------------------------ the verdict


def describe_gates(validation: ValidationReport) -> tuple[CheckInWords, ...]:
    """Every check in words; a name that only `not_run` knows gets a line too."""
    known = {check.name for check in validation.checks}
    missing = [Check(name, None, None, None) for name in validation.not_run if name not in known]
    return tuple(describe_check(check) for check in (*validation.checks, *missing))


def describe_check(check: Check) -> CheckInWords:
    gate = GATES.get(check.name)
    value, limit = check.value, check.limit
    apart = math.inf if limit is None else limit
    text = percent if gate and gate.percent else number
    states: dict[bool | None, State] = {True: "passed", False: "failed", None: "not-run"}
    return CheckInWords(
        name=check.name,
        title=gate.title if gate else check.name.replace("_", " ").capitalize(),
        meaning=gate.meaning if gate else "",
        side=gate.side if gate else "",
        value=value,
        value_text=text(value, apart),
        limit=limit,
        limit_text=text(limit),
        state="no-limit" if unlimited(check) else states[check.passed],
        detail=check.detail,
        interval=_interval(check.low, check.high, text),
    )


def _interval(low: float | None, high: float | None, text: Callable[[float], str]) -> str:
    return "" if low is None or high is None else f"{text(low)} to {text(high)}"


def judge(gates: Sequence[CheckInWords], validation: ValidationReport) -> Verdict:
    """Failed if anything failed, passed only if something passed; otherwise nothing is proven."""
    titles = {state: [gate.title for gate in gates if gate.state == state] for state in WORDS}
    failed, not_run, no_limit = titles["failed"], titles["not-run"], titles["no-limit"]
    everything = count(len(gates), "check")
    state: State = "passed"
    if failed or not validation.passed:
        state = "failed"
        named = f": {', '.join(failed)}" if failed else ", yet the validation did not pass"
        first = f"{len(failed)} of {everything} failed{named}. This checkpoint was not published."
    elif not titles["passed"]:
        state = "not-run"
        why = "had a limit" if no_limit else "could be run"
        first = f"No check {why}, so nothing is known about this checkpoint."
    elif not_run or no_limit:
        first = f"{len(titles['passed'])} of {everything} passed and none failed."
    else:
        first = f"All {everything} passed."
    symbol, word = WORDS[state]
    left = {"Not run": not_run, "No limit, so nothing was decided": no_limit}
    remainder = (f"{why}: {', '.join(names)}." for why, names in left.items() if names)
    return Verdict(state, symbol, "Not proven" if state == "not-run" else word, (first, *remainder))


# ------------------------------------------------------------------------------------------- charts


def chart_layout(height: int, across: str, upwards: str) -> dict[str, Any]:
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 52, "r": 12, "t": 12, "b": 48},
        "font": {"size": 12},
        "showlegend": False,
        "xaxis": {"title": {"text": across}, "showgrid": False},
        "yaxis": {"title": {"text": upwards}, "automargin": True},
    }


def short(value: float | None) -> float | None:
    """Four significant digits: what a chart can show. JSON has neither infinity nor NaN."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
