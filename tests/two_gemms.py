"""Two layers of 16 units, for tests of what is cut of them."""

import graphs

from edgec.passes import PruneStructured

TWO_LAYERS = """g (float[4, 8] x) => (float[4, 3] y) {
    [a] c = Gemm <transB = 1> (x, w, b)
    r = Relu (c)
    [d] e = Gemm <transB = 1> (r, k)
    s = Relu (e)
    [z] y = Gemm <transB = 1> (s, v)
}"""


def two_layers():
    """Two groups of 16 units: those of 'a' have small weights, those of 'd' large ones."""
    return graphs.graph(
        TWO_LAYERS,
        {
            "w": graphs.weight(16, 8) * 0.1,
            "b": graphs.feed(16, seed=1),
            "k": graphs.weight(16, 16, seed=2),
            "v": graphs.weight(3, 16, seed=3) * 10,
        },
    )


def pruned(model=None, target="x86-64", **parameters):
    model = model or two_layers()
    chosen = PruneStructured(**{"ratio": 0.25, **parameters})
    return chosen.run(model, graphs.context(model, target))


def widths(result):
    weights = result.model.graph.initializers
    return weights["w"].shape[0], weights["k"].shape[0]


def array(model, name):
    return model.graph.initializers[name].const_value.numpy()
