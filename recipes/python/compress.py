"""Compress a model from Python: python recipes/python/compress.py RECIPE OUTPUT"""

import sys
from pathlib import Path

import se_compress as se

recipe, output = se.load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
source = se.open_source(recipe.model)
tokens = se.draw_tokens(recipe.calibration, source)
plan = se.make_plan(source, se.profile_experts(source, tokens, recipe), recipe)
made = se.compress(source, plan, tokens, recipe, output)
report = se.validate(source, plan, output, se.draw_domains(recipe.validation, source), recipe)
print("stopped early" if made.stopped else "passed" if report.passed else "rejected")
