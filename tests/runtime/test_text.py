"""Text from tokens as they come, and chat templates as transformers renders them."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from language_samples import VOCABULARY, section, tokenizer, write_decoder
from tokenizers import Tokenizer, decoders, models

from edgec_runtime import bundle, text
from edgec_runtime.errors import BundleError, InputError

MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind" – ä.\n'},
    {"role": "user", "content": "  Hi?  "},
    {"role": "assistant", "content": "Yes.", "tool_calls": [{"name": "f", "arguments": {"ä": 1}}]},
    {"role": "user", "content": "Why?"},
]
CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nNone<|im_end|>\\n' }}
    {% endif %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "tokens": "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}{% if unknown is defined %}x{% endif %}{{ tools }}{{ documents }}",
    "json": "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    "{{ m.tool_calls | tojson(indent=2) }}{% endif %}{% endfor %}{{ messages | tojson }}",
    "marked": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "dated": "{{ strftime_now('%Y-%m-%d') }}{{ messages[-1].content }}",
}


def write(path: pathlib.Path, template: str) -> text.Text:
    files = {"chat_template.jinja": template.encode()}
    return text.open_text(bundle.read_bundle(write_decoder(path, files=files)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_rendered_as_by_transformers(tmp_path: pathlib.Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    reference.chat_template = TEMPLATES[name]
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    opened = write(tmp_path / "a", TEMPLATES[name])
    assert opened.render_chat(MESSAGES) == expected
    assert opened.encode_chat(MESSAGES) == reference.apply_chat_template(
        MESSAGES, add_generation_prompt=True
    )
    if name == "dated":
        assert expected.startswith(str(datetime.datetime.now().year))


def test_a_template_that_refuses_tells_why(tmp_path: pathlib.Path) -> None:
    opened = write(tmp_path / "a", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        opened.render_chat(MESSAGES)
    opened = write(tmp_path / "b", "{{ messages[0].content + 1 }}")
    with pytest.raises(InputError, match="refuses these messages: "):
        opened.render_chat(MESSAGES)


def test_a_template_that_is_wrong_is_a_bundle_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BundleError, match="its chat template is wrong: "):
        write(tmp_path / "a", "{% for %}").render_chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_can_neither_reach_python_nor_files(
    tmp_path: pathlib.Path, template: str
) -> None:
    with pytest.raises(InputError, match="refuses these messages: "):
        write(tmp_path / "a", template).render_chat(MESSAGES)
    assert len(MESSAGES) == 4


def test_settings_in_the_tokenizer_do_not_cut_or_pad_prompts(tmp_path: pathlib.Path) -> None:
    made = tokenizer()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    files = {"tokenizer.json": made.to_str().encode()}
    opened = text.open_text(bundle.read_bundle(write_decoder(tmp_path / "a", files=files)))
    assert opened.decode(opened.encode("longer than three")) == "longer than three"


def sentencepiece_like() -> Any:
    """A Llama-like tokenizer: a space is part of the word behind it, bytes as <0xNN>."""
    pieces = [f"<0x{i:02X}>" for i in range(256)] + ["▁a", "▁Bc", "d", "▁", "▁▁", "ä", "<x>"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<x>"])
    return made


def any_bytes(random: np.random.Generator) -> list[int]:
    """Tokens of ``tokenizer``: nonsense and whole characters."""
    nonsense = [int(t) for t in random.integers(0, VOCABULARY, 80)]
    return nonsense + tokenizer().encode("Grüße, 世界 🙂 ok").ids + nonsense[:20]


def whole_characters(random: np.random.Generator) -> list[int]:
    """Tokens of ``sentencepiece_like``: words, and characters written as bytes.

    Its decoder takes a run of bytes back as a whole if one of them is wrong.
    """
    words = [[token] for token in range(256, 263)] + [[*c.encode()] for c in "V ß界🙂"]
    return [token for i in random.integers(0, len(words), 80) for token in words[i]]


@pytest.mark.parametrize(
    ("made", "drawn"),
    [(tokenizer(), any_bytes), (sentencepiece_like(), whole_characters)],
    ids=["bytes", "pieces"],
)
@pytest.mark.parametrize("seed", range(20))
def test_pieces_joined_are_the_decoded_text(
    made: Any, drawn: Callable[[np.random.Generator], list[int]], seed: int
) -> None:
    tokens = drawn(np.random.default_rng(seed))
    pieces = text.Pieces(decode := lambda t: made.decode(list(t), skip_special_tokens=True))
    given = [pieces.push(token) for token in tokens]
    assert "".join(given) + pieces.end() == decode(tokens)
    assert sum(map(bool, given)) > 30


@pytest.mark.parametrize(
    ("stop", "words", "pieces", "rest"),
    [
        (["END"], ["ab", "END", "c"], ["ab", ""], ""),
        (["END"], ["abEN", "D!"], ["ab", ""], ""),
        (["END"], ["abEN", "x", "EN"], ["ab", "ENx", ""], "EN"),
        (["END"], ["EEN", "D"], ["E", ""], ""),
        (["b", "ab"], ["a", "b"], ["", ""], ""),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], ""),
        ([], ["a", "b"], ["a", "b"], ""),
    ],
)
def test_text_before_a_stop_string_comes_as_soon_as_it_is_certain(
    stop: list[str], words: list[str], pieces: list[str], rest: str
) -> None:
    decode = lambda tokens: "".join(words[token] for token in tokens)  # noqa: E731
    made, given = text.Pieces(decode, stop), []
    for token in range(len(words)):
        given.append(made.push(token))
        if made.stopped:
            break
    assert (given, made.end()) == (pieces, rest)


def test_half_a_character_waits_for_its_other_half(tmp_path: pathlib.Path) -> None:
    opened = text.open_text(bundle.read_bundle(write_decoder(tmp_path / "a", section())))
    pieces = text.Pieces(opened.decode)
    assert [pieces.push(token) for token in opened.encode("é🙂")] == ["", "é", "", "", "", "🙂"]
    pieces.push(opened.encode("🙂")[0])
    assert pieces.end() == "\N{REPLACEMENT CHARACTER}"
