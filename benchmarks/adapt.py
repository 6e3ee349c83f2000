"""Fashion-MNIST in two rounds, and an adapter that is swapped in: what adapting keeps and costs.

    python benchmarks/adapt.py [--tasks alike mixed] [--seeds 3] [--steps 1000]
                                [--images 24000] [--json]
    python benchmarks/adapt.py --adapter [--rank 1] [--json]     # the second table alone

Two rounds: a network learns five classes (task A), then `adapt` teaches it the other five
(task B) with a head grown to ten. Rows: nothing against forgetting, replay of a memory, learning
without forgetting, elastic weight consolidation, and a sum. For comparison the same network
trained on B alone, and on both at once, the most that can be had. Every figure is among all ten
classes, on the 10,000 test images, judged once at the end; --held-out judges on 4,000 training
images kept apart instead, and what is printed on the way is always of those. "alike": A is the
five that look alike (tops), B the rest; "mixed": A is classes 0 to 4, B 5 to 9, and shirts (6)
look like four classes of A, which costs A even where both are learned at once.

Adapter: the network learns all classes, is built to a bundle in float32 and int8 with slots,
and an adapter teaches it images that stand on their head.

Left out on purpose: other data sets and networks, more than two rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import onnx_ir as ir  # noqa: E402
from fashion import (  # noqa: E402
    OUTPUT,
    Part,
    exported,
    fashion,
    progress,
    trained,
)
from torch import nn  # noqa: E402

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402
from edgec.adaptation import adapt  # noqa: E402
from edgec.passes import Context  # noqa: E402
from edgec.passes.adapt import Adapt  # noqa: E402
from edgec.passes.adapter_slots import trainable_form  # noqa: E402
from edgec.passes.continual import Memory, choose, write_memory  # noqa: E402
from edgec.passes.curriculum import Example  # noqa: E402
from edgec.passes.execution import open_session, run_feeds  # noqa: E402
from edgec.passes.head import find_head  # noqa: E402
from edgec.targets import load_target  # noqa: E402

TASKS = {"alike": ((0, 2, 3, 4, 6), (1, 5, 7, 8, 9)), "mixed": ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))}
EPOCHS = 3
MEMORY = 200  # samples of each class
RATE = 2e-3  # of the second round; chosen with KEPT on held-out images of three seeds
KEPT = 2.0  # keep_weight
LEARNED = 4_000  # upright and turned images that an adapter is trained on
SWAPS = 50
RECIPES = {
    "float32": ["cleanup", "fuse", "lower", "adapter-slots"],
    "int8": ["cleanup", "fuse", "quantize-static", "lower", "adapter-slots"],
}
METHODS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "replay + without forgetting": {"replay": 0.5, "keep_weight": KEPT},
    "replay": {"replay": 0.5},
    "without forgetting": {"replay": 0.0, "keep_weight": KEPT},
    "consolidation": {"replay": 0.0, "ewc_weight": 1000.0},
}


@dataclass(frozen=True)
class Round:
    """One way to learn task B. a, b: accuracy in % on either task, mean over the seeds.

    a_loss: points that A lost. b_loss: points behind learning B alone, from the start or from A's
    network with nothing against forgetting, whichever is better. spread: the largest
    standard deviation of the two, over the seeds; 0 for one seed.
    """

    tasks: str
    method: str
    a: float
    b: float
    a_loss: float
    b_loss: float
    spread: float


@dataclass(frozen=True)
class Swap:
    """A bundle and an adapter. upright, turned: accuracy in %, without and with the adapter.

    share: adapter's bytes over those of the bundle's graph and weights, in %. 1 KB = 1000 bytes.
    swap_ms: median of ``use_adapter``; call_ms: of the next call with one image.
    """

    bundle: str
    rank: int
    upright: float
    turned: float
    turned_adapted: float
    merged: float
    base_kb: float
    adapter_kb: float
    share: float
    swap_ms: float
    call_ms: float


def main() -> None:
    asked = _arguments()
    lines: list[dict[str, Any]] = []
    if not asked.adapter:
        for tasks in asked.tasks:
            rounds = two_rounds(tasks, asked.seeds, asked.steps, asked.images, asked.held_out)
            lines += [asdict(row) for row in rounds]
            if not asked.json:
                print_rounds(tasks, rounds)
    if asked.adapter or not asked.tasks_only:
        swaps = adapters(asked.rank, asked.images, asked.held_out)
        lines += [asdict(row) for row in swaps]
        if not asked.json:
            print_swaps(swaps)
    if asked.json:
        print(json.dumps(lines))


def two_rounds(tasks: str, seeds: int, steps: int, images: int, held_out: bool) -> list[Round]:
    """Every method's row, and those of training B alone and both at once."""
    found = [_one_seed(tasks, seed, steps, images, held_out) for seed in range(seeds)]
    rows = []
    for method in found[0]:
        a = [f[method][0] for f in found]
        b = [f[method][1] for f in found]
        a_loss = [f["A alone"][0] - f[method][0] for f in found]
        b_loss = [max(f["B alone"][1], f["nothing"][1]) - f[method][1] for f in found]
        spread = float(max(np.std(a_loss), np.std(b_loss)))
        means = [statistics.fmean(values) for values in (a, b, a_loss, b_loss)]
        rows.append(Round(tasks, method, *means, spread))
    return rows


def _one_seed(
    tasks: str, seed: int, steps: int, images: int, held_out: bool
) -> dict[str, tuple[float, float]]:
    """Accuracy on A and B in %, by method. What is printed on the way is of held-out images."""
    data, classes = fashion(seed), TASKS[tasks]
    first, second = (_task(data.learned.first(images), classes, i) for i in (0, 1))
    both = Part(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.classes, second.classes]),
    )
    shown = [_task(data.held_out, classes, i) for i in (0, 1)]
    sides = shown if held_out else [_task(data.test, classes, i) for i in (0, 1)]
    stopped = _task(data.held_out, classes, 1).first(1000)

    def learned(part: Part, outputs: int, what: str) -> ir.Model:
        module = trained(
            lambda: _network(outputs), part, epochs=EPOCHS, seed=seed, what=f"{tasks} {what}"
        )
        return exported(module)

    def judged(name: str, model: ir.Model) -> None:
        found[name] = _accuracy(model, sides[0]), _accuracy(model, sides[1])
        seen = [f"{_accuracy(model, part):.2f}" for part in shown]
        progress(f"{tasks} seed {seed}: {name}: held-out A {seen[0]}, B {seen[1]}")

    found: dict[str, tuple[float, float]] = {}
    reference = learned(first, 5, "A")
    context = Context(target=load_target("x86-64"), reference=reference, seed=seed)
    base = trainable_form(context)
    context = replace(
        context,
        reference=base,
        calibration=second.feeds(),
        calibration_labels=second.labels(),
        validation=stopped.feeds(),
        validation_labels=stopped.labels(),
    )
    judged("A alone", base)
    judged("B alone", learned(second, 10, "B"))
    judged("both at once", learned(both, 10, "both"))
    with tempfile.TemporaryDirectory() as folder:
        memory = pathlib.Path(folder) / "a.memory.npz"
        samples = [Example(f, c) for f, c in zip(first.feeds(), first.labels(), strict=True)]
        picked = [s for own in choose(base, find_head(base), samples, MEMORY).values() for s in own]
        # every fourth chooses the best state, though the network of A has seen it
        kept = tuple(s for i, s in enumerate(picked) if i % 4 != 3)
        write_memory(memory, Memory(kept, tuple(picked[3::4])))
        for method, settings in METHODS.items():
            chosen = Adapt(
                classes=10,
                head="grow",
                steps=steps,
                batch=64,
                rate=RATE,
                memory=str(memory) if settings else "",
                **settings,
            )
            judged(method, chosen.run(base.clone(), context).model)
    return found


def adapters(rank: int, images: int, held_out: bool) -> list[Swap]:
    """One row for a float32 bundle and one for an int8 bundle."""
    data = fashion()
    module = trained(
        lambda: _network(10), data.learned.first(images), epochs=EPOCHS, seed=0, what="all classes"
    )
    reference = exported(module)
    judged = data.held_out if held_out else data.test
    learned = _turned(data.learned.first(LEARNED))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        ir.save(reference, folder / "fashion.onnx")
        common = {"rate": 3e-3, "steps": 600, "progress": lambda *_: None}
        progress("adapter: merged")
        into = folder / "merged.onnx"
        adapt(
            folder / "fashion.onnx",
            lambda: _pairs(learned),
            into,
            method="lora",
            rank=rank,
            **common,
        )
        merged = _accuracy(ir.load(into), _turned(judged))
        for kind, recipe in RECIPES.items():
            bundle = folder / f"{kind}.edgec"
            progress(f"adapter: {kind} bundle")
            edgec.build(
                folder / "fashion.onnx",
                target="x86-64",
                output=bundle,
                calibration=lambda: _pairs(data.learned.first(64)),
                recipe=recipe,
                settings=[f"adapter-slots.rank={rank}"],
                verify=False,
            )
            file = folder / f"{kind}.onnx_adapter"
            adapt(bundle, lambda: _pairs(learned), file, **common)
            rows.append(_swap(kind, bundle, file, rank, judged, merged))
    return rows


def _swap(
    kind: str, bundle: pathlib.Path, file: pathlib.Path, rank: int, judged: Part, merged: float
) -> Swap:
    model = edgec_runtime.load(bundle, threads=1)
    upright, turned = (_share(model, part) for part in (judged, _turned(judged)))
    swaps, calls = [], []
    image = judged.images[:1]
    for _ in range(SWAPS):
        model.use_adapter(None)
        model(image)
        started = time.perf_counter()
        model.use_adapter(file)
        swapped = time.perf_counter()
        model(image)
        swaps.append(swapped - started)
        calls.append(time.perf_counter() - swapped)
    adapted = _share(model, _turned(judged))
    entries = {entry.name: entry.size for entry in model.manifest.entries}
    base, size = entries["weights.bin"] + entries["graph.onnx"], file.stat().st_size
    return Swap(
        bundle=kind,
        rank=rank,
        upright=upright,
        turned=turned,
        turned_adapted=adapted,
        merged=merged,
        base_kb=base / 1e3,
        adapter_kb=size / 1e3,
        share=100.0 * size / base,
        swap_ms=1e3 * statistics.median(swaps),
        call_ms=1e3 * statistics.median(calls),
    )


def _network(outputs: int) -> nn.Module:
    """Two convolutions and two linear layers, 207,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, outputs),
    )


def _accuracy(model: ir.Model, part: Part) -> float:
    (feeds,) = part.feeds(len(part.images))
    found = run_feeds(open_session(model, outputs=[OUTPUT]), feeds)[0].argmax(1)
    return 100.0 * float((found == part.classes).mean())


def _task(part: Part, classes: tuple[tuple[int, ...], ...], index: int) -> Part:
    """The images of one task; its classes are numbered 0 to 4, or 5 to 9."""
    numbers = np.full(10, -1)
    numbers[list(classes[index])] = np.arange(5) + 5 * index
    chosen = numbers[part.classes] >= 0
    return Part(part.images[chosen], numbers[part.classes[chosen]])


def _turned(part: Part) -> Part:
    return Part(np.ascontiguousarray(part.images[:, :, ::-1]), part.classes)


def _pairs(part: Part) -> Iterator[tuple[dict[str, Any], Any]]:
    for feeds, labels in zip(part.feeds(), part.labels(), strict=True):
        yield dict(feeds), labels["label"]


def _share(model: edgec_runtime.Model, part: Part) -> float:
    (feeds,) = part.feeds(len(part.images))
    return 100.0 * float((model(**feeds)[OUTPUT].argmax(1) == part.classes).mean())


def print_rounds(tasks: str, rounds: list[Round]) -> None:
    """The first table."""
    print(f"\n{tasks}: A = {TASKS[tasks][0]}, then B = {TASKS[tasks][1]}; accuracy in %")
    print(f"{'second round':30} {'A':>7} {'B':>7} {'A lost':>8} {'B behind':>9} {'spread':>7}")
    for row in rounds:
        figures = (row.a, row.b, row.a_loss, row.b_loss)
        a, b, a_loss, b_loss = ("-" if np.isnan(f) else f"{f:.2f}" for f in figures)
        spread = "-" if np.isnan(row.spread) else f"{row.spread:.2f}"
        print(f"{row.method:30} {a:>7} {b:>7} {a_loss:>8} {b_loss:>9} {spread:>7}")


def print_swaps(swaps: list[Swap]) -> None:
    """The second table."""
    print("\nadapter: images on their head; accuracy in %")
    print(
        f"{'bundle':8} {'rank':>4} {'upright':>8} {'turned':>7} {'+adapter':>9} {'merged':>7} "
        f"{'base KB':>8} {'adapter KB':>11} {'share %':>8} {'swap ms':>8} {'call ms':>8}"
    )
    for s in swaps:
        print(
            f"{s.bundle:8} {s.rank:4d} {s.upright:8.2f} {s.turned:7.2f} {s.turned_adapted:9.2f} "
            f"{s.merged:7.2f} {s.base_kb:8.1f} {s.adapter_kb:11.1f} {s.share:8.2f} "
            f"{s.swap_ms:8.2f} {s.call_ms:8.2f}"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of the second round")
    parser.add_argument("--images", type=int, default=24_000, help="to learn from, at most 56,000")
    parser.add_argument("--adapter", action="store_true", help="the second table alone")
    parser.add_argument("--tasks-only", action="store_true", help="the first table alone")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--held-out", action="store_true", help="do not touch the test images")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
