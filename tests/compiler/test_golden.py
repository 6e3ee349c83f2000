"""The limit of a bundle's self-test: how far a correct device may be off."""

from __future__ import annotations

import graphs
import onnx_ir as ir

from edgec.golden import make_golden
from edgec.passes.quantize_dynamic import QuantizeDynamic
from edgec.targets import load_target


def limit_of(model: ir.Model, feeds: object) -> float:
    return make_golden(model, load_target("x86-64"), feeds, 20_000, 0).manifest.min_sqnr_db


def test_a_float_graph_has_to_come_out_as_here_but_for_float_noise():
    assert limit_of(*graphs.mlp()) == 60.0


def test_another_cpu_may_round_activations_to_the_next_integer():
    model, feeds = graphs.mlp()
    quantized = QuantizeDynamic(min_weights=0).run(model, graphs.context(model))
    assert quantized.changed
    assert limit_of(quantized.model, feeds) <= 15.0
