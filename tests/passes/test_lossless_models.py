"""Cleanup, fuse and the attention lowering on real models and real inputs.

Both models run as written, without ONNX Runtime's optimizer. They may differ by 1e-4 of the
output's largest number: folded weights are rounded once more and sums run in another order.
A wrong rewrite is off by 1e-2 and more.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from fixtures import models, photographs, text_lines
from fixtures.locate import python_package, required

from edgec.passes.cleanup import Cleanup
from edgec.passes.contract import Context, Feeds
from edgec.passes.equivalence import largest_error, padded_variants
from edgec.passes.execution import graph_bytes, open_session
from edgec.passes.fuse import Fuse
from edgec.passes.lower_attention import lower_attention
from edgec.targets import load_target

TOLERANCE = 1e-4
rapidocr = required(lambda name: python_package("rapidocr_onnxruntime", "models", name))


@dataclass(frozen=True)
class Case:
    """nodes: the most that may be left after both passes, branches included."""

    path: Callable[[], pathlib.Path]
    samples: Callable[[], list[Feeds]]
    nodes: int


def lines(count: int = 2) -> np.ndarray:
    return text_lines.require_lines(count, 11).images


def photograph() -> list[Feeds]:
    """A photograph with two lines of text in it."""
    image = next(iter(photographs.require_labelled())).image.resize((320, 256))
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    first, second = lines()
    pixels[0, :, 40:88], pixels[0, :, 140:188] = first, second
    return [{"x": pixels}]


def speech(samples: int, **state: tuple[int, ...]) -> list[Feeds]:
    """A voiced tone with noise; both sampling rates where the model asks for one."""
    time = np.arange(samples) / 16000
    wave = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 12))
    noise = np.random.default_rng(0).standard_normal(samples)
    feeds = {"input": (0.2 * wave + 0.01 * noise).astype(np.float32)[None]}
    return [feeds | {name: np.zeros(shape, np.float32) for name, shape in state.items()}]


def silero(name: str) -> Callable[[], pathlib.Path]:
    return lambda: next(p for p in models.require_silero_paths() if p.name == name)


def with_rates(feeds: list[Feeds], *rates: int) -> list[Feeds]:
    # at 8 kHz a chunk has half the samples
    return [
        {**f, "input": f["input"][:, : f["input"].shape[1] * r // 16000], "sr": np.array(r)}
        for f in feeds
        for r in rates
    ]


def source_bytes() -> list[Feeds]:
    text = np.frombuffer(pathlib.Path(__file__).read_bytes()[:2048].ljust(2048), np.uint8)
    return [{"bytes": text.astype(np.int32)[None]}]


STATE = (2, 1, 128)
CASES = {
    "recogniser": Case(models.require_ocr_recogniser_path, lambda: [{"x": lines()}], 220),
    "detector": Case(lambda: rapidocr("ch_PP-OCRv4_det_infer.onnx"), photograph, 197),
    "classifier": Case(
        lambda: rapidocr("ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        lambda: [{"x": lines()[..., :192]}],
        127,
    ),
    "silero": Case(
        silero("silero_vad.onnx"),
        lambda: with_rates(speech(576, state=STATE), 16000, 8000),
        154,
    ),
    "silero op15": Case(
        silero("silero_vad_16k_op15.onnx"),
        lambda: with_rates(speech(576, state=STATE), 16000),
        79,
    ),
    "silero op18": Case(
        silero("silero_vad_op18_ifless.onnx"),
        lambda: with_rates(speech(576, state=STATE), 16000, 8000),
        90,
    ),
    "silero half": Case(silero("silero_vad_half.onnx"), lambda: speech(576, state=STATE), 76),
    "silero openvino": Case(
        silero("silero_vad_openvino_16k.onnx"), lambda: speech(576, state=STATE), 39
    ),
    "silero sequence": Case(
        silero("silero_vad_16k_sequence.onnx"),
        lambda: [
            {"input": np.repeat(f["input"], 3, 0), "h": f["h"], "c": f["c"]}
            for f in speech(576, h=(1, 1, 128), c=(1, 1, 128))
        ],
        27,
    ),
    "magika": Case(models.require_magika_path, source_bytes, 93),
}


class Batches(list):
    """Samples for tests: a list of feeds."""


def both(model: ir.Model, context: Context) -> ir.Model:
    """Cleanup and fuse, each checked to find nothing to do the second time."""
    for step in (Cleanup(), Fuse()):
        model = step.run(model, context).model
        again = step.run(model.clone(), context)
        assert again.changed == 0
        assert graph_bytes(again.model) == graph_bytes(model)
    return model


def node_count(model: ir.Model) -> int:
    return sum(len(graph) for graph in model.graphs())


@pytest.mark.parametrize(
    "calibrated",
    [pytest.param(True, id="calibrated"), pytest.param(False, id="random", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_third_party_models_compute_the_same_with_fewer_nodes(case: Case, calibrated: bool):
    reference, samples = ir.load(case.path()), case.samples()
    names = [value.name for value in reference.graph.inputs]
    samples = [dict(zip(names, f.values(), strict=True)) if len(names) == 1 else f for f in samples]
    data = Batches(samples) if calibrated else None
    model = both(reference.clone(), Context(load_target("x86-64"), reference, calibration=data))
    assert model.opset_imports[""] == 21
    assert node_count(model) <= case.nodes
    assert [v.name for v in model.graph.inputs] == names
    assert [v.name for v in model.graph.outputs] == [v.name for v in reference.graph.outputs]
    assert model.metadata_props == reference.metadata_props  # the recogniser's alphabet
    assert largest_error(reference, model, samples) < TOLERANCE


def test_the_recogniser_reads_the_same_texts():
    path = models.require_ocr_recogniser_path()
    reference, drawn = ir.load(path), text_lines.require_lines(8, 12)
    model = both(reference.clone(), Context(load_target("x86-64"), reference))
    alphabet = text_lines.characters(path)
    [probabilities] = open_session(model).run(None, {"x": drawn.images})
    [expected] = open_session(reference).run(None, {"x": drawn.images})
    assert text_lines.decode(probabilities, alphabet) == text_lines.decode(expected, alphabet)


@pytest.mark.slow
def test_efficientnet_keeps_its_outputs_and_pools_as_a_quantizer_likes():
    import torch

    module = models.require_efficientnet_lite0()
    image = photographs.tensor(next(iter(photographs.require_labelled())).image)
    program = torch.onnx.export(module, (torch.from_numpy(image),), dynamo=True, opset_version=21)
    reference = ir.from_proto(program.model_proto)
    model = both(reference.clone(), Context(load_target("x86-64"), reference))
    op_types = [node.op_type for node in model.graph]
    assert "GlobalAveragePool" in op_types and "BatchNormalization" not in op_types
    assert len(op_types) <= 94
    feeds = {str(reference.graph.inputs[0].name): image}
    assert largest_error(reference, model, [feeds]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_of_minilm_is_lowered_and_padding_stays_masked(attention: str):
    import torch

    tokenizer, module = models.require_minilm(attention)
    texts = ["a cat sat on the mat", "quantized networks run on small devices, all day long"]
    encoded = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("seq", max=512)
    program = torch.onnx.export(
        module,
        kwargs={name: encoded[name] for name in names},
        dynamo=True,
        opset_version=21,
        dynamic_shapes={name: {0: batch, 1: length} for name in names},
    )
    reference = ir.from_proto(program.model_proto)
    feeds = {name: encoded[name].numpy() for name in names}
    context = Context(load_target("x86-64"), reference, calibration=Batches([feeds]))
    model = both(reference.clone(), context)
    result = lower_attention(model, context)
    assert result.changed == 6 and not result.skipped
    assert len(result.model.graph) <= 128
    samples = [feeds, *padded_variants(reference, feeds)]
    assert largest_error(reference, result.model, samples) < TOLERANCE
