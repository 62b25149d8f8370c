"""Quantise the plain linears of one loaded layer: attention, dense MLP, shared expert.

N tokens, C columns (in features), R rows (out features). Linears that are given one and the same
tensor (q, k and v; gate and up) share a Hessian, and are rows of one matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from math import sqrt
from types import TracebackType
from typing import cast

import torch
from torch import Tensor, nn

from se_compress.artifacts import SOURCE_BITS, ExpertId, ExpertRecord, LinearRecord, Scheme
from se_compress.compression.stacks import (
    Packed,
    check_moments,
    grid_of,
    output_energy,
    pack_in_place,
    packed_rows,
    solve_stack,
)
from se_compress.formats import FORMATS
from se_compress.quant.grid import dequantize
from se_compress.quant.hessian import accumulate_hessian
from se_compress.recipe import Quantization

# Tokens that a shared expert is given at once.
PIECE_TOKENS = 4096
# Name of a weight in the checkpoint -> path of its linear in the layer.
PathOf = Callable[[str], str]


@dataclass(frozen=True)
class SolvedLinear:
    """A plain linear after quantisation.

    name         of its weight in the checkpoint
    tensors      its packed matrix, by that name
    tokens       that it saw
    damping, fallback   see SolvedStack
    lost, whole  output energy per token, tr(dW H dW') and tr(W H W'), over its inputs
    """

    name: str
    bits: int
    tensors: Packed
    tokens: int
    damping: float
    lost: float
    whole: float
    fallback: str

    @property
    def record(self) -> LinearRecord:
        error = joint_error([self])
        return LinearRecord(self.name, self.bits, self.tokens, self.damping, error, self.fallback)


def joint_error(linears: Sequence[SolvedLinear]) -> float:
    """Relative output error of several linears together."""
    whole = sum(linear.whole for linear in linears)
    return sqrt(max(0.0, sum(linear.lost for linear in linears)) / whole) if whole else 0.0


def quantize_linears(
    module: nn.Module,
    path_of: PathOf,
    stages: Sequence[Mapping[str, int]],
    run: Callable[[], object],
    scheme: Scheme,
    rule: Quantization,
) -> list[SolvedLinear]:
    """Quantise plain linears of a loaded layer on what they see in `run`.

    stages  name of the weight in the checkpoint -> its bits; a later stage sees what the quantised
            linears of the earlier ones let through
    run     runs the layer, or the part of it that the linears are in, on calibration text
    """
    done: list[SolvedLinear] = []
    for bits in filter(None, stages):
        linears = {name: cast(nn.Linear, module.get_submodule(path_of(name))) for name in bits}
        moments = _InputMoments(linears)
        with moments:
            run()
        for names, hessian, tokens in moments.groups():
            together = {name: linears[name] for name in names}
            done += _quantize_together(together, bits, hessian, tokens, scheme, rule)
    return done


def quantize_shared(
    module: nn.Module,
    path_of: PathOf,
    identity: ExpertId,
    stages: Sequence[Mapping[str, int]],
    hidden: Tensor,
    scheme: Scheme,
    rule: Quantization,
) -> tuple[Packed, ExpertRecord]:
    """Quantise the shared expert of a loaded layer: gate and up, then down.

    stages as in `quantize_linears`, one of them may be empty; hidden [N, H] is its input
    """
    first = next(name for stage in stages for name in stage)
    shared = module.get_submodule(path_of(first).rpartition(".")[0])

    def run() -> None:
        for piece in torch.split(hidden, PIECE_TOKENS):
            shared(piece)

    done = quantize_linears(module, path_of, stages, run, scheme, rule)
    gate_up, down = ([solved for solved in done if solved.name in stage] for stage in stages)
    tensors: Packed = {}
    for linear in done:
        tensors |= linear.tensors
    record = ExpertRecord(
        layer=identity.layer,
        expert=identity.expert,
        bits=gate_up[0].bits if gate_up else SOURCE_BITS,
        tokens=done[0].tokens,
        prior_share=0.0,
        damping=max(linear.damping for linear in done),
        error_gate_up=joint_error(gate_up),
        error_down=joint_error(down),
        fallback=next((linear.fallback for linear in done if linear.fallback), ""),
    )
    return tensors, record


# ------------------------------------------------------------------------------------ what they see


class _InputMoments:
    """Second moments [C, C] of what linears are given while this is entered.

    Linears that are given one and the same tensor (q, k and v; gate and up) share a moment. Which
    ones do is seen when they run, so that no table of families has to say it.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._first: dict[str, str] = {}  # linear -> the first one that sees the same
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._latest: dict[str, Tensor] = {}  # first one -> what it was given last

    def __enter__(self) -> None:
        self._hooks = [
            linear.register_forward_pre_hook(partial(self._see, name))
            for name, linear in self._linears.items()
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._latest.clear()

    def _see(self, name: str, linear: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Count in the input [..., C] of a linear, once for all that are given the same tensor."""
        given = arguments[0]
        first = next((n for n, seen in self._latest.items() if seen is given), name)
        if self._first.setdefault(name, first) != first:
            raise RuntimeError(f"{name} no longer sees the same as {self._first[name]}")
        if first == name:
            self._latest[name] = given
            flat = given.flatten(0, -2)
            if name not in self._sums:
                size = flat.shape[1]
                self._sums[name] = flat.new_zeros(size, size, dtype=torch.float32)
            accumulate_hessian(self._sums[name], flat)
            self._tokens[name] = self._tokens.get(name, 0) + len(flat)

    def groups(self) -> Iterator[tuple[list[str], Tensor, int]]:
        """Linears that see the same, the mean [C, C] of x x' and the number of tokens."""
        for name in self._linears:
            if name not in self._first:
                raise RuntimeError(f"{name} was never called: it cannot be calibrated")
        for first, moment in self._sums.items():
            names = [name for name in self._linears if self._first[name] == first]
            yield names, moment / max(1, self._tokens[first]), self._tokens[first]


# --------------------------------------------------------------------------------- what they become


def _quantize_together(
    linears: Mapping[str, nn.Linear],
    bits: Mapping[str, int],
    hessian: Tensor,
    tokens: int,
    scheme: Scheme,
    rule: Quantization,
) -> list[SolvedLinear]:
    """Quantise linears that see the same, of mean [C, C], in place; those of equal bits are one
    matrix."""
    if FORMATS[scheme.format].quantize:
        return [
            _pack_linear(name, bits[name], linear, hessian, tokens, scheme)
            for name, linear in linears.items()
        ]
    check_moments(hessian[None], list(linears))
    done: list[SolvedLinear] = []
    for each in sorted({bits[name] for name in linears}):
        alike = {name: linear for name, linear in linears.items() if bits[name] == each}
        done += _replace_linears(alike, hessian, tokens, each, scheme, rule)
    return done


def _replace_linears(
    linears: Mapping[str, nn.Linear],
    hessian: Tensor,
    tokens: int,
    bits: int,
    scheme: Scheme,
    rule: Quantization,
) -> list[SolvedLinear]:
    """Quantise linears with one Hessian [C, C] in place, as rows of one matrix [all R, C]."""
    weights = {name: linear.weight for name, linear in linears.items()}
    tall = torch.cat([weight.float() for weight in weights.values()])
    solved = solve_stack(tall[None], hessian[None], grid_of(bits, scheme), rule)
    rounded = dequantize(solved.stack)[0]
    done: list[SolvedLinear] = []
    ends = accumulate((len(weight) for weight in weights.values()), initial=0)
    for (name, weight), (start, end) in zip(weights.items(), pairwise(ends), strict=True):
        rows = slice(start, end)
        change = rounded[rows] - tall[rows]
        lost, whole = (float(output_energy(w[None], hessian)) for w in (change, tall[rows]))
        weight.copy_(rounded[rows])
        solved_linear = SolvedLinear(
            name=name,
            bits=bits,
            tensors=packed_rows(name, solved.stack, 0, rows, scheme.format),
            tokens=tokens,
            damping=solved.damping[0],
            lost=lost,
            whole=whole,
            fallback=solved.fallback[0],
        )
        done.append(solved_linear)
    return done


def _pack_linear(
    name: str, bits: int, linear: nn.Linear, hessian: Tensor, tokens: int, scheme: Scheme
) -> SolvedLinear:
    """Quantise a linear by the format's own library, in place; the Hessian [C, C] serves to
    measure."""
    before = linear.weight.float().clone()
    tensors = pack_in_place(name, linear.weight, scheme)
    lost, whole = (
        float(output_energy(w[None], hessian)) for w in (linear.weight.float() - before, before)
    )
    return SolvedLinear(name, bits, tensors, tokens, 0.0, lost, whole, "")
