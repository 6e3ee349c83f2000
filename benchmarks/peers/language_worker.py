"""A long-lived process with one language model open in one engine; it runs when it is told to.

    python -m peers.language_worker ENGINE PATH CORE[,CORE]

As many threads as cores. Reads a JSON request a line from standard input, answers with one a line:
    {"do": "score", "windows": [[id, ...], ...]} -> {"nll": sum, "scored": tokens}
    {"do": "choose", "prompt": [id, ...], "choices": [[id, ...], ...]} -> {"nll": one a choice}
    {"do": "time", "prompt": [id, ...], "tokens": N} -> {"ms": wall, "ids": the greedy answer}
    {"do": "memory"}                              -> {"peak_mb": of the process so far}
The first token of a window is not scored. An error is answered as {"error": "..."}.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
_CONTEXT = 512  # positions that an engine makes room for


class Engine(Protocol):
    """A language model in an engine."""

    def scores(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits float [tokens, vocabulary] of one text."""

    def answer(self, ids: Sequence[int], tokens: int) -> list[int]:
        """That many greedy tokens, from an empty cache."""


class Edgec:
    """A bundle in edgec's runtime."""

    def __init__(self, path: pathlib.Path, threads: int) -> None:
        """Open the bundle."""
        import edgec_runtime

        self._model = edgec_runtime.load(path, threads=threads)
        self._generation = self._model.manifest.generation

    def scores(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """One run of the graph with an empty cache."""
        from edgec_runtime.cache import new_cache

        generation = self._generation
        assert generation is not None
        count = len(ids)
        plain = {
            generation.ids: np.array([ids]),
            generation.mask: np.ones((1, count)),
            generation.positions: np.arange(count)[None],
        }
        binding = self._model.session.io_binding()
        dtypes = {value.name: value.dtype for value in self._model.inputs}
        for name, array in plain.items():
            if name is not None:
                binding.bind_cpu_input(name, np.ascontiguousarray(array, dtypes[name]))
        binding.bind_output(generation.logits)
        cache = new_cache(self._model.manifest, generation, 1)
        cache.reserve(count)
        cache.bind(binding)
        self._model.run_bound(binding)
        logits: np.ndarray[Any, Any] = binding.get_outputs_as_ortvaluevector()[0].numpy()[0]
        return logits

    def answer(self, ids: Sequence[int], tokens: int) -> list[int]:
        """``Model.generate``."""
        return list(self._model.generate(list(ids), max_new_tokens=tokens, temperature=0).tokens)


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: pathlib.Path, threads: int) -> None:
        """Open the file; logits of every position are kept where ``scores`` asks."""
        import llama_cpp

        self._library = llama_cpp
        self._path, self._threads = path, threads
        self._model = self._open(every_logit=False)
        self._scorer: Any = None

    def _open(self, *, every_logit: bool) -> Any:
        return self._library.Llama(
            str(self._path),
            n_ctx=_CONTEXT,
            n_batch=_CONTEXT,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            logits_all=every_logit,
            verbose=False,
        )

    def scores(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """One evaluation from an empty cache."""
        if self._scorer is None:
            self._scorer = self._open(every_logit=True)
        self._scorer.reset()
        self._scorer.eval(list(ids))
        return np.array(self._scorer.scores[: len(ids)])

    def answer(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Evaluate, and take the largest logit."""
        model = self._model
        model.reset()
        taken: list[int] = []
        given = list(ids)
        for _ in range(tokens):
            model.eval(given)
            logits = self._library.llama_get_logits_ith(model.ctx, -1)
            given = [int(np.argmax(np.ctypeslib.as_array(logits, (model.n_vocab(),))))]
            taken += given
        return taken


class GenAi:
    """A folder of onnxruntime-genai's model builder in onnxruntime-genai."""

    def __init__(self, path: pathlib.Path, threads: int) -> None:
        """Open the folder."""
        import onnxruntime_genai

        self._library = onnxruntime_genai
        session = {"session_options": {"intra_op_num_threads": threads}}
        config = onnxruntime_genai.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = onnxruntime_genai.Model(config)

    def _generator(self, length: int) -> Any:
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, do_sample=False, batch_size=1)
        return self._library.Generator(self._model, parameters)

    def scores(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """The logits of the prompt."""
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(np.array([ids], np.int32))
        return np.array(generator.get_output("logits"))[0]

    def answer(self, ids: Sequence[int], tokens: int) -> list[int]:
        """``generate_next_token``."""
        generator = self._generator(len(ids) + tokens)
        taken: list[int] = []
        generator.append_tokens(np.array([ids], np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
            taken.append(int(generator.get_next_tokens()[0]))
        return taken


ENGINES: Mapping[str, Callable[[pathlib.Path, int], Engine]] = {
    "edgec": Edgec,
    "llama.cpp": LlamaCpp,
    "genai": GenAi,
}


def main() -> None:
    name, path, listed = sys.argv[1:4]
    cores = {int(core) for core in listed.split(",")}
    os.sched_setaffinity(0, cores)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints must not end up among the answers
    engine: Any = None
    try:
        engine = ENGINES[name](pathlib.Path(path), len(cores))
        answer: dict[str, Any] = {}
    except Exception as error:  # whatever an engine raises is a row's reason
        answer = {"error": _line(error)}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = DEEDS[request.pop("do")](engine, **request)
        except Exception as error:  # as above
            answer = {"error": _line(error)}
        print(json.dumps(answer), file=answers, flush=True)


def score(engine: Engine, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Negative log likelihood in nats, summed over all tokens but the first of each window."""
    total, scored = 0.0, 0
    for ids in windows:
        logits = engine.scores(ids)[:-1]
        total += _nll(logits, ids[1:])
        scored += len(logits)
    return {"nll": total, "scored": scored}


def choose(
    engine: Engine, prompt: Sequence[int], choices: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Negative log likelihood in nats of each choice behind the prompt.

    Choices of one token are all scored by the same run.
    """
    logits = np.empty(0)
    found: dict[int, float] = {}
    for i, choice in sorted(enumerate(choices), key=lambda one: -len(one[1])):  # short ones last
        if not found or len(choice) > 1:
            logits = engine.scores([*prompt, *choice[:-1]])[len(prompt) - 1 :]
        found[i] = _nll(logits[: len(choice)], choice)
    return {"nll": [found[i] for i in range(len(choices))]}


def _nll(logits: np.ndarray[Any, Any], ids: Sequence[int]) -> float:
    """Of the ids, each by its row of logits [len(ids), vocabulary]."""
    exact = np.asarray(logits, np.float64)
    top = exact.max(1, keepdims=True)
    normal = top[:, 0] + np.log(np.exp(exact - top).sum(1))
    return float((normal - exact[np.arange(len(exact)), ids]).sum())


def timed(engine: Engine, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """One answer to one prompt, wall time: that is what a user waits for."""
    started = time.perf_counter()
    taken = engine.answer(prompt, tokens)
    ms = 1e3 * (time.perf_counter() - started)
    if len(taken) != tokens:
        raise ValueError(f"the answer ended after {len(taken)} of {tokens} tokens")
    return {"ms": ms, "ids": taken}


def memory(engine: Engine) -> dict[str, Any]:
    """1 MB = 1e6 bytes. Not by getrusage: a new process starts with what its parent took."""
    status = pathlib.Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return {"peak_mb": int(line.split()[1]) * 1024 / 1e6}


DEEDS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "score": score,
    "choose": choose,
    "time": timed,
    "memory": memory,
}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


if __name__ == "__main__":
    main()
