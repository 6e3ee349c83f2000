"""The self-test's sample: a small input and what it must give, stored in the bundle.

The sample may take 2 % of the bundle. Inputs: integers in the smallest type that holds them,
floats as 8-bit numbers with one scale; what is still too large is thinned out along its
longest axes and repeated when read. So the golden input is *defined* as what
``decode_inputs`` returns, and the compiler computes the expected outputs from that:

    inputs = encode_inputs(feeds, budget_bytes=20_000)
    outputs = encode_outputs(model.run(decode_inputs(inputs.parts, inputs.data)), ...)
    golden, files = make_golden("main", inputs, outputs, min_sqnr_db=25.0)

Outputs are stored whole or as values at positions that follow from a seed, with the norm of
all. They are judged by SQNR, not by bits: CPUs round int8 differently (33 to 40 dB between
x86 and ARM), while a saturating or misread model falls below 20 dB.

Left out on purpose: strings, and numpy's random generators, whose streams may change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec_runtime.errors import BundleError, EdgecError
from edgec_runtime.manifest import Golden, GoldenInput, GoldenOutput

if TYPE_CHECKING:
    from edgec_runtime.bundle import Bundle
    from edgec_runtime.session import Model

Array = np.ndarray[Any, Any]

DEFAULT_MIN_SQNR_DB = 25.0  # below any difference between CPUs, above saturation
MIN_EQUAL = 0.99  # share of equal values in an integer output (class indices, masks)
SQNR_CAP_DB = 200.0

_EXACT_BYTES = 1024  # a float input up to this size is stored as it is
_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_STORED = ("bool", "float16", "float32", "float64", *_INTEGERS)
_MAX_DECODED_BYTES = 1 << 30


@dataclass(frozen=True)
class Encoded:
    """Encoded inputs: what goes into the manifest, and into the file."""

    parts: tuple[GoldenInput, ...]
    data: bytes


@dataclass(frozen=True)
class EncodedOutputs:
    """Encoded outputs: what goes into the manifest, and into the file."""

    parts: tuple[GoldenOutput, ...]
    data: bytes


@dataclass(frozen=True)
class Verdict:
    """One output against the expected one.

    sqnr_db: over the stored values; equal: their share that is equal, None for floats.
    reason: empty if passed.
    """

    name: str
    passed: bool
    sqnr_db: float
    equal: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class SelfTest:
    """The outcome on this machine. sqnr_db: of the worst output; min_sqnr_db: the limit."""

    passed: bool
    sqnr_db: float
    min_sqnr_db: float
    outputs: tuple[Verdict, ...]


def self_test(bundle: Bundle, model: Model) -> SelfTest:
    """Run the golden sample of the main graph. Raises BundleError if there is none."""
    golden, feeds = _main_golden(bundle), golden_inputs(bundle)
    return judge(golden, bundle.read(golden.outputs_file), model(**feeds))


def golden_inputs(bundle: Bundle) -> dict[str, Array]:
    """The decoded inputs of the main graph's sample. Raises BundleError if there is none."""
    golden = _main_golden(bundle)
    return decode_inputs(golden.inputs, bundle.read(golden.inputs_file))


def make_golden(
    graph: str, inputs: Encoded, outputs: EncodedOutputs, *, min_sqnr_db: float
) -> tuple[Golden, dict[str, bytes]]:
    """The manifest's part and the bundle's files for one graph."""
    files = {f"golden/{graph}.inputs.bin": inputs.data, f"golden/{graph}.outputs.bin": outputs.data}
    names = list(files)
    return Golden(graph, names[0], names[1], inputs.parts, outputs.parts, min_sqnr_db), files


def encode_inputs(feeds: Mapping[str, Array], *, budget_bytes: int) -> Encoded:
    """One sample in at most ``budget_bytes``, but at least one value of each input.

    Raises EdgecError for an input that is not numeric.
    """
    factors = {name: [1] * array.ndim for name, array in feeds.items()}
    compact = {name: _compact(name, array) for name, array in feeds.items()}
    stored = {name: array for name, (array, _, _) in compact.items()}
    while sum(array.nbytes for array in stored.values()) > budget_bytes:
        divisible = [name for name, array in stored.items() if array.size > 1]
        if not divisible:
            break
        name = max(divisible, key=lambda n: (stored[n].nbytes, n))
        shape = stored[name].shape
        factors[name][shape.index(max(shape))] *= 2
        stored[name] = _thinned(compact[name][0], factors[name])
    parts = tuple(
        GoldenInput(
            name=name,
            dtype=feeds[name].dtype.name,
            shape=feeds[name].shape,
            stored_dtype=array.dtype.name,
            stored_shape=array.shape,
            repeats=tuple(factors[name]),
            scale=compact[name][1],
            offset=compact[name][2],
        )
        for name, array in stored.items()
    )
    return Encoded(parts, b"".join(_to_bytes(array) for array in stored.values()))


def decode_inputs(parts: Sequence[GoldenInput], data: bytes) -> dict[str, Array]:
    """The golden inputs by name. Raises BundleError if the sizes do not fit together."""
    _check_inputs(parts, data)
    feeds, position = {}, 0
    for part in parts:
        count = math.prod(part.stored_shape)
        stored = _from_bytes(data, part.stored_dtype, count, position)
        position += stored.nbytes
        values = stored.reshape(part.stored_shape)
        for axis, (size, factor) in enumerate(zip(part.shape, part.repeats, strict=True)):
            if factor > 1:
                values = values.take(np.arange(size) // factor, axis=axis)
        if (part.scale, part.offset) != (1.0, 0.0):
            values = values.astype(np.float64) * part.scale + part.offset
        feeds[part.name] = values.astype(part.dtype)
    return feeds


def encode_outputs(
    outputs: Mapping[str, Array], *, budget_bytes: int, seed: int = 0
) -> EncodedOutputs:
    """What the golden input gave, in at most ``budget_bytes``, but one value of each output.

    Small outputs are stored whole, the rest of the budget is shared by the others.
    Raises EdgecError for an output that is not numeric.
    """
    left, shares = budget_bytes, {}
    for rest, name in enumerate(sorted(outputs, key=lambda n: (outputs[n].nbytes, n))):
        array = outputs[name]
        _check_numeric("output", name, array)
        fair = left // (len(outputs) - rest)
        shares[name] = min(array.size, max(fair // array.itemsize, 1))
        left -= shares[name] * array.itemsize
    parts, data = [], []
    for name, array in outputs.items():
        values = array.ravel()[sample_positions(array.size, shares[name], seed)]
        data.append(_to_bytes(values))
        parts.append(
            GoldenOutput(
                name=name,
                dtype=array.dtype.name,
                shape=array.shape,
                stored_dtype=values.dtype.name,
                count=shares[name],
                seed=seed,
                norm=_norm(array),
            )
        )
    return EncodedOutputs(tuple(parts), b"".join(data))


def sample_positions(size: int, count: int, seed: int) -> Array:
    """``count`` different positions below ``size``, spread evenly; int64, all if count == size.

    Position i is (seed + i * step) mod size, with the step next to size / golden ratio that
    shares no factor with size: the same on every machine and numpy version.
    """
    if count >= size:
        return np.arange(size, dtype=np.int64)
    step = max(int(size * 0.6180339887498949), 1)
    while math.gcd(step, size) != 1:
        step += 1
    return (seed % size + np.arange(count, dtype=np.int64) * step) % size


def judge(golden: Golden, data: bytes, outputs: Mapping[str, Array]) -> SelfTest:
    """Compare outputs with the expected ones. Raises BundleError if ``data`` does not fit."""
    itemsizes = [_itemsize(part.stored_dtype) for part in golden.outputs]
    counts = [part.count for part in golden.outputs]
    if sum(n * b for n, b in zip(counts, itemsizes, strict=True)) != len(data) or any(
        not 0 <= part.count <= math.prod(part.shape) for part in golden.outputs
    ):
        raise BundleError(f"the golden outputs '{golden.outputs_file}' have the wrong size")
    verdicts, position = [], 0
    for part, itemsize in zip(golden.outputs, itemsizes, strict=True):
        expected = _from_bytes(data, part.stored_dtype, part.count, position)
        position += part.count * itemsize
        verdicts.append(_judge_one(part, expected, outputs.get(part.name), golden.min_sqnr_db))
    return SelfTest(
        passed=all(verdict.passed for verdict in verdicts),
        sqnr_db=min((verdict.sqnr_db for verdict in verdicts), default=SQNR_CAP_DB),
        min_sqnr_db=golden.min_sqnr_db,
        outputs=tuple(verdicts),
    )


def sqnr_db(reference: Array, actual: Array) -> float:
    """10 log10(sum r^2 / sum (r - a)^2), within +-200; equal arrays give 200.

    Values that are not finite must be equal, else the result is -200.
    """
    r, a = reference.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    finite = np.isfinite(r)
    if not np.array_equal(r[~finite], a[~finite], equal_nan=True) or not np.all(
        np.isfinite(a[finite])
    ):
        return -SQNR_CAP_DB
    r, a = r[finite], a[finite]
    with np.errstate(over="ignore"):
        signal, noise = float(np.sum(r * r)), float(np.sum((r - a) ** 2))
    if noise == 0.0:
        return SQNR_CAP_DB
    if signal == 0.0 or not math.isfinite(signal) or not math.isfinite(noise):
        return -SQNR_CAP_DB
    return min(max(10.0 * math.log10(signal / noise), -SQNR_CAP_DB), SQNR_CAP_DB)


def _main_golden(bundle: Bundle) -> Golden:
    found = [golden for golden in bundle.manifest.golden if golden.graph == "main"]
    if not found:
        raise BundleError(f"bundle {bundle.path}: it carries no golden sample to test with")
    return found[0]


def _judge_one(
    part: GoldenOutput, expected: Array, output: Array | None, min_sqnr_db: float
) -> Verdict:
    if output is None or output.dtype.name != part.dtype or output.shape != part.shape:
        given = "missing" if output is None else f"{output.dtype.name} {list(output.shape)}"
        reason = f"it is {given}, expected {part.dtype} {list(part.shape)}"
        return Verdict(part.name, False, -SQNR_CAP_DB, reason=reason)
    actual = output.ravel()[sample_positions(output.size, part.count, part.seed)]
    noise = sqnr_db(expected, actual)
    exact = output.dtype.kind not in "f"
    equal = float(np.mean(expected == actual)) if exact and part.count else None
    if equal is not None and equal >= MIN_EQUAL:
        return Verdict(part.name, True, noise, equal)
    if exact and output.itemsize > 1 or output.dtype == np.bool_:
        reason = f"{equal:.1%} of its integers are equal, expected {MIN_EQUAL:.0%}"
        return Verdict(part.name, equal is None, noise, equal, "" if equal is None else reason)
    if noise < min_sqnr_db:
        reason = f"its SQNR is {noise:.1f} dB, expected {min_sqnr_db:.1f}"
        return Verdict(part.name, False, noise, equal, reason)
    # | |r| - |a| | <= |r - a|: the norm of all values follows from the SQNR of all values
    allowed = part.norm * 10.0 ** (-min_sqnr_db / 20.0) + 1e-12
    if abs(_norm(output) - part.norm) > allowed:
        reason = f"its norm is {_norm(output):.6g}, expected {part.norm:.6g}"
        return Verdict(part.name, False, noise, equal, reason)
    return Verdict(part.name, True, noise, equal)


def _compact(name: str, array: Array) -> tuple[Array, float, float]:
    """A smaller array, scale and offset: ``array`` is about ``smaller * scale + offset``."""
    _check_numeric("input", name, array)
    if array.dtype == np.bool_ or array.size == 0:
        return array, 1.0, 0.0
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        fitting = (t for t in _INTEGERS if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
        return array.astype(next(fitting)), 1.0, 0.0
    if array.nbytes <= _EXACT_BYTES or not np.all(np.isfinite(array)):
        return array, 1.0, 0.0
    values = array.astype(np.float64)
    offset, top = float(values.min()), float(values.max())
    scale = top / 255.0 - offset / 255.0 or 1.0
    return np.rint((values - offset) / scale).astype(np.uint8), scale, offset


def _thinned(array: Array, factors: Sequence[int]) -> Array:
    """Every ``factors[i]``-th value along axis i."""
    for axis, factor in enumerate(factors):
        array = array.take(np.arange(0, array.shape[axis], factor), axis=axis)
    return array


def _check_numeric(side: str, name: str, array: Array) -> None:
    if array.dtype.name not in _STORED:
        raise EdgecError(
            f"{side} '{name}' is {array.dtype}, a golden sample holds numbers; "
            "build without a self-test"
        )


def _check_inputs(parts: Sequence[GoldenInput], data: bytes) -> None:
    stored = decoded = 0
    for part in parts:
        if part.dtype not in _STORED or not (
            len(part.shape) == len(part.repeats) == len(part.stored_shape)
            and all(size >= 0 for size in part.shape)
            and all(factor >= 1 for factor in part.repeats)
            and all(
                -(-size // factor) == kept
                for size, factor, kept in zip(
                    part.shape, part.repeats, part.stored_shape, strict=True
                )
            )
        ):
            raise BundleError(f"the golden input '{part.name}' has shapes that do not fit")
        stored += math.prod(part.stored_shape) * _itemsize(part.stored_dtype)
        decoded += math.prod(part.shape) * 8
    if stored != len(data):
        raise BundleError(f"the golden inputs have {len(data)} bytes, expected {stored}")
    if decoded > _MAX_DECODED_BYTES:
        raise BundleError(f"the golden inputs unpack to {decoded} bytes, too many")


def _itemsize(dtype: str) -> int:
    if dtype not in _STORED:
        raise BundleError(f"a golden array has the unknown dtype {dtype!r}")
    return np.dtype(dtype).itemsize


def _norm(array: Array) -> float:
    values = array.astype(np.float64).ravel()
    return float(math.sqrt(np.sum(np.square(values[np.isfinite(values)]))))


def _to_bytes(array: Array) -> bytes:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def _from_bytes(data: bytes, dtype: str, count: int, position: int) -> Array:
    stored = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(data, stored, count, position).astype(dtype)
