"""What a recipe asks of its target, worked out once for a plan: the target's row and the scheme."""

from dataclasses import dataclass

from se_compress.artifacts import SOURCE_BITS, ModelSource, Scheme
from se_compress.artifacts.targets import ENGINES, spoken, targets_of
from se_compress.engines.targets import TargetRules, find_rules, not_served, widths_of
from se_compress.errors import RecipeError
from se_compress.formats import FORMATS
from se_compress.recipe import Policy, Recipe


@dataclass(frozen=True)
class Terms:
    """What a plan is made under.

    recipe  what is wanted
    rules   what the target loads of it
    scheme  how everything that is quantised is stored
    widths  bits that the target loads of that
    note    why it is not the target's first format; "" where it is, or one was asked for
    """

    recipe: Recipe
    rules: TargetRules
    scheme: Scheme
    widths: tuple[int, ...]
    note: str = ""

    @property
    def policy(self) -> Policy:
        return self.recipe.policy


def terms_of(recipe: Recipe, source: ModelSource) -> Terms:
    """The terms of a recipe for a model. Raises RecipeError if the target loads no such file, or is
    not what is to reload it."""
    _check_reload(recipe)
    asked = recipe.quantization
    wanted = (recipe.target, asked.method, asked.format, asked.symmetric)
    first, rules = find_rules(*wanted), find_rules(*wanted, source)
    scheme = _scheme(recipe, rules)
    note = ""
    if rules.format != first.format:
        note = f"format {rules.format}: {not_served(source, first).partition(';')[0]}"
    return Terms(recipe, rules, scheme, widths_of(scheme, rules), note)


def _check_reload(recipe: Recipe) -> None:
    wanted, targets = recipe.validation.reload.engine, targets_of(recipe.target)
    if wanted != "auto" and not any(ENGINES[target].itself == wanted for target in targets):
        having = [target for target, engine in ENGINES.items() if engine.itself == wanted]
        raise RecipeError(
            f"validation.reload.engine is {wanted}; target {spoken(targets)} is no such engine, "
            f"accepted are auto, and target {' or '.join(having)}"
        )


def _scheme(recipe: Recipe, rules: TargetRules) -> Scheme:
    asked, form = recipe.quantization, FORMATS.get(rules.format)
    if form is None or form.quantize is None:
        return Scheme(rules.format, asked.method, asked.group_size, asked.symmetric)
    # a library's own data types: int8 has one maximum per row, and no blocks
    block, double = (
        (-1, None) if asked.data_type == "int8" else (asked.block_size, asked.double_quant)
    )
    return Scheme(rules.format, asked.method, block, True, asked.data_type, double)


def check_bits(terms: Terms) -> None:
    """Raises RecipeError if the target does not load the bits that the policy names."""
    policy, rules = terms.policy, terms.rules
    accepted = (*terms.widths, SOURCE_BITS)
    files = f"{rules.format} {terms.scheme.data_type or ''}".rstrip()
    wanted = [("policy.bits lists", bits) for bits in policy.bits]
    wanted.append(("policy.protected_bits is", policy.protected_bits))
    wanted.append(("policy.other_bits is", policy.other_bits))
    for key, bits in wanted:
        if bits not in accepted:
            raise RecipeError(
                f"{key} {bits}; target {rules.target} loads {files} files of "
                f"{', '.join(map(str, accepted))} bits"
            )
