"""The package's files import one another in one direction, wherever in a file an import stands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gendistiller_ext as gd

PACKAGE = Path(gd.__file__).resolve().parent


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named(node: ast.stmt, package: str) -> list[str]:
    """Dotted names that an import statement of a file in `package` may mean: modules, or what is in them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
    origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
    return [f"{origin}.{alias.name}" for alias in node.names]


def imports(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports at any level: at the top, in functions, under
    TYPE_CHECKING. What an import runs on its way, the packages above, is not counted."""
    files = {module_name(path, root): path for path in sorted([*root.rglob("*.py"), *root.rglob("*.pyi")])}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            for name in named(node, package):
                target = name if name in files else name.rpartition(".")[0]
                if target in files and target != module:
                    graph[module].add(target)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last the first; [] where there is no such circle."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module):]
        if module in done:
            return []
        for target in sorted(graph[module]):
            found = walk(target, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def test_no_circle_among_the_packages_files() -> None:
    graph = imports(PACKAGE)
    assert len(graph) > 40 and "gendistiller_ext.checkpoints.foreign" in graph["gendistiller_ext.model"]
    assert circle(graph) == []


@pytest.mark.parametrize("text", [
    "from .b import thing", "from . import b", "import package.b", "from package import b as c",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import Thing", "def f():\n    from .b import x",
])
def test_a_circle_is_seen(tmp_path: Path, text: str) -> None:
    root = tmp_path / "package"
    (root / "deep").mkdir(parents=True)
    for name, content in {"__init__.py": "", "a.py": text, "b.py": "from .deep import c", "deep/__init__.py": "",
                          "deep/c.py": "from .. import a"}.items():
        (root / name).write_text(content)
    assert circle(imports(root)) == ["package.a", "package.b", "package.deep.c"]
    (root / "deep" / "c.py").write_text("import json")
    assert circle(imports(root)) == []
