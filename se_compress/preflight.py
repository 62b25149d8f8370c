"""Can it be done here? Asked before the hours, not after them."""

import importlib.util
import shutil
from collections.abc import Sequence

from se_compress.artifacts import CompressionPlan, ModelSource
from se_compress.errors import RecipeError, ResourceError
from se_compress.places import output_of, partial
from se_compress.recipe import Recipe


def check_packages(plans: Sequence[CompressionPlan]) -> None:
    """What the plans need is installed. Raises RecipeError."""
    methods = {plan.scheme.method for plan in plans}
    if "bitsandbytes" in methods and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "quantization.method is bitsandbytes, which is not installed: "
            "pip install 'se-compress[bnb]'"
        )


def check_disk(plans: Sequence[CompressionPlan], source: ModelSource, recipe: Recipe) -> None:
    """All results of a recipe and the saved progress of one run. Raises ResourceError."""
    output = output_of(recipe.output)
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    tokens = recipe.calibration.samples * recipe.calibration.sequence_length
    # Two streams of hidden states, the last ones and those that are being written.
    states = 4 * tokens * int(source.config["hidden_size"]) * _item_bytes(recipe)
    results = sum(plan.size_bytes for plan in plans)
    ours = output if recipe.variants else partial(output)
    there = sum(file.stat().st_size for file in ours.glob("**/*.safetensors"))
    free = shutil.disk_usage(parent).free + there
    if results + states > free:
        what = "the result takes" if len(plans) == 1 else f"the {len(plans)} results take"
        raise ResourceError(
            f"{parent}: {what} {results / 1e6:.1f} MB and saved progress "
            f"{states / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free"
        )


def check_memory(source: ModelSource, recipe: Recipe, tokens: int) -> None:
    """The largest layer and the hidden states of all calibration tokens. Raises ResourceError."""
    import psutil

    item_bytes = _item_bytes(recipe)
    weights: dict[int | None, int] = {}
    for info in source.tensors.values():
        count = 1
        for extent in info.shape:
            count *= extent
        weights[info.layer] = weights.get(info.layer, 0) + count
    layer = max(count for index, count in weights.items() if index is not None) * item_bytes
    # Both streams before and after a layer, and the kept input of its experts.
    hidden = 6 * tokens * int(source.config["hidden_size"]) * item_bytes
    needed = layer + hidden
    available = psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"the largest layer takes {layer / 1e9:.1f} GB and the hidden states of {tokens} "
            f"calibration tokens {hidden / 1e9:.1f} GB, but {available / 1e9:.1f} GB of memory are "
            "available; lower calibration.samples or set compute_dtype: bfloat16"
        )


def _item_bytes(recipe: Recipe) -> int:
    return 4 if recipe.compute_dtype == "float32" else 2
