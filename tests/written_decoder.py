"""A decoder of one layer, written as text: what can be wrong with it is one replacement away."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

# one layer, 4 query heads of 8 for 2 key heads, no rotation
DECODER = """g (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,2,P,8] past_key,
    float[B,2,P,8] past_value)
    => (float[B,S,97] logits, float[B,2,T,8] present_key, float[B,2,T,8] present_value)
<int64[4] four = {0, 0, 4, 8}, int64[4] two = {0, 0, 2, 8}, int64[3] merge = {0, 0, 32},
 float root = {0.6}, int64[1] axis = {2}, int64[5] times = {1, 1, 2, 1, 1},
 int64[4] flat = {0, 4, -1, 8}, int64 zero = {0}, int64 one = {1}, int64 length = {2},
 int64[1] first = {0}, int64[1] second = {1}, int64[2] middle = {1, 2}, float none = {0.0},
 float low = {-3.4e38},
 float[B,S,32] q, float[B,S,16] k, float[B,S,16] v, float[B,S,32] y> {
    e = Gather(table, input_ids)
    q = MatMul(e, wq)
    k = MatMul(e, wk)
    v = MatMul(e, wv)
    past4 = Shape(past_key)
    past = Gather(past4, length)
    new1 = Shape<start = 1, end = 2>(input_ids)
    new = Squeeze(new1, first)
    all = Add(past, new)
    keys_at = Range(zero, all, one)
    queries_at = Range(past, all, one)
    column = Unsqueeze(queries_at, second)
    causal = LessOrEqual(keys_at, column)
    attended = Cast<to = 9>(attention_mask)
    attended4 = Unsqueeze(attended, middle)
    seen = And(causal, attended4)
    bias = Where(seen, none, low)
    q4 = Reshape(q, four)
    qh = Transpose<perm = [0, 2, 1, 3]>(q4)
    k4 = Reshape(k, two)
    kh = Transpose<perm = [0, 2, 1, 3]>(k4)
    v4 = Reshape(v, two)
    vh = Transpose<perm = [0, 2, 1, 3]>(v4)
    present_key = Concat<axis = 2>(past_key, kh)
    present_value = Concat<axis = 2>(past_value, vh)
    k5 = Unsqueeze(present_key, axis)
    k5r = Expand(k5, times)
    kr = Reshape(k5r, flat)
    kt = Transpose<perm = [0, 1, 3, 2]>(kr)
    v5 = Unsqueeze(present_value, axis)
    v5r = Expand(v5, times)
    vr = Reshape(v5r, flat)
    scores = MatMul(qh, kt)
    scaled = Mul(scores, root)
    masked = Add(scaled, bias)
    p = Softmax<axis = -1>(masked)
    o = MatMul(p, vr)
    t = Transpose<perm = [0, 2, 1, 3]>(o)
    y = Reshape(t, merge)
    logits = MatMul(y, head)
}"""


def decoder(*changes: tuple[str, str]) -> ir.Model:
    """The model with random weights. changes: pieces of ``DECODER``, and what stands there."""
    text = DECODER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    random = np.random.default_rng(0)
    shapes = {"table": (97, 32), "wq": (32, 32), "wk": (32, 16), "wv": (32, 16), "head": (32, 97)}
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in shapes:
                array = random.standard_normal(shapes[value.name]).astype(np.float32) / 4
                value.const_value = ir.tensor(array, name=value.name)
                value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
                if value.name not in model.graph.initializers:
                    model.graph.register_initializer(value)
                node.replace_input_with(index, model.graph.initializers[value.name])
    for value in (*model.graph.inputs, *model.graph.outputs):  # names with dots cannot be written
        stem, _, kind = str(value.name).partition("_")
        if stem in ("past", "present") and kind:
            prefix = "past_key_values" if stem == "past" else "present"
            value.name = f"{prefix}.0.{kind}"
    return model
