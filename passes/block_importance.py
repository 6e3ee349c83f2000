"""How much each residual block matters on real inputs. Both measures take the first samples.

Left out: measures from weights alone, which do not know how large the stream is that a block adds
to; blocks that matter together, since each is judged with all the others in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError
from edgec.passes.execution import open_session, run_feeds, run_values
from edgec.passes.residual_blocks import Block, remove_blocks

Measure = Literal["output", "similarity"]
SAMPLES = 16  # of the calibration data, at most: their outputs are held in memory
_WORST = 1e30  # of a block without which the outputs are no numbers
Array = np.ndarray[Any, Any]


def block_importance(
    blocks: Sequence[Block], model: ir.Model, context: Context, how: Measure
) -> dict[str, float | str]:
    """By result of the block a number, 0 or more, of which the lowest matter least.

    output: squared error of the model's outputs without the block, relative to their squares,
    mean over the outputs; 10 to the power of minus a tenth of the SQNR. Of a model with integer
    outputs alone: the share of them that changes.
    similarity: 1 - cosine of the stream before and after the block, mean over all positions: the
    block influence of Men et al. 2024 (arXiv:2403.03853, section 2.3), for blocks, not layers.
    A text instead of a number says why the block cannot go.
    Raises PassError without calibration data.
    """
    if context.calibration is None or not len(context.calibration):
        raise PassError(
            "prune-blocks needs calibration data to see which blocks matter least: give some "
            "dozen typical inputs, or --plan with the lock file or report.json of an earlier build"
        )
    samples = list(itertools.islice(context.calibration, SAMPLES))
    if how == "similarity":
        return _similarity(blocks, model, samples)
    return _output(blocks, model, context, samples)


def _output(
    blocks: Sequence[Block], model: ir.Model, context: Context, samples: Sequence[Feeds]
) -> dict[str, float | str]:
    expected = _outputs(model, samples)
    found: dict[str, float | str] = {}
    for number, block in enumerate(blocks):
        without = model.clone()
        remove_blocks(without, [block])
        actual = _outputs(without, samples)
        pairs = [
            (r, a)
            for r_sample, a_sample in zip(expected, actual, strict=True)
            for r, a in zip(r_sample, a_sample, strict=True)
        ]
        if any(r.shape != a.shape for r, a in pairs):
            found[block.result] = "without it the outputs have other shapes"
        else:
            found[block.result] = output_error(expected, actual)
        context.progress("removing one block after the other", number + 1, len(blocks))
    return found


def _outputs(model: ir.Model, samples: Sequence[Feeds]) -> list[list[Array]]:
    session = open_session(model)
    return [run_feeds(session, feeds) for feeds in samples]


def output_error(expected: Sequence[Sequence[Array]], actual: Sequence[Sequence[Array]]) -> float:
    """Relative squared error of outputs [sample][output], mean over the outputs; 0 to 1e30.

    Integers count only where there are no floats, by the share that differs. Infinities of the
    expected outputs (masks) are left out.
    """
    errors: list[float] = []
    shares: list[float] = []
    for rs, as_ in zip(zip(*expected, strict=True), zip(*actual, strict=True), strict=True):
        r, a = (np.concatenate([array.reshape(-1) for array in arrays]) for arrays in (rs, as_))
        if r.dtype.kind == "f":
            kept = np.isfinite(r)
            r, a = r[kept].astype(np.float64), a[kept].astype(np.float64)
            error = np.square(r - a).sum() / max(np.square(r).sum(), 1e-30)
            errors.append(float(error) if np.isfinite(error) else _WORST)
        else:
            shares.append(float(np.mean(r != a)))
    return min(float(np.mean(errors or shares)), _WORST)


def _similarity(
    blocks: Sequence[Block], model: ir.Model, samples: Sequence[Feeds]
) -> dict[str, float | str]:
    names = list(dict.fromkeys(name for b in blocks for name in (b.shortcut, b.result)))
    cosines: dict[str, list[float]] = {block.result: [] for block in blocks}
    found: dict[str, float | str] = {}
    for values in run_values(model, names, samples, optimized=True):
        for block in blocks:
            before, after = values[block.shortcut], values[block.result]
            if before.shape != after.shape:
                found[block.result] = (
                    f"its sides are of different shapes: it adds to {before.shape}"
                )
            else:
                axis = 1 if block.convolves and before.ndim > 3 else -1
                cosines[block.result].append(mean_cosine(before, after, axis))
    means = {name: max(0.0, 1 - float(np.mean(c))) for name, c in cosines.items() if c}
    return {**means, **found}


def mean_cosine(first: Array, second: Array, axis: int) -> float:
    """The mean cosine of the vectors along an axis; of two without length it is 1."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = np.sqrt(np.square(a).sum(axis) * np.square(b).sum(axis))
    products = (a * b).sum(axis)
    cosines = np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), 0)
    both_zero = ~(a.any(axis) | b.any(axis))
    return float(np.where(both_zero, 1, cosines).mean())
