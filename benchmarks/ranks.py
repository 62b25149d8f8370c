"""The bytes of a result do not depend on how many processes computed it, and what they gain.

    python benchmarks/ranks.py [--models qwen3_moe,...,smollm2-moe] [--parts equal,killed,speed]

equal   one recipe with a variant for each method and format, pruned and merged ones too, run by
        1, 2 and 3 ranks that torchrun starts, and without torchrun: SHA-256 of every file of every
        result, but for times. Tiny models of every family (tests/tiny.py, with a super expert), and
        smollm2-moe.
killed  started with 2 ranks, killed (SIGKILL) in the middle of compressing, finished with 3.
speed   seconds of 2 ranks with a thread each against 1 rank with a thread and one process with
        two, by turns, --rounds times; the whole run and the stages that go by layers. smollm2-moe,
        whose experts of 64 neurons cost little beside what ranks have to tell of them, and
        qwen3-few: two layers of Qwen3-30B-A3B's shape with 16 experts, one a token (scale.py).

What a target does not load of a family is left out, and said; --variants names some of all, and
what was measured of others is kept. --ranks 0 is a process without torchrun, which all others are
held to.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kills import build_tiny
from processes import (
    ROOT,
    command,
    ended,
    hashes,
    recipe_of,
    start,
    watched,
    write_recipe,
)
from results import machine, write_section
from scale import FEW
from synthetic import write_model

# Two routing groups, so that each can lose an expert.
CHANGES = {"deepseek_v3": {"n_group": 2, "topk_group": 1}}
FAST = ("smollm2-moe", "qwen3-few")
TINY = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3")
INTEGER = {"quantization": {"method": "gptq", "group_size": 32}}
NONE = {"quantization": {"method": "none"}}
# What loads the result is asked of vLLM, which is not installed; transformers and GPTQModel are.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "gptq": INTEGER,
    "asymmetric": {"quantization": {**INTEGER["quantization"], "symmetric": False}},
    "gptq-format": {"quantization": {**INTEGER["quantization"], "format": "gptq"}},
    "rtn": {"quantization": {**INTEGER["quantization"], "method": "rtn"}},
    "refined": {"quantization": {**INTEGER["quantization"], "refine": {"steps": 4}}},
    "all-tokens": {**INTEGER, "calibration": {"routing": "all"}},
    "everything": {**INTEGER, "policy": {"other_bits": 8}},
    "bfloat16": {**INTEGER, "compute_dtype": "bfloat16"},
    "pruned": {**INTEGER, "policy": {"prune": {"fraction": 0.25}}},
    "merged": {**INTEGER, "policy": {"merge": {"fraction": 0.25}}},
    "pruned-only": {**NONE, "policy": {"prune": {"fraction": 0.25}}},
    "repaired": {**INTEGER, "policy": {"prune": {"fraction": 0.25}, "repair": True}},
    "merged-only": {**NONE, "policy": {"merge": {"fraction": 0.25}}},
    "zeroed": {**NONE, "policy": {"zero": "random"}},
    "gptqmodel": {
        "target": "gptqmodel",
        "quantization": {**INTEGER["quantization"], "format": "gptq_v2"},
        "validation": {"reload": {"engine": "auto"}},
    },
    "auto-round": {
        "target": "transformers",
        "quantization": {**INTEGER["quantization"], "format": "auto-round"},
        "validation": {"reload": {"engine": "auto"}},
    },
    "nf4": {
        "target": "transformers",
        "quantization": {"method": "bitsandbytes", "block_size": 32},
        "validation": {"reload": {"engine": "auto"}},
    },
}
# Of the last three the result is loaded for real, half a minute each: for one family only.
RELOADED = ("gptqmodel", "auto-round", "nf4")


def main() -> None:
    options = _options()
    work = Path(options.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    ranks = [int(count) for count in options.ranks.split(",")]
    parts = options.parts.split(",")
    for name in options.models.split(","):
        if "equal" in parts and name != "qwen3-few":
            wanted = options.variants.split(",")
            found = equal(name, ranks, work, options.warm, wanted)
            _keep(work, f"equal {name}", _with_others(found, found_in(work).get(f"equal {name}")))
        if "killed" in parts and name != "qwen3-few":
            _keep(work, f"killed {name}", killed(name, work, options.warm))
        if "speed" in parts and name in FAST:
            speed(name, options.rounds, work)
    text = report(found_in(work))
    print(text)
    if not options.dry:
        write_section("ranks", text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join((*TINY, "smollm2-moe")))
    parser.add_argument("--ranks", default="0,1,2,3")
    parser.add_argument("--parts", default="equal,killed,speed")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of the part equal")
    parser.add_argument("--warm", action="store_true", help="forked, see processes.py")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", default=str(ROOT / "out" / "ranks"))
    parser.add_argument("--dry", action="store_true", help="RESULTS.md stays as it is")
    return parser.parse_args()


# ------------------------------------------------------------------------------------ preparations


def model_of(name: str, work: Path) -> Path:
    if name == "smollm2-moe":
        return ROOT / "models" / name
    directory = work / "models" / name
    if name == "qwen3-few":
        return write_model(FEW.shape, directory)
    if not directory.exists():
        build_tiny(directory, name, **CHANGES.get(name, {}))
    return directory


def settings(name: str, output: Path, work: Path, **sections: Any) -> dict[str, Any]:
    """The recipe of a model without variants, with more sections."""
    samples, length = (16, 256) if name in FAST else (8, 64)
    return recipe_of(
        model_of(name, work),
        output,
        samples,
        length,
        policy={"bits": 4, "lift_layers": True},
        **sections,
    )


def loaded_variants(name: str, work: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The variants that can be made of a model, and why the others cannot."""
    from se_compress.errors import RecipeError
    from se_compress.pipeline import preview
    from se_compress.recipe import parse_recipe
    from se_compress.request import Request

    base = settings(name, work / "unused", work)
    taken, refused = {}, {}
    for variant, own in VARIANTS.items():
        if variant in RELOADED and name != "qwen3_moe":
            continue
        try:
            data = {**base, "variants": {variant: own}}
            one = parse_recipe(data, variant).variants[variant]
            preview(Request(one, "", notice=lambda sentence: None))
            taken[variant] = own
        except RecipeError as error:
            refused[variant] = str(error)
    return taken, refused


# ------------------------------------------------------------------------------------------- equal


def equal(
    name: str, ranks: Sequence[int], work: Path, warm: bool, wanted: Sequence[str] = tuple(VARIANTS)
) -> dict[str, Any]:
    """Of each of some variants, the numbers of ranks whose files are those of the first, and how
    many."""
    taken, refused = loaded_variants(name, work)
    taken = {variant: own for variant, own in taken.items() if variant in wanted}
    found: dict[str, dict[str, dict[str, str]]] = {}
    codes: dict[str, int] = {}
    for count in ranks:
        output = work / f"{name}-{count}"
        _clear(output)
        data = {**settings(name, output, work), "variants": taken}
        file = write_recipe(work / f"{name}-{count}.yaml", data)
        code, said = ended(start(count, file, warm))
        codes[str(count)] = code
        if code:
            print(f"{name}, {count} ranks: ended with {code}: {said}", flush=True)
        for variant in taken:
            there, made = found.setdefault(variant, {}), output / variant
            if (made / "config.json").exists():
                there[str(count)] = hashes(made)
        shutil.rmtree(output, ignore_errors=True)
    return {"codes": codes, "refused": refused, "variants": differences(found, ranks)}


def _with_others(found: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """With the variants that an earlier run, with the same numbers of ranks, has measured."""
    if before is None or before["codes"].keys() != found["codes"].keys():
        return found
    return {**found, "variants": {**before["variants"], **found["variants"]}}


def differences(
    found: Mapping[str, Mapping[str, Mapping[str, str]]], ranks: Sequence[int]
) -> dict[str, dict[str, list[str]]]:
    """Variant -> number of ranks -> the files that are not those of the first number; "no result"
    where there is none.

    found  variant -> number of ranks -> hash of each file
    """
    differs: dict[str, dict[str, list[str]]] = {}
    for variant, by_count in found.items():
        first = by_count.get(str(ranks[0]), {})
        differs[variant] = {}
        for count in map(str, ranks):
            there = by_count.get(count)
            differs[variant][count] = (
                ["no result"]
                if there is None
                else sorted(f for f in {*first, *there} if first.get(f) != there.get(f))
            )
    return differs


def _clear(output: Path) -> None:
    for old in output.parent.glob(f"{output.name}*"):
        if old.is_dir():
            shutil.rmtree(old)


# ------------------------------------------------------------------------------------------ killed


def killed(name: str, work: Path, warm: bool) -> dict[str, Any]:
    """A run of 2 ranks that is killed behind the second layer that it compresses, finished by 3."""
    alone, output = work / f"{name}-alone", work / f"{name}-killed"
    for place in (alone, output):
        _clear(place)
    first = write_recipe(work / f"{name}-alone.yaml", settings(name, alone, work, **INTEGER))
    whole = ended(start(0, first, warm))
    file = write_recipe(work / f"{name}-killed.yaml", settings(name, output, work, **INTEGER))
    mark = output.with_name(f"{output.name}.partial") / "compress-layer-00001.json"
    died = ended(start(2, file, warm), until=mark.exists)
    half = output.exists()
    last = ended(start(3, file, warm))
    good = whole[0] == last[0] == 0 and died[0] != 0 and not half
    same = good and hashes(output) == hashes(alone)
    for place in (alone, output):
        _clear(place)
    return {"ends": [whole, died, last], "half": half, "same": same}


# ------------------------------------------------------------------------------------------- speed

WAYS = {
    "1 rank, 1 thread": (1, 1),
    "2 ranks, 1 thread each": (2, 1),
    "1 process, 2 threads": (0, 2),
}
WORK_STAGES = ("profile", "sensitivity", "confirm", "compress", "validate")


def speed(name: str, rounds: int, work: Path) -> None:
    """Keep the seconds of each way, of the whole run and of the stages that work on layers, each
    round."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        for way, (count, threads) in list(WAYS.items())[:: 1 if turn % 2 == 0 else -1]:
            output = work / "speed"
            _clear(output)
            file = write_recipe(work / "speed.yaml", settings(name, output, work, **INTEGER))
            seen = watched(command(count, file), threads=threads)
            if seen.code:
                print(f"{way}: ended with {seen.code}: {seen.said[-1:]}", flush=True)
                continue
            spent = {stage: seen.spent.get(stage, 0.0) for stage in WORK_STAGES}
            whole = {"whole": seen.seconds, "layers": sum(spent.values())}
            found[way].append(whole | spent)
            _keep(work, f"speed {name}", found)
    _clear(work / "speed")


# ------------------------------------------------------------------------------------------- report


def found_in(work: Path) -> dict[str, Any]:
    file = work / "found.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _keep(work: Path, name: str, found: dict[str, Any]) -> None:
    print(name, json.dumps(found), flush=True)
    (work / "found.json").write_text(json.dumps({**found_in(work), name: found}, indent=1))


def report(found: Mapping[str, Any]) -> str:
    parts = [f"## Ranks\n\n`python benchmarks/ranks.py`, {machine()}."]
    same = {name.partition(" ")[2]: one for name, one in found.items() if name.startswith("equal")}
    if same:
        parts.append("\n".join(_equal_rows(same)))
    ends = {name.partition(" ")[2]: one for name, one in found.items() if name.startswith("killed")}
    if ends:
        rows = ["| started with 2, killed, finished with 3 | the same bytes |", "|---|---|"]
        rows += [f"| {name} | {'yes' if one['same'] else '**no**'} |" for name, one in ends.items()]
        parts.append("\n".join(rows))
    for name, one in found.items():
        if name.startswith("speed"):
            parts += [f"### Speed: {name.partition(' ')[2]}", "\n".join(_speed_rows(one))]
    return "\n\n".join(parts)


def _equal_rows(same: Mapping[str, Any]) -> list[str]:
    rows = [
        "| model | variants | ranks | differ | not loaded by the target |",
        "|---|---|---|---|---|",
    ]
    for name, one in same.items():
        wrong = [
            f"{variant} with {count}: {', '.join(files)}"
            for variant, counts in one["variants"].items()
            for count, files in counts.items()
            if files
        ]
        wrong += [
            f"{count} ranks: exit code {code}" for count, code in one["codes"].items() if code
        ]
        cells = [
            name,
            f"{len(one['variants'])}: {', '.join(one['variants'])}",
            ", ".join(count if count != "0" else "no torchrun" for count in one["codes"]),
            "; ".join(wrong) or "none",
            ", ".join(one["refused"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _speed_rows(found: Mapping[str, Any]) -> list[str]:
    """Medians over the rounds, and what one rank takes over them."""
    parts = ("whole", "layers", *WORK_STAGES)
    titles = ("the whole run", "from layer to layer", *WORK_STAGES)
    rows = [f"| seconds | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    first = found[next(iter(WAYS))]
    for way, runs in found.items():
        cells = [f"{way} ({len(runs)} rounds)"]
        for part in parts:
            here, base = (median([run[part] for run in some] or [0.0]) for some in (runs, first))
            cells.append(f"{here:.1f} ({base / here:.2f})" if here else "-")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    main()
