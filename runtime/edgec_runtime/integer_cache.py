"""Key-value caches of integers: value = integer x scale, one scale for each channel of a head.

The graph takes and gives int8, and says the scales in its metadata: JSON {name of an input or an
output: base64 of float32 [heads, size], little-endian}. A loop of steps hands integers from one
run to the next; whoever calls the model with arrays sees float32.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec_runtime.errors import BundleError

if TYPE_CHECKING:
    import onnxruntime

    from edgec_runtime.manifest import Manifest, Value

Array = np.ndarray[Any, Any]
Scales = Mapping[str, Array]  # name of an input or output -> float32 [1, heads, 1, size]

METADATA = "edgec.cache_scales"
DTYPE = "int8"
_LEAST, _MOST = -128, 127
_UNTILED = "ORT_GQA_DISABLE_FLASH_ATTENTION"  # read when a session makes its kernels
_OPENING = threading.Lock()  # one session at a time: the environment is the process's


def scales_text(scales: Scales) -> str:
    """What the metadata says. scales: float32 [1, heads, 1, size]."""
    texts = {}
    for name, scale in scales.items():
        flat = np.ascontiguousarray(scale[0, :, 0], "<f4")
        texts[name] = [list(flat.shape), base64.b64encode(flat.tobytes()).decode("ascii")]
    return json.dumps(texts, sort_keys=True, separators=(",", ":"))


def scales_of(text: str) -> dict[str, Array]:
    """The scales that ``scales_text`` wrote. Raises BundleError for another text."""
    found = {}
    try:
        for name, (shape, data) in json.loads(text).items():
            flat = np.frombuffer(base64.b64decode(data), "<f4").reshape(shape)
            found[name] = flat.astype(np.float32)[None, :, None]
    except (ValueError, TypeError, AttributeError, binascii.Error) as error:
        raise BundleError(f"the graph's metadata '{METADATA}' is damaged: {error}") from error
    return found


def session_scales(session: onnxruntime.InferenceSession) -> dict[str, Array]:
    """The scales of a session's graph; empty if its caches are no integers."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    return scales_of(text) if text else {}


def cache_values(manifest: Manifest) -> tuple[Value, ...]:
    """Inputs and outputs of the graph main that are key-value caches, as the graph has them."""
    if manifest.generation is None:
        return ()
    names = {name for pair in manifest.generation.pairs for name in (pair.past, pair.present)}
    graph = manifest.graphs["main"]
    return tuple(value for value in (*graph.inputs, *graph.outputs) if value.name in names)


@contextlib.contextmanager
def untiled(manifest: Manifest, threads: int) -> Iterator[None]:
    """While its session opens: one thread attends to a cache of integers by whole rows of scores.

    ONNX Runtime (1.31) else takes tiles, by which one thread reads a token slower and, for some
    lengths of the past, slower by another third (docs/language-models.md, long contexts). Several
    threads share tiles better, and a prompt that fills the context is read faster by them. What
    the environment says already stands.
    """
    integers = any(value.dtype == DTYPE for value in cache_values(manifest))
    with _OPENING:
        if not integers or threads != 1 or _UNTILED in os.environ:
            yield
            return
        os.environ[_UNTILED] = "1"
        try:
            yield
        finally:
            os.environ.pop(_UNTILED, None)


def as_called(values: Sequence[Value], manifest: Manifest) -> tuple[Value, ...]:
    """The values as a caller with arrays sees them: caches of integers are float32."""
    integers = {value.name for value in cache_values(manifest) if value.dtype == DTYPE}
    return tuple(
        dataclasses.replace(value, dtype="float32") if value.name in integers else value
        for value in values
    )


def check_scales(scales: Scales, values: Sequence[Value]) -> None:
    """Raise BundleError unless every integer input or output of a cache has its scales.

    values: those of a cache, as the graph has them.
    """
    for value in values:
        scale = scales.get(value.name)
        expected = (1, value.shape[1], 1, value.shape[3])
        if value.dtype == DTYPE and (scale is None or scale.shape != expected):
            raise BundleError(
                f"the cache '{value.name}' is {DTYPE}, and the graph's metadata '{METADATA}' has "
                f"no scales {list(expected[1::2])} for it"
            )


def quantized(feeds: Mapping[str, Array], scales: Scales) -> dict[str, Array]:
    """The feeds, those float arrays that have scales as integers."""
    return {
        name: _integers(array, scales[name])
        if name in scales and array.dtype.kind == "f"
        else array
        for name, array in feeds.items()
    }


def dequantized(names: Sequence[str], arrays: Sequence[Array], scales: Scales) -> list[Array]:
    """Outputs in the order of their names, those that have scales as float32."""
    return [
        array * scales[name] if name in scales else array
        for name, array in zip(names, arrays, strict=True)
    ]


def _integers(array: Array, scale: Array) -> Array:
    return np.clip(np.rint(array / scale), _LEAST, _MOST).astype(np.int8)
