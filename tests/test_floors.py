"""The floors of the package: a module imports only from lower ones, and stages do not know each
other. What is below the line of torch stays light, and pydantic lives in one module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import se_compress

PACKAGE = Path(se_compress.__file__).parent
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "artifacts", "modelfiles"),
    (
        "account",
        "config_rules",
        "config_values",
        "digest",
        "recipe",
        "families",
        "headers",
        "knapsack",
        "quant",
        "quant.grid",
        "quant.packing",
        "quant.gptq",
        "quant.bnb",
    ),
    ("source", "targets", "checkpoint", "measures", "page", "progress", "surgery"),
    ("streaming", "splice", "structure", "allocate"),
    ("solver", "early_warning"),
    (
        "calibrate",
        "profiler",
        "policy",
        "execute",
        "export",
        "validator",
        "report",
        "reload",
        "comparison",
        "comparison_page",
        "preflight",
        "loading",
    ),
    ("pipeline",),
    ("cli", "__main__", ""),
)
# Within a floor: the numbers build on each other, artefacts and files raise errors, __main__ calls
# the cli, and what a config says is looked up in the families' rows.
NEIGHBOURS = {
    ("artifacts", "errors"),
    ("modelfiles", "errors"),
    ("account", "config_rules"),
    ("account", "families"),
    ("config_rules", "config_values"),
    ("config_rules", "families"),
    ("quant.gptq", "quant.grid"),
    ("__main__", "cli"),
    ("cli", ""),
}
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip("."):
    path for path in PACKAGE.rglob("*.py")
}  # fmt: skip
TORCH_FREE = [
    *(module for floor in FLOORS[:2] for module in floor if not module.startswith("quant.")),
    "source", "targets", "surgery", "structure", "allocate", "policy", "export", "page",
    "report", "comparison", "comparison_page", "progress", "preflight", "pipeline", "cli", "",
]  # fmt: skip


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


def test_every_module_has_a_floor() -> None:
    assert sorted(MODULES) == sorted(FLOOR_OF)


@pytest.mark.parametrize("module", sorted(FLOOR_OF))
def test_a_module_imports_from_lower_floors_only(module: str) -> None:
    wrong = [
        other
        for other in ours(module)
        if FLOOR_OF[other] >= FLOOR_OF[module] and (module, other) not in NEIGHBOURS
    ]
    assert not wrong, f"{module} (floor {FLOOR_OF[module]}) imports {wrong}"


def test_imports_are_seen_wherever_they_stand() -> None:
    assert {"calibrate", "profiler", "execute", "validator"} <= set(ours("pipeline"))
    assert "errors" in ours("artifacts")


def test_pydantic_is_in_one_module_only() -> None:
    users = [m for m, path in MODULES.items() if any("pydantic" in n for n in imported(path))]
    assert users == ["recipe"]


@pytest.mark.parametrize(
    "module",
    [
        "errors", "artifacts", "modelfiles", "families", "headers", "account", "config_rules",
        "config_values", "digest",
    ],
)  # fmt: skip
def test_the_ground_needs_the_standard_library_only(module: str) -> None:
    foreign = {name.split(".")[0] for name in imported(MODULES[module])} - {"se_compress"}
    assert foreign <= sys.stdlib_module_names


def test_the_api_is_five_verbs() -> None:
    verbs = ["compress", "make_plan", "open_source", "profile_experts", "validate"]
    assert se_compress.__all__ == verbs
    assert all(callable(getattr(se_compress, verb)) for verb in verbs)
    with pytest.raises(AttributeError, match="module 'se_compress' has no attribute 'quantise'"):
        _ = se_compress.quantise


def test_planning_needs_neither_torch_nor_transformers() -> None:
    modules = [f"se_compress.{module}".rstrip(".") for module in TORCH_FREE]
    heavy = "{'torch', 'transformers', 'datasets', 'gptqmodel'}"
    code = f"import sys, {', '.join(modules)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
