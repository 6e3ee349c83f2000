"""The models of the table, each written once as a case folder (see ``cases``).

Real weights come from the fixture packages (docs/fixtures.md). No package carries ImageNet
weights of MobileNetV2, ResNet-50 or ViT, nor those of BERT-base: these are shapes, with
weights drawn from a fixed seed, biases that are not zero, and batch norm statistics taken
from photographs. Latency and size do not depend on weights; accuracy does, so the table
says which is which.

All shapes are fixed and the batch is 1: every runtime then shows its best.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from fixtures import models, photographs, similarity, speech, text_lines

from peers.cases import Case, Feeds, write_case

_CALIBRATION = 64  # samples
_SEED = 0
_LENGTH = 128  # tokens
_STEPS, _FEATURES = 100, 80  # of the LSTM
_CHUNK, _CONTEXT = 512, 64  # audio samples at 16 kHz that silero sees at a time

Maker = Callable[[pathlib.Path, int], None]


def make_case(name: str, folder: pathlib.Path, calibration: int = _CALIBRATION) -> None:
    """Write the case folder of a model. Raises FixtureMissing without its packages."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    MODELS[name](folder, calibration)


def _mobilenet_v2(folder: pathlib.Path, calibration: int) -> None:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(num_labels=1000, tf_padding=False)
    _random_classifier(
        folder, "mobilenet_v2", MobileNetV2ForImageClassification(config), calibration
    )


def _resnet50(folder: pathlib.Path, calibration: int) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    _random_classifier(
        folder,
        "resnet50",
        ResNetForImageClassification(ResNetConfig(num_labels=1000)),
        calibration,
    )


def _vit_base(folder: pathlib.Path, calibration: int) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_labels=1000, attn_implementation="sdpa")
    _random_classifier(
        folder, "vit_base", ViTForImageClassification(config), calibration, kind="transformer"
    )


def _efficientnet_lite0(folder: pathlib.Path, calibration: int) -> None:
    _export(folder, models.efficientnet_lite0(), {"image": _zeros(1, 3, 224, 224)}, ["logits"])
    write_case(
        folder,
        Case("efficientnet_lite0", "convolutional", "real", "argmax", ("image",)),
        calibration=({"image": image} for image in _unlabelled(calibration)),
        evaluation=(
            {
                "image": photographs.tensor(item.image),
                "label": np.array(sorted(item.classes)),
            }
            for item in photographs.labelled()
        ),
    )


def _ocr(folder: pathlib.Path, calibration: int) -> None:
    import onnx

    source = models.ocr_recogniser_path()
    model = onnx.load(source)
    for value, shape in ((model.graph.input[0], (1, 3, 48, 320)),):
        _fix(value, shape)
    onnx.save(model, folder / "model.onnx")
    (folder / "characters.txt").write_text(
        "\n".join(text_lines.characters(source)), encoding="utf-8"
    )
    write_case(
        folder,
        Case("ocr", "convolutional", "real", "lines", ("x",)),
        calibration=({"x": image[None]} for image in text_lines.render(calibration, 1).images),
        evaluation=(
            {"x": image[None], "text": np.array(text)}
            for image, text in zip(*_lines(300, seed=2), strict=True)
        ),
    )


def _minilm(folder: pathlib.Path, calibration: int) -> None:
    tokenizer, model = models.minilm("sdpa")
    names = ("input_ids", "attention_mask", "token_type_ids")
    example = {name: torch.ones(1, _LENGTH, dtype=torch.int64) for name in names}
    _export(folder, _LastHidden(model), example, ["last_hidden_state"])

    def tokens(text: str) -> Feeds:
        made = tokenizer(
            text, padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="np"
        )
        return {name: made[name].astype(np.int64) for name in names}

    pairs = similarity.pairs("wordsim353")
    texts = sorted({*pairs.first, *pairs.second})
    position = {text: index for index, text in enumerate(texts)}
    np.savez(
        folder / "pairs.npz",
        first=[position[text] for text in pairs.first],
        second=[position[text] for text in pairs.second],
        judgement=pairs.judgement,
    )
    write_case(
        folder,
        Case("minilm", "transformer", "real", "spearman", names),
        calibration=(tokens(text) for text in _calibration_texts(calibration)),
        evaluation=(tokens(text) for text in texts),
    )


def _bert_base(folder: pathlib.Path, calibration: int) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(_SEED)
    config = BertConfig(attn_implementation="sdpa")
    model = _with_biases(BertModel(config, add_pooling_layer=False))
    names = ("input_ids", "attention_mask", "token_type_ids")
    example = {name: torch.ones(1, _LENGTH, dtype=torch.int64) for name in names}
    _export(folder, _LastHidden(model), example, ["last_hidden_state"])
    rng = np.random.default_rng(_SEED)

    def sample() -> Feeds:
        return {
            "input_ids": rng.integers(0, config.vocab_size, (1, _LENGTH)),
            "attention_mask": np.ones((1, _LENGTH), np.int64),
            "token_type_ids": np.zeros((1, _LENGTH), np.int64),
        }

    write_case(
        folder,
        Case("bert_base", "transformer", "random", "cosine", names),
        calibration=[sample() for _ in range(calibration)],
        evaluation=[sample() for _ in range(32)],
    )


def _lstm(folder: pathlib.Path, calibration: int) -> None:
    torch.manual_seed(_SEED)
    _export(folder, _Lstm(), {"x": _zeros(1, _STEPS, _FEATURES)}, ["logits"])
    rng = np.random.default_rng(_SEED)
    drawn = rng.standard_normal((calibration + 64, 1, _STEPS, _FEATURES), np.float32)
    write_case(
        folder,
        Case("lstm", "recurrent", "random", "argmax", ("x",)),
        calibration=[{"x": x} for x in drawn[:calibration]],
        evaluation=[{"x": x} for x in drawn[calibration:]],
    )


def _silero(folder: pathlib.Path, calibration: int) -> None:
    [source] = [p for p in models.silero_paths() if p.name == "silero_vad_openvino_16k.onnx"]
    shutil.copy(source, folder / "model.onnx")
    states = _silero_samples(folder / "model.onnx")
    clips = list(states)
    part = len(clips) // 2
    flat = [sample for clip in clips[:part] for sample in clip]
    chosen = np.linspace(0, len(flat) - 1, min(calibration, len(flat))).astype(int)
    write_case(
        folder,
        Case(
            "silero",
            "recurrent",
            "real",
            "probability",
            ("input", "state"),
            feedback={"stateN": "state"},
        ),
        calibration=[flat[i] for i in chosen],
        evaluation=[sample for clip in clips[part:] for sample in clip],
    )


MODELS: Mapping[str, Maker] = {
    "mobilenet_v2": _mobilenet_v2,
    "efficientnet_lite0": _efficientnet_lite0,
    "resnet50": _resnet50,
    "ocr": _ocr,
    "minilm": _minilm,
    "bert_base": _bert_base,
    "vit_base": _vit_base,
    "lstm": _lstm,
    "silero": _silero,
}


def _random_classifier(
    folder: pathlib.Path, name: str, model: Any, calibration: int, kind: Any = "convolutional"
) -> None:
    """Photographs through a classifier of fixed random weights."""
    torch.manual_seed(_SEED)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model = _with_biases(model)
    images = list(_unlabelled(calibration))
    _settle_batch_norms(model, images[:32])
    _export(folder, _Logits(model), {"image": _zeros(1, 3, 224, 224)}, ["logits"])
    write_case(
        folder,
        Case(name, kind, "random", "argmax", ("image",)),
        calibration=({"image": image} for image in images),
        evaluation=({"image": photographs.tensor(item.image)} for item in photographs.labelled()),
    )


def _with_biases(model: Any) -> Any:
    """Biases and scales of norms away from 0 and 1: optimizers delete those that are not."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.1)
    return model.eval()


def _settle_batch_norms(model: Any, images: list[Any]) -> None:
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for start in range(0, len(images), 8):
            model(torch.from_numpy(np.concatenate(images[start : start + 8])))
    model.eval()


def _export(
    folder: pathlib.Path, module: Any, example: Mapping[str, torch.Tensor], outputs: list[str]
) -> None:
    arguments = tuple(example.values())
    module = module.eval()
    torch.export.save(torch.export.export(module, arguments), folder / "program.pt2")
    torch.onnx.export(
        module,
        arguments,
        folder / "model.onnx",
        dynamo=True,
        external_data=False,
        input_names=list(example),
        output_names=outputs,
        verbose=False,
    )


def _fix(value: Any, shape: tuple[int, ...]) -> None:
    for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def _unlabelled(count: int) -> Iterator[Any]:
    """``count`` photographs for calibration; from the second round on, mirrored."""
    images = [photographs.tensor(image) for image in photographs.unlabelled()]
    for index in range(count):
        image = images[index % len(images)]
        mirrored = index // len(images) % 2
        yield np.ascontiguousarray(image[..., ::-1]) if mirrored else image


def _lines(count: int, *, seed: int) -> tuple[Any, tuple[str, ...]]:
    lines = text_lines.render(count, seed)
    return lines.images, lines.texts


def _calibration_texts(count: int) -> list[str]:
    """Sentences of Lee's news texts, and single words, which no judged pair holds."""
    news = sorted(set(similarity.pairs("lee").first))
    sentences = [part.strip() for text in news for part in text.split(". ") if part.strip()]
    return sentences[:count]


def _silero_samples(model: pathlib.Path) -> Iterator[list[dict[str, Any]]]:
    """The chunks of each clip with the float32 model's state before each."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for clip in speech.clips()[:60:2]:
        audio, rate = clip.samples()
        audio = np.interp(  # to 16 kHz
            np.arange(int(len(audio) * 16000 / rate)) * rate / 16000, np.arange(len(audio)), audio
        ).astype(np.float32)
        state, context, made = np.zeros((2, 1, 128), np.float32), np.zeros(_CONTEXT, np.float32), []
        for start in range(0, len(audio) - _CHUNK + 1, _CHUNK):
            chunk = audio[start : start + _CHUNK]
            given = {"input": np.concatenate([context, chunk])[None], "state": state}
            made.append({**given, "restart": np.array(start == 0)})
            state = session.run(["stateN"], given)[0]
            context = chunk[-_CONTEXT:]
        yield made


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> Any:
        return self.model(image).logits


class _LastHidden(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        made = self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return made.last_hidden_state


class _Lstm(torch.nn.Module):
    """Two layers of 512 and a classifier of each step: float32 [1, 100, 80] -> [1, 100, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(_FEATURES, 512, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(512, 64)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.lstm(x)[0])
