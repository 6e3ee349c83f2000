"""The manifest's section ``state``: its JSON form, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from bundle_samples import sample_manifest
from language_samples import write_decoder
from state_samples import write_running_sum

from edgec_runtime import bundle
from edgec_runtime.errors import BundleError
from edgec_runtime.manifest import Graph, Manifest, Value
from edgec_runtime.state import StatePair

SHAPE = (1, "batch", 8)
GRAPH = Graph(
    "graph.onnx",
    (
        Value("x", "float32", ("batch", 4)),
        Value("h0", "float32", SHAPE),
        Value("c0", "float32", SHAPE),
    ),
    (
        Value("y", "float32", ("batch", 2)),
        Value("hn", "float32", SHAPE),
        Value("cn", "float32", (1, None, 8)),
    ),
)
PAIRS = (StatePair("h0", "hn", "float32", SHAPE), StatePair("c0", "cn", "float32", SHAPE))


def table() -> Any:
    return json.loads(sample_manifest(graphs={"main": GRAPH}, state=PAIRS).to_json())


def read(table: Any) -> Manifest:
    return Manifest.from_json(json.dumps(table).encode())


def test_it_survives_the_round_trip() -> None:
    manifest = sample_manifest(graphs={"main": GRAPH}, state=PAIRS)
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.to_json() == manifest.to_json()


def test_its_json_is_what_the_documentation_says() -> None:
    assert table()["state"][0] == {
        "input": "h0",
        "output": "hn",
        "dtype": "float32",
        "shape": [1, "batch", 8],
        "initial": "zeros",
    }


def test_without_it_the_manifest_is_as_it_was() -> None:
    raw = sample_manifest().to_json()
    assert b'"state"' not in raw
    assert Manifest.from_json(raw).state is None


def test_a_written_bundle_has_it(tmp_path: pathlib.Path) -> None:
    made = bundle.read_bundle(write_running_sum(tmp_path / "a")).manifest.state
    assert made == (StatePair("h", "hn", "float32", (1, "batch", 3)),)
    assert made[0].batch_axis == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "h"}, "it names the input 'h', which the graph main lacks"),
        ({"output": "h0"}, "it names the output 'h0', which the graph main lacks"),
        ({"input": "c0"}, "it names an input twice"),
        ({"output": "cn"}, "it names an output twice"),
        ({"dtype": "float16"}, r"says that the input 'h0' is float16 .* has float32 \[1, 'batch'"),
        ({"shape": [1, 2, 8]}, r"says that the input 'h0' is float32 \[1, 2, 8\]"),
        ({"initial": "ones"}, r"\[0\]: initial is 'ones', expected one of \('zeros',\)"),
        ({"axis": 1}, r"\[0\]: unknown key 'axis'"),
        ({"output": "y"}, r"the output 'y' is float32 .* expected the same"),
    ],
)
def test_a_wrong_pair_is_refused(changes: dict[str, Any], message: str) -> None:
    wrong = table()
    wrong["state"][0] |= changes
    with pytest.raises(BundleError, match=f"manifest.json: state.*{message}"):
        read(wrong)


def test_a_key_that_is_left_out_is_refused() -> None:
    wrong = table()
    del wrong["state"][0]["shape"]
    with pytest.raises(BundleError, match=r"state\[0\]: missing key 'shape'"):
        read(wrong)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (["layers", "batch", 8], "float32", "only one dimension of a state may have an open size"),
        ([1, "batch", 8], "string", "the input 'h0' holds text, expected numbers"),
        ([1, 1 << 20, 1 << 9], "float32", "'h0' has the shape .* which is over 1 GiB"),
    ],
)
def test_a_state_that_cannot_be_kept_is_refused(shape: list[Any], dtype: str, message: str) -> None:
    wrong = table()
    for place in (
        wrong["graphs"]["main"]["inputs"][1],
        wrong["graphs"]["main"]["outputs"][1],
        wrong["state"][0],
    ):
        place |= {"shape": shape, "dtype": dtype}
    with pytest.raises(BundleError, match=message):
        read(wrong)


def test_an_output_of_another_size_is_refused() -> None:
    wrong = table()
    wrong["graphs"]["main"]["outputs"][1]["shape"] = [2, "batch", 8]
    with pytest.raises(BundleError, match=r"the output 'hn' is float32 \[2, 'batch', 8\], the inp"):
        read(wrong)


def test_an_output_of_unknown_shape_is_taken() -> None:
    free = table()
    free["graphs"]["main"]["outputs"][1]["shape"] = []
    assert read(free).state is not None


def test_an_empty_section_is_refused() -> None:
    wrong = table()
    wrong["state"] = []
    with pytest.raises(BundleError, match="state: it is empty"):
        read(wrong)


def test_a_section_without_the_graph_main_is_refused() -> None:
    wrong = table()
    wrong["graphs"] = {"step": wrong["graphs"]["main"]}
    with pytest.raises(BundleError, match="state: there is no graph 'main'"):
        read(wrong)


def test_a_language_model_has_none(tmp_path: pathlib.Path) -> None:
    decoder = bundle.read_bundle(write_decoder(tmp_path / "a")).manifest
    made = dataclasses.replace(decoder, state=PAIRS)
    with pytest.raises(BundleError, match="a language model has the section generation instead"):
        Manifest.from_json(made.to_json())
