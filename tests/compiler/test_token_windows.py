"""Text and token ids as data of a language model, and what it is judged by."""

import pathlib
from typing import Any

import numpy as np
import pytest

from edgec.data import InputSpec, open_data
from edgec.decoder import NO_LABEL, is_decoder, positions
from edgec.errors import DataError
from edgec.metrics import METRICS
from edgec.token_windows import MOST, WINDOW

OPEN = (None, None)
SPECS = (
    InputSpec("input_ids", np.dtype(np.int64), OPEN),
    InputSpec("attention_mask", np.dtype(np.int64), OPEN),
    InputSpec("position_ids", np.dtype(np.int64), OPEN),
    InputSpec("past_key_values.0.key", np.dtype(np.float32), (None, 3, None, 8)),
    InputSpec("past_key_values.0.value", np.dtype(np.float32), (None, 3, None, 8)),
)
PERPLEXITY = METRICS["perplexity"]


def codes(text: str) -> list[int]:
    """A tokenizer for which a character is a token."""
    return [ord(character) for character in text]


def text_file(folder: pathlib.Path, length: int) -> str:
    path = folder / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(length)), encoding="utf-8")
    return str(path)


def lengths(folder: pathlib.Path, length: int) -> list[int]:
    data = open_data(text_file(folder, length), SPECS, "evaluation", codes)
    return [feeds["input_ids"].shape[1] for feeds in data]


def test_text_is_cut_into_whole_windows(tmp_path: pathlib.Path) -> None:
    assert lengths(tmp_path, 2 * WINDOW + 17) == [WINDOW, WINDOW]


def test_a_short_text_is_one_short_window(tmp_path: pathlib.Path) -> None:
    assert lengths(tmp_path, 20) == [20]


def test_a_long_text_is_not_read_to_its_end(tmp_path: pathlib.Path) -> None:
    assert lengths(tmp_path, (MOST + 3) * WINDOW) == [WINDOW] * MOST


def test_a_window_starts_with_an_empty_cache_and_asks_for_its_tokens(tmp_path: Any) -> None:
    data = open_data(text_file(tmp_path, WINDOW), SPECS, "evaluation", codes)
    [sample] = data.samples()
    assert sample.feeds["past_key_values.0.key"].shape == (1, 3, 0, 8)
    assert sample.feeds["attention_mask"].sum() == WINDOW
    np.testing.assert_array_equal(sample.feeds["position_ids"][0], np.arange(WINDOW))
    np.testing.assert_array_equal(sample.labels["label"], sample.feeds["input_ids"])


@pytest.mark.parametrize(
    ("content", "encode", "message"),
    [
        (b"words", None, "language model with a tokenizer"),
        (b"\xff\xfe\xfa", codes, "not a text in UTF-8"),
        (b"w", codes, "at least 2"),
        (None, codes, "No such file"),
    ],
)
def test_text_that_cannot_be_data_is_refused(
    tmp_path: pathlib.Path, content: bytes | None, encode: Any, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data(str(path), SPECS, "evaluation", encode)


def test_ids_alone_are_data_for_a_decoder(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(12).reshape(2, 6))
    samples = list(open_data(str(tmp_path / "ids.npy"), SPECS, "evaluation").samples())
    assert [s.feeds["input_ids"].tolist() for s in samples] == [
        [[0, 1, 2, 3, 4, 5]],
        [[6, 7, 8, 9, 10, 11]],
    ]
    assert samples[0].feeds["past_key_values.0.value"].size == 0


def test_padding_is_not_asked_for_and_does_not_count_as_a_position() -> None:
    shown = np.array([[0, 0, 1, 1]])

    def given() -> Any:
        yield {"input_ids": np.array([[9, 9, 5, 6]]), "attention_mask": shown}

    [sample] = open_data(given, SPECS, "evaluation").samples()
    assert sample.labels["label"].tolist() == [[NO_LABEL, NO_LABEL, 5, 6]]
    assert sample.feeds["position_ids"].tolist() == [[1, 1, 0, 1]]
    np.testing.assert_array_equal(sample.feeds["position_ids"], positions(shown))


def test_labels_that_came_with_the_ids_stay() -> None:
    def given() -> Any:
        yield {"input_ids": np.array([[5, 6]])}, np.array([[NO_LABEL, 3]])

    [sample] = open_data(given, SPECS, "evaluation").samples()
    assert sample.labels["label"].tolist() == [[NO_LABEL, 3]]


def test_an_empty_array_is_still_an_error_but_for_the_cache() -> None:
    with pytest.raises(DataError, match="'input_ids' is empty"):
        open_data(lambda: [{"input_ids": np.zeros((1, 0), np.int64)}], SPECS, "evaluation")


def test_a_model_without_a_cache_is_no_decoder() -> None:
    assert is_decoder([spec.name for spec in SPECS])
    assert not is_decoder(["input_ids", "attention_mask"])
    assert not is_decoder(["input_ids", "pixel_values", "past_key_values.0.key"])


# --- perplexity -------------------------------------------------------------------------------


def test_perplexity_of_even_scores_is_the_size_of_the_vocabulary() -> None:
    label = np.array([[1, 2, 3, 4]])
    kept = PERPLEXITY.kept({"logits": np.zeros((1, 4, 50), np.float32)}, {"label": label})
    assert PERPLEXITY(kept, label) == pytest.approx(50)


def test_perplexity_weighs_tokens_and_leaves_unasked_ones_out() -> None:
    """Two samples: nll ln 2 once, and ln 8 three times."""
    first = np.zeros((1, 2, 2), np.float32)
    second = np.zeros((1, 6, 8), np.float32)
    second[0, 3:] = np.eye(8)[:3] * 99  # asked of nothing
    labels = [np.array([[0, 1]]), np.array([[0, 1, 2, 3, NO_LABEL, NO_LABEL]])]
    kept = [
        PERPLEXITY.kept({"logits": logits}, {"label": label})["loss"]
        for logits, label in zip((first, second), labels, strict=True)
    ]
    expected = np.exp((np.log(2) + 3 * np.log(8)) / 4)
    assert PERPLEXITY({"loss": np.concatenate(kept)}, labels) == pytest.approx(expected)


def test_perplexity_asks_each_token_of_the_scores_in_front_of_it() -> None:
    logits = np.full((1, 3, 4), -50, np.float32)
    logits[0, 0, 3] = logits[0, 1, 2] = 50  # 3 follows the first token, 2 the second
    right = PERPLEXITY.kept({"logits": logits}, {"label": np.array([[0, 3, 2]])})
    assert PERPLEXITY(right, None) == pytest.approx(1)
    assert not PERPLEXITY.higher_is_better and PERPLEXITY.drop(10.0, 12.0) == 2.0


@pytest.mark.parametrize(
    ("outputs", "label", "message"),
    [
        ({"scores": np.zeros((1, 2, 3))}, [[0, 1]], "language model with an output 'logits'"),
        ({"logits": np.zeros((1, 2, 3))}, [[0, 1, 2]], "expected token ids"),
        ({"logits": np.zeros((1, 2, 3))}, [[0, 3]], "label 3 is no token of 3"),
    ],
)
def test_perplexity_refuses_what_it_cannot_judge(outputs: Any, label: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PERPLEXITY.kept(outputs, {"label": np.array(label)})


def test_perplexity_of_nothing_asked_is_refused() -> None:
    label = np.array([[0, NO_LABEL]])
    kept = PERPLEXITY.kept({"logits": np.zeros((1, 2, 3))}, {"label": label})
    with pytest.raises(DataError, match="two tokens in a row"):
        PERPLEXITY(kept, label)
