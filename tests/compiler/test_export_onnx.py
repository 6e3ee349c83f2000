"""Files as third parties write them: old versions, odd shapes, types that are no tensors."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgec.emit import check_model, lay_out
from edgec.errors import ExportError, SourceError
from edgec.export import export
from edgec.export_onnx import load_onnx
from edgec.passes import Context
from edgec.passes.cleanup import Cleanup
from edgec.passes.execution import open_session, optimized_graph, run_feeds
from edgec.passes.fuse import Fuse
from edgec.shapes import input_specs
from edgec.source import load_source
from edgec.targets import load_target

_TEXT = """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
old ({inputs}) => (float[n, 2] y)
<float[3, 2] w = {{1, 2, 3, 4, 5, 6}}>
{{ y = MatMul(x, w) }}
"""
_X = np.float32([[1, 0, 2]])
_Y = np.float32([[11, 14]])  # x @ [[1, 2], [3, 4], [5, 6]]


def _written(path, *, ir_version=8, opset=13, inputs="float[n, 3] x"):
    model = onnx.parser.parse_model(_TEXT.format(ir_version=ir_version, opset=opset, inputs=inputs))
    path.write_bytes(model.SerializeToString())
    return path


def test_initializers_need_not_be_inputs_after_loading_an_old_file(tmp_path):
    # below IR version 4 the checker wants every initializer among the inputs
    path = _written(
        tmp_path / "m.onnx", ir_version=3, opset=9, inputs="float[n, 3] x, float[3, 2] w"
    )
    model = load_onnx(path)
    assert [value.name for value in model.graph.inputs] == ["x"]
    check_model(model)
    np.testing.assert_array_equal(run_feeds(open_session(model), {"x": _X})[0], _Y)


@pytest.mark.parametrize("any_size", [{"dim_value": -1}, {"dim_param": "?"}])
def test_a_dimension_of_minus_one_or_a_question_mark_is_open(tmp_path, any_size):
    path = _written(tmp_path / "m.onnx")
    proto = onnx.load(path)
    for value in (*proto.graph.input, *proto.graph.output):
        (key, size), dim = *any_size.items(), value.type.tensor_type.shape.dim[0]
        setattr(dim, key, size)
    onnx.save(proto, path)
    model = load_onnx(path)
    assert input_specs(model)[0].dims == (None, 3)
    # without a name: two dimensions of '?' need not be equal
    assert model.graph.outputs[0].shape[0].value is None
    np.testing.assert_array_equal(run_feeds(open_session(model), {"x": _X})[0], _Y)


def test_an_output_of_maps_is_refused_by_name(tmp_path):
    proto = onnx.load(_written(tmp_path / "m.onnx"))
    entry = proto.graph.output.add(name="probabilities").type.sequence_type.elem_type.map_type
    entry.key_type = onnx.TensorProto.INT64
    entry.value_type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(SourceError, match="output 'probabilities' holds a map; .* options="):
        load_onnx(tmp_path / "m.onnx")


def test_an_input_that_is_a_sequence_is_refused_by_name(tmp_path):
    tensor = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ConcatFromSequence", ["parts"], ["y"], axis=0)],
        "g",
        [onnx.helper.make_value_info("parts", onnx.helper.make_sequence_type_proto(tensor))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])],
    )
    opset = [onnx.helper.make_opsetid("", 13)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset), tmp_path / "m.onnx")
    source = load_source(str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match="input 'parts' is a Sequence.*; expected a tensor"):
        export(source, load_target("x86-64"))


def test_a_file_that_is_no_protobuf_still_says_so(tmp_path):
    (tmp_path / "m.onnx").write_text("hello " * 50)
    with pytest.raises(SourceError, match="not an ONNX file"):
        load_onnx(tmp_path / "m.onnx")


def test_the_model_is_otherwise_as_it_was(tmp_path):
    path = _written(tmp_path / "m.onnx")
    ours, theirs = load_onnx(path), ir.load(path)
    assert ir.to_proto(ours).SerializeToString() == ir.to_proto(theirs).SerializeToString()


def test_weights_in_a_second_file_are_the_models_own_after_loading(tmp_path):
    # torch.onnx.export writes them so by default; passes save the model to other folders
    path = _written(tmp_path / "m.onnx")
    ir.save(ir.load(path), tmp_path / "two.onnx", external_data="two.onnx.data")
    model = load_onnx(tmp_path / "two.onnx")
    for made in (model, optimized_graph(model)):
        np.testing.assert_array_equal(run_feeds(open_session(made), {"x": _X})[0], _Y)
    assert b"two.onnx.data" not in lay_out(model).graph


def test_a_declared_output_shape_that_lies_is_not_made_true(tmp_path):
    # [1, s] for an output of rank 3: fusing once reshaped it to what was declared
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13]>
        g (float[n, 6] x) => (float[1, s] y)
        <int64[1] zero = {0}, int64[1] two = {2}, int64[1] three = {3}> {
            d = Shape(x)
            n1 = Gather(d, zero)
            wanted = Concat<axis = 0>(n1, two, three)
            y = Reshape(x, wanted)
        }"""
    )
    onnx.save(proto, tmp_path / "m.onnx")
    model = load_onnx(tmp_path / "m.onnx")
    context = Context(target=load_target("x86-64"), reference=model)
    fused = Fuse().run(Cleanup().run(model, context).model, context).model
    result = run_feeds(open_session(fused), {"x": np.zeros((5, 6), np.float32)})[0]
    assert result.shape == (5, 2, 3)
