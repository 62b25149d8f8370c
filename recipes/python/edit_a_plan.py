"""Edit a plan and hand it back: python recipes/python/edit_a_plan.py RECIPE PLAN_JSON OUTPUT

Every expert of the first MoE layer gets the width of the narrowest expert; the protected stay.
"""

import sys
from dataclasses import replace
from pathlib import Path

from se_compress import compress, draw_tokens, load_recipe, open_source
from se_compress.artifacts import CompressionPlan, from_json
from se_compress.planning.check import check_plan

recipe = load_recipe(Path(sys.argv[1]))
source = open_source(recipe.model)
plan = from_json(CompressionPlan, Path(sys.argv[2]).read_text(encoding="utf-8"), sys.argv[2])
first = source.moe_layers[0]
narrowest = min(d.bits for d in plan.experts if d.action == "quantize" and d.bits)
experts = tuple(
    replace(d, bits=narrowest, down_bits=None, reason="edited by hand")
    if d.layer == first and d.action == "quantize"
    else d
    for d in plan.experts
)
plan = check_plan(replace(plan, experts=experts), source, "the edited plan")
compress(source, plan, draw_tokens(recipe.calibration, source), recipe, Path(sys.argv[3]))
print(f"{plan.bits_per_weight:.2f} bits per expert weight")
