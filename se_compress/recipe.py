"""The recipe: YAML in, a frozen and checked `Recipe` out. The only module that uses pydantic.

Whatever changes the bits of the result is in here; flags of the command line say only *how* to run.
Unknown keys are refused with the nearest known one, and every message names the key's path.
"""

import difflib
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from se_compress.artifacts.targets import FormatChoice, Method, Target
from se_compress.errors import VALUE_LENGTH, RecipeError, brief, shorten
from se_compress.recipe_file import RECIPE_BYTES, parse_yaml, read_text

Width = Literal[2, 3, 4, 8, 16]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# Bounds that no real recipe reaches, so that no product of two overflows anything.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
SequenceLength = Annotated[int, Field(ge=16, lt=2**31)]

PATH_BYTES = 4095  # of a path, and of a name in it: what Linux takes
NAME_BYTES = 255
LONGEST_SUFFIX = ".validation"  # what we append to the name of an output
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
# A variant may change anything else, the limits of its gates included.
_COMMON_KEYS = ("model", "output", "variants", "require")


def _bytes(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _written(text: str) -> str:
    """What every file system, terminal and UTF-8 file takes."""
    kinds = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of some, ends of lines
    strange = next((c for c in text if unicodedata.category(c) in kinds), "")
    if strange:
        raise ValueError(f"{brief(text)} holds the character {strange!r}, which no name should")
    if len(text.encode()) > PATH_BYTES:
        raise ValueError(f"{brief(text)} is longer than {PATH_BYTES} bytes")
    return text


def _place(text: str) -> str:
    if any(len(part.encode()) > NAME_BYTES for part in text.split("/")):
        raise ValueError(f"{brief(text)} holds a name longer than {NAME_BYTES} bytes")
    return text


def _output(text: str) -> str:
    """We append to the name, and write below it."""
    name, most = Path(text).name, NAME_BYTES - len(LONGEST_SUFFIX)
    if name in ("", ".."):
        raise ValueError(f"{brief(text)} is no name for a new directory")
    if len(name.encode()) > most:
        raise ValueError(f"{brief(text)} is a name of more than {most} bytes")
    if len(text.encode()) > PATH_BYTES - NAME_BYTES:
        raise ValueError(f"{brief(text)} is longer than {PATH_BYTES - NAME_BYTES} bytes")
    return text


Bytes = Annotated[int, Field(gt=0, lt=2**63), BeforeValidator(_bytes)]
Name = Annotated[str, Field(min_length=1), AfterValidator(_written)]
Place = Annotated[Name, AfterValidator(_place)]
Output = Annotated[Place, AfterValidator(_output)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataSource(_Section):
    """One source of text.

    data           path of a .txt, .jsonl or .parquet file, or the name of a data set on the Hub
    split, config  for a data set on the Hub
    column         which column holds the text, or the chat messages if `chat_template` is set
    """

    data: Place
    split: Name = "train"
    config: Name | None = None
    column: Name = "text"


class _Text(_Section):
    """Text, drawn from its sources.

    data             where it comes from, one source or several
    samples          sequences to draw
    sequence_length  tokens of each
    seed             of the drawing
    chat_template    rows are chats, rendered by the model's own template
    """

    data: tuple[DataSource, ...]
    samples: Positive
    sequence_length: SequenceLength
    seed: Seed = 0
    chat_template: bool = False

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not items:
            raise ValueError("at least one source of text is needed")
        return tuple({"data": item} if isinstance(item, str) else item for item in items)


class Calibration(_Text):
    """The text that the profile and the quantiser see.

    routing  what an expert is quantised on: the tokens routed to it, or all tokens of its layer
    """

    samples: Positive = 256
    sequence_length: SequenceLength = 512
    routing: Literal["routed", "all"] = "routed"


class SuperExperts(_Section):
    """The published criterion (arXiv:2507.23279, eq. 6) and whether to confirm it by zeroing.

    percentile       of all experts' peak outputs, which a super expert lies above
    fraction_of_max  of the largest peak output, which it lies above as well
    confirm          switch each one off, and another of its layer, to see whether the massive
                     activation hangs on it; one that is not confirmed is kept safe all the same
    """

    percentile: Annotated[float, Field(gt=0.0, lt=100.0)] = 99.5
    fraction_of_max: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    confirm: bool = True


class ExpertName(_Section):
    """An expert as a recipe names it.

    layer   decoder layer, 0-based, dense layers counted
    expert  index in the layer, or shared
    """

    layer: Natural
    expert: Natural | Literal["shared"]


class Prune(_Section):
    """Which experts go: the same number in each layer (and routing group), super experts never.

    fraction   share of the routed experts; auto: what the predicted loss likes best under `size`
    score      those with the least go. reap: routing weight x output norm, mean over an expert's
               tokens (arXiv:2510.13999); frequency: tokens routed to it; gate: routing weight, sum
    """

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | Literal["auto"]
    score: Literal["reap", "frequency", "gate"] = "reap"


class Merge(_Section):
    """Which experts become one: the same number of experts is left in each layer (and routing
    group), super experts stay alone.

    fraction    share of the routed experts that are merged into others
    similarity  output: distance of the mean outputs on calibration tokens (HC-SMoE,
                arXiv:2410.08589), groups by average linkage
    """

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)]
    similarity: Literal["output"] = "output"


class Policy(_Section):
    """What may be done to the experts, and under which budget.

    protect          experts that nothing is done to but what `protected_bits` says
    protected_bits   width of the protected experts
    bits             widths to choose from; a single number means that width; 16 is the source's own
                     precision
    bits_per_weight  budget over all weights of the experts that are left, scales included
    size             budget for all tensor data of the checkpoint, in bytes
    other_bits       attention, dense MLP, shared experts (those that can be packed); 16 keeps them
    lift_layers      leave to keep a whole layer at `protected_bits` for the protected expert in it,
                     where the target loads one width per layer
    prune            experts that go
    merge            experts that become one
    zero             the experiment of arXiv:2507.23279: down_proj of these experts set to zero,
                     nothing renumbered; random: as many others of the same layers, by `zero_seed`
    zero_seed        of the choice of random experts
    """

    protect: Literal["super-experts", "none"] | tuple[ExpertName, ...] = "super-experts"
    protected_bits: Literal[8, 16] = 16
    bits: tuple[Width, ...] = (4,)
    bits_per_weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    size: Bytes | None = None
    other_bits: Literal[2, 3, 4, 8, 16] = 16
    lift_layers: bool = False
    prune: Prune | None = None
    merge: Merge | None = None
    zero: Literal["super-experts", "random"] | tuple[ExpertName, ...] | None = None
    zero_seed: Seed = 0

    @field_validator("protect", "zero", mode="before")
    @classmethod
    def _list_of_experts(cls, value: object, field: ValidationInfo) -> object:
        if isinstance(value, list):
            return tuple(value)
        known = {"protect": ("super-experts", "none"), "zero": ("super-experts", "random", None)}
        words = known[str(field.field_name)]
        if value not in words and not isinstance(value, tuple):
            raise ValueError(
                f"{brief(value)} is not {words[0]}, {words[1]} or a list such as "
                "[{layer: 1, expert: 68}]"
            )
        return value

    @field_validator("bits", mode="before")
    @classmethod
    def _widths(cls, value: object) -> object:
        widths = list(value) if isinstance(value, list | tuple) else [value]
        if not widths:
            raise ValueError("at least one width is needed, for instance [4]")
        return tuple(widths)

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
        if sum(bool(rule) for rule in (self.prune, self.merge, self.zero)) > 1:
            raise ValueError("give one of prune, merge and zero")
        if self.prune and self.prune.fraction == "auto" and self.size is None:
            raise ValueError("prune.fraction is auto, which needs size, the budget it is to meet")
        return self


class Quantization(_Section):
    """How a width is reached.

    method      gptq rounds with regard to the inputs, rtn each weight to the nearest, bitsandbytes
                as its library does, none leaves everything as it is
    format      of the file; auto: the first one of the target (targets.py) that holds the rest
    group_size  input columns that share a scale; -1 means one scale per row
    symmetric   the grid has its zero in the middle; otherwise each group has a zero point
    act_order   in which columns are rounded: static, those of the largest mean square first, groups
                as they lie in the file; none: from left to right
    scales      activation: those with the least error on the inputs; minmax: from the extremes
    damping     share of each input column's mean square that is added to it (raised where the
                Hessian cannot be factorised): more trusts the calibration text less
    shrinkage   an expert that saw fewer tokens than this times its inputs' dimensions borrows the
                missing share of its Hessian from its layer; 0: only one that saw none at all does

    Method bitsandbytes has keys of its own:

    data_type     nf4 and fp4 are 4 bits, int8 is 8 bits with one scale per row
    block_size    weights of a row that share a scale (nf4, fp4)
    double_quant  the scales are quantised as well: 0.37 bits per weight less in blocks of 64
    """

    method: Method = "gptq"
    format: FormatChoice = "auto"
    group_size: Literal[-1, 16, 32, 64, 128, 256] = 128
    symmetric: bool = True
    act_order: Literal["static", "none"] = "static"
    scales: Literal["activation", "minmax"] = "activation"
    damping: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    shrinkage: Annotated[float, Field(ge=0.0, le=64.0)] = 1.0
    data_type: Literal["nf4", "fp4", "int8"] = "nf4"
    block_size: Literal[32, 64, 128, 256, 512, 1024] = 64
    double_quant: bool = True

    @model_validator(mode="after")
    def _keys_of_the_method(self) -> "Quantization":
        integer = {"group_size", "symmetric", "act_order", "scales", "damping", "shrinkage"}
        blocks, own = {"block_size", "double_quant"}, {"data_type", "block_size", "double_quant"}
        foreign = integer if self.method == "bitsandbytes" else own
        if given := sorted(foreign & self.model_fields_set):
            raise ValueError(f"{given[0]} is not a key of method {self.method}")
        if self.data_type == "int8" and (given := sorted(blocks & self.model_fields_set)):
            raise ValueError(f"{given[0]} is not a key of data_type int8: it has a scale per row")
        return self


class Generation(_Section):
    """Greedy continuations for the repetition check; `tokens: 0` leaves the check out (not run).

    prompts        texts to go on from
    prompt_tokens  of each
    tokens         to write after each
    """

    prompts: Positive = 4
    prompt_tokens: Positive = 32
    tokens: Natural = 32


class Validation(_Text):
    """Held-out text and the limit of each gate (defined in validator.py).

    perplexity_increase       most that the result's is above the source's, as a share
    kl_divergence             largest mean over tokens of that of the next token, nats
    massive_activation_ratio  least share of a massive activation that is left
    sink_decay                most of the attention to position 0 that is gone, as a share
    sink_token_error          most that the residual of sink tokens changes, as a share
    router_agreement          least share of the chosen experts that stay the same, over all layers
    router_agreement_least    the same in the worst layer
    repetition                most of the 4-grams that are repeated beyond the source's, as a share
    loops                     most of the continuations that end in a loop beyond the source's
    weight_cosine             least cosine between a quantised matrix and its original
    weight_gain               largest spread of the gains of a matrix's rows
    generation                the continuations of the repetition check
    early_stop  stop compressing at the layer after which the massive activation or the sinks of the
                calibration text are lost
    """

    samples: Positive = 32
    sequence_length: SequenceLength = 256
    perplexity_increase: Annotated[float, Field(gt=0.0)] = 0.10
    kl_divergence: Annotated[float, Field(gt=0.0)] = 0.20
    massive_activation_ratio: Fraction = 0.75
    sink_decay: Fraction = 0.10
    sink_token_error: Annotated[float, Field(gt=0.0)] = 0.30
    router_agreement: Fraction = 0.70
    router_agreement_least: Fraction = 0.50
    repetition: Annotated[float, Field(gt=0.0)] = 0.25
    loops: Annotated[float, Field(gt=0.0)] = 0.50
    weight_cosine: Fraction = 0.10
    weight_gain: Annotated[float, Field(gt=0.0)] = 0.25
    early_stop: bool = True
    generation: Generation = Generation()


class Recipe(_Section):
    """Everything that determines the result.

    model           a directory, or a model of the Hub; id@revision pins it
    output          where the result goes
    target          the engine that has to load it
    calibration     text that the profile and the quantiser see
    super_experts   how they are told
    policy          what may be done to the experts
    quantization    how a width is reached
    validation      held-out text and the limits of the gates
    compute_dtype   of weights and hidden states while the model runs; statistics are float32
    shard_size      of the result's files, at most (a larger tensor has a file of its own)
    variants        several results from one profile: name -> the recipe with the variant's own keys
                    merged in, and OUTPUT/name as its output. In the file a variant holds only what
                    differs; {} is the recipe as it stands
    require         variants that have to pass; without it one that passes is enough
    """

    model: Place
    output: Output
    target: Target = "transformers"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    shard_size: Bytes = 5 * 10**9
    calibration: Calibration
    super_experts: SuperExperts = SuperExperts()
    policy: Policy = Policy()
    quantization: Quantization = Quantization()
    validation: Validation
    variants: Mapping[str, "Recipe"] = {}
    require: tuple[str, ...] = ()

    @field_validator("require", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


def parse_size(text: str) -> int:
    """Bytes of "9GB" (10^9) or "4.5GiB" (2^30)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(match[1]) > 30:
        raise ValueError(f"{brief(text)} is not a size; write for instance 9GB or 4.5GiB")
    return round(float(match[1]) * _UNITS[match[2]])


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. `overrides` are `key.path=value` with the value in YAML.

    Raises RecipeError naming the file, the key and what would be accepted.
    """
    return recipe_of(read_recipe(path), str(path), overrides)


def read_recipe(path: Path) -> str:
    """The text of a recipe, from a file or a pipe. Raises RecipeError."""
    if not os.path.lexists(path):
        raise RecipeError(f"{path}: there is no such recipe")
    return read_text(path, RECIPE_BYTES, "a recipe")


def recipe_of(
    text: str, where: str, overrides: Sequence[str] = (), output: str | None = None
) -> Recipe:
    """Check a recipe's text. `where` begins every message; `output`, taken as it is and not as
    YAML, replaces the recipe's. Raises RecipeError."""
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{where}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys, such as `model: path`")
    for override in overrides:
        _apply_override(data, override)
    if output is not None:
        data["output"] = output
    return parse_recipe(data, where)


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe that has been read already; `where` begins every message."""
    common = {key: value for key, value in data.items() if key != "variants"}
    recipe = _validated(common, f"{where}: ")
    variants = _variants(common, data.get("variants", {}), where)
    for name in recipe.require:
        if name not in variants:
            known = f"known are {', '.join(variants)}" if variants else "there are none"
            raise RecipeError(
                f"{where}: require names {shorten(name, VALUE_LENGTH)}, which is not a variant; "
                f"{known}"
            )
    return recipe.model_copy(update={"variants": variants})


def _validated(data: Mapping[str, Any], prefix: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(prefix + _explain(error)) from None


def _variants(common: Mapping[str, Any], given: object, where: str) -> dict[str, Recipe]:
    """Each variant's whole recipe: its own keys merged into the common ones."""
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: variants is {brief(given)}: a mapping of names is needed")
    variants = {}
    for name, changes in given.items():
        _check_variant(name, {} if changes is None else changes, where)
        merged = _merged(common, {**(changes or {}), "output": f"{common['output']}/{name}"})
        prefix = f"{where}: variants.{name}."
        variants[name] = _validated({k: v for k, v in merged.items() if k != "require"}, prefix)
    return variants


def _check_variant(name: object, changes: object, where: str) -> None:
    """The name becomes a directory's; what all results are compared by is common to them."""
    if not isinstance(name, str) or not _VARIANT_NAME.fullmatch(name):
        raise RecipeError(
            f"{where}: variants.{shorten(str(name), VALUE_LENGTH)}: a name is made of letters, "
            "digits, _ and -, such as naive"
        )
    if not isinstance(changes, Mapping):
        raise RecipeError(
            f"{where}: variants.{name} is {brief(changes)}: a mapping of keys is needed"
        )
    text = changes.get("validation")
    fixed = [key for key in _COMMON_KEYS if key in changes]
    fixed += [f"validation.{key}" for key in _Text.model_fields if isinstance(text, Mapping)
              and key in text]  # fmt: skip
    if fixed:
        raise RecipeError(
            f"{where}: variants.{name}.{fixed[0]}: it is the same for all variants, so that they "
            "can be compared; set it outside of variants"
        )


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; any other value replaces the old one."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        merged[key] = value
    return merged


def flatten(recipe: BaseModel, prefix: str = "") -> dict[str, object]:
    """`{"policy.bits": [4], ...}` without variants, so that a changed setting can be named."""
    flat: dict[str, object] = {}
    for name in type(recipe).model_fields:
        if name in ("variants", "require"):
            continue
        value = getattr(recipe, name)
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _plain(value)
    return flat


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    shown = f"--set {shorten(override, VALUE_LENGTH)}"
    if not separator or not all(key.split(".")):
        raise RecipeError(f"{shown}: write it as key.path=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{shown}: {error}") from None
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}  # `name:` without a value, as variants may be written
        data = data[parent]
        if not isinstance(data, dict):
            raise RecipeError(
                f"{shown}: {shorten(parent, VALUE_LENGTH)} holds a value, not further keys"
            )
    data[last] = value


def _explain(error: ValidationError) -> str:
    """The first problem, in one line. Unknown keys come first: they often cause the others."""
    problems = sorted(
        error.errors(), key=lambda p: (p["type"] != "extra_forbidden", -len(p["loc"]))
    )
    problem = problems[0]
    path = _path(problem)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(problem["loc"])
    if problem["type"] == "missing":
        return f"{path} is missing"
    if problem["type"] == "value_error":
        return f"{path}: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "model_type":
        return f"{path} is {brief(problem['input'])}: a mapping of keys is needed"
    # A union has one problem for each of its branches.
    accepted = [_lower_first(other["msg"]) for other in problems if _path(other) == path]
    return f"{path} is {brief(problem['input'])}: {' or '.join(accepted)}"


def _path(problem: ErrorDetails) -> str:
    parts = [_shown(part) for part in problem["loc"] if _is_key(part)]
    return ".".join(parts) or "the recipe"


def _shown(part: object) -> str:
    return shorten(str(part), VALUE_LENGTH)


def _lower_first(text: str) -> str:
    return text[0].lower() + text[1:]


def _is_key(part: object) -> bool:
    """Pydantic puts the branch of a union ("literal[...]", "constrained-int") among the keys."""
    return isinstance(part, int) or not re.search(r"\[|^constrained-", str(part))


def _unknown_key(location: tuple[int | str, ...]) -> str:
    parents, last = [part for part in location[:-1] if _is_key(part)], location[-1]
    known = _known_keys([part for part in parents if isinstance(part, str)])
    near = difflib.get_close_matches(_shown(last), known, n=1, cutoff=0.5)
    path = ".".join(_shown(part) for part in [*parents, last])
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{path} is not a known key; {hint}"


def _known_keys(parents: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        candidates = [annotation, *(a for arg in get_args(annotation) for a in _leaves(arg))]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def _leaves(annotation: object) -> list[object]:
    inner = get_args(annotation)
    return [annotation] if not inner else [leaf for arg in inner for leaf in _leaves(arg)]
