"""Whether it can be done here, asked before the hours and not after them."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from se_compress.artifacts import CompressionPlan, ModelSource
from se_compress.errors import RecipeError, ResourceError
from se_compress.opening.auxiliary import find_auxiliary
from se_compress.recipe import Recipe
from se_compress.running.memory import MACHINE, Available, available_memory
from se_compress.running.places import check_apart, expand, output_of, partial, rejected
from se_compress.running.run_directory import check_output

# What refining keeps for each routed weight of a layer: position, gradient, two moments, the weight
# it makes and that of each bunch, what autograd keeps of these, codes before and after.
REFINING_BYTES = 48


def check_place(directory: Path) -> None:
    """A verdict can be written there. Raises RecipeError."""
    ancestor = directory.absolute()
    while not os.path.lexists(ancestor):
        ancestor = ancestor.parent
    if not os.path.isdir(ancestor):
        raise RecipeError(f"--output {directory}: {ancestor} is not a directory")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise RecipeError(f"--output {directory}: {ancestor} cannot be written")


def check_places(source: ModelSource, recipe: Recipe, files: Mapping[str, Path | None]) -> None:
    """The output can be written, and nothing that is read lies where it is replaced.

    files   what is read beside model and texts, by the word that it is given with

    Raises RecipeError.
    """
    output = output_of(recipe.output)
    texts = {"calibration": recipe.calibration, "validation": recipe.validation}
    read = {word: file for word, file in files.items() if file is not None} | {
        f"{word}.data {number + 1}": Path(expand(one.data))
        for word, text in texts.items()
        for number, one in enumerate(text.data)
    }
    shards = {info.file for info in source.tensors.values()}
    check_apart((output, partial(output), rejected(output)), source.path, shards, read)
    check_output(output)


def check_positions(source: ModelSource, recipe: Recipe) -> None:
    """No sequence is longer than the model has positions for.

    Beyond them a model babbles, whatever is done to its experts.

    Raises RecipeError.
    """
    most = source.text.get("max_position_embeddings")
    if not isinstance(most, int):
        return
    generation = recipe.validation.generation
    lengths = {
        "calibration.sequence_length": recipe.calibration.sequence_length,
        "validation.sequence_length": recipe.validation.sequence_length,
    }
    if generation.tokens:
        key = "validation.generation.prompt_tokens and tokens together"
        lengths[key] = generation.prompt_tokens + generation.tokens
    for key, length in lengths.items():
        if length > most:
            raise RecipeError(
                f"{key}: {length} is more than the model's max_position_embeddings, {most} "
                f"({source.path}/config.json)"
            )


def check_disk(plans: Sequence[CompressionPlan], source: ModelSource, recipe: Recipe) -> None:
    """All results of a recipe and the saved progress of one run fit on the disk.

    Raises ResourceError.
    """
    if shortage := disk_shortage(plans, source, recipe):
        raise ResourceError(shortage)


def disk_shortage(plans: Sequence[CompressionPlan], source: ModelSource, recipe: Recipe) -> str:
    """One sentence on what does not fit on the disk of the output. "" if all does.

    Raises RecipeError if there can be no such directory.
    """
    output = output_of(recipe.output)
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise RecipeError(
            f"output {partial(output)}: cannot be written ({parent} is not a directory)"
        )
    tokens = recipe.calibration.samples * recipe.calibration.sequence_length
    # Two streams of hidden states, the last ones and those that are being written.
    states = 4 * tokens * int(source.text["hidden_size"]) * _item_bytes(recipe)
    copied = find_auxiliary(source.path, source.config).size_bytes
    results = sum(plan.size_bytes + copied for plan in plans)
    ours = output if recipe.variants else partial(output)
    there = sum(file.stat().st_size for file in ours.glob("**/*.safetensors"))
    free = shutil.disk_usage(parent).free + there
    if results + states <= free:
        return ""
    what = "the result takes" if len(plans) == 1 else f"the {len(plans)} results take"
    return (
        f"{parent}: {what} {in_units(results)} and saved progress {in_units(states)}, but only "
        f"{in_units(free)} are free"
    )


def check_memory(source: ModelSource, recipe: Recipe, tokens: int) -> None:
    """The largest layer and the hidden states of all calibration tokens fit into memory.

    tokens   how many are drawn for calibration

    Raises ResourceError.
    """
    item_bytes = _item_bytes(recipe)
    weights: dict[int | None, int] = {}
    for info in source.tensors.values():
        count = 1
        for extent in info.shape:
            count *= extent
        weights[info.layer] = weights.get(info.layer, 0) + count
    layer = max(count for index, count in weights.items() if index is not None) * item_bytes
    # A coded matrix is decoded beside its place in the layer.
    layer += max((info.size_bytes for info in source.tensors.values() if info.stored), default=0)
    # Both streams before and after a layer, and the kept input of its experts.
    hidden = 6 * tokens * int(source.text["hidden_size"]) * item_bytes
    available = available_memory()
    if recipe.quantization.refine is not None:
        _check_refining(source, layer + hidden, available)
    if layer + hidden > available.size_bytes:
        advice = memory_advice(recipe, layer, hidden / tokens, available.size_bytes)
        if available.limit != MACHINE:
            advice += ", or raise that limit"
        raise ResourceError(
            f"the largest layer takes {in_units(layer)} and the hidden states of {tokens} "
            f"calibration tokens {in_units(hidden)}, but {in_units(available.size_bytes)} of "
            f"memory {available.limit} are available; {advice}"
        )


def _check_refining(source: ModelSource, rest: int, available: Available) -> None:
    """Refining the layer of most routed weights fits beside the `rest` in bytes, which is looked at
    without it. Raises ResourceError."""
    weights: Counter[int | None] = Counter()
    for info in source.tensors.values():
        if info.kind == "expert":
            weights[info.layer] += math.prod(info.shape)
    refining = REFINING_BYTES * max(weights.values(), default=0)
    if rest <= available.size_bytes < rest + refining:
        raise ResourceError(
            f"quantization.refine takes {in_units(refining)} for the largest layer beside "
            f"{in_units(rest)}, but {in_units(available.size_bytes)} of memory {available.limit} "
            "are available; leave it out"
        )


def in_units(size_bytes: int) -> str:
    """A size for people, in decimal units."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _item_bytes(recipe: Recipe) -> int:
    return 4 if recipe.compute_dtype == "float32" else 2


def memory_advice(recipe: Recipe, layer: float, token: float, available: int) -> str:
    """Settings with which a layer and the hidden states fit into the memory that there is.

    layer       bytes of the largest layer, as the recipe stands
    token       bytes of all hidden states of one token, as the recipe stands
    available   bytes of memory
    """
    calibration, advice = recipe.calibration, []
    half = 0.5 if recipe.compute_dtype == "float32" else 1.0
    as_it_is, in_bfloat16 = (
        int((available - share * layer) // (share * token * calibration.sequence_length))
        for share in (1.0, half)
    )
    if as_it_is >= 1:
        advice.append(f"lower calibration.samples to {as_it_is}")
    if half < 1 and in_bfloat16 >= calibration.samples:
        advice.append("set compute_dtype: bfloat16")
    elif half < 1 and in_bfloat16 > max(as_it_is, 0):
        lowered = f"set compute_dtype: bfloat16 and lower calibration.samples to {in_bfloat16}"
        advice.append(lowered)
    return " or ".join(advice) or "no setting of the recipe makes it fit"
