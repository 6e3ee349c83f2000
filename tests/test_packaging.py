"""What pip installs is what the folders hold."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = tomllib.loads((ROOT / "runtime/pyproject.toml").read_text())
STANDARD = set(sys.stdlib_module_names)
DISTRIBUTIONS = {"PIL": "pillow", "edgec_runtime": "edgec-runtime"}


def imported(*folders: str) -> set[str]:
    """Top-level packages that the code of some folders imports anywhere."""
    names: set[str] = set()
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names.add(str(node.module).split(".")[0])
    return names - STANDARD


def required(project: dict, *extras: str) -> set[str]:
    """Distributions that a pyproject.toml depends on."""
    table = project["project"]
    lines = list(table["dependencies"])
    for extra in extras:
        lines += table["optional-dependencies"][extra]
    return {re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in lines}


def test_every_folder_with_code_is_packaged() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    with_code = {
        str(p.parent.relative_to(ROOT))
        for top in ("compiler", "passes", "targets")
        for p in (ROOT / top).rglob("*.py")
    }
    assert with_code == listed
    assert set(PROJECT["tool"]["setuptools"]["package-dir"]) == set(
        PROJECT["tool"]["setuptools"]["packages"]
    )


def test_every_file_that_is_no_code_is_packaged() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    packaged = {
        path
        for package, folder in folders.items()
        for pattern in data.get(package, [])
        for path in (ROOT / folder).glob(pattern)
    }
    for folder in folders.values():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert file in packaged, f"{file.relative_to(ROOT)} is not in the wheel"
    assert (ROOT / "compiler/py.typed").is_file()
    assert (ROOT / "runtime/edgec_runtime/py.typed").is_file()


def test_what_is_imported_is_required() -> None:
    compiler = {DISTRIBUTIONS.get(n, n) for n in imported("compiler", "passes", "targets")}
    allowed = required(PROJECT, "fixtures") | {"edgec"}
    allowed |= {"tokenizers", "transformers"}  # through optimum-onnx
    allowed |= {"coremltools"}  # of the device coreml, imported in its own environment
    assert compiler <= allowed, compiler - allowed
    runtime = imported("runtime/edgec_runtime") - {"edgec_runtime"}
    assert required(RUNTIME) == {"numpy", "onnxruntime"}
    assert runtime <= required(RUNTIME, "text")


def test_versions_agree() -> None:
    import edgec
    import edgec_runtime

    version = PROJECT["project"]["version"]
    assert RUNTIME["project"]["version"] == version
    assert f"edgec-runtime=={version}" in PROJECT["project"]["dependencies"]
    assert edgec.__version__ == edgec_runtime.__version__ == version


def test_development_versions_lie_in_the_stated_ranges() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    checked = 0
    for line in PROJECT["project"]["dependencies"] + RUNTIME["project"]["dependencies"]:
        requirement = Requirement(line)
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), line
            checked += 1
    assert checked >= 6


def test_runtime_imports_nothing_of_the_compiler() -> None:
    code = "import sys, edgec_runtime; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd="/").split()
    assert not {"torch", "onnx", "onnx_ir", "edgec", "click"} & set(loaded)
