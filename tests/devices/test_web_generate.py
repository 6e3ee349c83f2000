"""Language models in Node.js: generate.mjs writes what edgec_runtime writes, and refuses alike."""

from __future__ import annotations

import json
import pathlib
import subprocess
from typing import Any

import pytest
from bundle_samples import write_sample
from devices.test_check import require
from language_samples import CONTEXT, section, write_decoder

import edgec_runtime
from edgec.devices.install import installed_folder
from edgec.devices.web import HOSTS, MODULES
from edgec.targets import load_profile
from edgec_runtime.sampling import random_generator

HERE = {"anyTarget": True}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
CHAT = [{"role": "user", "content": "Grüße, 世界"}, {"role": "assistant", "content": "B"}]


@pytest.fixture(autouse=True)
def _node() -> None:
    require("node-wasm")


def answers(bundle: pathlib.Path, *cases: dict[str, Any]) -> list[dict[str, Any]]:
    """What JavaScript answers to each case: tokens, reason and pieces, or the error."""
    modules = installed_folder(load_profile("node-wasm")) / MODULES
    program = pathlib.Path(__file__).with_name("answer.mjs")
    command = ["node", *map(str, (program, modules, HOSTS, bundle))]
    asked = json.dumps([{"load": HERE, **case} for case in cases])
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("cache", ["growing", "shared", "fixed"])
def test_greedy_answers_are_those_of_the_runtime(tmp_path: pathlib.Path, cache: str) -> None:
    kind = {"cache": "shared" if cache == "fixed" else cache, "eos": (), "prompt_chunk": 3}
    capacity = CONTEXT if cache == "fixed" else "past"
    path = write_decoder(tmp_path / "b.edgec", section(**kind), capacity=capacity)
    model = edgec_runtime.load(path, any_target=True)
    prompts: list[Any] = [PROMPT, "Grüße, 世界", CHAT, [*PROMPT[:5], 77], PROMPT]
    options = {"max_new_tokens": 30}
    found = answers(path, *({"prompt": one, "options": options} for one in prompts))
    for prompt, answer in zip(prompts, found, strict=True):
        expected = model.generate(prompt, **options)
        assert answer.get("tokens") == list(expected.tokens), answer
        text = model.text.decode(expected.tokens)
        assert ("".join(answer["pieces"]), answer["reason"]) == (text, "length")
        assert len(set(expected.tokens)) > 5


def test_an_answer_goes_up_to_the_end_of_the_context(tmp_path: pathlib.Path) -> None:
    path = write_decoder(tmp_path / "b.edgec", section(eos=()))
    expected = edgec_runtime.load(path, any_target=True).generate(PROMPT)
    [answer] = answers(path, {"prompt": PROMPT})
    assert answer["tokens"] == list(expected.tokens)
    assert len(answer["tokens"]) == CONTEXT - len(PROMPT)


def test_draws_are_those_of_the_runtime_for_the_same_numbers(tmp_path: pathlib.Path) -> None:
    path = write_decoder(tmp_path / "b.edgec", section(eos=()), scale=0.1)
    model = edgec_runtime.load(path, any_target=True)
    settings: list[dict[str, float]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
        {"repetition_penalty": 2.0},
    ]
    cases = []
    for seed, one in enumerate(settings):
        numbers = random_generator(seed).random(40).tolist()
        cases.append({"prompt": "ab", "options": {**one, "numbers": numbers, "max_new_tokens": 40}})
    found = answers(path, *cases)
    for seed, (one, answer) in enumerate(zip(settings, found, strict=True)):
        expected = model.generate("ab", seed=seed, max_new_tokens=40, **one)
        assert answer.get("tokens") == list(expected.tokens), (one, answer)
        assert "".join(answer["pieces"]) == expected.text  # half characters among them
    assert len({tuple(answer["tokens"]) for answer in found}) == len(settings)


def test_what_the_bundle_recommends_is_taken(tmp_path: pathlib.Path) -> None:
    recommended = edgec_runtime.generation.Sampling(temperature=1.0, top_k=30)
    path = write_decoder(tmp_path / "b.edgec", section(eos=(), sampling=recommended), scale=0.1)
    numbers = random_generator(4).random(20).tolist()
    expected = edgec_runtime.load(path, any_target=True).generate("ab", seed=4, max_new_tokens=20)
    [answer] = answers(
        path, {"prompt": "ab", "options": {"numbers": numbers, "max_new_tokens": 20}}
    )
    assert answer["tokens"] == list(expected.tokens)


def test_answers_end_at_eos_and_at_stop_strings(tmp_path: pathlib.Path) -> None:
    free = edgec_runtime.load(
        write_decoder(tmp_path / "free.edgec", section(eos=())), any_target=True
    ).generate(PROMPT, max_new_tokens=40)
    end = free.tokens[12]
    path = write_decoder(tmp_path / "b.edgec", section(eos=(end,)))
    model = edgec_runtime.load(path, any_target=True)
    expected = model.generate(PROMPT, max_new_tokens=40)
    assert expected.reason == "eos"
    whole = model.text.decode(expected.tokens)
    stop = whole[2:4]
    stopped = model.generate(PROMPT, max_new_tokens=40, stop=stop)
    found = answers(
        path,
        {"prompt": PROMPT, "options": {"max_new_tokens": 40}},
        {"prompt": PROMPT, "options": {"max_new_tokens": 40, "stop": stop}},
        {"prompt": PROMPT, "options": {"max_new_tokens": 40, "stop": ["never there", stop]}},
    )
    assert [answer["reason"] for answer in found] == ["eos", "stop", "stop"]
    for answer, known in zip(found, (expected, stopped, stopped), strict=True):
        assert answer["tokens"] == list(known.tokens)
        assert "".join(answer["pieces"]) == (whole if known is expected else known.text)


def test_wrong_requests_are_refused(tmp_path: pathlib.Path) -> None:
    path = write_decoder(tmp_path / "b.edgec")
    cases: dict[str, dict[str, Any]] = {
        "InputError: the prompt is empty; give at least one token": {"prompt": []},
        "InputError: the prompt has the token 260, expected 0 to 259": {"prompt": [1, 260]},
        "InputError: max_new_tokens is 0, expected a whole number from 1 up": {
            "prompt": PROMPT, "options": {"max_new_tokens": 0},
        },
        "InputError: the prompt has 8 tokens, max_new_tokens is 89; the model has room for 96 "
        "together: shorten the prompt": {"prompt": PROMPT, "options": {"max_new_tokens": 89}},
        "InputError: temperature is -1, expected a number from 0 up": {
            "prompt": PROMPT, "options": {"temperature": -1},
        },
        "InputError: generate has no option 'topk'": {"prompt": PROMPT, "options": {"topk": 3}},
        "InputError: stop is ',x', expected texts that are not empty": {
            "prompt": PROMPT, "options": {"stop": ["", "x"]},
        },
        "InputError: message 0 has no role or no content": {"prompt": [{"content": "A"}]},
        "EdgecError: a language model needs its tokenizer: import { Tokenizer } from "
        '"@huggingface/tokenizers" and give it to loadLanguageModel': {
            "prompt": PROMPT, "load": {**HERE, "without": ["Tokenizer"]},
        },
        "EdgecError: a chat needs the bundle's template: import { Template } from "
        '"@huggingface/jinja" and give it to loadLanguageModel': {
            "prompt": CHAT, "load": {**HERE, "without": ["Template"]},
        },
    }  # fmt: skip
    found = answers(path, *cases.values())
    assert [answer.get("error") for answer in found] == list(cases)


def test_token_ids_need_no_tokenizer(tmp_path: pathlib.Path) -> None:
    path = write_decoder(tmp_path / "b.edgec", section(eos=()))
    alone = {**HERE, "without": ["Tokenizer", "Template"]}
    found = answers(
        path,
        {"prompt": PROMPT, "options": {"max_new_tokens": 9}, "load": alone},
        {"prompt": "text", "load": alone},
    )
    expected = edgec_runtime.load(path, any_target=True).generate(PROMPT, max_new_tokens=9)
    assert found[0]["tokens"] == list(expected.tokens)
    assert found[0]["pieces"] == [""] * 9
    assert found[1]["error"].startswith("InputError: a text needs the bundle's tokenizer")


def test_a_bundle_that_is_no_language_model_is_refused(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "b.edgec")
    [found] = answers(path, {"prompt": PROMPT})
    assert found["error"].endswith("is no language model; open it with load()")
