"""What of a result distilling can train, and why not: asked before the hours, without a weight."""

from se_compress.engines.blueprint import Blueprint
from se_compress.errors import RecipeError
from se_compress.formats import FORMATS
from se_compress.recipe import Distill


def parts_to_distill(blueprint: Blueprint, rule: Distill) -> tuple[str, ...]:
    """The kinds that are trained: those of the recipe, or those that the plan gives a reason for.

    Raises RecipeError for one that the result does not have, and where there is nothing to train.
    """
    there = {
        "scales": _why_no_scales(blueprint), "routers": _why_no_routers(blueprint), "norms": "",
    }  # fmt: skip
    if rule.train != "auto":
        for kind in rule.train:
            if there[kind]:
                raise RecipeError(f"distill.train: {kind} cannot be trained: {there[kind]}")
        return tuple(kind for kind in there if kind in rule.train)
    wanted = {"scales": True} | dict.fromkeys(("routers", "norms"), not _is_whole(blueprint))
    found = tuple(kind for kind, reason in there.items() if wanted[kind] and not reason)
    if not found:
        raise RecipeError(
            f"distill: there is nothing to train: {there['scales']}; leave it out, or name routers "
            "and norms in distill.train"
        )
    return found


def _is_whole(blueprint: Blueprint) -> bool:
    """No expert was pruned or merged."""
    return blueprint.source is blueprint.shrunk.original or (
        blueprint.source.expert_count == blueprint.shrunk.original.expert_count
    )


def _why_no_scales(blueprint: Blueprint) -> str:
    """Why the scales of the result's experts cannot be trained; "" if they can."""
    packed = [t for t in blueprint.packed() if t.info.kind == "expert"]
    if not packed:
        return "no routed expert is quantised"
    form = blueprint.plan.scheme.format
    if FORMATS[form].codes is None:
        return f"format {form} has no scales that could be tuned"
    return ""


def _why_no_routers(blueprint: Blueprint) -> str:
    """The same of its routers."""
    if blueprint.source.router_weights:
        return ""
    return "no router of this model scores its experts by a matrix"
