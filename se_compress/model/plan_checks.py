"""Whether what a plan leaves of a source is a model that engines load."""

from se_compress.artifacts import CompressionPlan, ExpertDecision, ExpertId, ModelSource
from se_compress.errors import RecipeError
from se_compress.model.surgery import SURGICAL, resulting_id
from se_compress.opening.config_rules import LEAST_IN_GROUP


def check_structure(source: ModelSource, plan: CompressionPlan, where: str) -> None:
    """Raises RecipeError, beginning with `where`, if the experts that are left make no model.

    A model has as many experts in each layer, and in each group of a group-limited router.
    """
    for decision in plan.experts:
        if decision.action not in SURGICAL:
            continue
        if decision.id in plan.protected:
            raise RecipeError(
                f"{where}: expert {decision.id} is protected, but its action is {decision.action}; "
                "accepted are keep and quantize, unless it is taken off the list of protected"
            )
        if decision.expert == "shared" and decision.action != "zero":
            raise RecipeError(
                f"{where}: expert {decision.id} cannot be the object of {decision.action}; a "
                "shared expert stays"
            )
    if plan.repaired and not any(d.action in ("prune", "merge") for d in plan.experts):
        raise RecipeError(
            f"{where}: repaired is true, but no expert is pruned or merged; leave it out"
        )
    _check_merged(source, plan, where)
    _check_averaged(plan, where)
    _check_counts(source, plan, where)


def _check_merged(source: ModelSource, plan: CompressionPlan, where: str) -> None:
    """Raises RecipeError unless members of merged experts fit each other and have valid shares."""
    members: dict[ExpertId, list[ExpertDecision]] = {}
    for decision in plan.experts:
        if decision.action != "merge":
            continue
        if decision.becomes is None or decision.share is None or not 0 <= decision.share <= 1:
            raise RecipeError(
                f"{where}: expert {decision.id}: action merge needs becomes, the number of the "
                "merged expert, and share, its weight in the average, from 0 to 1"
            )
        members.setdefault(ExpertId(decision.layer, decision.becomes), []).append(decision)
    for identity, decisions in members.items():
        names = ", ".join(str(d.id) for d in decisions)
        if len(decisions) < 2 or len({source.group_of(d.expert) for d in decisions}) > 1:
            raise RecipeError(
                f"{where}: merged expert {identity} has the members {names}; it needs at least two,"
                " all of one routing group"
            )
        total = sum(d.share or 0.0 for d in decisions)
        if abs(total - 1.0) > 1e-6:
            raise RecipeError(f"{where}: the shares of {names} add up to {total:.6f}, not 1")
        if len({(d.bits, d.down_bits) for d in decisions}) > 1:
            raise RecipeError(f"{where}: {names} become one expert, but their bits differ")


def _check_averaged(plan: CompressionPlan, where: str) -> None:
    """Raises RecipeError unless there are two averaged experts at least in a layer that has any,
    and their shares add up to 1."""
    shares: dict[int, list[float]] = {}
    for decision in plan.experts:
        if decision.action == "average":
            shares.setdefault(decision.layer, []).append(decision.share or 0.0)
    for layer, found in shares.items():
        if len(found) < 2 or min(found) < 0 or abs(sum(found) - 1.0) > 1e-6:
            raise RecipeError(
                f"{where}: layer {layer} has averaged experts with the shares {found}; it needs at "
                "least two, of shares that are at least 0 and add up to 1"
            )


def _check_counts(source: ModelSource, plan: CompressionPlan, where: str) -> None:
    """Raises RecipeError unless all layers and routing groups keep as many experts, and enough."""
    left: dict[tuple[int, int], set[ExpertId]] = {}
    for decision in plan.experts:
        if decision.expert != "shared":
            group = left.setdefault((decision.layer, source.group_of(decision.expert)), set())
            identity = resulting_id(decision)
            group |= {identity} if identity else set()
    counts = {place: len(identities) for place, identities in left.items()}
    first, count = next(iter(counts.items()))
    for other, other_count in counts.items():
        if other_count != count:
            raise RecipeError(
                f"{where}: {other_count} experts are left in group {other[1]} of layer {other[0]}, "
                f"but {count} in group {first[1]} of layer {first[0]}; no engine loads layers or "
                "routing groups of different sizes"
            )
    grouped = len({group for _, group in counts}) > 1
    if count < (LEAST_IN_GROUP if grouped else 1):
        raise RecipeError(
            f"{where}: {count} experts are left in each "
            + (f"routing group; {LEAST_IN_GROUP} are needed" if grouped else "layer; 1 is needed")
        )
