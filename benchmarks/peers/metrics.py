"""What a quantized model is worth: task metric, agreement with float32, SQNR.

All from the first output on the evaluation samples of a case, [samples, 1, ...].
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peers import cases

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Quality:
    """sqnr_db over all values that count; agreement 0..1; task metric or None, its name."""

    sqnr_db: float
    agreement: float
    task: float | None
    task_name: str


def judge(folder: pathlib.Path, outputs: Array, reference: Array) -> Quality:
    """Compare outputs with those of float32 on the evaluation samples of a case folder."""
    case = cases.read_case(folder)
    if outputs.shape != reference.shape:
        outputs = outputs.reshape(reference.shape)
    samples = list(cases.samples(folder, "evaluation", len(outputs)))
    agreement, task, name = _METRICS[case.metric](folder, samples, outputs, reference)
    counted = slice(None)
    if "attention_mask" in case.inputs:  # padding is nobody's output
        counted = np.stack([s["attention_mask"] for s in samples]) > 0
    return Quality(_sqnr_db(outputs[counted], reference[counted]), agreement, task, name)


def _argmax(folder: pathlib.Path, samples: list[Any], outputs: Array, reference: Array) -> Any:
    guesses, expected = outputs.argmax(-1), reference.argmax(-1)
    agreement = float((guesses == expected).mean())
    if "label" not in samples[0]:
        return agreement, None, ""
    right = [
        int(guess) in sample["label"]
        for guess, sample in zip(guesses.ravel(), samples, strict=True)
    ]
    return agreement, float(np.mean(right)), "top-1"


def _lines(folder: pathlib.Path, samples: list[Any], outputs: Array, reference: Array) -> Any:
    from fixtures import text_lines

    text = (folder / "characters.txt").read_text(encoding="utf-8")
    read = text_lines.decode(outputs[:, 0], text.split("\n"))
    expected = text_lines.decode(reference[:, 0], text.split("\n"))
    right = [a == str(sample["text"]) for a, sample in zip(read, samples, strict=True)]
    same = [a == b for a, b in zip(read, expected, strict=True)]
    return float(np.mean(same)), float(np.mean(right)), "lines"


def _spearman(folder: pathlib.Path, samples: list[Any], outputs: Array, reference: Array) -> Any:
    from fixtures import similarity

    with np.load(folder / "pairs.npz") as pairs:
        known = np.maximum(pairs["first"], pairs["second"]) < len(outputs)
        first, second = pairs["first"][known], pairs["second"][known]
        judgement = pairs["judgement"][known]
    mask = np.stack([sample["attention_mask"] for sample in samples])[:, 0, :, None]
    ours, theirs = (_pooled(x[:, 0], mask) for x in (outputs, reference))
    cosines = (ours[first] * ours[second]).sum(-1)
    agreement = float((ours * theirs).sum(-1).mean())
    return agreement, similarity.spearman(cosines, judgement), "spearman"


def _pooled(hidden: Array, mask: Array) -> Array:
    mean = (hidden * mask).sum(1) / mask.sum(1)
    vectors: Array = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return vectors


def _cosine(folder: pathlib.Path, samples: list[Any], outputs: Array, reference: Array) -> Any:
    product = (outputs * reference).sum(-1)
    norms = np.linalg.norm(outputs, axis=-1) * np.linalg.norm(reference, axis=-1)
    return float((product / norms).mean()), None, ""


def _probability(folder: pathlib.Path, samples: list[Any], outputs: Array, reference: Array) -> Any:
    agreement = float(((outputs > 0.5) == (reference > 0.5)).mean())
    return agreement, float(np.abs(outputs - reference).mean()), "mean abs. error"


_METRICS = {
    "argmax": _argmax,
    "lines": _lines,
    "spearman": _spearman,
    "cosine": _cosine,
    "probability": _probability,
}


def _sqnr_db(outputs: Array, reference: Array) -> float:
    noise = float(((outputs - reference).astype(np.float64) ** 2).sum())
    signal = float((reference.astype(np.float64) ** 2).sum())
    return 10 * float(np.log10(signal / noise)) if noise else float("inf")
