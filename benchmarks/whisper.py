"""What do bundles of Whisper tiny.en write down, how fast, and is it what transformers writes?

    python benchmarks/whisper.py [--clips 120] [--compared 20] [--json]

Builds two bundles of the fixture for x86-64: float32 with the target's kernels, and its own default
recipe (int8). Both transcribe the same recordings, voice prompts of one speaker with four words or
more: word error rate, and how many answers are those of float32. The first ``--compared`` answers
of float32 are held against ``generate()`` of transformers, token by token; exit code 1 if one
differs.

Times are of whole transcriptions without the features, CPU time of one thread, the bundles in
turns on every recording: the ratio is of the sums. Under load the ratios hold, the times do not.

The int8 bundle is calibrated on recordings that nothing is judged on, with what float32 writes
down for them. Left out on purpose: other engines, timestamps, recordings over 30 seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transcribe  # noqa: E402
from fixtures import speech, whisper  # noqa: E402

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402

TOKENS = 100  # of an answer at most
CALIBRATION = 24  # recordings
BANDS = 80
RECIPES = {
    "float32": "cleanup,fuse,lower",
    "int8": None,
}


@dataclass(frozen=True)
class Row:
    """One bundle. same: share of the answers that are those of float32."""

    bundle: str
    megabytes: float
    word_error_rate: float
    same: float
    cpu_seconds: float
    speedup: float


@dataclass
class Tally:
    """What a bundle has written down so far."""

    errors: int = 0
    words: int = 0
    same: int = 0
    seconds: float = 0.0


def recordings(count: int) -> tuple[list[speech.Clip], list[speech.Clip]]:
    """Those to judge on, evenly drawn, and others to calibrate with."""
    prompts = [clip for clip in speech.clips() if len(whisper.words(clip.transcript)) >= 4]
    step = max(len(prompts) // count, 2)
    judged = prompts[::step][:count]
    left = [clip for clip in prompts if clip not in judged]
    return judged, left[:: max(len(left) // CALIBRATION, 1)][:CALIBRATION]


def features(clip: speech.Clip) -> Any:
    samples, rate = clip.samples()
    return transcribe.log_mel(next(transcribe.cut(transcribe.resampled(samples, rate))), BANDS)


def calibration(model: edgec_runtime.Model, clips: Sequence[speech.Clip]) -> Iterator[Any]:
    """Features and what the float32 bundle writes down for them."""
    generation = model.manifest.generation
    assert generation is not None and generation.encoder is not None
    for clip in clips:
        read = features(clip)
        tokens = model.generate(read, max_new_tokens=TOKENS).tokens
        ids = [*generation.encoder.start, *tokens]
        yield {"input_features": read[None], "decoder_input_ids": np.array([ids])}


def build(directory: pathlib.Path, file: pathlib.Path, recipe: str | None, data: Any) -> Any:
    edgec.build(
        directory,
        target="x86-64",
        output=file,
        recipe=recipe,
        calibration=data,
        keep_reference=False,
        verify=False,
    )
    return edgec_runtime.load(file)


def listen(
    models: dict[str, edgec_runtime.Model], clips: Sequence[speech.Clip], as_json: bool
) -> list[Row]:
    """Every bundle on every recording, in turns."""
    tallies = {name: Tally() for name in models}
    for number, clip in enumerate(clips):
        read, said = features(clip), whisper.words(clip.transcript)
        answers = {}
        order = list(models)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            began = time.process_time()
            answer = models[name].generate(read, max_new_tokens=TOKENS)
            tally = tallies[name]
            tally.seconds += time.process_time() - began
            tally.errors += whisper.errors(whisper.words(answer.text or ""), said)
            tally.words += len(said)
            answers[name] = answer.tokens
        for name in order:
            tallies[name].same += answers[name] == answers[order[0]]
        if not as_json and number % 20 == 19:
            print(f"{number + 1} of {len(clips)} recordings", file=sys.stderr, flush=True)
    base = tallies[next(iter(models))].seconds
    return [
        Row(
            bundle=name,
            megabytes=round(models[name].path.stat().st_size / 1e6, 1),
            word_error_rate=round(100 * tally.errors / tally.words, 2),
            same=round(tally.same / len(clips), 3),
            cpu_seconds=round(tally.seconds, 2),
            speedup=round(base / tally.seconds, 2),
        )
        for name, tally in tallies.items()
    ]


def differing(
    model: edgec_runtime.Model, directory: pathlib.Path, clips: Sequence[speech.Clip]
) -> int:
    """Recordings for which transformers writes down something else, token by token."""
    import transformers

    reference = transformers.WhisperForConditionalGeneration.from_pretrained(directory).eval()
    ends = {reference.generation_config.eos_token_id}
    generation = model.manifest.generation
    assert generation is not None and generation.encoder is not None
    begin, count = set(generation.encoder.start), 0
    for clip in clips:
        read = features(clip)
        with torch.no_grad():
            given = torch.from_numpy(read[None])
            [whole] = reference.generate(given, max_new_tokens=TOKENS, do_sample=False).tolist()
        tokens = tuple(token for token in whole if token not in begin | ends)
        count += tokens != model.generate(read, max_new_tokens=TOKENS).tokens
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, default=120, help="voice prompts to judge on")
    parser.add_argument(
        "--compared", type=int, default=20, help="answers held against transformers"
    )
    parser.add_argument("--directory", type=pathlib.Path, help="of the fixture, kept for next time")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        directory = whisper.whisper_tiny_directory(asked.directory or work / "whisper-tiny")
        judged, others = recordings(asked.clips)
        models: dict[str, edgec_runtime.Model] = {}
        for number, (name, recipe) in enumerate(RECIPES.items()):
            data = None
            if recipe is None:
                data = functools.partial(calibration, models["float32"], others)
            models[name] = build(directory, work / f"{number}.edgec", recipe, data)
        rows = listen(models, judged, asked.json)
        for row in rows:
            if asked.json:
                print(json.dumps(asdict(row)), flush=True)
            else:
                print(
                    f"{row.bundle:22s} {row.megabytes:7.1f} MB  WER {row.word_error_rate:5.2f} %  "
                    f"same {row.same:6.1%}  {row.cpu_seconds:7.2f} CPU s  {row.speedup:5.2f}x"
                )
        compared = judged[: asked.compared]
        wrong = differing(models["float32"], directory, compared)
    if not asked.json:
        print(f"{len(compared) - wrong} of {len(compared)} answers are those of transformers")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
