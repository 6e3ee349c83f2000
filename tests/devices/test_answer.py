"""Answers of a language model on other CPUs: followed token by token, the same as here."""

from __future__ import annotations

import json
import pathlib

import pytest
import tiny_language
from bundle_samples import write_sample
from click.testing import CliRunner
from devices.test_check import require
from language_samples import section, write_decoder

import edgec
import edgec_runtime
from edgec.cli import main
from edgec.devices.answer import answer_pieces, answer_tokens
from edgec.errors import DeviceError, TargetMismatchError
from edgec_runtime import manifest
from edgec_runtime.errors import InputError
from edgec_runtime.text import open_text

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def decoder(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_decoder(tmp_path / "decoder.edgec", section(eos=()))


def test_tokens_come_one_by_one_and_are_those_of_this_process(decoder: pathlib.Path) -> None:
    model = edgec_runtime.load(decoder, any_target=True)
    expected = model.generate(PROMPT, max_new_tokens=20)
    tokens = answer_tokens(
        "native", decoder, PROMPT, options={"max_new_tokens": 20}, any_target=True
    )
    assert next(tokens) == expected.tokens[0]
    assert [expected.tokens[0], *tokens] == list(expected.tokens)
    drawn = {"temperature": 1.0, "top_k": 40, "seed": 3, "max_new_tokens": 20}
    there = answer_tokens("native", decoder, PROMPT, options=drawn, any_target=True)
    assert list(there) == list(model.generate(PROMPT, **drawn).tokens)


def test_streamed_tokens_are_the_whole_answer_without_a_tokenizer(
    decoder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edgec_runtime.load(decoder, any_target=True)
    expected = model.generate(PROMPT, max_new_tokens=20)
    end = expected.tokens[9]
    ending = write_decoder(decoder.with_name("ending.edgec"), section(eos=(end,)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bare = edgec_runtime.load(decoder, any_target=True)
    tokens = bare.generate(PROMPT, stream="tokens", max_new_tokens=20)
    assert list(tokens) == list(expected.tokens)
    assert "text" not in vars(bare)  # no tokenizer was opened
    short = edgec_runtime.load(ending, any_target=True)
    until = expected.tokens.index(end)
    assert list(short.generate(PROMPT, stream="tokens")) == list(expected.tokens[:until])
    with pytest.raises(
        InputError, match="stream, cache, draft and sinks take one prompt, a list of 2 was given"
    ):
        bare.generate([PROMPT, PROMPT], stream="tokens")  # type: ignore[call-overload]


def test_a_text_that_stops_ends_the_run(decoder: pathlib.Path) -> None:
    text = open_text(edgec_runtime.bundle.read_bundle(decoder))
    taken = []

    def endless() -> object:
        while True:
            taken.append(1)
            yield text.encode("a")[0]

    pieces = answer_pieces(endless(), text, ["aaa"])  # type: ignore[arg-type]
    assert "".join(pieces) == "" and len(taken) == 3
    marked = iter([*text.encode("ab"), 258, *text.encode("c")])
    assert "".join(answer_pieces(marked, text, ["<user>"])) == "ab"


def test_the_command_prints_what_the_device_answers(decoder: pathlib.Path) -> None:
    common = ["run", str(decoder), "--prompt", "Hello", "--max-new-tokens", "12", "--any-target"]
    here, there, data = (
        CliRunner().invoke(main, [*common, *more])
        for more in ([], ["--on", "native"], ["--on", "native", "--json"])
    )
    assert here.exit_code == there.exit_code == 0, there.output
    assert there.output == here.output and len(there.output) > 5
    facts = json.loads(data.output)
    assert (facts["device"], facts["text"] + "\n") == ("native", here.output)
    assert len(facts["tokens"]) == 12


def test_a_device_that_cannot_answer_says_so(decoder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    elsewhere = manifest.Target("other", "riscv64", ("linux",))
    foreign = write_sample(tmp_path / "foreign.edgec", target=elsewhere)
    with pytest.raises(TargetMismatchError, match=r"built for other \(riscv64; linux\)"):
        list(answer_tokens("native", foreign, PROMPT, options={}))
    with pytest.raises(DeviceError, match=r"device native: model .* it is no language model"):
        list(answer_tokens("native", foreign, PROMPT, options={}, any_target=True))
    with pytest.raises(DeviceError, match="device native: the prompt has 96 tokens"):
        list(answer_tokens("native", decoder, [1] * 96, options={}))
    done = CliRunner().invoke(main, ["run", str(decoder), "--on", "native"])
    assert done.exit_code == 2 and "--on needs --prompt" in done.output


def test_a_web_device_cannot_be_followed(decoder: pathlib.Path) -> None:
    require("node-wasm")
    with pytest.raises(DeviceError, match="node-wasm: its answers cannot be followed"):
        list(answer_tokens("node-wasm", decoder, PROMPT, options={}, any_target=True))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cortex-a72", "cortex-a76"])
def test_an_emulated_cpu_writes_what_this_one_writes(device: str, tmp_path: pathlib.Path) -> None:
    require(device)
    tiny_language.save_language_model(tmp_path / "tiny")
    bundle = tmp_path / "tiny.edgec"
    edgec.build(
        tmp_path / "tiny", target="arm64", output=bundle, recipe="cleanup,fuse,lower", verify=False
    )
    model = edgec_runtime.load(bundle, any_target=True)
    prompt = model.text.encode("The quick brown fox")
    expected = model.generate(prompt, max_new_tokens=40)
    assert len(set(expected.tokens)) > 10
    found = answer_tokens(device, bundle, prompt, options={"max_new_tokens": 40})
    assert list(found) == list(expected.tokens)  # float32: sums differ in their order alone
