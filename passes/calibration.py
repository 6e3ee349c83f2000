"""One run of the float model over the calibration data, from which everything is decided.

Of each value that will be quantized a histogram is kept, of each computing layer a bounded
number of the rows that it reads (`edgec.passes.layer_inputs`): one sample in memory at a time,
and state whose size does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import PassError, Progress, Samples
from edgec.passes.execution import run_values
from edgec.passes.layer_inputs import LayerInputs
from edgec.passes.placement import Placement
from edgec.passes.ranges import Histogram

Array = np.ndarray[Any, Any]

_COUNTED = 8192  # numbers of a value that one sample adds to its histogram; extremes are exact


@dataclass(frozen=True)
class Calibration:
    """histograms: by value that gets a range. layers: by computing node of the plan."""

    histograms: Mapping[ir.Value, Histogram]
    layers: Mapping[ir.Node, LayerInputs]


def calibrate(
    model: ir.Model,
    plan: Placement,
    samples: Samples,
    *,
    seed: int,
    progress: Progress,
) -> Calibration:
    """Run the float model once. seed: of the rows that are kept.

    Raises PassError naming sample and value where a number is not finite.
    """
    ranged = {str(value.name): value for value in plan.calibrated}
    layers = {
        unit.node: LayerInputs(unit.node, len(samples)) for unit in plan.units if unit.computing
    }
    readers: dict[str, list[LayerInputs]] = {}
    for node, inputs in layers.items():
        readers.setdefault(str(node.inputs[0].name), []).append(inputs)  # type: ignore[union-attr]
    names = sorted({*ranged, *readers})
    histograms: dict[ir.Value, Histogram] = {}
    for number, arrays in enumerate(run_values(model, names, samples, optimized=True)):
        rng = np.random.default_rng((seed, number))
        for name, value in ranged.items():
            histogram = _histogram(arrays[name], name, number)
            known = histograms.get(value)
            histograms[value] = histogram if known is None else known.merge(histogram)
        for name, reading in readers.items():
            for inputs in reading:
                inputs.add(arrays[name], number, rng)
        progress("calibrate", number + 1, len(samples))
    return Calibration(histograms, layers)


def _histogram(values: Array, name: str, number: int) -> Histogram:
    try:
        return Histogram.of(values, most=_COUNTED)
    except ValueError as error:
        raise PassError(
            f"calibration sample {number}: value '{name}' holds {error}; expected finite "
            "numbers: check the sample, or the model's weights"
        ) from error


def samples_of(samples: Samples | None) -> Samples:
    """The calibration data. Raises PassError if there is none."""
    if samples is None or len(samples) == 0:
        raise PassError(
            "quantize-static needs calibration data: give some dozen typical inputs, or "
            "use a pass without data (quantize-dynamic, quantize-weights)"
        )
    return samples


__all__: Sequence[str] = ["Calibration", "calibrate", "samples_of"]
