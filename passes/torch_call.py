"""One execution of a node in the twin: its arguments, attributes and types.

An operator of the twin is a function from a ``Call`` to a tensor or a tuple of tensors. Shapes
and indices arrive as integer tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


@dataclass(frozen=True)
class Call:
    """One execution of a node.

    latent: the integer range of a weight that is trained as a float, for DequantizeLinear.
    finer: points of such a weight's grid for each integer; 1: the integers themselves.
    """

    node: ir.Node
    arguments: Sequence[Any]
    latent: tuple[int, int] | None = None
    finer: int = 1

    def __getitem__(self, index: int) -> Any:
        """The argument at ``index``, or None if it is absent."""
        return self.arguments[index] if index < len(self.arguments) else None

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, or the default."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def ints(self, index: int, name: str = "") -> list[int] | None:
        """Integers of an input, or of the attribute that held them in earlier opsets."""
        if self[index] is not None:
            return [int(v) for v in self[index].reshape(-1).tolist()]
        value = self.get(name) if name else None
        return None if value is None else [int(v) for v in value]

    def wants(self, index: int) -> bool:
        """True if somebody may read the output at ``index``."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)

    def dtype(self, index: int) -> ir.DataType | None:
        """The ONNX type of an input, where the graph tells it."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None else value.dtype

    def constant(self, index: int) -> bool:
        """True if the input is an initializer."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return value is not None and value.const_value is not None


Operator = Callable[[Call], Any]


def torch_dtype(code: int | ir.DataType) -> torch.dtype:
    """The torch type of an ONNX type code. Raises ValueError where torch computes none."""
    dtype = _DTYPES.get(ir.DataType(code))
    if dtype is None:
        raise ValueError(f"torch does not compute in {ir.DataType(code).name}")
    return dtype


def tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A copy of an array; integers of 4 bits come as int8 or uint8, 8-bit floats as float32."""
    if array.dtype.kind in "iufb":
        return torch.from_numpy(np.array(array))
    # ml_dtypes
    whole = {"int4": np.int8, "uint4": np.uint8}.get(array.dtype.name, np.float32)
    small = torch.from_numpy(array.astype(whole))
    return small.bfloat16() if array.dtype.name == "bfloat16" else small


def broadcast_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that all of the shapes broadcast to."""
    common: tuple[int, ...] = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return common
