"""What an app for phones needs to know about a bundle, found out without a phone.

The kernels are those of arm64 Linux (``edgec verify --on cortex-a76``). Here: the graph in
ONNX Runtime's own format with the list of operators for a reduced build of the library, and
checked to give the same outputs; what NNAPI and CoreML could take of the graph; and whether
native libraries load on phones with pages of 16 KiB.

Left out on purpose: building ONNX Runtime, .apk and .aab files, running on NNAPI or CoreML.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import edgec_runtime
from edgec.devices.android_elf import Library, read_library
from edgec.errors import BundleError, OutputError, TargetMismatchError
from edgec.report_format import count
from edgec_runtime import golden
from edgec_runtime.bundle import Bundle, read_bundle

if TYPE_CHECKING:
    import onnxruntime

MIN_SQNR_DB = 60.0  # the same kernels on the same machine: only the order of sums may differ

_CONFIG = "required_operators_and_types.config"  # as ONNX Runtime's own tool calls it
_PROVIDERS = {
    "NNAPI": None,
    "CoreML NeuralNetwork": "coreml_supported_neuralnetwork_ops.md",
    "CoreML MLProgram": "coreml_supported_mlprogram_ops.md",
}


@dataclass(frozen=True)
class Usability:
    """What one accelerator's execution provider could take, by ONNX Runtime's own checker.

    verdict: whether it is worth a try: "yes", "maybe" or "no". fixed: the same if all shapes
    were fixed. missing: operators that it cannot take.
    """

    provider: str
    verdict: str
    fixed: str
    nodes: int
    taken: int
    partitions: int
    missing: tuple[str, ...]

    def words(self) -> str:
        """One line for people."""
        parts = count(self.partitions, "part")
        text = f"{self.verdict}: {self.taken} of {self.nodes} nodes in {parts}"
        if self.fixed != self.verdict:
            text += f" ({self.fixed} with fixed shapes)"
        return text + (f"; it lacks {', '.join(self.missing)}" if self.missing else "")


@dataclass(frozen=True)
class Mobile:
    """A bundle's graph in ONNX Runtime's format, and what was found out.

    ort_bytes: its size. operators: of a reduced build. equal: its outputs for the golden
    sample are the bundle's, bit for bit; sqnr_db: of the worst output.
    """

    ort_bytes: int
    bundle_bytes: int
    operators: tuple[str, ...]
    equal: bool
    sqnr_db: float
    usability: tuple[Usability, ...]
    libraries: tuple[Library, ...]
    written: tuple[pathlib.Path, ...] = ()

    def facts(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "ort_bytes": self.ort_bytes,
            "bundle_bytes": self.bundle_bytes,
            "operators": list(self.operators),
            "same_outputs": self.equal,
            "sqnr_db": round(self.sqnr_db, 1),
            "usability": {u.provider: u.words() for u in self.usability},
            "libraries": [
                {
                    "path": str(library.path),
                    "arch": library.arch,
                    "aligned_to": library.align_bytes,
                    "loads_with_16k_pages": library.loads_with_16k_pages,
                }
                for library in self.libraries
            ],
            "written": [str(path) for path in self.written],
        }


def check_mobile(
    path: pathlib.Path,
    libraries: Sequence[pathlib.Path] = (),
    output: pathlib.Path | None = None,
) -> Mobile:
    """Convert a bundle for arm64 phones, and check it and the libraries of an app.

    output: a folder for NAME.ort and NAME.required_operators_and_types.config.
    Raises TargetMismatchError for a bundle of another instruction set, BundleError if the
    graph cannot be converted or computes something else then, SourceError for a file that is
    no library, OutputError if the output cannot be written.
    """
    bundle = read_bundle(path)
    if bundle.manifest.target.arch != "arm64":
        raise TargetMismatchError(
            f"bundle {path}: built for {bundle.manifest.target.arch}; phones are arm64: build it "
            "with --target android"
        )
    checked = tuple(read_library(library) for library in libraries)
    with tempfile.TemporaryDirectory(prefix="edgec-") as name:
        converted = pathlib.Path(name) / f"{path.stem}.ort"
        _convert(bundle, converted)
        equal, sqnr_db = _compare(bundle, converted)
        config = _required_operators(converted)
        files = (converted, config)
        return Mobile(
            ort_bytes=converted.stat().st_size,
            bundle_bytes=bundle.size,
            operators=_operators(config.read_text(encoding="utf-8"), bundle),
            equal=equal,
            sqnr_db=sqnr_db,
            usability=_usability(bundle),
            libraries=checked,
            written=_copied(files, output) if output is not None else (),
        )


def _options(bundle: Bundle) -> onnxruntime.SessionOptions:
    """A session as the bundle's manifest says; options that depend on the CPU are left to it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for key, value in bundle.manifest.session.config.items():
        options.add_session_config_entry(key, value)
    return options


def _convert(bundle: Bundle, goal: pathlib.Path) -> None:
    """Write the graph in ONNX Runtime's format, optimized as on an arm64 CPU.

    As onnxruntime.tools.convert_onnx_models_to_ort does for the platform "arm", with the
    bundle's own options on top.
    """
    import onnxruntime

    session, options = bundle.manifest.session, _options(bundle)
    folder = str(bundle.path.parent)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    if "session.qdqisint8allowed" not in session.config:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.optimized_model_filepath = str(goal)
    disabled = [*session.disabled_optimizers, "NchwcTransformer"]  # laid out for this CPU
    try:
        onnxruntime.InferenceSession(
            bundle.graph(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=disabled,
        )
    except Exception as error:  # onnxruntime's errors derive from Exception alone
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise BundleError(
            f"bundle {bundle.path}: ONNX Runtime cannot convert it: {' '.join(str(error).split())}"
        ) from error


def _compare(bundle: Bundle, converted: pathlib.Path) -> tuple[bool, float]:
    """Whether the golden sample gives the same bits, and the SQNR of the worst output."""
    import numpy as np
    import onnxruntime

    model = edgec_runtime.load(bundle.path, threads=1, any_target=True)
    feeds = golden.golden_inputs(bundle)
    expected = model(**feeds)
    session = onnxruntime.InferenceSession(
        str(converted), _options(bundle), providers=["CPUExecutionProvider"]
    )
    outputs = dict(zip(expected, session.run(list(expected), feeds), strict=True))
    equal = all(np.array_equal(expected[name], outputs[name]) for name in expected)
    worst = min(golden.sqnr_db(expected[name], outputs[name]) for name in expected)
    if not equal and worst < MIN_SQNR_DB:
        raise BundleError(
            f"bundle {bundle.path}: in ONNX Runtime's format it computes something else "
            f"({worst:.1f} dB, expected {MIN_SQNR_DB:.0f}); ship the bundle itself"
        )
    return equal, worst


def _required_operators(converted: pathlib.Path) -> pathlib.Path:
    """The configuration of a build with only the operators and types that the graph needs."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    config = converted.with_suffix(f".{_CONFIG}")
    create_config_from_models([converted], config, enable_type_reduction=True)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace(str(converted), converted.name), encoding="utf-8")
    return config


def _operators(config: str, bundle: Bundle) -> tuple[str, ...]:
    """ "domain::operator" of every line ``domain;opset;operator{types},...``, sorted."""
    found = set()
    for line in config.splitlines():
        if line.startswith("#") or line.count(";") < 2:
            continue
        domain, _, names = line.split(";", 2)
        depth, name = 0, ""
        for letter in f"{names},":
            depth += (letter == "{") - (letter == "}")
            if letter == "," and not depth:
                found.add(f"{domain}::{name}")
                name = ""
            elif not depth and letter != "}":
                name += letter
    blocked = sorted(name for name in found if name.startswith("com.microsoft.nchwc"))
    if blocked:
        raise BundleError(
            f"bundle {bundle.path}: its graph holds {blocked[0]}, laid out for one kind of CPU"
        )
    return tuple(sorted(found))


def _usability(bundle: Bundle) -> tuple[Usability, ...]:
    import onnx
    from onnxruntime.tools.mobile_helpers import usability_checker as checker

    model = onnx.load_from_string(bundle.graph())
    model = onnx.shape_inference.infer_shapes(model)  # its own operators stay without shapes
    inferred = bool(model.graph.value_info)  # else the checker does not look at shapes
    found = []
    for name, listed in _PROVIDERS.items():
        parts = []
        for require_fixed in (inferred, False):
            if listed is None:
                parts.append(checker.check_nnapi_partitions(model, require_fixed))
            else:
                parts.append(checker.check_coreml_partitions(model, require_fixed, listed))
        present, fixed = parts
        found.append(
            Usability(
                provider=name,
                verdict=present.suitability().name.lower(),
                fixed=fixed.suitability().name.lower(),
                nodes=present.num_nodes,
                taken=present.num_supported_nodes,
                partitions=present.num_partitions,
                missing=tuple(sorted(present.unsupported_ops)),
            )
        )
    return tuple(found)


def _copied(files: Sequence[pathlib.Path], output: pathlib.Path) -> tuple[pathlib.Path, ...]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        return tuple(pathlib.Path(shutil.copy(file, output / file.name)) for file in files)
    except OSError as error:
        raise OutputError(
            f"cannot write to {output}: {error.strerror or error}; choose another folder"
        ) from error
