from __future__ import annotations

import dataclasses

import pytest
from made_up_report import minimal_report

from edgec.bench import Timing
from edgec.build_report import with_latency
from edgec.report import Measurement, Step


@pytest.mark.parametrize(
    ("changed", "advice"), [(3, "leave quantization out"), (0, "nothing was quantized")]
)
def test_a_slower_bundle_is_told_with_advice_that_fits(changed: int, advice: str) -> None:
    step = Step("quantize-static", {}, lossless=False, seconds=1.0, changed=changed, size_bytes=1)
    timings = {
        name: Timing(name, median_ms, median_ms, median_ms, runs=11, taken_ms=(median_ms,) * 11)
        for name, median_ms in (("reference", 1.0), ("bundle", 1.5))
    }
    machine = Measurement(cpu="CPU", arch="x86_64", threads=1, runs=11, is_target=True)
    report = dataclasses.replace(minimal_report(), steps=(step,), findings=())
    (finding,) = with_latency(report, timings, machine).findings
    assert "SLOWER" in finding and advice in finding
