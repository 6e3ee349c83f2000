"""Files of other people's packages through the whole build: the small ones of the benchmark.

Speed is left to benchmarks/third_party.py: a busy machine would make it a coin toss here.
"""

import importlib.util
import pathlib
import sys

import pytest
from fixtures.locate import REPOSITORY


@pytest.fixture(scope="module")
def third_party():
    """benchmarks/third_party.py, which is no package."""
    folder = str(REPOSITORY / "benchmarks")
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location("third_party", f"{folder}/third_party.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["third_party"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)


def _row(third_party, name):
    [file] = [file for file in third_party.FILES if file.name == name]
    # no cache: what is not installed is not fetched by a test
    if third_party.installed(file, pathlib.Path("no-cache")) is None:
        pytest.skip(
            f"{file.package} is not installed; run: python tests/fixtures/install.py --test"
        )
    row = third_party.compiled(file, pathlib.Path("no-cache"), "x86-64", seconds=0.1)
    if row.outcome.startswith("not run"):
        pytest.skip(row.outcome)
    return row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rapidocr-cls", "magika", "silero-vad-ifless", "silero-vad-op15"])
def test_a_third_partys_file_is_compiled_and_agrees(third_party, name):
    row = _row(third_party, name)
    assert row.speed is not None, row.outcome
    # which recipe is fastest is the machine's to say: 18 dB and more; a wrong graph is far below
    assert row.sqnr_db > 15.0
    if name in ("rapidocr-cls", "magika"):  # classifiers; 16 samples, of which some lie at ties
        assert row.agreement > 0.8


def test_a_model_that_returns_maps_is_refused_with_advice(third_party):
    row = _row(third_party, "logreg-iris")
    assert row.outcome.startswith("refused: ")
    assert "output 'probabilities' holds a map" in row.outcome
    assert "zipmap" in row.outcome
