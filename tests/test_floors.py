"""The floors of the package: a module imports only from lower ones, and stages do not know each
other. What is below the line of torch stays light, and pydantic lives in one folder."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import se_compress

PACKAGE = Path(se_compress.__file__).parent
# From the ground up: folders with all that lies in them, and modules of the top.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("artifacts", "recipe_file", "signals"),
    ("recipe", "opening", "quant"),
    ("formats", "running"),
    ("model", "request", "text", "reload"),
    ("engines", "evaluate"),
    ("profiling", "planning", "compression", "validation", "reporting"),
    ("reuse",),
    ("pipeline", "profile_mode", "tracking", "uploading"),
    ("tables",),
    ("screen", "run_result"),
    ("cli", "__main__", ""),
)
# Within a floor: __main__ calls the cli, which tells the version.
NEIGHBOURS = {("__main__", "cli"), ("cli", "")}
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip("."):
    path for path in PACKAGE.rglob("*.py")
}  # fmt: skip
LIGHT_ROOMS = {
    "", "artifacts", "cli", "errors", "formats", "opening", "pipeline", "planning",
    "profile_mode", "recipe", "recipe_file", "reporting", "request", "reuse", "run_result",
    "running", "screen", "signals", "tables", "tracking", "uploading",
}  # fmt: skip
LIGHT_MODULES = {
    "engines.bare", "engines.blueprint", "engines.engine_view", "engines.export",
    "engines.serving", "engines.targets", "model.plan_checks", "model.surgery",
}  # fmt: skip
TORCH_FREE = sorted(LIGHT_MODULES | {m for m in MODULES if m.partition(".")[0] in LIGHT_ROOMS})


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative imports hide the floor"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("se_compress.") in MODULES
                yield inner if is_module else str(node.module)


def ours(module: str) -> list[str]:
    """The modules of the package that `module` imports, without the package's name."""
    names = (n for n in imported(MODULES[module]) if n.split(".")[0] == "se_compress")
    return [name.removeprefix("se_compress").removeprefix(".") for name in names]


def room_of(module: str) -> str:
    """The folder that a module lies in; a module of the top stands for itself."""
    return module.partition(".")[0]


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} == ROOMS.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_lower_floors_and_from_its_own_room_only(module: str) -> None:
    room = room_of(module)
    wrong = [
        other
        for other in ours(module)
        if room_of(other) != room
        and ROOMS[room_of(other)] >= ROOMS[room]
        and (module, other) not in NEIGHBOURS
    ]
    assert not wrong, f"{module} (floor {ROOMS[room]}) imports {wrong}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: {n for n in ours(module) if n != module} for module in MODULES}
    assert len([*TopologicalSorter(graph).static_order()]) == len(MODULES)


def test_imports_are_seen_wherever_they_stand() -> None:
    stages = {"profiling.profiler", "compression.execute", "validation.validator"}
    assert stages <= set(ours("pipeline"))
    assert "errors" in ours("artifacts.codec")


def test_pydantic_is_in_one_folder_only() -> None:
    users = [m for m, path in MODULES.items() if any("pydantic" in n for n in imported(path))]
    assert {room_of(module) for module in users} == {"recipe"}


@pytest.mark.parametrize(
    "module",
    ["errors", *(m for m in MODULES if room_of(m) in ("artifacts", "opening")
                 and m != "opening.hub")],
)  # fmt: skip
def test_the_ground_needs_the_standard_library_only(module: str) -> None:
    foreign = {name.split(".")[0] for name in imported(MODULES[module])} - {"se_compress"}
    assert foreign <= sys.stdlib_module_names


def test_the_api_is_what_the_package_lists() -> None:
    words = "RunOptions compress draw_domains draw_tokens load_recipe make_plan open_source"
    assert se_compress.__all__ == [*words.split(), "profile_experts", "validate"]
    assert all(callable(getattr(se_compress, name)) for name in se_compress.__all__)
    assert (PACKAGE / "py.typed").exists()
    with pytest.raises(AttributeError, match="module 'se_compress' has no attribute 'quantise'"):
        _ = se_compress.quantise


def test_planning_needs_neither_torch_nor_transformers() -> None:
    modules = [f"se_compress.{module}".rstrip(".") for module in TORCH_FREE]
    heavy = "{'torch', 'transformers', 'datasets', 'gptqmodel'}"
    code = f"import sys, {', '.join(modules)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
