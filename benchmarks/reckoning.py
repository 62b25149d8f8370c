"""What a run is made of, counted from a model's sizes, and what that takes on a machine: the
arithmetic of project.py. Nothing is run here.

Micro-batches of sequences have a home rank; blocks of experts have an owner, by longest processing
time first; the rows of a token go to the owner of each of its experts, and the outputs come home.
Every stage reads each weight once. Reading, decoding and copying to the device run ahead of the
work, so that a stage takes as long as the slowest of them.
"""

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from units import Units

VARIANTS = 6  # streams of `confirm`: three super experts, and a random one beside each
LOSS_TOKENS, LOSS_ROWS, MEASURED_WIDTHS = 512, 768, 4
ROUNDS = 2
BLOCK = 8  # experts that are worked on together
SKEW = 0.5  # of the logarithm of tokens per expert: assumed
STATE_BYTES = 4  # of a hidden value: compute_dtype is float32
WORKING_SET = 9 * 4 * 2**29  # bytes of the solver on a GPU, quant/gptq.py
STAGES = ("profile", "sensitivity", "confirm", "compress", "validate")


@dataclass(frozen=True)
class Text:
    """Tokens of each stage: those of a recipe, and those that profiling/ takes of them."""

    calibration: int = 256 * 512
    held_out: int = 32 * 256
    sensitivity: int = 512
    confirm: int = 8 * 512


DEFAULTS = Text()


@dataclass(frozen=True)
class Sizes:
    """A model, as far as costs depend on it. `attention` and `dense` are weights of one layer."""

    name: str
    layers: int
    dense_layers: int
    hidden: int
    inner: int
    experts: int
    chosen: int
    shared: int  # neurons of the shared expert
    attention: int
    dense: int
    vocabulary: int
    weight_bytes: int  # on disk

    @property
    def expert(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden * self.inner

    @property
    def routed(self) -> int:
        return self.experts * self.expert

    @property
    def layer(self) -> int:
        """Weights of one MoE layer."""
        return self.routed + 3 * self.hidden * self.shared + self.attention

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers


QWEN3 = Sizes("Qwen3-235B-A22B", 94, 0, 4096, 1536, 128, 8, 0, 71_303_168, 0, 151936, 2)
DEEPSEEK = Sizes(
    "DeepSeek-V3", 61, 3, 7168, 2048, 256, 8, 2048, 187_105_280, 3 * 7168 * 18432, 129280, 1
)


@dataclass(frozen=True)
class Place:
    """Where it would run: nodes, devices in each, and the rates of each device, per second.

    link  bytes between devices of a node, of each device; net: between nodes, of each device
    bus   bytes from the host to a device; disk: of a node; cores: of a node, for decoding
    """

    nodes: int
    devices: int
    memory: float
    rates: Mapping[str, float]
    bandwidth: float
    link: float = 450e9
    net: float = 50e9
    bus: float = 50e9
    disk: float = 3e9
    cores: int = 16

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def name(self) -> str:
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{nodes}{self.devices} x {self.memory / 1e9:.0f} GB"


H100 = {"float32": 67e12, "bfloat16": 989e12}  # data sheet, dense
PLACES = tuple(
    Place(nodes, devices, 80e9, H100, 3.35e12, cores=16 * devices)
    for nodes, devices in ((1, 1), (1, 8), (4, 8))
)


@dataclass(frozen=True)
class Costs:
    """Seconds, and what they are spent on: part -> seconds of the busiest rank; parts that run
    beside each other are compared, not added."""

    parts: Mapping[str, float]
    read: float  # bytes from disk, all nodes
    traffic: float  # bytes between ranks, all of them

    @property
    def seconds(self) -> float:
        ahead = max(self.parts[name] for name in ("disk", "decoding", "bus"))
        return max(ahead, self.parts["arithmetic"] + self.parts["rounding"] + self.parts["traffic"])

    @property
    def bottleneck(self) -> str:
        work = self.parts["arithmetic"] + self.parts["rounding"] + self.parts["traffic"]
        ahead = {name: self.parts[name] for name in ("disk", "decoding", "bus")}
        first = max(ahead, key=lambda name: ahead[name])
        if ahead[first] >= work:
            return first
        inside = {name: self.parts[name] for name in ("arithmetic", "rounding", "traffic")}
        return max(inside, key=lambda name: inside[name])


# ------------------------------------------------------------------------------------------- counts


def longest_first(costs: Sequence[float], ranks: int) -> float:
    """The load of the busiest of `ranks` owners, if the longest goes first to the least busy."""
    loads = [0.0] * ranks
    for cost in sorted(costs, reverse=True):
        heapq.heappush(loads, heapq.heappop(loads) + cost)
    return max(loads)


def tokens_of_experts(sizes: Sizes, tokens: int, seed: int = 0) -> list[float]:
    """How many tokens each expert sees: skewed as a lognormal of SKEW."""
    dice = random.Random(seed)
    draws = [dice.lognormvariate(0.0, SKEW) for _ in range(sizes.experts)]
    return [tokens * sizes.chosen * draw / sum(draws) for draw in draws]


def solver_flops(sizes: Sizes) -> float:
    """Sweeps and refits of one expert, see quant/gptq.py."""
    passes = 5 + 4 * ROUNDS
    hidden, inner = sizes.hidden, sizes.inner
    return float(passes * (hidden**2 * 2 * inner + inner**2 * hidden))


def share_of_rows(sizes: Sizes) -> float:
    """Share of an expert's weights that the profile rounds, see profiling/losses.py."""
    upper, lower = (min(1.0, LOSS_ROWS / rows) for rows in (sizes.inner, sizes.hidden))
    return (2 * upper + lower) / 3


def of_blocks(values: Sequence[float]) -> list[float]:
    return [sum(values[at : at + BLOCK]) for at in range(0, len(values), BLOCK)]


def stage_of_layer(
    stage: str,
    sizes: Sizes,
    place: Place,
    found: Units,
    forks: float,
    dtype: str,
    text: Text = DEFAULTS,
) -> Costs:
    """One MoE layer in one stage; `forks`: streams that run beside the source's, on average."""
    tokens = {
        "profile": text.calibration,
        "sensitivity": text.sensitivity * (2 + forks),
        "confirm": text.confirm * (1 + VARIANTS),
        "compress": 2 * text.calibration,
        "validate": 2 * text.held_out,
    }[stage]
    rate = place.rates[dtype] * found.shares[f"forward {dtype}"]
    scale = place.bandwidth / found.copied  # of work that is bound by memory
    seen = tokens_of_experts(sizes, int(tokens))
    blocks = [2 * sizes.expert * count / rate for count in seen]
    if stage == "profile":
        some = (min(LOSS_TOKENS, count) for count in seen)
        again = 2 * sizes.expert * (MEASURED_WIDTHS + 1) / rate
        blocks = [cost + n * again for cost, n in zip(blocks, some, strict=True)]
    if stage == "compress":
        full, share = place.rates["float32"], found.shares
        hessian = place.rates[dtype] * share[f"hessian {dtype}"]
        squares = sizes.hidden**2 + sizes.inner**2
        cubes = (sizes.hidden**3 + sizes.inner**3) / 3
        fixed = cubes / (full * share["factorisation"])
        fixed += solver_flops(sizes) / (full * share["update"])
        once = tokens_of_experts(sizes, text.calibration)
        blocks = [a + fixed + n * squares / hessian for a, n in zip(blocks, once, strict=True)]
    plain = 2 * tokens * (sizes.attention + 3 * sizes.hidden * sizes.shared) / rate / place.ranks
    owned = longest_first(of_blocks(blocks), place.ranks)
    measured = MEASURED_WIDTHS * share_of_rows(sizes)
    rounded = {"profile": measured, "sensitivity": 1, "compress": 0}.get(stage, 0)
    elementwise = sizes.routed * rounded / (found.rounded * scale)
    if stage in ("compress", "validate"):
        elementwise += sizes.routed / (found.packed * scale)
    sides = 2 if stage == "validate" else 1  # the result is read as well, at a quarter of 16 bits
    read = sizes.layer * sizes.weight_bytes + (sides - 1) * (
        sizes.routed * 4.25 / 8 + 2 * (sizes.layer - sizes.routed)
    )
    coded = sizes.layer if sizes.weight_bytes == 1 else 0
    sent = 2 * tokens * sizes.chosen * sizes.hidden * STATE_BYTES * (1 - 1 / place.ranks)
    return Costs(
        {
            "disk": read / place.nodes / place.disk,
            "decoding": coded / place.nodes / (found.decoded / found.threads * place.cores),
            "bus": 2 * sizes.layer * sides / place.ranks / place.bus,
            "arithmetic": plain + owned,
            "rounding": elementwise / place.ranks,
            "traffic": sent / place.ranks / slowest_link(place),
        },
        read,
        sent,
    )


def slowest_link(place: Place) -> float:
    """Bytes a second that leave a device, rows spread evenly over all others."""
    if place.ranks == 1:
        return float("inf")
    outside = (place.ranks - place.devices) / (place.ranks - 1)
    return 1 / (outside / place.net + (1 - outside) / place.link)


def head_seconds(sizes: Sizes, place: Place, found: Units, dtype: str) -> float:
    """Logits: of each fork of `sensitivity`, of the variants, of both models."""
    text = DEFAULTS
    tokens = text.sensitivity * sizes.moe_layers + text.confirm * (1 + VARIANTS)
    tokens += 2 * text.held_out
    rate = place.rates[dtype] * found.shares[f"forward {dtype}"]
    return 2.0 * tokens * sizes.hidden * sizes.vocabulary / rate / place.ranks


def memory(sizes: Sizes, place: Place) -> float:
    """Bytes that a device holds at most, while experts are solved."""
    states = 3 * DEFAULTS.calibration / place.ranks * sizes.hidden * STATE_BYTES
    rows = DEFAULTS.calibration * min(1.0, sizes.chosen / place.ranks) * sizes.hidden * STATE_BYTES
    squares = sizes.hidden**2 + sizes.inner**2
    one = 4 * (squares + sizes.expert)
    solver = min(WORKING_SET, 9 * 4 * BLOCK * sizes.hidden * (sizes.hidden + 2 * sizes.inner))
    return states + rows + BLOCK * one + solver + 4 * sizes.attention


@dataclass(frozen=True)
class Total:
    """A model on a place: seconds by stage, and what names its limits."""

    sizes: Sizes
    place: Place
    stages: Mapping[str, Costs]
    head: float

    @property
    def seconds(self) -> float:
        return self.head + sum(cost.seconds for cost in self.stages.values())

    @property
    def memory(self) -> float:
        return memory(self.sizes, self.place)

    @property
    def bottleneck(self) -> str:
        longest = max(self.stages, key=lambda stage: self.stages[stage].seconds)
        return f"{self.stages[longest].bottleneck} ({longest})"


def project(sizes: Sizes, place: Place, found: Units, dtype: str = "float32") -> Total:
    stages = {}
    for stage in STAGES:
        forks = (sizes.moe_layers - 1) / 2
        one = stage_of_layer(stage, sizes, place, found, forks, dtype)
        many = sizes.moe_layers
        parts = {name: many * seconds for name, seconds in one.parts.items()}
        dense = sizes.dense_layers * (sizes.attention + sizes.dense) * sizes.weight_bytes
        ends = 2 * sizes.vocabulary * sizes.hidden * 2
        parts["disk"] += (dense + ends) / place.nodes / place.disk
        stages[stage] = Costs(parts, many * one.read + dense + ends, many * one.traffic)
    return Total(sizes, place, stages, head_seconds(sizes, place, found, dtype))
