"""An app that runs a bundle: which class does each photograph show?

    python examples/classify.py build/efficientnet-lite0.arm64.edgec PHOTOGRAPH...

It needs edgec-runtime and Pillow, neither edgec nor torch. How a photograph becomes an
input, and the names of the classes, are in the bundle. Without photographs, five of the
demo's are taken.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
from PIL import Image

import edgec_runtime


def main(bundle: str, photographs: list[str]) -> None:
    # any_target: the demo opens a bundle for arm64 on whatever machine this is.
    model = edgec_runtime.load(bundle, any_target=True)
    labels = model.labels or ()
    for path in photographs or demo_photographs():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        logits = model(**model.prepare_image(pixels))["logits"][0]
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[:5]
        guesses = ", ".join(f"{labels[i]} {shares[i]:.0%}" for i in best)
        print(f"{pathlib.Path(path).name}: {guesses}")


def demo_photographs() -> list[str]:
    import photographs  # the file beside this one

    return [str(photograph.path) for photograph in photographs.labelled()][20:40:4]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
