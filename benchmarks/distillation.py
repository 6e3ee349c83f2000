"""What distillation wins back, on Fashion-MNIST: tables of accuracy on the 10,000 test images.

    python benchmarks/distillation.py --kinds [--seeds 3] [--steps 1500]   # a smaller student
    python benchmarks/distillation.py --int4                # 4-bit weights, without labels
    python benchmarks/distillation.py --progressive         # bits and weights taken step by step
    python benchmarks/distillation.py --swap                # HardSwish -> ReLU6, int8, its speed

--kinds: a teacher and a student with a quarter of its parameters that has seen every image and
its label once. Then each row trains the same student for the same steps on the same
samples: with labels alone, or with response, feature and relation distillation beside them.
A gain is the mean over seeds of the difference to labels alone; it counts where it exceeds
twice its standard error, which holds the spread of the seeds and that of the test images.

--progressive: the same training, for the same steps, with all bits or weights taken at once and
with a cubic schedule. A seed gives the order of the samples, the network is the same.

Settings are fixed in this file, as first guesses. 4,000 training images are held out: the best
state of each training is chosen on them. The test images are looked at for the table alone. The
int4 network is one with depthwise convolutions, since a plain one loses nothing to int4. One
thread, seeds fixed: accuracies repeat to the last digit. --work keeps the networks that are
trained in float32, which take the longest.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import fashion  # noqa: E402
import numpy as np  # noqa: E402
import onnx_ir as ir  # noqa: E402
import torch  # noqa: E402
from fashion import Array, Fashion  # noqa: E402

from edgec.bench import interleave  # noqa: E402
from edgec.passes import (  # noqa: E402
    Cleanup,
    Context,
    Fuse,
    Lower,
    PruneMagnitude,
    QuantizeStatic,
    Recover,
    SwapActivations,
)
from edgec.passes.execution import open_session  # noqa: E402
from edgec.targets import load_target  # noqa: E402

TARGET = load_target("x86-64")
BATCH = 64
STEPS = {"kinds": 1500, "int4": 600, "progressive": 600, "swap": 400}
# the relations' weights are those of Park et al. 2019, section 4
KINDS = {
    "labels alone": {},
    "+ response": {"response_weight": 1.0, "temperature": 4.0},
    "+ feature": {"feature_weight": 1.0},
    "+ relation": {"distance_weight": 25.0, "angle_weight": 50.0},
    "+ all three": {
        "response_weight": 1.0,
        "temperature": 4.0,
        "feature_weight": 1.0,
        "distance_weight": 25.0,
        "angle_weight": 50.0,
    },
}
_COUNTS = 2.0  # standard errors from which a gain counts
_ROUNDS = 4  # of pruning


@dataclass(frozen=True)
class Row:
    """right: for each seed, which test images are right."""

    name: str
    right: list[Array]

    @property
    def accuracies(self) -> list[float]:
        """Of every seed, in percent."""
        return [100.0 * float(right.mean()) for right in self.right]

    @property
    def mean(self) -> float:
        """Over the seeds, in percent."""
        return statistics.mean(self.accuracies)


def main() -> None:
    asked = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        nets = Networks(asked.work or pathlib.Path(scratch), fashion.fashion(), asked.epochs)
        if asked.kinds:
            steps = asked.steps or STEPS["kinds"]
            print(kinds(nets, asked.seeds, steps, judged_on_test=not asked.held_out))
        if asked.int4:
            print(int4(nets, asked.steps or STEPS["int4"], judged_on_test=not asked.held_out))
        if asked.progressive:
            steps = asked.steps or STEPS["progressive"]
            print(progressive(nets, asked.seeds, steps, judged_on_test=not asked.held_out))
        if asked.swap:
            print(swap(nets, asked.steps or STEPS["swap"], judged_on_test=not asked.held_out))


class Networks:
    """Networks trained in float32, as references, kept in a folder."""

    def __init__(self, folder: pathlib.Path, data: Fashion, epochs: int) -> None:
        """folder: where they are kept from one run to the next. epochs: of large networks."""
        self._folder, self.data, self.epochs = folder, data, epochs
        folder.mkdir(parents=True, exist_ok=True)

    def trained(
        self,
        name: str,
        make: Callable[[], torch.nn.Module],
        *,
        epochs: int,
        seed: int = 0,
    ) -> pathlib.Path:
        """The .onnx file of a network."""
        path = self._folder / f"{name}-{epochs}-{seed}.onnx"
        if not path.exists():
            module = fashion.trained(make, self.data.learned, epochs=epochs, seed=seed, what=name)
            ir.save(fashion.exported(module), path)
        return path


def kinds(nets: Networks, seeds: int, steps: int, *, judged_on_test: bool) -> str:
    """The table of Done-when 3: each kind alone and all together against labels alone."""
    data = nets.data
    judged = data.test if judged_on_test else data.held_out
    teacher = nets.trained("mobile", fashion.mobile_cnn, epochs=nets.epochs)
    rows = {name: Row(name, []) for name in ("student before", *KINDS)}
    for seed in range(seeds):
        path = nets.trained("student", lambda: fashion.mobile_cnn(7), epochs=1, seed=seed)
        student = ir.load(path)
        rows["student before"].right.append(fashion.correct(student, judged))
        context = Context(
            target=TARGET,
            reference=student,
            calibration=data.learned.feeds(BATCH),
            calibration_labels=data.learned.labels(BATCH),
            validation=data.held_out.feeds(BATCH),
            validation_labels=data.held_out.labels(BATCH),
            seed=seed,
        )
        for name, weights in KINDS.items():
            fashion.progress(f"seed {seed}: {name}")
            chosen = _distilling(teacher, steps, weights)
            made = fashion.built([Cleanup(), Fuse(), chosen], student, context)
            rows[name].right.append(fashion.correct(made, judged))
    sizes = [fashion.parameters(ir.load(path)) for path in (teacher, path)]
    best = 100.0 * float(fashion.correct(ir.load(teacher), judged).mean())
    return _kinds_table(list(rows.values()), sizes, best, len(judged.classes), steps)


def _distilling(teacher: pathlib.Path, steps: int, weights: dict[str, float]) -> Recover:
    """Recover with labels and the given losses; all others off."""
    none = {"response_weight": 0.0, "feature_weight": 0.0}
    settings = Recover(
        teacher=str(teacher),
        steps=steps,
        batch=1,  # of BATCH images
        splice=False,
        rate=1.0,
        bias_rate=0.02,
        label_weight=1.0,
    )
    return replace(settings, **(none | weights))


def int4(nets: Networks, steps: int, *, judged_on_test: bool) -> str:
    """Done-when 2: int4 weights, int8 activations, recovered without labels."""
    data = nets.data
    judged = data.test if judged_on_test else data.held_out
    path = nets.trained("mobile", fashion.mobile_cnn, epochs=nets.epochs)
    reference = ir.load(path)
    context = Context(
        target=TARGET,
        reference=reference,
        calibration=data.learned.first(16_384).feeds(BATCH),
        validation=data.held_out.first(2_048).feeds(BATCH),
    )
    quantizer = QuantizeStatic(weight_bits=4)
    recover = Recover(steps=steps, batch=1, rate=0.05, bias_rate=2e-3, scale_rate=1e-3)
    rows = [("float32", reference)]
    for name, passes in {
        "int8, PTQ": [QuantizeStatic()],
        "int4 weights, PTQ": [quantizer],
        "int4 weights, recovered": [quantizer, recover],
    }.items():
        fashion.progress(name)
        rows.append(
            (name, fashion.built([Cleanup(), Fuse(), *passes, Lower()], reference, context))
        )
    right = {name: fashion.correct(model, judged) for name, model in rows}
    lines = [
        f"mobile_cnn, {fashion.parameters(reference):,} parameters; "
        f"{len(judged.classes):,} images, no labels used",
        "| model | accuracy % | against float32, pp |",
        "|---|---|---|",
    ]
    base = right["float32"]
    lines += [
        f"| {name} | {100 * found.mean():.2f} | {100 * (found.mean() - base.mean()):+.2f} "
        f"(s.e. {100 * _paired_error(found, base):.2f}) |"
        for name, found in right.items()
    ]
    return "\n".join(lines)


def progressive(nets: Networks, seeds: int, steps: int, *, judged_on_test: bool) -> str:
    """The table of bits and of weights that go at once or step by step.

    Layers of 1,024 weights and more are pruned: a depthwise filter would keep one of its nine.
    """
    data = nets.data
    judged = data.test if judged_on_test else data.held_out
    reference = ir.load(nets.trained("mobile", fashion.mobile_cnn, epochs=nets.epochs))
    quantizer, prune = QuantizeStatic(weight_bits=4), PruneMagnitude(sparsity=0.9)
    training = Recover(steps=steps, batch=1, judgements=4)
    few = replace(training, rate=0.05, bias_rate=2e-3, scale_rate=1e-3)
    sparse = replace(training, rate=1.0, bias_rate=0.02)
    rounds = replace(prune, rounds=_ROUNDS), replace(sparse, steps=steps // _ROUNDS)
    pairs = {
        "int4 weights at once": [quantizer, few],
        "from 8 bits on": [quantizer, replace(few, bits_from=8)],
        "90 % zeros in large layers at once": [prune, sparse],
        f"in {_ROUNDS} rounds": [*rounds],
    }
    rows = {name: Row(name, []) for name in pairs}
    for seed in range(seeds):
        context = Context(
            target=TARGET,
            reference=reference,
            calibration=data.learned.first(8_192).feeds(BATCH),
            validation=data.held_out.first(1_024).feeds(BATCH),
            seed=seed,
        )
        for name, passes in pairs.items():
            fashion.progress(f"seed {seed}: {name}")
            made = fashion.built([Cleanup(), Fuse(), *passes, Lower()], reference, context)
            rows[name].right.append(fashion.correct(made, judged))
            fashion.progress(f"  {rows[name].accuracies[-1]:.2f} %")
    best = 100.0 * float(fashion.correct(reference, judged).mean())
    lines = [
        f"mobile_cnn, {best:.2f} % in float32; {seeds} seeds, {steps} steps of {BATCH} images in "
        f"all; accuracy on {len(judged.classes):,} images, no labels used",
        "| model | mean % | each seed | gain, pp | s.e. | |",
        "|---|---|---|---|---|---|",
    ]
    before = None
    for row in rows.values():
        each = " ".join(f"{a:.2f}" for a in row.accuracies)
        verdict = ["", "", ""] if before is None else _verdict(row, before)
        lines.append("| " + " | ".join([row.name, f"{row.mean:.2f}", each, *verdict]) + " |")
        before = row if before is None else None
    return "\n".join(lines)


def swap(nets: Networks, steps: int, *, judged_on_test: bool) -> str:
    """Done-when 4: HardSwish swapped for ReLU6, recovered, int8; how much faster that is."""
    data = nets.data
    judged = data.test if judged_on_test else data.held_out
    path = nets.trained("hardswish", fashion.smooth_cnn, epochs=nets.epochs)
    reference = ir.load(path)
    context = Context(
        target=TARGET,
        reference=reference,
        calibration=data.learned.first(16_384).feeds(BATCH),
        validation=data.held_out.first(2_048).feeds(BATCH),
    )
    recover = Recover(steps=steps, batch=1, rate=0.5, bias_rate=0.01)
    models = {"float32, HardSwish": reference}
    for name, passes in {
        "int8, HardSwish": [Cleanup(), Fuse(), QuantizeStatic(), Lower()],
        "float32, ReLU6": [Cleanup(), Fuse(), SwapActivations()],
        "float32, ReLU6, recovered": [Cleanup(), Fuse(), SwapActivations(), recover],
    }.items():
        fashion.progress(name)
        models[name] = fashion.built(passes, reference, context)
    fashion.progress("int8, ReLU6, recovered")
    models["int8, ReLU6, recovered"] = fashion.built(
        [QuantizeStatic(), Lower()], models["float32, ReLU6, recovered"], context
    )
    sessions = {n: open_session(model, settings=TARGET.session) for n, model in models.items()}
    feeds = data.held_out.first(1).feeds()[0]
    timings = interleave(
        [(name, lambda s=session: s.run(None, feeds)) for name, session in sessions.items()],
        seconds=20.0,
        max_runs=20_000,
        clock=time.thread_time,
    )
    first = next(iter(models))
    base = fashion.correct(reference, judged)
    lines = [
        f"smooth_cnn, {fashion.parameters(reference):,} parameters; "
        f"{len(judged.classes):,} images; CPU time in turns, 1 thread, batch 1",
        "| model | accuracy % | against float32, pp | ms | speed, float32 HardSwish = 1 |",
        "|---|---|---|---|---|",
    ]
    slowest = {timing.name: timing.median_ms for timing in timings}
    for name, model in models.items():
        right = fashion.correct(model, judged)
        lines.append(
            f"| {name} | {100 * right.mean():.2f} | {100 * (right.mean() - base.mean()):+.2f} "
            f"| {slowest[name]:.3f} | {slowest[first] / slowest[name]:.2f} |"
        )
    return "\n".join(lines)


def _kinds_table(rows: list[Row], sizes: list[int], teacher: float, images: int, steps: int) -> str:
    base = next(row for row in rows if row.name == "labels alone")
    seeds = len(base.right)
    lines = [
        f"teacher {sizes[0]:,} parameters, {teacher:.2f} %; student {sizes[1]:,} "
        f"({sizes[1] / sizes[0]:.2f}); {seeds} seeds, {steps} steps of {BATCH} images; "
        f"accuracy on {images:,} images",
        "| student | mean % | each seed | spread (s.d.) | gain, pp | s.e. | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        each = row.accuracies
        spread = f"{statistics.stdev(each):.2f}" if seeds > 1 else "-"
        cells = [row.name, f"{row.mean:.2f}", " ".join(f"{a:.2f}" for a in each)]
        told = row is not base and row.name in KINDS
        verdict = _verdict(row, base) if told else ["", "", ""]
        lines.append("| " + " | ".join([*cells, spread, *verdict]) + " |")
    return "\n".join(lines)


def _verdict(row: Row, base: Row) -> list[str]:
    """Cells of a table: the gain, its standard error, and whether it counts."""
    gain, error = _gain(row, base)
    counts = abs(gain) > _COUNTS * error
    return [f"{gain:+.2f}", f"{error:.2f}", "" if counts else "within the noise"]


def _gain(row: Row, base: Row) -> tuple[float, float]:
    """Mean gain over the seeds in pp, and its standard error: of seeds and of test images."""
    gains = [a - b for a, b in zip(row.accuracies, base.accuracies, strict=True)]
    images = [_paired_error(a, b) for a, b in zip(row.right, base.right, strict=True)]
    of_images = 100.0 * statistics.mean(images)  # all seeds are judged on the same images
    of_seeds = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return statistics.mean(gains), math.hypot(of_seeds, of_images)


def _paired_error(right: Array, other: Array) -> float:
    """Standard error of the difference of two shares on the same images."""
    difference = right.astype(np.float64) - other
    return float(difference.std() / math.sqrt(len(difference)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", action="store_true", help="a student of a quarter's size")
    parser.add_argument("--int4", action="store_true", help="4-bit weights, 8-bit activations")
    parser.add_argument("--progressive", action="store_true", help="step by step against at once")
    parser.add_argument("--swap", action="store_true", help="HardSwish swapped for ReLU6, int8")
    parser.add_argument("--seeds", type=int, default=3, help="of --kinds and --progressive")
    parser.add_argument("--epochs", type=int, default=2, help="of the networks in float32")
    parser.add_argument("--steps", type=int, help=f"of each training; default: {STEPS}")
    parser.add_argument("--held-out", action="store_true", help="judge on held-out images instead")
    parser.add_argument("--work", type=pathlib.Path, metavar="DIR", help="keep float32 networks")
    asked = parser.parse_args()
    if not (asked.kinds or asked.int4 or asked.progressive or asked.swap):
        parser.error("give --kinds, --int4, --progressive or --swap")
    return asked


if __name__ == "__main__":
    main()
