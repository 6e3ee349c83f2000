"""Proves on real or made-up feeds that two models compute the same.

For rewrites whose correctness is not evident from the graph: an opset conversion, an
attention fusion. Feeds come from the calibration data, else they are random numbers of a
fixed seed in shapes that the model accepts. Tensors are compared relative to the largest
number of the reference's output, since float noise grows with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError
from edgec.passes.execution import open_session
from edgec.passes.weights import Array

if TYPE_CHECKING:
    import onnxruntime

# values tried for dimensions that the model leaves open: batch, then all others
_SIZES = (
    (2, 16),
    (2, 32),
    (1, 32),
    (1, 48),
    (1, 64),
    (1, 128),
    (1, 224),
    (1, 512),
    (1, 576),
    (1, 1),
)
_LARGEST_ID = (100, 2)  # exclusive bounds tried for integer inputs
_MASK_FILLS = (1, 0)  # most masks attend to ones, some ignore them


def proof_feeds(model: ir.Model, context: Context) -> Feeds | None:
    """Feeds that the model accepts: the first calibration sample, else random ones.

    Random ones are preferred that give numbers: attention masked everywhere gives NaN.
    None if no shapes could be found that the model runs with.
    """
    if context.calibration is not None:
        return next(iter(context.calibration), None)
    session = open_session(model)
    accepted: Feeds | None = None
    for feeds in _random_feeds(model, context.seed):
        outputs = _run(session, feeds)
        if outputs is None:
            continue
        if all(array.dtype.kind != "f" or np.isfinite(array).any() for array in outputs):
            return feeds
        accepted = accepted or feeds
    return accepted


def padded_variants(model: ir.Model, feeds: Feeds) -> list[Feeds]:
    """The feeds as they are, and right- and left-padded batches of them.

    A batch repeats the sample where the model's first dimension is open; in its last row
    the attention masks are turned over at the last, or first, third of the positions.
    Models without a mask among their inputs give the feeds alone.
    """
    masks = [name for name, array in feeds.items() if _is_mask(name, array)]
    if not masks:
        return [feeds]
    open_batch = all(
        value.shape is not None and len(value.shape) > 0 and not isinstance(value.shape[0], int)
        for value in model.graph.inputs
        if value.name in feeds
    )
    variants = [feeds]
    for left in (False, True):
        batch = {
            name: np.concatenate([array[:1], array[:1]]) if open_batch else array.copy()
            for name, array in feeds.items()
        }
        for name in masks:
            length = batch[name].shape[1]
            third = slice(0, length // 3) if left else slice(length - length // 3, length)
            # a mask of mostly ones attends to ones, one of mostly zeros ignores them
            batch[name][-1, third] = 0 if batch[name].mean() >= 0.5 else 1
        variants.append(batch)
    return variants


def largest_error(reference: ir.Model, model: ir.Model, samples: Sequence[Feeds]) -> float:
    """Largest difference of any output, relative to the reference output's largest number.

    Both run as written, without ONNX Runtime's optimizer. A number below 1e-3 counts as
    1e-3: a detector that finds nothing puts out float noise. Infinite where an output has
    another shape, a NaN in another place, or where an integer differs. Raises PassError if
    one of the models cannot be loaded or run.
    """
    # ONNX Runtime fuses attention and more itself: optimized, it would be proven by itself
    expected = _all_outputs(reference, samples)
    actual = _all_outputs(model, samples)
    return max(
        (
            difference(a, b)
            for xs, ys in zip(expected, actual, strict=True)
            for a, b in zip(xs, ys, strict=True)
        ),
        default=0.0,
    )


def difference(reference: Array, actual: Array) -> float:
    """Largest difference of two arrays relative to the reference's largest number.

    The exceptions are those of ``largest_error``.
    """
    if reference.shape != actual.shape or reference.dtype != actual.dtype:
        return float("inf")
    if reference.dtype.kind not in "fV":  # V: bfloat16 and float8
        return 0.0 if np.array_equal(reference, actual) else float("inf")
    a, b = reference.astype(np.float64), actual.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    finite = np.isfinite(a)
    if not finite.any():
        return 0.0
    largest = max(float(np.abs(a[finite]).max()), 1e-3)
    return float(np.abs(a[finite] - b[finite]).max()) / largest


def _all_outputs(model: ir.Model, samples: Sequence[Feeds]) -> list[list[Array]]:
    session = open_session(model, optimized=False)
    results = []
    for feeds in samples:
        outputs = _run(session, feeds)
        if outputs is None:
            raise PassError("ONNX Runtime loads the model and fails to run it on the sample feeds")
        results.append(outputs)
    return results


def _run(session: onnxruntime.InferenceSession, feeds: Feeds) -> list[Array] | None:
    """Outputs, or None if ONNX Runtime refuses the feeds."""
    wanted = {i.name for i in session.get_inputs()}
    try:
        outputs = session.run(None, {k: v for k, v in feeds.items() if k in wanted})
    except (RuntimeError, ValueError, TypeError):
        return None
    except Exception as error:
        # onnxruntime's own exceptions (Fail, InvalidArgument, ...) derive from Exception alone
        if type(error).__module__.startswith("onnxruntime"):
            return None
        raise
    return [np.asarray(output) for output in outputs]


def _is_mask(name: str, array: Array) -> bool:
    return (
        "mask" in name
        and array.ndim == 2
        and array.shape[1] >= 3
        and bool(np.isin(array, (0, 1)).all())
    )


def _random_feeds(model: ir.Model, seed: int) -> Iterator[Feeds]:
    """Random feeds for one guess of the open dimensions after the other."""
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    if any(v.shape is None or v.dtype is None or v.dtype.is_string() for v in inputs):
        return
    guesses = itertools.product(_SIZES, (True, False), _LARGEST_ID, _MASK_FILLS)
    for (batch, rest), uniform, bound, fill in guesses:
        random = np.random.default_rng(seed)
        names = {_symbol(inputs[0], 0): batch}
        feeds = {}
        for position, value in enumerate(inputs):
            # recurrent states have the batch at axis 1: open dimensions of later inputs
            later = rest if uniform or position == 0 else batch
            array = _random_array(random, value, names, (batch, later), bound)
            name = str(value.name)
            feeds[name] = np.full_like(array, fill) if "mask" in name else array
        yield feeds


def _symbol(value: ir.Value, axis: int) -> str | None:
    """Name of an open dimension; None if it has none or is a number."""
    dim = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
    return dim.value if isinstance(dim, ir.SymbolicDim) else None


def _random_array(
    random: np.random.Generator,
    value: ir.Value,
    names: dict[str | None, int],
    sizes: tuple[int, int],
    bound: int,
) -> Array:
    assert value.shape is not None and value.dtype is not None and value.name is not None
    shape = []
    for axis, dim in enumerate(value.shape):
        guess = sizes[0] if axis == 0 else sizes[1]
        name = _symbol(value, axis)
        if isinstance(dim, int) and dim > 0:
            shape.append(dim)
        else:
            # a decoder's mask is as long as "past_sequence_length + sequence_length"
            parts = [None] if name is None else name.split(" + ")
            shape.append(sum(guess if p is None else names.setdefault(p, guess) for p in parts))
    dtype = value.dtype.numpy()
    if dtype.kind in "iu":
        return random.integers(0, bound, shape).astype(dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(dtype)
    return random.standard_normal(shape).astype(dtype)
