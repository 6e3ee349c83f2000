"""Tiny encoder-decoders with random weights for the tests, and transformers' greedy answers."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tiny_language
import torch

Array = np.ndarray[Any, Any]

BINS, FRAMES = 8, 24  # of tiny Whisper's features
START, SILENT = 3, 4  # tokens of tiny Whisper: what an answer begins with, and no timestamps
SUPPRESSED, SUPPRESSED_FIRST = (40, 41, 42, 43), (7, 2)
_SIZE = 64  # of the hidden states


def save_whisper(into: pathlib.Path, **settings: Any) -> Any:
    """Save a Whisper of two layers as transformers does, with a tokenizer; returns the model.

    settings: of generation_config.
    """
    import transformers

    tokenizer = tiny_language.make_tokenizer()
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=BINS,
        max_source_positions=FRAMES // 2,
        max_target_positions=64,
        d_model=_SIZE,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        decoder_start_token_id=START,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = _random(transformers.WhisperForConditionalGeneration(config))
    model.generation_config = transformers.GenerationConfig(
        **{
            "decoder_start_token_id": START,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "suppress_tokens": list(SUPPRESSED),
            "begin_suppress_tokens": list(SUPPRESSED_FIRST),
            "no_timestamps_token_id": SILENT,
            **settings,
        }
    )
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    return model


def save_t5(into: pathlib.Path, **options: Any) -> Any:
    """Save a T5 of two layers, embedding tables and head tied, with a tokenizer.

    options: of the configuration.
    """
    import transformers

    tokenizer = tiny_language.make_tokenizer()
    config = transformers.T5Config(
        **{
            "vocab_size": len(tokenizer),
            "d_model": _SIZE,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
            **options,
        }
    )
    model = _random(transformers.T5ForConditionalGeneration(config))
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    return model


def features(rows: int, seed: int = 0) -> Array:
    """What tiny Whisper reads: float32 [rows, bins, frames]."""
    return np.random.default_rng(seed).standard_normal((rows, BINS, FRAMES), dtype=np.float32)


def greedy(model: Any, given: Array | Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """What ``generate()`` of transformers answers, row by row.

    given: features, or token ids, which are padded to the longest row. Without the tokens that an
    answer begins with and the one that ends it.
    """
    if isinstance(given, np.ndarray):
        asked = {"input_features": torch.from_numpy(given)}
        begin = {START, SILENT}
    else:
        width = max(map(len, given))
        shown = [[1] * len(row) + [0] * (width - len(row)) for row in given]
        rows = [list(row) + [0] * (width - len(row)) for row in given]
        asked = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(shown)}
        begin = {model.config.decoder_start_token_id}
    with torch.no_grad():
        whole = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
    eos = model.generation_config.eos_token_id
    return [_answer(row, begin, eos) for row in whole.tolist()]


def _answer(row: list[int], begin: set[int], eos: int) -> list[int]:
    while row and row[0] in begin:
        row = row[1:]
    return row[: row.index(eos)] if eos in row else row


def _random(model: Any) -> Any:
    """The model with weights whose scores differ clearly, biases not zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("bias"):  # gains of norms
                parameter.uniform_(0.5, 1.5)
            elif "embed_positions" not in name:
                parameter.normal_(0, 0.1 if name.endswith("bias") else 0.2)
    return model.eval()
