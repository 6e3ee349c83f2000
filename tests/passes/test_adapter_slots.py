"""Slots for adapters: room beside layers of any form, in which nothing is computed yet."""

import graphs
import numpy as np
import pytest

from edgec.passes import (
    AdapterSlots,
    Cleanup,
    ConvertFloat16,
    Fuse,
    Lower,
    PassError,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
)
from edgec.passes.adapter_slots import base_digest, trainable_form
from edgec.passes.lora import branches
from edgec_runtime.adapters import SLOT, slot_names

MAKERS = {"cnn": graphs.cnn, "mlp": graphs.mlp, "transformer": graphs.transformer}
QUANTIZERS = {
    "float32": (),
    "dynamic": (QuantizeDynamic(min_weights=100),),
    "static": (QuantizeStatic(),),
    "int4": (QuantizeWeights(),),
    "float16": (ConvertFloat16(),),
}


def made(name: str, quantizers: tuple = (), slots: AdapterSlots | None = None):
    """A model after a recipe, without and with slots, its context and its feeds."""
    reference, feeds = MAKERS[name]()
    context = graphs.context(reference, calibration=[feeds] * 2)
    model = reference
    for pass_ in (Cleanup(), Fuse(), *quantizers, Lower()):
        model = pass_.run(model.clone(), context).model
    result = (slots or AdapterSlots(rank=2)).run(model.clone(), context)
    return model, result, context, feeds


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MAKERS)
def test_filled_slots_add_what_merged_weights_would(name, quantizer):
    plain, result, context, feeds = made(name, QUANTIZERS[quantizer])
    assert result.changed > 0
    digest, form = base_digest(context.reference), trainable_form(context)
    random = np.random.default_rng(0)
    merged, filled = form.clone(), result.model
    for branch in branches(form, 2)[0]:
        names = slot_names(digest, branch.result)
        if names[0] not in filled.graph.initializers:
            continue
        inputs = int(np.prod(branch.down)) // branch.rank
        matrices = [
            random.standard_normal(shape).astype(np.float32) / size
            for shape, size in ((branch.down, inputs**0.5), (branch.up, 4.0))
        ]
        branch.merge(merged, *matrices)
        for slot, matrix in zip(names, matrices, strict=True):
            value = filled.graph.initializers[slot]
            assert not value.const_value.numpy().any() and value.const_value.shape == matrix.shape
            value.const_value = graphs.ir.tensor(matrix, name=slot)
    noise, error, effect = (
        float(np.sqrt(np.mean((graphs.run(a, **feeds)[0] - graphs.run(b, **feeds)[0]) ** 2)))
        for a, b in ((plain, form), (filled, merged), (merged, form))
    )
    assert effect > 0.05
    # quantization costs as much with the branches as without; static ranges, calibrated without
    # them, clip a little of what they add
    assert error < 1.5 * noise + (0.25 if quantizer == "static" else 0.05) * effect


@pytest.mark.parametrize("name", MAKERS)
def test_empty_slots_change_nothing_and_the_signature_stays(name):
    plain, result, _, feeds = made(name)
    np.testing.assert_array_equal(
        graphs.run(result.model, optimized=False, **feeds)[0],
        graphs.run(plain, optimized=False, **feeds)[0],
    )
    for side in ("inputs", "outputs"):
        names = [[v.name for v in getattr(m.graph, side)] for m in (plain, result.model)]
        assert names[0] == names[1]


def test_the_bundle_makes_slots_inputs_with_defaults():
    import onnx

    from edgec.emit import lay_out

    model = made("mlp")[1].model
    graph = onnx.load_from_string(lay_out(model).graph).graph
    slots = [n for n in model.graph.initializers if n.startswith(SLOT)]
    assert len(slots) == 4
    assert [v.name for v in graph.input] == ["x", *slots]
    assert {*slots} <= {t.name for t in graph.initializer}
    assert [v.name for v in model.graph.inputs] == ["x"]


def test_layers_that_are_gone_or_grouped_are_skipped_with_a_reason():
    _, result, _, _ = made("cnn")
    assert {s.node: s.reason for s in result.skipped} == {
        "depthwise": "a convolution of 32 groups gets no branch"
    }
    reference, _ = graphs.mlp()
    context = graphs.context(reference)
    other, _ = graphs.cnn()
    skipped = AdapterSlots().run(other, context).skipped
    assert skipped and all("has no value" in s.reason for s in skipped)


def test_only_the_named_layers_get_slots():
    _, result, _, _ = made("mlp", slots=AdapterSlots(rank=3, layers=("fc2",)))
    assert result.changed == 1
    shapes = [
        list(v.const_value.shape)
        for n, v in result.model.graph.initializers.items()
        if n.startswith(SLOT)
    ]
    assert shapes == [[64, 3], [3, 40]]


def test_the_digest_follows_nodes_and_weights():
    reference, _ = graphs.mlp()
    again, _ = graphs.mlp()
    assert base_digest(reference) == base_digest(again)
    value = again.graph.initializers["b2"]
    numbers = value.const_value.numpy().copy()
    numbers[0] += 1e-6
    value.const_value = graphs.ir.tensor(numbers, name="b2")
    assert base_digest(reference) != base_digest(again)


def test_refuses_a_rank_that_is_none_or_larger_than_a_named_layer():
    with pytest.raises(PassError, match="rank is 0"):
        AdapterSlots(rank=0)
    with pytest.raises(PassError, match="'fc2': rank 41 is larger than its weight, 64 -> 40"):
        made("mlp", slots=AdapterSlots(rank=41, layers=("fc2",)))
    _, result, _, _ = made("mlp", slots=AdapterSlots(rank=99))
    assert result.changed == 0 and "no layer can have a branch of rank 99" in result.findings[0]
