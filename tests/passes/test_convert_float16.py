"""float16 storage and compute against float32."""

import dataclasses

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import ConvertFloat16, PassError, QuantizeWeights
from edgec.passes.execution import graph_bytes, sqnr_db
from edgec.targets import Float16, load_target


def computing_target():
    return dataclasses.replace(load_target("x86-64"), float16=Float16(compute=True))


def converted(model, target="x86-64", **parameters):
    return ConvertFloat16(**parameters).run(model.clone(), graphs.context(model, target))


@pytest.mark.parametrize("make", [graphs.mlp, graphs.cnn, graphs.transformer, graphs.lstm])
def test_storage_rounds_the_weights_and_nothing_else(make):
    model, feeds = make()
    result = converted(model, min_weights=100)
    for reference, actual in zip(
        graphs.run(model, **feeds), graphs.run(result.model, **feeds), strict=True
    ):
        # 11 bits: about 70 dB a layer
        assert reference.dtype == actual.dtype and 60 < sqnr_db(reference, actual) < 200
    assert "half the file" in result.findings[0]


def test_stored_weights_take_half():
    model, _ = graphs.mlp()
    result = converted(model)
    saved = len(graph_bytes(model)) - len(graph_bytes(result.model))
    assert result.changed == 2 and saved > 0.95 * 2 * (64 * 96 + 64 * 40)


def test_onnx_runtime_folds_the_casts_at_load(tmp_path):
    import onnxruntime

    model, _ = graphs.mlp()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(graph_bytes(converted(model).model), options)
    assert "Cast" not in graphs.operators(ir.load(tmp_path / "optimized.onnx"))


def test_weight_beyond_the_range_stays_float32_with_a_reason():
    model, feeds = graphs.mlp()
    array = model.graph.initializers["w1"].const_value.numpy().copy()
    array[0, 0] = 70000
    model.graph.initializers["w1"].const_value = ir.tensor(array, name="w1")
    for target in ("x86-64", computing_target()):
        result = converted(model, target)
        (skip,) = result.skipped
        assert skip.node == "w1" and "7e+04 is beyond float16's range" in skip.reason
        assert result.model.graph.initializers["w1"].dtype == ir.DataType.FLOAT


def test_compute_keeps_float32_at_the_borders():
    model, feeds = graphs.mlp()
    result = converted(model, computing_target())
    signature = [
        (v.name, v.dtype) for v in (*result.model.graph.inputs, *result.model.graph.outputs)
    ]
    assert signature == [("x", ir.DataType.FLOAT), ("y", ir.DataType.FLOAT)]
    kinds = {v.dtype for v in result.model.graph.initializers.values()}
    assert kinds == {ir.DataType.FLOAT16}
    (reference,), (actual,) = graphs.run(model, **feeds), graphs.run(result.model, **feeds)
    assert 55 < sqnr_db(reference, actual) < 100  # 11 bits in weights and activations
    again = ConvertFloat16().run(result.model, graphs.context(model, computing_target()))
    assert again.changed == 0


def test_compute_keeps_the_declared_shapes():
    text = "g (float[n, 4, 8] x) => (float[n, 4, time] y) { y = MatMul (x, w) }"
    model = graphs.graph(text, {"w": graphs.weight(8, 40)})
    result = converted(model, computing_target(), min_weights=1)
    assert [str(d) for d in result.model.graph.outputs[0].shape] == ["n", "4", "time"]


def test_scales_of_quantized_weights_stay_float32():
    model, _ = graphs.mlp()
    context = graphs.context(model)
    quantized = QuantizeWeights(block_size=16).run(model, context).model
    result = ConvertFloat16(min_weights=1).run(quantized, context)
    scales = [v for k, v in result.model.graph.initializers.items() if k.endswith("_scale")]
    assert {v.dtype for v in scales} == {ir.DataType.FLOAT}


def test_skip_names_weights_and_must_exist():
    model, _ = graphs.mlp()
    assert converted(model, skip=("w1",)).skipped[0].reason == "named in skip"
    with pytest.raises(PassError, match="skip names 'w9'"):
        converted(model, skip=("w9",))


def test_nan_is_left_with_a_reason():
    model, _ = graphs.mlp()
    array = np.full((64, 96), np.nan, np.float32)
    model.graph.initializers["w1"].const_value = ir.tensor(array, name="w1")
    assert converted(model).skipped[0].reason == "it contains NaN or infinity"


def test_wrong_parameter_is_refused():
    with pytest.raises(PassError, match="min_weights is -2"):
        ConvertFloat16(min_weights=-2)
