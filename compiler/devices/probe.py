"""Tells what a device is, and what it lacks to run a bundle: python probe.py FOLDER.

Run on a real device before the first job, with edgec_runtime on the path; the answer is left
in outcome.json of the folder.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys

OUTCOME = "outcome.json"
_OLDEST = (3, 11)
_PACKAGES = ("numpy", "onnxruntime")


def main(folder: pathlib.Path) -> None:
    """Write which Python this is, what it lacks, and if nothing, what the machine is."""
    version = ".".join(map(str, sys.version_info[:3]))
    lacking = [] if sys.version_info >= _OLDEST else [f"version {_OLDEST[0]}.{_OLDEST[1]}"]
    broken = ""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            lacking.append(error.name or name)
        except ImportError as error:
            broken = broken or f"{name} cannot be imported: {error}"
    facts = {"python": f"{sys.executable} ({version})", "lacking": lacking, "broken": broken}
    if not lacking and not broken:
        from edgec_runtime.machine import this_machine

        machine = this_machine()
        facts |= {"arch": machine.arch, "os": machine.os, "features": sorted(machine.features)}
    (folder / OUTCOME).write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
