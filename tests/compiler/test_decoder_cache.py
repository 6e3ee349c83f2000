"""A decoder whose cache is int8, from a Hugging Face directory to its answers."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import tiny_language

import edgec
import edgec_runtime
from edgec.errors import PassError

RECIPE = "cleanup,fuse,lower,quantize-cache"
PROMPT = [7, 100, 42, 9]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_language.save_language_model(folder / "model")
    (folder / "text.txt").write_text(tiny_language.TEXT * 20, encoding="utf-8")
    return folder


def build(folder: pathlib.Path, output: pathlib.Path, **rest: Any) -> edgec.Report:
    options = {"target": "x86-64", "recipe": RECIPE, "calibration": folder / "text.txt", **rest}
    return edgec.build(
        folder / "model", output=output, verify=False, keep_reference=False, **options
    )


@pytest.mark.slow
def test_it_is_judged_answers_and_is_built_again_from_its_lock(
    llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    report = build(llama, tmp_path / "a.edgec")
    step = report.steps[-1]
    assert step.name == "quantize-cache" and step.changed == 2
    assert step.findings == ("4 caches are int8, a quarter of their size in float32",)
    assert report.agreement is not None and report.agreement > 0.8  # of a random model's tokens
    model = edgec_runtime.load(tmp_path / "a.edgec")
    plain = build(llama, tmp_path / "b.edgec", recipe="cleanup,fuse,lower")
    exact = edgec_runtime.load(plain.bundle_path)
    assert model.self_test().passed
    feeds = {
        "input_ids": np.array([PROMPT]),
        "attention_mask": np.ones((1, 4), np.int64),
        "position_ids": np.arange(4)[None],
    }
    for value in model.inputs:
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    rounded, expected = (m(**feeds)["logits"] for m in (model, exact))
    assert 0 < np.abs(rounded - expected).max() < 0.05 * np.abs(expected).max()
    assert len(model.generate([PROMPT, PROMPT[:2]], max_new_tokens=20)) == 2
    lock = tmp_path / "a.lock.json"
    build(llama, tmp_path / "c.edgec", recipe=None, lock=lock)
    assert (tmp_path / "c.edgec").read_bytes() == (tmp_path / "a.edgec").read_bytes()


def test_without_text_it_says_what_it_needs(llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(PassError, match="quantize-cache needs calibration data"):
        build(llama, tmp_path / "a.edgec", calibration=None)
    assert not list(tmp_path.iterdir())
