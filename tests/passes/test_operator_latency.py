"""Single operators: what is run for them, and that the kernel alone is timed."""

import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import operator_latency
from edgec.passes.execution import compiled_graph, open_session, run_feeds
from edgec.passes.operator_latency import Operand, Operator, latencies_ms
from edgec.targets import load_target

TARGET = load_target("x86-64")
FLOAT = np.dtype(np.float32)


def operator(op_type, *shapes, constant=(1, 2), integers=None, **attributes):
    operands = tuple(
        Operand(FLOAT, shape, constant=index in constant) for index, shape in enumerate(shapes)
    )
    made = {name: ir.convenience.convert_attribute(name, v) for name, v in attributes.items()}
    return Operator("", op_type, 21, made, operands, 1, integers)


def conv(width=32, *, integers=None, groups=1):
    kernel = (width, 32 // groups, 3, 3)
    return operator(
        "Conv", (1, 32, 14, 14), kernel, (width,), integers=integers, pads=[1] * 4, group=groups
    )


def executed(one):
    model, feeds = operator_latency._single(one)
    compiled = compiled_graph(model, settings=TARGET.session)
    return operator_latency._without_layouts(compiled, feeds)


def test_each_operator_gets_its_time():
    small, large = operator("Gemm", (1, 8), (8, 8)), operator("Gemm", (64, 512), (512, 512))
    first, second = latencies_ms([small, large], TARGET.session)
    assert 0 <= first < second


def test_what_does_not_run_alone_has_no_time():
    wrong = operator("Gemm", (1, 8), (9, 8))
    assert latencies_ms([wrong, conv()], TARGET.session)[0] is None


@pytest.mark.parametrize("integers", [None, TARGET.int8])
def test_layouts_around_a_convolution_are_taken_off(integers):
    model, feeds = executed(conv(integers=integers))
    assert [node.op_type for node in model.graph] == ["Conv" if integers is None else "QLinearConv"]
    [output] = run_feeds(open_session(model, optimized=False), feeds)
    assert output.size == 32 * 14 * 14 and output.any()


def test_a_transpose_stays_the_operator_that_it_is():
    own = operator("Transpose", (4, 8, 16), perm=[0, 2, 1])
    assert latencies_ms([own], TARGET.session)[0] is not None


@pytest.mark.parametrize(
    ("one", "kernel"),
    [
        (conv(integers=TARGET.int8), "QLinearConv"),
        (conv(integers=TARGET.int8, groups=32), "QLinearConv"),
        (operator("Gemm", (1, 8), (8, 16), (16,), integers=TARGET.int8), "QGemm"),
        (operator("Gemm", (1, 8), (16, 8), (16,), integers=TARGET.int8, transB=1), "QGemm"),
        (operator("MatMul", (2, 5, 8), (8, 16), integers=TARGET.int8), "QLinearMatMul"),
        (operator("Add", (2, 8), (2, 8), constant=(), integers=TARGET.int8), "QLinearAdd"),
    ],
)
def test_quantized_operators_run_in_integers(one, kernel):
    assert [node.op_type for node in executed(one)[0].graph] == [kernel]


def test_keys_tell_apart_what_may_take_another_time():
    sizes = np.array([2, 8])

    def shaped(values):
        first = Operand(FLOAT, (16,), constant=False)
        second = Operand(np.dtype(np.int64), (len(values),), constant=True, values=values)
        return Operator("", "Expand", 21, {}, (first, second), 1)

    distinct = [
        conv(),
        conv(40),
        conv(groups=32),
        conv(integers=TARGET.int8),
        operator("Gemm", (1, 8), (8, 8)),
        operator("Gemm", (1, 8), (8, 8), constant=()),
        shaped(sizes),
        shaped(sizes * 2),
        shaped(np.arange(100)),
        shaped(np.arange(100) + 1),
    ]
    assert len({one.key() for one in distinct}) == len(distinct)
    assert conv().key() == conv().key()


def test_an_attribute_that_is_a_tensor_makes_no_key():
    assert conv().is_plain()
    odd = Operator("", "Constant", 21, {"value": ir.AttrTensor("value", ir.tensor([1]))}, (), 1)
    assert not odd.is_plain()
