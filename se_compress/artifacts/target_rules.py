"""What a row of the table of targets says: the shape of the facts, not the facts (targets.py)."""

from dataclasses import dataclass
from typing import Literal, get_args

Granularity = Literal["projection", "expert", "layer", "model"]
# From the finest to the coarsest.
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True)
class Need:
    """What some widths ask of the machine that serves them, and of the command that starts it.

    widths    of experts, beside SOURCE_BITS
    hardware  on which the engine has a kernel for them
    flag      to be given to it; "" for none
    mixed     the flag is needed only where layers are of several widths
    """

    widths: tuple[int, ...]
    hardware: str
    flag: str = ""
    mixed: bool = False


@dataclass(frozen=True)
class TargetRules:
    """What one engine loads of one format.

    methods          quantisation methods whose codes the format holds
    widths           bits that experts may have, beside SOURCE_BITS
    granularity      what may have a width of its own: a projection; an expert; a layer, all experts
                     and projections alike; or nothing, all experts of the model alike
    group_sizes      columns that may share a scale; -1 is a whole row
    asymmetric       it loads groups with a zero point of their own
    row_multiple     a matrix needs this many rows (or a multiple) to be packed
    column_multiple  and this many columns
    unfused_names    tensors go by their names in the live model with its experts unfused
    source           where the facts are from
    dense_mlp        it loads packed matrices of dense MLPs
    fused            plain linears that it loads as one: those of a layer need one width
    falls_back       where it computes in float16, whatever config.json says; "" for nowhere
    versions         of the engine and what it takes to read the file, for which the facts hold
    needs            what the widths ask of the machine, by width; each width is in one at least
    proven           what was run; "" where the engine's code was read only
    hidden_multiple  the model's hidden width is a multiple of this
    plain_routing    routers that choose by biased scores (DeepSeek-V3) have no kernel
    model_types      model types whose files it was seen to load right, or read to do so; None: all
    one_spelling     the file serves engines that look for different names: only families whose
                     names are the same in all of them
    """

    target: str
    format: str
    methods: tuple[str, ...]
    widths: tuple[int, ...]
    granularity: Granularity
    group_sizes: tuple[int, ...]
    asymmetric: bool
    row_multiple: int
    column_multiple: int
    unfused_names: bool
    source: str
    dense_mlp: bool = True
    fused: tuple[frozenset[str], ...] = ()
    falls_back: str = ""
    versions: str = ""
    needs: tuple[Need, ...] = ()
    proven: str = ""
    hidden_multiple: int = 1
    plain_routing: bool = False
    one_spelling: bool = False
    model_types: frozenset[str] | None = None
