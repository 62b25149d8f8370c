"""The references of recipe keys and result files: up to date, and nothing goes untold."""

import dataclasses
import re
from pathlib import Path

import pytest
import references
from json_schemas import ROOTS
from references import DIRECTORY, MissingError

from se_compress.recipe import Recipe, flatten, load_recipe
from se_compress.running.manifest import ResultFiles

RECIPES = sorted(DIRECTORY.glob("*.yaml"))


@pytest.mark.parametrize("name", references.PAGES)
def test_the_committed_page_is_that_of_the_models(name: str) -> None:
    page = (DIRECTORY / name).read_text(encoding="utf-8")
    assert page == references.text_of(name), "run: python tools/references.py"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_in_the_table_and_every_key_of_it_in_the_reference(recipe: Path) -> None:
    page = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert f"| `{recipe.name}` |" in page
    for path in flatten(load_recipe(recipe)):
        section, _, key = path.rpartition(".")
        table = page[page.index(f"### `{section}`" if section else "### The recipe") :]
        assert f"| `{key}` |" in table.split("\n### ")[0], path


def test_the_table_lists_no_recipe_that_is_not_there() -> None:
    head = (DIRECTORY / "README.md").read_text(encoding="utf-8").split("# All keys")[0]
    named = re.findall(r"^\| `([^`]+)` \|", head, re.MULTILINE)
    assert [name for name in named if not (DIRECTORY / name).exists()] == []


def test_every_artefact_has_its_fields_in_the_reference() -> None:
    page = (DIRECTORY / "RESULT.md").read_text(encoding="utf-8")
    for kind in (*ROOTS.values(), ResultFiles):
        table = page[page.index(f"### {kind.__name__}\n") :].split("\n#")[0]
        for field in dataclasses.fields(kind):
            assert f"| `{field.name}` |" in table, f"{kind.__name__}.{field.name}"


def test_a_key_that_nothing_is_said_of_is_refused() -> None:
    class Louder(Recipe):
        """A recipe with one key more.

        loud  how much it says
        """

        loud: int = 0
        silent: int = 0

    with pytest.raises(MissingError, match="Louder does not tell silent"):
        [*references._section([""], Louder)]


def test_a_field_that_nothing_is_said_of_is_refused() -> None:
    @dataclasses.dataclass
    class Told:
        """One field of two.

        one  is told
        """

        one: int
        two: int

    with pytest.raises(MissingError, match="Told does not tell two"):
        [*references._object(Told, set())]
