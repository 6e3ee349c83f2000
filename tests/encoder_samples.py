"""Bundles of an encoder and a decoder made of a few ONNX nodes, and what they must answer.

The encoder averages what it reads: rows of features, or a table's rows for the token ids that its
mask shows. The decoder averages a table's rows for all tokens so far, which its cache keeps, adds
what the encoder gave, and scores the sum. So an answer depends on the whole prompt and on every
token before it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
from bundle_samples import onnx_bytes, sample_manifest
from language_samples import EOS, VOCABULARY, section, text_files
from onnx import helper, numpy_helper

from edgec_runtime import bundle, manifest
from edgec_runtime.generation import CachePair, Encoder, Generation

Array = np.ndarray[Any, Any]
Kind = Literal["features", "ids"]

WIDTH, BINS = 16, 4
START = (258, 5)
_INTEGER, _REAL = 7, 1

_RANDOM = np.random.default_rng(0)
TABLE = _RANDOM.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
HEAD = _RANDOM.standard_normal((WIDTH, VOCABULARY), dtype=np.float32)
INTO = _RANDOM.standard_normal((BINS, WIDTH), dtype=np.float32)


def features(rows: int, seed: int = 0, length: int = 6) -> Array:
    """float32 [rows, length, bins]."""
    return np.random.default_rng(seed).standard_normal((rows, length, BINS), dtype=np.float32)


def answer(
    read: Array | Sequence[int],
    count: int,
    start: Sequence[int] = START,
    suppress: Sequence[int] = (),
    first: Sequence[int] = (),
) -> list[int]:
    """The greedy answer to features [length, bins] or token ids, computed from its beginning."""
    if isinstance(read, np.ndarray):
        memory = (read @ INTO).mean(0)
    else:
        memory = TABLE[list(read)].mean(0)
    tokens = list(start)
    for step in range(count):
        scores = (2 * TABLE[tokens].mean(0) + memory) @ HEAD
        scores[[*suppress, *(first if step == 0 else ())]] = -np.inf
        token = int(scores.argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens[len(start) :]


def encoder_section(kind: Kind = "features", **changes: Any) -> Generation:
    """The manifest's section; ``changes`` are fields of its encoder."""
    features_ = Encoder(input="features", mask=None, start=START)
    ids = Encoder(input="read", mask="shown", start=START)
    encoder = dataclasses.replace({"features": features_, "ids": ids}[kind], **changes)
    pairs = (CachePair("past.key", "key"), CachePair("past.value", "value"))
    return section(mask=None, pairs=pairs, encoder=encoder)


def graphs(kind: Kind = "features") -> dict[str, manifest.Graph]:
    """The signatures by role."""
    cache = ("batch", 1, "past", WIDTH)
    real = manifest.Value("features", "float32", ("batch", "length", BINS))
    ids = tuple(manifest.Value(name, "int64", ("batch", "length")) for name in ("read", "shown"))
    memory = manifest.Value("memory.0", "float32", ("batch", WIDTH))
    main = manifest.Graph(
        "graph.onnx",
        (
            manifest.Value("ids", "int64", ("batch", "new")),
            *(manifest.Value(f"past.{part}", "float32", cache) for part in ("key", "value")),
            memory,
        ),
        (
            manifest.Value("logits", "float32", ("batch", 1, VOCABULARY)),
            *(manifest.Value(part, "float32", cache) for part in ("key", "value")),
        ),
    )
    read = (real,) if kind == "features" else ids
    return {"main": main, "encoder": manifest.Graph("encoder.onnx", read, (memory,))}


def write_encoder_decoder(
    path: pathlib.Path, kind: Kind = "features", generation: Generation | None = None
) -> pathlib.Path:
    """A bundle of both graphs with the tokenizer of language_samples."""
    made = sample_manifest(graphs=graphs(kind), generation=generation or encoder_section(kind))
    files = {"graph.onnx": _main(), "encoder.onnx": _encoder(kind), **text_files()}
    bundle.write_bundle(path, made, weights=[b"\0" * 64], files=files)
    return path


def _encoder(kind: Kind) -> bytes:
    node, info = helper.make_node, helper.make_tensor_value_info
    if kind == "features":
        inputs = [info("features", _REAL, ["batch", "length", BINS])]
        tensors = {"into": INTO}
        nodes = [
            node("MatMul", ["features", "into"], ["rows"]),
            node("ReduceMean", ["rows", "axis"], ["memory.0"], keepdims=0),
        ]
    else:
        inputs = [info(name, _INTEGER, ["batch", "length"]) for name in ("read", "shown")]
        tensors = {"table": TABLE, "last": np.array([2], np.int64)}
        nodes = [
            node("Gather", ["table", "read"], ["rows"]),
            node("Cast", ["shown"], ["weights"], to=_REAL),
            node("Unsqueeze", ["weights", "last"], ["wide"]),
            node("Mul", ["rows", "wide"], ["kept"]),
            node("ReduceSum", ["kept", "axis"], ["sum"], keepdims=0),
            node("ReduceSum", ["weights", "axis"], ["count"], keepdims=1),
            node("Div", ["sum", "count"], ["memory.0"]),
        ]
    return _model(nodes, inputs, [info("memory.0", _REAL, ["batch", WIDTH])], tensors)


def _main() -> bytes:
    node, info = helper.make_node, helper.make_tensor_value_info
    cache = ["batch", 1, "past", WIDTH]
    nodes = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("Unsqueeze", ["rows", "axis"], ["new"]),
        node("Concat", ["past.key", "new"], ["key"], axis=2),
        node("Concat", ["past.value", "new"], ["value"], axis=2),
        node("Add", ["key", "value"], ["both"]),
        node("ReduceMean", ["both", "inner"], ["mean"], keepdims=0),
        node("Add", ["mean", "memory.0"], ["sum"]),
        node("Unsqueeze", ["sum", "axis"], ["hidden"]),
        node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    inputs = [
        info("ids", _INTEGER, ["batch", "new"]),
        info("past.key", _REAL, cache),
        info("past.value", _REAL, cache),
        info("memory.0", _REAL, ["batch", WIDTH]),
    ]
    outputs = [
        info("logits", _REAL, ["batch", 1, VOCABULARY]),
        info("key", _REAL, cache),
        info("value", _REAL, cache),
    ]
    tensors = {"table": TABLE, "head": HEAD, "inner": np.array([1, 2], np.int64)}
    return _model(nodes, inputs, outputs, tensors)


def _model(
    nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any], tensors: dict[str, Array]
) -> bytes:
    arrays = {**tensors, "axis": np.array([1], np.int64)}
    made = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return onnx_bytes(nodes, inputs, outputs, made)
