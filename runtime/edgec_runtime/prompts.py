"""What ``generate`` is given: texts, chats, token ids, or features for an encoder.

A model without an encoder goes on with its prompts: they are the first tokens of the rows. An
encoder reads them instead, padded on the right, and every row starts with the tokens that the
bundle states.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec_runtime.errors import InputError
from edgec_runtime.feeds import check_feeds
from edgec_runtime.generation import ENCODER, Encoder, Generation
from edgec_runtime.text import Message, Text

if TYPE_CHECKING:
    from edgec_runtime.manifest import Manifest, Value

Array = np.ndarray[Any, Any]
Prompt = str | Array | Sequence[int] | Sequence[Message]
Prompts = list[str] | list[Array] | Sequence[Sequence[int]] | Sequence[Sequence[Message]]


def listed(prompt: Any, manifest: Manifest, encoder: Encoder | None) -> tuple[list[Any], bool]:
    """The prompts, and whether it was one alone. Raises InputError for something else."""
    if encoder is not None and takes_features(manifest, encoder):
        return _listed_features(prompt, _read_by(manifest, encoder))
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, Sequence) and len(prompt):
        if isinstance(prompt[0], (Mapping, numbers.Integral)):
            return [prompt], True
        return [one.tolist() if isinstance(one, np.ndarray) else one for one in prompt], False
    if isinstance(prompt, Sequence):
        raise _empty()
    raise _no_prompt(prompt)


def is_text(prompt: Any) -> bool:
    """Whether a prompt needs the tokenizer. Raises InputError unless it is a prompt."""
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, np.ndarray):  # features, which were checked
        return False
    if not isinstance(prompt, Sequence):
        raise _no_prompt(prompt)
    if not prompt:
        raise _empty()
    if not isinstance(prompt[0], Mapping) and not all(
        isinstance(token, numbers.Integral) for token in prompt
    ):
        raise _no_prompt(prompt)
    return isinstance(prompt[0], Mapping)


def encode(prompt: Any, text: Text | None) -> list[int]:
    """The tokens of one prompt. Raises InputError if there are none."""
    if text is None or not is_text(prompt):
        return [int(token) for token in prompt]
    tokens = text.encode(prompt) if isinstance(prompt, str) else text.encode_chat(prompt)
    if not tokens:
        raise _empty()
    return tokens


def encoder_feeds(
    manifest: Manifest, generation: Generation, prompts: Sequence[Any], text: Text | None
) -> dict[str, Array]:
    """The feeds of the encoder for some prompts, checked. Raises InputError."""
    encoder, inputs = generation.encoder, manifest.graphs[ENCODER].inputs
    assert encoder is not None  # whoever calls looked
    if takes_features(manifest, encoder):
        feeds = {encoder.input: np.stack(prompts)}
        return check_feeds(inputs, (), feeds)
    rows = [encode(prompt, text) for prompt in prompts]
    width = max(map(len, rows))
    if encoder.mask is None and min(map(len, rows)) < width:
        raise InputError("this model has no mask: give prompts of one length, or one at a time")
    feeds = {encoder.input: np.array([row + [generation.pad] * (width - len(row)) for row in rows])}
    if encoder.mask is not None:
        feeds[encoder.mask] = np.arange(width) < np.array(list(map(len, rows)))[:, None]
    typed = {value.name: feeds[value.name].astype(value.dtype) for value in inputs}
    return check_feeds(inputs, (), typed)


def start_tokens(start: Any, encoder: Encoder | None) -> list[int]:
    """The tokens in front of every answer. Raises InputError for no list of tokens."""
    if encoder is None:
        raise InputError("start is for models with an encoder; begin the prompt with these tokens")
    if start is None:
        return list(encoder.start)
    tokens = start.tolist() if isinstance(start, np.ndarray) else start
    fits = isinstance(tokens, Sequence) and not isinstance(tokens, str) and len(tokens) > 0
    if not fits or not all(isinstance(token, numbers.Integral) for token in tokens):
        raise InputError(f"start is {start!r:.60}, expected token ids, one at least")
    return [int(token) for token in tokens]


def takes_features(manifest: Manifest, encoder: Encoder) -> bool:
    """True if the encoder reads numbers that no tokenizer gives."""
    return _read_by(manifest, encoder).dtype.startswith("float")


def _listed_features(prompt: Any, value: Value) -> tuple[list[Any], bool]:
    """Features of one prompt, or of many as one array or as a list of arrays."""
    rank = len(value.shape) - 1
    many = list(prompt) if isinstance(prompt, (list, tuple, np.ndarray)) else [prompt]
    single = isinstance(prompt, np.ndarray) and prompt.ndim == rank
    rows = [prompt] if single else many
    if not rows:
        raise _empty()
    sizes = {row.shape for row in rows if isinstance(row, np.ndarray)}
    if not all(isinstance(row, np.ndarray) and row.ndim == rank for row in rows) or len(sizes) > 1:
        shape = ", ".join("?" if size is None else str(size) for size in value.shape[1:])
        raise InputError(
            f"the prompt is {prompt!r:.60}, expected '{value.name}': an array {value.dtype} "
            f"[{shape}], or several of one shape"
        )
    return rows, single


def _read_by(manifest: Manifest, encoder: Encoder) -> Value:
    [value] = [v for v in manifest.graphs[ENCODER].inputs if v.name == encoder.input]
    return value


def _empty() -> InputError:
    return InputError("the prompt is empty; give at least one token")


def _no_prompt(prompt: Any) -> InputError:
    return InputError(
        f"the prompt is {prompt!r:.60}, expected a text, messages, token ids, or a list of them"
    )
