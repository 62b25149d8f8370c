"""The recipe: YAML in, a frozen and checked `Recipe` out. The only folder that uses pydantic.

Whatever changes the bits of the result is in here; flags of the command line say only *how* to run.
"""

from se_compress.recipe.flat import flatten, resolved
from se_compress.recipe.kinds import (
    Bytes,
    Format,
    Method,
    Name,
    Output,
    Place,
    Target,
    Width,
    parse_size,
)
from se_compress.recipe.reading import load_recipe, parse_recipe, read_recipe, recipe_of
from se_compress.recipe.sections import (
    Distill,
    ExpertName,
    Merge,
    Policy,
    Prune,
    Quantization,
    Recipe,
    Refine,
    SuperExperts,
)
from se_compress.recipe.texts import (
    Calibration,
    DataSource,
    Domain,
    Generation,
    Reload,
    Tasks,
    Validation,
)

__all__ = [
    "Bytes",
    "Calibration",
    "DataSource",
    "Distill",
    "Domain",
    "ExpertName",
    "Format",
    "Generation",
    "Merge",
    "Method",
    "Name",
    "Output",
    "Place",
    "Policy",
    "Prune",
    "Quantization",
    "Recipe",
    "Refine",
    "Reload",
    "SuperExperts",
    "Target",
    "Tasks",
    "Validation",
    "Width",
    "flatten",
    "load_recipe",
    "parse_recipe",
    "parse_size",
    "read_recipe",
    "recipe_of",
    "resolved",
]
