"""The manifest's section ``generation``: its JSON form, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from bundle_samples import forge, sample_manifest
from language_samples import section, write_decoder

from edgec_runtime import bundle
from edgec_runtime.errors import BundleError
from edgec_runtime.generation import CachePair, Sampling
from edgec_runtime.manifest import Graph, Manifest, Value

CACHE = ("batch", 2, "past", 16)
GRAPH = Graph(
    "graph.onnx",
    (
        Value("ids", "int64", ("batch", "new")),
        Value("mask", "int64", ("batch", "total")),
        Value("past.key", "float32", CACHE),
        Value("past.value", "float32", CACHE),
    ),
    (
        Value("logits", "float32", ("batch", "new", 260)),
        Value("key", "float32", CACHE),
        Value("value", "float32", CACHE),
    ),
)


def table(**changes: Any) -> Any:
    manifest = sample_manifest(graphs={"main": GRAPH}, generation=section(**changes))
    return json.loads(manifest.to_json())


def read(table: Any) -> Manifest:
    return Manifest.from_json(json.dumps(table).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache": "shared", "bos": None, "eos": (), "prompt_chunk": 1},
        {"tokenizer": None, "chat_template": None, "special_tokens": {}},
        {"sampling": Sampling(0.6, 50, 0.9, 0.05, 1.1)},
    ],
)
def test_it_survives_the_round_trip(changes: dict[str, Any]) -> None:
    manifest = sample_manifest(graphs={"main": GRAPH}, generation=section(**changes))
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.to_json() == manifest.to_json()


def test_without_it_the_manifest_is_as_it_was() -> None:
    raw = sample_manifest().to_json()
    assert b"generation" not in raw
    assert Manifest.from_json(raw).generation is None


def test_its_json_is_what_the_documentation_says() -> None:
    assert table()["generation"] == {
        "ids": "ids",
        "mask": "mask",
        "positions": None,
        "logits": "logits",
        "pairs": [
            {"past": "past.key", "present": "key"},
            {"past": "past.value", "present": "value"},
        ],
        "cache": "growing",
        "eos": [257],
        "pad": 0,
        "bos": 256,
        "context_length": 96,
        "prompt_chunk": 128,
        "sampling": {
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        },
        "tokenizer": "tokenizer.json",
        "chat_template": "chat_template.jinja",
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
    }


def _set(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(table: Any) -> None:
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("ids", value=1), "generation: ids is 1, expected str"),
        (_set("cache", value="paged"), "cache is 'paged', expected one of"),
        (_set("colour", value=1), "generation: unknown key 'colour'"),
        (lambda g: g.pop("eos"), "generation: missing key 'eos'"),
        (_set("sampling", "top_p", value=2), "generation: sampling.top_p is 2.0, expected"),
        (_set("sampling", "topk", value=2), "unknown key 'topk', did you mean 'top_k'"),
        (_set("pairs", value=[]), "pairs is empty; expected the inputs and outputs"),
        (_set("context_length", value=0), "context_length is 0, expected 1 or more"),
        (_set("prompt_chunk", value=0), "prompt_chunk is 0, expected 1 or more"),
        (_set("tokenizer", value=None), "a chat_template and no tokenizer; expected both"),
        (_set("ids", value="input"), "names the input 'input', which the graph main lacks"),
        (_set("logits", value="scores"), "names the output 'scores', which the graph main lacks"),
        (_set("positions", value="ids"), "it names an input twice"),
        (_set("pairs", 0, "present", value="value"), "it names an output twice"),
        (lambda g: g["pairs"].pop(), "the input 'past.value' of the graph main has no part in it"),
        (_set("eos", value=[260]), "eos has the token 260, expected 0 to 259"),
        (_set("pad", value=-1), "pad has the token -1, expected 0 to 259"),
        (_set("bos", value=999), "bos has the token 999"),
    ],
)
def test_a_section_that_is_wrong(change: Callable[[Any], Any], message: str) -> None:
    wrong = table()
    change(wrong["generation"])
    with pytest.raises(BundleError, match=message):
        read(wrong)


@pytest.mark.parametrize(
    ("side", "number", "key", "value", "message"),
    [
        ("inputs", 0, "dtype", "float32", r"'ids' is float32 .*, expected int64 or int32 \[batch"),
        ("inputs", 1, "shape", [4], r"'mask' is int64 \[4\], expected int64 or int32 \[batch"),
        ("inputs", 2, "shape", [1, 2, 3], r"'past.key' of the cache has the shape \[1, 2, 3\]"),
        ("inputs", 2, "shape", [1, "h", 3, 4], "expected fixed numbers of heads and head size"),
        ("outputs", 1, "dtype", "float16", "'past.key' is float32, the output 'key' float16"),
        ("outputs", 0, "shape", [1, 260], r"expected \[batch, tokens, vocabulary\]"),
    ],
)
def test_a_graph_that_does_not_fit(
    side: str, number: int, key: str, value: Any, message: str
) -> None:
    wrong = table()
    wrong["graphs"]["main"][side][number][key] = value
    with pytest.raises(BundleError, match=message):
        read(wrong)


def test_a_section_without_the_graph_main_is_refused() -> None:
    wrong = table()
    wrong["graphs"] = {"decode": wrong["graphs"]["main"]}
    with pytest.raises(BundleError, match="generation: there is no graph 'main'"):
        read(wrong)


def test_a_missing_tokenizer_file(tmp_path: pathlib.Path) -> None:
    made = table()

    def change(sample: Any) -> None:
        sample |= {"generation": made["generation"], "graphs": made["graphs"]}

    path = forge(tmp_path / "a", change)
    with pytest.raises(BundleError, match="'tokenizer.json' that manifest.json names is missing"):
        bundle.read_bundle(path)


def test_ids_of_an_unknown_vocabulary_are_not_checked_above() -> None:
    free = table()
    free["graphs"]["main"]["outputs"][0]["shape"][2] = "vocabulary"
    free["generation"]["eos"] = [100_000]
    assert read(free).generation is not None


def test_a_written_bundle_has_it(tmp_path: pathlib.Path) -> None:
    read_back = bundle.read_bundle(write_decoder(tmp_path / "a"))
    assert read_back.manifest.generation == section()
    assert read_back.read("chat_template.jinja").startswith(b"{{ bos_token }}")
    changed = dataclasses.replace(section(), pairs=(CachePair("past.key", "key"),))
    with pytest.raises(BundleError, match="'past.value' of the graph main has no part"):
        write_decoder(tmp_path / "b", changed)
