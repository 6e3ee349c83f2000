"""Small networks with residual branches, and what they are without one, made in another way."""

from __future__ import annotations

import re

import graphs
import numpy as np
import onnx_ir as ir

from edgec.passes.matching import add_initializer, insert
from edgec.passes.residual_blocks import Block

Made = tuple[ir.Model, dict[str, np.ndarray]]
WIDTH = 16


def _network(lines: str, inputs: str = "", outputs: str = "", **weights: np.ndarray) -> Made:
    """x float [2, 5, 16] -> y, and weights wa to wh [16, 16], scale and shift of norms."""
    text = f"""net (float[2, 5, 16] x{inputs}) => (float[2, 5, 16] y{outputs}) {{ {lines} }}"""
    square = {f"w{name}": graphs.weight(WIDTH, WIDTH, seed=i) for i, name in enumerate("abcdefgh")}
    norm = {"scale": graphs.feed(WIDTH, seed=1) + 2, "shift": graphs.feed(WIDTH, seed=2)}
    given = {**square, **norm, **weights}
    words = set(re.findall(r"\w+", lines))
    used = {name: array for name, array in given.items() if name in words}
    return graphs.graph(text, used), {"x": graphs.feed(2, 5, WIDTH)}


def pre_norm(outputs: str = "") -> Made:
    """Attention without heads and a feed-forward block, each behind its norm."""
    return _network(
        """n1 = LayerNormalization (x, scale, shift)
        [q] query = MatMul (n1, wa)
        [k] key = MatMul (n1, wb)
        turned = Transpose <perm = [0, 2, 1]> (key)
        scores = MatMul (query, turned)
        masked = Add (scores, bias)
        shares = Softmax (masked)
        [v] value = MatMul (n1, wc)
        mixed = MatMul (shares, value)
        [o] attended = MatMul (mixed, wd)
        [attention] r1 = Add (x, attended)
        n2 = LayerNormalization (r1, scale, shift)
        [up] hidden = MatMul (n2, we)
        active = Gelu (hidden)
        [down] fed = MatMul (active, wf)
        [feed_forward] r2 = Add (fed, r1)
        [head] y = MatMul (r2, wg)""",
        outputs=outputs,
        bias=np.float32([0, 0, 0, -1e9, -1e9]),
    )


def post_norm() -> Made:
    """Two layers of attention with a mask that is made once, each with a norm behind the sum."""
    model, feeds = _network(
        """open = Cast <to = 1> (mask)
        closed = Sub (one, open)
        added = Mul (closed, low)
        [q1] k1 = MatMul (x, wa)
        t1 = Transpose <perm = [0, 2, 1]> (k1)
        s1 = MatMul (x, t1)
        m1 = Add (s1, added)
        p1 = Softmax (m1)
        o1 = MatMul (p1, x)
        [o1] l1 = MatMul (o1, wb)
        [first] r1 = Add (l1, x)
        n1 = LayerNormalization (r1, scale, shift)
        [q2] k2 = MatMul (n1, wc)
        t2 = Transpose <perm = [0, 2, 1]> (k2)
        s2 = MatMul (n1, t2)
        [second_scores] m2 = Add (s2, added)
        p2 = Softmax (m2)
        o2 = MatMul (p2, n1)
        [o2] l2 = MatMul (o2, wd)
        [second] r2 = Add (l2, n1)
        y = LayerNormalization (r2, scale, shift)""",
        ", int64[2, 1, 5] mask",
        one=np.float32(1),
        low=np.float32(-1e9),
    )
    return model, feeds | {"mask": np.array([[[1] * 5], [[1, 1, 1, 0, 0]]], np.int64)}


def nested() -> Made:
    """x + f(x), where f has a residual branch of its own, the end of which is f's end."""
    return _network(
        """[in] i = MatMul (x, wa)
        j = Relu (i)
        [deep] k = MatMul (j, wb)
        [inner] l = Add (k, j)
        [outer] r = Add (x, l)
        [head] y = MatMul (r, wc)"""
    )


def inverted(feature: str = "") -> Made:
    """An inverted residual with squeeze-and-excitation, and a bottleneck that narrows none."""
    text = f"""net (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y{feature}) {{
        [expand] w1 = Conv (x, k1, b1)
        w2 = HardSwish (w1)
        [depthwise] w3 = Conv <group = 16, pads = [1, 1, 1, 1]> (w2, k2)
        p1 = GlobalAveragePool (w3)
        [squeeze] p2 = Conv (p1, k3)
        p3 = Relu (p2)
        [excite] p4 = Conv (p3, k4)
        p5 = HardSigmoid (p4)
        w4 = Mul (w3, p5)
        [project] w5 = Conv (w4, k5)
        [inverted] r1 = Add (x, w5)
        [reduce] v1 = Conv (r1, k6)
        v2 = Relu (v1)
        [restore] v3 = Conv (v2, k7)
        [bottleneck] r2 = Add (v3, r1)
        y = Relu (r2)
    }}"""
    shapes = {
        "k1": (16, 8, 1, 1),
        "k2": (16, 1, 3, 3),
        "k3": (4, 16, 1, 1),
        "k4": (16, 4, 1, 1),
        "k5": (8, 16, 1, 1),
        "k6": (4, 8, 1, 1),
        "k7": (8, 4, 1, 1),
    }
    weights = {name: graphs.weight(*s, seed=i) * 3 for i, (name, s) in enumerate(shapes.items())}
    weights["b1"] = graphs.feed(16)
    return graphs.graph(text, weights), {"x": graphs.feed(1, 8, 6, 6)}


def custom(lines: str, inputs: str = "", outputs: str = "", **weights: np.ndarray) -> ir.Model:
    """A network of these lines; see _network."""
    return _network(lines, inputs, outputs, **weights)[0]


def random_network(seed: int) -> ir.Model:
    """Layers and residual branches within each other; some values are read again later on."""
    rng = np.random.default_rng(seed)
    lines: list[str] = []
    made = ["x"]

    def add(call: str) -> str:
        lines.append(f"[node{len(lines)}] v{len(lines)} = {call}")
        made.append(f"v{len(lines) - 1}")
        return made[-1]

    def chain(value: str, depth: int) -> str:
        for _ in range(rng.integers(1, 4)):
            kind = rng.integers(6)
            if kind == 0:
                value = add(f"Relu ({value})")
            elif kind == 1 and len(made) > 1:
                value = add(f"{rng.choice(['Add', 'Sub'])} ({value}, {rng.choice(made)})")
            elif kind < 4 and depth:
                sides = [value, chain(value, depth - 1)]
                rng.shuffle(sides)
                value = add(f"Add ({', '.join(sides)})")
            else:
                value = add(f"MatMul ({value}, w{rng.choice(list('abcdefgh'))})")
        return value

    value = "x"
    for _ in range(4):
        value = chain(value, 3)
    return _network(f"{' '.join(lines)} y = Relu ({value})")[0]


NETWORKS = {
    "pre-norm": pre_norm,
    "post-norm": post_norm,
    "nested": nested,
    "inverted": inverted,
}


def silenced(model: ir.Model, block: Block) -> ir.Model:
    """A clone in which the branch is computed and then multiplied by zero."""
    clone = model.clone()
    [add] = [node for node in clone.graph if node.outputs[0].name == block.result]
    [index] = [i for i, value in enumerate(add.inputs) if value.name in block.values]
    zero = add_initializer(clone.graph, "zero", np.zeros((), np.float32))
    add.replace_input_with(index, insert(add, "Mul", [add.inputs[index], zero]).outputs[0])
    clone.graph.sort()
    return clone
