"""An app that writes down what is said in recordings, with a bundle of Whisper.

    edgec build WHISPER_DIRECTORY --target arm64 --output whisper.arm64.edgec
    python examples/transcribe.py whisper.arm64.edgec RECORDING.wav...

It needs edgec-runtime[text], neither edgec nor torch. A recording is a .wav of 16 bits, any number
of channels and any rate; of longer ones each piece of 30 seconds is transcribed for itself.

Whisper reads a log-mel spectrogram: 80 bands of the power of windows of 25 ms, 100 a second, in
powers of ten with the lowest 8 below the highest cut off (Radford et al. 2022, arXiv:2212.04356,
section 2.2; bands: Slaney 1998, Auditory Toolbox, section "MFCC").
"""

from __future__ import annotations

import sys
import wave
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

import edgec_runtime

Array = npt.NDArray[np.float32]

RATE = 16_000  # samples a second
SECONDS = 30  # that the model reads at once
WINDOW, HOP = 400, 160  # samples


def main(bundle: str, recordings: list[str]) -> None:
    # any_target: the example opens a bundle for arm64 on whatever machine this is.
    model = edgec_runtime.load(bundle, any_target=True)
    bands = model.inputs[0].shape[1]
    assert isinstance(bands, int)
    for path in recordings:
        pieces = (model.generate(log_mel(piece, bands)).text for piece in cut(read_wav(path)))
        print(f"{path}: {' '.join((piece or '').strip() for piece in pieces)}")


def read_wav(path: str) -> Array:
    """Samples in -1..1 at 16 kHz, float32 [n], of a .wav file of 16 bits; channels are averaged."""
    with wave.open(path) as file:
        if file.getsampwidth() != 2:
            sys.exit(f"{path}: {8 * file.getsampwidth()} bits a sample, expected 16")
        raw = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        mono = raw.reshape(-1, file.getnchannels()).mean(axis=1) / 32768
        return resampled(mono.astype(np.float32), file.getframerate())


def resampled(samples: Array, rate: int) -> Array:
    """Samples of another rate at 16 kHz: the spectrum is cut off or continued with zeros."""
    if rate == RATE or not len(samples):
        return samples
    count = round(len(samples) * RATE / rate)
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    resized: Array = (np.fft.irfft(spectrum, count) * (count / len(samples))).astype(np.float32)
    return resized


def cut(samples: Array) -> Iterator[Array]:
    """Pieces of 30 seconds, the last one continued with silence."""
    length = SECONDS * RATE
    for start in range(0, max(len(samples), 1), length):
        piece = samples[start : start + length]
        yield np.pad(piece, (0, length - len(piece)))


def log_mel(samples: Array, bands: int) -> Array:
    """The features of 30 seconds: float32 [bands, 3000]."""
    padded = np.pad(samples, WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:-1]
    window = np.hanning(WINDOW + 1)[:-1]
    power = np.abs(np.fft.rfft(frames * window)) ** 2  # [3000, 201]
    logs = np.log10(np.maximum(power @ mel_filters(bands), 1e-10))
    features = (np.maximum(logs, logs.max() - 8) + 4) / 4
    return np.ascontiguousarray(features.T, np.float32)


def mel_filters(bands: int) -> npt.NDArray[np.float64]:
    """Triangles of equal area between frequencies equally far apart in mel: [201, bands]."""
    edges = mel_to_hertz(np.linspace(0, hertz_to_mel(RATE / 2), bands + 2))
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies) / np.diff(edges)[1:]
    triangles: npt.NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling))
    return triangles * 2 / (edges[2:] - edges[:-2])


def hertz_to_mel(hertz: float) -> float:
    """Linear below 1 kHz, 15 mel; logarithmic above, 27 mel for a factor of 6.4."""
    if hertz < 1000:
        return 3 * hertz / 200
    return float(15 + 27 * np.log(hertz / 1000) / np.log(6.4))


def mel_to_hertz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
