"""Memory and time of a run, at the real shapes of two large models and as each number doubles.

    python benchmarks/scale.py [--parts qwen3,deepseek,growth] [--work out/scale]

qwen3     two layers of Qwen3-30B-A3B's shape, 128 experts each: GPTQ at 4 bits, under 2 GB.
qwen3-few the same with 16 experts, one a token: as many tokens an expert, in an eighth of the time.
deepseek  a dense and a MoE layer of DeepSeek-V3's, 256 experts: rounding to 4 bits, under 6 GB. The
          model takes 24 GB of disk, the result 7 more; both go afterwards (--keep).
growth    a smaller shape, and the same with twice the experts, layers, tokens: seconds of the whole
          run and of its stages, memory.

Weights are random, and those of experts repeat (synthetic.py); the vocabulary is small, as
embedding and head are no part of what is asked here. A run is the command line in a process of its
own, from profile to published result, but for the reload (vLLM is asked for it, which is not
installed); one thread. Memory is anonymous memory, looked at every 20 ms (processes.py), beside
what the run said before it began that it would take. --most is the memory, in GB, at which a run is
ended and said to be too large. --under is a command that runs each process, e.g. `cgexec -g
memory:two`, a control group with 2.2 GB for all that the kernel counts: generation keeps layers as
the free memory allows.
"""

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from processes import ROOT, Seen, command, recipe_of, watched, write_recipe
from results import machine, write_section
from synthetic import DEEPSEEK_V3, QWEN3_30B, SMALL, Shape, write_model

_UNITS = {"MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Case:
    """One run.

    shape     the model
    samples   calibration sequences, of `length` tokens
    method    of quantisation, at 4 bits
    dtype     compute_dtype
    allowed   bytes that it may take; 0: no bar
    """

    shape: Shape
    samples: int = 32
    length: int = 256
    method: str = "gptq"
    dtype: str = "float32"
    allowed: float = 0.0

    @property
    def tokens(self) -> int:
        return self.samples * self.length


QWEN3 = Case(QWEN3_30B, allowed=2e9)
DEEPSEEK = Case(DEEPSEEK_V3, samples=16, method="rtn", dtype="bfloat16", allowed=6e9)
BASE = Case(SMALL, samples=64)
GROWTH = {
    "base": BASE,
    "twice the experts": replace(BASE, shape=replace(SMALL, experts=2 * SMALL.experts)),
    "twice the layers": replace(BASE, shape=replace(SMALL, layers=2 * SMALL.layers)),
    "twice the tokens": replace(BASE, samples=2 * BASE.samples),
}
# As much on a block of experts and on each of them, in an eighth of the time.
FEW = replace(
    QWEN3,
    shape=replace(QWEN3_30B, experts=16, config={**QWEN3_30B.config, "num_experts_per_tok": 1}),
)
LARGE = {"qwen3": QWEN3, "qwen3-few": FEW, "deepseek": DEEPSEEK}


def main() -> None:
    options = _options()
    work = Path(options.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    for part in options.parts.split(","):
        cases = GROWTH if part == "growth" else {part: LARGE[part]}
        for name, case in cases.items():
            _keep(work, name, run(name, case, work, options))
    text = report(found_in(work))
    print(text)
    if not options.dry:
        write_section("scale", text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default="qwen3,deepseek,growth")
    parser.add_argument("--work", default=str(ROOT / "out" / "scale"))
    parser.add_argument("--most", type=float, default=14.0, help="GB at which a run is ended")
    parser.add_argument("--under", default="", help="a command that runs each process")
    parser.add_argument("--keep", action="store_true", help="models and results stay")
    parser.add_argument("--dry", action="store_true", help="RESULTS.md stays as it is")
    return parser.parse_args()


# ------------------------------------------------------------------------------------- measurements


def run(name: str, case: Case, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make a model, run the case, and return what was seen."""
    place = work / name.replace(" ", "-")
    model = write_model(case.shape, place / "model")
    output = place / "out"
    for old in place.glob("out*"):
        shutil.rmtree(old)
    recipe = recipe_of(
        model,
        output,
        case.samples,
        case.length,
        compute_dtype=case.dtype,
        policy={"bits": 4},
        quantization={"method": case.method, "group_size": 128},
    )
    file = write_recipe(place / "recipe.yaml", recipe)
    words = [*options.under.split(), *command(0, file, "--json")]
    seen = watched(words, int(options.most * 1e9))
    made = (output / "config.json").exists()
    if not options.keep:
        shutil.rmtree(model)
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(place / "out.partial", ignore_errors=True)
    found = {**asdict(seen), "stated": stated(seen), "made": made, "under": options.under}
    print(name, json.dumps({**found, "said": seen.said[-3:]}), flush=True)
    return found


def stated(seen: Seen) -> float | None:
    """Bytes that the run said it would take. None if it said nothing of it."""
    for line in seen.said:
        if match := re.search(r"memory: ([\d.]+) ([MG]B) at the most", line):
            return float(match[1]) * _UNITS[match[2]]
    return None


def found_in(work: Path) -> dict[str, Any]:
    file = work / "found.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _keep(work: Path, name: str, found: dict[str, Any]) -> None:
    (work / "found.json").write_text(json.dumps({**found_in(work), name: found}, indent=1))


# ------------------------------------------------------------------------------------------- report


def report(found: Mapping[str, Any]) -> str:
    parts = [
        f"## Scale\n\n`python benchmarks/scale.py`, {machine()}, one thread. Anonymous memory."
    ]
    large = [_large_row(name, case, found[name]) for name, case in LARGE.items() if name in found]
    if large:
        head = (
            "| shape | experts | tokens | method | peak | stated before | allowed | by stage |\n"
            "|---|---|---|---|---|---|---|---|"
        )
        parts.append("\n".join([head, *large]))
    if "base" in found:
        head = (
            "| run | seconds | of the base | memory | of the base | stages, of the base |\n"
            "|---|---|---|---|---|---|"
        )
        rows = [_growth_row(n, found[n], found["base"]) for n in GROWTH if n in found]
        parts.append("\n".join([head, *rows]))
    return "\n\n".join(parts)


def _large_row(name: str, case: Case, seen: Mapping[str, Any]) -> str:
    config = case.shape.config
    said = "-" if seen["stated"] is None else f"{seen['stated'] / 1e9:.2f} GB"
    stages = ", ".join(f"{one} {size / 1e9:.2f}" for one, size in seen["by_stage"].items())
    under = f" (`{seen['under']}`)" if seen["under"] else ""
    ended = "" if seen["made"] else f" (ended with {seen['code']})"
    cells = [
        f"{name}: hidden {config['hidden_size']}, experts of {config['moe_intermediate_size']}, "
        f"{case.shape.layers} layers",
        str(case.shape.experts),
        str(case.tokens),
        f"{case.method}, {case.dtype}",
        f"{seen['peak'] / 1e9:.2f} GB{under}{ended}",
        said,
        f"{case.allowed / 1e9:.0f} GB",
        stages,
    ]
    return f"| {' | '.join(cells)} |"


def _growth_row(name: str, seen: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    stages = ", ".join(
        f"{stage} {seen['spent'][stage] / seconds:.2f}"
        for stage, seconds in base["spent"].items()
        if seconds > 1.0 and stage in seen["spent"]
    )
    cells = [
        name,
        f"{seen['seconds']:.1f}",
        f"{seen['seconds'] / base['seconds']:.2f}",
        f"{seen['peak'] / 1e9:.2f} GB",
        f"{seen['peak'] / base['peak']:.2f}",
        stages,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
