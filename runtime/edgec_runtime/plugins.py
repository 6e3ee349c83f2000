"""Execution providers that come as packages of their own: ONNX Runtime's plugin libraries.

Such a library is registered only when a bundle asks for its provider. A session gets the
provider together with the hardware that it found, NPU first, and not by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class Plugin:
    """The package that brings a provider, its module, and options that the provider needs."""

    package: str
    module: str
    options: Mapping[str, str] = field(default_factory=dict)


PLUGINS: Mapping[str, Plugin] = {
    "QNNExecutionProvider": Plugin("onnxruntime-qnn", "onnxruntime_qnn", {"backend_type": "htp"})
}


def register(names: Sequence[str]) -> None:
    """Register the libraries of those providers whose packages are installed.

    A provider that is there already, or whose package is absent, is left alone.
    """
    import onnxruntime

    if not hasattr(onnxruntime, "register_execution_provider_library"):  # before 1.23
        return
    for name in names:
        if name not in PLUGINS or name in onnxruntime.get_available_providers():
            continue
        try:
            module = importlib.import_module(PLUGINS[name].module)
        except ImportError:
            continue
        onnxruntime.register_execution_provider_library(name, module.get_library_path())


def add(options: onnxruntime.SessionOptions, name: str, settings: Mapping[str, str]) -> bool:
    """Add a plugin's provider to a session's options; False if the provider is no plugin.

    settings: options of the provider, on top of those that it needs.
    """
    import onnxruntime

    if name not in PLUGINS or not hasattr(onnxruntime, "get_ep_devices"):
        return False
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not found:
        return False
    kinds = onnxruntime.OrtHardwareDeviceType
    best = min(found, key=lambda device: device.device.type != kinds.NPU)
    options.add_provider_for_devices([best], {**PLUGINS[name].options, **settings})
    return True
