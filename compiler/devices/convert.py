"""Devices on which nothing can be run from here: Apple's, whose Core ML needs Apple's systems.

Two things are found out, and no more is claimed: which nodes ONNX Runtime's Core ML provider
takes, by ONNX Runtime's own list of operators, and whether Apple's converter accepts the
graph (``edgec.devices.coreml``, in a process with the converter's environment).

Left out on purpose: the conditions on single operators (constant biases, ranks of
convolutions), which the list states in prose only.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from edgec.devices.job import Device, Job, Outcome, last_line
from edgec.devices.local import clean_environment, execute
from edgec.errors import DeviceError
from edgec.targets import Profile
from edgec_runtime.bundle import read_bundle

_SITE = "site"  # folder of an environment
_OPERATORS = "coreml_supported_mlprogram_ops.md"  # of onnxruntime.tools.mobile_helpers
_FALLBACK = "CPUExecutionProvider"


class Converter(Device):
    """Checks bundles for a device without running them."""

    def __init__(self, profile: Profile, site: pathlib.Path) -> None:
        """site: folder for PYTHONPATH with Apple's converter."""
        self.profile = profile
        self._site = site

    def run(self, job: Job) -> Outcome:
        """What was found out, and no outputs. Raises DeviceError if the converter dies."""
        import onnxruntime

        bundle = read_bundle(job.bundle)
        with tempfile.TemporaryDirectory(prefix="edgec-") as name:
            folder = pathlib.Path(name)
            file = folder / "model.onnx"
            _write_graph(job.bundle, bundle.graph("main"), file)
            coverage = _coverage(file)
            converted = self._convert(file, folder / "outcome.json")
        engine = self.profile.providers[0]
        return Outcome(
            outputs=(),
            onnxruntime=onnxruntime.__version__,
            arch=self.profile.arch,
            os=self.profile.os[0],
            features=self.profile.features,
            providers=self.profile.providers,
            load_ms=0.0,
            latency_ms=(),
            nodes={engine: coverage.taken, _FALLBACK: coverage.nodes - coverage.taken},
            checked=f"not executed: {coverage.in_words(engine)}; {converted}",
        )

    def _convert(self, file: pathlib.Path, outcome: pathlib.Path) -> str:
        """What Apple's converter said, in words."""
        if importlib.util.find_spec("torch") is None:
            return "not converted, since PyTorch is not installed"
        environment = {**clean_environment(), "PYTHONPATH": str(self._site)}
        command = [sys.executable, "-m", "edgec.devices.coreml", str(file), str(outcome)]
        log = execute(command, environment, self.profile.name)
        try:
            table = json.loads(outcome.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DeviceError(
                f"device {self.profile.name}: no word of the converter: {last_line(log)}"
            ) from error
        if "error" in table:
            raise DeviceError(
                f"device {self.profile.name}: coremltools {table['version']} does not convert it: "
                f"{table['error']}; leave the named operator out of the model"
            )
        return f"coremltools {table['version']} converts it to {table['operations']} operations"


def open_converter(profile: Profile, folder: pathlib.Path) -> Converter:
    """The device. folder: its environment, with the converter in site/."""
    return Converter(profile, folder / _SITE)


@dataclass(frozen=True)
class _Coverage:
    """How many of the nodes an engine takes, in how many parts; operators that it does not."""

    nodes: int
    taken: int
    parts: int
    others: tuple[str, ...]

    def in_words(self, engine: str) -> str:
        text = f"{engine} takes {self.taken} of {self.nodes} nodes by their operators, in "
        text += "one part" if self.parts == 1 else f"{self.parts} parts"
        return f"{text}, and not {', '.join(self.others)}" if self.others else text


def _write_graph(bundle: pathlib.Path, graph: bytes, file: pathlib.Path) -> None:
    """The graph with its weights inside."""
    import onnx

    model = onnx.load_from_string(graph)
    onnx.load_external_data_for_model(model, str(bundle.parent))
    onnx.save(model, file)


def _coverage(file: pathlib.Path) -> _Coverage:
    from onnxruntime.tools.mobile_helpers.usability_checker import check_coreml_partitions
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo

    model = ModelProtoWithShapeInfo(file).model_with_shape_info
    found: Any = check_coreml_partitions(model, True, _OPERATORS)
    others = sorted(name.removeprefix("ai.onnx:") for name in found.unsupported_ops)
    return _Coverage(
        found.num_nodes, found.num_supported_nodes, found.num_partitions, tuple(others)
    )
