"""Imports only go down, and the lower floors know nothing of Lightning."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import it3_lightning

ROOT = Path(it3_lightning.__file__).parent
HOSTS = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "jsonargparse"}
FLOORS = {
    "messages": 0,
    "distances": 0,
    "priors": 0,
    "conditioning": 0,
    "snapshot": 0,
    "selection": 0,
    "batches": 0,
    "graphs": 0,
    "specs": 0,
    "perturbations": 0,
    "objectives": 1,
    "engine": 2,
    "protocols": 3,
    "cli": 5,
    "report": 5,
    "tuning_report": 5,
    "benchmark": 5,
    "__init__": 6,  # the table of contents
}


def floor(module: str) -> int:
    """The floor of a module; what is not named above meets Lightning, on floor 4."""
    return FLOORS.get(module.split(".")[0], 4)


def modules() -> list[str]:
    """All modules of the package, as ``priors.classes``; packages as ``priors``."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted(ROOT.rglob("*.py"))]
    names = [".".join(path.parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


def path_of(module: str) -> Path:
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return file if file.is_file() else ROOT.joinpath(*module.split("."), "__init__.py")


@cache
def imported(module: str) -> frozenset[str]:
    """All that a module imports, by full name, in functions and for type checks too."""
    return frozenset(_imported(ast.parse(path_of(module).read_text())))


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    known, found = set(modules()), set()
    for name in imported(module):
        parts = name.split(".")
        if parts[0] == ROOT.name:
            inner = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.add(next((part for part in inner if part in known), "__init__"))
    return found


def reached(module: str) -> set[str]:
    """The modules of the package that are loaded with a module."""
    seen, waiting = set[str](), {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= own(name) - seen
    return seen


@pytest.mark.parametrize("module", modules())
def test_imports_only_go_down(module: str) -> None:
    above = {name for name in own(module) if floor(name) > floor(module)}
    assert above == set()


@pytest.mark.parametrize("module", [name for name in modules() if floor(name) <= 2])
def test_lower_floors_know_no_host(module: str) -> None:
    assert {name.split(".")[0] for name in imported(module)} & HOSTS == set()


def test_mixin_and_callback_do_not_meet() -> None:
    assert "callback" not in reached("mixin")
    assert "mixin" not in reached("callback")


def test_every_floor_is_walked() -> None:
    assert {floor(name) for name in modules()} == {0, 1, 2, 3, 4, 5, 6}
    assert "engine" in own("callback")
    assert "priors.base" in reached("protocols")
    assert {name.split(".")[0] for name in imported("mixin")} & HOSTS
