"""Positions that an attention mask hides: what a model gives there, nobody reads.

Transformers take sequences padded to one length with an input ``attention_mask`` of shape
[batch, sequence], 0 where a position is padding (the name that Hugging Face's models use).
Judging or calibrating on padding would judge mostly that: short texts padded to 128 tokens are
nine tenths of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

INPUT = "attention_mask"

_ANSWER = "decoder_input_ids"  # ids of the answer of an encoder-decoder


def shown_positions(feeds: Mapping[str, Array]) -> Array | None:
    """bool [batch, sequence], True where a position counts; None if all or none do.

    None for an encoder-decoder as well: its mask is of what the encoder reads, its outputs are of
    another sequence.
    """
    mask = feeds.get(INPUT)
    if mask is None or _ANSWER in feeds or mask.ndim != 2 or mask.dtype.kind not in "biuf":
        return None
    shown = mask > 0
    return shown if shown.any() and not shown.all() else None


def only_shown(array: Array, shown: Array | None) -> Array:
    """The array, or [positions, ...] of it where its first axes are those of the mask."""
    if shown is None or array.ndim < 3 or array.shape[:2] != shown.shape:
        return array
    kept: Array = array[shown]
    return kept
