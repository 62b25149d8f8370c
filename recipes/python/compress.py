"""Compress a model from Python: python recipes/python/compress.py RECIPE OUTPUT"""

import sys
from pathlib import Path

from se_compress import (
    compress,
    draw_domains,
    draw_tokens,
    load_recipe,
    make_plan,
    open_source,
    profile_experts,
)
from se_compress import validate as validate_result

recipe, output = load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
source = open_source(recipe.model)
tokens = draw_tokens(recipe.calibration, source)
profile = profile_experts(source, tokens, recipe)
plan = make_plan(source, profile, recipe)
made = compress(source, plan, tokens, recipe, output)
report = validate_result(source, plan, output, draw_domains(recipe.validation, source), recipe)
print("stopped early" if made.stopped else "passed" if report.passed else "rejected")
