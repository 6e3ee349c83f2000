"""edgec: an edge deployment compiler.

    edgec.build("model.py:build", target="arm64", output="model.arm64.edgec")

turns a trained model into one verified file per device. Names are loaded on first use,
so that ``import edgec`` and ``edgec --help`` cost no torch and no onnx.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgec.builder import build
    from edgec.promise import Limits
    from edgec.recipe import load_recipe
    from edgec.report import Report
    from edgec.scrutiny import Scrutiny
    from edgec.source import ImageSpec, Source

_HOME = {
    "ImageSpec": "edgec.source",
    "Limits": "edgec.promise",
    "Report": "edgec.report",
    "Scrutiny": "edgec.scrutiny",
    "Source": "edgec.source",
    "build": "edgec.builder",  # a module named build would hide the function
    "load_recipe": "edgec.recipe",
}

__all__ = [
    "ImageSpec",
    "Limits",
    "Report",
    "Scrutiny",
    "Source",
    "__version__",
    "build",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'edgec' has no attribute '{name}'")
