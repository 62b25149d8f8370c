"""Whether it can be done here, asked before the hours and not after them."""

import bisect
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
from se_compress.running.footprint import LIBRARIES, Footprint, largest_stage
from se_compress.running.memory import MACHINE, Available, available_memory
from se_compress.running.places import check_apart, expand, output_of, partial, rejected
from se_compress.running.run_directory import check_output

# What refining keeps for each routed weight of a layer: position, gradient, two moments, the weight
# it makes and that of each bunch, what autograd keeps of these, codes before and after.
REFINING_BYTES = 48
# What distilling keeps for each weight of the model, float32, and more for each routed one whose
# scale is trained: gradient, the weight anew, code.
WHOLE_BYTES, SCALED_BYTES = 4, 9
# Tokens of a piece of its gradients, as compression/distill.py takes them; float32 numbers that
# autograd keeps of each: of the channels of a layer, of the inputs and outputs of each of its
# chosen experts, and of the logits.
PIECE_TOKENS, OF_CHANNELS, OF_EXPERTS, OF_LOGITS = 1024, 30, 5, 4


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


def check_memory(source: ModelSource, recipe: Recipe, tokens: int, on_disk: bool = False) -> str:
    """What every stage holds fits into memory (footprint.py). Returns a sentence on the largest.

    tokens   how many are drawn for calibration
    on_disk  hidden states are kept in files

    Raises ResourceError.
    """
    found = largest_stage(source, recipe, tokens, on_disk)
    available = available_memory()
    if recipe.quantization.refine is not None:
        _check_refining(source, found.size_bytes, available)
    if recipe.distill is not None:
        _check_distilling(source, recipe, available)
    if found.size_bytes > available.size_bytes:
        advice = memory_advice(source, recipe, available.size_bytes, on_disk)
        if available.limit != MACHINE:
            advice += ", or raise that limit"
        raise ResourceError(
            f"{found.stage} takes {_in_parts(found, tokens)}, but "
            f"{in_units(available.size_bytes)} of memory {available.limit} are available; {advice}"
        )
    return memory_sentence(source, recipe, tokens, on_disk)


def memory_sentence(source: ModelSource, recipe: Recipe, tokens: int, on_disk: bool = False) -> str:
    """What a run takes at the most, libraries included, and in which stage."""
    found = largest_stage(source, recipe, tokens, on_disk)
    return (
        f"memory: {in_units(LIBRARIES + found.size_bytes)} at the most, in {found.stage}: "
        f"{in_units(LIBRARIES)} for the libraries, {_in_parts(found, tokens)}"
    )


def _in_parts(found: Footprint, tokens: int) -> str:
    return (
        f"{in_units(found.states)} for hidden states ({tokens} calibration tokens), "
        f"{in_units(found.layer)} for a layer without its experts, {in_units(found.work)} for the "
        "work on blocks of experts or a batch"
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


def _check_distilling(source: ModelSource, recipe: Recipe, available: Available) -> None:
    """The whole model and what its gradients take fit. Raises ResourceError."""
    weights, routed, inner = 0, 0, 0
    for info in source.tensors.values():
        size = math.prod(info.shape)
        weights += size
        if info.kind == "expert":
            routed += size
            inner = max(inner, min(info.shape, default=0))
    hidden = int(source.text["hidden_size"])
    of_layer = OF_CHANNELS * hidden + OF_EXPERTS * source.top_k * (hidden + inner)
    of_token = source.layer_count * of_layer + OF_LOGITS * int(source.text["vocab_size"])
    tokens = max(PIECE_TOKENS, recipe.calibration.sequence_length)
    size = WHOLE_BYTES * weights + SCALED_BYTES * routed
    activations = 4 * tokens * of_token
    if size + activations > available.size_bytes:
        raise ResourceError(
            f"distill trains the whole model in memory: it takes {in_units(size)} and "
            f"{in_units(activations)} for the gradients of {tokens} tokens, but "
            f"{in_units(available.size_bytes)} of memory {available.limit} are available; leave it "
            "out"
        )


def in_units(size_bytes: int) -> str:
    """A size for people, in decimal units."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _item_bytes(recipe: Recipe) -> int:
    return 4 if recipe.compute_dtype == "float32" else 2


def memory_advice(source: ModelSource, recipe: Recipe, available: int, on_disk: bool) -> str:
    """Settings with which a run fits into the memory that there is, in bytes."""

    def fits(samples: int, dtype: str, on_disk: bool = on_disk) -> bool:
        changed = recipe.model_copy(update={"compute_dtype": dtype})
        tokens = samples * recipe.calibration.sequence_length
        return largest_stage(source, changed, tokens, on_disk).size_bytes <= available

    def most(dtype: str) -> int:
        """Samples that fit, fewer than the recipe has; 0 if none do."""
        choices = range(1, samples)
        return bisect.bisect_left(choices, True, key=lambda count: not fits(count, dtype))

    samples, advice = recipe.calibration.samples, []
    if fits(samples, recipe.compute_dtype, on_disk=True):
        advice.append("keep hidden states on disk (--hidden-states DIR)")
    lowered = most(recipe.compute_dtype)
    if lowered:
        advice.append(f"lower calibration.samples to {lowered}")
    if recipe.compute_dtype == "float32":
        if fits(samples, "bfloat16"):
            advice.append("set compute_dtype: bfloat16")
        elif (both := most("bfloat16")) > lowered:
            advice.append(f"set compute_dtype: bfloat16 and lower calibration.samples to {both}")
    return " or ".join(advice) or "no setting of the recipe makes it fit"
