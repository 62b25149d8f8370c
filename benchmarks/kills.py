"""Runs that are killed at random moments, again and again, end with the bytes of one that was not.

    python benchmarks/kills.py [--model tiny] [--kills 100] [--ranks 1,2,3] [--seed 0]

A run is the command line in a process of its own (`--ranks 0`), or in several that torchrun starts.
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
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from processes import (
    ROOT,
    command,
    environment,
    hashes,
    kill_all,
    members,
    recipe_of,
    stage_of,
    watched,
    write_recipe,
)
from results import machine, write_section

LAYERS = 4
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
        """What lies under the output's name."""
        if not os.path.lexists(self.output):
            return NOTHING
        with suppress(OSError):
            there = hashes(self.output)
            if there in (self.earlier, self.new):
                return EARLIER if there == self.earlier else NEW
        return HALF

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
    one    one of the ranks is killed, the others are left to torchrun
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
    said   its last line on stderr
    """

    aim: Aim
    stage: str
    code: int
    found: str
    said: str

    @property
    def wrong(self) -> bool:
        """Neither killed nor finished, or something half under the output's name."""
        if self.found == HALF:
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
    place = prepare(options.model, work)
    runs: list[Run] = []
    for run in killed_again_and_again(place, ranks, options.kills, options.seed):
        runs.append(run)
        print(len(runs), json.dumps(asdict(run)), flush=True)
    text = report(options.model, ranks, options.seed, runs)
    (work / "section.md").write_text(text)
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


def prepare(model: str, work: Path) -> Workplace:
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
    _alone(file, "--set", "policy.bits=8")
    output.rename(kept)
    seconds = _alone(file)
    return Workplace(file, output, kept, hashes(kept), hashes(output), seconds)


def _alone(file: Path, *words: str) -> dict[str, float]:
    """Run to the end; the seconds of each stage."""
    seen = watched(command(0, file, *words))
    if seen.code:
        raise SystemExit(f"the run that nobody kills ends with {seen.code}: {seen.said[-1:]}")
    return seen.spent


# -------------------------------------------------------------------------------------- the killing


def killed_again_and_again(
    place: Workplace, ranks: Sequence[int], kills: int, seed: int
) -> Iterator[Run]:
    """Runs, until so many were killed and the last one came to its end."""
    dice = random.Random(seed)
    done, finished = 0, 0
    while done < kills or not finished:
        place.begin_anew(earlier=finished % 2 == 1)
        while True:
            last = done >= kills
            run = run_and_kill(place, draw(dice, ranks, place.seconds), spare=last)
            yield run
            done += bool(run.stage)
            if not run.stage:
                break
        finished += 1


def draw(dice: random.Random, ranks: Sequence[int], seconds: Mapping[str, float]) -> Aim:
    stages = [stage for stage in STAGES if stage in seconds]
    return Aim(dice.choice(ranks), dice.choice(stages), dice.random(), dice.random() < 0.5)


def run_and_kill(place: Workplace, aim: Aim, spare: bool = False) -> Run:
    """Run and kill it as drawn. `spare`: it is left alone."""
    process = subprocess.Popen(
        command(aim.ranks, place.file),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(1),
        start_new_session=True,
    )
    heard = _Heard()
    listener = threading.Thread(target=_listen, args=(process, heard, aim.stage), daemon=True)
    listener.start()
    killed = "" if spare else _kill(process, heard, aim, place.seconds[aim.stage])
    code = process.wait()
    kill_all(process)  # ranks that it may have left
    listener.join(timeout=30)
    return Run(aim, killed if code else "", code, place.found(), heard.last)


def _listen(process: "subprocess.Popen[str]", heard: _Heard, wanted: str) -> None:
    if wanted == "start":
        heard.reached.set()
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            heard.last = line.strip() or heard.last
            stage = stage_of(line)
            if stage in STAGES:
                heard.stage = stage
            if stage in STAGES and STAGES.index(stage) >= STAGES.index(wanted):
                heard.reached.set()
    heard.reached.set()


def _kill(process: "subprocess.Popen[str]", heard: _Heard, aim: Aim, seconds: float) -> str:
    """The stage that it was in. "" if it had come to its end."""
    heard.reached.wait()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=aim.share * seconds)
        return ""
    stage = heard.stage
    if aim.one and aim.ranks > 1:
        with suppress(ProcessLookupError):
            os.kill(random.Random(aim.share).choice(members(process)), signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # torchrun ends the others
            process.wait(timeout=120)
            return stage
    kill_all(process)
    return stage


# ------------------------------------------------------------------------------------------- report


def report(model: str, ranks: Sequence[int], seed: int, runs: Sequence[Run]) -> str:
    killed = [run for run in runs if run.stage]
    ends = [run for run in runs if not run.stage]
    equal = sum(run.found == NEW and not run.code for run in ends)
    started = "without torchrun" if list(ranks) == [0] else f"ranks {', '.join(map(str, ranks))}"
    head = (
        f"## Killed: {model}\n\n`python benchmarks/kills.py --model {model}`, {machine()}; "
        f"{started}, seed {seed}. {len(killed)} runs killed with SIGKILL, {len(ends)} came to "
        f"their end: {equal} of them with the bytes of a run that was left alone. Under the "
        f"output's name after a kill, half a result: {sum(r.found == HALF for r in killed)} times."
    )
    rows = ["| killed in | times | " + " | ".join((NOTHING, EARLIER, NEW, HALF)) + " |"]
    rows.append("|---|---|---|---|---|---|")
    for stage in STAGES:
        here = Counter(run.found for run in killed if run.stage == stage)
        if here:
            counts = " | ".join(str(here[what]) for what in (NOTHING, EARLIER, NEW, HALF))
            rows.append(f"| {stage} | {here.total()} | {counts} |")
    wrong = [f"- {json.dumps(asdict(run))}" for run in runs if run.wrong]
    return "\n\n".join(filter(None, [head, "\n".join(rows), "\n".join(wrong)]))


if __name__ == "__main__":
    main()
