"""Where ONNX Runtime's time goes: float32, edgec's file and quantize_static's, side by side.

ONNX Runtime's own profiler, summed by operator; microseconds per inference. An operator
whose time did not fall with quantization is what keeps the file from being faster.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections import Counter
from typing import Any

from peers import cases
from peers.processes import Peers, Unavailable, quantize
from peers.tools import TOOLS

_RUNS, _WARM_UP = 25, 5


def compare(case: pathlib.Path, made: pathlib.Path, peers: Peers) -> str:
    """A table: one row per operator, one column of time and node count per file."""
    columns = {"fp32": node_times(case / "model.onnx", case)}
    reasons = []
    for tool in ("edgec", "ort-static"):
        folder = made / f"profile-{tool}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"model{TOOLS[tool].suffix}"
        try:
            quantize(peers, TOOLS[tool], TOOLS[tool].quantizer, case, file)
        except Unavailable as error:
            reasons.append(f"{TOOLS[tool].title}: {error}")
            continue
        columns[tool] = node_times(file, case)
    longest = {
        op: max(times.get(op, (0, 0))[0] for times in columns.values())
        for times in columns.values()
        for op in times
    }
    lines = [f"{case.name}: microseconds per inference (nodes)", "| operator | "]
    lines[1] += " | ".join(TOOLS[tool].title for tool in columns) + " |"
    lines.append("|---" * (1 + len(columns)) + "|")
    for op in sorted(longest, key=lambda op: -longest[op]):
        cells = (
            f"{times[op][0]:.0f} ({times[op][1]})" if op in times else "-"
            for times in columns.values()
        )
        lines.append(f"| {op} | {' | '.join(cells)} |")
    sums = (f"{sum(us for us, _ in times.values()):.0f}" for times in columns.values())
    lines.append(f"| all | {' | '.join(sums)} |")
    return "\n".join([*lines, *reasons])


def node_times(file: pathlib.Path, case: pathlib.Path) -> dict[str, tuple[float, int]]:
    """Operator -> (microseconds per inference, nodes) of an .onnx file or a bundle."""
    [feeds] = cases.feeds(case, "evaluation", 1)
    with tempfile.TemporaryDirectory() as folder:
        session = _open(file, str(pathlib.Path(folder) / "profile"))
        wanted = {i.name for i in session.get_inputs()}
        for _ in range(_RUNS):
            session.run(None, {name: x for name, x in feeds.items() if name in wanted})
        events = json.loads(pathlib.Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: dict[tuple[str, str], list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            spent.setdefault((event["args"]["op_name"], name), []).append(float(event["dur"]))
    times: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    for (op, _), durations in spent.items():
        times[op] += sorted(durations[_WARM_UP:])[(len(durations) - _WARM_UP) // 2]
        nodes[op] += 1
    return {op: (times[op], nodes[op]) for op in times}


def _open(file: pathlib.Path, profile: str) -> Any:
    """A session with the options that the file's runtime would use, and the profiler on."""
    import onnxruntime

    from edgec_runtime.bundle import read_bundle

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = True, profile
    if file.suffix != ".edgec":
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    bundle = read_bundle(file)
    settings = bundle.manifest.session
    for key, value in settings.config.items():
        options.add_session_config_entry(key, value)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(file.resolve().parent)
    )
    return onnxruntime.InferenceSession(
        bundle.graph(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(settings.disabled_optimizers),
    )
