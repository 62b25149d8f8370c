"""What an engine asks of a model beyond what the source has: biases, keys of its config. No torch.

Neither changes what the model computes: the biases are zero, the keys say what the model's own code
does without them. An engine that does not find them computes something else, mostly silently; which
ones those are is told by its row of ENGINES (artifacts/targets.py).
"""

from collections.abc import Iterator
from dataclasses import replace

from se_compress.artifacts import ModelSource, TensorInfo
from se_compress.artifacts.targets import ENGINES, targets_of
from se_compress.model.surgery import without_file
from se_compress.opening.families import FAMILIES, setting

BIASED_LINEARS = ("q_proj", "k_proj", "v_proj")


def adapted(source: ModelSource, target: str | tuple[str, ...]) -> ModelSource:
    """The model with what its targets ask for; the source itself where that is nothing.

    A bias that is made has no file, as what surgery makes has none (splice.py).
    """
    for one in targets_of(target):
        source = _adapted(source, one)
    return source


def _adapted(source: ModelSource, target: str) -> ModelSource:
    keys, biases = _missing_keys(source, target), list(_missing_biases(source, target))
    if not keys and not biases:
        return source
    if biases:
        keys = {**keys, FAMILIES[source.family].attention_bias: True}
    tensors = {**source.tensors, **{info.name: info for info in biases}}
    return replace(source, config={**source.config, **keys}, tensors=tensors)


def adaptations(source: ModelSource, target: str | tuple[str, ...]) -> tuple[str, ...]:
    """What is added to the model for its targets, a sentence each."""
    said: list[str] = []
    for one in targets_of(target):
        said += _adaptations(source, one)
        source = _adapted(source, one)
    return tuple(said)


def _adaptations(source: ModelSource, target: str) -> list[str]:
    said = []
    if biases := list(_missing_biases(source, target)):
        key = FAMILIES[source.family].attention_bias
        said.append(
            f"{target} gives every {source.family} biases of q, k and v: {len(biases)} biases of "
            f"zero and {key}: true are written, as it would leave them uninitialised"
        )
    if keys := _missing_keys(source, target):
        written = ", ".join(f"{key}: {value}" for key, value in keys.items())
        said.append(f"config.json lacks what {target} asks for: {written} is written")
    return said


def _missing_keys(source: ModelSource, target: str) -> dict[str, object]:
    implied = FAMILIES[source.family].implied
    asked = (key for key in ENGINES[target].asks_for if source.config.get(key) is None)
    return {key: implied[key] for key in asked if key in implied}


def _missing_biases(source: ModelSource, target: str) -> Iterator[TensorInfo]:
    """Biases of zero for q, k and v, of their dtype, where the engine has them anyway."""
    key = FAMILIES[source.family].attention_bias
    if key not in ENGINES[target].biased or setting(source.config, key):
        return
    for info in source.tensors.values():
        stem, _, linear = info.name.removesuffix(".weight").rpartition(".")
        if info.kind == "attention" and linear in BIASED_LINEARS and len(info.shape) == 2:
            yield without_file(replace(info, name=f"{stem}.{linear}.bias", shape=info.shape[:1]))
