"""What quantization does to each layer by itself: the mean it shifts, the noise it adds.

Every computing layer gets a quantized twin that reads the same float input. One run over the
calibration data yields, for all layers at once, the mean difference of the two per channel,
which is added to the bias (Nagel et al. 2019, arXiv:1906.04721, section 4.2), and the power
of what remains, by which layers are ranked.

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
from edgec_runtime.golden import SQNR_CAP_DB

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Twins:
    """A layer and its quantized twin.

    node: the layer's name. float_output, quantized_output: names of the values. axis: of the
    channels. corrected: the layer has a bias that will take the mean difference.
    """

    node: str
    float_output: str
    quantized_output: str
    axis: int
    corrected: bool


@dataclass(frozen=True)
class LayerErrors:
    """shifts: what to add to each layer's bias, float32 [channels] by float output's name.

    sensitivity: node name -> SQNR in dB of the layer's own error, after the correction.
    """

    shifts: dict[str, Array]
    sensitivity: dict[str, float]


def layer_errors(
    model: ir.Model,
    twins: Sequence[Twins],
    samples: Samples,
    *,
    progress: Callable[[int, int], None],
) -> LayerErrors:
    """The errors of all layers, from one run.

    model: computes both outputs of all twins. Keeps sums per channel only, in float64.
    """
    if not twins:
        return LayerErrors({}, {})
    names = [name for t in twins for name in (t.float_output, t.quantized_output)]
    sums = [_Sums() for _ in twins]
    for number, values in enumerate(run_values(model, names, samples, optimized=True)):
        for t, own in zip(twins, sums, strict=True):
            own.add(values[t.float_output], values[t.quantized_output], t.axis)
        progress(number + 1, len(samples))
    shifts = {
        t.float_output: own.mean.astype(np.float32)
        for t, own in zip(twins, sums, strict=True)
        if t.corrected
    }
    sensitivity = {
        t.node: own.sqnr_db(corrected=t.corrected) for t, own in zip(twins, sums, strict=True)
    }
    return LayerErrors(shifts, sensitivity)


class _Sums:
    """Running sums over the difference of two values."""

    def __init__(self) -> None:
        self.count = 0  # differences per channel
        self.difference: Array = np.zeros(1)  # [channels]
        self.noise = self.signal = 0.0

    def add(self, reference: Array, actual: Array, axis: int) -> None:
        difference = reference - actual
        channels_last = np.moveaxis(difference, axis, -1)
        rows = channels_last.reshape(-1, channels_last.shape[-1])
        self.difference = self.difference + rows.sum(axis=0, dtype=np.float64)
        self.count += rows.shape[0]
        # float32 products, summed pairwise by BLAS in blocks: 1e-6 relative
        self.noise += float(np.vdot(difference, difference))
        self.signal += float(np.vdot(reference, reference))

    @property
    def mean(self) -> Array:
        return self.difference / self.count

    def sqnr_db(self, *, corrected: bool) -> float:
        removed = self.count * float(np.square(self.mean).sum()) if corrected else 0.0
        noise = max(self.noise - removed, 0.0)
        if noise == 0.0 or self.signal == 0.0:
            return SQNR_CAP_DB if noise == 0.0 else -SQNR_CAP_DB
        found = 10 * np.log10(self.signal / noise)
        return round(float(np.clip(found, -SQNR_CAP_DB, SQNR_CAP_DB)), 2)
