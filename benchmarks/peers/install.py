"""Makes one Python environment per peer, with pinned versions.

    python benchmarks/peers/install.py [--into .peers] [ENVIRONMENT ...]

No CUDA: torch is the CPU build wherever the package index at hand has it, and packages that
would pull in more are installed without their dependencies, which are listed instead. An
environment that cannot be made leaves its reason in ENVIRONMENT.failed; the benchmark shows
it in the rows of that peer. Some 6 GB in all.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_DEFAULT = pathlib.Path(__file__).resolve().parents[2] / ".peers"


@dataclass(frozen=True)
class Environment:
    """with_dependencies is installed first; alone after it, without dependencies."""

    with_dependencies: Sequence[str]
    alone: Sequence[str] = ()


_TORCH = "torch==2.13.0"
ENVIRONMENTS: Mapping[str, Environment] = {
    # NNCF for both runtimes, and OpenVINO
    "openvino": Environment(
        ("nncf==3.4.0", "openvino==2026.4.1", "onnx==1.23.2", "onnxruntime==1.31.1")
    ),
    # replaces plain onnxruntime: the two cannot share an environment
    "ort-openvino": Environment(("onnxruntime-openvino==1.24.1", "numpy==2.4.6")),
    "aimet": Environment((_TORCH, "aimet-onnx==2.42.0")),
    # litert-torch asks for packages of language models that a conversion never imports
    "litert": Environment(
        (_TORCH, "numpy==2.4.6", "ai-edge-litert==2.3.0", "torchao==0.18.0", "xdsl==0.28.0")
        + ("scipy", "jax", "absl-py", "immutabledict", "jaxtyping", "multipledispatch")
        + ("flatbuffers", "protobuf", "tabulate", "safetensors", "rich", "fire", "packaging"),
        ("litert-torch==0.10.0", "litert-converter==0.5.0", "ai-edge-quantizer==0.10.0"),
    ),
    "executorch": Environment((_TORCH, "executorch==1.5.1")),
    # language models; llama.cpp is compiled here, for this CPU
    "llama-cpp": Environment(("llama-cpp-python==0.3.36", "numpy==2.4.6")),
    "genai": Environment(  # its model builder imports classes of transformers 5
        (_TORCH, "onnxruntime==1.31.1", "onnxruntime-genai==0.18.0", "transformers==5.23.0")
        + ("onnx==1.23.2", "onnx-ir==1.1.0", "numpy==2.4.6", "accelerate==1.15.0"),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--into", type=pathlib.Path, default=_DEFAULT, help="folder for them")
    parser.add_argument("names", nargs="*", choices=[*ENVIRONMENTS, []], help="default: all")
    asked = parser.parse_args()
    failures = 0
    for name in asked.names or ENVIRONMENTS:
        reason = make(ENVIRONMENTS[name], asked.into / name)
        note = asked.into / f"{name}.failed"
        if reason:
            failures += 1
            note.write_text(reason, encoding="utf-8")
            print(f"{name}: {reason}", file=sys.stderr)
        else:
            note.unlink(missing_ok=True)
            print(f"{name}: ready in {asked.into / name}")
    return min(failures, 1)


def make(environment: Environment, folder: pathlib.Path) -> str:
    """Make the environment anew; the reason if it cannot be made, else nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    for packages, options in (
        (environment.with_dependencies, []),
        (environment.alone, ["--no-deps"]),
    ):
        if not packages:
            continue
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        ran = subprocess.run([*command, *options, *packages], capture_output=True, text=True)
        if ran.returncode:
            errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
            return (errors or ran.stderr.splitlines() or ["pip failed"])[-1]
    return ""


if __name__ == "__main__":
    sys.exit(main())
