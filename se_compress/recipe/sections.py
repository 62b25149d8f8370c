"""The sections of a recipe, frozen, with their defaults and what is checked of each by itself.

What stands below the first paragraph of a section's docstring is the reference of its keys: a line
for each, which `tools/references.py` reads.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from se_compress.artifacts import ExpertId
from se_compress.errors import brief
from se_compress.recipe.kinds import (
    Bytes,
    DataType,
    Format,
    Method,
    Natural,
    Output,
    Place,
    Positive,
    Seed,
    Target,
    Width,
    one_or_more,
)
from se_compress.recipe.texts import Calibration, Section, Validation

LEAST_TO_REFINE = 8  # sequences: one each to select and to report


class ExpertName(Section):
    """An expert as a recipe names it.

    layer   index of its decoder layer, from 0, dense layers counted
    expert  its index in the layer, from 0, or shared
    """

    layer: Natural
    expert: Natural | Literal["shared"]

    @property
    def id(self) -> ExpertId:
        return ExpertId(self.layer, self.expert)


class SuperExperts(Section):
    """The published criterion (arXiv:2507.23279, eq. 6) and whether to confirm it by zeroing.

    percentile       a super expert's peak |down_proj output| exceeds this percentile of all
                     experts' peaks
    fraction_of_max  and this share of the greatest peak
    confirm          set each candidate, and another expert of its layer beside it, to zero, and
                     see whether the massive activation vanishes
    expected         those that are known of the model, such as [{layer: 1, expert: 68}]: a profile
                     that finds others says so; until there is one, they are taken for the super
                     experts in estimates
    """

    percentile: Annotated[float, Field(gt=0.0, lt=100.0)] = 99.5
    fraction_of_max: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    confirm: bool = True
    expected: tuple[ExpertName, ...] = ()

    @property
    def expected_ids(self) -> tuple[ExpertId, ...]:
        return tuple(name.id for name in self.expected)

    @field_validator("expected", mode="before")
    @classmethod
    def _list_of_names(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class Prune(Section):
    """Which experts go: the same number in each layer (and routing group), protected ones never.

    fraction   share of the routed experts; auto: what the predicted loss likes best under `size`
    score      those with the least go. reap: routing weight x output norm, mean over an expert's
               tokens (arXiv:2510.13999); frequency: tokens routed to it; gate: routing weight, sum
    """

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | Literal["auto"]
    score: Literal["reap", "frequency", "gate"] = "reap"


class Merge(Section):
    """Which experts become one: the same number of experts is left in each layer (and routing
    group), protected experts stay alone.

    fraction    share of the routed experts that are merged into others
    similarity  output: distance of the mean outputs on calibration tokens (HC-SMoE,
                arXiv:2410.08589), groups by average linkage
    """

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)]
    similarity: Literal["output"] = "output"


class Policy(Section):
    """What may be done to the experts, and under which budget.

    protect          experts that keep `protected_bits` and are never pruned or merged: those that
                     the profile finds, none, or a list such as [{layer: 1, expert: 68}];
                     all-but-super-experts is an experiment: what widths do to super experts alone
    protected_bits   width of the protected experts; 16 is the source's own precision
    bits             widths to choose from; a single number means that width; 16 is the source's own
                     precision
    bits_per_weight  budget over all weights of the experts that are left, scales included
    size             budget for all tensor data of the checkpoint, in bytes or written as 9GB or
                     4.5GiB; not together with `bits_per_weight`
    other_bits       attention, dense MLP, shared experts (those that can be packed); 16 keeps them
    lift_layers      where the target loads one width per layer, true: a whole layer gets
                     `protected_bits` for the protected expert in it; false: the run stops there and
                     says what that would cost
    prune            leave experts out; one of `prune`, `merge`, `zero` and `average` at most
    merge            make one expert of several
    zero             the experiment of arXiv:2507.23279: down_proj of these experts set to zero,
                     nothing renumbered; super-experts, a list of experts, random: as many others
                     of the same layers, or random-anywhere: of any layer, by `zero_seed`
    average          an experiment, what merging does to a few experts alone: super-experts, or a
                     list of experts. Those of a layer and the one that is most like them (as
                     `merge` finds it) become their average, each in its place; nothing is
                     renumbered
    repair           true: experts that `prune` or `merge` leaves make up for those that went. Their
                     down_proj is solved anew by least squares, on calibration text, for what the
                     source's layer puts out; protected ones stay as they are
    zero_seed        of the draw of random experts: seeds that follow each other draw no expert
                     twice until all were drawn
    """

    protect: Literal["super-experts", "none", "all-but-super-experts"] | tuple[ExpertName, ...] = (
        "super-experts"
    )
    protected_bits: Literal[8, 16] = 16
    bits: tuple[Width, ...] = (4,)
    bits_per_weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    size: Bytes | None = None
    other_bits: Width = 16
    lift_layers: bool = False
    prune: Prune | None = None
    merge: Merge | None = None
    zero: Literal["super-experts", "random", "random-anywhere"] | tuple[ExpertName, ...] | None = (
        None
    )
    average: Literal["super-experts"] | tuple[ExpertName, ...] | None = None
    repair: bool = False
    zero_seed: Seed = 0

    @field_validator("protect", "zero", "average", mode="before")
    @classmethod
    def _list_of_experts(cls, value: object, field: ValidationInfo) -> object:
        if isinstance(value, list):
            return tuple(value)
        known = {
            "protect": ("super-experts", "none", "all-but-super-experts"),
            "zero": ("super-experts", "random", "random-anywhere", None),
            "average": ("super-experts", None),
        }
        words = known[str(field.field_name)]
        if value not in words and not isinstance(value, tuple):
            raise ValueError(
                f"{brief(value)} is not {', '.join(filter(None, words))} or a list such as "
                "[{layer: 1, expert: 68}]"
            )
        return value

    @field_validator("bits", mode="before")
    @classmethod
    def _widths(cls, value: object) -> object:
        return tuple(one_or_more(value, "width is needed, for instance [4]"))

    @field_validator("bits", mode="after")
    @classmethod
    def _each_once(cls, value: tuple[Width, ...]) -> tuple[Width, ...]:
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _one_budget(self) -> "Policy":
        if self.bits_per_weight is not None and self.size is not None:
            raise ValueError("give bits_per_weight or size, not both")
        return self

    @model_validator(mode="after")
    def _one_surgery(self) -> "Policy":
        if sum(bool(rule) for rule in (self.prune, self.merge, self.zero, self.average)) > 1:
            raise ValueError("give one of prune, merge, zero and average")
        if self.repair and not (self.prune or self.merge):
            raise ValueError("repair is for what prune or merge leaves, and neither is given")
        if self.prune and self.prune.fraction == "auto" and self.size is None:
            raise ValueError("prune.fraction is auto, which needs size, the budget it is to meet")
        return self

    @property
    def merges(self) -> bool:
        """Whether it has to be known which experts are alike."""
        return bool(self.merge or self.average)


_INTEGER = frozenset(
    ("group_size", "symmetric", "act_order", "scales", "damping", "shrinkage", "refine")
)
_BLOCKS = frozenset(("block_size", "double_quant"))


class Refine(Section):
    """The routed experts of a layer, once quantised, are tuned together on what the layer puts out.

    steps   of the optimiser, for each layer
    tokens  of each step
    """

    steps: Positive
    tokens: Positive = 512


class Distill(Section):
    """The finished result is trained as a whole, in memory, on what the source predicts.

    train      auto: scales of the quantised routed experts, and routers and norms if experts are
               pruned or merged; or a list of scales, routers and norms
    steps      of the optimiser
    sequences  of calibration text in each step
    """

    train: Literal["auto"] | tuple[Literal["scales", "routers", "norms"], ...] = "auto"
    steps: Positive
    sequences: Positive = 4

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if value == "auto":
            return value
        names = one_or_more(value, "part is needed: scales, routers, norms; or auto")
        for name in names:
            if name not in ("scales", "routers", "norms"):
                raise ValueError(f"{brief(name)} is not one of auto, scales, routers, norms")
        return tuple(dict.fromkeys(names))


class Quantization(Section):
    """How a width is reached.

    method        gptq: rounding errors are made good in later columns; rtn: to the nearest;
                  bitsandbytes: its blocks of nf4, fp4 or int8; none: nothing is quantised
    format        of the file; auto: the first one of the target (in recipes/TARGETS.md) that holds
                  these widths, groups and zero points, and loads this type of model
    group_size    input columns that share a scale; -1 means one scale per row
    symmetric     false: each group has a zero point of its own
    act_order     order in which gptq rounds columns. static: those with larger activations first;
                  none: as they come
    scales        activation: those with the least error of a group, in which a column counts by
                  its mean square on calibration text; minmax: those that span its whole range
    damping       share of each input column's mean square that is added to it (raised where the
                  Hessian cannot be factorised): more trusts the calibration text less
    shrinkage     an expert that saw fewer tokens than this times its inputs' dimensions borrows the
                  missing share of its Hessian from its layer; 0: only one that saw none at all does
    refine        tune codes and scales afterwards, so that the layer's output is the source's

    Method bitsandbytes has keys of its own:

    data_type     nf4 and fp4 are 4 bits, int8 is 8 bits with one scale per row
    block_size    weights of a row that share a scale (nf4, fp4)
    double_quant  the scales are quantised as well: 0.37 bits per weight less in blocks of 64
    """

    method: Method = "gptq"
    format: Format = "auto"
    group_size: Literal[-1, 16, 32, 64, 128, 256] = 128
    symmetric: bool = True
    act_order: Literal["static", "none"] = "static"
    scales: Literal["activation", "minmax"] = "activation"
    damping: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    shrinkage: Annotated[float, Field(ge=0.0, le=64.0)] = 1.0
    refine: Refine | None = None
    data_type: DataType = "nf4"
    block_size: Literal[32, 64, 128, 256, 512, 1024] = 64
    double_quant: bool = True

    @model_validator(mode="after")
    def _keys_of_the_method(self) -> "Quantization":
        if given := sorted(self.foreign_keys & self.model_fields_set):
            of = f"method {self.method}"
            if self.method == "bitsandbytes" and given[0] in _BLOCKS:
                of = "data_type int8: it has a scale per row"
            raise ValueError(f"{given[0]} is not a key of {of}")
        if self.method == "none" and self.refine is not None:
            raise ValueError("refine is not a key of method none")
        return self

    @property
    def foreign_keys(self) -> frozenset[str]:
        """Keys that mean nothing with this method and data type."""
        if self.method != "bitsandbytes":
            return _BLOCKS | {"data_type"}
        return _INTEGER | (_BLOCKS if self.data_type == "int8" else frozenset())


class Recipe(Section):
    """Everything that determines the result.

    model           directory of the checkpoint, or its name on the Hub
    output          directory of the result, which is made; with variants, theirs lie in it
    target          the engine that is to load the result; a list of engines: one file that all of
                    them load, with what they have in common
    compute_dtype   of weights and hidden states while the model runs; statistics are float32
    shard_size      of the result's files, at most (a larger tensor has a file of its own), in bytes
                    or written as 5GB
    calibration     text that the profile and the quantiser see
    super_experts   how super experts are found
    policy          what may be done to the experts, and under which budget
    quantization    how a width is reached
    distill         train scales, routers and norms of the result on what the source predicts
    validation      held-out text, and the limits of the gates
    variants        several results from one profile: name -> the recipe with the variant's own keys
                    merged in, and OUTPUT/name as its output. In the file a variant holds only what
                    differs; {} is the recipe as it stands
    require         list of variants that have to pass; without it one that passes is enough
    """

    model: Place
    output: Output
    target: Target | tuple[Target, ...] = "transformers"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    shard_size: Bytes = 5 * 10**9
    calibration: Calibration
    super_experts: SuperExperts = SuperExperts()
    policy: Policy = Policy()
    quantization: Quantization = Quantization()
    distill: Distill | None = None
    validation: Validation
    variants: Mapping[str, "Recipe"] = {}
    require: tuple[str, ...] = ()

    @field_validator("target", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        known = get_args(Target)
        names = one_or_more(value, f"engine is needed: {', '.join(known)}")
        for name in names:
            if name not in known:
                raise ValueError(f"{brief(name)} is not one of {', '.join(known)}")
        each = tuple(dict.fromkeys(names))
        return each if len(each) > 1 else each[0]

    @model_validator(mode="after")
    def _enough_to_refine(self) -> "Recipe":
        samples = self.calibration.samples
        given = {
            "policy.repair": self.policy.repair,
            "quantization.refine": self.quantization.refine,
            "distill": self.distill,
        }
        for key, wanted in given.items():
            if wanted and samples < LEAST_TO_REFINE:
                raise ValueError(
                    f"{key} sets some calibration samples apart: calibration.samples is "
                    f"{samples}, {LEAST_TO_REFINE} or more are needed"
                )
        return self

    @field_validator("require", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value
