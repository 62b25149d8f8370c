"""Runs that are killed at random moments, again and again, end with the bytes of one that was not.

    python benchmarks/kills.py [--model tiny] [--kills 100] [--ranks 1,2,3] [--seed 0]

A run is the command line in a process of its own (`--ranks 0`), or in several that torchrun starts;
with --warm they are forked from one that has the libraries, so that kills hit the work itself.
A stage is drawn, and a moment in it as long as the stage took in a run that was left alone; then
SIGKILL goes to all processes, or to one rank. The next run goes on from there, with another number
of ranks if several are given, until one comes to its end before its kill; then it begins anew.
Every second time an earlier result lies in the place of the new one.

After each kill the output is hashed: it is not there, or the earlier result, or the new one, whole.
At the end it is the one of the run that was left alone, file for file (SHA-256), but for times.

Models: tiny (tests/tiny.py, with a super expert), and smollm2-moe's first LAYERS layers.
"""

import argparse
import json
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from processes import (
    ROOT,
    Group,
    hashes,
    recipe_of,
    stage_of,
    start,
    write_recipe,
)
from results import machine, write_section

LAYERS = 4
PATIENCE = 60.0  # seconds in which ranks have to notice that one is gone
STAGES = (
    "start",
    "profile",
    "sensitivity",
    "confirm",
    "compress",
    "validate",
    "generate",
    "reload",
    "hash",
)
PROFILING = STAGES[1:4]
NOTHING, EARLIER, NEW, HALF = "nothing", "the earlier result", "the new result", "HALF A RESULT"


@dataclass(frozen=True)
class Workplace:
    """Where the runs are, and what they are held to.

    file      the recipe
    output    its output
    kept      a copy of the earlier result
    earlier   hashes of its files
    new       hashes of the files that the recipe makes, by a run that was left alone
    seconds   what that one spent in each stage
    """

    file: Path
    output: Path
    kept: Path
    earlier: Mapping[str, str]
    new: Mapping[str, str]
    seconds: Mapping[str, float]

    def found(self) -> str:
        """What lies under the output's name; if that is no whole result, what of the new one it
        does not have."""
        if not os.path.lexists(self.output):
            return NOTHING
        try:
            there = hashes(self.output)
        except OSError as error:
            return f"{HALF}: {error}"
        if there in (self.earlier, self.new):
            return EARLIER if there == self.earlier else NEW
        names = sorted({*self.new, *there})
        return f"{HALF}: {', '.join(n for n in names if self.new.get(n) != there.get(n))}"

    def begin_anew(self, earlier: bool) -> None:
        for old in self.output.parent.glob(f"{self.output.name}*"):
            shutil.rmtree(old)
        if earlier:
            shutil.copytree(self.kept, self.output)


@dataclass(frozen=True)
class Aim:
    """When a run is killed.

    ranks  of the run; 0: no torchrun
    stage  in which, or in the first later one that it has
    share  of the stage's time that passes first
    one    one of the ranks is killed, and the others have to end for that
    """

    ranks: int
    stage: str
    share: float
    one: bool


@dataclass(frozen=True)
class Run:
    """What became of it.

    stage  the last that it told of, if it was killed; "" if it came to its end
    code   its exit code
    found  what lay under the output's name afterwards
    said   the last line on stderr
    stayed one rank was killed, and the others did not end for that
    """

    aim: Aim
    stage: str
    code: int
    found: str
    said: str
    stayed: bool = False

    @property
    def wrong(self) -> bool:
        """Neither killed nor finished, ranks that stay, or half a result under its name."""
        if self.found.startswith(HALF) or self.stayed:
            return True
        return not self.stage and (self.code != 0 or self.found != NEW)


@dataclass
class _Heard:
    stage: str = "start"
    last: str = ""
    reached: threading.Event = field(default_factory=threading.Event)


def main() -> None:
    options = _options()
    work = Path(options.work or ROOT / "out" / f"kills-{options.model}").resolve()
    ranks = [int(count) for count in options.ranks.split(",")]
    place = prepare(options.model, work, options.warm)
    runs: list[Run] = []
    for run in killed_again_and_again(place, ranks, options.kills, options.seed, options.warm):
        runs.append(run)
        print(len(runs), json.dumps(asdict(run)), flush=True)
        (work / "section.md").write_text(report(options.model, ranks, options.seed, runs))
    text = report(options.model, ranks, options.seed, runs)
    print(text)
    if not options.dry:
        write_section(f"kills-{options.model}", text)
    sys.exit(any(run.wrong for run in runs))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tiny", choices=MODELS)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", default="0", help="by comma; 0: one process without torchrun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", action="store_true", help="forked, see processes.py")
    parser.add_argument("--work", default="")
    parser.add_argument("--dry", action="store_true", help="RESULTS.md stays as it is")
    return parser.parse_args()


# ------------------------------------------------------------------------------------- preparations


def build_tiny(directory: Path, family: str = "qwen3_moe", **changes: int) -> None:
    """A tiny model of a family, with a super expert."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    tiny.build(directory, family, **changes)
    tiny.save_tokenizer(directory, bos=True)
    tiny.plant(directory, 1, 2)


def cut_reference(directory: Path) -> None:
    """smollm2-moe's first layers."""
    from safetensors.torch import load_file, save_file

    source = ROOT / "models" / "smollm2-moe"
    directory.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, directory)
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}
    (directory / "config.json").write_text(json.dumps(config))
    gone = tuple(f"model.layers.{n}." for n in range(LAYERS, 200))
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


MODELS: Mapping[str, tuple[Callable[[Path], None], int, int]] = {
    "tiny": (build_tiny, 8, 64),
    "smollm2": (cut_reference, 8, 256),
}


def prepare(model: str, work: Path, warm: bool) -> Workplace:
    """The model, the recipe, an earlier result and the new one, each by a run left alone."""
    build, samples, length = MODELS[model]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    build(work / "model")
    output, kept = work / "out", work / "earlier"
    settings = recipe_of(
        work / "model",
        output,
        samples,
        length,
        quantization={"method": "gptq", "group_size": 32},
        policy={"bits": 4, "lift_layers": True},
    )
    file = write_recipe(work / "recipe.yaml", settings)
    _alone(file, warm, "--set", "policy.bits=8")
    output.rename(kept)
    seconds = _alone(file, warm)
    return Workplace(file, output, kept, hashes(kept), hashes(output), seconds)


def _alone(file: Path, warm: bool, *words: str) -> dict[str, float]:
    """Run to the end; the seconds of each stage."""
    group, heard, last = start(0, file, warm, *words), _Heard(), time.monotonic()
    spent: dict[str, float] = {}
    for line in group.said:
        now = time.monotonic()
        spent[heard.stage] = spent.get(heard.stage, 0.0) + now - last
        heard.stage, last = stage_of(line) or heard.stage, now
        heard.last = line.strip() or heard.last
    if code := group.wait(None):
        raise SystemExit(f"the run that nobody kills ends with {code}: {heard.last}")
    return spent


# -------------------------------------------------------------------------------------- the killing


def killed_again_and_again(
    place: Workplace, ranks: Sequence[int], kills: int, seed: int, warm: bool
) -> Iterator[Run]:
    """Runs, until so many were killed and the last one came to its end."""
    dice = random.Random(seed)
    done, finished = 0, 0
    while done < kills or not finished:
        replaces = finished % 2 == 1
        place.begin_anew(replaces)
        early = not replaces  # a profile is taken from an earlier result
        while True:
            last = done >= kills
            aim = draw(dice, ranks, place.seconds, early)
            run, early = run_and_kill(place, aim, warm, spare=last), False
            yield run
            done += bool(run.stage)
            if not run.stage:
                break
        finished += 1


def draw(
    dice: random.Random, ranks: Sequence[int], seconds: Mapping[str, float], early: bool
) -> Aim:
    """When the next run is killed. `early`: while it makes the profile."""
    stages = [stage for stage in (PROFILING if early else STAGES) if stage in seconds]
    return Aim(dice.choice(ranks), dice.choice(stages), dice.random(), dice.random() < 0.5)


def run_and_kill(place: Workplace, aim: Aim, warm: bool, spare: bool = False) -> Run:
    """Run and kill it as drawn. `spare`: it is left alone."""
    group = start(aim.ranks, place.file, warm)
    heard = _Heard()
    listener = threading.Thread(target=_listen, args=(group, heard, aim.stage), daemon=True)
    listener.start()
    killed, stayed = ("", False) if spare else _kill(group, heard, aim, place.seconds[aim.stage])
    code = group.wait(None) or 0
    group.kill()  # what they may have left
    listener.join(timeout=30)
    return Run(aim, killed if code else "", code, place.found(), heard.last, stayed)


def _listen(group: Group, heard: _Heard, wanted: str) -> None:
    if wanted == "start":
        heard.reached.set()
    for line in group.said:
        heard.last = line.strip() or heard.last
        stage = stage_of(line)
        if stage in STAGES:
            heard.stage = stage
        if stage in STAGES and STAGES.index(stage) >= STAGES.index(wanted):
            heard.reached.set()
    heard.reached.set()


def _kill(group: Group, heard: _Heard, aim: Aim, seconds: float) -> tuple[str, bool]:
    """The stage that it was in ("" if it had come to its end), and whether others stayed."""
    heard.reached.wait()
    if group.wait(aim.share * seconds) is not None:
        return "", False
    stage = heard.stage
    if aim.one and aim.ranks > 1:
        group.kill(int(aim.share * 1000))
        if group.wait(PATIENCE) is not None:
            return stage, False
    group.kill()
    return stage, aim.one and aim.ranks > 1


# ------------------------------------------------------------------------------------------- report


def report(model: str, ranks: Sequence[int], seed: int, runs: Sequence[Run]) -> str:
    killed = [run for run in runs if run.stage]
    ends = [run for run in runs if not run.stage]
    equal = sum(run.found == NEW and not run.code for run in ends)
    started = "without torchrun" if list(ranks) == [0] else f"ranks {', '.join(map(str, ranks))}"
    half = sum(run.found.startswith(HALF) for run in killed)
    head = (
        f"## Killed: {model}\n\n`python benchmarks/kills.py --model {model}`, {machine()}; "
        f"{started}, seed {seed}. {len(killed)} runs killed with SIGKILL, {len(ends)} came to "
        f"their end: {equal} of them with the bytes of a run that was left alone. Under the "
        f"output's name after a kill, half a result: {half} times."
    )
    rows = ["| killed in | times | " + " | ".join((NOTHING, EARLIER, NEW, HALF)) + " |"]
    rows.append("|---|---|---|---|---|---|")
    for stage in STAGES:
        here = Counter(run.found.partition(":")[0] for run in killed if run.stage == stage)
        if here:
            counts = " | ".join(str(here[what]) for what in (NOTHING, EARLIER, NEW, HALF))
            rows.append(f"| {stage} | {here.total()} | {counts} |")
    wrong = [f"- {json.dumps(asdict(run))}" for run in runs if run.wrong]
    return "\n\n".join(filter(None, [head, "\n".join(rows), "\n".join(wrong)]))


if __name__ == "__main__":
    main()
