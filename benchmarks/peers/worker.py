"""A long-lived process with one file open in one runtime; it runs when it is told to.

    python -m peers.worker ENGINE FILE CORE

Reads a JSON request a line from standard input and answers with one a line:
    {"do": "load", "case": FOLDER}            -> {}           feeds for the timing
    {"do": "outputs", "case": FOLDER, "to": F, "limit": N} -> {}   F: .npy, first output, per sample
    {"do": "time", "calls": N}                -> {"cpu_ms": per call, "wall_ms": per call}
An error is answered as {"error": "..."}. CPU time is that of the whole process: some
runtimes compute in a thread of their own even when they may use only one.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np

from peers import cases
from peers.engines import ENGINES, Engine


def main() -> None:
    engine_name, file, core = sys.argv[1:4]
    os.sched_setaffinity(0, {int(core)})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a runtime prints must not end up among the answers
    prepared: Any = None
    try:
        engine = ENGINES[engine_name](pathlib.Path(file))
    except Exception as error:  # whatever a peer's runtime raises is a row's reason
        _answer(answers, {"error": _line(error)})
        return
    _answer(answers, {})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                [feeds] = cases.feeds(pathlib.Path(request["case"]), "evaluation", 1)
                prepared = engine.prepare(feeds)
                engine.run(prepared)
                _answer(answers, {})
            elif request["do"] == "outputs":
                case, to = pathlib.Path(request["case"]), pathlib.Path(request["to"])
                write_outputs(engine, case, to, request["limit"])
                _answer(answers, {})
            else:
                _answer(answers, time_block(engine, prepared, request["calls"]))
        except Exception as error:  # as above
            _answer(answers, {"error": _line(error)})


def time_block(engine: Engine, prepared: Any, calls: int) -> dict[str, float]:
    """Milliseconds per call over one block."""
    run = engine.run
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run(prepared)
    return {
        "cpu_ms": (time.process_time() - cpu) * 1e3 / calls,
        "wall_ms": (time.perf_counter() - wall) * 1e3 / calls,
    }


def write_outputs(
    engine: Engine, folder: pathlib.Path, to: pathlib.Path, limit: int | None
) -> None:
    """Run the evaluation samples and save the first output of each, [samples, ...]."""
    case = cases.read_case(folder)
    names = list(engine.names)
    kept = []
    carried: dict[str, Any] = {}
    for sample in cases.samples(folder, "evaluation", limit):
        given = {name: sample[name] for name in case.inputs}
        if case.feedback and not sample["restart"]:
            given |= carried
        outputs = engine.outputs(engine.run(engine.prepare(given)))
        kept.append(outputs[0])
        # runtimes that do not know the names keep the order
        positions = {name: names.index(name) if name in names else None for name in case.feedback}
        carried = {
            target: outputs[index if (index := positions[source]) is not None else 1 + place]
            for place, (source, target) in enumerate(case.feedback.items())
        }
    np.save(to, np.stack(kept).astype(np.float32))


def _answer(to: Any, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=to, flush=True)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


if __name__ == "__main__":
    main()
