"""Quantized models: edgec against other tools and other runtimes, one table.

    python benchmarks/peers/install.py                       # once: one environment per peer
    python benchmarks/quantization.py [--models minilm ocr] [--tools edgec ort-static] [--json]
    python benchmarks/quantization.py --samples 16,64,512    # peak memory, also of quantize_static
    python benchmarks/quantization.py --profile minilm       # where edgec's file spends its time

Every tool starts from the same float32 model and the same 64 calibration samples; every
result is judged on other samples against ONNX Runtime's float32 outputs. A file is timed in
its runtime's own process; the processes take turns, block by block, on one core with one
thread. speed is the CPU time of float32 in ONNX Runtime over that of the file.

A peer's file is kept in the work folder and made again with --fresh; edgec's always is.
--evaluation N makes a first look quick; the published table is taken without it.
A row that cannot be had gives its reason. What the models are: peers/models.py.

Left out on purpose: other batch sizes, several threads, other devices.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from fixtures.locate import FixtureMissing  # noqa: E402
from peers import cases, metrics, models, profile  # noqa: E402
from peers.processes import Peers, Unavailable, Worker, interleave, quantize  # noqa: E402
from peers.tools import TOOLS, Tool  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One tool on one model; ``reason`` says why there are no figures. 1 MB = 1e6 bytes.

    quantize_cpu_s, quantize_peak_mb: of the quantization in a process of its own.
    build_cpu_s: of the whole ``edgec.build``; None for other tools.
    """

    model: str
    weights: str
    tool: str
    title: str
    reason: str = ""
    task: float | None = None
    task_name: str = ""
    agreement: float | None = None
    sqnr_db: float | None = None
    size_mb: float | None = None
    cpu_ms: float | None = None
    speed: float | None = None
    quantize_cpu_s: float | None = None
    quantize_peak_mb: float | None = None
    build_cpu_s: float | None = None


def main() -> None:
    asked = _arguments()
    work = asked.work or asked.peers / "work"
    work.mkdir(parents=True, exist_ok=True)
    peers = Peers(asked.peers.resolve(), str(asked.core))
    if asked.profile:
        for name in asked.profile:
            print(profile.compare(_case(name, work, asked.fresh), work / "made" / name, peers))
        return
    if asked.samples:
        rows = [
            memory
            for name in asked.models
            for memory in peak_memory(name, asked.tools, work, peers, asked.samples)
        ]
        print(json.dumps(rows, indent=2) if asked.json else _memory_table(rows))
        return
    rows = []
    for name in asked.models:
        made = compare(name, asked, work, peers)
        rows += made
        if not asked.json:
            print(_table(made), flush=True)
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(_footer(peers))


def compare(name: str, asked: argparse.Namespace, work: pathlib.Path, peers: Peers) -> list[Row]:
    """One row per tool, float32 first."""
    tools, fresh = asked.tools, asked.fresh
    try:
        case = _case(name, work, fresh)
    except FixtureMissing as missing:
        return [Row(name, "", tool, TOOLS[tool].title, str(missing)) for tool in tools]
    weights = cases.read_case(case).weights
    rows = {tool: Row(name, weights, tool, TOOLS[tool].title) for tool in ("fp32", *tools)}
    workers: dict[str, Worker] = {}
    try:
        reference = None
        for tool in rows:
            print(f"{name}: {TOOLS[tool].title} ...", file=sys.stderr, flush=True)
            try:
                file, cost = _made(tool, case, work / "made" / name, peers, fresh)
                worker = Worker(peers, TOOLS[tool], file, case)
            except Unavailable as error:
                rows[tool] = replace(rows[tool], reason=str(error))
                continue
            workers[tool] = worker
            try:
                outputs = worker.outputs(work, asked.evaluation)
            except Unavailable as error:
                workers.pop(tool).close()
                rows[tool] = replace(rows[tool], reason=str(error))
                continue
            reference = outputs if reference is None else reference
            quality = metrics.judge(case, outputs, reference)
            rows[tool] = replace(
                rows[tool],
                **{key: value for key, value in cost.items() if key in Row.__annotations__},
                size_mb=_size_mb(file),
                task=quality.task,
                task_name=quality.task_name,
                agreement=quality.agreement,
                sqnr_db=quality.sqnr_db,
            )
        for tool, cpu_ms in interleave(workers, asked.seconds).items():
            rows[tool] = replace(rows[tool], cpu_ms=cpu_ms)
    finally:
        for worker in workers.values():
            worker.close()
    plain = rows["fp32"].cpu_ms
    return [
        replace(row, speed=plain / row.cpu_ms) if plain and row.cpu_ms else row
        for row in rows.values()
    ]


def peak_memory(
    name: str, tools: list[str], work: pathlib.Path, peers: Peers, counts: list[int]
) -> list[dict[str, Any]]:
    """edgec's passes and ORT's quantize_static on growing numbers of calibration samples.

    tools: those of the two that are among them.
    """
    case = work / "cases" / f"{name}-{max(counts)}"
    if not (case / "case.json").exists():
        models.make_case(name, case, max(counts))
    rows = []
    made = work / "made" / case.name
    made.mkdir(parents=True, exist_ok=True)
    for tool in [tool for tool in ("edgec", "ort-static") if tool in tools]:
        out = made / f"model{TOOLS[tool].suffix}"
        for count in counts:
            try:
                cost = quantize(peers, TOOLS[tool], TOOLS[tool].quantizer, case, out, count)
                if tool == "edgec":
                    cost = quantize(peers, TOOLS[tool], "edgec-passes", case, out, count)
            except Unavailable as error:
                cost = {"reason": str(error)}
            rows.append({"model": name, "tool": tool, "samples": count, **cost})
    return rows


def _case(name: str, work: pathlib.Path, fresh: bool) -> pathlib.Path:
    """The case folder of a model, made if it is not there. Raises FixtureMissing."""
    folder = work / "cases" / name
    if fresh or not (folder / "case.json").exists():
        models.make_case(name, folder)
    return folder


def _made(
    tool: str, case: pathlib.Path, folder: pathlib.Path, peers: Peers, fresh: bool
) -> tuple[pathlib.Path, dict[str, Any]]:
    """A tool's file for a case and what it cost to make. Raises Unavailable."""
    if tool == "fp32":
        return case / "model.onnx", {}
    about = TOOLS[tool]
    here = folder / tool
    file, note = here / f"model{about.suffix}", here / "cost.json"
    if note.exists() and not fresh and about.engine != "edgec":
        return file, json.loads(note.read_text(encoding="utf-8"))
    peers.python(about.run_in)  # a file that nothing can run is not worth the making
    peers.python(about.made_in)
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    cost = _cost(about, case, file, peers)
    note.write_text(json.dumps(cost), encoding="utf-8")
    return file, cost


def _cost(tool: Tool, case: pathlib.Path, file: pathlib.Path, peers: Peers) -> dict[str, Any]:
    cost = quantize(peers, tool, tool.quantizer, case, file)
    build_cpu_s = None
    if tool.engine == "edgec":
        build_cpu_s = cost["cpu_s"]
        cost |= quantize(peers, tool, "edgec-passes", case, file)
    return cost | {
        "quantize_cpu_s": cost["cpu_s"],
        "quantize_peak_mb": cost["peak_mb"],
        "build_cpu_s": build_cpu_s,
    }


def _size_mb(file: pathlib.Path) -> float:
    weights = file.with_suffix(".bin")  # beside an OpenVINO .xml
    return sum(f.stat().st_size for f in (file, weights) if f.exists()) / 1e6


def _table(rows: list[Row]) -> str:
    lines = [f"\n{rows[0].model}, {rows[0].weights or 'no'} weights"]
    lines.append(
        "| tool | task | agreement | SQNR dB | MB | speed, fp32 = 1 | quantize CPU s | peak MB |"
    )
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if row.reason:
            lines.append(f"| {row.title} | not to be had: {row.reason} |||||||")
            continue
        task = "-" if row.task is None else f"{row.task_name} {row.task:.3f}"
        sqnr = "-" if row.tool == "fp32" else f"{row.sqnr_db:.1f}"
        speed = f"{row.speed:.2f} ({row.cpu_ms:.2f} ms)" if row.speed else "-"
        cost, peak = (
            "-" if value is None else f"{value:.0f}"
            for value in (row.quantize_cpu_s, row.quantize_peak_mb)
        )
        whole = f" (build {row.build_cpu_s:.0f})" if row.build_cpu_s is not None else ""
        lines.append(
            f"| {row.title} | {task} | {row.agreement:.3f} | {sqnr} | {row.size_mb:.2f} "
            f"| {speed} | {cost}{whole} | {peak} |"
        )
    return "\n".join(lines)


def _memory_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | tool | samples | CPU s | peak MB |", "|---|---|---|---|---|"]
    for row in rows:
        figures = row.get("reason") or f"{row['cpu_s']:.0f} | {row['peak_mb']:.0f}"
        lines.append(f"| {row['model']} | {row['tool']} | {row['samples']} | {figures} |")
    return "\n".join(lines)


def _footer(peers: Peers) -> str:
    import onnxruntime

    import edgec
    from edgec.machine import cpu_name

    return (
        f"\n{cpu_name()}, core {peers.cores}, 1 thread, batch 1; onnxruntime "
        f"{onnxruntime.__version__}, edgec {edgec.__version__}, peers as in peers/install.py.\n"
        "speed: median CPU time of float32 over that of the file, in turns. Random weights: only "
        "agreement and SQNR tell, and real weights quantize less easily.\n"
        "agreement: same class, same text, cosine of sentence or token vectors, same side of 0.5."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=models.MODELS, default=[*models.MODELS])
    parser.add_argument(
        "--tools", nargs="+", choices=[t for t in TOOLS if t != "fp32"], default=[*TOOLS][1:]
    )
    parser.add_argument("--peers", type=pathlib.Path, default=ROOT / ".peers", metavar="DIR")
    parser.add_argument("--work", type=pathlib.Path, metavar="DIR", help="default: PEERS/work")
    parser.add_argument("--seconds", type=float, default=30.0, help="timing, per model")
    parser.add_argument(
        "--evaluation", type=int, metavar="N", help="judge on the first N samples only"
    )
    parser.add_argument("--core", type=int, default=0, help="core that everything is bound to")
    parser.add_argument("--fresh", action="store_true", help="make cases and peers' files anew")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--samples", type=lambda text: [int(n) for n in text.split(",")], metavar="N,N,N"
    )
    parser.add_argument("--profile", nargs="+", choices=models.MODELS, metavar="MODEL")
    return parser.parse_args()


if __name__ == "__main__":
    main()
