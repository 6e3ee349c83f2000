"""What bundles lose on other engines than ONNX Runtime's CPU provider, by recipe.

    edgec devices install openvino qnn-htp
    EDGEC_FIXTURES=... python benchmarks/accelerators.py [efficientnet] [minilm]

EfficientNet-Lite0 and MiniLM, the latter cut to 32 tokens: the emulator of the NPU is slow.
One line per model, target and recipe: SQNR against float32 on the engine and on this
machine, and how many nodes the engine took. No times: an emulator's mean nothing.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from dataclasses import replace

import kinds
import numpy as np

import edgec
from edgec.devices.check import Samples, verify_on
from edgec.targets import load_target

CALIBRATION, JUDGED, TOKENS = 24, 8, 32
STATIC = ("cleanup", "fuse", "quantize-static", "lower")
HALF = ("cleanup", "fuse", "convert-float16", "lower")
NPU = load_target("qualcomm-npu")
CASES = (  # words for the row, target, recipe, device
    ("OpenVINO, 8-bit activations", load_target("x86-64-openvino"), STATIC, "openvino"),
    ("NPU, 16-bit activations", NPU, STATIC, "qnn-htp"),
    (
        "NPU, 8-bit activations",
        replace(NPU, name="npu-u8", int8=replace(NPU.int8, activation="uint8")),
        STATIC,
        "qnn-htp",
    ),
    ("NPU, half precision", NPU, HALF, "qnn-htp"),
)


def given(kind: str) -> tuple[edgec.Source, list[kinds.Feeds], list[kinds.Feeds]]:
    """A model, its calibration feeds and those that it is judged on."""
    if kind == "efficientnet":
        source, calibration, samples = kinds.efficientnet(CALIBRATION, JUDGED)
        return source, list(calibration()), samples
    source, _, samples = kinds.minilm(0, CALIBRATION + JUDGED)
    cut = [{name: array[:, :TOKENS].copy() for name, array in feeds.items()} for feeds in samples]
    source = replace(source, example_inputs=tensors(cut[0]))
    return source, cut[:CALIBRATION], cut[CALIBRATION:]


def tensors(feeds: kinds.Feeds) -> dict[str, object]:
    """Feeds as torch's tensors."""
    import torch

    return {name: torch.from_numpy(np.asarray(array)) for name, array in feeds.items()}


def main(names: list[str]) -> None:
    """Build, run and print."""
    for kind in names or ["efficientnet", "minilm"]:
        source, calibration, judged = given(kind)
        for words, target, recipe, device in CASES:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "model.edgec")
                edgec.build(
                    source,
                    target=target,
                    output=path,
                    calibration=lambda feeds=calibration: iter(feeds),
                    evaluation=lambda feeds=judged: iter(feeds),
                    recipe=recipe,
                    verify=False,
                )
                [verdict] = verify_on(path, [device], Samples(tuple(judged[:1]), len(judged)))
            facts = verdict.facts()
            keys = ("status", "reason", "sqnr_db", "sqnr_here_db", "nodes")
            print(kind, "|", words, "|", {key: facts.get(key) for key in keys}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
