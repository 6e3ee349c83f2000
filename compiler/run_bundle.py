"""Runs a bundle on data, on a picture or on a prompt, for ``edgec run``."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import edgec_runtime
from edgec.errors import DataError, InputError, OutputError
from edgec.report import plain
from edgec.runners import open_bundle_data
from edgec_runtime.bundle import read_bundle
from edgec_runtime.cache import not_a_language_model
from edgec_runtime.text import open_text

if TYPE_CHECKING:
    from edgec_runtime.generate import Options
    from edgec_runtime.generation import Generation
    from edgec_runtime.text import Text

_SHOWN = 8  # values of an output that are printed
_TOP = 5  # classes that are printed


def run_bundle(
    path: pathlib.Path,
    *,
    data: str | None = None,
    image: pathlib.Path | None = None,
    output: pathlib.Path | None = None,
    threads: int | None = None,
    any_target: bool = False,
) -> dict[str, Any]:
    """Outputs of the bundle on each sample, summarised; whole into ``output`` (.npz) if given.

    Without data or image, the bundle's golden sample is run.
    """
    if data is not None and image is not None:
        raise InputError("give --input or --image, not both")
    if output is not None and output.suffix != ".npz":
        raise OutputError(f"{output}: outputs are written as .npz; choose a name ending in .npz")
    if output is not None and not output.parent.is_dir():
        raise OutputError(f"{output}: there is no folder {output.parent}; make it first")
    model = edgec_runtime.load(path, threads=threads, any_target=any_target)
    samples: list[Mapping[str, np.ndarray[Any, Any]]]
    if image is not None:
        samples, what = [model.prepare_image(_pixels(image))], str(image)
    elif data is not None:
        samples = list(open_bundle_data(data, path, "input"))
        what = data
    else:
        samples, what = [model.golden_inputs()], "the golden sample of the bundle"
    results = [model(**feeds) for feeds in samples]
    if output is not None:
        _save(output, results)
    return {
        "bundle": str(path),
        "input": what,
        "samples": len(results),
        "threads": model.threads,
        "outputs": [
            {name: _summary(value, model.labels) for name, value in r.items()} for r in results
        ],
        **({"written": str(output)} if output is not None else {}),
    }


def stream_answer(
    path: pathlib.Path, prompt: str, *, settings: Options, opening: Opening
) -> Iterator[str]:
    """The answer of a language model to a prompt, piece by piece as it comes.

    settings: those of ``Model.generate``. Raises InputError if the bundle is no language model
    or has no tokenizer.
    """
    if opening.device is not None:
        from edgec.devices.answer import answer_pieces

        text, tokens = opening.there(path, prompt, settings)
        return answer_pieces(tokens, text, list(settings.get("stop", ())))
    model, asked, settings = opening.of(path, prompt, settings)
    return model.generate(asked, stream=True, **settings)


def whole_answer(
    path: pathlib.Path, prompt: str, *, settings: Options, opening: Opening
) -> dict[str, Any]:
    """The answer as JSON data, with its tokens and why it ended; as ``stream_answer``.

    On a device: its tokens up to a text that stops them, without why.
    """
    facts = {"bundle": str(path), "prompt": prompt}
    if opening.device is not None:
        from edgec.devices.answer import answer_pieces

        text, tokens = opening.there(path, prompt, settings)
        seen: list[int] = []
        heard = (seen.append(token) or token for token in tokens)  # type: ignore[func-returns-value]
        pieces = answer_pieces(heard, text, list(settings.get("stop", ())))
        return {**facts, "device": opening.device, "text": "".join(pieces), "tokens": seen}
    model, asked, settings = opening.of(path, prompt, settings)
    completion = model.generate(asked, **settings)
    return {**facts, **dataclasses.asdict(completion)}


@dataclass(frozen=True)
class Opening:
    """How a language model is opened, and how it is given a prompt.

    raw: the model continues the prompt. Otherwise the prompt is what a user says, if the bundle
    has a chat template. device: where it runs; None is this process. draft: a bundle that guesses
    what it will write; not on a device.
    """

    threads: int | None = None
    any_target: bool = False
    raw: bool = False
    device: str | None = None
    draft: pathlib.Path | None = None

    def of(
        self, path: pathlib.Path, prompt: str, settings: Options
    ) -> tuple[edgec_runtime.Model, Any, Options]:
        """The model, and prompt and settings as ``Model.generate`` takes them."""
        model = edgec_runtime.load(path, threads=self.threads, any_target=self.any_target)
        if self.draft is not None:
            # one thread: those of two sessions would wait actively for each other
            draft = edgec_runtime.load(self.draft, threads=1, any_target=self.any_target)
            settings = {**settings, "draft": draft}
        return model, self._asked(model.manifest.generation, prompt), settings

    def there(
        self, path: pathlib.Path, prompt: str, settings: Options
    ) -> tuple[Text, Iterator[int]]:
        """The bundle's tokenizer, and the tokens of the answer as the device gives them."""
        from edgec.devices.answer import answer_tokens

        bundle = read_bundle(path)
        generation = bundle.manifest.generation
        if generation is None:
            raise not_a_language_model(f"bundle {bundle.path}")
        text, asked = open_text(bundle), self._asked(generation, prompt)
        tokens = text.encode(asked) if isinstance(asked, str) else text.encode_chat(asked)
        options: Any = {name: value for name, value in settings.items() if name != "stop"}
        device = str(self.device)
        return text, answer_tokens(
            device, path, tokens, options=options, threads=self.threads, any_target=self.any_target
        )

    def _asked(self, generation: Generation | None, prompt: str) -> Any:
        if self.raw or generation is None or generation.chat_template is None:
            return prompt
        return [{"role": "user", "content": prompt}]


def _summary(value: np.ndarray[Any, Any], labels: tuple[str, ...] | None) -> dict[str, Any]:
    flat = value.reshape(-1)
    facts: dict[str, Any] = {"dtype": str(value.dtype), "shape": list(value.shape)}
    if labels is not None and flat.size == len(labels):
        best = np.argsort(-flat, kind="stable")[:_TOP]
        facts["top"] = [{"label": labels[i], "score": round(float(flat[i]), 4)} for i in best]
    else:
        facts["first_values"] = plain([v.item() for v in flat[:_SHOWN]])
    return facts


def _pixels(path: pathlib.Path) -> np.ndarray[Any, Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading a picture needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise DataError(f"{path}: not a picture that Pillow can read: {error}") from error


def _save(path: pathlib.Path, results: list[dict[str, np.ndarray[Any, Any]]]) -> None:
    """All outputs, samples first, written whole or not at all."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name in results[0]:
        values = [r[name] for r in results]
        same = len({v.shape for v in values}) == 1
        joined = {name: np.concatenate(values) if values[0].ndim else np.stack(values)}
        arrays |= joined if same else {f"{name}.{i}": v for i, v in enumerate(values)}
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
