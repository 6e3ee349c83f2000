"""Adversarial inputs by the gradients of a graph: FGSM and PGD, through its torch twin.

FGSM takes one step along the sign of the loss' gradient (Goodfellow et al. 2015,
arXiv:1412.6572, section 4); PGD takes many small ones from a random start and is projected
back into the ball of radius epsilon (Madry et al. 2018, arXiv:1706.06083, section 2.1; steps
of 2.5 epsilon / steps). The loss is the cross entropy with the true class, on the logits
where the graph ends in a softmax, and on logits scaled down where they are so far apart that
its gradient would vanish (Croce & Hein 2020, arXiv:2003.01690, section 4). A quantized graph is
differentiated straight through its rounding, which is the known answer to gradients that
rounding hides (Athalye et al. 2018, arXiv:1802.00420, section 4.1).

Left out on purpose: other norms, targeted attacks, black-box attacks, models that are no
classifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from edgec.errors import DataError
from edgec.passes import Feeds, PassError
from edgec.passes.curriculum import LABEL, Example, alike
from edgec.passes.stacks import in_stacks, stacked, unanswered
from edgec.passes.training_loop import fixed_threads

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
Kind = Literal["fgsm", "pgd"]

KINDS: tuple[Kind, ...] = ("fgsm", "pgd")
STEPS = 20  # of PGD
_STEP = 2.5  # of all steps together, in radii: far enough to cross the ball from any start
_STACK_VALUES = 1 << 17  # values of the disturbed input that go through the twin at once
_MOST_STACKED = 64
_THREADS = 1  # signs of gradients depend on sums, and those on the number of threads
_SPREAD = 20.0  # of the logits of a row, at most: float32 holds the softmax of that
_SAME = 1e-3  # of the logits' size: how far float32 sums in another order may be apart
_BESIDE = {"Reshape", "Squeeze", "Identity", "Flatten", "DequantizeLinear", "QuantizeLinear"}


@dataclass(frozen=True)
class Ball:
    """What an attack may change: one input, each value by ``radius`` and within low..high.

    radius, low, high: float32, of a shape that broadcasts to the input.
    """

    input: str
    radius: Array
    low: Array
    high: Array


class Attacker:
    """Attacks that follow the gradients of one graph."""

    def __init__(self, model: ir.Model, output: str, ball: Ball) -> None:
        """output: the class scores. Raises PassError naming a node that torch cannot run."""
        from edgec.passes.torch_graph import to_torch

        self._twin = to_torch(model).requires_grad_(False)
        self._scores = _logits_of(model, output)
        self._ball = ball

    def logits(self, *samples: Feeds) -> Array:
        """The class scores that the attacks work on, float32 [rows, classes], in one batch."""
        import torch

        with fixed_threads(_THREADS), torch.no_grad():
            found: Array = self._rows(stacked(samples)).numpy()
        return found

    def disturb(
        self,
        kind: Kind,
        samples: Sequence[Feeds],
        classes: Sequence[Array],
        *,
        seed: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Array]:
        """The attacked input of every sample, float32, within the ball and the valid range.

        classes: the true ones, int64 [rows], of each sample. Raises DataError if no gradient
        reaches the input.
        """
        made: list[Array] = []
        given = [Example(f, {LABEL: c}) for f, c in zip(samples, classes, strict=True)]
        with fixed_threads(_THREADS):
            for part in in_stacks(given, self._stack_size(samples)):
                stack = unanswered(part)
                feeds, truth, count = stack.feeds, stack.labels[LABEL], stack.count
                if kind == "fgsm":
                    found = self._fgsm(feeds, truth, count)
                else:
                    image = feeds[self._ball.input]
                    rows = image.shape[0] // count if count > 1 else None
                    noise = _noise(image, rows, seed, len(made))
                    found = self._pgd(feeds, truth, count, noise)
                arrays = found.numpy()
                made += np.split(arrays, count) if count > 1 else [arrays]
                progress(len(made))
        return made

    def _fgsm(self, feeds: Mapping[str, Tensor], truth: Tensor, count: int) -> Tensor:
        import torch

        clean = feeds[self._ball.input]
        low, high, radius = self._bounds(clean)
        _, gradient = self._gradient(feeds, clean, truth, count)
        return torch.clamp(clean + radius * gradient.sign(), low, high)

    def _pgd(self, feeds: Mapping[str, Tensor], truth: Tensor, count: int, noise: Tensor) -> Tensor:
        """The point on the way at which each sample is furthest on the wrong side."""
        import torch

        clean = feeds[self._ball.input]
        low, high, radius = self._bounds(clean)
        point = torch.clamp(clean + radius * noise, low, high)
        best, worst = point, torch.full((count,), -torch.inf)
        for step in range(STEPS + 1):
            margin, gradient = self._gradient(feeds, point, truth, count)
            better = (margin > worst).reshape(-1, *[1] * (point.dim() - 1))
            if count > 1:
                better = better.repeat_interleave(point.shape[0] // count, dim=0)
            best = torch.where(better, point, best)
            worst = torch.maximum(margin, worst)
            if step < STEPS:
                point = point + _STEP / STEPS * radius * gradient.sign()
                point = torch.clamp(point, low, high)
        return best

    def _bounds(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The least and the largest value that the attack may give, and the radius."""
        import torch

        radius, low, high = (
            torch.from_numpy(np.asarray(a, np.float32))
            for a in (self._ball.radius, self._ball.low, self._ball.high)
        )
        return torch.maximum(clean - radius, low), torch.minimum(clean + radius, high), radius

    def _gradient(
        self, feeds: Mapping[str, Tensor], point: Tensor, truth: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """How far each sample is on the wrong side, [count], and the loss' gradient at ``point``.

        The first is the best wrong logit minus the true one, at the sample's worst row.
        """
        import torch

        point = point.detach().requires_grad_(True)
        rows = self._rows({**feeds, self._ball.input: point})
        if not rows.requires_grad:
            raise DataError(
                f"no gradient reaches input '{self._ball.input}': the graph turns it into integers "
                "first, so there is no attack to judge robustness by"
            )
        logits = rows.detach()
        spread = logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)
        scaled = rows / (spread / _SPREAD).clamp_min(1.0)
        loss = torch.nn.functional.cross_entropy(scaled, truth, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        true = logits.gather(1, truth[:, None])
        wrong = logits.scatter(1, truth[:, None], -torch.inf).amax(1, keepdim=True)
        return (wrong - true).reshape(count, -1).amax(1), gradient

    def _rows(self, feeds: Mapping[str, Tensor]) -> Tensor:
        scores = self._twin(feeds, keep=(self._scores,))[self._scores]
        rows: Tensor = scores.reshape(-1, scores.shape[-1])
        return rows

    def _stack_size(self, samples: Sequence[Feeds]) -> int:
        """How many samples go through the twin together, at most."""
        size = samples[0][self._ball.input].size
        most = max(1, min(_MOST_STACKED, _STACK_VALUES // size))
        return most if most > 1 and self._stackable(samples[:2]) else 1

    def _stackable(self, pair: Sequence[Feeds]) -> bool:
        """True if the twin gives for two samples in one batch what it gives for each.

        A graph may count on its batch, in the constant of a Reshape for example.
        """
        if len(pair) < 2 or not alike(pair):
            return False
        apart = np.concatenate([self.logits(feeds) for feeds in pair])
        try:
            together = self.logits(*pair)
        except PassError:
            return False
        close = _SAME * max(float(np.abs(apart).max()), 1e-30)
        return together.shape == apart.shape and bool(np.abs(together - apart).max() <= close)


def _logits_of(model: ir.Model, output: str) -> str:
    """The value before the softmax that the output ends in; the output if there is none."""
    node = next(v for v in model.graph.outputs if v.name == output).producer()
    while node is not None and node.op_type in _BESIDE:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "Softmax" or node.inputs[0] is None:
        return output
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    axis = node.attributes.get_int("axis", -1)
    last = axis == -1 or (rank is not None and axis == rank - 1)
    return str(node.inputs[0].name) if last else output


def _noise(image: Tensor, rows: int | None, seed: int, start: int) -> Tensor:
    """Uniform in -1..1, of each sample its own, however the samples are stacked."""
    import torch

    size = tuple(image.shape) if rows is None else (rows, *image.shape[1:])
    count = 1 if rows is None else image.shape[0] // rows
    noise = [
        np.random.default_rng([seed, start + i]).uniform(-1.0, 1.0, size) for i in range(count)
    ]
    return torch.from_numpy(np.concatenate(noise).astype(np.float32))
