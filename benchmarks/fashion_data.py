"""Fashion-MNIST as `edgec build` reads it: single images with labels.

    python benchmarks/pruning_curve.py --work DIR ...     # trains DIR/residual64-4-0.onnx
    edgec build DIR/residual64-4-0.onnx --target x86-64 --min-speedup 5 \\
        --calibration benchmarks/fashion_data.py:learned --metric top1 \\
        --evaluation benchmarks/fashion_data.py:test \\
        --recipe cleanup,fuse,prune-structured,recover,quantize-static,lower \\
        --set recover.steps=800 --set recover.batch=64 --set recover.splice=false \\
        --set recover.rate=1 --set recover.bias_rate=0.02 \\
        --set recover.temperature=4 --set recover.label_weight=1

A network of benchmarks/fashion.py is pruned as far as the promise needs. It has learned from all
that `learned` gives, so what is held out of that says little about a drop: judge by `test`.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterator

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import fashion  # noqa: E402

_LEARNED = 16_384  # images of 56,000


def learned() -> Iterator[dict[str, fashion.Array]]:
    """Images that the networks were trained on, for calibration and recovery."""
    return _samples(fashion.fashion().learned.first(_LEARNED))


def test() -> Iterator[dict[str, fashion.Array]]:
    """The 10,000 images for the judgement."""
    return _samples(fashion.fashion().test)


def _samples(part: fashion.Part) -> Iterator[dict[str, fashion.Array]]:
    for feeds, labels in zip(part.feeds(), part.labels(), strict=True):
        yield {**feeds, **labels}
