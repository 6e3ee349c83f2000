"""Computes MatMul, Gemm and LSTM in int8, with activation ranges taken at run time.

Rewrites, in standard ONNX:

    MatMul(x, w) [Gemm: alpha, transB, C] ->
        q, s, z = DynamicQuantizeLinear(x)              one for all products of the same x
        Cast(MatMulInteger(q, w8, z)) * (s * scale) [+ C]

which ONNX Runtime fuses to DynamicQuantizeMatMul or MatMulIntegerToFloat, and

    LSTM(x, W, R) -> LSTM(x, DequantizeLinear(W8), DequantizeLinear(R8))

from which `lower` makes com.microsoft.DynamicQuantizeLSTM. Attention over many keys becomes int8,
too, where the target gains by it (integer_attention.py). Embedding tables (Gather) become
int8 with one scale a row: they are the larger part of a small encoder, and only the rows
that are looked up are dequantized after `lower`.

No calibration needed, better SQNR than static int8 on encoders. Where there is calibration
data all the same, it tells what each layer costs: a layer and its int8 twin run side by
side on the float values, in one model, and the ratio of signal to error at their outputs is
the layer's sensitivity, by which others choose what to name in ``skip``.

Convolutions are never converted: ConvInteger is 5 to 10 times slower than float32 in ONNX
Runtime. GRU and RNN have no int8 kernel: their weights are stored in int8, which `lower`
expands at load, for a quarter of the file at the speed of float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.execution import run_values
from edgec.passes.integer_attention import in_integers, long_attentions, to_integers
from edgec.passes.match_attention import Attention
from edgec.passes.weight_storage import (
    CHANNEL_OPS,
    PRODUCT_OPS,
    WeightStore,
    is_candidate,
    opset_of,
    product_weight,
)
from edgec.passes.weights import (
    Array,
    Editor,
    Refused,
    check_skip,
    constant,
    float_weight,
    graph_of,
    home,
    label,
    quantize_channels,
    required,
)
from edgec.targets import Target

_LSTM_KERNEL = "DynamicQuantizeLSTM"
_STORED_OPS = ("GRU", "RNN")  # no int8 kernel: smaller in the file, float32 in memory
_MOST_SAMPLES = 16  # for the sensitivity; more change its order little
_OPSET = 13  # DequantizeLinear with an axis; the integer product is older


@dataclass(frozen=True)
class QuantizeDynamic:
    """int8 matrix products and LSTMs with ranges taken at run time; int8 embedding tables."""

    name: ClassVar[str] = "quantize-dynamic"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 4

    attention: bool = True  # compute attention over many keys in int8 where the target gains by it
    embeddings: bool = True  # store embedding tables in int8, one scale a row
    # smaller weights stay float32: measured, 128 x 128 is where int8 begins to pay
    min_weights: int = 16384
    skip: tuple[str, ...] = ()  # names of nodes to leave alone

    def __post_init__(self) -> None:
        """Raise PassError for parameters out of range."""
        if self.min_weights < 0:
            raise PassError(f"quantize-dynamic: min_weights is {self.min_weights}, expected >= 0")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Quantize; ``changed`` counts the converted nodes.

        Decisions: ``sensitivity``, which a lock gives back without a run.
        """
        nodes = list(model.graph.all_nodes())
        check_skip(self.name, self.skip, nodes)
        sensitivity = self._sensitivity(model, context)
        opset = opset_of(model)
        editor = Editor(model)
        rewriter = _Rewriter(editor, WeightStore(editor, opset), context.target)
        # tables last: a tied output layer has its own copy by then
        nodes.sort(key=lambda node: node.op_type == "Gather")
        skipped: list[Skip] = []
        touched: list[str] = []
        for match in self._attentions(model, context.target):
            if label(match.product) in self.skip:
                skipped.append(Skip(label(match.product), "named in skip"))
                continue
            touched.append(match.result.name or "")
            to_integers(editor, match)
        nodes = [node for node in nodes if node.graph is not None]
        tables: dict[ir.Value, int] = {}  # table -> bytes in float32
        for node in nodes:
            if not is_candidate(node):
                continue
            name, output = label(node), node.outputs[0].name or ""
            value = node.inputs[0]
            try:
                weight = self._checked(node, opset, context.target)
                rewriter.convert(node)
            except Refused as reason:
                skipped.append(Skip(name, str(reason)))
                continue
            touched.append(output)
            if node.op_type == "Gather" and value is not None:
                tables[value] = weight.nbytes
        return Result(
            model,
            len(touched),
            tuple(skipped),
            tuple(touched),
            decisions={"sensitivity": sensitivity} if sensitivity else {},
            findings=(_tables_finding(tables),) if tables else (),
            sensitivity=sensitivity,
        )

    def _sensitivity(self, model: ir.Model, context: Context) -> dict[str, float]:
        """SQNR in dB of each layer's int8 twin on float inputs, by node, the lowest first.

        Empty without calibration data. Left out: nodes in branches, whose values cannot be
        read from outside, and tied embedding tables, which stay float beside their twin.
        """
        if "sensitivity" in context.lock:
            return dict(context.lock["sensitivity"])
        if context.calibration is None:
            return {}
        work = model.clone()
        opset, editor = opset_of(work), Editor(work)
        rewriter = _Rewriter(editor, WeightStore(editor, opset), context.target)
        pairs: dict[str, tuple[str, str]] = {}  # node -> its output, its twin's
        nodes = list(work.graph)
        for match in self._attentions(work, context.target):
            if label(match.product) not in self.skip:
                result = in_integers(editor, match)
                pairs[label(match.product)] = str(match.result.name), str(result.name)
        for node in nodes:
            if not is_candidate(node):
                continue
            attributes, count = list(node.attributes.values()), len(node.outputs)
            twin = ir.Node(node.domain, node.op_type, node.inputs, attributes, num_outputs=count)
            twin.name = f"{label(node)}_twin"
            for output, copy in zip(node.outputs, twin.outputs, strict=True):
                copy.name = editor.fresh(f"{output.name}_twin")
            work.graph.insert_after(node, twin)
            try:
                self._checked(node, opset, context.target)
                rewriter.convert(twin)
            except Refused:
                work.graph.remove(twin, safe=True)
                continue
            # a recurrent layer may leave out its first output
            index = next(i for i, output in enumerate(node.outputs) if output.name)
            pairs[label(node)] = str(node.outputs[index].name), str(twin.outputs[index].name)
        return _sqnr_of_pairs(work, pairs, context)

    def _attentions(self, model: ir.Model, target: Target) -> list[Attention]:
        """Those that gain by int8; each is named by the product that gives its result."""
        keys = target.int8.attention_keys
        return long_attentions(model, keys) if self.attention and keys else []

    def _checked(self, node: ir.Node, opset: int, target: Target) -> Array:
        """The node's float32 weight. Raises Refused where it is not to be converted."""
        if label(node) in self.skip:
            raise Refused("named in skip")
        if node.op_type == "Gather":
            if not self.embeddings:
                raise Refused("embeddings is false")
        elif node.op_type in CHANNEL_OPS:
            raise Refused(
                "dynamic int8 convolution is several times slower than float32; "
                "use quantize-static, or quantize-weights for size alone"
            )
        elif node.op_type in _STORED_OPS:
            pass
        elif node.op_type not in target.int8.dynamic_ops:
            raise Refused(f"dynamic int8 {node.op_type} does not pay on {target.name}")
        elif node.op_type == "LSTM" and _LSTM_KERNEL not in target.kernels:
            raise Refused(f"{target.name} has no {_LSTM_KERNEL} kernel")
        if opset < _OPSET:
            raise Refused(f"it needs opset {_OPSET}, the model has {opset}")
        if node.op_type in PRODUCT_OPS:
            weight, _ = product_weight(node)
        else:
            weight = float_weight(required(node, 0 if node.op_type == "Gather" else 1))
        if weight.size < self.min_weights:
            raise Refused(f"it has {weight.size} weights, fewer than min_weights")
        return weight


@dataclass
class _Rewriter:
    """Converts the nodes of one model; activations and weights are quantized once each."""

    editor: Editor
    store: WeightStore
    target: Target
    _inputs: dict[tuple[ir.Graph, ir.Value], Sequence[ir.Value]] = field(default_factory=dict)
    _weights: dict[tuple[ir.Value, bool, float], list[ir.Value]] = field(default_factory=dict)

    def convert(self, node: ir.Node) -> None:
        """Rewrite one node. Raises Refused, with the node untouched."""
        if node.op_type == "Gather":
            self.store.table(node)
        elif node.op_type in _STORED_OPS:
            self.store.recurrent(node)
        elif node.op_type == "LSTM":
            if node.attributes.get_int("layout", 0) != 0:
                raise Refused("its layout is batch first, which the int8 kernel has not")
            self.store.recurrent(node, bits=self._bits(), few_scales=True)
        else:
            self._product(node)

    def _bits(self) -> int:
        return 7 if self.target.int8.reduce_range else 8

    def _product(self, node: ir.Node) -> None:
        if node.attributes.get_int("transA", 0) != 0:
            raise Refused("its first operand is transposed (transA)")
        bias = self._bias(node)
        shape = node.outputs[0].shape
        stem = label(node)
        x, x_scale, x_zero = self._input(node)
        weight, scale, *zero_point = self._weight(node)
        (integers,) = self.editor.before(
            node,
            "MatMulInteger",
            [x, weight, x_zero, *zero_point],
            wanted=f"{stem}_integer",
            dtypes=[ir.DataType.INT32],
            shapes=[shape],
        )
        (product,) = self.editor.before(
            node,
            "Cast",
            [integers],
            {"to": ir.DataType.FLOAT.value},
            wanted=f"{stem}_cast",
            shapes=[shape],
        )
        (unit,) = self.editor.before(node, "Mul", [x_scale, scale], wanted=f"{stem}_unit")
        (output,) = self.editor.before(
            node, "Mul", [product, unit], wanted=f"{stem}_scaled", shapes=[shape]
        )
        if bias is not None:
            (output,) = self.editor.before(
                node, "Add", [output, bias], wanted=f"{stem}_bias", shapes=[shape]
            )
        self.editor.replace(node, [output])

    def _input(self, node: ir.Node) -> Sequence[ir.Value]:
        """The node's activation as uint8, with its scale and zero point."""
        value = required(node, 0)
        key = (graph_of(node), value)
        if key not in self._inputs:
            scalar = ir.Shape([])
            self._inputs[key] = self.editor.before(
                node,
                "DynamicQuantizeLinear",
                [value],
                wanted=f"{value.name}_quantize",
                dtypes=[ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8],
                shapes=[value.shape, scalar, scalar],
            )
        return self._inputs[key]

    def _weight(self, node: ir.Node) -> list[ir.Value]:
        """The weight as integers [in, out], its scale [out] or [], and a zero point if any."""
        value = required(node, 1)
        weight, axis = product_weight(node)
        alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
        key = (value, axis == 1, alpha)
        if key not in self._weights:
            scheme = self.target.int8
            matrix = weight.T if axis == 1 else weight
            kept = (1,) if scheme.per_channel else ()
            quantized = quantize_channels(matrix, kept, bits=self._bits())
            graph, name, integers = home(value), value.name, quantized.values
            scale = quantized.scale * np.float32(alpha)
            zero_point: list[ir.Value] = []
            if scheme.weight == "uint8":
                integers = (integers.astype(np.int16) + 128).astype(np.uint8)
                zeros = np.full(scale.shape, 128, np.uint8)
                zero_point = [self.editor.constant(graph, f"{name}_zero_point", zeros)]
            self._weights[key] = [
                self.editor.constant(graph, f"{name}_quantized", integers),
                self.editor.constant(graph, f"{name}_scale", scale),
                *zero_point,
            ]
        return self._weights[key]

    def _bias(self, node: ir.Node) -> ir.Value | None:
        """What is added to a Gemm's product: C * beta, [out] where it is a constant row."""
        if node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None:
            return None
        value = required(node, 2)
        beta = node.attributes.get_float("beta", 1.0)
        array = constant(value)
        if array is None:
            if beta != 1.0:
                raise Refused("its C is computed at run time and beta is not 1")
            return value
        # the fused kernel takes a bias of one dimension
        row = array.reshape(-1) if array.ndim == 2 and array.shape[0] == 1 else array
        if beta == 1.0 and row is array:
            return value
        bias = (row * np.float32(beta)).astype(np.float32)
        return self.editor.constant(home(value), f"{value.name}_bias", bias)


def _sqnr_of_pairs(
    model: ir.Model, pairs: Mapping[str, tuple[str, str]], context: Context
) -> dict[str, float]:
    """SQNR in dB of the second value against the first, over the calibration samples."""
    if not pairs or context.calibration is None:
        return {}
    signal, noise = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)
    names = [name for pair in pairs.values() for name in pair]
    samples = itertools.islice(context.calibration, _MOST_SAMPLES)
    total = min(len(context.calibration), _MOST_SAMPLES)
    for count, values in enumerate(run_values(model, names, samples)):
        context.progress("measuring each layer's int8 error", count, total)
        for name, (reference, twin) in pairs.items():
            exact = values[reference].astype(np.float64)
            signal[name] += float(np.square(exact).sum())
            noise[name] += float(np.square(exact - values[twin]).sum())
    ratios = {
        name: round(10 * math.log10(signal[name] / noise[name]), 2)
        for name in pairs
        if noise[name] > 0 and signal[name] > 0
    }
    return dict(sorted(ratios.items(), key=lambda item: (item[1], item[0])))


def _tables_finding(tables: dict[ir.Value, int]) -> str:
    size = sum(tables.values())
    return (
        f"{len(tables)} embedding table(s) of {size / 1e6:.1f} MB are stored in int8 with one "
        f"scale a row ({size / 4e6:.1f} MB): smaller, not faster; embeddings = false keeps float32"
    )
