"""Answers of models with an encoder, against the same sums computed from the beginning."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import encoder_samples as samples
import numpy as np
import pytest
from bundle_samples import sample_manifest, write_sample
from language_samples import write_decoder

import edgec_runtime
from edgec_runtime.bundle import read_bundle
from edgec_runtime.errors import BundleError, InputError
from edgec_runtime.manifest import Manifest

TEXTS = ([7, 100, 42], [3], [200, 201, 202, 203, 9, 9, 9])


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> edgec_runtime.Model:
    path = tmp_path_factory.mktemp("listener") / "a.edgec"
    return edgec_runtime.load(samples.write_encoder_decoder(path))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> edgec_runtime.Model:
    path = tmp_path_factory.mktemp("reader") / "a.edgec"
    return edgec_runtime.load(samples.write_encoder_decoder(path, "ids"))


# --- answers ------------------------------------------------------------------------------


def test_features_are_answered_token_by_token(listener: edgec_runtime.Model) -> None:
    given = samples.features(3)
    answers = [listener.generate(one, max_new_tokens=12) for one in given]
    assert [list(a.tokens) for a in answers] == [samples.answer(one, 12) for one in given]
    assert len({a.tokens for a in answers}) == 3  # they depend on what was read
    assert answers[0].prompt_tokens == len(samples.START)


def test_a_batch_is_one_array_or_a_list(listener: edgec_runtime.Model) -> None:
    given = samples.features(3)
    expected = [tuple(samples.answer(one, 6)) for one in given]
    for prompts in (given, list(given)):
        answers = listener.generate(prompts, max_new_tokens=6)
        assert [a.tokens for a in answers] == expected


def test_ids_are_padded_on_the_right_and_masked(reader: edgec_runtime.Model) -> None:
    expected = [tuple(samples.answer(ids, 8)) for ids in TEXTS]
    assert [reader.generate(ids, max_new_tokens=8).tokens for ids in TEXTS] == expected
    assert [a.tokens for a in reader.generate(list(TEXTS), max_new_tokens=8)] == expected
    one = reader.generate(np.array(TEXTS[0]), max_new_tokens=8)
    assert one.tokens == expected[0]


def test_a_text_is_encoded_and_the_answer_decoded(reader: edgec_runtime.Model) -> None:
    ids = reader.text.encode("hello")
    answer = reader.generate("hello", max_new_tokens=8)
    assert list(answer.tokens) == samples.answer(ids, 8)
    assert answer.text == reader.text.decode(answer.tokens)
    assert "".join(reader.generate("hello", max_new_tokens=8, stream=True)) == answer.text


def test_an_answer_starts_with_what_it_is_told(listener: edgec_runtime.Model) -> None:
    one = samples.features(1)[0]
    answer = listener.generate(one, max_new_tokens=8, start=[77])
    assert list(answer.tokens) == samples.answer(one, 8, start=[77])
    assert list(answer.tokens) != samples.answer(one, 8)
    assert listener.generate(one, max_new_tokens=8, start=np.array([77])).tokens == answer.tokens


def test_suppressed_tokens_are_no_choice(tmp_path: pathlib.Path) -> None:
    one = samples.features(1)[0]
    first, second, *_ = samples.answer(one, 8)
    generation = samples.encoder_section(suppress=(second,), begin_suppress=(first,))
    path = samples.write_encoder_decoder(tmp_path / "a", generation=generation)
    tokens = list(edgec_runtime.load(path).generate(one, max_new_tokens=8).tokens)
    assert tokens == samples.answer(one, 8, suppress=(second,), first=(first,))
    assert tokens[0] not in (first, second) and second not in tokens
    drawn = edgec_runtime.load(path).generate(one, max_new_tokens=8, temperature=2.0, seed=1)
    assert second not in drawn.tokens and first != drawn.tokens[0]


def test_a_token_suppressed_at_the_beginning_may_come_later(tmp_path: pathlib.Path) -> None:
    one = samples.features(1)[0]
    chosen = samples.answer(one, 8)
    later = next(token for token in chosen[1:] if token != chosen[0])
    generation = samples.encoder_section(begin_suppress=(later,))
    path = samples.write_encoder_decoder(tmp_path / "a", generation=generation)
    assert list(edgec_runtime.load(path).generate(one, max_new_tokens=8).tokens) == chosen


# --- the whole model ----------------------------------------------------------------------


def test_a_call_runs_the_encoder_and_one_step(listener: edgec_runtime.Model) -> None:
    assert [value.name for value in listener.inputs] == [
        "features", "ids", "past.key", "past.value",
    ]  # fmt: skip
    one = samples.features(1)
    cache = np.zeros((1, 1, 0, samples.WIDTH), np.float32)
    feeds = {"ids": np.array([samples.START]), "past.key": cache, "past.value": cache}
    outputs = listener(features=one, **feeds)
    assert int(outputs["logits"][0, -1].argmax()) == samples.answer(one[0], 1)[0]
    memory = listener.encode({"features": one})
    np.testing.assert_allclose(memory["memory.0"][0], (one[0] @ samples.INTO).mean(0), atol=1e-5)


def test_a_model_without_an_encoder_has_nothing_to_encode(tmp_path: pathlib.Path) -> None:
    model = edgec_runtime.load(write_sample(tmp_path / "a"))
    with pytest.raises(InputError, match="its bundle has no graph 'encoder'"):
        model.encode({})


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("hello", {}, r"expected 'features': an array float32 \[length, 4\]"),
        ([1, 2], {}, "expected 'features'"),
        (np.zeros((2, 3, 6, 4), np.float32), {}, "expected 'features'"),
        ([], {}, "the prompt is empty"),
        (np.zeros((6, 4)), {}, "'features' is float64, expected float32"),
        (np.zeros((6, 5), np.float32), {}, "size 5 in dimension 2"),
        (samples.features(1)[0], {"cache": edgec_runtime.PromptCache()}, "cache is for models"),
        (samples.features(1)[0], {"draft": object()}, "draft and sinks are for models without"),
        (samples.features(1)[0], {"start": []}, r"start is \[\], expected token ids"),
        (samples.features(1)[0], {"start": "en"}, "start is 'en', expected token ids"),
        (samples.features(1)[0], {"start": [1000]}, "the token 1000, expected 0 to 259"),
        (
            samples.features(2),
            {"stream": True},
            "stream, cache, draft and sinks take one prompt, a list of 2 was given",
        ),
    ],
)
def test_a_prompt_that_is_wrong(
    listener: edgec_runtime.Model, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        listener.generate(prompt, **options)


def test_start_is_for_models_with_an_encoder(tmp_path: pathlib.Path) -> None:
    model = edgec_runtime.load(write_decoder(tmp_path / "a"))
    with pytest.raises(InputError, match="start is for models with an encoder"):
        model.generate([1, 2], start=[3])


def test_prompts_of_different_lengths_need_a_mask(tmp_path: pathlib.Path) -> None:
    from edgec_runtime.prompts import encoder_feeds

    model = edgec_runtime.load(samples.write_encoder_decoder(tmp_path / "a", "ids"))
    generation = samples.encoder_section("ids", mask=None)
    with pytest.raises(InputError, match="this model has no mask: give prompts of one length"):
        encoder_feeds(model.manifest, generation, [[1, 2], [3]], None)


# --- the manifest -------------------------------------------------------------------------


def table(kind: samples.Kind = "ids") -> Any:
    made = sample_manifest(graphs=samples.graphs(kind), generation=samples.encoder_section(kind))
    return json.loads(made.to_json())


def read(table: Any) -> Manifest:
    return Manifest.from_json(json.dumps(table).encode())


def test_the_section_survives_the_round_trip() -> None:
    made = sample_manifest(graphs=samples.graphs(), generation=samples.encoder_section())
    assert Manifest.from_json(made.to_json()) == made
    assert table()["generation"]["encoder"] == {
        "input": "read",
        "mask": "shown",
        "start": [258, 5],
        "suppress": [],
        "begin_suppress": [],
    }


def test_without_an_encoder_the_section_is_as_it_was(tmp_path: pathlib.Path) -> None:
    made = read_bundle(write_decoder(tmp_path / "a")).manifest
    assert "encoder" not in json.loads(made.to_json())["generation"]


def _encoder(**changes: Any) -> Callable[[Any], None]:
    return lambda table: table["generation"]["encoder"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["generation"].pop("encoder"), "belong together; expected both"),
        (lambda t: t.pop("generation"), "belong together; expected both"),
        (lambda t: t["graphs"].pop("encoder"), "belong together; expected both"),
        (lambda t: t["graphs"].pop("main"), "there is no graph 'main'"),
        (_encoder(input="x"), "encoder feeds x, shown; the graph has read, shown"),
        (_encoder(mask=None), "encoder feeds read; the graph has read, shown"),
        (_encoder(start=[]), "encoder.start is empty"),
        (_encoder(start=[260]), "encoder.start has the token 260, expected 0 to 259"),
        (_encoder(suppress=[-1]), "encoder.suppress has the token -1"),
        (_encoder(begin_suppress=[999]), "encoder.begin_suppress has the token 999"),
        (
            lambda t: t["graphs"]["encoder"]["outputs"][0].update(name="memory.1"),
            "the encoder gives 'memory.1' .*no such input",
        ),
        (
            lambda t: t["graphs"]["encoder"]["outputs"][0].update(dtype="float16"),
            "the encoder gives 'memory.0' .float16.*no such input",
        ),
        (
            lambda t: t["graphs"]["encoder"]["inputs"][1].update(dtype="float32"),
            "'shown' is float32 .*expected int64 or int32",
        ),
        (
            lambda t: t["graphs"]["main"]["inputs"].append(t["graphs"]["encoder"]["inputs"][0]),
            "encoder and main both have the input 'read'",
        ),
        (
            lambda t: t["graphs"]["main"]["inputs"].append(
                {"name": "more", "dtype": "float32", "shape": [1]}
            ),
            "the input 'more' of the graph main has no part in it",
        ),
    ],
)
def test_a_section_that_is_wrong(change: Callable[[Any], Any], message: str) -> None:
    wrong = table()
    change(wrong)
    with pytest.raises(BundleError, match=message):
        read(wrong)


def test_features_need_a_batch() -> None:
    wrong = table("features")
    wrong["graphs"]["encoder"]["inputs"][0]["shape"] = [4]
    with pytest.raises(BundleError, match=r"'features' is \[4\], expected \[batch, \.\.\.\]"):
        read(wrong)


def test_a_decoder_alone_needs_a_mask(tmp_path: pathlib.Path) -> None:
    wrong = json.loads(read_bundle(write_decoder(tmp_path / "a")).manifest.to_json())
    wrong["generation"]["mask"] = None
    with pytest.raises(BundleError, match="it has no mask, which a model without an encoder needs"):
        read(wrong)
