"""Second moments of activations, streamed: what a layer's inputs look like to its weights.

For a value x [..., n] the mean of x x^T over all positions of all samples, [n, n]. It gives
the output error of any change of a weight exactly, without keeping one activation. Values
are taken in groups whose moments fit into a fixed amount of memory, one run over the samples
for each group, so that neither the samples' number nor the model's depth decides the peak:
the widest value does, and the callers leave out those that are too wide. Nor does it go on for
ever: once every value of a group has enough rows for its width, further samples are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import PassError, Samples
from edgec.passes.execution import run_values
from edgec.passes.weights import Array

_GROUP_BYTES = 512 << 20  # of moments in float64 held at a time
_ROWS, _ROWS_A_CHANNEL = 1 << 14, 8  # that are enough: so many, and so many for each channel


def second_moments(
    model: ir.Model,
    widths: Mapping[str, int],
    samples: Samples,
    *,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, Array]]:
    """Pairs of a value's name and its mean x x^T, float64 [n, n], in the order of ``widths``.

    widths: n, the size of the last axis, by name of a value in the main graph. samples: from the
    first on, until there are 16,384 rows x and 8 n.
    Raises PassError if a value holds NaN or infinity.
    """
    groups = _groups(widths)
    total = len(groups) * len(samples)
    for number, names in enumerate(groups):
        sums = {name: np.zeros((widths[name], widths[name])) for name in names}
        counts = dict.fromkeys(names, 0)
        runs = run_values(model, names, samples, optimized=True)
        for index, values in enumerate(runs):
            for name in names:
                x = values[name].reshape(-1, widths[name])
                square = x.T @ x
                if not np.isfinite(square).all():
                    raise PassError(
                        f"calibration sample {index}: value '{name}' holds NaN, infinity or "
                        "numbers too large to square: check the sample, or the model's weights"
                    )
                sums[name] += square
                counts[name] += len(x)
            progress(number * len(samples) + index + 1, total)
            if all(counts[name] >= max(_ROWS, _ROWS_A_CHANNEL * widths[name]) for name in names):
                break
        for name in names:
            yield name, sums.pop(name) / max(counts[name], 1)


def _groups(widths: Mapping[str, int]) -> list[Sequence[str]]:
    groups: list[list[str]] = []
    room = 0
    for name, width in widths.items():
        size = 8 * width * width
        if not groups or size > room:
            groups.append([])
            room = _GROUP_BYTES
        groups[-1].append(name)
        room -= size
    return [tuple(group) for group in groups]
