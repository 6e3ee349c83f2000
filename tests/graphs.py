"""Small graphs with weights of a fixed seed, and a context to run passes on them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from edgec.passes import Context
from edgec.passes.execution import open_session
from edgec.targets import Target, load_target


def context(model: ir.Model, target: str | Target = "x86-64", **rest: object) -> Context:
    chosen = load_target(target) if isinstance(target, str) else target
    return Context(target=chosen, reference=model.clone(), **rest)


def graph(text: str, weights: Mapping[str, np.ndarray], opset: int = 21) -> ir.Model:
    """A model from ONNX text ``name (inputs) => (outputs) { nodes }`` and its weights."""
    # through onnx: onnx_ir's own reader adds initializers too late for subgraphs
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    """float32 normal values divided by the square root of the number of inputs."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return (values / np.sqrt(max(shape[-1], 1))).astype(np.float32)


def feed(*shape: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(model: ir.Model, *, optimized: bool = True, **feeds: np.ndarray) -> list[np.ndarray]:
    return open_session(model, optimized=optimized).run(None, feeds)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def mlp() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Gemm (transposed weight), Relu, MatMul + Add."""
    text = """mlp (float[batch, 96] x) => (float[batch, 40] y) {
        [fc1] h = Gemm <transB = 1> (x, w1, b1)
        a = Relu (h)
        [fc2] m = MatMul (a, w2)
        y = Add (m, b2)
    }"""
    weights = {
        "w1": weight(64, 96),
        "b1": feed(64, seed=1),
        "w2": weight(64, 40, seed=2),
        "b2": feed(40, seed=3),
    }
    return graph(text, weights), {"x": feed(7, 96)}


def cnn() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Conv, depthwise Conv, pooling, Gemm."""
    text = """cnn (float[1, 4, 12, 12] x) => (float[1, 10] y) {
        [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (x, k1, b1)
        r1 = Relu (c1)
        [depthwise] c2 = Conv <group = 32, pads = [1, 1, 1, 1]> (r1, k2)
        r2 = Clip (c2, zero, six)
        p = GlobalAveragePool (r2)
        f = Flatten (p)
        [fc] y = Gemm <transB = 1> (f, w, b)
    }"""
    weights = {
        "k1": weight(32, 4, 3, 3),
        "b1": feed(32, seed=1),
        "k2": weight(32, 1, 3, 3, seed=2) * 3,
        "zero": np.float32(0),
        "six": np.float32(6),
        "w": weight(10, 32, seed=3),
        "b": feed(10, seed=4),
    }
    return graph(text, {k: np.asarray(v) for k, v in weights.items()}), {"x": feed(1, 4, 12, 12)}


def transformer() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Embedding, one attention block with bias and LayerNormalization, tied output layer."""
    text = """block (int64[batch, seq] ids) => (float[batch, seq, 50] logits) {
        [embed] e = Gather (table, ids)
        [q] q0 = MatMul (e, wq)
        q1 = Add (q0, bq)
        [k] k0 = MatMul (e, wk)
        kt = Transpose <perm = [0, 2, 1]> (k0)
        [v] v0 = MatMul (e, wv)
        [scores] s = MatMul (q1, kt)
        p = Softmax <axis = -1> (s)
        [mix] o = MatMul (p, v0)
        [out] o1 = MatMul (o, wo)
        r = Add (o1, e)
        n = LayerNormalization <axis = -1> (r, gamma, beta)
        [tied] head = Transpose <perm = [1, 0]> (table)
        [lm_head] logits = MatMul (n, head)
    }"""
    weights = {
        "table": weight(50, 48) * 4,
        "wq": weight(48, 48, seed=1),
        "bq": feed(48, seed=2),
        "wk": weight(48, 48, seed=3),
        "wv": weight(48, 48, seed=4),
        "wo": weight(48, 48, seed=5),
        "gamma": feed(48, seed=6),
        "beta": feed(48, seed=7),
    }
    ids = np.random.default_rng(8).integers(0, 50, (2, 9))
    return graph(text, weights), {"ids": ids}


def lstm(directions: int = 1) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """One LSTM layer that returns all steps and the last state."""
    direction = "forward" if directions == 1 else "bidirectional"
    text = f"""rnn (float[steps, 2, 24] x) => (float[steps, {directions}, 2, 32] y,
            float[{directions}, 2, 32] h) {{
        [lstm] y, h = LSTM <hidden_size = 32, direction = "{direction}"> (x, w, r, b)
    }}"""
    weights = {
        "w": weight(directions, 128, 24),
        "r": weight(directions, 128, 32, seed=1),
        "b": feed(directions, 256, seed=2) / 4,
    }
    return graph(text, weights), {"x": feed(11, 2, 24)}
