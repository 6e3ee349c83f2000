"""Adapters: small matrices that change what a loaded model answers, without loading it anew.

An adapter is a file in ONNX Runtime's own format (``.onnx_adapter``). It fills slots of the
graph, which are inputs with defaults: a slot's name is SLOT, the digest of the float model that
the bundle was built from, the layer's value, and ``down`` or ``up``. The digest in the name ties
an adapter to its model. Names, dtypes, shapes and a checksum, which stands in the file's field
for the adapter's version, are checked before it is used.

Left out: several adapters at once, and adapters on execution providers without CPU memory.
"""

from __future__ import annotations

import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec_runtime.errors import AdapterError

if TYPE_CHECKING:
    import onnxruntime

SLOT = "adapter."  # what the name of every slot begins with
DIGEST_DIGITS = 16

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Slot:
    """An input with a default of a graph. shape: sizes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model; ``open_adapter`` makes one.

    name: of the file, without the ending. size: of the file in bytes.
    """

    name: str
    path: pathlib.Path
    size: int
    handle: Any  # onnxruntime.LoraAdapter

    def options(self) -> onnxruntime.RunOptions:
        """Options of one run with this adapter."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_active_adapter(self.handle)
        return options


def slot_names(digest: str, value: str) -> tuple[str, str]:
    """Names of the two slots beside the layer that gives ``value``."""
    return f"{SLOT}{digest}.{value}.down", f"{SLOT}{digest}.{value}.up"


def slot_digest(name: str) -> str:
    """The digest of the model in a slot's name; empty if it is none."""
    digest = name[len(SLOT) :].partition(".")[0] if name.startswith(SLOT) else ""
    return digest if len(digest) == DIGEST_DIGITS else ""


def open_adapter(path: str | os.PathLike[str], slots: Sequence[Slot], model: str) -> Adapter:
    """Read an adapter and check that it fits.

    slots: of the model. model: what it is called in messages.
    Raises AdapterError if the file is missing or damaged, or was made for another model.
    """
    import onnxruntime

    real = pathlib.Path(path).resolve()
    where = f"adapter {path}"
    if not slots:
        raise AdapterError(
            f"{where}: {model} has no slots for adapters; build it with the pass 'adapter-slots'"
        )
    if not real.is_file():
        raise AdapterError(f"{where}: there is no such file")
    try:
        read = onnxruntime.AdapterFormat.read_adapter(str(real))
        parameters = {name: value.numpy() for name, value in read.get_parameters().items()}
        checksum = read.get_adapter_version()
    except Exception as error:  # onnxruntime's errors derive from Exception alone
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(
            f"{where}: it is damaged, or no adapter: {reason}; copy it again"
        ) from error
    _check(parameters, slots, where, model)
    if checksum != _checksum(parameters):
        raise AdapterError(f"{where}: it is altered: its checksum differs; copy it again")
    handle = onnxruntime.LoraAdapter()
    try:
        handle.Load(str(real))
    except Exception as error:  # it changed since it was read
        raise AdapterError(f"{where}: it was replaced while it was opened; try again") from error
    return Adapter(real.stem, real, real.stat().st_size, handle)


def write_adapter(path: str | os.PathLike[str], matrices: Mapping[str, Array]) -> None:
    """Write an adapter: float32 matrices by the name of their slot. Same matrices, same bytes."""
    import onnxruntime

    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(_checksum(matrices))
    made.set_model_version(1)
    values = {n: np.ascontiguousarray(matrices[n]) for n in sorted(matrices)}
    made.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in values.items()})
    made.export_adapter(os.fspath(path))


def _checksum(matrices: Mapping[str, Array]) -> int:
    """CRC-32 of names and numbers, without the top bit: the field is a signed number."""
    crc = 0
    for name, array in sorted(matrices.items()):
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), zlib.crc32(name.encode(), crc))
    return crc & 0x7FFFFFFF


def _check(
    found: Mapping[str, Array],
    slots: Sequence[Slot],
    where: str,
    model: str,
) -> None:
    """Raise AdapterError unless the adapter's matrices are slots of the model."""
    known = {slot.name: slot for slot in slots}
    if not found:
        raise AdapterError(f"{where}: it is empty")
    for name, array in sorted(found.items()):
        own, theirs = slot_digest(slots[0].name), slot_digest(name)
        if theirs != own:
            raise AdapterError(
                f"{where}: it was made for the model {theirs or 'of another tool'}, {model} comes "
                f"from {own}; make it again with edgec adapt"
            )
        if name not in known:
            raise AdapterError(f"{where}: {model} has no slot '{name}'; build it with that layer")
        slot = known[name]
        if (str(array.dtype), array.shape) != (slot.dtype, slot.shape):
            raise AdapterError(
                f"{where}: '{name}' is {array.dtype} {list(array.shape)}, the slot of {model} is "
                f"{slot.dtype} {list(slot.shape)}; make it again with edgec adapt"
            )
    half = next((n for n in sorted(found) if _other_half(n) not in found), None)
    if half is not None:
        raise AdapterError(f"{where}: it has '{half}' without '{_other_half(half)}'")


def _other_half(name: str) -> str:
    stem, _, half = name.rpartition(".")
    return f"{stem}.{'up' if half == 'down' else 'down'}"
