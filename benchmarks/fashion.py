"""Fashion-MNIST for benchmarks of training: data in three parts, networks, judgement.

60,000 training images are split by a seed: the last 4,000 of a random order are held out
(early stops, choices of settings), the others are learned from. The 10,000 test images are
looked at once, at the end. Training in torch with one thread, so that a seed fixes every bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from fixtures.models import image_tensor
from fixtures.photographs import fashion_mnist
from torch import nn

import edgec
from edgec.export import export
from edgec.passes import Context, Feeds, Pass
from edgec.passes.execution import open_session
from edgec.pipeline import run_passes
from edgec.targets import load_target

Array = npt.NDArray[Any]

INPUT, OUTPUT = "image", "logits"
_HELD_OUT = 4_000
_JUDGED_AT_ONCE = 500
_CHECKED = 2


@dataclass(frozen=True)
class Part:
    """Images float32 [n, 1, 28, 28] in 0..1 and their classes int64 [n]."""

    images: Array
    classes: Array

    def first(self, count: int) -> Part:
        """The first ``count`` of them."""
        return Part(self.images[:count], self.classes[:count])

    def feeds(self, batch: int = 1) -> list[Feeds]:
        """The images as feeds of ``batch`` each; a rest is left out."""
        return [{INPUT: rows} for rows, _ in self._batches(batch)]

    def labels(self, batch: int = 1) -> list[Feeds]:
        """The classes of ``feeds``."""
        return [{"label": classes} for _, classes in self._batches(batch)]

    def _batches(self, batch: int) -> Iterator[tuple[Array, Array]]:
        for start in range(0, len(self.images) - batch + 1, batch):
            yield self.images[start : start + batch], self.classes[start : start + batch]


@dataclass(frozen=True)
class Fashion:
    """learned: to train with. held_out: for choices. test: for the last judgement alone."""

    learned: Part
    held_out: Part
    test: Part


def fashion(seed: int = 0) -> Fashion:
    """The three parts. Raises FixtureMissing."""
    images, classes = fashion_mnist("train")
    order = np.random.default_rng(seed).permutation(len(images))
    train = Part(image_tensor(images[order]).numpy(), classes[order])
    return Fashion(
        Part(train.images[:-_HELD_OUT], train.classes[:-_HELD_OUT]),
        Part(train.images[-_HELD_OUT:], train.classes[-_HELD_OUT:]),
        Part(image_tensor(fashion_mnist("test")[0]).numpy(), fashion_mnist("test")[1]),
    )


def smooth_cnn(activation: Callable[[], nn.Module] = nn.Hardswish) -> nn.Module:
    """Four convolutions of 32 to 128 channels with a smooth activation, 241,546 parameters."""

    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), activation()]

    return nn.Sequential(
        *layer(1, 32, 2),
        *layer(32, 64, 1),
        *layer(64, 128, 2),
        *layer(128, 128, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def mobile_cnn(width: int = 16) -> nn.Module:
    """Depthwise separable convolutions as in MobileNet, 18,346 parameters at width 16.

    Folding BatchNorm leaves depthwise filters of nine weights whose sizes differ much, which is
    what few bits are hard on.
    """

    def layer(inputs: int, outputs: int, size: int, stride: int, groups: int) -> list[nn.Module]:
        convolution = nn.Conv2d(
            inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False
        )
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU6()]

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [*layer(inputs, inputs, 3, stride, inputs), *layer(inputs, outputs, 1, 1, 1)]

    return nn.Sequential(
        *layer(1, width, 3, 2, 1),
        *block(width, 2 * width, 1),
        *block(2 * width, 4 * width, 2),
        *block(4 * width, 4 * width, 1),
        *block(4 * width, 8 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


def trained(
    make: Callable[[], nn.Module], data: Part, *, epochs: int, seed: int, what: str
) -> nn.Module:
    """A classifier trained with labels: SGD, Nesterov momentum, one cycle, batches of 128."""
    torch.set_num_threads(1)  # sums depend on the number of threads
    torch.manual_seed(seed)
    module = make().train()
    x, y = torch.from_numpy(data.images), torch.from_numpy(data.classes)
    batch, steps = 128, len(x) // 128
    optimizer = torch.optim.SGD(
        module.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps * epochs)
    for epoch in range(epochs):
        progress(f"{what}: epoch {epoch + 1} of {epochs}")
        order = torch.randperm(len(x))
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            loss = nn.functional.cross_entropy(module(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return module.eval()


def exported(module: nn.Module, target: str = "x86-64") -> ir.Model:
    """The reference of a torch classifier, with an open batch."""
    source = edgec.Source(
        module=module,
        example_inputs=(torch.zeros(2, 1, 28, 28),),
        input_names=(INPUT,),
        output_names=(OUTPUT,),
        dynamic={"input": {0: "batch"}},
    )
    return export(source, load_target(target)).model


def built(passes: list[Pass], reference: ir.Model, data: Context) -> ir.Model:
    """A model after the passes. data: a context with the samples and the seed."""
    assert data.calibration is not None
    data = replace(data, reference=reference)
    checks = [feeds for feeds, _ in zip(data.calibration, range(_CHECKED), strict=False)]
    steps = run_passes(passes, data, checks, announce=lambda name: progress(f"  {name}"))
    for step in steps:
        for finding in step.result.findings:
            progress(f"  {step.pass_.name}: {finding}")
    return steps[-1].model


def correct(model: ir.Model, data: Part) -> npt.NDArray[np.bool_]:
    """Which images a model in ONNX Runtime gives the right class."""
    session = open_session(model)
    found = [session.run([OUTPUT], feeds)[0].argmax(1) for feeds in data.feeds(_JUDGED_AT_ONCE)]
    return np.asarray(np.concatenate(found) == data.classes)


def parameters(model: ir.Model) -> int:
    """Number of weights and biases."""
    values = (v.const_value for v in model.graph.initializers.values())
    return sum(v.size for v in values if v is not None and v.dtype == ir.DataType.FLOAT)


def progress(text: str) -> None:
    """One line to stderr: what is done now."""
    print(text, file=sys.stderr, flush=True)
