"""Empirical bias correction: gives every channel of a quantized layer its float mean back.

Rounding the weights shifts the mean of each output channel (Nagel et al. 2019,
arXiv:1906.04721, section 4.2). The shift is measured on calibration data, as the float
model's channel mean minus the quantized model's, and added to the layer's bias. Layers are
corrected in graph order, a few at a time, with everything before them already quantized and
corrected; so what an earlier layer still gets wrong is mended as well.

Only sums per channel are kept; memory does not depend on the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Feeds
from edgec.passes.execution import open_session
from edgec.targets import Session

Array = np.ndarray[Any, Any]

# AVX2 without VNNI saturates u8*s8 sums: compute exactly, whatever machine compiles
_EXACT = Session(config={"session.x64quantprecision": "1"})


@dataclass
class ChannelMean:
    """Mean of a stream of arrays over everything but one axis, in float64."""

    axis: int
    total: Array | None = None
    count: int = 0

    def add(self, values: Array) -> None:
        """Take an array with the channels at `axis` into the mean."""
        axis = self.axis % values.ndim
        others = tuple(i for i in range(values.ndim) if i != axis)
        sums = values.sum(axis=others, dtype=np.float64)
        self.total = sums if self.total is None else self.total + sums
        self.count += values.size // values.shape[axis]

    @property
    def value(self) -> Array:
        """float64 [channels]."""
        assert self.total is not None  # at least one array was added
        return self.total / self.count


@dataclass(frozen=True)
class Site:
    """A quantized layer whose bias can be corrected.

    key: name of the layer's output in the float model. output: the same value in the
    quantized model. axis: of its channels. add: adds float32 [channels] to the bias.
    """

    key: str
    output: ir.Value
    axis: int
    add: Callable[[Array], None]


def correct_biases(
    quantized: ir.Model,
    sites: Sequence[Site],
    float_means: Mapping[str, Array],
    samples: Iterable[Feeds],
    *,
    together: int,
    progress: Callable[[int, int], None],
) -> dict[str, Array]:
    """Correct the biases of a quantized model in place; return what was added, by key.

    float_means: channel means of the float model by key. samples: run once per `together`
    sites, which are measured at the same time. Returns float32 [channels] each.
    """
    corrections: dict[str, Array] = {}
    for start in range(0, len(sites), together):
        group = sites[start : start + together]
        means = {site.key: ChannelMean(site.axis) for site in group}
        names = [site.output.name or "" for site in group]
        session = open_session(quantized, outputs=names, settings=_EXACT)
        wanted = {i.name for i in session.get_inputs()}
        for feeds in samples:
            arrays = session.run(None, {k: v for k, v in feeds.items() if k in wanted})
            for site, array in zip(group, arrays, strict=True):
                means[site.key].add(array)
        for site in group:
            shift = (float_means[site.key] - means[site.key].value).astype(np.float32)
            site.add(shift)
            corrections[site.key] = shift
        progress(min(start + together, len(sites)), len(sites))
    return corrections
