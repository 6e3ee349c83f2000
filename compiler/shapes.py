"""Input shapes of a model: what they accept, and fixing them for devices that need it.

Left out on purpose: padding or tiling data into a fixed shape; a model that must see several
sizes on such a device is several bundles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.data import InputSpec
from edgec.errors import ExportError, SourceError

Feeds = Mapping[str, np.ndarray[Any, Any]]


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """What the graph's inputs accept. Raises SourceError for an input without dtype or shape."""
    specs = []
    for value in model.graph.inputs:
        if value.dtype is None or value.shape is None or value.name is None:
            raise SourceError(
                f"input '{value.name}' has no dtype or shape in the ONNX file; export it with both"
            )
        if value.dtype == ir.DataType.STRING:
            raise SourceError(
                f"input '{value.name}' holds text, expected numbers; export the model without it"
            )
        dims = tuple(d if isinstance(d, int) else None for d in value.shape)
        specs.append(InputSpec(value.name, value.dtype.numpy(), dims))
    return tuple(specs)


def has_open_dimensions(model: ir.Model) -> bool:
    """True if any input accepts several shapes."""
    return any(None in spec.dims for spec in input_specs(model))


def fix_shapes(model: ir.Model, feeds: Feeds | None, target: str) -> None:
    """Give every open dimension the size that it has in ``feeds``.

    Without feeds, the first dimension of an input becomes 1; any other is an ExportError,
    since nothing tells its size.
    """
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        shape = list(value.shape)
        for axis, dim in enumerate(shape):
            if isinstance(dim, int):
                continue
            if feeds is None and axis and str(dim.value) not in sizes:
                raise ExportError(
                    f"target {target} needs fixed shapes, and nothing tells the size of dimension "
                    f"{axis} of input '{value.name}'; give --calibration or --evaluation data"
                )
            size = 1 if feeds is None else int(feeds[str(value.name)].shape[axis])
            name = str(dim.value) if dim.value is not None else f"{value.name}.{axis}"
            shape[axis] = sizes.setdefault(name, size)
        value.shape = ir.Shape(shape)
    for output in model.graph.outputs:
        if output.shape is not None:
            output.shape = ir.Shape(
                d if isinstance(d, int) else sizes.get(str(d.value), d) for d in output.shape
            )
