"""examples/voice_activity.py: its rule for segments, and the whole app on recorded speech."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
import wave
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fixtures import models, speech
from fixtures.locate import REPOSITORY

import edgec
import edgec_runtime

EXAMPLE = REPOSITORY / "examples/voice_activity.py"
CHUNK, CONTEXT = 512, 64  # samples at 16 kHz


@pytest.fixture(scope="module")
def app() -> Any:
    spec = importlib.util.spec_from_file_location("voice_activity", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs(*parts: tuple[float, int]) -> Iterator[float]:
    """Probabilities of chunks, each given with how many follow one another."""
    for probability, chunks in parts:
        yield from [probability] * chunks


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        (runs((0.1, 50)), []),
        (runs((0.1, 10), (0.9, 20), (0.1, 10)), [(10, 30)]),
        (runs((0.9, 20)), [(0, 20)]),  # the recording ends while somebody speaks
        (runs((0.9, 7), (0.1, 10)), []),  # 224 ms
        (runs((0.9, 8), (0.1, 10)), [(0, 8)]),
        (runs((0.9, 10), (0.1, 3), (0.9, 10), (0.1, 9)), [(0, 23)]),  # a short pause
        (runs((0.9, 10), (0.1, 5), (0.9, 10), (0.1, 9)), [(0, 10), (15, 25)]),
        (runs((0.9, 10), (0.4, 30)), [(0, 40)]),  # above 0.35 it goes on
        (runs((0.4, 30)), []),  # and does not begin
    ],
)
def test_segments(app: Any, chunks: Iterator[float], expected: list[tuple[int, int]]) -> None:
    found = [(round(b / 0.032, 3), round(e / 0.032, 3)) for b, e in app.segments(chunks)]
    assert found == expected


def test_a_segment_is_told_as_soon_as_it_has_ended(app: Any) -> None:
    heard: list[int] = []

    def chunks() -> Iterator[float]:
        for number, probability in enumerate(runs((0.9, 10), (0.1, 50))):
            heard.append(number)
            yield probability

    next(app.segments(chunks()))
    assert len(heard) == 15  # a tenth of a second of silence is four chunks more


def recording() -> np.ndarray:
    """Two clips at 16 kHz with a second of silence around each, int16."""
    silence, parts = np.zeros(16000), []
    for clip in speech.require_clips()[40:42]:
        audio, rate = clip.samples()
        times = np.arange(int(len(audio) * 16000 / rate)) * rate / 16000
        parts += [silence, np.interp(times, np.arange(len(audio)), audio)]
    return (np.concatenate([*parts, silence]) * 32767).astype("<i2")


def data() -> Iterator[dict[str, Any]]:
    """Chunks of other clips, without their state."""
    for clip in speech.clips()[:40:8]:
        audio, rate = clip.samples()
        times = np.arange(int(len(audio) * 16000 / rate)) * rate / 16000
        audio = np.interp(times, np.arange(len(audio)), audio).astype(np.float32)
        for start in range(CONTEXT, len(audio) - CHUNK, CHUNK):
            chunk = audio[None, start - CONTEXT : start + CHUNK]
            yield {"input": chunk, "restart": start == CONTEXT}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> edgec.Report:
    """silero-vad in int8."""
    [model] = [p for p in models.require_silero_paths() if p.name == "silero_vad_openvino_16k.onnx"]
    speech.require_clips()
    return edgec.build(
        model,
        target="x86-64",
        output=tmp_path_factory.mktemp("vad") / "vad.edgec",
        calibration=data,
        recipe="cleanup,fuse,quantize-dynamic,lower",
    )


@pytest.mark.slow
def test_silero_is_found_to_have_state_and_does_not_drift(built: edgec.Report) -> None:
    assert any("by the names: state=stateN" in text for text in built.findings)
    manifest = edgec_runtime.load(built.bundle_path, any_target=True).manifest
    assert [(p.input, p.output) for p in manifest.state or ()] == [("state", "stateN")]
    # recurrent kernels of float32 and int8 gates: far above what a lost state gives
    assert min(manifest.results["stream"]["state_sqnr_db"]) > 20
    assert not any("GROWS" in text for text in built.findings)


@pytest.mark.slow
def test_the_app_finds_what_the_float_model_finds(
    app: Any, built: edgec.Report, tmp_path: pathlib.Path
) -> None:
    import onnxruntime

    audio = recording()
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(audio.tobytes())
    [path] = [p for p in models.silero_paths() if p.name == "silero_vad_openvino_16k.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros(CONTEXT, np.float32)
    expected = []
    heard = np.concatenate([audio / np.float32(32768), np.zeros(-len(audio) % CHUNK)])
    for chunk in heard.astype(np.float32).reshape(-1, CHUNK):
        given = {"input": np.concatenate([context, chunk])[None], "state": state}
        probability, state = session.run(["output", "stateN"], given)
        context = chunk[-CONTEXT:]
        expected.append(probability.item())
    with wave.open(str(tmp_path / "speech.wav")) as file:
        stream = edgec_runtime.load(built.bundle_path, any_target=True).stream()
        actual = list(app.probabilities(stream, file))
    assert len(actual) == len(expected)
    # int8 moves a probability on a slope by some hundredths
    assert np.abs(np.subtract(actual, expected)).mean() < 0.01
    command = [sys.executable, EXAMPLE, built.bundle_path, tmp_path / "speech.wav"]
    printed = subprocess.check_output([*map(str, command)], text=True).splitlines()
    assert len(printed) == len(list(app.segments(expected))) >= 2


@pytest.mark.slow
def test_another_rate_is_refused(app: Any, built: edgec.Report, tmp_path: pathlib.Path) -> None:
    for rate, message in ((44100, "at 8 or 16 kHz"), (8000, "hears 16 kHz alone")):
        with wave.open(str(tmp_path / "a.wav"), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(bytes(4000))
        with pytest.raises(SystemExit, match=message):
            app.main(built.bundle_path, str(tmp_path / "a.wav"))
