"""The rows that are sampled give the layer's output, whatever its attributes."""

import graphs
import numpy as np
import pytest

from edgec.passes.layer_inputs import LayerInputs, from_rows, weight_of, weight_rows


def sampled(model, values: np.ndarray, samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Products of the kept rows with the weight, and the layer's output: both [channels, n]."""
    node = next(n for n in model.graph if n.op_type in ("Conv", "Gemm", "MatMul"))
    inputs = LayerInputs(node, samples)
    rng = np.random.default_rng(0)
    for number in range(samples):
        inputs.add(values, number, rng)
    weight = weight_rows(node, weight_of(node))
    products = np.matmul(weight, inputs.rows.transpose(0, 2, 1))
    output = graphs.run(model, x=values)[0]
    axis = 1 if node.op_type == "Conv" else -1
    flat = np.moveaxis(output, axis, 0).reshape(output.shape[axis], -1)
    return products.reshape(flat.shape[0], -1), flat


CASES = {
    "padded 1-D": ("Conv <pads = [2, 1]> (x, w)", (2, 6, 20), (4, 6, 3)),
    "strides and dilations": (
        "Conv <strides = [2, 1], dilations = [1, 2], pads = [0, 2, 1, 2]> (x, w)",
        (1, 6, 9, 8),
        (4, 6, 3, 3),
    ),
    "groups": ("Conv <group = 3> (x, w)", (3, 6, 7, 7), (6, 2, 3, 3)),
    "depthwise": ("Conv <group = 6, pads = [1, 1, 1, 1]> (x, w)", (1, 6, 7, 7), (6, 1, 3, 3)),
    "3-D": ("Conv <group = 2> (x, w)", (1, 4, 4, 5, 5), (4, 2, 3, 3, 3)),
    "same upper": (
        'Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)',
        (1, 3, 8, 7),
        (4, 3, 3, 3),
    ),
    "same lower": (
        'Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (x, w)',
        (1, 3, 8, 7),
        (4, 3, 3, 3),
    ),
    "valid": ('Conv <auto_pad = "VALID"> (x, w)', (1, 3, 8, 7), (4, 3, 3, 3)),
    "product of a sequence": ("MatMul (x, w)", (2, 7, 12), (12, 5)),
    "transposed product": ("Gemm <transA = 1, transB = 1> (x, w)", (12, 7), (5, 12)),
}


@pytest.mark.parametrize("name", CASES)
def test_all_rows_together_give_the_output(name: str) -> None:
    layer, shape, weight = CASES[name]
    dims = ", ".join(map(str, shape))
    rank = {"Conv": len(shape), "MatM": len(shape), "Gemm": 2}[layer[:4]]
    out = ", ".join(f"d{i}" for i in range(rank))
    text = f"g (float[{dims}] x) => (float[{out}] y) {{ y = {layer} }}"
    model = graphs.graph(text, {"w": graphs.weight(*weight)})
    # few positions: every one is kept, in their order
    products, output = sampled(model, graphs.feed(*shape))
    np.testing.assert_allclose(products, output, rtol=1e-4, atol=1e-5)  # float32 sums


def test_a_large_batch_gives_no_more_rows_than_its_share() -> None:
    text = "g (float[40, 2, 9, 9] x) => (float[40, 4, h, w] y) { y = Conv (x, w) }"
    model = graphs.graph(text, {"w": graphs.weight(4, 2, 3, 3)})
    products, _ = sampled(model, graphs.feed(40, 2, 9, 9), 64)
    assert products.shape[1] == 1024  # 16 of each sample


def test_rows_are_bounded_however_many_samples_there_are() -> None:
    text = "g (float[1, 8, 40, 40] x) => (float[1, 4, h, w] y) { y = Conv (x, w) }"
    model = graphs.graph(text, {"w": graphs.weight(4, 8, 3, 3)})
    counts = [sampled(model, graphs.feed(1, 8, 40, 40), n)[0].shape[1] for n in (1, 16, 64, 2000)]
    assert len(set(counts)) == 1
    assert 500 < counts[0] <= 1024


def test_sampled_rows_are_outputs_of_the_layer() -> None:
    text = "g (float[1, 8, 40, 40] x) => (float[1, 4, h, w] y) { y = Conv (x, w) }"
    model = graphs.graph(text, {"w": graphs.weight(4, 8, 3, 3)})
    products, output = sampled(model, graphs.feed(1, 8, 40, 40), 16)
    distance = np.abs(products[:, :50, None] - output[:, None, :]).max(axis=0).min(axis=1)
    assert distance.max() < 1e-4  # each is found among the layer's outputs


@pytest.mark.parametrize(
    ("layer", "shape"), [("Gemm <transB = 1> (x, w)", (5, 12)), ("MatMul (x, w)", (12, 5))]
)
def test_rows_of_a_weight_go_back_to_its_shape(layer: str, shape: tuple[int, int]) -> None:
    text = f"g (float[3, 12] x) => (float[3, 5] y) {{ y = {layer} }}"
    model = graphs.graph(text, {"w": graphs.weight(*shape)})
    node = model.graph[0]
    rows = weight_rows(node, weight_of(node))
    assert rows.shape == (1, 5, 12)
    np.testing.assert_array_equal(from_rows(node, rows, shape), weight_of(node))
