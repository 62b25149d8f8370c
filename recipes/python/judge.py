"""Judge somebody else's checkpoint of a model: python recipes/python/judge.py RECIPE DIRECTORY

The recipe gives the model, the held-out text and the limits of the gates.
"""

import sys
from pathlib import Path

from se_compress import draw_domains, load_recipe, open_source, validate

recipe, directory = load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
source = open_source(recipe.model)
report = validate(source, None, directory, draw_domains(recipe.validation, source), recipe)
for check in report.checks:
    print(f"{check.name}: {check.value} (limit {check.limit}) {check.passed} {check.detail}")
