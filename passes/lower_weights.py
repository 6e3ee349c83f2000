"""Lowers integer weights behind DequantizeLinear to what ONNX Runtime executes.

1. DequantizeLinear(blocked) -> MatMul, Gemm     com.microsoft.MatMulNBits
2. DequantizeLinear -> LSTM                      com.microsoft.DynamicQuantizeLSTM
3. DequantizeLinear -> Gather                    by row: Gather of integers, then Cast and Mul
                                                 blocked: com.microsoft.GatherBlockQuantized
4. DequantizeLinear of int4, among quantized     Cast of the constant to int8 before it
5. any other DequantizeLinear of a weight        Cast and Mul of the constant

1 and 2 only where the target has the kernel and it pays; a Transpose may stand between
(output layers that share the embedding table). 3 dequantizes the rows that are
looked up instead of the whole table. 4 is folded once at load and makes int8 kernels take
weights that are stored in half the size. 5 exists because ONNX Runtime does not fold a
DequantizeLinear of a constant (it waits for an integer kernel to take it), so that a float
layer behind it recomputes its weights at every inference; Cast and Mul of constants are
folded once at load: the file of int8, the speed of float32. Weights whose activations are
quantized too (QDQ) are left to the integer kernels of the runtime.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Result, Skip
from edgec.passes.lower_kernels import Integers, Kernels, integers_behind
from edgec.passes.weights import Array, Editor, Refused, home, label, required

_LATE = {"Transpose": 1, "Gather": 2}
_COMPUTING = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def lower_weights(model: ir.Model, context: Context) -> Result:
    """Lower every weight that no integer kernel takes.

    ``changed`` counts the nodes whose weight has another form afterwards.
    """
    editor = Editor(model)
    lowering = _Lowering(editor, Kernels(editor, context.target))
    nodes = list(model.graph.all_nodes())
    # a Transpose is expanded only if the product behind it has no kernel, and rows are looked
    # up in blocks only if no product has the table expanded
    nodes.sort(key=lambda node: _LATE.get(node.op_type, 0))
    for node in nodes:
        if node.graph is not None:  # not replaced meanwhile
            lowering.node(node)
    return Result(
        model,
        lowering.changed,
        tuple(lowering.skipped),
        tuple(lowering.touched),
        findings=lowering.findings(),
    )


def with_float_products(model: ir.Model) -> ir.Model | None:
    """The model with weight-only products computed in float32; None if all of them are already.

    What it gives differs by the rounding of activations alone, which ``accuracy_level`` 4 asks for.
    """
    exact = model.clone()
    rounding = [node for node in exact.graph.all_nodes() if rounds_activations(node)]
    for node in rounding:
        node.attributes.add(ir.AttrInt64("accuracy_level", 0))
    return exact if rounding else None


def rounds_activations(node: ir.Node) -> bool:
    """True of a weight-only product that rounds what it is multiplied with to int8."""
    level = node.attributes.get_int("accuracy_level", 0)
    return node.op_type == "MatMulNBits" and level == 4


@dataclass
class _Lowering:
    """Lowers the nodes of one model; a weight that several nodes share is packed once."""

    editor: Editor
    kernels: Kernels
    changed: int = 0
    skipped: list[Skip] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    _packed: dict[tuple[ir.Value, str], list[ir.Value]] = field(default_factory=dict)
    _expanded: dict[ir.Value, int] = field(default_factory=dict)  # bytes in float32

    def node(self, node: ir.Node) -> None:
        """Lower the weights that one node reads, if any."""
        weights = {
            index: integers
            for index, value in enumerate(node.inputs)
            if (integers := integers_behind(value)) is not None
        }
        if not weights or node.domain:
            return
        if node.op_type == "Gather" and 0 in weights and self._gather(node, weights[0]):
            self.changed += 1
            return
        if _is_quantized(node, weights):
            self.changed += self._widen(weights.values())
            return
        if self._kernel(node, weights):
            self.changed += 1
            return
        expanded = {index: w for index, w in weights.items() if not w.transposed}
        for index, integers in expanded.items():
            self._expand(node, index, integers)
        self.changed += bool(expanded)

    def _kernel(self, node: ir.Node, weights: dict[int, Integers]) -> bool:
        """Replace the node by a kernel for integer weights; False where there is none."""
        output = node.outputs[0].name or ""
        try:
            if node.op_type in ("Gemm", "MatMul") and 1 in weights and weights[1].block_size:
                self.kernels.product(node, weights[1])
                if self.kernels.target.int4.accuracy_level == 4:
                    self.touched.append(output)
                return True
            if node.op_type == "Gather" and 0 in weights and weights[0].block_size:
                if weights[0].value in self._expanded:
                    raise Refused("so are those of the product that shares them")
                self.kernels.rows(node, weights[0])
                return True
            if node.op_type == "LSTM" and 1 in weights and 2 in weights:
                self.kernels.lstm(node, weights[1], weights[2])
                self.touched.append(output)
                return True
        except Refused as reason:
            self.skipped.append(Skip(label(node), f"its weights are expanded at load: {reason}"))
        return False

    def findings(self) -> tuple[str, ...]:
        """What the user should know."""
        found = []
        if self._expanded:
            size = sum(self._expanded.values())
            found.append(
                f"{len(self._expanded)} weight(s) are stored as integers and expanded to "
                f"{size / 1e6:.1f} MB of float32 once at load: a smaller file at float32's speed "
                "and memory"
            )
        if self.touched:
            found.append(
                f"{len(self.touched)} node(s) round their activations to int8 at run time "
                f"(MatMulNBits with accuracy_level {self.kernels.target.int4.accuracy_level}, "
                "DynamicQuantizeLSTM)"
            )
        return tuple(found)

    def _gather(self, node: ir.Node, table: Integers) -> bool:
        """Gather(int8 table) * Gather(row scales); False where rows have no scale of their own."""
        row_scales = table.axis == 0 and not table.block_size and table.values.ndim == 2
        if node.attributes.get_int("axis", 0) != 0 or not row_scales or not table.is_symmetric():
            return False
        key = (table.value, "rows")
        if key not in self._packed:
            scale = self.editor.constant(
                home(table.value), f"{table.value.name}_row_scale", table.scale[:, None]
            )
            self._packed[key] = [scale]
        output, stem, indices = node.outputs[0], label(node), required(node, 1)
        dtype = ir.DataType.from_numpy(table.scale.dtype)
        (rows,) = self.editor.before(
            node,
            "Gather",
            [table.value, indices],
            wanted=f"{stem}_rows",
            dtypes=[_dtype(table.value)],
            shapes=[output.shape],
        )
        (scales,) = self.editor.before(
            node,
            "Gather",
            [self._packed[key][0], indices],
            wanted=f"{stem}_scales",
            dtypes=[dtype],
        )
        (cast,) = self.editor.before(
            node,
            "Cast",
            [rows],
            {"to": dtype.value},
            wanted=f"{stem}_cast",
            dtypes=[dtype],
            shapes=[output.shape],
        )
        (result,) = self.editor.before(
            node,
            "Mul",
            [cast, scales],
            wanted=f"{stem}_dequantized",
            dtypes=[dtype],
            shapes=[output.shape],
        )
        self.editor.replace(node, [result])
        return True

    def _widen(self, weights: Iterable[Integers]) -> bool:
        """Let integers of 4 bits arrive as int8 at their DequantizeLinear; True if there are any.

        Kernels that read int8 take them; there are none for 4 bits and quantized activations.
        """
        few = [w for w in weights if w.bits() == 4 and w.is_signed() and not w.transposed]
        for weight in few:
            node = weight.output.producer()
            assert node is not None  # the DequantizeLinear
            (wide,) = self.editor.before(
                node,
                "Cast",
                [weight.value],
                {"to": ir.DataType.INT8.value},
                wanted=f"{weight.value.name}_wide",
                dtypes=[ir.DataType.INT8],
                shapes=[weight.value.shape],
            )
            self.editor.rewire(node, 0, wide)
            if weight.zero_point is not None:
                zeros = weight.zero_point.astype(np.int8)
                name = f"{weight.value.name}_wide_zero_point"
                self.editor.rewire(node, 2, self.editor.constant(home(weight.value), name, zeros))
        return bool(few)

    def _expand(self, node: ir.Node, index: int, weight: Integers) -> None:
        """Cast and Mul of the constant, which the runtime folds once at load."""
        dtype = ir.DataType.from_numpy(weight.scale.dtype)
        stem = f"{weight.value.name}_expand"
        shape = ir.Shape(weight.values.shape)

        def add(op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
            (value,) = self.editor.before(
                node, op, inputs, attributes, wanted=f"{stem}_{op.lower()}", dtypes=[dtype]
            )
            return value

        result = add("Cast", [weight.value], to=dtype.value)
        result.shape = shape
        if not weight.is_symmetric() and weight.zero_point is not None:
            zeros = weight.zero_point.astype(weight.scale.dtype)
            spread = self._spread(node, weight, zeros, "zero")
            result = add("Sub", [result, spread])
            result.shape = shape
        result = add("Mul", [result, self._spread(node, weight, weight.scale, "unit")])
        result.shape = shape
        self._expanded[weight.value] = weight.values.size * weight.scale.dtype.itemsize
        self.editor.rewire(node, index, result)

    def _spread(self, node: ir.Node, weight: Integers, array: Array, name: str) -> ir.Value:
        """Scales or zero points in a shape that broadcasts to the weight."""
        graph, stem = home(weight.value), f"{weight.value.name}_{name}"
        key = (weight.value, name)
        if weight.block_size:
            axis = weight.axis or 0
            if key not in self._packed:
                index = np.arange(weight.values.shape[axis]) // weight.block_size
                self._packed[key] = [
                    self.editor.constant(graph, stem, array),
                    self.editor.constant(graph, f"{stem}_block", index.astype(np.int64)),
                ]
            (value,) = self.editor.before(
                node,
                "Gather",
                self._packed[key],
                {"axis": axis},
                wanted=f"{stem}_gather",
                dtypes=[ir.DataType.from_numpy(array.dtype)],
            )
            return value
        if key not in self._packed:
            shape = [1] * weight.values.ndim
            if weight.axis is not None and array.ndim:
                shape[weight.axis] = array.size
            self._packed[key] = [self.editor.constant(graph, stem, array.reshape(shape))]
        return self._packed[key][0]


def _is_quantized(node: ir.Node, weights: dict[int, Integers]) -> bool:
    """True if the node's activations are integers too, so that an integer kernel takes it."""
    others = [value for index, value in enumerate(node.inputs) if index not in weights]
    if any(_producer(value) == "DequantizeLinear" for value in others):
        return True
    if node.op_type in _COMPUTING:
        return False
    users = [user.op_type for value in node.outputs for user, _ in value.uses()]
    return "QuantizeLinear" in users


def _producer(value: ir.Value | None) -> str:
    node = None if value is None else value.producer()
    return "" if node is None else node.op_type


def _dtype(value: ir.Value) -> ir.DataType:
    return value.dtype if value.dtype is not None else ir.DataType.INT8
