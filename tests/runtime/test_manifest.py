"""The manifest's JSON form; the refusals are in test_bundle_refusals.py."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

import pytest
from bundle_samples import sample_manifest

from edgec.targets import schema
from edgec_runtime import manifest
from edgec_runtime.errors import BundleError

FULL = sample_manifest(
    session=manifest.Session(
        threads=2,
        disabled_optimizers=("SkipLayerNormFusion",),
        config={"session.set_denormal_as_zero": "1"},
        without=MappingProxyType({"vnni": {"session.x64quantprecision": "1"}}),
    ),
    image=manifest.Image("x", (224, 224), crop=0.875),
    labels=("cat", "dog"),
    golden=(
        manifest.Golden(
            "main",
            "golden/i",
            "golden/o",
            (manifest.GoldenInput("x", "float32", (1, 8), "uint8", (1, 4), (1, 2), 0.1, -3.5),),
            (manifest.GoldenOutput("y", "float32", (1, 4), "float32", 4, 0, 1.25),),
            25.0,
        ),
    ),
    results={"agreement": 0.98, "judged_on": "300 photographs", "nested": {"a": [1, None]}},
    entries=(manifest.Entry("weights.bin", 4, "ab", 65536),),
)


@pytest.mark.parametrize("value", [FULL, sample_manifest()])
def test_it_survives_the_round_trip(value: manifest.Manifest) -> None:
    again = manifest.Manifest.from_json(value.to_json())
    assert again == value
    assert again.to_json() == value.to_json()


def test_the_json_is_canonical() -> None:
    raw = dataclasses.replace(FULL, labels=("ä",)).to_json()
    assert raw.startswith(b'{"edgec":"0.1.0","entries":[{"name":')
    assert b" " not in raw.replace(b"300 photographs", b"") and "ä".encode() in raw


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1}])
def test_results_that_are_no_json_are_refused(value: Any) -> None:
    with pytest.raises(BundleError, match="the manifest is not plain JSON"):
        dataclasses.replace(FULL, results={"a": value}).to_json()


def test_a_whole_number_may_stand_for_a_float() -> None:
    raw = FULL.to_json().replace(b'"min_sqnr_db":25.0', b'"min_sqnr_db":25')
    limit = manifest.Manifest.from_json(raw).golden[0].min_sqnr_db
    assert limit == 25.0 and isinstance(limit, float)


def test_a_manifest_is_frozen_all_the_way() -> None:
    again = manifest.Manifest.from_json(FULL.to_json())
    with pytest.raises(TypeError):
        again.graphs["other"] = again.graphs["main"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.version = 2  # type: ignore[misc]


def test_the_session_mirrors_that_of_the_targets() -> None:
    ours, theirs = dataclasses.asdict(manifest.Session()), dataclasses.asdict(schema.Session())
    assert ours == theirs


def test_the_known_dtypes_are_those_of_numpy_and_strings() -> None:
    import numpy as np

    assert [np.dtype(d).name for d in manifest.DTYPES if d != "string"] == [
        d for d in manifest.DTYPES if d != "string"
    ]
