"""The devices that a run of the tests was given reach the workers of pytest-xdist.

They did not once, and every test on a device was skipped without a word.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

CONFTEST = pathlib.Path(__file__).resolve().parents[1] / "conftest.py"
SHOWN = "print(os.environ['EDGEC_DEVICES'], os.environ.get('EDGEC_TEST_DEVICES'))"


@pytest.mark.parametrize("given", [None, "/given"])
def test_a_worker_uses_the_devices_that_the_run_was_given(given: str | None) -> None:
    worker = f"import os, runpy; runpy.run_path({str(CONFTEST)!r}); {SHOWN}"
    first = (
        f"import runpy, subprocess, sys; runpy.run_path({str(CONFTEST)!r}); "
        f"subprocess.run([sys.executable, '-c', {worker!r}], check=True)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGEC_")}
    environment |= {} if given is None else {"EDGEC_DEVICES": given}
    done = subprocess.run(
        [sys.executable, "-c", first], env=environment, capture_output=True, text=True, check=True
    )
    elsewhere, for_devices = done.stdout.split()
    assert elsewhere.endswith("edgec-no-devices") and for_devices == str(given)
