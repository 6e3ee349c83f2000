"""Random small networks as ONNX graphs, for the property tests of structured pruning.

A network is a list of (block, seed); every block reads one or two of the maps made so far, all
float [2, channels, 4, 4], and makes another one. Weights have a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import graphs
import numpy as np
import onnx_ir as ir

SIDE = 4
Array = np.ndarray


class Network:
    """Collects lines of ONNX text and weights."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.weights: dict[str, Array] = {}
        self.maps: list[tuple[str, int]] = [("x", 4)]
        self.rng = np.random.default_rng(0)

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        scale = max(np.prod(shape[1:]), 1) ** 0.5 if len(shape) > 1 else 2
        self.weights[name] = (self.rng.standard_normal(shape) / scale).astype(np.float32)
        return name

    def numbers(self, *values: int) -> str:
        name = f"n{len(self.weights)}"
        self.weights[name] = np.array(values, np.int64)
        return name

    def add(self, call: str, outputs: int = 1) -> list[str]:
        names = [f"v{len(self.lines)}_{i}" for i in range(outputs)]
        self.lines.append(f"[node{len(self.lines)}] {', '.join(names)} = {call}")
        return names

    def any_map(self) -> tuple[str, int]:
        return self.maps[self.rng.integers(len(self.maps))]

    def conv(self, x: str, inputs: int, outputs: int, *, group: int = 1, kernel: int = 1) -> str:
        weight = self.weight(outputs, inputs // group, kernel, kernel)
        pads = [kernel // 2] * 4
        bias = self.weight(outputs)
        return self.add(f"Conv <group = {group}, pads = {pads}> ({x}, {weight}, {bias})")[0]


def conv(net: Network) -> None:
    x, c = net.any_map()
    outputs = int(net.rng.choice([4, 6, 8]))
    y = net.conv(x, c, outputs, kernel=int(net.rng.choice([1, 3])))
    net.maps.append((y, outputs))


def grouped(net: Network) -> None:
    x, c = net.any_map()
    group = int(net.rng.choice([g for g in (1, 2, 3, 4, c) if c % g == 0]))
    outputs = group * int(net.rng.choice([1, 2, 3]))
    net.maps.append((net.conv(x, c, outputs, group=group, kernel=3), outputs))


def transposed(net: Network) -> None:
    x, c = net.any_map()
    group = int(net.rng.choice([g for g in (1, 2) if c % g == 0]))
    weight = net.weight(c, 6 // group, 1, 1)
    net.maps.append((net.add(f"ConvTranspose <group = {group}> ({x}, {weight})")[0], 6))


def norm(net: Network) -> None:
    x, c = net.any_map()
    scale, bias, mean, var = (net.weight(c) for _ in range(4))
    net.weights[var] = np.abs(net.weights[var]) + 1
    if net.rng.integers(2):
        y = net.add(f"BatchNormalization ({x}, {scale}, {bias}, {mean}, {var})")[0]
    else:
        y = net.add(f"InstanceNormalization ({x}, {scale}, {bias})")[0]
    net.maps.append((y, c))


def group_norm(net: Network) -> None:
    x, c = net.any_map()
    groups = int(net.rng.choice([g for g in (1, 2, 3, 4) if c % g == 0]))
    scale, bias = net.weight(c), net.weight(c)
    y = net.add(f"GroupNormalization <num_groups = {groups}> ({x}, {scale}, {bias})")[0]
    net.maps.append((y, c))


def layer_norm(net: Network) -> None:
    x, c = net.any_map()
    t = net.add(f"Transpose <perm = [0, 2, 3, 1]> ({x})")[0]
    n = net.add(f"LayerNormalization ({t}, {net.weight(c)}, {net.weight(c)})")[0]
    net.maps.append((net.add(f"Transpose <perm = [0, 3, 1, 2]> ({n})")[0], c))


def activation(net: Network) -> None:
    x, c = net.any_map()
    kind = str(net.rng.choice(["Relu", "Sigmoid", "HardSwish", "Tanh", "PRelu"]))
    slope = f", {net.weight(c, 1, 1)}" if kind == "PRelu" else ""
    net.maps.append((net.add(f"{kind} ({x}{slope})")[0], c))


def pool(net: Network) -> None:
    x, c = net.any_map()
    kind = str(net.rng.choice(["MaxPool", "AveragePool"]))
    y = net.add(f"{kind} <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({x})")[0]
    net.maps.append((y, c))


def residual(net: Network) -> None:
    x, c = net.any_map()
    other, d = net.any_map()
    branch = other if c == d else net.conv(other, d, c)
    kind = str(net.rng.choice(["Add", "Mul", "Max"]))
    net.maps.append((net.add(f"{kind} ({x}, {branch})")[0], c))


def squeeze_excite(net: Network) -> None:
    x, c = net.any_map()
    if net.rng.integers(2):
        pooled = net.add(f"GlobalAveragePool ({x})")[0]
    else:
        pooled = net.add(f"ReduceMean ({x}, {net.numbers(2, 3)})")[0]
    hidden = net.add(f"Relu ({net.conv(pooled, c, 4)})")[0]
    gate = net.add(f"Sigmoid ({net.conv(hidden, 4, c)})")[0]
    net.maps.append((net.add(f"Mul ({x}, {gate})")[0], c))


def concat(net: Network) -> None:
    (x, c), (y, d) = net.any_map(), net.any_map()
    net.maps.append((net.add(f"Concat <axis = 1> ({x}, {y})")[0], c + d))


def halves(net: Network) -> None:
    """A gate: one half of the channels times the other; Split with or without sizes."""
    x, c = net.any_map()
    wide = net.conv(x, c, 8)
    sizes = f", {net.numbers(4, 4)}" if net.rng.integers(2) else ""
    count = "" if sizes else ", num_outputs = 2"
    a, b = net.add(f"Split <axis = 1{count}> ({wide}{sizes})", 2)
    net.maps.append((net.add(f"Mul ({a}, {net.add(f'Sigmoid ({b})')[0]})")[0], 4))


def cut(net: Network) -> None:
    """A slice of the channels, counted from the front or from the back."""
    x, c = net.any_map()
    start, end = ((1, c), (0, 2), (-2, c), (1, -1))[net.rng.integers(4)]
    operands = ", ".join(net.numbers(n) for n in (start, end, 1))
    y = net.add(f"Slice ({x}, {operands})")[0]
    net.maps.append((y, len(range(c)[start:end])))


def shuffle(net: Network) -> None:
    x, c = net.any_map()
    groups = int(net.rng.choice([g for g in (2, 3, 4) if c % g == 0] or [1]))
    shape = net.numbers(0, groups, c // groups, SIDE, SIDE)
    parted = net.add(f"Reshape ({x}, {shape})")[0]
    moved = net.add(f"Transpose <perm = [0, 2, 1, 3, 4]> ({parted})")[0]
    y = net.add(f"Reshape ({moved}, {net.numbers(0, -1, SIDE, SIDE)})")[0]
    net.maps.append((y, c))


def _tokens(net: Network, x: str, c: int) -> str:
    """[2, channels, 4, 4] -> [2, 16, channels]."""
    flat = net.add(f"Reshape ({x}, {net.numbers(0, c, SIDE * SIDE)})")[0]
    return net.add(f"Transpose <perm = [0, 2, 1]> ({flat})")[0]


def _image(net: Network, tokens: str, c: int) -> None:
    back = net.add(f"Transpose <perm = [0, 2, 1]> ({tokens})")[0]
    shape = net.numbers(0, int(net.rng.choice([c, -1])), SIDE, SIDE)
    net.maps.append((net.add(f"Reshape ({back}, {shape})")[0], c))


def attention(net: Network) -> None:
    """Three heads of four; keys and values of their own, or one each for all heads."""
    x, c = net.any_map()
    tokens, width = _tokens(net, x, c), 12
    shape = net.numbers(0, 0, 3, 4)
    parts = []
    for order in ("0, 2, 1, 3", "0, 2, 3, 1", "0, 2, 1, 3"):
        y = net.add(f"MatMul ({tokens}, {net.weight(c, width)})")[0]
        y = net.add(f"Add ({y}, {net.weight(width)})")[0]
        y = net.add(f"Reshape ({y}, {shape})")[0]
        parts.append(net.add(f"Transpose <perm = [{order}]> ({y})")[0])
    scores = net.add(f"Softmax ({net.add(f'MatMul ({parts[0]}, {parts[1]})')[0]})")[0]
    mixed = net.add(f"MatMul ({scores}, {parts[2]})")[0]
    moved = net.add(f"Transpose <perm = [0, 2, 1, 3]> ({mixed})")[0]
    joined = net.add(f"Reshape ({moved}, {net.numbers(0, 0, width)})")[0]
    _image(net, net.add(f"MatMul ({joined}, {net.weight(width, c)})")[0], c)


def feed_forward(net: Network) -> None:
    x, c = net.any_map()
    up = net.add(f"MatMul ({_tokens(net, x, c)}, {net.weight(c, 10)})")[0]
    act = net.add(f"Gelu ({up})")[0]
    _image(net, net.add(f"MatMul ({act}, {net.weight(10, 6)})")[0], 6)


def recurrent(net: Network) -> None:
    """LSTM or GRU over the positions, in one or both directions."""
    x, c = net.any_map()
    steps = net.add(f"Transpose <perm = [1, 0, 2]> ({_tokens(net, x, c)})")[0]
    kind, gates = (("LSTM", 4), ("GRU", 3))[net.rng.integers(2)]
    both, hidden = int(net.rng.integers(1, 3)), 4
    direction = "bidirectional" if both == 2 else "forward"
    w, r = net.weight(both, gates * hidden, c), net.weight(both, gates * hidden, hidden)
    b = net.weight(both, 2 * gates * hidden)
    made = f'{kind} <hidden_size = {hidden}, direction = "{direction}"> ({steps}, {w}, {r}, {b})'
    y = net.add(f"Transpose <perm = [2, 0, 1, 3]> ({net.add(made)[0]})")[0]
    _image(net, net.add(f"Reshape ({y}, {net.numbers(0, 0, -1)})")[0], both * hidden)


BLOCKS: Sequence[Callable[[Network], None]] = (
    conv,
    grouped,
    transposed,
    norm,
    group_norm,
    layer_norm,
    activation,
    pool,
    residual,
    squeeze_excite,
    concat,
    halves,
    cut,
    shuffle,
    attention,
    feed_forward,
    recurrent,
)


def network(blocks: Sequence[tuple[Callable[[Network], None], int]]) -> ir.Model:
    """The blocks one after the other, all maps joined, and a classifier on top."""
    net = Network()
    for seed, block in enumerate([(conv, 1), *blocks]):
        net.rng = np.random.default_rng([seed, block[1]])
        block[0](net)
    maps = net.maps[1:]
    joined = net.add(f"Concat <axis = 1> ({', '.join(name for name, _ in maps)})")[0]
    width = sum(c for _, c in maps)
    if net.rng.integers(2):
        joined, size = net.add(f"GlobalAveragePool ({joined})")[0], width
    else:
        size = width * SIDE * SIDE
    flat = net.add(f"Flatten ({joined})")[0]
    net.lines.append(f"y = Gemm <transB = 1> ({flat}, {net.weight(3, size)})")
    body = "\n".join(net.lines)
    text = f"net (float[2, 4, {SIDE}, {SIDE}] x) => (float[2, 3] y) {{\n{body}\n}}"
    return graphs.graph(text, net.weights)
