"""Several processes at one run: the ranks of torch.distributed.

    torchrun --nproc-per-node 2 -m se_compress recipe.yaml

Rank 0 leads. It alone reads the recipe, decides, shows what happens and publishes. Where there is
work to share, it has the other ranks run the same stage (`call`); they do nothing else (`follow`).
Within a stage every rank does its part of the work, and `exchange` gives each all parts in one
order, so that no number depends on how many ranks there are.

Everything goes in rounds, in which each rank says one thing to all. A rank that raises an error
says that, and all raise it. A rank that is gone is noticed in the next round.

Whatever starts the processes sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; nothing else is
read, but LOCAL_RANK for the number of the GPU. All ranks see the same files.
"""

import io
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from se_compress.artifacts import ModelSource, Ranks, RunOptions
from se_compress.errors import RecipeError, ResourceError, SourceError
from se_compress.opening.source import open_source

if TYPE_CHECKING:
    from torch import Tensor

Part = TypeVar("Part")
Item = TypeVar("Item")
# All ranks come within START of each other, or none goes on: nobody notices one that dies before
# they are connected. Later a rank may wait for another one's tasks of hours, and one that has died
# is noticed at once.
START, PATIENCE = timedelta(minutes=10), timedelta(days=7)
ALIGNMENT = 16  # bytes
ALIKE = ("se-compress", "torch", "transformers")


class RankLost(ResourceError):
    """Another rank has ended, or does something else."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"another rank of this run has ended ({reason}); the same command continues where it "
            "stopped, with any number of ranks"
        )


class Dismissed(Exception):
    """Rank 0 has ended."""

    def __init__(self, code: int) -> None:
        super().__init__(f"rank 0 has ended with code {code}")
        self.code = code


# ------------------------------------------------------------------------------------ come and go


@cache
def join() -> Ranks:
    """Join the others, once: the ranks that this process was started with, or one alone.

    Raises RecipeError if the environment says something else than ranks, or if they do not all
    have the same versions.
    """
    if int(_setting("WORLD_SIZE", "1")) == 1:
        return Ranks()
    ranks = Ranks(int(_setting("RANK", "0")), int(_setting("WORLD_SIZE", "1")))
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.count, timeout=START)
        _group()
    except (RuntimeError, ValueError) as error:
        raise RecipeError(f"RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: {error}") from None
    import torch

    mine = {name: version(name) for name in ALIKE} | {
        "python": ".".join(map(str, sys.version_info[:2])),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for other, theirs in enumerate(exchange(ranks, lambda: mine)):
        for name, value in mine.items():
            if theirs[name] != value:
                raise RecipeError(
                    f"rank {other} has {name} {theirs[name]}, and rank {ranks.rank} has {value}: "
                    "their results would differ"
                )
    return ranks


@cache
def _group() -> Any:
    """All ranks, as a group that waits as long as work may take."""
    import torch.distributed as dist

    return dist.new_group(timeout=PATIENCE)


def leads() -> bool:
    """Whether this process is rank 0, which alone says anything."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0 or os.environ.get("WORLD_SIZE", "1") == "1"


def _setting(name: str, default: str) -> str:
    value = os.environ.get(name, default)
    if not value.isdecimal():
        raise RecipeError(f"the environment's {name} is {value!r}: a number is needed")
    return value


def local_device(device: str) -> str:
    """The device of this process where a run is on `device`: each on a machine has its own GPU."""
    return f"cuda:{_setting('LOCAL_RANK', '0')}" if device == "cuda" else device


# ---------------------------------------------------------------------------------------- rounds


@dataclass(frozen=True)
class _Said:
    """What a rank says in a round.

    part   its part of a work that is shared
    error  what it raised instead
    call   a stage that rank 0 calls, and its arguments
    wait   it waits for a call; with the error that ended its last stage, if there was one
    end    rank 0 ends, with an exit code
    """

    kind: Literal["part", "error", "call", "wait", "end"]
    value: Any


def exchange(ranks: Ranks, work: Callable[[], Part]) -> list[Part]:
    """Do this rank's part of a work. Returns the parts of all ranks, in their order.

    Raises what the first of them raised, on all; RankLost if one has ended; on other ranks than 0
    Dismissed if that has.
    """
    if ranks.count == 1:
        return [work()]
    try:
        mine = _Said("part", work())
    except Exception as error:
        mine = _Said("error", error)
    said = _round(ranks, mine)
    if said[0].kind == "end":
        raise Dismissed(said[0].value)
    for one in said:
        if one.kind != "part" and one.value is not None:
            raise one.value
        if one.kind != "part":
            raise RankLost("it is out of step")
    return [one.value for one in said]


def spread(ranks: Ranks, items: Sequence[Item], work: Callable[[Item], Part]) -> Iterator[Part]:
    """What `work` makes of each item, in their order; the ranks take turns.

    Raises as `exchange` does.
    """
    if ranks.count == 1:
        yield from map(work, items)
        return
    parts = exchange(ranks, lambda: [work(item) for item in items[ranks.rank :: ranks.count]])
    turns = [iter(part) for part in parts]
    for at in range(len(items)):
        yield next(turns[at % ranks.count])


def first(ranks: Ranks, work: Callable[[], Part]) -> Part:
    """What `work` gives on rank 0, which does it for all."""
    return exchange(ranks, lambda: work() if ranks.rank == 0 else None)[0]  # type: ignore[return-value]


def owners(ranks: Ranks, costs: Sequence[float]) -> list[int]:
    """The rank that does each of some pieces of work, by what they cost.

    The longest come first, each to the rank that has least to do. That decides who works, and no
    number.
    """
    load = [0.0] * ranks.count
    found = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        found[piece] = load.index(min(load))
        load[found[piece]] += costs[piece]
    return found


def _round(ranks: Ranks, mine: _Said) -> list[_Said]:
    """What each rank says, in their order. Raises RankLost."""
    import torch
    import torch.distributed as dist

    data = _packed(mine)
    try:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.count)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=_group())
        said = []
        for rank, size in enumerate(sizes):
            theirs = data if rank == ranks.rank else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(theirs, rank, group=_group())
            said.append(mine if rank == ranks.rank else _unpacked(theirs))
    except RuntimeError as error:
        raise RankLost(str(error).partition("\n")[0][:120]) from None
    return said


class _Pickler(pickle.Pickler):
    """Pickles all but tensors, whose bytes it keeps apart: what is large is copied once.

    flat  the bytes of each tensor, uint8
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.flat: list[Tensor] = []
        self._known: dict[int, tuple[object, ...]] = {}  # and sent once
        self._alive: list[object] = []  # ids are of what lives

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        import torch

        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self._known:
            dtype = str(value.dtype).removeprefix("torch.")
            form = (len(self.flat), dtype, tuple(value.shape), value.is_cuda)
            self._known[id(value)] = form
            self._alive.append(value)
            # its own values only: a view would bring all that it is a view of
            self.flat.append(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
        return self._known[id(value)]


class _Unpickler(pickle.Unpickler):
    """Makes views of the bytes of tensors that came with what is unpickled.

    parts  those bytes, uint8
    """

    def __init__(self, file: io.BytesIO, parts: Sequence["Tensor"]) -> None:
        super().__init__(file)
        self._parts = parts

    def persistent_load(self, form: tuple[int, str, tuple[int, ...], bool]) -> "Tensor":
        import torch

        place, dtype, shape, is_cuda = form
        made = self._parts[place].view(getattr(torch, dtype)).reshape(shape)
        return made.cuda() if is_cuda else made


def _packed(said: _Said) -> "Tensor":
    """Bytes, uint8: the sizes of all parts, what is pickled, and the tensors."""
    import torch

    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(said)
    parts = [torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8), *pickler.flat]
    sizes = torch.tensor([len(parts), *map(len, parts)]).view(torch.uint8)
    places = list(_places([len(sizes), *map(len, parts)]))
    data = torch.zeros(places[-1].stop + -places[-1].stop % ALIGNMENT, dtype=torch.uint8)
    for place, part in zip(places, [sizes, *parts], strict=True):
        data[place] = part
    return data


def _places(sizes: Iterable[int]) -> Iterator[slice]:
    """Where parts of so many bytes lie, so that each may be of any dtype."""
    at = 0
    for size in sizes:
        yield slice(at, at + size)
        at += size + -size % ALIGNMENT


def _unpacked(data: "Tensor") -> _Said:
    import torch

    head = 8 * (1 + int(data[:8].view(torch.int64)))
    sizes = data[:head].view(torch.int64)[1:].tolist()
    _, *places = _places([head, *sizes])
    parts = [data[place] for place in places]
    said: _Said = _Unpickler(io.BytesIO(parts[0].numpy().tobytes()), parts[1:]).load()
    return said


# -------------------------------------------------------------------------------- lead and follow


def call(ranks: Ranks, stage: Callable[..., object], *arguments: object) -> None:
    """Have the other ranks run a stage, while rank 0 does so too; nothing on these others.

    Raises RankLost if one of them is not there for it.
    """
    if ranks.count > 1 and ranks.rank == 0:
        said = _round(ranks, _Said("call", (stage, [*map(_sent, arguments)])))
        for one in said[1:]:
            if one.kind != "wait":
                raise RankLost("it is out of step")


def dismiss(ranks: Ranks, code: int) -> None:
    """Let the other ranks end with an exit code."""
    if ranks.count > 1 and ranks.rank == 0:
        _round(ranks, _Said("end", code))


def follow(ranks: Ranks) -> int:
    """Run what rank 0 calls, until that ends. Returns its exit code.

    What a stage raises, rank 0 raises too, and tells.
    """
    ended_with: Exception | None = None
    while True:
        try:
            leader = _round(ranks, _Said("wait", ended_with))[0]
        except RankLost as lost:
            return lost.exit_code
        if leader.kind == "end":
            return int(leader.value)
        if leader.kind != "call":
            continue
        stage, arguments = leader.value
        ended_with = None
        try:
            received = [_received(argument, ranks) for argument in arguments]
            stage(*received)
        except Dismissed as dismissed:
            return dismissed.code
        except RankLost as lost:
            return lost.exit_code
        except Exception as error:
            ended_with = error


def _sent(argument: object) -> object:
    """An argument of a stage, without what only the leading process can do."""
    if isinstance(argument, RunOptions):
        return replace(argument, notice=_leave_it, progress=_leave_it)
    return argument


def _leave_it(*said: object) -> None:
    """Rank 0 tells and shows."""


def _received(argument: object, ranks: Ranks) -> object:
    """The same on another rank. Raises SourceError if it sees another model than rank 0."""
    if isinstance(argument, RunOptions):
        return replace(argument, ranks=ranks, device=local_device(argument.device))
    if isinstance(argument, ModelSource):
        seen = open_source(str(argument.path))
        if seen.digest != argument.digest:
            raise SourceError(f"{seen.path}: rank {ranks.rank} sees other files than rank 0")
    return argument
