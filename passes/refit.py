"""Fits the layers behind a cut to what they gave before it: least squares, no training.

A layer that lost inputs can make up for much of it with the weights of those that are left,
because channels are correlated. Layer by layer, in the order of the graph, the weights are
solved for that bring its output closest to the dense model's (He et al. 2017, arXiv:1707.06168,
section 3.1), from the inputs that the cut and so far refitted model gives it. Where the output
is added to a shortcut, the sum is what has to fit (section 3.2 there), so that the errors of
the shortcut are made up for, too. The weights are drawn a little towards what they were (ridge),
which decides where the samples do not.

Left out: depthwise and grouped convolutions, recurrent layers, the activation behind a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Feeds, PassError
from edgec.passes.execution import run_values
from edgec.passes.layer_inputs import from_rows, input_rows, weight_of, weight_rows
from edgec.passes.matching import is_op, sole_user
from edgec.passes.removal import Cut, positions_gone
from edgec.passes.weights import Array, label

RIDGE = 0.01  # pull towards the old weights, as a share of the inputs' mean square
_ROWS = 30  # for each number of a layer's input, at most
_SPREAD = 16  # rows that are looked at for each that is taken, where there are more
_ITEMS = 32  # of a batch, or samples: at least so many are looked at


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer to fit. total: the sum that its output goes into, or the output itself.

    kept: of the dense layer's output channels. bias: its second addend, if it has one.
    """

    node: ir.Node
    total: str
    kept: Array
    bias: ir.Value | None

    @property
    def read(self) -> str:
        return str(_value(self.node.inputs[0]).name)

    @property
    def output(self) -> str:
        return str(self.node.outputs[0].name)

    @property
    def axis(self) -> int:
        """Of the channels of the output."""
        return 1 if is_op(self.node, "Conv") else -1


def refit(
    model: ir.Model,
    dense: ir.Model,
    cuts: Sequence[Cut],
    samples: Sequence[Feeds],
    *,
    progress: Callable[[int, int], None],
) -> list[str]:
    """Fit what is left of a model in place; the labels of the layers that were fitted.

    dense: the model before ``cuts`` were taken out of it. progress: layers done, of how many.
    Raises PassError if a layer gives NaN or infinity.
    """
    layers = list(_layers(model, cuts))
    for number, layer in enumerate(layers):
        _fit(layer, model, dense, samples)
        progress(number + 1, len(layers))
    return [label(layer.node) for layer in layers]


def _layers(model: ir.Model, cuts: Sequence[Cut]) -> Iterator[_Layer]:
    """The plain layers of the main graph that read what a cut has changed."""
    gone = positions_gone((part, cut) for cut in cuts for part in cut.group.slices)
    changed: set[ir.Value] = set()
    for node in model.graph:
        reads = {value for value in node.inputs if value is not None}
        if reads & changed and _is_plain(node):
            weight = _value(node.inputs[1])
            axis = _output_axis(node)
            missing = gone.get(str(weight.name), {}).get(axis, [])
            width = weight_of(node).shape[axis] + len(missing)
            kept = np.setdiff1d(np.arange(width), missing)
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            yield _Layer(node, _total(node), kept, bias)
        if reads & changed or any(value.name in gone for value in reads):
            changed.update(node.outputs)


def _is_plain(node: ir.Node) -> bool:
    """True if it multiplies its input, or patches of it, by a matrix that is its own."""
    attributes = node.attributes
    if is_op(node, "Conv"):
        plain = attributes.get_int("group", 1) == 1
    elif is_op(node, "Gemm"):
        scales = [attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        plain = not attributes.get_int("transA", 0) and scales == [1.0, 1.0]
    else:
        plain = is_op(node, "MatMul")
    numbers = list(node.inputs[1:])
    if not plain or not all(_is_own(value) for value in numbers):
        return False
    matrix, *rest = [_array(_value(value)) for value in numbers]
    return (matrix.ndim == 2 or is_op(node, "Conv")) and all(bias.ndim == 1 for bias in rest)


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


def _total(node: ir.Node) -> str:
    """The last sum that the layer's output alone leads to by additions of the same shape."""
    value = node.outputs[0]
    while (user := sole_user(value)) is not None and is_op(user, "Add"):
        if value.shape is None or user.outputs[0].shape != value.shape:
            break
        value = user.outputs[0]
    return str(value.name)


def _fit(layer: _Layer, model: ir.Model, dense: ir.Model, samples: Sequence[Feeds]) -> None:
    node, weight = layer.node, weight_of(layer.node)
    old = weight_rows(node, weight)[0].astype(np.float64)  # [out, n]
    if layer.bias is not None:
        old = np.concatenate([old, _array(layer.bias).astype(np.float64)[:, None]], axis=1)
    squares, products, taken = np.zeros((old.shape[1],) * 2), np.zeros(old.T.shape), 0
    for x, y in _rows(layer, model, dense, samples, _ROWS * old.shape[1]):
        if layer.bias is not None:
            x = np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)
        squares += x.T @ x
        products += x.T @ y
        taken += len(x)
    if not (np.isfinite(squares).all() and np.isfinite(products).all()):
        raise PassError(
            f"prune-structured: refit: '{label(node)}' reads or gives NaN or infinity on the "
            "calibration samples; check them, or leave refit out"
        )
    pull = np.full(len(squares), RIDGE * np.trace(squares) / len(squares))
    if layer.bias is not None:
        pull[-1] = RIDGE * taken
    fitted = np.linalg.solve(squares + np.diag(pull), products + pull[:, None] * old.T).T
    if layer.bias is not None:
        _write(layer.bias, fitted[:, -1])
        fitted = fitted[:, :-1]
    _write(
        _value(node.inputs[1]), from_rows(node, np.ascontiguousarray(fitted)[None], weight.shape)
    )


def _rows(
    layer: _Layer, model: ir.Model, dense: ir.Model, samples: Sequence[Feeds], wanted: int
) -> Iterator[tuple[Array, Array]]:
    """Of some samples, inputs [rows, n] and the outputs [rows, out] that fit the sum.

    wanted: about so many rows in all, spread over all samples, or over as many as have
    ``_SPREAD`` times that many and ``_ITEMS`` items.
    """
    kernel = weight_of(layer.node).shape[2:] if is_op(layer.node, "Conv") else ()
    names = list(dict.fromkeys([layer.read, layer.output, layer.total]))
    rng = np.random.default_rng(0)  # not used up: all rows are looked at
    runs = zip(
        run_values(model, names, samples), run_values(dense, [layer.total], samples), strict=True
    )
    used = len(samples)
    for index, (ours, theirs) in enumerate(runs):
        target = theirs[layer.total].take(layer.kept, layer.axis)
        target = np.moveaxis(target - ours[layer.total] + ours[layer.output], layer.axis, -1)
        items, target = len(target), target.reshape(-1, target.shape[-1])
        if not index:
            used = min(used, max(-(-_SPREAD * wanted // len(target)), -(-_ITEMS // items)))
        rows = input_rows(layer.node, kernel, ours[layer.read], len(target), rng)[0]
        every = max(len(target) * used // wanted, 1)
        yield rows[index % every :: every], target[index % every :: every]
        if index + 1 == used:
            return


def _write(value: ir.Value, array: Array) -> None:
    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None  # _is_plain took no other
    return value.const_value.numpy()


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None  # _is_plain took no other
    return value
