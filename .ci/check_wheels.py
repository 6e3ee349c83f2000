"""The checks of .ci/wheels, run by environments that have only what they are to have.

python check_wheels.py content DIST    what the wheels hold is what the folders hold
python check_wheels.py run BUNDLE      the runtime alone runs the bundle
check_wheels.py:tiny                   the source of that bundle
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
import sys
import zipfile
from typing import Any

FOLDERS = {
    "compiler": "edgec",
    "passes": "edgec/passes",
    "targets": "edgec/targets",
    "runtime/edgec_runtime": "edgec_runtime",
}
_PACKED = {".py", ".toml", ".c", ".h", ".mjs"}


def tiny() -> Any:
    """(module, example inputs): one convolution and a classifier, with random weights."""
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.LazyLinear(4)), (torch.randn(1, 3, 8, 8),)


def check_content(dist: pathlib.Path) -> None:
    """The modules, py.typed, targets and hosts of the source folders, and nothing else."""
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in pathlib.Path(folder).rglob("*")
        if path.suffix in _PACKED or path.name == "py.typed"
    }
    packed: set[str] = set()
    for wheel in sorted(dist.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            packed |= {n for n in archive.namelist() if ".dist-info/" not in n}
    if packed != expected:
        missing, extra = sorted(expected - packed), sorted(packed - expected)
        sys.exit(f"wheels: missing {missing}, not in the source folders {extra}")
    print(f"wheels: all {len(packed)} files of the source folders, nothing else")


def check_run(bundle: pathlib.Path) -> None:
    """Load, self-test and call; torch, onnx and edgec must not be there."""
    for name in ("torch", "onnx", "edgec", "pytest"):
        if importlib.util.find_spec(name) is not None:
            sys.exit(f"{name} is installed; this environment proves nothing")
    import edgec_runtime

    model = edgec_runtime.load(bundle, any_target=True, check="full")
    if not model.self_test().passed:
        sys.exit("the self-test failed")
    outputs = model(**model.golden_inputs())
    shapes = {name: list(array.shape) for name, array in outputs.items()}
    versions = {n: importlib.metadata.version(n) for n in ("numpy", "onnxruntime")}
    print(f"edgec-runtime wheel: {shapes} with {versions}")


if __name__ == "__main__":
    {"content": check_content, "run": check_run}[sys.argv[1]](pathlib.Path(sys.argv[2]))
