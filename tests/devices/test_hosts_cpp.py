"""The example in C++ names in a picture what Python names, and refuses other devices' bundles."""

from __future__ import annotations

import pathlib
import re
import subprocess
from typing import Any

import numpy as np
from bundle_samples import onnx_bytes, write_sample
from devices import host_programs
from onnx import helper

import edgec_runtime
from edgec.devices.wine import HOSTS
from edgec_runtime import manifest


def _colours(path: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A classifier of pictures by their mean colour."""
    image = helper.make_tensor_value_info("image", 1, [1, 3, 24, 32])
    logits = helper.make_tensor_value_info("logits", 1, [1, 3])
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    graph = manifest.Graph(
        "graph.onnx",
        (manifest.Value("image", "float32", (1, 3, 24, 32)),),
        (manifest.Value("logits", "float32", (1, 3)),),
    )
    means, deviations = (120.5, 110.0, 100.0), (58.5, 57.0, 57.25)
    return write_sample(
        path,
        {"graph.onnx": onnx_bytes(nodes, [image], [logits], [])},
        **{
            "graphs": {"main": graph},
            "image": manifest.Image("image", (24, 32), 0.875, means, deviations),
            "labels": ("red", "grün", 'blue "deep"'),
            **changes,
        },
    )


def _example(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """examples/cpp/classify.cpp, compiled in ``folder`` and run."""
    example = pathlib.Path(__file__).parents[2] / "examples" / "cpp"
    objects = [str(HOSTS / f"edgec_{name}.c") for name in ("machine", "model")]
    include = ["-isystem", str(host_programs.include_folder()), f"-I{HOSTS}"]
    reader = folder / "reader.o"
    host_programs.compile_program(
        ["cc", "-std=c11", "-O1", "-r", *include, *host_programs.READER, *objects], reader
    )
    command = ["c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *include]
    command += [str(example / "classify.cpp"), str(reader)]
    command += host_programs.library_options(folder)
    program = host_programs.compile_program(command, folder / "classify")
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def test_the_example_in_cpp_names_what_python_names(tmp_path: pathlib.Path) -> None:
    path, picture = _colours(tmp_path / "a.edgec"), tmp_path / "a.ppm"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    picture.write_bytes(b"P6\n60 50\n255\n" + pixels.tobytes())
    done = _example(tmp_path, str(path), str(picture))
    model = edgec_runtime.load(path)
    logits = model(**model.prepare_image(pixels))["logits"][0]
    shares = np.exp(logits) / np.exp(logits).sum()
    best = sorted(range(3), key=lambda i: -shares[i])
    expected = ", ".join(f"{model.labels[i]} {shares[i]:.0%}" for i in best)  # type: ignore[index]
    assert done.stdout == f"a.ppm: {expected}\n", done.stderr


def test_the_example_in_cpp_refuses_a_bundle_of_another_device(tmp_path: pathlib.Path) -> None:
    path = _colours(tmp_path / "a", target=manifest.Target("pi4", "armhf", ("linux",)))
    done = _example(tmp_path, str(path), "none.ppm")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"classify: bundle .*: built for pi4, this is .* on .*\n", done.stderr)
