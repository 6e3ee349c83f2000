"""RMSNorm becomes the runtime's operator, with the residual added where that is right."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import Context
from edgec.passes.equivalence import largest_error
from edgec.passes.lower_norm import lower_norm
from edgec.targets import load_target

TARGET = load_target("x86-64")
FLOAT_NOISE = 1e-6
NORM = """
    q = Pow(s, two) m = ReduceMean<keepdims = 1>(q, last) e = Add(m, eps) r = Sqrt(e)
    i = Reciprocal(r) n = Mul(s, i) y = Mul(gamma, n)"""
CONSTANTS = """<float two = {2.0}, float eps = {0.00001}, int64[1] last = {-1},
    float[4] gamma = {0.5, 1.0, 1.5, -2.0}>"""


def model(shapes: tuple[str, str], outputs: str = "float[B,S,4] y, float[B,S,4] z") -> ir.Model:
    first, second = shapes
    return ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>'
        f"g (float[{first}] a, float[{second}] b) => ({outputs}) {CONSTANTS}"
        f"{{ s = Add(a, b) {NORM} z = Mul(s, y) }}"
    )


def context(source: ir.Model, target=TARGET) -> Context:
    return Context(target, source)


def op_types(source: ir.Model) -> list[str]:
    return [node.op_type for node in source.graph]


def feeds(*shapes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    pair = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return [dict(zip("ab", pair, strict=True))]


def test_the_norm_adds_the_residual_and_gives_the_sum():
    source = model(("B,S,4", "B,S,4"))
    result = lower_norm(source.clone(), context(source))
    assert op_types(result.model) == ["SkipSimplifiedLayerNormalization", "Mul"]
    for shape in ((1, 1, 4), (2, 7, 4)):
        assert largest_error(source, result.model, feeds(shape, shape)) < FLOAT_NOISE
    assert lower_norm(result.model, context(source)).changed == 0


@pytest.mark.parametrize(
    ("shapes", "made"),
    [
        (("B,S,4", "4"), ((2, 3, 4), (4,))),  # a bias
        (("B,S,4", "B,T,4"), ((2, 3, 4), (2, 1, 4))),  # broadcast, as far as anybody knows
        (("2,3,5,4", "2,3,5,4"), ((2, 3, 5, 4), (2, 3, 5, 4))),  # the kernel takes 2 or 3 axes
    ],
    ids=["bias", "other sizes", "four axes"],
)
def test_other_sums_stay(shapes, made):
    outputs = "float[2,3,5,4] y, float[2,3,5,4] z" if len(made[0]) == 4 else "float[B,S,4] y"
    source = model(shapes, outputs)
    result = lower_norm(source.clone(), context(source))
    assert op_types(result.model)[:2] == ["Add", "SimplifiedLayerNormalization"]
    assert largest_error(source, result.model, feeds(*made)) < FLOAT_NOISE


def test_a_sum_that_is_an_output_stays():
    source = model(("B,S,4", "B,S,4"), "float[B,S,4] y, float[B,S,4] s")
    result = lower_norm(source.clone(), context(source))
    assert "Add" in op_types(result.model)
    assert largest_error(source, result.model, feeds((1, 2, 4), (1, 2, 4))) < FLOAT_NOISE


def test_a_target_without_the_kernel_keeps_the_sum():
    kept = tuple(k for k in TARGET.kernels if k != "SkipSimplifiedLayerNormalization")
    source = model(("B,S,4", "B,S,4"))
    target = dataclasses.replace(TARGET, kernels=kept)
    result = lower_norm(source.clone(), context(source, target))
    assert op_types(result.model) == ["Add", "SimplifiedLayerNormalization", "Mul"]
