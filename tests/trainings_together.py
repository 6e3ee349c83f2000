"""Run by torchrun in test_training_processes.py: trainings on all processes.

    trainings_together.py FOLDER STEP WAY...

Process 0 prints a line of JSON for each way: losses, held-out distance, how many parameters it
held of how many, and a digest of the trained model. At STEP (0: never) it is killed as if by
kill -9. FOLDER is for checkpoints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def student():
    """A float CNN whose weights were rounded coarsely, what it came from, and data."""
    import graphs
    import numpy as np
    import onnx_ir as ir

    reference, _ = graphs.cnn()
    model = reference.clone()
    for name in ("k1", "k2", "w"):
        value = model.graph.initializers[name]
        rounded = np.round(value.const_value.numpy() * 8) / 8
        value.const_value = ir.tensor(rounded.astype(np.float32), name=name)
    data = [{"x": graphs.feed(1, 4, 12, 12, seed=i)} for i in range(20)]
    return model, graphs.context(reference, calibration=data[:14], validation=data[14:])


def ways():
    """Settings by the name of a way to train."""
    from edgec.passes import Recover

    plain = Recover(steps=12, rate=1.0, bias_rate=1e-3, micro_batch=4, save_every=3)
    return {
        "replicated": plain,
        "recomputed": dataclasses.replace(plain, segments=3),
        "sharded": dataclasses.replace(plain, sharded=True),
        # stacks of 4, 4, 2 samples: the first process has two of them, the second one
        "uneven": dataclasses.replace(plain, batch=10, splice=False),
    }


def outcome_of(way: str, context) -> dict[str, object]:
    """What a training gives, as JSON data."""
    from edgec.passes.execution import graph_bytes
    from edgec.passes.lesson import train
    from edgec.passes.torch_graph import to_torch

    model, _ = student()
    twin = to_torch(model)
    held: set[int] = set()

    def watched(what: str, done: int, total: int) -> None:
        shards = [getattr(p, "to_local", p.detach)() for p in twin.parameters()]
        held.add(sum(shard.numel() for shard in shards))
        context.progress(what, done, total)

    found = train(twin, model, dataclasses.replace(context, progress=watched), ways()[way])
    twin.write_back(model)
    return {
        "way": way,
        "losses": found.losses,
        "after": found.after,
        "findings": found.findings,
        "held": [max(held, default=0), sum(p.numel() for p in twin.parameters())],
        "digest": hashlib.sha256(graph_bytes(model)).hexdigest(),
    }


def main(folder: str, step: str, *names: str) -> None:
    from edgec.torchrun import other_processes

    def killed_at(what: str, done: int, total: int) -> None:
        if done == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    with other_processes() as workers:
        if workers is not None and workers.rank:
            return
        _, context = student()
        rest = {"workers": workers, "work": pathlib.Path(folder), "progress": killed_at}
        for name in names:
            print(json.dumps(outcome_of(name, dataclasses.replace(context, **rest))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
