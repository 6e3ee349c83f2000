"""Reports as a build would write them, with figures that were made up."""

from __future__ import annotations

import math

from edgec.report import (
    BOTH,
    Confidence,
    Disturbance,
    Layer,
    Measurement,
    Metric,
    Parity,
    Promise,
    Report,
    Robustness,
    Side,
    Skipped,
    Slice,
    Slices,
    Step,
)

HOSTILE = '/block/<script>alert("1")</script>/[red]Conv[/red]\x1b[2J\u202e$x_1$'


def full_report(layers: int = 50, *, is_target: bool = False) -> Report:
    """An image classifier for arm64 with every field filled and one promise of each outcome."""
    return Report(
        name="efficientnet_lite0",
        target="arm64",
        source="examples/efficientnet.py:build",
        edgec_version="0.1.0",
        size_bytes=5_012_480,
        reference=Side(18_629_120, 14.82),
        bundle=Side(5_012_480, 6.71),
        judged_on="48 photographs, none of them used for calibration",
        samples=48,
        agreement=0.97917,
        agreement_rule="same class first",
        sqnr_db=24.31,
        speedup=2.2086,
        metric=Metric("top1", 0.7917, 0.7708, 0.0209),
        slices=Slices(
            "light",
            "top1",
            30,
            (
                Slice(HOSTILE, 31, 0.8065, 0.6129, 0.1936, 0.072, True),
                Slice("", 32, 0.75, 0.71875, 0.03125, 0.03, True, pooled=4),
                Slice("dusk", 8, 0.875, 0.875, 0.0, None, False),
                Slice("fog", 1, math.nan, math.nan, math.nan, None, False),
            ),
        ),
        robustness=Robustness(
            metric="top1",
            samples=48,
            input="image",
            epsilon=0.0157,
            low=-0.9922,
            high=1.0,
            range_from="the image preprocessing",
            gradients=BOTH,
            floor=0.0,
            rows=(
                Disturbance("none", 0.7917, 0.7708, 0.0209, 0.02),
                Disturbance("pgd", 0.25, 0.125, 0.125, 0.05),
                Disturbance("noise", 0.7, 0.69, 0.01, None),
            ),
        ),
        confidence=Confidence(15, 48, 0.031, 0.052, 0.82, 0.79, 0.7917, 0.7708),
        parity=Parity(3.1e-6, 118.4, 8),
        measured_on=Measurement("Intel Xeon", "x86_64", 1, 60, is_target),
        steps=(
            Step("cleanup", {}, True, 0.41, 118, 18_587_332, None, 14.6),
            Step("fuse", {}, True, 0.62, 49, 18_571_004, 142.2, 13.9),
            Step(
                "quantize-static",
                {"per_channel": True, "skip": ["/stem/Conv"]},
                False,
                38.7,
                62,
                4_871_220,
                24.31,
                6.94,
                ("a channel has a range 40 times its neighbours'",),
            ),
        ),
        skipped=(
            *(Skipped("quantize-static", f"/b{i}/Sigmoid", "no int8 kernel") for i in range(13)),
            Skipped("fuse", HOSTILE, "bounds are <not> constant"),
        ),
        layers=tuple(
            Layer(
                HOSTILE if i == 3 else f"/blocks.{i // 4}/blocks.{i // 4}.{i % 4}/conv_dw/Conv",
                "Conv",
                40.0 - 16.0 * i / layers + 9.0 * math.sin(12.9898 * i) - 26.0 * (i == 23),
            )
            for i in range(layers)
        ),
        promises=(
            Promise("max-drop", 0.02, 0.0209, False, "top1 dropped"),
            Promise("max-size-mb", 5.5, 5.01248, True),
            Promise("min-speedup", 1.7, None, False, "this machine is no arm64 device"),
        ),
        findings=("The bundle is 1.9 % golden input.",),
        bundle_path="build/efficientnet_lite0.arm64.edgec",
        bundle_sha256="9f2c" * 16,
        build_seconds=64.2,
    )


def minimal_report() -> Report:
    """Nothing measured but the sizes."""
    return Report("model", "web", "model.onnx", "0.1.0", 1200, Side(2400), Side(1200), "", 0)
