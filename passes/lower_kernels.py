"""Lowers integer weights to the com.microsoft kernels that compute with them.

MatMulNBits takes unsigned 4- or 8-bit weights [out, blocks, bytes a block], padded to whole
blocks, with one float scale a block and an optional packed zero point (default: the middle
of the range). GatherBlockQuantized looks up rows of the same storage, so that an embedding
table and the output layer that shares it stay one. DynamicQuantizeLSTM takes W and R
transposed, int8, one scale a gate row or one a direction. A weight that several nodes share is
packed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from edgec.passes.weights import Array, Editor, Refused, constant, home, label, required
from edgec.targets import Target

_CONTRIB = "com.microsoft"
_STORED = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8)
_BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Integers:
    """A constant behind a DequantizeLinear: weight = (values - zero_point) * scale.

    axis: of the scales; None is one scale for all. block_size: 0 is one scale an index.
    transposed: the arrays are the transposes of what is stored, since a Transpose follows.
    """

    value: ir.Value  # the initializer, for its name and home
    values: Array
    scale: Array
    zero_point: Array | None
    axis: int | None
    block_size: int
    output: ir.Value  # of the DequantizeLinear, or of the Transpose behind it
    transposed: bool = False

    def bits(self) -> int:
        """Bits of a stored weight: 4 or 8."""
        return 4 if self.value.dtype in (ir.DataType.INT4, ir.DataType.UINT4) else 8

    def is_signed(self) -> bool:
        """True for int8 and int4."""
        return self.value.dtype in (ir.DataType.INT4, ir.DataType.INT8)

    def is_symmetric(self) -> bool:
        """True if every zero point is 0."""
        return self.zero_point is None or not self.zero_point.astype(np.int16).any()


def integers_behind(value: ir.Value | None) -> Integers | None:
    """What stands behind an input if it is a dequantized constant weight, else None.

    The transpose of a dequantized matrix in blocks is one too.
    """
    node = None if value is None else value.producer()
    if value is not None and node is not None and node.op_type == "Transpose" and not node.domain:
        inner = integers_behind(node.inputs[0])
        return None if inner is None else _transpose(inner, value)
    if value is None or node is None or node.op_type != "DequantizeLinear" or node.domain:
        return None
    source = node.inputs[0]
    values, scale = constant(source), constant(node.inputs[1])
    has_zero_point = len(node.inputs) > 2 and node.inputs[2] is not None
    zero_point = constant(node.inputs[2]) if has_zero_point else None
    if source is None or values is None or scale is None or (has_zero_point and zero_point is None):
        return None
    if not source.is_initializer():
        return None
    axis = node.attributes.get_int("axis", 1) % max(values.ndim, 1) if scale.ndim else None
    return Integers(
        source,
        values,
        scale,
        zero_point,
        axis,
        node.attributes.get_int("block_size", 0),
        value,
    )


def _transpose(weight: Integers, output: ir.Value) -> Integers | None:
    """The transpose of a matrix in blocks."""
    if weight.values.ndim != 2 or not weight.block_size or weight.axis is None:
        return None
    zero_point = weight.zero_point
    return replace(
        weight,
        values=weight.values.T,
        scale=weight.scale.T,
        zero_point=None if zero_point is None else zero_point.T,
        axis=1 - weight.axis,
        output=output,
        transposed=not weight.transposed,
    )


@dataclass
class Kernels:
    """Replaces nodes of one model by kernels of the target.

    Its methods raise Refused, with the node untouched, where there is none or it does not pay.
    """

    editor: Editor
    target: Target
    _packed: dict[tuple[ir.Value, str], list[ir.Value]] = field(default_factory=dict)

    def product(self, node: ir.Node, weight: Integers) -> None:
        """MatMul or Gemm on block-wise weights -> MatMulNBits (-> Add)."""
        int4, gemm = self.target.int4, node.op_type == "Gemm"
        if "MatMulNBits" not in self.target.kernels:
            raise Refused(f"{self.target.name} has no MatMulNBits kernel")
        # measured: 8 bits computed in float32 are 20 times slower than float32 weights
        if not int4.pays or (weight.bits() == 8 and int4.accuracy_level != 4):
            raise Refused(f"{weight.bits()}-bit MatMulNBits does not pay on {self.target.name}")
        transposed = gemm and node.attributes.get_int("transB", 0) == 1
        if gemm and node.attributes.get_int("transA", 0) != 0:
            raise Refused("its first operand is transposed (transA)")
        if weight.axis != (1 if transposed else 0) or weight.values.ndim != 2:
            raise Refused("its blocks do not run along the input dimension")
        if weight.value.dtype not in _STORED or weight.block_size not in _BLOCK_SIZES:
            raise Refused(
                f"MatMulNBits has no {weight.value.dtype} in blocks of {weight.block_size}"
            )
        if weight.scale.dtype != np.float32:
            raise Refused(f"its scales are {weight.scale.dtype}, not float32")
        alpha = node.attributes.get_float("alpha", 1.0) if gemm else 1.0
        row, rest = self._bias(node)
        outs, ins = weight.values.shape if transposed else weight.values.shape[::-1]
        packed, scale, zero_point = self._pack(weight, transposed=transposed, alpha=alpha)
        output = node.outputs[0]
        inputs = [required(node, 0), packed, scale, zero_point, None, row]
        while inputs[-1] is None:
            inputs.pop()
        (result,) = self.editor.before(
            node,
            "MatMulNBits",
            inputs,
            {
                "K": ins,
                "N": outs,
                "bits": weight.bits(),
                "block_size": weight.block_size,
                "accuracy_level": int4.accuracy_level,
            },
            wanted=f"{label(node)}_nbits",
            shapes=[output.shape],
            domain=_CONTRIB,
        )
        if rest is not None:
            (result,) = self.editor.before(
                node, "Add", [result, rest], wanted=f"{label(node)}_bias", shapes=[output.shape]
            )
        self.editor.replace(node, [result])

    def _bias(self, node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
        """A Gemm's C * beta as a constant row for the kernel, or as a value to add."""
        value = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        if value is None:
            return None, None
        beta = node.attributes.get_float("beta", 1.0)
        array = constant(value)
        if array is None:
            if beta != 1.0:
                raise Refused("its C is computed at run time and beta is not 1")
            return None, value
        if array.ndim == 1 and array.size == _columns(node) and beta == 1.0:
            return value, None
        bias = (array * np.float32(beta)).astype(np.float32)
        if array.size == _columns(node) and array.shape[-1:] in ((), (array.size,)):
            return self.editor.constant(home(value), f"{value.name}_bias", bias.reshape(-1)), None
        return None, self.editor.constant(home(value), f"{value.name}_bias", bias)

    def _pack(
        self, weight: Integers, *, transposed: bool, alpha: float
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """The weight as MatMulNBits stores it: unsigned, blocks of each output row by row."""
        by_row = transposed != weight.transposed  # as the weight is stored
        key = (weight.value, f"nbits {by_row} {alpha}")
        if key not in self._packed:
            bits, middle = weight.bits(), 2 ** (weight.bits() - 1)
            shift = middle if weight.is_signed() else 0
            values = weight.values.astype(np.int16) + shift  # [in, out], or [out, in]
            scale = (weight.scale * np.float32(alpha)).astype(np.float32)
            zero_point = weight.zero_point
            if zero_point is None:
                zeros = np.full(scale.shape, shift, np.int16)
            else:
                zeros = zero_point.astype(np.int16) + shift
            if not transposed:
                values, scale, zeros = values.T, scale.T, zeros.T
            # the last block is padded with its zero point, that is with weights of 0
            outs, ins = values.shape
            blocks = scale.shape[1]
            padded = np.repeat(zeros, weight.block_size, axis=1)
            padded[:, :ins] = values
            packed = _pack_bits(padded.astype(np.uint8), bits).reshape(outs, blocks, -1)
            graph, name = home(weight.value), weight.value.name
            constants = [
                self.editor.constant(graph, f"{name}_packed", packed),
                self.editor.constant(graph, f"{name}_block_scale", scale),
            ]
            if (zeros != middle).any():  # the kernel's default
                packed_zeros = _pack_bits(zeros.astype(np.uint8), bits)
                constants.append(
                    self.editor.constant(graph, f"{name}_block_zero_point", packed_zeros)
                )
            self._packed[key] = constants
        found = self._packed[key]
        return found[0], found[1], found[2] if len(found) > 2 else None

    def rows(self, node: ir.Node, table: Integers) -> None:
        """Gather of rows in blocks -> GatherBlockQuantized, from a product's storage."""
        kernel = "GatherBlockQuantized"
        if kernel not in self.target.kernels:
            raise Refused(f"{self.target.name} has no {kernel} kernel")
        if node.attributes.get_int("axis", 0) != 0 or table.axis != 1 or table.values.ndim != 2:
            raise Refused("its blocks do not run along the rows that it looks up")
        rows, width = table.values.shape
        if table.block_size not in _BLOCK_SIZES or width % table.block_size:
            raise Refused(f"rows of {width} are no whole number of blocks")
        if table.value.dtype not in _STORED or table.scale.dtype != np.float32:
            raise Refused(f"{kernel} has no {table.value.dtype} with {table.scale.dtype} scales")
        packed, scale, zero_point = self._pack(table, transposed=True, alpha=1.0)
        output, stem = node.outputs[0], label(node)
        shape = np.array([rows, width * table.bits() // 8], np.int64)
        (flat,) = self.editor.before(
            node,
            "Reshape",
            [packed, self.editor.constant(home(table.value), f"{stem}_row_bytes", shape)],
            wanted=f"{stem}_flat",
            dtypes=[ir.DataType.UINT8],
            shapes=[ir.Shape(shape.tolist())],
        )
        inputs = [flat, required(node, 1), scale, zero_point]
        (result,) = self.editor.before(
            node,
            kernel,
            inputs if zero_point is not None else inputs[:3],
            {
                "gather_axis": 0,
                "quantize_axis": 1,
                "block_size": table.block_size,
                "bits": table.bits(),
            },
            wanted=f"{stem}_rows",
            shapes=[output.shape],
            domain=_CONTRIB,
        )
        self.editor.replace(node, [result])

    def lstm(self, node: ir.Node, w: Integers, r: Integers) -> None:
        """LSTM on int8 weights -> DynamicQuantizeLSTM."""
        kernel = "DynamicQuantizeLSTM"
        if kernel not in self.target.kernels:
            raise Refused(f"{self.target.name} has no {kernel} kernel")
        if "LSTM" not in self.target.int8.dynamic_ops:
            raise Refused(f"int8 LSTM does not pay on {self.target.name}")
        if node.attributes.get_int("layout", 0) != 0:
            raise Refused("its layout is batch first, which the int8 kernel has not")
        for weight in (w, r):
            _check_gates(weight)
        packed = [self._gates(w), self._gates(r)]
        inputs: list[ir.Value | None] = list(node.inputs)
        inputs += [None] * (8 - len(inputs))
        inputs[1], inputs[2] = packed[0][0], packed[1][0]
        inputs += [*packed[0][1:], *packed[1][1:]]
        results = self.editor.before(
            node,
            kernel,
            inputs,
            {key: value for key, value in node.attributes.items() if key != "layout"},
            wanted=f"{label(node)}_int8",
            dtypes=[ir.DataType.FLOAT] * len(node.outputs),
            shapes=[value.shape for value in node.outputs],
            domain=_CONTRIB,
        )
        self.editor.replace(node, results)

    def _gates(self, weight: Integers) -> list[ir.Value]:
        """W or R as [directions, in, gates * hidden] int8, its scales and its zero points."""
        key = (weight.value, "gates")
        if key not in self._packed:
            graph, name = home(weight.value), weight.value.name
            shape = weight.values.shape[: 1 if weight.axis == 0 else 2]
            self._packed[key] = [
                self.editor.constant(graph, f"{name}_gates", weight.values.transpose(0, 2, 1)),
                self.editor.constant(graph, f"{name}_gate_scale", weight.scale.reshape(shape)),
                self.editor.constant(graph, f"{name}_gate_zero", np.zeros(shape, np.int8)),
            ]
        return self._packed[key]


def _check_gates(weight: Integers) -> None:
    """Raises Refused if the int8 LSTM cannot take a W or R as it is quantized."""
    directions, _, ins = weight.values.shape
    by_row = (weight.axis == 1 and directions == 1 and not weight.block_size) or (
        weight.axis == 2 and weight.block_size == ins
    )
    known = by_row or (weight.axis == 0 and not weight.block_size)
    if not known or not weight.is_symmetric() or weight.value.dtype != ir.DataType.INT8:
        raise Refused("its weights are not symmetric int8 with one scale a row or direction")


def _columns(node: ir.Node) -> int:
    weight = integers_behind(node.inputs[1])
    if weight is None:
        return -1
    transposed = node.attributes.get_int("transB", 0) == 1
    return int(weight.values.shape[0 if transposed else 1])


def _pack_bits(values: Array, bits: int) -> Array:
    """uint8 [rows, n] -> bytes; for 4 bits two values a byte, the first in the low half."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, [(0, 0), (0, 1)])
    return np.asarray(values[:, 0::2] | (values[:, 1::2] << 4), np.uint8)
