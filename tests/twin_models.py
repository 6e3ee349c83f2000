"""The fixtures' models as graphs, as training passes see them, each with inputs.

Weights are real where a fixture package has them. The decoders, T5, Whisper and the recurrent
layers have random weights and few layers: what they are for is their operators.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import torch

from edgec.export import export
from edgec.passes import Cleanup, Fuse
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.torch_graph import to_torch
from edgec.source import Source, load_source
from edgec.targets import load_target

Feeds = dict[str, np.ndarray]
Made = tuple[ir.Model, list[Feeds]]
_TOKENS = 12


def make(name: str) -> Made:
    """The reference graph after cleanup and fuse, and feeds. Raises FixtureMissing."""
    model, feeds = MODELS[name]()
    return _cleaned(model), feeds


def _cleaned(model: ir.Model) -> ir.Model:
    context = graphs.context(model)
    return Fuse().run(Cleanup().run(model, context).model, context).model


def _exported(module: torch.nn.Module, feeds: Feeds, **rest: Any) -> Made:
    example = {name: torch.from_numpy(array) for name, array in feeds.items()}
    source = Source(module.eval(), tuple(example.values()), tuple(example), **rest)
    return export(source, load_target("x86-64")).model, [feeds]


def _file(path: pathlib.Path) -> ir.Model:
    return export(load_source(path), load_target("x86-64")).model


def _efficientnet() -> Made:
    from fixtures import models, photographs

    image = photographs.tensor(next(iter(photographs.unlabelled())))
    return _exported(models.efficientnet_lite0(), {"image": image})


def _small_cnn() -> Made:
    from fixtures import models

    torch.manual_seed(0)
    return _exported(models.small_cnn(), {"image": graphs.feed(4, 1, 28, 28)})


def _minilm(attention: str) -> Made:
    from fixtures import models

    tokenizer, module = models.minilm(attention)
    names = ("input_ids", "attention_mask", "token_type_ids")
    given = tokenizer(
        ["A man is eating food.", "The girl carries a baby, and sings."],
        padding=True,
        return_tensors="np",
    )

    class LastHidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = module

        def forward(self, *tensors: torch.Tensor) -> Any:
            return self.encoder(**dict(zip(names, tensors, strict=True))).last_hidden_state

    return _exported(LastHidden(), {name: given[name].astype(np.int64) for name in names})


def _recogniser() -> Made:
    from fixtures import models, text_lines

    image = text_lines.render(1, seed=1).images[0][None]
    return _file(models.ocr_recogniser_path()), [{"x": image}]


def _ocr_file(name: str, lines: int) -> Made:
    """lines: how many lines of text lie below each other on the page that it sees."""
    from fixtures import text_lines
    from fixtures.locate import python_package

    model = _file(python_package("rapidocr_onnxruntime", "models", name))
    page = np.concatenate(list(text_lines.render(lines, seed=1).images), axis=1)[None]
    return model, [{str(model.graph.inputs[0].name): page[..., :192]}]


def _silero(name: str, chunks: int, **states: tuple[int, ...]) -> Made:
    """One of the variants without control flow, with states of random numbers."""
    from fixtures import models

    [path] = [p for p in models.silero_paths() if p.name == name]
    feeds = {"input": graphs.feed(chunks, 576) / 4}
    feeds |= {state: graphs.feed(*shape) for state, shape in states.items()}
    return _file(path), [feeds]


def _magika() -> Made:
    from fixtures import models

    model = _file(models.magika_path())
    size = int(model.graph.inputs[0].shape[1])  # bytes of a file, and 256 for none
    values = np.random.default_rng(0).integers(0, 257, (2, size)).astype(np.int32)
    return model, [{str(model.graph.inputs[0].name): values}]


def _recurrent(kind: str) -> Made:
    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = getattr(torch.nn, kind)(24, 32, 2, bidirectional=True)
            self.head = torch.nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.layers(x)[0])

    torch.manual_seed(0)
    return _exported(Layers(), {"x": graphs.feed(20, 2, 24)})


def _huggingface(kind: str, part: str, **settings: Any) -> Made:
    """part: the graph of several that is meant; its feeds are drawn."""
    model = _optimum(kind, **settings)[part]
    return model, [_drawn(model, settings.get("vocab_size", 100))]


@functools.cache
def _optimum_files(kind: str, settings: tuple[tuple[str, Any], ...]) -> dict[str, ir.Model]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from optimum.exporters.onnx import onnx_export_from_model

    torch.manual_seed(0)
    configuration = getattr(transformers, f"{kind}Config")(**dict(settings))
    heads = {"GPT2": "LMHeadModel", "Llama": "ForCausalLM", "T5": "ForConditionalGeneration"}
    module = getattr(transformers, kind + heads.get(kind, "ForConditionalGeneration"))(
        configuration
    )
    for parameter in module.parameters():
        if parameter.ndim == 1:  # zero biases would be folded away
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    task = "text2text-generation-with-past"
    if kind in ("GPT2", "Llama"):
        task = "text-generation-with-past"
    if kind == "Whisper":
        task = "automatic-speech-recognition-with-past"
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        onnx_export_from_model(
            module.eval(), folder, opset=18, task=task, do_validation=False, no_post_process=True
        )
        found = {}
        for file in sorted(pathlib.Path(folder).rglob("*.onnx")):
            model = ir.load(file)
            for value in model.graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = ir.tensor(value.const_value.numpy().copy())
            found[file.stem] = model
    return found


def _optimum(kind: str, **settings: Any) -> Mapping[str, ir.Model]:
    return _optimum_files(kind, tuple(sorted(settings.items())))


def _drawn(model: ir.Model, vocabulary: int) -> Feeds:
    """Inputs of the sizes that dimensions of one name share."""
    rng, sizes = np.random.default_rng(0), {"batch_size": 2}
    feeds = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes.get(str(d), _TOKENS) for d in value.shape]
        name = str(value.name)
        if "mask" in name:  # keys of the past and of this pass
            past = any("past" in str(v.name) for v in model.graph.inputs)
            decoder = past and "encoder" not in name
            shape = [shape[0], 2 * _TOKENS if decoder else _TOKENS]
            feeds[name] = np.ones(shape, np.int64)
        elif "position" in name:
            feeds[name] = np.broadcast_to(np.arange(shape[-1]) + _TOKENS, shape).astype(np.int64)
        elif value.dtype == ir.DataType.INT64:
            feeds[name] = rng.integers(1, vocabulary, shape)
        else:
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


_GPT = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4}
_LLAMA = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_T5 = {
    "vocab_size": 100,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
_WHISPER = {
    "vocab_size": 100,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

MODELS: Mapping[str, Callable[[], Made]] = {
    "efficientnet-lite0": _efficientnet,
    "small-cnn": _small_cnn,
    "minilm eager": lambda: _minilm("eager"),
    "minilm sdpa": lambda: _minilm("sdpa"),
    "ocr recogniser": _recogniser,
    "ocr detector": lambda: _ocr_file("ch_PP-OCRv4_det_infer.onnx", 2),
    "ocr classifier": lambda: _ocr_file("ch_ppocr_mobile_v2.0_cls_infer.onnx", 1),
    "silero": lambda: _silero("silero_vad_openvino_16k.onnx", 1, state=(2, 1, 128)),
    "silero sequence": lambda: _silero(
        "silero_vad_16k_sequence.onnx", 7, h=(1, 1, 128), c=(1, 1, 128)
    ),
    "magika": _magika,
    "lstm": lambda: _recurrent("LSTM"),
    "gru": lambda: _recurrent("GRU"),
    "gpt2": lambda: _huggingface("GPT2", "model", **_GPT),
    "llama": lambda: _huggingface("Llama", "model", **_LLAMA),
    "t5 encoder": lambda: _huggingface("T5", "encoder_model", **_T5),
    "t5 decoder": lambda: _huggingface("T5", "decoder_model", **_T5),
    "t5 decoder with past": lambda: _huggingface("T5", "decoder_with_past_model", **_T5),
    "whisper encoder": lambda: _huggingface("Whisper", "encoder_model", **_WHISPER),
    "whisper decoder": lambda: _huggingface("Whisper", "decoder_model", **_WHISPER),
    "whisper decoder with past": lambda: _huggingface(
        "Whisper", "decoder_with_past_model", **_WHISPER
    ),
}


def errors(model: ir.Model, feeds: Feeds) -> dict[str, tuple[float, float]]:
    """Output -> largest error of the twin against ONNX Runtime, and the largest output."""
    with torch.no_grad():
        twin = to_torch(model)({name: torch.from_numpy(np.array(a)) for name, a in feeds.items()})
    names = [str(value.name) for value in model.graph.outputs]
    found = {}
    for name, expected in zip(names, run_feeds(open_session(model), feeds), strict=True):
        actual = twin[name].numpy()
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
        difference = np.abs(actual.astype(float) - expected.astype(float))
        found[name] = (float(difference.max()), float(np.abs(expected.astype(float)).max()))
    return found
