"""Empirical bias correction: gives every channel of a quantized layer its float mean back.

Rounding shifts the mean of each output channel (Nagel et al. 2019, arXiv:1906.04721, section
4.2). Every layer gets a quantized twin that reads the same float input; one run over the
calibration data yields the mean difference of the two, which is added to the bias.

Left out on purpose: measuring the twin behind a quantized network. On EfficientNet-Lite0
that was slower (one run per layer) and worse, since a layer's bias then also answers for
clipping and noise of the layers before it; for several layers at once it diverges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Samples
from edgec.passes.execution import run_values

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Twins:
    """Names of a layer's float output and its quantized twin's; axis of the channels."""

    float_output: str
    quantized_output: str
    axis: int


def bias_shifts(
    model: ir.Model,
    twins: Sequence[Twins],
    samples: Samples,
    *,
    progress: Callable[[int, int], None],
) -> dict[str, Array]:
    """What has to be added to each layer's bias: float32 [channels] by float output's name.

    model: computes both outputs of all twins. Keeps sums per channel only, in float64.
    """
    if not twins:
        return {}
    names = [name for t in twins for name in (t.float_output, t.quantized_output)]
    sums: dict[str, Array] = {}
    counts = dict.fromkeys((t.float_output for t in twins), 0)
    for number, values in enumerate(run_values(model, names, samples, optimized=True)):
        for t in twins:
            difference = values[t.float_output] - values[t.quantized_output]
            channels_last = np.moveaxis(difference, t.axis, -1)
            total = channels_last.reshape(-1, channels_last.shape[-1]).sum(axis=0, dtype=np.float64)
            sums[t.float_output] = sums.get(t.float_output, 0.0) + total
            counts[t.float_output] += difference.size // total.size
        progress(number + 1, len(samples))
    return {name: (sums[name] / counts[name]).astype(np.float32) for name in counts}
