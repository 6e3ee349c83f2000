"""The external tensors of an ONNX graph, found in its protobuf bytes.

A bundle's graph names the file that holds its weights, and only the runtime knows what
that file is called here. This module walks the protobuf fields that can hold a tensor
(onnx.proto3 of ONNX 1.23) and reports each external one with the position of its location,
so that the caller can check the range and overwrite the location in place. A span without
the word ``location`` cannot hold an external tensor and is not entered: a graph of 10,000
nodes takes some 20 ms.

Left out on purpose: everything else about ONNX. ONNX Runtime parses and checks the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgec_runtime.errors import BundleError

# message -> {field number: message inside}; fields that cannot lead to a tensor are absent
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Training": {1: "Graph", 2: "Graph"},
}
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA = 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 64


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose bytes stand in a file.

    location_at: position of the location's first byte in the graph's bytes.
    offset, length: in bytes, as the graph states them; -1 where it does not.
    """

    name: str
    location: bytes
    location_at: int
    offset: int
    length: int


def external_tensors(graph: bytes) -> Iterator[ExternalTensor]:
    """Every external tensor of a serialized ONNX model, subgraphs and functions included.

    Raises BundleError if the bytes are no protobuf.
    """
    yield from _walk(graph, 0, len(graph), "Model", 0)


def _walk(data: bytes, start: int, end: int, message: str, depth: int) -> Iterator[ExternalTensor]:
    if data.find(b"location", start, end) < 0:
        return
    if depth > _MAX_DEPTH:
        raise BundleError("its graph is nested too deeply")
    if message == "Tensor":
        yield from _external(data, start, end)
        return
    inside = _MESSAGES[message]
    for number, first, last in _fields(data, start, end):
        if number in inside:
            yield from _walk(data, first, last, inside[number], depth + 1)


def _external(data: bytes, start: int, end: int) -> Iterator[ExternalTensor]:
    name, entries = "", {}
    for number, first, last in _fields(data, start, end):
        if number == _TENSOR_NAME:
            name = data[first:last].decode("utf-8", "replace")
        elif number == _TENSOR_EXTERNAL_DATA:
            spans = {n: (a, b) for n, a, b in _fields(data, first, last)}
            key, value = spans.get(_ENTRY_KEY, (0, 0)), spans.get(_ENTRY_VALUE, (0, 0))
            if data[slice(*key)] in entries:
                raise BundleError(f"its tensor '{name}' states where its data is twice")
            entries[data[slice(*key)]] = value
    if b"location" in entries:
        first, last = entries[b"location"]
        yield ExternalTensor(
            name,
            data[first:last],
            first,
            _number(data[slice(*entries.get(b"offset", (0, 0)))]),
            _number(data[slice(*entries.get(b"length", (0, 0)))]),
        )


def _number(digits: bytes) -> int:
    return int(digits) if digits.isdigit() and len(digits) < 20 else -1


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of the length-delimited fields of one message."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        kind = tag & 7
        if kind == _BYTES:
            length, position = _varint(data, position, end)
            if length > end - position:
                raise BundleError("its graph is damaged: a field reaches outside of its message")
            yield tag >> 3, position, position + length
            position += length
        elif kind == _VARINT:
            _, position = _varint(data, position, end)
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise BundleError("its graph is damaged: no protobuf")


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
    raise BundleError("its graph is damaged: a number does not end")
