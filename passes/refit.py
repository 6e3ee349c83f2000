"""Fits the layers behind a cut to what they gave before it: least squares, no training.

A layer that lost inputs can make up for much of it with the weights of those that are left,
because channels are correlated. Layer by layer, in the order of the graph, the weights are
solved for that bring its output closest to the dense model's (He et al. 2017, arXiv:1707.06168,
section 3.1), from the inputs that the cut and so far refitted model gives it. Where the output
is added to a shortcut, the sum is what has to fit (section 3.2 there), so that the errors of
the shortcut are made up for, too. The weights are drawn towards what they were (ridge), as
much as is best on held-out rows; a layer that no fit makes better there stays as it is.

A bias is fitted with the weights, also where it is an Add of its own behind a product.

Left out: depthwise and grouped convolutions, recurrent layers, layers inside of If and loops,
and an activation behind a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Feeds, PassError, Samples, Skip
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.layer_inputs import from_rows, patches_at, weight_of, weight_rows
from edgec.passes.matching import is_op, sole_user
from edgec.passes.removal import Cut, positions_gone
from edgec.passes.weights import Array, label

RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)  # pulls to the old weights: shares of the mean square
_HELD_OUT = 4  # every so many samples, or the last part of the rows of a few
_SAMPLES = 256  # runs that are looked at, at most
_ROWS = 40  # for each number of a layer's input, at most
_SPREAD = 16  # rows that are looked at for each that is taken, where there are more
_ITEMS = 32  # of a batch, or samples: at least so many are looked at
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Spread:
    """Some of the samples, evenly spaced, so that sorted data has a part of every kind."""

    samples: Samples
    count: int

    def __iter__(self) -> Iterator[Feeds]:
        """Yield those whose turn it is."""
        for number, feeds in enumerate(self.samples):
            if self._turn(number + 1) > self._turn(number):
                yield feeds

    def __len__(self) -> int:
        """Return how many there are."""
        return min(len(self.samples), self.count)

    def _turn(self, number: int) -> int:
        return number * len(self) // len(self.samples)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer to fit. total: the sum that its output goes into, or the output itself.

    kept: of the dense layer's output channels. bias: its second addend, if it has one.
    output: with the bias.
    """

    node: ir.Node
    total: str
    kept: Array
    bias: ir.Value | None
    output: str

    @property
    def read(self) -> str:
        return str(_value(self.node.inputs[0]).name)

    @property
    def axis(self) -> int:
        """Of the channels of the output."""
        return 1 if is_op(self.node, "Conv") else -1


def refit(
    model: ir.Model,
    dense: ir.Model,
    cuts: Sequence[Cut],
    samples: Samples,
    *,
    progress: Callable[[int, int], None],
) -> tuple[Skip, ...]:
    """Fit what is left of a model in place; the layers behind the cuts that stayed, and why.

    dense: the model before ``cuts`` were taken out of it. progress: layers done, of how many.
    Raises PassError if a layer gives NaN or infinity, and if there is none that can be fitted.
    """
    layers, skipped = _layers(model, cuts)
    if not layers:
        why = f" ('{skipped[0].node}': {skipped[0].reason})" if skipped else ""
        raise PassError(
            f"prune-structured: refit: no layer behind the cuts can be fitted{why}; leave refit out"
        )
    samples = Spread(samples, _SAMPLES)
    for number, layer in enumerate(layers):
        if not _fit(layer, model, dense, samples):
            reason = "not refitted: no fit was better on held-out samples"
            skipped.append(Skip(label(layer.node), reason))
        progress(number + 1, len(layers))
    return tuple(skipped)


def _layers(model: ir.Model, cuts: Sequence[Cut]) -> tuple[list[_Layer], list[Skip]]:
    """The plain layers of the main graph that read what a cut has changed, and the others."""
    gone = positions_gone((part, cut) for cut in cuts for part in cut.group.slices)
    changed: set[ir.Value] = set()
    layers, skipped = [], []
    for node in model.graph:
        reads = {value for value in node.inputs if value is not None}
        if reads & changed and is_op(node, *_PRODUCTS) and not _is_of_two(node):
            reason = _refusal(node)
            if reason:
                skipped.append(Skip(label(node), f"not refitted: {reason}"))
            else:
                weight, axis = _value(node.inputs[1]), _output_axis(node)
                missing = gone.get(str(weight.name), {}).get(axis, [])
                width = weight_of(node).shape[axis] + len(missing)
                kept = np.setdiff1d(np.arange(width), missing)
                bias, output = _with_bias(node)
                layers.append(_Layer(node, _total(node), kept, bias, str(output.name)))
        if reads & changed or any(value.name in gone for value in reads):
            changed.update(node.outputs)
    return layers, skipped


def _is_of_two(node: ir.Node) -> bool:
    """True for a product of two computed values: it has no weights."""
    return all(v is not None and v.producer() is not None for v in node.inputs[:2])


def _refusal(node: ir.Node) -> str | None:
    """Why a product cannot be fitted; None if its input, or patches of it, meet an own matrix."""
    attributes = node.attributes
    if is_op(node, "ConvTranspose"):
        return "it is a ConvTranspose"
    if attributes.get_int("group", 1) != 1:
        return "its channels are in groups"
    scales = [attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    if attributes.get_int("transA", 0) or scales != [1.0, 1.0]:
        return "it scales or transposes what it reads"
    numbers = list(node.inputs[1:])
    if node.inputs[0] is None or not all(_is_own(value) for value in numbers):
        return "its weights are not float32 tensors of its own"
    matrix, *rest = [_array(_value(value)) for value in numbers]
    if matrix.ndim != 2 and not is_op(node, "Conv"):
        return f"its weight has {matrix.ndim} dimensions"
    if any(bias.shape != (matrix.shape[_output_axis(node)],) for bias in rest):
        return "its bias is not one number a channel"
    return None


def _is_own(value: ir.Value | None) -> bool:
    """True for a constant in float32 that one node reads."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return False
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return alone and value.const_value is not None and value.dtype == ir.DataType.FLOAT


def _output_axis(node: ir.Node) -> int:
    """Of the weight: the axis of the output channels."""
    if is_op(node, "Conv"):
        return 0
    return 0 if is_op(node, "Gemm") and node.attributes.get_int("transB", 0) == 1 else 1


def _with_bias(node: ir.Node) -> tuple[ir.Value | None, ir.Value]:
    """The bias of a product, its input or an Add of its own behind it, and the sum with it."""
    output = node.outputs[0]
    if len(node.inputs) > 2:
        return node.inputs[2], output
    add = sole_user(output)
    if add is None or not is_op(add, "Add") or not is_op(node, "Gemm", "MatMul"):
        return None, output
    bias = next((value for value in add.inputs if value is not output), None)
    width = _array(_value(node.inputs[1])).shape[_output_axis(node)]
    if not _is_own(bias) or _array(_value(bias)).shape != (width,):
        return None, output
    return bias, add.outputs[0]


def _total(node: ir.Node) -> str:
    """The last sum that the layer's output alone leads to by additions of the same shape."""
    value = _with_bias(node)[1]
    while (user := sole_user(value)) is not None and is_op(user, "Add"):
        if not _is_known(value.shape) or user.outputs[0].shape != value.shape:
            break
        value = user.outputs[0]
    return str(value.name)


def _is_known(shape: ir.Shape | None) -> bool:
    """True if every dimension is a number or has a name: two without names may differ."""
    return shape is not None and all(isinstance(dim, int) or dim.value is not None for dim in shape)


@dataclass
class _Moments:
    """Sums over rows of inputs x and wanted outputs y: x^T x [n, n] and x^T y [n, out]."""

    squares: Array
    products: Array

    def add(self, x: Array, y: Array) -> None:
        self.squares += x.T @ x
        self.products += x.T @ y

    def error(self, weight: Array) -> float:
        """Squared error of weights [n, out], less what all have in common."""
        return float(np.vdot(weight, self.squares @ weight - 2 * self.products))

    def solved(self, old: Array, ridge: float) -> Array:
        """Weights [n, out] with the least error, drawn to the old ones."""
        pull = ridge * float(np.trace(self.squares)) / len(self.squares)
        pulled = self.squares + pull * np.eye(len(self.squares))
        return np.asarray(np.linalg.solve(pulled, self.products + pull * old))


def _fit(layer: _Layer, model: ir.Model, dense: ir.Model, samples: Samples) -> bool:
    """Fit one layer; False if it stays as it is."""
    node, weight = layer.node, weight_of(layer.node)
    old = weight_rows(node, weight)[0].T.astype(np.float64)  # [n, out]
    if layer.bias is not None:
        old = np.concatenate([old, _array(layer.bias).astype(np.float64)[None]])
    fitted_on, judged_on = (_Moments(np.zeros((len(old),) * 2), np.zeros(old.shape)) for _ in "ab")
    for x, y, held_out in _rows(layer, model, dense, samples, _ROWS * len(old)):
        if layer.bias is not None:
            x = np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)
        (judged_on if held_out else fitted_on).add(x.astype(np.float64), y.astype(np.float64))
    whole = _Moments(fitted_on.squares + judged_on.squares, fitted_on.products + judged_on.products)
    if not (np.isfinite(whole.squares).all() and np.isfinite(whole.products).all()):
        raise PassError(
            f"prune-structured: refit: '{label(node)}' reads or gives NaN or infinity on the "
            "calibration samples; check them, or leave refit out"
        )
    if not (fitted_on.squares.any() and judged_on.squares.any()):
        return False  # it was given nothing but zeros
    errors = [judged_on.error(fitted_on.solved(old, ridge)) for ridge in RIDGES]
    if min(errors) >= judged_on.error(old):
        return False
    fitted = whole.solved(old, RIDGES[int(np.argmin(errors))])
    if layer.bias is not None:
        _write(layer.bias, fitted[-1])
        fitted = fitted[:-1]
    rows = np.ascontiguousarray(fitted.T)[None]
    _write(_value(node.inputs[1]), from_rows(node, rows, weight.shape))
    return True


def _rows(
    layer: _Layer, model: ir.Model, dense: ir.Model, samples: Samples, wanted: int
) -> Iterator[tuple[Array, Array, bool]]:
    """Of evenly spaced samples, inputs [rows, n], outputs [rows, out] that fit the sum, and
    whether they are for judging.

    wanted: about so many rows in all, over all samples, or over as many as have ``_SPREAD``
    times that many and ``_ITEMS`` items.
    """
    names = list(dict.fromkeys([layer.read, layer.output, layer.total]))
    ours = open_session(model, outputs=names)
    theirs = open_session(dense, outputs=[layer.total])

    def run(feeds: Feeds) -> tuple[Array, Array]:
        values = dict(zip(names, run_feeds(ours, feeds), strict=True))
        target = run_feeds(theirs, feeds)[0].take(layer.kept, layer.axis)
        target = np.moveaxis(target - values[layer.total] + values[layer.output], layer.axis, -1)
        return values[layer.read], target

    first = run(next(iter(samples)))[1]
    items, count = max(len(first), 1), max(first.size // first.shape[-1], 1)
    spread = Spread(samples, max(-(-_SPREAD * wanted // count), -(-_ITEMS // items), _HELD_OUT))
    every = max(count * len(spread) // wanted, 1)
    for number, feeds in enumerate(spread):
        x, y = _taken(layer.node, *run(feeds), every, number % every)
        if len(spread) < _HELD_OUT:
            split = len(x) - len(x) // _HELD_OUT
            yield x[:split], y[:split], False
            yield x[split:], y[split:], True
        else:
            yield x, y, number % _HELD_OUT == _HELD_OUT - 1


def _taken(
    node: ir.Node, given: Array, target: Array, every: int, offset: int
) -> tuple[Array, Array]:
    """Every so-many-th row [rows, n] of a layer's input, and of the target [..., out] with it."""
    places = np.arange(offset, target.size // target.shape[-1], every)
    y = target.reshape(-1, target.shape[-1])[places]
    if not is_op(node, "Conv"):
        return given.reshape(-1, given.shape[-1])[places], y
    kernel = weight_of(node).shape[2:]
    positions = max(target[0].size // target.shape[-1], 1) if len(target) else 1
    parts = [
        patches_at(node, kernel, item, places[places // positions == number] % positions)[0]
        for number, item in enumerate(given)
    ]
    return np.concatenate(parts) if parts else y[:, :0], y


def _write(value: ir.Value, array: Array) -> None:
    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None  # _refusal took no other
    return value.const_value.numpy()


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None  # _refusal took no other
    return value
