"""Runs one job on a device: python guest.py FOLDER. Needs edgec_runtime and nothing of edgec.

FOLDER holds job.json, the bundle and feeds.tensors; outputs.tensors and outcome.json are
written into it. A .tensors file has the layout of safetensors: the length of a JSON header as
8 bytes, little-endian, the header {name: {dtype, shape, data_offsets}}, the data. Arrays are
named "SAMPLE NAME". A host in another language does the same (``hosts/``).

Around one warm call, ``mark`` is called when the job asks for it: a system call that a
counter of executed instructions can see, and that does nothing.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

OPTIONS = "EDGEC_PROVIDER_OPTIONS"  # environment: options of execution providers, as JSON
JOB, FEEDS, OUTPUTS, OUTCOME = "job.json", "feeds.tensors", "outputs.tensors", "outcome.json"
_DTYPES = {
    "BOOL": "bool",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    **{f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint"))
       for bits in (8, 16, 32, 64)},
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LEAST = 2  # feeds that are run however long they take
_PRIO_PROCESS, _MARK = 0, 0x0ED6E000  # getpriority() of a process that cannot exist


def main(folder: pathlib.Path) -> int:
    """Runs the job in the folder; 1 and the reason in outcome.json if it cannot."""
    import edgec_runtime

    try:
        outcome = _run(folder, json.loads((folder / JOB).read_text(encoding="utf-8")))
    except edgec_runtime.EdgecError as error:
        outcome = {"error": str(error)}
    (folder / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
    return int("error" in outcome)


def write_tensors(path: pathlib.Path, arrays: Mapping[str, Array]) -> None:
    """Writes arrays as a .tensors file. Raises KeyError for a dtype that it cannot hold."""
    header, position = {}, 0
    for name, array in arrays.items():
        end = position + array.nbytes
        code = _CODES[array.dtype.name]
        header[name] = {
            "dtype": code, "shape": list(array.shape), "data_offsets": [position, end]
        }  # fmt: skip
        position = end
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            stream.write(np.ascontiguousarray(array).tobytes())


def read_tensors(path: pathlib.Path) -> dict[str, Array]:
    """The arrays of a .tensors file, by name."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, start = json.loads(data[8 : 8 + length]), 8 + length
    arrays = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = np.frombuffer(data[start + first : start + last], _DTYPES[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


def by_sample(arrays: Mapping[str, Array], samples: int) -> tuple[dict[str, Array], ...]:
    """Arrays named "SAMPLE NAME" as one dict by name per sample."""
    sorted_out: tuple[dict[str, Array], ...] = tuple({} for _ in range(samples))
    for key, array in arrays.items():
        number, _, name = key.partition(" ")
        sorted_out[int(number)][name] = array
    return sorted_out


def numbered(samples: Any) -> dict[str, Array]:
    """The reverse of ``by_sample``."""
    return {
        f"{i} {name}": array for i, given in enumerate(samples) for name, array in given.items()
    }


def _run(folder: pathlib.Path, job: Mapping[str, Any]) -> dict[str, Any]:
    import edgec_runtime
    from edgec_runtime.machine import this_machine

    feeds = by_sample(read_tensors(folder / FEEDS), job["samples"])
    before = time.perf_counter()
    model = edgec_runtime.load(
        folder / job["bundle"],
        threads=job["threads"],
        any_target=True,
        provider_options=json.loads(os.environ.get(OPTIONS, "{}")),
    )
    load_ms = (time.perf_counter() - before) * 1e3
    outputs = _run_feeds(model, feeds, job["limit_ms"])
    latency_ms = []
    for _ in range(job["repeats"]):
        before = time.perf_counter()
        model.run(feeds[0])
        latency_ms.append((time.perf_counter() - before) * 1e3)
    if job["count"]:
        mark = _marker()
        mark(1)
        model.run(feeds[0])
        mark(2)
    write_tensors(folder / OUTPUTS, numbered(outputs))
    import onnxruntime

    machine = this_machine()
    return {
        "onnxruntime": onnxruntime.__version__,
        "arch": machine.arch,
        "os": machine.os,
        "features": sorted(machine.features),
        "providers": list(model.providers),
        "nodes": model.nodes,
        "load_ms": load_ms,
        "latency_ms": latency_ms,
    }


def _run_feeds(
    model: Callable[..., dict[str, Array]],
    feeds: Sequence[Mapping[str, Array]],
    limit_ms: int | None,
) -> list[dict[str, Array]]:
    """Outputs for two feeds, and for more while one more is likely to end below the limit."""
    before = time.perf_counter()
    outputs: list[dict[str, Array]] = []
    for given in feeds:
        outputs.append(model(**given))
        done, spent_ms = len(outputs), (time.perf_counter() - before) * 1e3
        if limit_ms is not None and done >= _LEAST and spent_ms / done * (done + 1) > limit_ms:
            break
    return outputs


def _marker() -> Callable[[int], object]:
    library = ctypes.CDLL(None)
    return lambda label: library.getpriority(_PRIO_PROCESS, _MARK + label)


if __name__ == "__main__":
    with contextlib.suppress(AttributeError):  # a stream that is no terminal may lack it
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main(pathlib.Path(sys.argv[1])))
