"""One decode step of a decoder: fused against unfused, float32 against int4, in turns.

    python benchmarks/decoder_step.py [--past 256] [--rounds 30] [--target x86-64] [MODEL]

Takes the decoder of an .onnx file or of a Hugging Face directory, else SmolLM2-135M of the
fixtures, and makes four graphs of it: as exported (cleaned), lowered, int4 with its attention as
exported, int4 lowered. Each round runs one step of each, one thread, behind a past of ``--past``
positions; the figures are medians of CPU milliseconds, and their ratio to the first graph.
Caches grow: every step is fed the same past. Load on the machine falsifies it.

Left out: shared cache buffers, prompts, other threads.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import numpy as np  # noqa: E402
import onnx_ir as ir  # noqa: E402

from edgec.export_huggingface import export_directory  # noqa: E402
from edgec.passes import Cleanup, Context, Fuse, Lower, QuantizeWeights  # noqa: E402
from edgec.passes.execution import open_session  # noqa: E402
from edgec.targets import Target, load_target  # noqa: E402

_DECODER_KERNELS = ("GroupQueryAttention", "RotaryEmbedding")


def main() -> None:
    asked = _arguments()
    target = load_target(asked.target)
    model = _model(asked.model, target)
    print(f"{len(list(model.graph))} nodes as exported", file=sys.stderr)
    graphs = variants(model, target)
    sessions = {
        name: open_session(graph, settings=target.session) for name, graph in graphs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(asked.rounds + 3):
        for name, session in sessions.items():
            feeds = step_feeds(graphs[name], asked.past)
            started = time.process_time()
            session.run(None, feeds)
            if turn >= 3:  # warm
                times[name].append(1000 * (time.process_time() - started))
    rows = []
    first = float(np.median(times[next(iter(times))]))
    for name, taken in times.items():
        median = float(np.median(taken))
        rows.append(
            {
                "graph": name,
                "nodes": len(list(graphs[name].graph)),
                "cpu_ms": round(median, 2),
                "ratio": round(median / first, 3),
            }
        )
    for row in rows:
        print(
            f"{row['graph']:24} {row['nodes']:6} nodes {row['cpu_ms']:8.2f} ms {row['ratio']:6.3f}"
        )
    print(json.dumps({"past": asked.past, "rounds": asked.rounds, "rows": rows}))


def variants(model: ir.Model, target: Target) -> dict[str, ir.Model]:
    """The graphs to compare, by name; weights are shared where they are the same."""
    context = Context(target=target, reference=model)
    clean = model
    for step in (Cleanup(), Fuse()):
        clean = step.run(clean.clone(), context).model
    kernels = tuple(kernel for kernel in target.kernels if kernel not in _DECODER_KERNELS)
    plain = replace(context, target=replace(target, kernels=kernels))
    int4 = QuantizeWeights(bits=4, method="rtn", embedding_bits=4).run(clean.clone(), context).model
    return {
        "float32, as exported": clean,
        "float32, lowered": Lower().run(clean.clone(), context).model,
        "int4, attention kept": Lower().run(int4.clone(), plain).model,
        "int4, lowered": Lower().run(int4.clone(), context).model,
    }


def step_feeds(model: ir.Model, past: int) -> Mapping[str, np.ndarray[Any, Any]]:
    """Feeds of one row and one token behind ``past`` random positions."""
    random = np.random.default_rng(0)
    feeds: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": np.array([[7]]),
        "attention_mask": np.ones((1, past + 1), np.int64),
        "position_ids": np.array([[past]]),
    }
    for value in model.graph.inputs:
        name, shape = str(value.name), value.shape
        if name.startswith("past_key_values.") and shape is not None:
            size = (1, int(shape[1]), past, int(shape[3]))
            feeds[name] = random.standard_normal(size).astype(np.float32)
    wanted = {str(value.name) for value in model.graph.inputs}
    return {name: array for name, array in feeds.items() if name in wanted}


def _model(path: pathlib.Path | None, target: Target) -> ir.Model:
    """The decoder of an .onnx file, of a Hugging Face directory, or of the fixtures."""
    if path is not None and path.suffix == ".onnx":
        return ir.load(path)
    if path is not None:
        return export_directory(path, target).model
    from fixtures.language import smollm2

    with tempfile.TemporaryDirectory() as folder:
        return export_directory(smollm2(pathlib.Path(folder)), target).model


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=pathlib.Path)
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--target", default="x86-64")
    return parser.parse_args()


if __name__ == "__main__":
    main()
