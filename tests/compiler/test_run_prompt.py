"""``edgec run BUNDLE --prompt``: a language model's answer on the command line."""

import json
import pathlib
from typing import Any

import pytest
import tiny_language
from click.testing import CliRunner

import edgec
import edgec_runtime
from edgec.cli import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("speaking")
    tiny_language.save_language_model(folder / "model")
    report = edgec.build(
        folder / "model",
        target="x86-64",
        output=folder / "tiny.edgec",
        recipe="cleanup,lower",
        verify=False,
    )
    return str(report.bundle_path)


def run(*arguments: str, **rest: Any) -> Any:
    return CliRunner().invoke(main, ["run", *arguments], **rest)


def answer(bundle: str, prompt: Any, **options: Any) -> str:
    text = edgec_runtime.load(bundle).generate(prompt, **options).text
    assert text is not None
    return text


def test_a_prompt_is_what_a_user_says(bundle: str) -> None:
    result = run(bundle, "--prompt", "The quick fox", "--max-new-tokens", "12")
    chat = [{"role": "user", "content": "The quick fox"}]
    assert result.exit_code == 0, result.output
    assert result.stdout == answer(bundle, chat, max_new_tokens=12) + "\n"


def test_a_raw_prompt_is_continued(bundle: str) -> None:
    result = run(bundle, "--prompt", "The quick fox", "--raw", "--max-new-tokens", "12")
    assert result.stdout == answer(bundle, "The quick fox", max_new_tokens=12) + "\n"


def test_a_dash_reads_standard_input(bundle: str) -> None:
    options = ("--raw", "--max-new-tokens", "8")
    result = run(bundle, "--prompt", "-", *options, input="over the lazy\n")
    assert result.stdout == answer(bundle, "over the lazy", max_new_tokens=8) + "\n"


def test_draws_follow_their_seed(bundle: str) -> None:
    drawn = ("--raw", "--max-new-tokens", "12", "--temperature", "1.5", "--prompt", "A model")
    texts = [run(bundle, *drawn, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == answer(bundle, "A model", max_new_tokens=12, temperature=1.5, seed=1) + "\n"


def test_json_tells_tokens_and_why_the_answer_ended(bundle: str) -> None:
    result = run(bundle, "--prompt", "The fox", "--max-new-tokens", "3", "--json")
    facts = json.loads(result.stdout)
    assert facts["reason"] == "length" and len(facts["tokens"]) == 3
    assert facts["prompt"] == "The fox" and facts["prompt_tokens"] > 2


def test_a_bundle_that_is_no_language_model_says_so(cnn_bundle: pathlib.Path) -> None:
    result = run(str(cnn_bundle), "--prompt", "Hello")
    assert result.exit_code == 1
    assert "language model" in result.stderr and "Traceback" not in result.stderr


def test_options_of_an_answer_need_a_prompt(bundle: str) -> None:
    result = run(bundle, "--temperature", "1")
    assert result.exit_code == 2 and "--temperature needs --prompt" in result.stderr
    result = run(bundle, "--prompt", "x", "--input", "y.npz")
    assert result.exit_code == 2 and "--prompt and --input exclude each other" in result.stderr


def test_a_setting_out_of_range_is_one_line(bundle: str) -> None:
    result = run(bundle, "--prompt", "x", "--top-p", "3")
    assert result.exit_code == 1 and "top_p is 3.0" in result.stderr


def test_a_bundle_is_verified_on_a_text(bundle: str, tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_language.TEXT * 4, encoding="utf-8")
    result = CliRunner().invoke(main, ["verify", bundle, "--evaluation", str(text), "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["metric"]["name"] == "perplexity" and facts["agreement"] == 1.0


@pytest.fixture(scope="module")
def small(bundle: str) -> str:
    """The same model in 4 bits, which is right at times only."""
    folder = pathlib.Path(bundle).parent
    report = edgec.build(
        folder / "model",
        target="x86-64",
        output=folder / "small.edgec",
        recipe="cleanup,fuse,quantize-weights,lower",
        settings=("quantize-weights.bits=4", "quantize-weights.embedding_bits=4"),
        verify=False,
    )
    return str(report.bundle_path)


@pytest.mark.parametrize("options", [(), ("--temperature", "0.9", "--seed", "3")])
def test_a_draft_changes_no_token(bundle: str, small: str, options: tuple[str, ...]) -> None:
    asked = (bundle, "--prompt", "The quick fox", "--max-new-tokens", "24", *options)
    alone = json.loads(run(*asked, "--json").stdout)
    result = run(*asked, "--draft", small, "--draft-tokens", "3", "--json")
    facts = json.loads(result.stdout)
    assert facts["tokens"] == alone["tokens"] and len(facts["tokens"]) == 24
    assert 0 < facts["accepted_tokens"] < facts["guessed_tokens"]
    assert run(*asked, "--draft", small).stdout == alone["text"] + "\n"


def test_options_of_a_draft_are_checked(bundle: str, small: str, cnn_bundle: pathlib.Path) -> None:
    for options, message in (
        (("--prompt", "x", "--draft-tokens", "3"), "--draft-tokens needs --draft"),
        (("--prompt", "x", "--draft", small, "--on", "native"), "--draft and --on exclude"),
        (("--draft", small), "--draft needs --prompt"),
        (("--prompt", "x", "--draft", small, "--sinks", "0"), "--draft and --sinks exclude"),
        (("--prompt", "x", "--sinks", "4"), "--sinks needs --max-new-tokens"),
    ):
        result = run(bundle, *options)
        assert result.exit_code == 2 and message in result.stderr
    for draft, message in ((str(cnn_bundle), "language model"), ("none.edgec", "none.edgec")):
        result = run(bundle, "--prompt", "x", "--draft", draft)
        assert result.exit_code == 1 and message in result.stderr
        assert "Traceback" not in result.stderr


def test_an_answer_goes_on_behind_the_context(bundle: str) -> None:
    model = edgec_runtime.load(bundle)
    generation = model.manifest.generation
    assert generation is not None
    prompt = model.text.decode(model.text.encode("The fox ran. " * 400)[: 500 + 1])
    asked = (bundle, "--prompt", prompt, "--raw", "--max-new-tokens", "40", "--temperature", "2")
    refused = run(*asked)
    assert refused.exit_code == 1 and "the model has room for 512 together" in refused.stderr
    facts = json.loads(run(*asked, "--sinks", "4", "--json").stdout)
    assert facts["prompt_tokens"] + len(facts["tokens"]) > generation.context_length == 512
