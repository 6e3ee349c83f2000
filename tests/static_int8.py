"""Small graphs quantized statically: what the tests of that pass share."""

from __future__ import annotations

import dataclasses

import graphs
import numpy as np
import onnx_ir as ir

from edgec.passes import QuantizeStatic, Result
from edgec.passes.execution import open_session, optimized_graph, sqnr_db
from edgec.targets import Target, load_target

DEFAULT = QuantizeStatic()


def target(name: str = "x86-64", **int8: object) -> Target:
    """The target with other capabilities; every kind of layer pays unless said otherwise."""
    loaded, int8 = load_target(name), {"depthwise_pays": True} | int8
    return dataclasses.replace(loaded, int8=dataclasses.replace(loaded.int8, **int8))


def samples(model: ir.Model, count: int = 8) -> list[dict[str, np.ndarray]]:
    value = model.graph.inputs[0]
    shape = [d if isinstance(d, int) else 5 for d in value.shape]
    return [{value.name: graphs.feed(*shape, seed=100 + i)} for i in range(count)]


def quantize(
    model: ir.Model, chosen: QuantizeStatic = DEFAULT, on: Target | None = None, **rest
) -> Result:
    rest.setdefault("calibration", samples(model))
    return chosen.run(model.clone(), graphs.context(model, on or target(), **rest))


def array(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def kernels(model: ir.Model) -> list[str]:
    return [node.op_type for node in optimized_graph(model).graph]


def sqnr(model: ir.Model, quantized: ir.Model) -> float:
    feeds = samples(model, 20)[-6:]
    both = [[open_session(m).run(None, f)[0].ravel() for f in feeds] for m in (model, quantized)]
    return sqnr_db(np.concatenate(both[0]), np.concatenate(both[1]))


def conv(nodes: str, *, shape: str = "1, 8, 10, 10", **weights: np.ndarray) -> ir.Model:
    """A graph x -> y of the given nodes with weights k (8 to 8, 3x3) and b."""
    text = f"conv (float[{shape}] x) => (float[n, c, h, w] y) {{ {nodes} }}"
    given = {"k": graphs.weight(8, 8, 3, 3), "b": graphs.feed(8, seed=1)} | weights
    used = {name: value for name, value in given.items() if f"{name}" in nodes.replace(",", " ")}
    return graphs.graph(text, {k: np.asarray(v) for k, v in used.items()})
