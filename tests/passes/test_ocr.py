"""A mobile text recogniser in int8: what a build, and ``recover``, keep of it, and its speed."""

from __future__ import annotations

import pathlib
import sys

import pytest
from fixtures import models, text_lines

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

_LINES = 300  # standard error 1.2 points; of a difference on the same lines about 0.9


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    models.require_ocr_recogniser_path()
    lines = text_lines.require_lines(_LINES, 4242)
    import ocr

    found = ocr.compare(
        tmp_path_factory.mktemp("ocr"),
        lines=lines,
        calibration=text_lines.render(ocr.CALIBRATION_LINES, 77),
        rounds=60,
    )
    return {row.model: row for row in found}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["edgec build", "edgec build with recover"])
def test_the_recogniser_keeps_its_lines_and_is_faster_and_smaller(rows, model) -> None:
    row, reference = rows[model], rows["float32"]
    # wanted are 3 points at most; two standard errors of the difference on top
    assert row.exact > reference.exact - 3.0 - 1.8
    assert row.ratio < 0.75
    assert row.size_mb < 3.4


@pytest.mark.slow
def test_the_build_takes_less_than_ninety_seconds_of_cpu(rows) -> None:
    assert rows["edgec build"].build_cpu_s < 90
