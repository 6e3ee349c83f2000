"""What do bundles of Whisper tiny.en write down, how fast, and is it what transformers writes?

    python benchmarks/whisper.py [--clips 120] [--compared 20] [--rows int8 int4-gptq] [--json]

Builds bundles of the fixture for x86-64: the graph as torch exported it, in float32; float32 with
the target's kernels; the target's own default recipe (int8) and that with the two convolutions in
int8, too (int8-conv); and the decoder's weights in 4 bits, rounded to nearest (int4-rtn) and by
GPTQ (int4-gptq), behind the encoder in float32. All transcribe the same recordings, voice prompts
of one speaker with four words or more: word error rate, and how many answers are those of float32.
The perplexity is that of the words that are said, given the recording and the words before. The
first ``--compared`` answers of float32 are held against ``generate()`` of transformers, token by
token; exit code 1 if one differs. Behind the table stand the goals: int8 within half a point of
float32 and twice as fast as the faster float32, int4 within 3 % of its perplexity.

Times are of whole transcriptions without the features, CPU time of one thread, the bundles in
turns on every recording: the ratios are of the sums. Under load the ratios hold, the times do not.

int8 and GPTQ are calibrated on recordings that nothing is judged on, with what float32 writes
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
import transcribe  # noqa: E402
from fixtures import speech, whisper  # noqa: E402

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402
from edgec_runtime.bundle import read_bundle  # noqa: E402
from edgec_runtime.generation import ENCODER  # noqa: E402

TOKENS = 100  # of an answer at most
CALIBRATION = 24  # recordings
BANDS = 80
GOAL_POINTS, GOAL_SPEED, GOAL_LOSS = 0.5, 2.0, 0.03
_FLOATS = ("exported", "float32")  # speeds are told over the faster one
_WEIGHTS = "cleanup,fuse,quantize-weights,lower"
_BOTH = "cleanup,fuse,smooth-activations,quantize-static,quantize-dynamic,lower"
_GRID = tuple(
    f"quantize-weights.{setting}"
    for setting in ("bits=4", "scheme=asymmetric", "block_size=32", "embedding_bits=4")
)
RECIPES: Mapping[str, tuple[str | None, Sequence[str]]] = {  # recipe and settings
    "exported": ("cleanup", ()),
    "float32": ("cleanup,fuse,lower", ()),
    "int8": (None, ()),
    "int8-conv": (_BOTH, ('quantize-static.ops=["Conv"]',)),
    "int4-rtn": (_WEIGHTS, (*_GRID, "quantize-weights.method=rtn")),
    "int4-gptq": (_WEIGHTS, (*_GRID, "quantize-weights.method=gptq")),
}


@dataclass(frozen=True)
class Row:
    """One bundle.

    word_error_rate: in %. same: share of the answers that are those of float32. speed: how many
    times as fast as the faster float32.
    """

    bundle: str
    megabytes: float
    word_error_rate: float
    same: float
    perplexity: float
    cpu_seconds: float
    speed: float


@dataclass
class Tally:
    """What a bundle has written down so far."""

    errors: int = 0
    words: int = 0
    same: int = 0
    seconds: float = 0.0
    losses: list[Any] = field(default_factory=list)


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


def build(
    directory: pathlib.Path,
    file: pathlib.Path,
    recipe: str | None,
    data: Any,
    settings: Sequence[str] = (),
) -> Any:
    edgec.build(
        directory,
        target="x86-64",
        output=file,
        recipe=recipe,
        settings=settings,
        calibration=data,
        keep_reference=False,
        verify=False,
    )
    return edgec_runtime.load(file)


def build_rows(
    names: Sequence[str],
    directory: pathlib.Path,
    work: pathlib.Path,
    others: Sequence[speech.Clip],
) -> dict[str, edgec_runtime.Model]:
    """The bundles by name. others: recordings to calibrate with."""
    models: dict[str, edgec_runtime.Model] = {}
    for name in names:
        recipe, settings = RECIPES[name]
        data = None
        if name not in _FLOATS:
            data = functools.partial(calibration, models["float32"], others)
        if recipe == _WEIGHTS:
            kept = json.dumps(encoder_layers(models["exported"].path))
            settings = (*settings, f"quantize-weights.skip={kept}")
        models[name] = build(directory, work / f"{name}.edgec", recipe, data, settings)
    return models


def encoder_layers(bundle: pathlib.Path) -> list[str]:
    """The layers that run once for a recording: the encoder, keys and values of what is read."""
    found = read_bundle(bundle)
    graph = onnx.load_model_from_string(found.read(found.manifest.graphs[ENCODER].file)).graph
    return [node.name for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]


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
            tally.losses.append(losses(models[name], read, clip.transcript))
            answers[name] = answer.tokens
        for name in order:
            tallies[name].same += answers[name] == answers["float32"]
        if not as_json and number % 20 == 19:
            print(f"{number + 1} of {len(clips)} recordings", file=sys.stderr, flush=True)
    base = min(tallies[name].seconds for name in _FLOATS)
    return [
        Row(
            bundle=name,
            megabytes=round(models[name].path.stat().st_size / 1e6, 1),
            word_error_rate=round(100 * tally.errors / tally.words, 2),
            same=round(tally.same / len(clips), 3),
            perplexity=round(float(np.exp(np.concatenate(tally.losses).mean())), 3),
            cpu_seconds=round(tally.seconds, 2),
            speed=round(base / tally.seconds, 2),
        )
        for name, tally in tallies.items()
    ]


def losses(model: edgec_runtime.Model, read: Any, transcript: str) -> Any:
    """Negative log likelihood float64 [tokens] of each token that is said, and of the end."""
    generation = model.manifest.generation
    assert generation is not None and generation.encoder is not None
    start, end = generation.encoder.start, generation.eos[0]
    # as Whisper writes: a space in front; what the tokenizer adds stands behind all words
    words = [token for token in model.text.encode(f" {transcript}") if token < end]
    ids = [*start, *words, end]
    cache = {
        value.name: np.zeros([1, *(d if isinstance(d, int) else 0 for d in value.shape[1:])], "f4")
        for value in model.inputs
        if value.name.startswith("past_key_values")
    }
    outputs = model(input_features=read[None], decoder_input_ids=np.array([ids]), **cache)
    logits = outputs[generation.logits][0, len(start) - 1 : -1].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    wanted = ids[len(start) :]
    return total - logits[np.arange(len(wanted)), wanted]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Each goal beside what was reached."""
    by_name = {row.bundle: row for row in rows}
    exact, found = by_name["float32"], []
    for name in ("int8", "int8-conv"):
        if name in by_name:
            points = by_name[name].word_error_rate - exact.word_error_rate
            found.append(
                f"{name}: word error rate {points:+.2f} points (goal: at most +{GOAL_POINTS}), "
                f"{by_name[name].speed:.2f} times the faster float32 (goal: {GOAL_SPEED})"
            )
    for name in ("int4-rtn", "int4-gptq"):
        if name in by_name:
            loss = by_name[name].perplexity / exact.perplexity - 1
            found.append(f"{name}: perplexity {loss:+.2%} (goal: at most +{GOAL_LOSS:.0%})")
    return found


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
    parser.add_argument(
        "--rows", nargs="+", choices=RECIPES, default=list(RECIPES), help="besides both of float32"
    )
    parser.add_argument("--directory", type=pathlib.Path, help="of the fixture, kept for next time")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        directory = whisper.whisper_tiny_directory(asked.directory or work / "whisper-tiny")
        judged, others = recordings(asked.clips)
        names = [name for name in RECIPES if name in (*_FLOATS, *asked.rows)]
        models = build_rows(names, directory, work, others)
        rows = listen(models, judged, asked.json)
        for row in rows:
            if asked.json:
                print(json.dumps(asdict(row)), flush=True)
            else:
                print(
                    f"{row.bundle:10s} {row.megabytes:6.1f} MB  WER {row.word_error_rate:5.2f} %  "
                    f"same {row.same:6.1%}  perplexity {row.perplexity:7.3f}  "
                    f"{row.cpu_seconds:7.2f} CPU s  {row.speed:5.2f}x"
                )
        if not asked.json:
            print(*verdicts(rows), sep="\n", flush=True)
        compared = judged[: asked.compared]
        wrong = differing(models["float32"], directory, compared)
    if not asked.json:
        print(f"{len(compared) - wrong} of {len(compared)} answers are those of transformers")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
