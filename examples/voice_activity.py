"""An app that runs a bundle with state: where in a recording does somebody speak?

    pip install --no-deps silero-vad==6.2.3  # its models lie in silero_vad/data
    edgec build silero_vad_openvino_16k.onnx --target x86-64 -o vad.edgec
    python examples/voice_activity.py vad.edgec RECORDING.wav

It needs edgec-runtime alone, neither edgec nor torch. The recording is read chunk by chunk, as a
microphone would give it: nothing but the model's state and the end of the chunk before is kept,
and a segment is printed as soon as it has ended.

A segment begins where the probability of speech reaches 0.5. It ends where it falls below 0.35, if
it is below a tenth of a second later, too, and has not been at 0.5 in between. Segments of up to a
quarter of a second are left out. These are silero-vad's own rules and defaults, without padding.
"""

from __future__ import annotations

import sys
import wave
from collections.abc import Iterable, Iterator

import numpy as np

import edgec_runtime

CHUNK_SECONDS = 0.032  # the model hears so much at a time, and before it
CONTEXT_SHARE = 1 / 8  # of a chunk: the end of the chunk before
BEGIN, END = 0.5, 0.35  # probabilities of speech
SILENCE_SECONDS, SPEECH_SECONDS = 0.1, 0.25  # at least


def main(bundle: str, recording: str) -> None:
    # any_target: a bundle for a phone may be tried on whatever machine this is.
    model = edgec_runtime.load(bundle, any_target=True)
    with wave.open(recording) as file:
        for begin, end in segments(probabilities(model.stream(), file)):
            print(f"{begin:8.2f} s to {end:8.2f} s", flush=True)


def probabilities(stream: edgec_runtime.Stream, file: wave.Wave_read) -> Iterator[float]:
    """The probability of speech in each chunk of a recording, 16 bits at 8 or 16 kHz."""
    rate = file.getframerate()
    if rate not in (8000, 16000) or file.getsampwidth() != 2:
        sys.exit("expected a recording of 16 bits at 8 or 16 kHz")
    size = round(rate * CHUNK_SECONDS)
    context = np.zeros(round(size * CONTEXT_SHARE), np.float32)
    takes_rate = any(value.name == "sr" for value in stream.inputs)
    if rate != 16000 and not takes_rate:
        sys.exit("this model hears 16 kHz alone; resample the recording")
    options = {"sr": np.array(rate)} if takes_rate else {}
    while frames := file.readframes(size):
        heard = np.frombuffer(frames, "<i2").reshape(-1, file.getnchannels()).mean(axis=1)
        chunk = np.zeros(size, np.float32)  # the last one may be shorter
        chunk[: len(heard)] = heard / 32768
        [probability] = stream(input=np.concatenate([context, chunk])[None], **options).values()
        context = chunk[-len(context) :]
        yield float(probability.reshape(()))


def segments(chunks: Iterable[float]) -> Iterator[tuple[float, float]]:
    """(begin, end) in seconds of the segments with speech, each as soon as it has ended."""
    begin = quiet_since = None
    now = 0.0
    for number, probability in enumerate(chunks):
        start, now = number * CHUNK_SECONDS, (number + 1) * CHUNK_SECONDS
        if probability >= BEGIN:
            begin, quiet_since = start if begin is None else begin, None
        elif begin is not None and probability < END:
            quiet_since = start if quiet_since is None else quiet_since
            if start - quiet_since >= SILENCE_SECONDS:
                if quiet_since - begin > SPEECH_SECONDS:
                    yield begin, quiet_since
                begin = quiet_since = None
    if begin is not None and now - begin > SPEECH_SECONDS:
        yield begin, now


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
