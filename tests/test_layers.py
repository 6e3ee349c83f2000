"""Imports go one way: edgec_runtime <- edgec.targets <- edgec.passes <- edgec."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = {  # folder -> the packages of ours that it may import
    "runtime/edgec_runtime": ("edgec_runtime",),
    "targets": ("edgec_runtime", "edgec.targets"),
    "passes": ("edgec_runtime", "edgec.targets", "edgec.passes"),
    "compiler": ("edgec_runtime", "edgec"),
}
HEAVY = {"torch", "onnx", "onnxruntime", "transformers", "optimum", "onnxscript", "matplotlib"}
FILES = [(folder, file) for folder in LAYERS for file in sorted((ROOT / folder).rglob("*.py"))]
REPORT = {"report_charts.py", "report_style.py"}  # imported only when a report is drawn


def imports(tree: ast.AST, *, at_import: bool) -> Iterator[str]:
    """Modules that a file imports; at_import: only those that loading it imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not (at_import and lazy):
            yield from imports(node, at_import=at_import)


def ours(name: str) -> bool:
    return name.split(".")[0] in ("edgec", "edgec_runtime")


@pytest.mark.parametrize(("folder", "file"), FILES, ids=lambda x: getattr(x, "name", x))
def test_a_layer_imports_only_what_lies_below(folder: str, file: pathlib.Path) -> None:
    for name in imports(ast.parse(file.read_text(encoding="utf-8")), at_import=False):
        allowed = any(f"{name}.".startswith(f"{package}.") for package in LAYERS[folder])
        assert allowed or not ours(name), f"{file.name} imports {name}"


@pytest.mark.parametrize(("folder", "file"), FILES, ids=lambda x: getattr(x, "name", x))
def test_heavy_packages_are_imported_where_they_are_used(folder: str, file: pathlib.Path) -> None:
    heavy = {
        name.split(".")[0]
        for name in imports(ast.parse(file.read_text(encoding="utf-8")), at_import=True)
    } & HEAVY
    if file.name.startswith("torch_"):  # the graph's differentiable twin, imported where used
        heavy -= {"torch"}
    if file.name in REPORT:
        heavy -= {"matplotlib"}
    assert not heavy, f"{file.name} imports {heavy} when it is loaded"


def test_the_passes_load_without_torch() -> None:
    code = "import sys, edgec.passes; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not (HEAVY - {"onnx"}) & set(loaded)  # onnx_ir imports onnx


def test_files_are_short() -> None:
    long = {file.name: n for _, file in FILES if (n := len(file.read_text().splitlines())) > 400}
    assert not long, "split them"
