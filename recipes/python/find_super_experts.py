"""Find the super experts of a model: python recipes/python/find_super_experts.py RECIPE"""

import sys
from pathlib import Path

from se_compress import draw_tokens, load_recipe, open_source, profile_experts

recipe = load_recipe(Path(sys.argv[1]))
source = open_source(recipe.model)
profile = profile_experts(source, draw_tokens(recipe.calibration, source), recipe)
for expert in profile.super_experts:
    print(f"{expert.id}: peak {expert.peak:.0f}, channel {expert.channel}, {expert.confirmed=}")
