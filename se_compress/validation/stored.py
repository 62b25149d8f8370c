"""A checkpoint on disk as a model: one that a plan of ours made, or one of somebody else."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from se_compress.artifacts import (
    COMPRESSION_FILE,
    GATES,
    Check,
    Compressed,
    LayerRecord,
    ModelSource,
    Scheme,
    TensorInfo,
)
from se_compress.engines.accounting import account, is_complete, leading, same_bytes
from se_compress.engines.blueprint import Blueprint
from se_compress.errors import SourceError
from se_compress.formats import FORMATS, UNQUANTISED
from se_compress.model.checkpoint import Reader, check_finite, open_result, open_tensors
from se_compress.model.splice import open_shrunk
from se_compress.model.surgery import Shrunk
from se_compress.opening.families import FAMILIES, unfused_name
from se_compress.opening.fused import unfused
from se_compress.opening.headers import read_headers
from se_compress.opening.source import read_config
from se_compress.running.faults import shortage
from se_compress.running.records import load

LEAST_PARTS = 3  # of a packed matrix; what else may follow has a default


class Unusable(Exception):
    """A tensor of the result cannot be unpacked, or holds NaN or infinity."""


@dataclass(frozen=True)
class OnDisk:
    """A checkpoint as it lies there.

    tensors  its headers, by their names there
    records  what `compress` said of each layer; nothing of a checkpoint that it did not make, or
             where that cannot be read: the account then says what it could not compare
    """

    directory: Path
    tensors: Mapping[str, TensorInfo]
    records: tuple[LayerRecord, ...] = ()


def find_checkpoint(directory: Path) -> OnDisk:
    """The checkpoint in a directory. Raises SourceError if there is none that can be read."""
    made = load(Compressed, directory / COMPRESSION_FILE)
    return OnDisk(directory, read_headers(directory), made.layers if made else ())


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk, made sense of.

    on_disk    as it lies there
    source     it as a model: the source itself, or what surgery left of that
    small      that surgery; None without
    target     engine that should load it, or engines
    form       its format, a key of FORMATS, or UNQUANTISED
    accounted  the check of its tensors
    complete   every tensor is there, so that it can be run
    read       reader of its tensors by the names of `source`; raises Unusable
    intended   reader of what they were made from, by the same names
    changed    tensors whose values may differ from that
    """

    on_disk: OnDisk
    source: ModelSource
    small: Shrunk | None
    target: str | tuple[str, ...]
    form: str
    accounted: Check
    complete: bool
    read: Reader
    intended: Reader
    changed: tuple[TensorInfo, ...]

    def not_usable(self, error: Unusable) -> Check:
        """The account of a checkpoint with a tensor that is no weight."""
        value = min(self.accounted.value or 0.0, 1.0 - 1.0 / len(self.source.tensors))
        detail = "; ".join(filter(None, [str(error), self.accounted.detail]))
        return replace(self.accounted, value=value, passed=False, detail=detail)


def _usable(read: Reader, names: Mapping[str, str]) -> Reader:
    """The same reader of a result, which raises Unusable: what it holds is the result's fault,
    while `check_finite` speaks of the source."""

    def checked(name: str) -> Tensor:
        where = names[name]
        try:
            return check_finite(where, read(name))
        except SourceError as error:
            raise Unusable(str(error)) from None
        except (ValueError, IndexError, RuntimeError) as error:  # words that no unpacker can read
            if shortage(error):
                raise
            reason = str(error).partition("\n")[0]
            raise Unusable(f"{where} cannot be unpacked: {reason[:200]}") from None

    return checked


def planned(blueprint: Blueprint, on_disk: OnDisk) -> Stored:
    """The result of a plan of ours, accounted for tensor by tensor with what its records tell."""
    model, plan = blueprint.source, blueprint.plan
    found = blueprint.found_in(on_disk.tensors)
    read = open_result(found, model.tensors, plan.scheme, blueprint.names)
    return Stored(
        on_disk=on_disk,
        source=model,
        small=blueprint.shrunk,
        target=plan.target,
        form=plan.scheme.format,
        accounted=account(blueprint, on_disk.directory, found, on_disk.records),
        complete=is_complete(blueprint, found),
        read=_usable(read, blueprint.names),
        intended=open_shrunk(blueprint.shrunk),
        changed=tuple(tensor.info for tensor in blueprint.packed()),
    )


def foreign(source: ModelSource, on_disk: OnDisk) -> Stored:
    """A checkpoint that somebody else made of the source: every tensor of that is there.

    Tensors are looked for by the source's names, and by those of GPTQModel. Raises SourceError for
    a format that is not read.
    """
    form, target = _form_of(on_disk.directory)
    family = FAMILIES[source.family].at(source.prefix)
    found = unfused(on_disk.tensors, family)
    names = {name: name if name in found else unfused_name(family, name) for name in source.tensors}
    accounted, complete = _account_by_names(source, names, form, found)
    return Stored(
        on_disk=on_disk,
        source=source,
        small=None,
        target=target,
        form=form,
        accounted=accounted,
        complete=complete,
        read=_usable(open_result(found, source.tensors, Scheme(form, "", -1, True), names), names),
        intended=open_tensors(source.tensors),
        changed=tuple(source.tensors.values()),
    )


def _account_by_names(
    source: ModelSource, names: Mapping[str, str], form: str, found: Mapping[str, TensorInfo]
) -> tuple[Check, bool]:
    """The account of a checkpoint without a plan, and whether every tensor is there.

    names  tensor of the source -> what it is called in the checkpoint, if it is there whole
    """
    suffixes = FORMATS[form].suffixes if form != UNQUANTISED else ()
    problems, known, same = [], set[str](), 0
    for name, info in source.tensors.items():
        stem = names[name].removesuffix(".weight")
        whole = found.get(names[name])
        parts = [part for part in (f"{stem}.{suffix}" for suffix in suffixes) if part in found]
        known |= {names[name], *parts}
        if whole is not None and whole.shape != info.shape:
            problems.append(f"{names[name]} is {list(whole.shape)}, not {list(info.shape)}")
        elif whole is None and len(parts) < LEAST_PARTS:
            problems.append(f"{names[name]} is missing")
        elif whole is not None and whole.dtype == info.dtype:
            same += same_bytes(info, whole)
    complete = not problems
    problems += [f"{name} is not in the source" for name in found if name not in known]
    copied = f"{same} of {len(names)} are the source's own bytes"
    detail = "; ".join([copied, *leading(problems)])
    share = max(0.0, 1.0 - len(problems) / len(names))
    gate = GATES["tensors_accounted"]
    return Check(gate.name, share, gate.limit, not problems, detail), complete


def _form_of(directory: Path) -> tuple[str, str]:
    """The format of a checkpoint and the engine that loads it, by its config. Raises SourceError
    for a format that is not read."""
    settings = read_config(directory).get("quantization_config")
    if not settings:
        return UNQUANTISED, "transformers"
    if not isinstance(settings, dict):
        raise SourceError(f"{directory}/config.json: quantization_config is not a JSON object")
    method = settings.get("quant_method", "unknown")
    layout = settings.get("checkpoint_format", settings.get("format"))
    read = [form for form in FORMATS.values() if form.layout]
    for form in read:
        if (form.quant_method, form.layout) == (method, layout):
            return form.name, form.engine
    accepted = ", ".join(f"{form.quant_method} (format {form.layout})" for form in read)
    raise SourceError(
        f"{directory}: quant_method {method} (format {layout}) is not read without a plan of ours; "
        f"accepted are unquantised checkpoints, {accepted}"
    )
