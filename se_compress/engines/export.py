"""All of the result that is not a tensor: config, the engine's settings, tokenizer, licence."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from se_compress.artifacts import write_atomically
from se_compress.artifacts.targets import spoken
from se_compress.engines.blueprint import Blueprint
from se_compress.engines.engine_view import misread
from se_compress.errors import ValidationFailed
from se_compress.formats import FORMATS
from se_compress.opening.auxiliary import (
    Auxiliary,
    copied_text,
    find_auxiliary,
    pretty,
    result_config,
)


def export_config(
    blueprint: Blueprint, settings: Mapping[str, Any], directory: Path, keep_code: bool = False
) -> None:
    """Write config.json (and the engine's own settings) and copy what else of the source a loader
    or a user may want: `auxiliary.find_auxiliary` tells it.

    settings   `quantization_config`, see `checked_settings`
    keep_code  `auto_map` stays in the configs, and the Python files that it names come along

    Raises SourceError if such a file cannot be copied.
    """
    source = blueprint.source
    _copy(find_auxiliary(source.path, source.config, keep_code), directory, keep_code)
    config = result_config(source.config, keep_code)
    if settings:
        config["quantization_config"] = settings
        if own := FORMATS[blueprint.plan.scheme.format].own_file:
            write_atomically(directory / own, pretty(settings))
    write_atomically(directory / "config.json", pretty(config))


def checked_settings(blueprint: Blueprint) -> dict[str, Any]:
    """The `quantization_config`, once it is known to be read as it is meant.

    Raises ValidationFailed if it does not say of every module what the file will hold. It takes no
    weights: compression asks before its hours of work.
    """
    settings = quantization_config(blueprint)
    if problems := misread(settings, blueprint, blueprint.slots.values()):
        raise ValidationFailed(
            f"the exported settings would be read wrong by {spoken(blueprint.plan.target)}: "
            f"{'; '.join(problems[:3])}"
        )
    return settings


def _copy(found: Auxiliary, directory: Path, keep_code: bool) -> None:
    for name, file in found.files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = copied_text(name, file, keep_code)
        if text is None:
            shutil.copyfile(file, target)
        else:
            write_atomically(target, text)


def quantization_config(blueprint: Blueprint) -> dict[str, Any]:
    """The `quantization_config` of config.json; empty for a plan that quantises nothing.

    The commonest width of the experts is the base; what differs from it is listed by module.
    """
    packed = [tensor for tensor in blueprint.linears if tensor.making == "packed"]
    experts = [tensor for tensor in packed if tensor.info.kind == "expert"]
    widths = [tensor.bits for tensor in experts or packed]
    if not widths:
        return {}
    base = max(set(widths), key=lambda bits: (widths.count(bits), bits))
    scheme = blueprint.plan.scheme
    return FORMATS[scheme.format].settings(blueprint.linears, scheme, base)
