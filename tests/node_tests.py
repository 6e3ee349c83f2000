"""ONNX's own backend node tests, run through the twin.

A test belongs to the operators of its graph; it counts if the twin claims all of them and its
types are those that the twin computes in: 4-bit integers and uint16 only where a quantizer has
them. Quantized integers are floats in the twin: for the outputs of those operators the numbers
are compared, everywhere else the types as well.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from edgec.passes.contract import PassError
from edgec.passes.torch_call import tensor
from edgec.passes.torch_graph import claimed_operators, to_torch
from edgec.passes.torch_quantize import QUANTIZE

_LEAST_OPSET = 13
_STANDARD = ("", "ai.onnx")
TYPES = frozenset("FLOAT FLOAT16 BFLOAT16 DOUBLE BOOL INT8 UINT8 INT16 INT32 INT64".split())
QUANTIZED_TYPES = frozenset({"INT4", "UINT4", "UINT16"})
_BFLOAT16_TOLERANCE = 2**-6  # two steps of bfloat16: what ONNX's own runner allows
_FLOAT16_TOLERANCE = 2**-9  # two steps of float16: sums are taken in another order


@dataclass(frozen=True)
class NodeTest:
    """One test: a small model, its inputs in order and what must come out."""

    name: str
    model: onnx.ModelProto
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    tolerance: float  # relative

    @property
    def operators(self) -> frozenset[str]:
        """Operators of its graph."""
        return frozenset(node.op_type for node in self.model.graph.node)


def node_tests() -> Iterator[NodeTest]:
    """The tests that count, by name."""
    claimed = set(claimed_operators())
    for test in _collected():
        if test.operators <= claimed and not out_of_scope(test):
            yield test


def out_of_scope(test: NodeTest) -> str:
    """Why a test of claimed operators does not count; empty if it does."""
    graph = test.model.graph
    known = TYPES | QUANTIZED_TYPES if test.operators & QUANTIZE.keys() else TYPES
    for value in (*graph.input, *graph.output):
        if not value.type.HasField("tensor_type"):
            return "sequences and optional values"
        name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        if name not in known:
            return f"type {name.lower()}"
    return ""


def skipped() -> Counter[str]:
    """How many tests of claimed operators do not count, by reason."""
    claimed = set(claimed_operators())
    reasons = (out_of_scope(test) for test in _collected() if test.operators <= claimed)
    return Counter(reason for reason in reasons if reason)


def failure(test: NodeTest) -> str:
    """What the twin does otherwise than the test expects; empty if nothing."""
    graph = test.model.graph
    try:
        twin = to_torch(ir.serde.deserialize_model(test.model))
        feeds = {v.name: tensor(_array(a)) for v, a in zip(graph.input, test.inputs, strict=True)}
        with torch.no_grad():
            actual = twin(feeds)
    except PassError as error:
        return str(error)
    coded = {name for node in graph.node if node.op_type in QUANTIZE for name in node.output}
    for value, expected in zip(graph.output, test.outputs, strict=True):
        wanted, mine = tensor(_array(expected)), actual[value.name]
        if mine.shape != wanted.shape:
            return f"shape {list(mine.shape)}, expected {list(wanted.shape)}"
        if mine.dtype != wanted.dtype and value.name not in coded:
            return f"type {mine.dtype}, expected {wanted.dtype}"
        steps = {torch.bfloat16: _BFLOAT16_TOLERANCE, torch.float16: _FLOAT16_TOLERANCE}
        tolerance = max(test.tolerance, steps.get(wanted.dtype, 0))
        numbers = [t.double().numpy() for t in (mine, wanted)]
        if not np.allclose(*numbers, rtol=tolerance, atol=1e-6, equal_nan=True):
            return "other values"
    return ""


def _array(value: Any) -> np.ndarray:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value)


@functools.cache
def _collected() -> tuple[NodeTest, ...]:
    """All node tests of standard operators whose definition is that of opset 13 or newer."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases()
    found = []
    for case in cases:
        model = case.model
        if any(node.domain not in _STANDARD for node in model.graph.node):
            continue
        if not _raised(model):
            continue
        inputs, outputs = case.data_sets[0]
        found.append(NodeTest(case.name, model, inputs, outputs, case.rtol))
    return tuple(sorted(found, key=lambda test: test.name))


def _raised(model: onnx.ModelProto) -> bool:
    """Lift a model to opset 13 if its operators are the same there; False if they are not."""
    for opset in model.opset_import:
        if opset.domain in _STANDARD and opset.version < _LEAST_OPSET:
            for node in model.graph.node:
                if onnx.defs.get_schema(node.op_type, _LEAST_OPSET).since_version > opset.version:
                    return False
            opset.version = _LEAST_OPSET
    return True
