"""A text file as calibration or evaluation data of a language model: windows of token ids.

The text is cut into windows of 256 tokens that do not overlap, from its beginning, 64 at most;
what is left at the end and fills no window is dropped, unless it is all there is. Every window
starts with an empty cache and without a token in front; its first token is asked of nothing.
Perplexities compare only between equal windows of equal text.

Left out on purpose: overlapping windows (a stride), which cost more and rank models alike, and
a token for the beginning. Whoever needs other windows gives arrays of ``input_ids``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from edgec.decoder import IDS
from edgec.errors import DataError

WINDOW = 256  # tokens
MOST = 64  # windows of one text
SUFFIX = ".txt"

_MOST_CHARACTERS = 40 * WINDOW * MOST  # read of a file: no script has more in a token on average

Encode = Callable[[str], list[int]]  # text -> token ids, without special tokens


def token_windows(path: pathlib.Path, encode: Encode | None, where: str) -> Iterator[Any]:
    """The windows of a text file, each as {"input_ids": int64 [1, tokens]}.

    encode: of the model's tokenizer; None if it has none. Raises DataError, that begins with
    ``where``.
    """
    if encode is None:
        raise DataError(
            f"{where}: a text file is data for a language model with a tokenizer, which this model "
            "has not; give arrays of its inputs"
        )
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(_MOST_CHARACTERS)
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not a text in UTF-8: {error.reason}") from error
    ids = encode(text)
    if len(ids) < 2:
        raise DataError(f"{where}: the text has {len(ids)} tokens; at least 2 are needed")
    whole = ids[: max(len(ids) // WINDOW, 1) * WINDOW][: MOST * WINDOW]
    for start in range(0, len(whole), WINDOW):
        yield {IDS: np.asarray([whole[start : start + WINDOW]], np.int64)}
