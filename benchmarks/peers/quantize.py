"""One tool quantizes one case in this process; its cost is printed as one JSON line.

    python -m peers.quantize TOOL CASE_FOLDER OUT_FILE [SAMPLES]

cpu_s: CPU seconds of the whole process and its children, start-up and imports included.
peak_mb: VmHWM, the most memory that the process held, 1 MB = 1e6 bytes.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import resource
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# tool -> (module, function); the function takes (case folder, out file, number of samples)
# and may return more figures for the line
QUANTIZERS: Mapping[str, tuple[str, str]] = {
    "edgec": ("peers.by_edgec", "build_x86_64"),
    "edgec-openvino": ("peers.by_edgec", "build_x86_64_openvino"),
    "edgec-passes": ("peers.by_edgec", "passes_only"),
    "ort-static": ("peers.by_onnxruntime", "static"),
    "ort-linear": ("peers.by_onnxruntime", "static_linear"),
    "ort-dynamic": ("peers.by_onnxruntime", "dynamic"),
    "nncf": ("peers.by_nncf", "for_onnxruntime"),
    "openvino": ("peers.by_nncf", "for_openvino"),
    "aimet": ("peers.by_aimet", "quantize"),
    "litert": ("peers.by_litert", "quantize"),
    "executorch": ("peers.by_executorch", "quantize"),
}
Quantize = Callable[[pathlib.Path, pathlib.Path, "int | None"], "Mapping[str, Any] | None"]


def main() -> None:
    tool, case, out, *rest = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the tool prints
    module, function = QUANTIZERS[tool]
    try:
        quantize: Quantize = getattr(import_module(module), function)
        more = quantize(pathlib.Path(case), pathlib.Path(out), int(rest[0]) if rest else None)
    except Exception as error:  # whatever a tool raises is the reason that its row gives
        import traceback

        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        print(json.dumps({"error": reason}), file=answers, flush=True)
        return
    cost = {"cpu_s": cpu_seconds(), "peak_mb": peak_mb(), **(more or {})}
    print(json.dumps(cost), file=answers, flush=True)


def cpu_seconds() -> float:
    """User and system time of this process and of those that it waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def peak_mb() -> float:
    """VmHWM of this process."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kib) * 1024 / 1e6


if __name__ == "__main__":
    main()
