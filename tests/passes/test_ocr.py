"""A mobile text recogniser in int8: what a build, and ``recover``, keep of it, and its speed."""

from __future__ import annotations

import pathlib
import sys

import pytest
from fixtures import models, text_lines

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

_LINES = 300  # standard error 1.2 points; of a difference on the same lines about 0.9


@pytest.mark.slow
def test_the_recogniser_keeps_its_lines_and_is_faster_and_smaller(tmp_path: pathlib.Path) -> None:
    models.require_ocr_recogniser_path()
    lines = text_lines.require_lines(_LINES, 4242)
    import ocr

    calibration = text_lines.render(ocr.CALIBRATION_LINES, 77)
    found = ocr.compare(tmp_path, lines=lines, calibration=calibration, rounds=60)
    rows = {row.model: row for row in found}
    for name in ("edgec build", "edgec build with recover"):
        row, reference = rows[name], rows["float32"]
        # wanted are 3 points at most; two standard errors of the difference on top
        assert row.exact > reference.exact - 3.0 - 1.8, name
        assert row.ratio < 0.75, name
        assert row.size_mb < 3.4, name
    assert rows["edgec build"].build_cpu_s < 90
