"""Dynamic int8 on trained models, judged by what they are for, on real data.

The sentence encoder by Spearman's correlation with human judgements, the voice detector by
its speech probability on recorded speech. Both go through the default recipe's passes and
run in ONNX Runtime as on the device.
"""

from __future__ import annotations

import pathlib

import numpy as np
import onnx_ir as ir
import pytest
from fixtures import models, similarity, speech

from edgec.passes import Cleanup, Context, Fuse, Lower, QuantizeDynamic
from edgec.passes.execution import open_session
from edgec.targets import load_target

TARGET = load_target("x86-64")
CHUNK, CONTEXT = 256, 32  # samples at 8 kHz that the voice detector takes and remembers


def quantized(model: ir.Model) -> tuple[ir.Model, int]:
    """The model after the default recipe for encoders, and how many layers were converted."""
    context, changed = Context(TARGET, model.clone()), 0
    for each in (Cleanup(), Fuse(), QuantizeDynamic(), Lower()):
        result = each.run(model, context)
        model, changed = result.model, result.changed if each.name.startswith("q") else changed
    return model, changed


def probabilities(model: ir.Model, clips: list[speech.Clip]) -> np.ndarray:
    """Speech probability of every chunk of every clip, float32 [chunks]."""
    session, found = open_session(model, settings=TARGET.session), []
    for clip in clips:
        samples, rate = clip.samples()
        assert rate == 8000
        # half a second of silence before and after, as between prompts
        samples = np.pad(samples, (4000, 4000 + -len(samples) % CHUNK))
        state, before = np.zeros((2, 1, 128), np.float32), np.zeros(CONTEXT, np.float32)
        for start in range(0, len(samples) - CHUNK + 1, CHUNK):
            chunk = np.concatenate([before, samples[start : start + CHUNK]])
            feeds = {"input": chunk[None], "state": state, "sr": np.array(rate)}
            probability, state = session.run(None, feeds)
            found.append(probability.item())
            before = chunk[-CONTEXT:]
    return np.asarray(found, np.float32)


@pytest.mark.slow
def test_voice_detector_keeps_its_speech_probability():
    path = next(p for p in models.require_silero_paths() if p.name == "silero_vad.onnx")
    reference = ir.load(pathlib.Path(path))
    clips = speech.require_clips()[::12]
    model, changed = quantized(reference.clone())
    expected, actual = probabilities(reference, clips), probabilities(model, clips)
    assert changed > 0
    assert len(clips) > 20 and 0.2 < (expected > 0.5).mean() < 0.9  # speech and pauses
    assert np.abs(expected - actual).mean() <= 0.02


@pytest.mark.slow
def test_sentence_encoder_keeps_its_correlation_with_human_judgement(tmp_path):
    import torch

    tokenizer, module = models.require_minilm("eager")
    ids = torch.randint(1000, 20000, (2, 24), generator=torch.Generator().manual_seed(0))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    torch.onnx.export(
        last_hidden_state(module),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        tmp_path / "encoder.onnx",
        dynamo=True,
        external_data=False,
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        dynamic_shapes=[{0: batch, 1: length}] * 3,
        verbose=False,
    )
    reference = ir.load(tmp_path / "encoder.onnx")
    model, changed = quantized(reference.clone())
    assert changed >= 36  # six products in each of six layers
    sessions = [open_session(m, settings=TARGET.session) for m in (reference, model)]
    for name in ("wordsim353", "simlex999", "lee"):
        pairs = similarity.require_pairs(name)
        before, after = (similarity.score(tokenizer, encoder(s), pairs) for s in sessions)
        assert abs(after - before) <= 0.005, name


def encoder(session) -> similarity.Encoder:
    def encode(ids, mask, types):
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return session.run(None, feeds)[0]

    return encode


def last_hidden_state(module):
    import torch

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.module(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
            ).last_hidden_state

    return LastHiddenState().eval()
