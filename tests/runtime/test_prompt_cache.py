"""The key-value cache: kept between calls, growing or written in place, and its memory."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
from bundle_samples import write_sample
from language_samples import CONTEXT, HEAD_SIZE, HEADS, section, write_decoder

import edgec_runtime
from edgec_runtime.cache import CacheTensor
from edgec_runtime.errors import InputError
from edgec_runtime.generation import CachePair

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def load(path: pathlib.Path, capacity: int | str = "past", **changes: Any) -> edgec_runtime.Model:
    return edgec_runtime.load(
        write_decoder(path, section(**{"eos": ()} | changes), capacity=capacity)
    )


@pytest.fixture(params=["growing", "shared", "fixed"])
def model(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> edgec_runtime.Model:
    if request.param == "fixed":
        return load(tmp_path / "a", capacity=CONTEXT, cache="shared")
    return load(tmp_path / "a", cache=request.param)


def uncached(model: edgec_runtime.Model, prompt: list[int], count: int) -> list[int]:
    """Greedy answer that reads everything anew for each token, without ``generate``."""
    tokens = list(prompt)
    [past, *_] = [v.shape[2] for v in model.inputs if v.name == "past.key"]
    length = past if isinstance(past, int) else 0
    empty = np.zeros((1, HEADS, length, HEAD_SIZE), np.float32)
    for _ in range(count):
        feeds = {"past.key": empty, "past.value": empty, "mask": np.ones((1, len(tokens)), "i8")}
        outputs = model(**feeds, ids=np.array([tokens]))
        tokens.append(int(outputs["logits"][0, -1].argmax()))
    return tokens[len(prompt) :]


def test_an_answer_is_that_of_reading_everything_anew(model: edgec_runtime.Model) -> None:
    answer = model.generate(PROMPT, max_new_tokens=30)
    assert list(answer.tokens) == uncached(model, PROMPT, 30)
    assert len(set(answer.tokens)) > 5


def test_a_conversation_reads_only_what_is_new(model: edgec_runtime.Model) -> None:
    cache = edgec_runtime.PromptCache()
    first = model.generate(PROMPT, max_new_tokens=6, cache=cache)
    assert first.cached_tokens == 0
    assert cache.tokens == (*PROMPT, *first.tokens[:-1])
    follow = [*PROMPT, *first.tokens, 7, 8]
    second = model.generate(follow, max_new_tokens=20, cache=cache)
    assert second.cached_tokens == len(PROMPT) + 5
    assert list(second.tokens) == uncached(model, follow, 20)
    # back to the middle of the first prompt, and the very same prompt once more
    for prompt, known in (([*PROMPT[:3], 50], 3), ([*PROMPT[:3], 50], 3)):
        answer = model.generate(prompt, max_new_tokens=4, cache=cache)
        assert answer.cached_tokens == known
        assert list(answer.tokens) == uncached(model, prompt, 4)
    other = model.generate([99], max_new_tokens=4, cache=cache)
    assert (other.cached_tokens, list(other.tokens)) == (0, uncached(model, [99], 4))


def test_chunks_of_a_prompt_change_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, run = [0], edgec_runtime.Model.run_bound

    def counting(self: edgec_runtime.Model, binding: Any) -> None:
        runs[0] += 1
        run(self, binding)

    monkeypatch.setattr(edgec_runtime.Model, "run_bound", counting)
    for cache in ("growing", "shared"):
        model, runs[0] = load(tmp_path / cache, cache=cache, prompt_chunk=3), 0
        answer = model.generate(PROMPT, max_new_tokens=10)
        assert runs[0] == 3 + 9  # 8 tokens in threes, then one by one
        assert list(answer.tokens) == uncached(model, PROMPT, 10)


def test_a_stream_that_is_dropped_leaves_what_it_has_read(model: edgec_runtime.Model) -> None:
    cache = edgec_runtime.PromptCache()
    stream = model.generate("abc", max_new_tokens=30, stream=True, cache=cache)
    assert cache.tokens == ()
    next(stream)
    del stream
    assert len(cache.tokens) >= 3
    answer = model.generate("abc", max_new_tokens=5, cache=cache)
    assert answer.cached_tokens == 2
    assert answer.tokens == model.generate("abc", max_new_tokens=5).tokens


def test_a_cache_in_use_is_empty_for_a_second_call(model: edgec_runtime.Model) -> None:
    cache = edgec_runtime.PromptCache()
    expected = model.generate("abc", max_new_tokens=9, cache=cache)
    assert len(cache.tokens) > 3
    stream = model.generate("abc", max_new_tokens=9, stream=True, cache=cache)
    text = next(stream)
    between = model.generate("abc", max_new_tokens=9, cache=cache)
    assert (between.cached_tokens, between.tokens) == (0, expected.tokens)
    assert text + "".join(stream) == expected.text


def test_a_cache_of_another_model_is_not_used(
    model: edgec_runtime.Model, tmp_path: pathlib.Path
) -> None:
    cache = edgec_runtime.PromptCache()
    model.generate(PROMPT, max_new_tokens=3, cache=cache)
    other = load(tmp_path / "b")
    assert other.generate(PROMPT, max_new_tokens=3, cache=cache).cached_tokens == 0


def test_a_cache_of_another_adapter_is_not_used(model: edgec_runtime.Model) -> None:
    cache = edgec_runtime.PromptCache()
    model.generate(PROMPT, max_new_tokens=3, cache=cache)
    model._adapter = type("Adapted", (), {"options": lambda self: None})()  # type: ignore[assignment]
    assert model.generate(PROMPT, max_new_tokens=3, cache=cache).cached_tokens == 0
    assert model.generate(PROMPT, max_new_tokens=3, cache=cache).cached_tokens == len(PROMPT) - 1


def test_a_run_that_fails_leaves_the_cache_usable(
    model: edgec_runtime.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = edgec_runtime.PromptCache()
    runs, run = [0], edgec_runtime.Model.run_bound

    def failing(self: edgec_runtime.Model, binding: Any) -> None:
        runs[0] += 1
        if runs[0] == 4:
            raise InputError("no more")
        run(self, binding)

    monkeypatch.setattr(edgec_runtime.Model, "run_bound", failing)
    with pytest.raises(InputError, match="no more"):
        model.generate(PROMPT, max_new_tokens=9, cache=cache)
    assert len(cache.tokens) == len(PROMPT) + 2
    answer = model.generate(PROMPT, max_new_tokens=9, cache=cache)
    assert answer.cached_tokens == len(PROMPT) - 1
    assert list(answer.tokens) == uncached(model, PROMPT, 9)


def test_a_growing_cache_is_not_copied_in_python(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path / "a")
    from edgec_runtime import cache

    made: list[int] = []
    real = cache.ort_value

    def counting(array: Any) -> Any:
        made.append(array.nbytes)
        return real(array)

    monkeypatch.setattr(cache, "ort_value", counting)
    model.generate(PROMPT, max_new_tokens=20)
    assert made == [0, 0]


def test_a_capacity_limits_prompt_and_answer(tmp_path: pathlib.Path) -> None:
    model = load(tmp_path / "a", capacity=32, cache="shared")
    assert len(model.generate(PROMPT).tokens) == 32 - len(PROMPT)
    with pytest.raises(InputError, match="the model has room for 32 together"):
        model.generate(PROMPT, max_new_tokens=25)


def test_memory_is_told_before_loading(tmp_path: pathlib.Path) -> None:
    token = 2 * HEADS * HEAD_SIZE * 4  # key and value, float32
    paths = {
        "growing": write_decoder(tmp_path / "g"),
        "shared": write_decoder(tmp_path / "s", section(cache="shared")),
        "fixed": write_decoder(tmp_path / "f", section(cache="shared"), capacity=64),
    }
    weights = 4 * (2 * 260 * 32 + 4 * 32 * 32 + 2 * 192 * 8)
    needed = edgec_runtime.memory_needed(paths["growing"], tokens=10)
    # gaps between tensors: at most 64 bytes each
    assert weights <= needed.weights <= weights + 64 * 8
    assert (needed.cache, needed.total) == (2 * 10 * token, needed.weights + 2 * 10 * token)
    assert edgec_runtime.memory_needed(paths["growing"]).cache == 2 * CONTEXT * token
    assert edgec_runtime.memory_needed(paths["growing"], 10, batch=3).cache == 60 * token
    assert edgec_runtime.memory_needed(paths["shared"], tokens=10).cache == 10 * token
    assert edgec_runtime.memory_needed(paths["fixed"], tokens=10).cache == 64 * token


@pytest.mark.skipif(sys.platform != "linux", reason="resident sizes come from /proc")
def test_a_long_buffer_takes_memory_as_it_is_written() -> None:
    pair, dtype = CachePair("past", "present"), np.dtype(np.float32)
    tensor = CacheTensor(pair, heads=4, head_size=64, dtype=dtype, capacity=None)
    before = resident_bytes()
    buffers = [tensor.empty(1, 8192) for _ in range(16)]  # 8 MiB each
    for buffer in buffers:
        assert buffer.shape == (1, 4, 8192, 64)
        assert not buffer[0, 1, 5000].any()
        buffer[:, :, 0] = 1.0  # the first token of every head
    # 64 heads, a page or two each; with huge pages 128 MiB
    assert resident_bytes() - before < 16 << 20


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_memory_of_what_cannot_be_is_refused(tmp_path: pathlib.Path) -> None:
    path = write_decoder(tmp_path / "a")
    for tokens in (0, CONTEXT + 1):
        with pytest.raises(InputError, match=f"{tokens} tokens asked, it can read 1 to {CONTEXT}"):
            edgec_runtime.memory_needed(path, tokens)
    with pytest.raises(InputError, match="it is no language model"):
        edgec_runtime.memory_needed(write_sample(tmp_path / "b"))
