"""What the documents name is there."""

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tiny import CONFIGS

from se_compress.artifacts.targets import ENGINES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md",
             "recipes/RESULT.md", "recipes/TARGETS.md", "recipes/MODELS.md",
             "benchmarks/README.md", "benchmarks/FINDINGS.md",
             "tools/reference/README.md")  # fmt: skip
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
# Between backquotes: a path that has a folder, or ends as files here do.
ROOMS = "|".join(path.name for top in (ROOT, ROOT / "se_compress") for path in top.iterdir()
                 if path.is_dir() and path.name[0] not in "._")  # fmt: skip
NAMED = re.compile(rf"`((?:{ROOMS})/[\w./-]*)`")
MADE = ("se_compress/report.html", "out/", "models/")  # by a run, not in this repository


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def tree() -> Iterator[Path]:
    """Every path of ARCHITECTURE.md's tree, by its indentation."""
    block = text_of("ARCHITECTURE.md").split("## The tree")[1].split("```")[1]
    above: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0]]
        yield ROOT / "/".join(above)


def test_the_tree_names_what_is_there() -> None:
    paths = list(tree())
    assert len(paths) > 30
    assert [path for path in paths if not path.exists()] == []
    assert {path.name for path in (ROOT / "se_compress").iterdir()
            if (path / "__init__.py").exists()} <= {path.name for path in paths}  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document: str) -> None:
    text, home = text_of(document), (ROOT / document).parent
    links = [name for name in LINK.findall(text) if not (home / name).exists()]
    paths = [
        name
        for name in NAMED.findall(text)
        if not any((place / name).exists() for place in (ROOT, ROOT / "se_compress", home))
    ]
    assert links == []
    assert [name for name in paths if not name.startswith(MADE)] == []


def test_the_readme_names_every_target_and_family_and_stays_short() -> None:
    text = text_of("README.md")
    assert [name for name in (*ENGINES, *CONFIGS) if f"`{name}`" not in text] == []
    assert len(text.splitlines()) <= 160


def test_what_the_readme_links_is_in_the_source_distribution() -> None:
    project = tomllib.loads(text_of("pyproject.toml"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    missing = [
        name
        for name in LINK.findall(text_of("README.md"))
        if not any(fnmatch(name, top) or name.startswith(f"{top}/") for top in included)
    ]
    assert missing == []
    assert "Typing :: Typed" in project["project"]["classifiers"]
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= project["project"]["urls"].keys()


def test_no_document_names_a_machine() -> None:
    for document in DOCUMENTS:
        found = re.search(r"(?m)(?:^|[\s`('\"])/(?!dev/)\w+/\w", text_of(document))
        assert found is None, f"{document} names a path of a machine: {found and found[0]}"
