"""Gradients of every operator of the twin against finite differences, in float64."""

import onnx_ir as ir
import pytest
import torch

from edgec.passes.torch_graph import claimed_operators, to_torch
from edgec.passes.torch_ops import FAMILIES
from edgec.passes.torch_quantize import QUANTIZE

X = {"x": (1, 2, 4, 4)}
XP = {"x": (1, 2, 4, 4), "p": (1, 2, 4, 4)}
VECTOR = {"x": (1, 2, 4, 4), "k": (4,)}
CHANNELS = {"x": (1, 4, 3, 3), "s": (4,), "b": (4,)}
HEADS = {"q": (1, 4, 3, 2), "k": (1, 2, 3, 2), "v": (1, 2, 3, 2)}

# operator -> inputs and nodes that lead to y
GRAPHS = {
    **{
        name: (X, f"y = {name} (x)")
        for name in "Abs Asinh Atan Ceil Celu Cos Cosh Dropout Elu Erf Exp Floor HardSigmoid "
        "HardSwish Identity LeakyRelu LogSoftmax Mish Neg Relu Round Selu Shrink Sigmoid Sign Sin "
        "Sinh Softmax Softplus Softsign Swish Tan Tanh ThresholdedRelu GlobalAveragePool "
        "GlobalMaxPool Flatten Transpose Trilu LpNormalization MeanVarianceNormalization".split()
    },
    **{
        name: (XP, f"y = {name} (x, p)")
        for name in "Add Div Max Mean Min Mul Sub Sum CastLike".split()
    },
    **{
        f"Reduce{name}": (X, f"a = Constant <value_ints = [1, 3]> () y = Reduce{name} (x, a)")
        for name in "L1 L2 LogSumExp Max Mean Min Prod Sum SumSquare".split()
    },
    **{
        name: (
            X,
            f"t = Tanh (x) h = Constant <value = double {{0.9}}> () u = Mul (t, h) y = {name} (u)",
        )
        for name in ("Acos", "Asin", "Atanh")
    },
    **{name: (X, f"p = Exp (x) y = {name} (p)") for name in ("Log", "Sqrt", "Reciprocal")},
    "Acosh": (X, "p = Exp (x) o = Constant <value = double {1.5}> () q = Add (p, o) y = Acosh (q)"),
    "Cast": (X, "y = Cast <to = 11> (x)"),
    "Clip": (X, "l = Constant <value = double {-0.5}> () y = Clip (x, l)"),
    "Concat": (XP, "y = Concat <axis = -1> (x, p)"),
    "Conv": (
        {**X, "w": (3, 2, 3, 3), "b": (3,)},
        "y = Conv <pads = [1, 1, 1, 0], strides = [1, 2]> (x, w, b)",
    ),
    "ConvTranspose": (
        {**X, "w": (2, 3, 3, 3), "b": (3,)},
        "y = ConvTranspose <pads = [1, 0, 0, 1], strides = [2, 2]> (x, w, b)",
    ),
    "CumSum": (X, "a = Constant <value_int = 2> () y = CumSum <reverse = 1, exclusive = 1> (x, a)"),
    "DepthToSpace": ({"x": (1, 4, 2, 2)}, "y = DepthToSpace <blocksize = 2> (x)"),
    "SpaceToDepth": (X, "y = SpaceToDepth <blocksize = 2> (x)"),
    "Einsum": (XP, 'y = Einsum <equation = "nchw,nchv->cwv"> (x, p)'),
    "Expand": ({"x": (1, 2, 1)}, "s = Constant <value_ints = [3, 1, 2]> () y = Expand (x, s)"),
    "Gather": (X, "i = Constant <value_ints = [3, -1, 0]> () y = Gather <axis = 2> (x, i)"),
    "GatherElements": (
        {"x": (2, 3)},
        "i = Constant <value = int64[2, 2] {0, 2, 1, 1}> () y = GatherElements <axis = 1> (x, i)",
    ),
    "GatherND": (
        {"x": (2, 3, 2)},
        "i = Constant <value = int64[2, 1] {2, 0}> () y = GatherND <batch_dims = 1> (x, i)",
    ),
    "Gelu": (X, 'y = Gelu <approximate = "tanh"> (x)'),
    "Gemm": (
        {"x": (3, 4), "w": (4, 2), "b": (3, 2)},
        "y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)",
    ),
    "GroupNormalization": (CHANNELS, "y = GroupNormalization <num_groups = 2> (x, s, b)"),
    "InstanceNormalization": (CHANNELS, "y = InstanceNormalization (x, s, b)"),
    "BatchNormalization": (
        CHANNELS,
        "m = Constant <value = double[4] {0.1, -1.0, 0.0, 2.0}> () "
        "v = Constant <value = double[4] {0.5, 1.0, 2.0, 0.1}> () "
        "y = BatchNormalization (x, s, b, m, v)",
    ),
    "LayerNormalization": ({**VECTOR, "b": (4,)}, "y = LayerNormalization (x, k, b)"),
    "RMSNormalization": (VECTOR, "y = RMSNormalization (x, k)"),
    "MatMul": ({**X, "w": (2, 4, 3)}, "y = MatMul (x, w)"),
    "Mod": (XP, "e = Exp (p) y = Mod <fmod = 1> (x, e)"),
    "OneHot": (
        {"v": (2,)},
        "i = Constant <value_ints = [1, 0, 2]> () d = Constant <value_int = 3> () "
        "y = OneHot (i, d, v)",
    ),
    "PRelu": (VECTOR, "y = PRelu (x, k)"),
    "Pad": (
        X,
        'p = Constant <value_ints = [0, 0, 1, 2, 0, 0, 0, 3]> () y = Pad <mode = "reflect"> (x, p)',
    ),
    "Pow": (XP, "e = Exp (x) y = Pow (e, p)"),
    "ReduceLogSum": (X, "e = Exp (x) y = ReduceLogSum <keepdims = 0> (e)"),
    "Reshape": (X, "s = Constant <value_ints = [0, -1]> () y = Reshape (x, s)"),
    "Resize": (
        X,
        "n = Constant <value_ints = [1, 2, 7, 3]> () "
        'y = Resize <mode = "cubic", antialias = 1> (x, , , n)',
    ),
    "ScatterElements": (
        {"x": (2, 3), "u": (2, 2)},
        "i = Constant <value = int64[2, 2] {0, 2, 1, 1}> () "
        'y = ScatterElements <axis = 1, reduction = "add"> (x, i, u)',
    ),
    "ScatterND": (
        {"x": (3, 2), "u": (2, 2)},
        'i = Constant <value = int64[2, 1] {2, 2}> () y = ScatterND <reduction = "mul"> (x, i, u)',
    ),
    "Slice": (
        X,
        "s = Constant <value_ints = [3]> () e = Constant <value_ints = [-5]> () "
        "a = Constant <value_ints = [2]> () t = Constant <value_ints = [-2]> () "
        "y = Slice (x, s, e, a, t)",
    ),
    "Split": (X, "y, z = Split <axis = 3, num_outputs = 2> (x)"),
    "Squeeze": (X, "a = Constant <value_ints = [0]> () y = Squeeze (x, a)"),
    "Tile": (X, "r = Constant <value_ints = [1, 2, 1, 3]> () y = Tile (x, r)"),
    "TopK": (X, "n = Constant <value_ints = [2]> () y, i = TopK (x, n)"),
    "Unsqueeze": (X, "a = Constant <value_ints = [0, -1]> () y = Unsqueeze (x, a)"),
    "Where": (XP, "c = Greater (x, p) y = Where (c, x, p)"),
    "AveragePool": (
        X,
        "y = AveragePool <kernel_shape = [2, 2], pads = [0, 1, 1, 0], dilations = [1, 2]> (x)",
    ),
    "MaxPool": (X, "y = MaxPool <kernel_shape = [3, 2], pads = [1, 0, 0, 1], ceil_mode = 1> (x)"),
    "LSTM": (
        {"x": (3, 2, 4), "w": (2, 8, 4), "r": (2, 8, 2), "b": (2, 16), "p": (2, 6)},
        'y = LSTM <hidden_size = 2, direction = "bidirectional"> (x, w, r, b, , , , p)',
    ),
    "GRU": (
        {"x": (3, 2, 4), "w": (1, 6, 4), "r": (1, 6, 2), "b": (1, 12), "h": (1, 2, 2)},
        "y = GRU <hidden_size = 2, linear_before_reset = 1> (x, w, r, b, , h)",
    ),
    "RNN": (
        {"x": (3, 2, 4), "w": (1, 2, 4), "r": (1, 2, 2), "b": (1, 4)},
        'y = RNN <hidden_size = 2, direction = "reverse"> (x, w, r, b)',
    ),
    "Attention": (HEADS, "y = Attention <is_causal = 1, softcap = 2.0> (q, k, v)"),
    "RotaryEmbedding": (
        {"x": (1, 2, 3, 4), "c": (1, 3, 2), "s": (1, 3, 2)},
        "y = RotaryEmbedding <interleaved = 1> (x, c, s)",
    ),
}
# what gives booleans, indices or shapes has no gradient
WITHOUT = frozenset(
    "And ArgMax ArgMin BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Constant ConstantOfShape Equal "
    "EyeLike Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Range Shape Size "
    "Xor".split()
)


# forms of one operator that take another way through the code
FORMS = {
    "LSTM of torch": (
        {"x": (3, 2, 4), "w": (1, 8, 4), "r": (1, 8, 2), "b": (1, 16)},
        'y = LSTM <hidden_size = 2, direction = "reverse"> (x, w, r, b)',
    ),
    "GRU, reset before the product": (
        {"x": (3, 2, 4), "w": (2, 6, 4), "r": (2, 6, 2)},
        'y = GRU <hidden_size = 2, direction = "bidirectional"> (x, w, r)',
    ),
    "RNN with lengths": (
        {"x": (3, 2, 4), "w": (1, 2, 4), "r": (1, 2, 2)},
        "n = Constant <value = int32[2] {3, 1}> () "
        'y = RNN <hidden_size = 2, activations = ["Relu"]> (x, w, r, , n)',
    ),
}


def model(inputs: dict[str, tuple[int, ...]], nodes: str) -> ir.Model:
    given = ", ".join(f"double[{','.join(map(str, s))}] {n}" for n, s in inputs.items())
    return ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 24]> g ({given}) => (double y) {{ {nodes} }}'
    )


@pytest.mark.parametrize("form", [*sorted(GRAPHS), *FORMS])
def test_gradient_agrees_with_finite_differences(form):
    inputs, nodes = {**GRAPHS, **FORMS}[form]
    twin = to_torch(model(inputs, nodes))
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True)
        for s in inputs.values()
    ]
    assert torch.autograd.gradcheck(
        lambda *t: twin(dict(zip(inputs, t, strict=True)))["y"], tensors, raise_exception=True
    )


def test_every_operator_with_a_gradient_is_checked():
    # rounding has the gradient of what it stands for: test_torch_quantize.py
    checked = set(GRAPHS) | WITHOUT | set(QUANTIZE)
    assert checked == set(claimed_operators())
    assert not WITHOUT & set(GRAPHS)
    assert all(f"= {operator} " in nodes for operator, (_, nodes) in GRAPHS.items())


def test_families_do_not_overlap():
    names = [name for family in FAMILIES.values() for name in family]
    assert len(names) == len(set(names)) == len(claimed_operators())


def test_blind_query_gives_zeros_and_a_finite_gradient():
    twin = to_torch(model({**HEADS, "m": (3, 3)}, "y = Attention (q, k, v, m)"))
    generator = torch.Generator().manual_seed(1)
    feeds = {
        n: torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True)
        for n, s in HEADS.items()
    }
    hidden = torch.zeros(3, 3, dtype=torch.float64)
    hidden[1] = -torch.inf
    y = twin({**feeds, "m": hidden})["y"]
    assert (y[:, :, 1] == 0).all() and (y[:, :, 0] != 0).any()
    y.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in feeds.values())
