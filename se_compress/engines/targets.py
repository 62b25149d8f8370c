"""What each target engine loads, and what a plan therefore puts into the file. No torch.

A format says how one matrix is stored (formats/), a row of TARGETS (artifacts/targets.py) what an
engine loads of it. The planner takes a row as its constraint; what the result then holds is in its
blueprint (blueprint.py), exact to the byte.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import lcm

from se_compress.artifacts import (
    SOURCE_BITS,
    CompressionPlan,
    ModelSource,
    Scheme,
    TensorInfo,
)
from se_compress.artifacts.target_rules import GRANULARITIES
from se_compress.artifacts.target_rules import TargetRules as TargetRules
from se_compress.artifacts.targets import TARGETS as TARGETS
from se_compress.artifacts.targets import spoken, targets_of
from se_compress.errors import RecipeError
from se_compress.formats import FORMATS, StoredPart
from se_compress.opening.encodings import ACTIVATION_PARTS
from se_compress.opening.families import FAMILIES, live_prefix, unfused_name
from se_compress.opening.headers import Slot


def find_rules(
    target: str | tuple[str, ...],
    method: str,
    form: str = "auto",
    symmetric: bool = True,
    source: ModelSource | None = None,
) -> TargetRules:
    """The row of a target for a method, and for a format unless that is "auto": the first whose
    files of the source's model type it loads, if there is one. Of several targets what their rows
    have in common, see `meet`. Raises RecipeError if there is no such file."""
    names = targets_of(target)
    rows = [_able(name, method, form, symmetric) for name in names]
    shared = [r.format for r in rows[0] if all(r.format in {o.format for o in t} for t in rows)]
    every = (meet([next(r for r in row if r.format == name) for row in rows]) for name in shared)
    met = [rules for rules in every if rules.widths or not rows[0][0].widths]
    if source is not None and (served := [r for r in met if not not_served(source, r)]):
        return served[0]
    if met:
        return met[0]
    loaded = "; ".join(
        f"{name} loads {', '.join(rules.format for rules in row)}"
        for name, row in zip(names, rows, strict=True)
    )
    raise RecipeError(f"no file of method {method} serves target {spoken(target)}: {loaded}")


def _able(target: str, method: str, form: str, symmetric: bool) -> list[TargetRules]:
    """The rows of one target that hold what is asked, the first of them first."""
    rows = [rules for rules in TARGETS if rules.target == target]
    able = [rules for rules in rows if method in rules.methods]
    if not able:
        loads = ", ".join(dict.fromkeys(name for rules in rows for name in rules.methods))
        others = " or ".join(sorted({r.target for r in TARGETS if method in r.methods}))
        raise RecipeError(
            f"target {target} does not load experts of method {method}; it loads {loads}"
            + (f", and {method} needs target {others}" if others else "")
        )
    formats = ", ".join(rules.format for rules in able)
    if form != "auto":
        able = [rules for rules in able if rules.format == form]
    if not able:
        raise RecipeError(
            f"quantization.format is {form}; target {target} loads method {method} as {formats}"
        )
    if holding := [r for r in able if symmetric or r.asymmetric or not r.widths]:
        return holding
    within = f" of format {form}" if form != "auto" else ""
    raise RecipeError(
        f"quantization.symmetric is false; target {target} loads symmetric groups only{within}"
    )


def meet(rows: Sequence[TargetRules]) -> TargetRules:
    """What several engines load alike: the widths and group sizes of all, the coarsest granularity,
    linears fused wherever one fuses them. One row stays as it is."""
    first = rows[0]
    if len(rows) == 1:
        return first
    fused = dict.fromkeys(group for rules in rows for group in rules.fused)
    spellings = {rules.unfused_names for rules in rows}
    return replace(
        first,
        target=spoken(tuple(rules.target for rules in rows)),
        widths=tuple(w for w in first.widths if all(w in rules.widths for rules in rows)),
        granularity=max((rules.granularity for rules in rows), key=GRANULARITIES.index),
        group_sizes=tuple(g for g in first.group_sizes if all(g in r.group_sizes for r in rows)),
        asymmetric=all(rules.asymmetric for rules in rows),
        row_multiple=lcm(*(rules.row_multiple for rules in rows)),
        column_multiple=lcm(*(rules.column_multiple for rules in rows)),
        hidden_multiple=lcm(*(rules.hidden_multiple for rules in rows)),
        plain_routing=any(rules.plain_routing for rules in rows),
        one_spelling=len(spellings) > 1,
        model_types=_types_of_all(rows),
        dense_mlp=all(rules.dense_mlp for rules in rows),
        fused=tuple(fused),
        falls_back="; ".join(filter(None, (rules.falls_back for rules in rows))),
        source="; ".join(rules.source for rules in rows),
    )


def _types_of_all(rows: Sequence[TargetRules]) -> frozenset[str] | None:
    known = [rules.model_types for rules in rows if rules.model_types is not None]
    return frozenset.intersection(*known) if known else None


def rows_of(plan: CompressionPlan) -> tuple[TargetRules, ...]:
    """The rows that a plan was made for, one for each of its targets."""
    wanted = [(target, plan.scheme.format) for target in targets_of(plan.target)]
    return tuple(next(r for r in TARGETS if (r.target, r.format) == pair) for pair in wanted)


def rules_of(plan: CompressionPlan) -> TargetRules:
    """What a plan was made for: the row of its target, or what the rows of several have in
    common."""
    return meet(rows_of(plan))


def widths_of(scheme: Scheme, rules: TargetRules) -> tuple[int, ...]:
    """What a quantised matrix of the scheme may have: a data type of bitsandbytes has one width."""
    if scheme.data_type is None:
        return rules.widths
    return (8,) if scheme.data_type == "int8" else (4,)


def check_grid(source: ModelSource, rules: TargetRules, scheme: Scheme) -> None:
    """Raises RecipeError if the target does not load this grid or a routed expert does not fit."""
    packed = [
        info
        for identity, roles in source.experts.items()
        for info in (roles.values() if identity.expert != "shared" else ())
    ]
    if obstacle := not_served(source, rules):
        raise RecipeError(obstacle)
    if scheme.group_size not in rules.group_sizes:
        obstacle = f"target {rules.target} does not load {_size_key(scheme)} {scheme.group_size}"
    obstacles = (unpackable(info, rules, scheme) for info in packed)
    if obstacle := obstacle or next(filter(None, obstacles), ""):
        raise RecipeError(f"{obstacle}; {_accepted_instead(packed, rules, scheme)}")


def not_served(source: ModelSource, rules: TargetRules) -> str:
    """Why the target loads no quantised experts of this model, whatever the grid; "" if it does."""
    family, known_as = FAMILIES[source.family], model_type_of(source)
    hidden = source.text.get("hidden_size", 0)
    if rules.model_types is not None and known_as not in rules.model_types:
        return f"target {rules.target} is not known to load {rules.format} of {known_as}; " + (
            _loaded_instead(known_as)
        )
    unfused = replace(rules, unfused_names=True)
    if rules.one_spelling and any(engine_name(source, unfused, n) != n for n in source.tensors):
        return (
            f"target {rules.target}: they look for the experts of {source.family} by different "
            "names, so that no one file serves them all; a file for each does"
        )
    if rules.plain_routing and family.per_expert:
        return (
            f"target {rules.target} has no kernel for the routing of {source.family}, which adds a "
            "bias to the scores; quantization.method none is loaded"
        )
    if hidden % rules.hidden_multiple:
        return (
            f"hidden_size is {hidden}; as {rules.format}, target {rules.target} loads multiples of "
            f"{rules.hidden_multiple} only"
        )
    return ""


def model_type_of(source: ModelSource) -> str:
    """What the table knows a model by: a composite is loaded by code of its own."""
    return str(source.config.get("model_type", source.family))


def engine_name(source: ModelSource, rules: TargetRules, name: str) -> str:
    """What a target calls a tensor of the source."""
    if not rules.unfused_names:
        return name
    family = FAMILIES[source.family].at(source.prefix)
    return unfused_name(family, name, live_prefix(source.config))


def _loaded_instead(model_type: str) -> str:
    """What loads quantised experts of a model type."""
    found: dict[str, list[str]] = {}
    for rules in TARGETS:
        if rules.model_types is not None and model_type in rules.model_types:
            found.setdefault(rules.target, []).append(rules.format)
    said = "; ".join(f"target {name} loads {', '.join(forms)}" for name, forms in found.items())
    return f"{said or 'no target is'}; quantization.method none is loaded by transformers"


def _size_key(scheme: Scheme) -> str:
    return "quantization." + ("block_size" if scheme.data_type else "group_size")


def unpackable(info: TensorInfo, rules: TargetRules, scheme: Scheme) -> str:
    """Why a matrix cannot be packed; "" if it can."""
    rows, columns = info.shape
    if info.kind == "dense_mlp" and not rules.dense_mlp:
        return f"{info.name}: target {rules.target} does not load a packed dense MLP"
    if rows % rules.row_multiple or columns % rules.column_multiple:
        return (
            f"{info.name} is {rows} x {columns}; target {rules.target} packs multiples of "
            f"{rules.row_multiple} x {rules.column_multiple}"
        )
    if scheme.group_size != -1 and columns % scheme.group_size:
        return (
            f"{_size_key(scheme)} {scheme.group_size} does not divide the {columns} columns of "
            f"{info.name}"
        )
    return ""


def _accepted_instead(packed: Sequence[TensorInfo], rules: TargetRules, scheme: Scheme) -> str:
    """With which group sizes the target would take all these matrices, `packed`; where none would
    do, which methods leave them as they are."""
    per_row = scheme.data_type is None  # of bitsandbytes' types int8 alone is, and always
    shapes = {(info.kind, info.shape): info for info in packed}.values()
    fitting = [
        str(size)
        for size in rules.group_sizes
        if (size != -1 or per_row)
        and not any(unpackable(i, rules, replace(scheme, group_size=size)) for i in shapes)
    ]
    if fitting:
        return f"accepted there: {', '.join(fitting)}"
    others = sorted({r.target for r in TARGETS if "none" in r.methods})
    return (
        f"no {_size_key(scheme)} changes that; quantization.method none with target "
        f"{' or '.join(others)} leaves the experts as they are"
    )


def cautions(source: ModelSource) -> tuple[str, ...]:
    """What becomes of coded weights, and what of the model was not looked at yet."""
    told = (*_coded(source), *_not_profiled(source))
    if FAMILIES[source.family].exact:
        return told
    looked_at = f"of {source.family}, a dry run looks at names, experts, routers and counts"
    return (*told, f"{looked_at}; other shapes are looked at when a run starts")


def _not_profiled(source: ModelSource) -> tuple[str, ...]:
    """What stands beside the routed experts of a layer without being a shared expert of the
    profile: other than a gate, an up and a down of plain linears, or a dense MLP."""
    if FAMILIES[source.family].shared:
        return ()
    layers = set(source.moe_layers)
    beside = {
        info.name.partition(f"layers.{info.layer}.")[2].removesuffix(".weight").rpartition(".")[0]
        for info in source.tensors.values()
        if info.layer in layers and info.kind in ("shared_expert", "dense_mlp")
    }
    if not beside:
        return ()
    return (
        f"of {source.family}, {min(beside)}, which every token passes beside the routed experts, "
        "is not profiled: no super expert is looked for in it",
    )


def _coded(source: ModelSource) -> tuple[str, ...]:
    """What becomes of coded weights."""
    coded = [info.stored for info in source.tensors.values() if info.stored is not None]
    encodings = sorted({stored.encoding for stored in coded} - {"plain"})
    if not encodings:
        return ()
    count = sum(stored.encoding != "plain" for stored in coded)
    note = (
        f"{'one weight' if count == 1 else f'{count} weights'} of the source "
        f"{'is' if count == 1 else 'are'} {' or '.join(encodings)}; what is not quantised here is "
        "written in 16 bits"
    )
    if any(part in ACTIVATION_PARTS for stored in coded for part in stored.parts):
        note += "; its scales of activations are not used"
    return (note,)


def check_installed(scheme: Scheme) -> None:
    """The library that quantises by itself is there. Raises RecipeError."""
    form = FORMATS.get(scheme.format)
    if form and form.quantize and importlib.util.find_spec(form.package) is None:
        raise RecipeError(
            f"quantization.method is {scheme.method}, which is not installed: "
            f"pip install 'se-compress[{form.extra}]'"
        )


def is_other_linear(info: TensorInfo) -> bool:
    """A matrix of attention or of a dense MLP in a decoder layer."""
    matrix = len(info.shape) == 2 and info.name.endswith(".weight")
    return matrix and info.layer is not None and info.kind in ("attention", "dense_mlp")


@cache
def packed_parts(shape: tuple[int, ...], bits: int, scheme: Scheme) -> tuple[StoredPart, ...]:
    """What holds a weight [R, C] at a width. A model has few shapes, and so few answers."""
    rows, columns = shape
    return tuple(FORMATS[scheme.format].parts(rows, columns, bits, scheme))


def stored_bytes(info: TensorInfo, bits: int, scheme: Scheme) -> int:
    """Bytes of one matrix at a width, scales and indices included."""
    return info.size_bytes if bits == SOURCE_BITS else _packed_bytes(info.shape, bits, scheme)


@cache
def _packed_bytes(shape: tuple[int, ...], bits: int, scheme: Scheme) -> int:
    parts = packed_parts(shape, bits, scheme)
    return sum(Slot("", dtype, extent).size_bytes for _, dtype, extent in parts)
