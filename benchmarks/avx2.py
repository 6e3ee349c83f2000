"""x86-64 without VNNI: does an int8 bundle still compute what it computes elsewhere?

    python tests/fixtures/install.py --debian    # qemu-user, among others; or apt-get install it
    python benchmarks/avx2.py [--only ocr ...] [--samples 8] [--emulated 2] [--repeats 40] [--json]

AVX2 multiplies uint8 by int8 and adds pairs of products in 16 bits, which saturate; VNNI adds
in 32 bits. Three ways out are compared, beside float32:

    target x86-64   the session option session.x64quantprecision, set where VNNI is absent
    s8, 7 bits      the weights keep a bit free (``int8.reduce_range``)
    u8              weights are uint8: ONNX Runtime widens both sides to 16 bits first

The target x86-64-avx2 ships one of the last two; the table names the other one beside it.

SQNR is that of the outputs against float32, on this machine, on this CPU with everything
newer than AVX2 hidden from its programs, and on a Haswell emulated by qemu (the first
samples only: it is some hundred times slower). Times are CPU time per call on one thread,
calls in turns, as ratios to float32 on the same machine; qemu's times say nothing.
What is not to be had (qemu-user, a C compiler, CPUID faulting) is left out, with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import numpy as np  # noqa: E402
from fixtures import haswell  # noqa: E402
from fixtures.locate import FixtureMissing  # noqa: E402

import edgec  # noqa: E402
from edgec.targets import Target, load_target  # noqa: E402
from edgec_runtime.golden import sqnr_db  # noqa: E402

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Given = tuple[Any, Callable[[], Iterator[Feeds]] | None, list[Feeds]]

RUNNER = str(ROOT / "tests" / "fixtures" / "run_bundles.py")
FLOAT = "float32"


@dataclass(frozen=True)
class Row:
    """One model under one scheme. sqnr_db, speed: by machine; speed is fp32's time over ours."""

    model: str
    scheme: str
    size_mb: float
    sqnr_db: Mapping[str, float]
    speed: Mapping[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=64, help="samples")
    parser.add_argument("--emulated", type=int, default=2, help="samples under qemu; 0: no qemu")
    parser.add_argument("--repeats", type=int, default=40, help="timed calls")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        machines = list(_machines(place, asked.samples, asked.emulated))
        for name in asked.only:
            print(f"{name} ...", file=sys.stderr)
            try:
                given = MODELS[name](asked.calibration, asked.samples)
            except FixtureMissing as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
                continue
            rows += measured(name, given, machines, place, asked.repeats)
            if not asked.json:
                print(table(rows[-len(schemes()) - 1 :], machines), file=sys.stderr)
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(table(rows, machines))


def schemes() -> dict[str, Target]:
    """The targets as they are shipped, and the ways out that x86-64-avx2 did not take."""
    x64, avx2 = load_target("x86-64"), load_target("x86-64-avx2")
    seven = replace(avx2.int8, weight="int8", reduce_range=True)
    unsigned = replace(avx2.int8, weight="uint8", reduce_range=False)
    ways = {"s8, 7 bits": seven, "u8": unsigned}
    return {
        "target x86-64": x64,
        "target x86-64-avx2": avx2,
        **{name: replace(avx2, int8=way) for name, way in ways.items() if way != avx2.int8},
    }


def measured(
    model: str,
    given: Given,
    machines: Sequence[tuple[haswell.Machine, int]],
    folder: pathlib.Path,
    repeats: int,
) -> list[Row]:
    """float32 and every scheme of one model on every machine."""
    source, calibration, samples = given
    bundles = {FLOAT: folder / f"{model}.float.edgec"}
    judged = {"evaluation": lambda: samples, "calibration": calibration}
    edgec.build(source, target="x86-64", output=bundles[FLOAT], recipe="lower", **judged)
    # the exported reference serves all: an export takes longer than its quantization
    exported = bundles[FLOAT].with_name(f"{model}.float.reference.onnx")
    for number, (scheme, target) in enumerate(schemes().items()):
        bundles[scheme] = folder / f"{model}.{number}.edgec"
        edgec.build(exported, target=target, output=bundles[scheme], keep_reference=False, **judged)
    found: dict[str, tuple[dict[str, float], Array]] = {}
    exact = run(haswell.native(), [bundles[FLOAT]], samples, folder, 0)[0][0]
    for machine, count in machines:
        turns = repeats if count == len(samples) else 0
        outputs, seconds = run(machine, list(bundles.values()), samples[:count], folder, turns)
        noise = {
            scheme: worst_sqnr_db(exact[:count], outputs[place])
            for place, scheme in enumerate(bundles)
        }
        found[machine.name] = noise, np.median(seconds, axis=1) if turns else np.array([])
    return [
        Row(
            model=model,
            scheme=scheme,
            size_mb=bundles[scheme].stat().st_size / 1e6,
            sqnr_db={name: noise[scheme] for name, (noise, _) in found.items()},
            speed={n: float(times[0] / times[i]) for n, (_, times) in found.items() if times.size},
        )
        for i, scheme in enumerate(bundles)
    ]


def run(
    machine: haswell.Machine,
    bundles: Sequence[pathlib.Path],
    samples: Sequence[Feeds],
    folder: pathlib.Path,
    repeats: int,
) -> tuple[list[list[dict[str, Array]]], Array]:
    """Outputs [bundle][sample] by name, and CPU seconds [bundle, repeat], on a machine."""
    feeds, outputs = folder / "feeds.npz", folder / "outputs.npz"
    np.savez(feeds, **{f"{i} {k}": a for i, given in enumerate(samples) for k, a in given.items()})
    arguments = [RUNNER, str(feeds), str(outputs), str(repeats), *map(str, bundles)]
    machine.run(arguments, timeout_s=7200)
    found: list[list[dict[str, Array]]] = [[{} for _ in samples] for _ in bundles]
    with np.load(outputs) as archive:
        seconds = archive["seconds"]
        for key in archive.files:
            if key != "seconds":
                place, number, name = key.split(" ", 2)
                found[int(place)][int(number)][name] = archive[key]
    return found, seconds


def worst_sqnr_db(
    expected: Sequence[Mapping[str, Array]], actual: Sequence[Mapping[str, Array]]
) -> float:
    """The lowest SQNR of any float output over all samples together, in dB."""
    worst = [
        sqnr_db(
            np.concatenate([sample[name].ravel() for sample in expected]),
            np.concatenate([sample[name].ravel() for sample in actual]),
        )
        for name, array in expected[0].items()
        if array.dtype.kind == "f"
    ]
    return min(worst)


def table(rows: Sequence[Row], machines: Sequence[tuple[haswell.Machine, int]]) -> str:
    """The rows as Markdown."""
    names = [machine.name for machine, _ in machines]
    columns = [f"SQNR dB, {name}" for name in names]
    columns += [f"speed, {name}" for name in names if any(name in row.speed for row in rows)]
    lines = [
        "| model | scheme | MB | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for row in rows:
        cells = [f"{row.sqnr_db[name]:.1f}" for name in names]
        cells += [f"{row.speed[name]:.2f}" for name in names if name in row.speed]
        lines.append(f"| {row.model} | {row.scheme} | {row.size_mb:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _machines(
    folder: pathlib.Path, samples: int, emulated: int
) -> Iterator[tuple[haswell.Machine, int]]:
    """Each machine that can be had, with the number of samples to run there."""
    yield haswell.native(), samples
    wanted = [(haswell.masked, samples)] + ([(haswell.emulated, emulated)] if emulated else [])
    for make, count in wanted:
        home = folder / make.__name__
        home.mkdir()
        try:
            yield make(home), count
        except FixtureMissing as missing:
            print(f"left out: {missing}", file=sys.stderr)


def efficientnet(calibration: int, samples: int) -> Given:
    """ImageNet classifier, convolutions."""
    import efficientnet_lite0

    source = replace(efficientnet_lite0.build(), metric=None, evaluation=None)
    judged = itertools.islice(efficientnet_lite0.evaluation(), samples)
    feeds: list[Feeds] = [{"image": feed["image"]} for feed in judged]
    return source, lambda: itertools.islice(efficientnet_lite0.calibration(), calibration), feeds


def ocr(calibration: int, samples: int) -> Given:
    """Text recogniser, convolutions and attention."""
    from fixtures import models, text_lines

    images = text_lines.render(calibration + samples, seed=1).images
    feeds: list[Feeds] = [{"x": image[None]} for image in images]
    return models.ocr_recogniser_path(), lambda: iter(feeds[:calibration]), feeds[calibration:]


def minilm(calibration: int, samples: int) -> Given:
    """Sentence encoder at a sequence of 128."""
    import torch
    from fixtures import models, similarity

    tokenizer, module = models.minilm()
    names = ("input_ids", "attention_mask", "token_type_ids")
    texts = sorted(set(similarity.pairs("lee").first))[:samples]
    tokens = [
        tokenizer([t], padding="max_length", truncation=True, max_length=128, return_tensors="pt")
        for t in texts
    ]

    class LastHidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = module

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state

    example = {name: tokens[0][name] for name in names}
    source = edgec.Source(LastHidden().eval(), example_inputs=example, name="minilm")
    return source, None, [{name: t[name].numpy() for name in names} for t in tokens]


def lstm(calibration: int, samples: int) -> Given:
    """Two LSTM layers of 512 over 100 steps; random weights."""
    import torch

    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.LSTM(128, 512, 2)
            self.head = torch.nn.Linear(512, 64)

        def forward(self, x: Any) -> Any:
            return self.head(self.layers(x)[0])

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    feeds: list[Feeds] = [
        {"x": rng.standard_normal((100, 1, 128), np.float32)} for _ in range(samples)
    ]
    example = (torch.from_numpy(feeds[0]["x"]),)
    source = edgec.Source(Recurrent().eval(), example, input_names=("x",), name="lstm")
    return source, None, feeds


MODELS: Mapping[str, Callable[[int, int], Given]] = {
    "efficientnet-lite0": efficientnet,
    "ocr": ocr,
    "minilm": minilm,
    "lstm": lstm,
}


if __name__ == "__main__":
    main()
