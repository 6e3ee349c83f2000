"""edgec_runtime: runs a bundle made by edgec. Needs numpy and onnxruntime, nothing else.

    model = edgec_runtime.load("ocr.arm64.edgec")
    outputs = model(image=batch)

Names are loaded on first use: importing the package costs neither numpy nor onnxruntime.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# onnxruntime reads this once, when it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgec_runtime.answer import Completion
    from edgec_runtime.cache import Memory, PromptCache, memory_needed
    from edgec_runtime.errors import (
        AdapterError,
        BundleError,
        EdgecError,
        InputError,
        TargetMismatchError,
    )
    from edgec_runtime.session import Model, load
    from edgec_runtime.stream import Stream

_HOME = {
    "AdapterError": "edgec_runtime.errors",
    "BundleError": "edgec_runtime.errors",
    "Completion": "edgec_runtime.answer",
    "EdgecError": "edgec_runtime.errors",
    "InputError": "edgec_runtime.errors",
    "Memory": "edgec_runtime.cache",
    "Model": "edgec_runtime.session",
    "PromptCache": "edgec_runtime.cache",
    "Stream": "edgec_runtime.stream",
    "TargetMismatchError": "edgec_runtime.errors",
    "load": "edgec_runtime.session",
    "memory_needed": "edgec_runtime.cache",
}

__all__ = [
    "AdapterError",
    "BundleError",
    "Completion",
    "EdgecError",
    "InputError",
    "Memory",
    "Model",
    "PromptCache",
    "Stream",
    "TargetMismatchError",
    "__version__",
    "load",
    "memory_needed",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'edgec_runtime' has no attribute '{name}'")
