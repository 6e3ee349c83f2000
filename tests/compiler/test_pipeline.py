"""Running the passes of a recipe: what its steps report."""

from __future__ import annotations

from dataclasses import replace

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import Lower, PassError, QuantizeWeights
from edgec.passes.reconstruct import Reconstruct
from edgec.pipeline import layer_noise, run_passes
from edgec.recipe import load_recipe
from edgec.report_format import _told_apart


def test_a_pass_that_was_asked_for_and_did_nothing_says_so():
    model, feeds = graphs.mlp()
    around = graphs.context(model, calibration=[feeds])
    (step,) = run_passes((Reconstruct(),), around, [feeds])  # no integer weights yet
    assert step.result.changed == 0
    (finding,) = step.result.findings
    assert "changed nothing" in finding and "edgec passes reconstruct" in finding


def test_passes_of_every_recipe_may_do_nothing_silently():
    model, feeds = graphs.mlp()
    steps = run_passes(load_recipe("cleanup,fuse,lower"), graphs.context(model), [feeds])
    assert [step.result.findings for step in steps] == [(), (), ()]


def outlier(size: float):
    """A product that leaves out its largest input, on which int8 spends its levels.

    ONNX Runtime computes this Gemm in float32 as long as it is not lowered.
    """
    weight = graphs.weight(64, 128)
    weight[:, 0] = 0.0
    text = "g (float[n, 128] x) => (float[n, 64] y) { y = Gemm<transB = 1>(x, w) }"
    model = graphs.graph(text, {"w": weight})
    feeds = {"x": graphs.feed(4, 128)}
    feeds["x"][:, 0] = size
    return run_passes((QuantizeWeights(), Lower()), graphs.context(model), [feeds])


def test_products_with_int8_activations_may_cost_more_than_other_kernels_and_say_so():
    assert len(outlier(8.0)[1].result.findings) == 1  # that they round
    finding = outlier(60.0)[1].result.findings[1]
    decibels = float(finding.split(" dB")[0].rsplit(" ", 1)[1])
    assert 10 <= decibels < 20, finding
    with pytest.raises(PassError, match="changed the outputs"):
        outlier(1000.0)


def test_a_target_that_rounds_nothing_is_compared_with_what_rounds_nothing():
    weight = graphs.weight(128, 64)
    weight[0] = 0.0
    model = graphs.graph(
        "g (float[n, 128] x) => (float[n, 64] y) { y = MatMul(x, w) }", {"w": weight}
    )
    feeds = {"x": graphs.feed(4, 128)}
    feeds["x"][:, 0] = 1000.0  # ONNX Runtime's own product spends its levels on what is left out
    _, lowered = run_passes((QuantizeWeights(), Lower()), graphs.context(model, "web"), [feeds])
    assert lowered.result.changed == 1 and lowered.sqnr_db > 35  # 8-bit weights lose no more


def test_scores_that_a_mask_hides_are_no_noise():
    model = graphs.graph(
        "g (float[n, 64] x) => (float[n, 64] y) { s = MatMul (x, w) m = Add (s, mask) "
        "y = Softmax <axis = -1> (m) }",
        {
            "w": graphs.weight(64, 64),
            "mask": np.where(np.arange(64) < 40, 0, -np.inf).astype(np.float32),
        },
    )
    for node in model.graph:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    feeds = [{"x": graphs.feed(4, 64)}]
    [step] = run_passes((QuantizeWeights(min_weights=1),), graphs.context(model), feeds)
    touched = replace(step, result=replace(step.result, touched=("s", "m")))
    plain, masked = layer_noise(model, [touched], feeds)
    assert (plain.name, masked.name) == ("s", "m")
    assert abs(plain.sqnr_db - masked.sqnr_db) < 1.5  # the same, of 40 of the 64


def test_recipes_that_were_tried_are_named_by_what_tells_them_apart():
    assert _told_apart(("cleanup", "fuse", "quantize-static", "lower")) == "quantize-static"
    assert _told_apart(("cleanup", "fuse", "lower")) == "float32"
    assert _told_apart(("quantize-static", "recover", "lower")) == "quantize-static, recover"
