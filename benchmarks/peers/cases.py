"""A case: one model in a folder, in the forms that the tools read, with its samples.

    model.onnx          float32, fixed shapes
    program.pt2         the same as torch.export saves it; missing where there is no torch source
    calibration/*.npz   one sample a file: an array per input, batch dimension included
    evaluation/*.npz    other samples; "label" and the like are arrays that are no inputs
    case.json           the fields of ``Case``

Nothing here needs more than numpy, since every peer's environment reads it.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Kind = Literal["convolutional", "transformer", "recurrent"]
Metric = Literal["argmax", "lines", "spearman", "cosine", "probability"]


@dataclass(frozen=True)
class Case:
    """What the tools and the judgement must know about a model.

    weights: where they come from, as the table says it. inputs: names in the order of the
    torch program's arguments. metric: a function of ``metrics``. feedback: output -> input
    that the next sample gets its value from, unless the sample has ``restart`` set.
    """

    name: str
    kind: Kind
    weights: str
    metric: Metric
    inputs: tuple[str, ...]
    feedback: Mapping[str, str] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """True where static int8 is what suits: convolutions."""
        return self.kind == "convolutional"


def write_case(
    folder: pathlib.Path,
    case: Case,
    *,
    calibration: Iterable[Feeds],
    evaluation: Iterable[Feeds],
) -> None:
    """Write samples and description; the model files are there already."""
    for part, samples in (("calibration", calibration), ("evaluation", evaluation)):
        (folder / part).mkdir(exist_ok=True)
        for index, sample in enumerate(samples):
            np.savez(folder / part / f"{index:04}.npz", **sample)
    # last, so that a folder with it is complete
    (folder / "case.json").write_text(json.dumps(asdict(case), indent=2), encoding="utf-8")


def read_case(folder: pathlib.Path) -> Case:
    """The description of a complete case folder."""
    fields = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return Case(**{**fields, "inputs": tuple(fields["inputs"])})


def samples(
    folder: pathlib.Path, part: Literal["calibration", "evaluation"], limit: int | None = None
) -> Iterator[dict[str, Array]]:
    """All arrays of each sample, in order."""
    for file in sorted((folder / part).glob("*.npz"))[:limit]:
        with np.load(file) as archive:
            yield dict(archive)


def feeds(
    folder: pathlib.Path, part: Literal["calibration", "evaluation"], limit: int | None = None
) -> Iterator[dict[str, Array]]:
    """The inputs of each sample, in order of the program's arguments."""
    names = read_case(folder).inputs
    for sample in samples(folder, part, limit):
        yield {name: sample[name] for name in names}
