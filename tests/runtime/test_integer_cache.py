"""Caches of int8: integers in the loop of generate(), float32 for callers with arrays."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from language_samples import HEAD_SIZE, HEADS, decoder_graph, section, write_decoder, write_onnx
from onnx import helper, numpy_helper

import edgec_runtime
from edgec_runtime.errors import BundleError, InputError
from edgec_runtime.integer_cache import METADATA, scales_text

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SCALE = 0.1


def integer_graph(metadata: str | None = None) -> onnx.ModelProto:
    """The small decoder with int8 caches, the same scale for all channels but the first."""
    model = decoder_graph()
    scale = np.full((1, HEADS, 1, HEAD_SIZE), SCALE, np.float32)
    scale[:, :, :, 0] = SCALE / 2
    [node] = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    node.input.extend([""] * 3 + ["scale"] * 2)
    for name in ("k_quant_type", "v_quant_type"):
        node.attribute.append(helper.make_attribute(name, "PER_CHANNEL"))
    node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    model.graph.initializer.append(numpy_helper.from_array(scale, "scale"))
    caches = ("past.key", "past.value", "key", "value")
    for value in (*model.graph.input, *model.graph.output):
        if value.name in caches:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    text = scales_text(dict.fromkeys(caches, scale)) if metadata is None else metadata
    if text:
        helper.set_model_props(model, {METADATA: text})
    return model


def write(path: pathlib.Path, metadata: str | None = None, **changes: Any) -> pathlib.Path:
    return write_onnx(path, integer_graph(metadata), section(eos=(), **changes))


def greedy(model: edgec_runtime.Model, prompt: list[int], count: int) -> list[int]:
    """Step by step through calls with float32 arrays."""
    past = np.zeros((1, HEADS, 0, HEAD_SIZE), np.float32)
    keys = values = past
    tokens, given = [], prompt
    for step in range(count):
        mask = np.ones((1, len(prompt) + step), np.int64)
        feeds = {"past.key": keys, "past.value": values}
        outputs = model(ids=np.array([given]), mask=mask, **feeds)
        keys, values = outputs["key"], outputs["value"]
        assert keys.dtype == values.dtype == np.float32
        given = [int(outputs["logits"][0, -1].argmax())]
        tokens += given
    return tokens


@pytest.mark.parametrize("cache", ["growing", "shared"])
def test_integers_in_the_loop_answer_like_floats_at_the_door(
    tmp_path: pathlib.Path, cache: str
) -> None:
    model = edgec_runtime.load(write(tmp_path / "b.edgec", cache=cache))
    answer = model.generate(PROMPT, max_new_tokens=20)
    assert list(answer.tokens) == greedy(model, PROMPT, 20) and len(set(answer.tokens)) > 5
    batch = model.generate([PROMPT, PROMPT[:3]], max_new_tokens=9)
    assert batch[0].tokens == answer.tokens[:9]


def test_rounding_is_that_of_the_scales(tmp_path: pathlib.Path) -> None:
    exact = edgec_runtime.load(write_decoder(tmp_path / "a.edgec", section(eos=())))
    model = edgec_runtime.load(write(tmp_path / "b.edgec"))
    empty = np.zeros((1, HEADS, 0, HEAD_SIZE), np.float32)
    feeds = {"ids": np.array([PROMPT]), "mask": np.ones((1, len(PROMPT)), np.int64)}
    outputs, expected = (
        m(**feeds, **{"past.key": empty, "past.value": empty}) for m in (model, exact)
    )
    scale = np.full(HEAD_SIZE, SCALE, np.float32)
    scale[0] /= 2
    for name in ("key", "value"):
        rounded = np.clip(np.rint(expected[name] / scale), -128, 127) * scale
        off = np.abs(outputs[name] - rounded)
        assert (off < 1e-5).mean() > 0.99 and (off <= 1.01 * scale).all()  # ties may fall elsewhere


def test_what_the_bundle_says_of_itself(tmp_path: pathlib.Path) -> None:
    path, plain = write(tmp_path / "b.edgec"), write_decoder(tmp_path / "a.edgec")
    model = edgec_runtime.load(path)
    assert {v.dtype for v in model.manifest.graphs["main"].inputs} == {"int64", "int8"}
    assert {v.dtype for v in model.inputs} == {"int64", "float32"}
    needed, floats = (edgec_runtime.memory_needed(p, tokens=50) for p in (path, plain))
    assert 4 * needed.cache == floats.cache
    empty = np.zeros((1, HEADS, 0, HEAD_SIZE), np.int8)
    feeds = {"ids": np.array([PROMPT]), "mask": np.ones((1, len(PROMPT)), np.int64)}
    with pytest.raises(InputError, match=r"'past.key' is int8, expected float32"):
        model(**feeds, **{"past.key": empty, "past.value": empty})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("", r"'past.key' is int8, and the graph's metadata 'edgec.cache_scales' has no scales"),
        ("{}", r"has no scales \[2, 16\] for it"),
        ('{"past.key": [[2, 8], "AAAA"]}', "metadata 'edgec.cache_scales' is damaged"),
        ("[1]", "metadata 'edgec.cache_scales' is damaged"),
        (
            scales_text({"past.key": np.ones((1, HEADS, 1, 8), np.float32)}),
            r"'past.key' is int8, .* has no scales \[2, 16\]",
        ),
    ],
)
def test_scales_that_are_missing_or_damaged_are_named(
    tmp_path: pathlib.Path, metadata: str, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        edgec_runtime.load(write(tmp_path / "b.edgec", metadata))


@pytest.mark.parametrize("given", [None, "0"])
def test_one_thread_attends_to_integers_without_tiles(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    name, seen = "ORT_GQA_DISABLE_FLASH_ATTENTION", []
    if given is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, given)
    open_one = onnxruntime.InferenceSession

    def opened(*arguments: Any, **options: Any) -> onnxruntime.InferenceSession:
        seen.append(os.environ.get(name))
        return open_one(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    for threads in (1, 2):
        edgec_runtime.load(write(tmp_path / "integer.edgec"), threads=threads)
    edgec_runtime.load(write_decoder(tmp_path / "float.edgec"), threads=1)
    assert seen == [given or "1", given, given]  # the user's own word stands
    assert os.environ.get(name) == given
