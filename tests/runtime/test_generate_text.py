"""Text in and out: streaming, stop strings, chats, seeds, and what is refused."""

from __future__ import annotations

import builtins
import pathlib
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bundle_samples import write_sample
from language_samples import (
    BOS,
    CONTEXT,
    EOS,
    MODEL,
    USER,
    section,
    write_decoder,
)

import edgec_runtime
from edgec_runtime.errors import BundleError, EdgecError, InputError
from edgec_runtime.generation import Sampling

# scores so flat that nearly every token is drawn: bytes that make half characters as well
DRAWN = {"temperature": 1.0, "max_new_tokens": 60}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> edgec_runtime.Model:
    path = tmp_path_factory.mktemp("decoder") / "model.edgec"
    return edgec_runtime.load(write_decoder(path, section(eos=()), scale=0.02))


def test_a_streamed_answer_is_the_whole_one(model: edgec_runtime.Model) -> None:
    for seed in range(10):
        whole = model.generate("Ein Satz: ä", seed=seed, **DRAWN)
        pieces = list(model.generate("Ein Satz: ä", seed=seed, stream=True, **DRAWN))
        assert "".join(pieces) == whole.text == model.text.decode(whole.tokens)
        assert "" not in pieces and len(pieces) > 10


def test_text_and_its_tokens_give_the_same_answer(model: edgec_runtime.Model) -> None:
    tokens = model.text.encode("Hello")
    by_text = model.generate("Hello", max_new_tokens=9)
    assert by_text.text == model.text.decode(by_text.tokens)
    by_tokens = replace(by_text, text=None)
    assert by_tokens == model.generate(tokens, max_new_tokens=9)
    assert by_tokens == model.generate(np.array(tokens), max_new_tokens=9)
    assert [by_text] * 2 == model.generate(["Hello", "Hello"], max_new_tokens=9)
    assert [by_tokens] == model.generate(np.array([tokens]), max_new_tokens=9)


def test_a_chat_goes_through_the_template(model: edgec_runtime.Model) -> None:
    messages = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    byte = {letter: model.text.encode(letter)[0] for letter in "ABC"}
    expected = [BOS, USER, byte["A"], MODEL, byte["B"], USER, byte["C"], MODEL]
    assert model.text.encode_chat(messages) == expected
    answer = model.generate(messages, max_new_tokens=5)
    assert replace(answer, text=None) == model.generate(expected, max_new_tokens=5)
    [same] = model.generate([messages], max_new_tokens=5)
    assert same == answer


def test_a_stop_string_ends_the_answer_before_it(model: edgec_runtime.Model) -> None:
    whole = model.generate("x", seed=3, **DRAWN)
    assert whole.text is not None
    place = next(i for i in range(8, 50) if whole.text[i : i + 2].isascii())
    stop = whole.text[place : place + 2]
    expected = whole.text[: whole.text.index(stop)]
    answer = model.generate("x", seed=3, stop=stop, **DRAWN)
    assert (answer.text, answer.reason) == (expected, "stop")
    assert len(answer.tokens) < len(whole.tokens)
    pieces = model.generate("x", seed=3, stop=("never there", stop), stream=True, **DRAWN)
    assert "".join(pieces) == expected


def test_the_start_of_a_stop_string_is_held_back_and_given_in_the_end(
    model: edgec_runtime.Model,
) -> None:
    whole = model.generate("x", seed=3, **DRAWN)
    assert whole.text is not None
    stop = whole.text[-1] + "?never"
    answer = model.generate("x", seed=3, stop=stop, **DRAWN)
    assert (answer.text, answer.reason) == (whole.text, "length")


def test_a_special_token_may_be_a_stop_string(
    model: edgec_runtime.Model, tmp_path: pathlib.Path
) -> None:
    for seed in range(40):  # one of 260 tokens in 60 draws
        answer = model.generate("x", seed=seed, stop="<user>", **DRAWN)
        if answer.reason == "stop":
            break
    assert answer.reason == "stop" and USER not in answer.tokens
    free = model.generate("x", seed=seed, **DRAWN)
    assert free.tokens[len(answer.tokens)] == USER


def test_a_seed_decides_the_draws(model: edgec_runtime.Model) -> None:
    one, same, other = (model.generate("x", seed=seed, **DRAWN) for seed in (1, 1, 2))
    assert one == same != other
    batch = model.generate(["x", "y"], seed=1, **DRAWN)
    assert batch[0].tokens == one.tokens


def test_what_is_left_out_is_what_the_bundle_recommends(tmp_path: pathlib.Path) -> None:
    drawn = section(sampling=Sampling(temperature=1.0, top_k=3))
    loaded = edgec_runtime.load(write_decoder(tmp_path / "a", drawn, scale=0.02))
    answer = loaded.generate("x", max_new_tokens=20, seed=5)
    assert answer == loaded.generate("x", max_new_tokens=20, seed=5, temperature=1.0, top_k=3)
    assert answer != loaded.generate("x", max_new_tokens=20, seed=5, temperature=0.0)
    assert answer != loaded.generate("x", max_new_tokens=20, seed=5, top_k=0)


def test_without_a_limit_an_answer_ends_with_the_context(model: edgec_runtime.Model) -> None:
    answer = model.generate([1, 2, 3])
    assert (len(answer.tokens), answer.reason) == (CONTEXT - 3, "length")


def test_several_threads_share_one_model(model: edgec_runtime.Model) -> None:
    expected = {seed: model.generate("x", seed=seed, **DRAWN) for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            if model.generate("x", seed=seed, **DRAWN) != expected[seed]:
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty; give at least one token"),
        ([], {}, "the prompt is empty"),
        ([[1], []], {}, "the prompt is empty"),
        (["a", ""], {}, "the prompt is empty"),
        (7, {}, "the prompt is 7, expected a text, messages, token ids, or a list of them"),
        ([1.5], {}, "the prompt is 1.5, expected a text"),
        ([[1], 2], {}, "the prompt is 2, expected a text"),
        ([1, "a"], {}, "expected a text"),
        ("\ud800", {}, "the prompt is not valid Unicode"),
        ([260], {}, "the prompt has the token 260, expected 0 to 259"),
        ([-1], {}, "the prompt has the token -1, expected 0 to 259"),
        ([1] * 96, {}, "the prompt has 96 tokens; the model has room for 96 with the answer"),
        ([1] * 90, {"max_new_tokens": 7}, "has 90 tokens, max_new_tokens is 7; the model has"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number from 1 up"),
        ([1], {"max_new_tokens": True}, "max_new_tokens is True"),
        ([1], {"seed": -1}, "seed is -1, expected a whole number from 0 up"),
        ([1], {"temperature": -1}, "temperature is -1, expected a number from 0 up"),
        ([1], {"stop": ["a", ""]}, "stop is .*, expected texts that are not empty"),
        ([1], {"stop": [3]}, "stop is .*, expected texts"),
        (
            [[1], [2]],
            {"stream": True},
            "stream, cache, draft and sinks take one prompt, a list of 2 was given",
        ),
        (
            [[1], [2]],
            {"cache": edgec_runtime.PromptCache()},
            "stream, cache, draft and sinks take one prompt",
        ),
        ([{"role": "user"}], {}, "message 0 is .*, expected a dict with 'role' and 'content'"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(
    model: edgec_runtime.Model, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(prompt, **options)


def test_a_streamed_call_is_checked_before_the_first_piece(model: edgec_runtime.Model) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        model.generate("", stream=True)


def test_a_model_that_is_none_of_language_is_refused(tmp_path: pathlib.Path) -> None:
    loaded = edgec_runtime.load(write_sample(tmp_path / "a"))
    with pytest.raises(InputError, match="it is no language model: .* no section 'generation'"):
        loaded.generate([1])
    with pytest.raises(InputError, match="its bundle has no tokenizer"):
        loaded.text  # noqa: B018


def test_a_bundle_without_tokenizer_takes_ids(tmp_path: pathlib.Path) -> None:
    plain = section(tokenizer=None, chat_template=None, eos=())
    loaded = edgec_runtime.load(write_decoder(tmp_path / "a", plain))
    answer = loaded.generate([1, 2], max_new_tokens=4)
    assert (answer.text, len(answer.tokens)) == (None, 4)
    for options in ({"stream": True}, {"stop": "x"}):
        with pytest.raises(InputError, match="its bundle has no tokenizer; give the prompt as"):
            loaded.generate([1, 2], **options)  # type: ignore[call-overload]
    for prompt in ("text", [{"role": "user", "content": ""}], ["text"]):
        with pytest.raises(InputError, match="its bundle has no tokenizer"):
            loaded.generate(prompt)  # type: ignore[call-overload]


def test_a_bundle_without_chat_template_takes_text(tmp_path: pathlib.Path) -> None:
    loaded = edgec_runtime.load(write_decoder(tmp_path / "a", section(chat_template=None)))
    assert loaded.generate("x", max_new_tokens=2).text is not None
    with pytest.raises(InputError, match="it has no chat template; give the prompt as one text"):
        loaded.generate([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("package", "prompt"), [("tokenizers", "x"), ("jinja2", [{"role": "user", "content": "x"}])]
)
def test_a_package_that_is_not_installed_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, package: str, prompt: Any
) -> None:
    loaded = edgec_runtime.load(write_decoder(tmp_path / "a"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EdgecError, match=rf"{package}, .*pip install 'edgec-runtime\[text\]'"):
        loaded.generate(prompt)


def test_ids_need_no_tokenizer(tmp_path: pathlib.Path) -> None:
    loaded = edgec_runtime.load(write_decoder(tmp_path / "a", section(eos=())))
    answer = loaded.generate([1, 2], max_new_tokens=4)
    assert (answer.text, len(answer.tokens)) == (None, 4)
    assert "text" not in vars(loaded)  # nothing has opened it
    assert loaded.generate([1, 2], max_new_tokens=4, stop="never there").text is not None


def test_ids_need_no_package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = edgec_runtime.load(write_decoder(tmp_path / "a", section(eos=())))
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        assert name.split(".")[0] not in ("tokenizers", "jinja2")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    answer = loaded.generate([1, 2], max_new_tokens=4)
    assert (answer.text, len(answer.tokens)) == (None, 4)


def test_a_damaged_tokenizer_is_a_bundle_error(tmp_path: pathlib.Path) -> None:
    path = write_decoder(tmp_path / "a", files={"tokenizer.json": b"{}"})
    with pytest.raises(BundleError, match="its tokenizer cannot be read: .*upgrade tokenizers"):
        edgec_runtime.load(path).generate("x")


def test_eos_is_no_part_of_the_answer(tmp_path: pathlib.Path) -> None:
    loaded = edgec_runtime.load(write_decoder(tmp_path / "a", scale=0.02))
    found = (loaded.generate("x", seed=seed, **DRAWN) for seed in range(60))
    answer = next(answer for answer in found if answer.reason == "eos")
    assert EOS not in answer.tokens and len(answer.tokens) < 60
