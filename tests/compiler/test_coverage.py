from __future__ import annotations

import graphs
import numpy as np

from edgec.coverage import coverage_of, measure_coverage
from edgec.passes import PASSES, Context
from edgec.targets import load_target


def quantized_cnn() -> graphs.ir.Model:
    model = graphs.graph(
        """cnn (float[1, 16, 12, 12] x) => (float[1, 32] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            r = Relu (a)
            b = Conv (r, w2)
            g = GlobalAveragePool (b)
            f = Flatten (g)
            [fc] y = Gemm (f, w3)
        }""",
        {
            "w1": graphs.weight(16, 16, 3, 3),
            "w2": graphs.weight(32, 16, 1, 1, seed=1),
            "w3": graphs.weight(32, 32, seed=2),
        },
    )
    (static,) = (cls() for cls in PASSES if cls.name == "quantize-static")
    samples = [{"x": graphs.feed(1, 16, 12, 12, seed=i)} for i in range(3)]
    context: Context = graphs.context(model, calibration=samples)
    return static.run(model, context).model


def test_integer_kernels_are_counted_among_the_nodes_that_ran() -> None:
    found = measure_coverage(
        quantized_cnn(), {"x": graphs.feed(1, 16, 12, 12)}, load_target("x86-64").session, 1
    )
    by_op = {kernel.op: kernel for kernel in found.kernels}
    assert by_op["QLinearConv"].nodes == 2 and by_op["QLinearConv"].integer
    # a Reshape of integers is an integer node though its operator has no special name
    assert found.integer_nodes >= 4 and found.conversion_nodes >= 1
    assert 0.0 < found.integer_time_share <= 1.0
    assert np.isclose(sum(kernel.time_share for kernel in found.kernels), 1.0, atol=0.01)


def test_a_float_model_has_no_integer_kernels() -> None:
    model, feeds = graphs.mlp()
    found = measure_coverage(model, feeds, load_target("x86-64").session, 1)
    assert found.nodes and not found.integer_nodes and not found.integer_time_share


def event(op: str, duration: int, kind: str = "float") -> dict[str, object]:
    """What ONNX Runtime's profiler writes of one execution of a node."""
    arguments = {"op_name": op, "output_type_shape": [{kind: [1]}]}
    return {"cat": "Node", "name": f"{op}_kernel_time", "dur": duration, "args": arguments}


def test_one_interrupted_run_does_not_decide_the_shares() -> None:
    runs = [[event("QLinearConv", 30, "uint8"), event("QuantizeLinear", 10)] for _ in range(12)]
    runs[7][1]["dur"] = 20_000
    found = coverage_of(event for run in runs for event in run)
    assert found.integer_time_share == 0.75 and found.conversion_time_share == 0.25


def test_shares_of_time_leave_the_first_runs_out() -> None:
    slow_start = [event("QLinearConv", 900, "uint8"), event("Softmax", 900)] * 2
    steady = [
        event("QLinearConv", 60, "uint8"),
        event("Softmax", 10),
        event("QuantizeLinear", 20, "uint8"),
        event("Transpose", 10, "uint8"),
    ] * 3
    found = coverage_of([*slow_start, *steady])
    by_op = {kernel.op: kernel for kernel in found.kernels}
    assert not by_op["QuantizeLinear"].integer and by_op["Transpose"].integer
    # one of three runs of the nodes that began late counts, three of five of the others
    assert found.integer_time_share == round((180 + 10) / (180 + 30 + 20 + 10), 4)
    assert found.conversion_time_share == round(20 / 240, 4)


def test_a_loop_counts_by_what_it_runs() -> None:
    inner = [event("MatMulIntegerToFloat", 10) for _ in range(6)]
    found = coverage_of(one for _ in range(12) for one in (*inner, event("Scan", 65)))
    assert [kernel.op for kernel in found.kernels] == ["MatMulIntegerToFloat"]
    assert found.integer_time_share == 1.0
