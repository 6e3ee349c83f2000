"""Small bundles for the runtime's tests: y = x @ w0 @ w1 ..., weights outside of the graph."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgec_runtime import bundle, container, manifest
from edgec_runtime.machine import this_machine

Array = np.ndarray[Any, Any]

WEIGHT = np.random.default_rng(0).standard_normal((8, 4), dtype=np.float32)


def external_tensor(
    name: str, shape: Sequence[int], offset: int, length: int, location: str = bundle.LOCATION
) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=1, dims=shape, data_location=1)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def onnx_bytes(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: list[Any]
) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def chain_graph(shapes: Sequence[tuple[int, int]], **tensor: Any) -> bytes:
    """x [batch, n] through one MatMul for each shape, to y; ``tensor`` overrides its fields."""
    offsets = bundle.weight_offsets(4 * a * b for a, b in shapes)
    tensors, nodes, name = [], [], "x"
    for i, ((rows, columns), offset) in enumerate(zip(shapes, offsets, strict=True)):
        fields = {"offset": bundle.WEIGHTS_OFFSET + offset, "length": 4 * rows * columns} | tensor
        tensors.append(external_tensor(f"w{i}", (rows, columns), **fields))
        output = "y" if i == len(shapes) - 1 else f"h{i}"
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [output]))
        name = output
    return onnx_bytes(
        nodes,
        [helper.make_tensor_value_info("x", 1, ["batch", shapes[0][0]])],
        [helper.make_tensor_value_info("y", 1, ["batch", shapes[-1][1]])],
        tensors,
    )


def sample_manifest(**changes: Any) -> manifest.Manifest:
    """A manifest for ``chain_graph([(8, 4)])`` on this machine."""
    machine = this_machine()
    sample = manifest.Manifest(
        name="sample",
        version=1,
        edgec="0.1.0",
        target=manifest.Target("here", machine.arch, (machine.os,)),
        onnxruntime=">=1.27,<2",
        opset=21,
        ops=("ai.onnx::MatMul",),
        graphs={
            "main": manifest.Graph(
                "graph.onnx",
                (manifest.Value("x", "float32", ("batch", 8)),),
                (manifest.Value("y", "float32", ("batch", 4)),),
            )
        },
    )
    return dataclasses.replace(sample, **changes)


def write_sample(
    path: pathlib.Path, files: Mapping[str, bytes] | None = None, **changes: Any
) -> pathlib.Path:
    """A valid bundle; ``files`` adds entries, ``changes`` are fields of the manifest."""
    contents = {"graph.onnx": chain_graph([WEIGHT.shape])} | dict(files or {})
    bundle.write_bundle(
        path, sample_manifest(**changes), weights=[WEIGHT.tobytes()], files=contents
    )
    return path


def forge(
    path: pathlib.Path,
    change: Any = lambda table: None,
    files: Sequence[tuple[str, bytes]] | None = None,
    graph: bytes | None = None,
) -> pathlib.Path:
    """A well-formed container around a manifest that ``change`` altered as parsed JSON."""
    if files is None:
        files = [("graph.onnx", graph or chain_graph([WEIGHT.shape]))]
    with open(path, "w+b") as stream:
        writer = container.ContainerWriter(stream)
        written = [writer.add_first("weights.bin", [WEIGHT.tobytes()])]
        written += [writer.add(name, data) for name, data in files]
        entries = tuple(
            manifest.Entry(w.member.name, w.member.size, w.sha256, w.member.offset) for w in written
        )
        table = json.loads(sample_manifest(entries=entries).to_json())
        raw = change(table)
        writer.add("manifest.json", raw if isinstance(raw, bytes) else json.dumps(table).encode())
        writer.close()
    return path
