"""A bundle with state for the runtime's tests: the running sum of its inputs.

x [batch, 3], h [1, batch, 3]  ->  hn = h + x,  y = 2 * hn
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from bundle_samples import onnx_bytes, sample_manifest
from onnx import TensorProto, helper, numpy_helper

from edgec_runtime import bundle
from edgec_runtime.manifest import Graph, Value
from edgec_runtime.state import StatePair

Array = np.ndarray[Any, Any]
Dimension = int | str | None


def write_running_sum(
    path: pathlib.Path, batch: Dimension = "batch", *, stated: bool = True
) -> pathlib.Path:
    """The bundle; stated: with the section ``state``."""
    shape = (1, batch, 3)
    nodes = [
        helper.make_node("Add", ["h", "x"], ["hn"]),
        helper.make_node("Mul", ["hn", "two"], ["y"]),
    ]
    graph = Graph(
        "graph.onnx",
        (Value("x", "float32", (batch, 3)), Value("h", "float32", shape)),
        (Value("y", "float32", shape), Value("hn", "float32", shape)),
    )
    two = numpy_helper.from_array(np.float32(2), "two")
    pairs = (StatePair("h", "hn", "float32", shape),)
    return _write(path, graph, nodes, [two], pairs if stated else None)


def write_counter(path: pathlib.Path) -> pathlib.Path:
    """Two states of other kinds: an int64 scalar that counts, and a flag that is handed through.

    x [3]  ->  y = x, countn = count + 1, flagn = flag
    """
    nodes = [
        helper.make_node("Identity", ["x"], ["y"]),
        helper.make_node("Add", ["count", "one"], ["countn"]),
        helper.make_node("Identity", ["flag"], ["flagn"]),
    ]
    graph = Graph(
        "graph.onnx",
        (Value("x", "float32", (3,)), Value("count", "int64", ()), Value("flag", "bool", (2,))),
        (Value("y", "float32", (3,)), Value("countn", "int64", ()), Value("flagn", "bool", (2,))),
    )
    one = numpy_helper.from_array(np.int64(1), "one")
    pairs = (
        StatePair("count", "countn", "int64", ()),
        StatePair("flag", "flagn", "bool", (2,)),
    )
    return _write(path, graph, nodes, [one], pairs)


def _write(
    path: pathlib.Path,
    graph: Graph,
    nodes: list[Any],
    tensors: list[Any],
    pairs: tuple[StatePair, ...] | None,
) -> pathlib.Path:
    data = onnx_bytes(nodes, _infos(graph.inputs), _infos(graph.outputs), tensors)
    made = sample_manifest(graphs={"main": graph}, state=pairs, ops=())
    bundle.write_bundle(path, made, weights=[], files={"graph.onnx": data})
    return path


def _infos(values: Sequence[Value]) -> list[Any]:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    return [helper.make_tensor_value_info(v.name, kinds[v.dtype], v.shape) for v in values]
