"""Open a model: config, headers, and the account of every tensor. No weight is read; no torch."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from se_compress.artifacts import ModelSource, TensorInfo
from se_compress.errors import SourceError
from se_compress.opening import families
from se_compress.opening.account import bind
from se_compress.opening.config_rules import check_rules, settle
from se_compress.opening.config_values import take_values
from se_compress.opening.digest import contents_digest
from se_compress.opening.encodings import SETTINGS_KEY, decoded, packing_of
from se_compress.opening.families import Family
from se_compress.opening.fused import unfused
from se_compress.opening.headers import read_headers
from se_compress.opening.hub import locate
from se_compress.opening.modelfiles import check_file, check_place, read_json
from se_compress.opening.naming import place, prefix_of

_LARGEST_CONFIG_BYTES = 2**23


def open_source(
    model: str, keep_code: bool = False, notice: Callable[[str], None] = lambda sentence: None
) -> ModelSource:
    """Open a model directory, or a model of the Hub (`id` or `id@revision`).

    keep_code   a model of the Hub is fetched with its Python files, which nothing here runs
    notice      called with a sentence if the Hub's cache stands in for the Hub

    The config's values are taken for what they are, every tensor is bound to its place in the model
    or explained. Coded weights are listed as what they are decoded to when they are read.
    Raises SourceError with the tensor, file or key that is wrong.
    """
    path = locate(model, keep_code, notice)
    file = str(path / "config.json")
    found = read_config(path)
    family = families.family_of(found, str(path))
    packing = packing_of(found, file) or packing_of(families.text_of(found), file)
    said, key = as_known(found), families.text_key(found)
    text = settle(take_values(families.text_of(said), file), family, file)
    said = config = {**said, key: text} if key else dict(text)
    headers = read_headers(path)
    tensors: Mapping[str, TensorInfo] = headers
    if packing is not None:
        tensors = decoded(headers, packing, file)
        # Of the files, and not of the model that is read from them.
        text = _without_settings(text)
        config = {**_without_settings(said), key: text} if key else text
    check_rules(text, family, len(headers), file)
    tensors, prefix = _accounted(unfused(tensors, family), family, text, path)
    layers = families.moe_layers(text) if family.exact else _layers_with_experts(tensors)
    return ModelSource(
        path=path,
        name=model,
        family=family.model_type,
        config=config,
        tensors=tensors,
        layer_count=families.layer_count(text),
        moe_layers=layers,
        expert_count=int(families.setting(text, families.count_key(family, text))),
        top_k=families.top_k_of(family, text),
        contents=partial(contents_digest, said, headers),
        group_count=families.routing_groups(family, text),
        chosen_groups=families.chosen_groups(family, text),
        text_key=key,
        prefix=prefix,
    )


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != SETTINGS_KEY}


def as_known(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config under the name by which transformers knows the model."""
    alias = families.ALIASES.get(str(config.get("model_type")))
    return {**config, "model_type": alias} if alias else dict(config)


def _accounted(
    found: Mapping[str, TensorInfo], family: Family, text: Mapping[str, Any], path: Path
) -> tuple[dict[str, TensorInfo], str]:
    """Every tensor with its place in the model, and what precedes `layers.N.` in their names."""
    if family.exact:
        return bind(found, family, text, path), family.prefix
    prefix = prefix_of(found, family)
    return place(found, family.at(prefix), text, path), prefix


def _layers_with_experts(tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    layers = {info.layer for info in tensors.values() if info.kind == "expert"}
    return tuple(sorted(layer for layer in layers if layer is not None))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, as it is there."""
    file = path / "config.json"
    if not os.path.lexists(file):
        raise SourceError(f"{path}: has no config.json, so it is not a model directory")
    check_file(file)
    check_place(file, path)
    config = read_json(file, _LARGEST_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise SourceError(f"{file}: is not a JSON object")
    return config
