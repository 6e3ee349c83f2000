"""What keeps a model from forgetting: a memory of earlier tasks, and what is made of it.

Memory: a few samples of each class, chosen by herding, so that their mean is the class's in
the eyes of the model (iCaRL, Rebuffi et al. 2017, arXiv:1611.07725, algorithm 4). A quarter
comes from samples that were held out when the others were trained on, and stays held out in
every later round: no round is judged by what an earlier one learned. A memory is an ordinary
labelled .npz, that can be looked at, shortened and given as data.
Elastic weight consolidation: how much each weight matters to the memory's samples, as the
diagonal of the Fisher information (Kirkpatrick et al. 2017, arXiv:1612.00796, section 2.1).
How the two are used, and learning without forgetting, is in `edgec.passes.course`.

Left out: generated samples instead of stored ones, and Fisher information kept without samples.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import PassError
from edgec.passes.curriculum import LABEL, Example
from edgec.passes.execution import run_values
from edgec.passes.head import Head
from edgec.passes.weights import Array, label

if TYPE_CHECKING:
    from torch import Tensor

    from edgec.passes.torch_graph import TorchGraph

Scores = Callable[[Mapping[str, "Tensor"]], "Tensor"]  # a twin's values -> [rows, classes]

_HELD_OUT = "held_out"  # the key of what tells the samples of a memory apart
_HELD_SHARE = 4  # one of so many samples is held out
_FISHER_SAMPLES = 256  # at most, evenly spaced


@dataclass(frozen=True)
class Memory:
    """Samples of earlier rounds, labelled. held_out: no round trains on them."""

    learned: tuple[Example, ...] = ()
    held_out: tuple[Example, ...] = ()

    def all(self) -> tuple[Example, ...]:
        """Every sample there is."""
        return (*self.learned, *self.held_out)

    def joined(self, later: Memory) -> Memory:
        """This one's samples, then those of a later round."""
        return Memory((*self.learned, *later.learned), (*self.held_out, *later.held_out))


def read_memory(path: pathlib.Path, model: ir.Model) -> Memory:
    """The samples of a memory, in the order of the file.

    Of a labelled .npz that does not say what is held out, every fourth sample is.
    Raises PassError if the file is missing, is no memory, or is one of another model's inputs.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not an .npz of arrays"
        raise PassError(
            f"adapt: memory {path}: {reason}; give the file that an earlier adaptation with "
            "remember > 0 wrote"
        ) from error
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    for value in inputs:
        array = arrays.get(str(value.name))
        rank = None if value.shape is None else len(value.shape)
        if array is None or (rank is not None and array.ndim != rank + 1):
            found = "none" if array is None else f"shape {list(array.shape)}"
            raise PassError(
                f"adapt: memory {path}: input '{value.name}' needs an array with one more "
                f"dimension, the samples; it has {found}: it was made for another model"
            )
    labels = arrays.get(LABEL)
    if labels is None or labels.dtype.kind not in "iu" or not labels.ndim:
        raise PassError(
            f"adapt: memory {path}: it has no integer labels under '{LABEL}', one for each sample; "
            "give the file that an earlier adaptation with remember > 0 wrote"
        )
    counts = {len(arrays[str(v.name)]) for v in inputs} | {len(labels)}
    if len(counts) > 1 or 0 in counts:
        raise PassError(
            f"adapt: memory {path}: its arrays hold {sorted(counts)} samples, expected one and the "
            "same number, above 0; mend the file, or remember anew"
        )
    samples = [
        Example(
            {str(v.name): arrays[str(v.name)][i] for v in inputs},
            {LABEL: np.atleast_1d(labels[i]).reshape(-1).astype(np.int64)},
        )
        for i in range(len(labels))
    ]
    apart = arrays.get(_HELD_OUT, np.arange(len(labels)) % _HELD_SHARE == _HELD_SHARE - 1)
    if apart.dtype != bool or apart.shape != (len(labels),) or apart.all():
        raise PassError(
            f"adapt: memory {path}: '{_HELD_OUT}' is {apart.dtype} {list(apart.shape)}, expected "
            f"true or false for each of the {len(labels)} samples, and not true for all of them; "
            "mend the file, or remember anew"
        )
    return Memory(
        tuple(s for s, held in zip(samples, apart, strict=True) if not held),
        tuple(s for s, held in zip(samples, apart, strict=True) if held),
    )


def write_memory(path: pathlib.Path, memory: Memory) -> None:
    """Write a memory, whole or not at all; the same samples give the same bytes.

    Raises PassError if the samples differ in shape.
    """
    samples = memory.all()
    arrays: dict[str, Array] = {}
    for name in samples[0].feeds:
        shapes = {sample.feeds[name].shape for sample in samples}
        if len(shapes) > 1:
            raise PassError(
                f"adapt: input '{name}' has samples of {len(shapes)} shapes; a memory holds one: "
                "bring the samples to one shape, or set remember to 0"
            )
        arrays[name] = np.stack([sample.feeds[name] for sample in samples])
    arrays[LABEL] = np.stack([next(iter(sample.labels.values())) for sample in samples])
    arrays[_HELD_OUT] = np.arange(len(samples)) >= len(memory.learned)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remembered(
    model: ir.Model,
    head: Head,
    samples: Sequence[Example],
    held_out: Sequence[Example],
    each: int,
) -> Memory:
    """``each`` samples of every class; a quarter of them held out, as far as there are any.

    samples: what was trained on; held_out: what was not. Raises PassError as ``choose`` does.
    """
    learned = choose(model, head, samples, each)
    apart = choose(model, head, held_out, (each + _HELD_SHARE // 2) // _HELD_SHARE)
    for own, known in learned.items():
        del known[each - len(apart.get(own, ())) :]  # the best come first
    chain = itertools.chain.from_iterable
    return Memory(tuple(chain(learned.values())), tuple(chain(apart.values())))


def choose(
    model: ir.Model, head: Head, samples: Sequence[Example], each: int
) -> dict[int, list[Example]]:
    """Class -> up to ``each`` of its samples, whose mean is nearest to the class's, best first.

    model: the adapted one, with the head's layer; what that reads is compared, scaled to length 1.
    Raises PassError if a sample has labels of several classes.
    """
    if not samples or not each:
        return {}
    classes: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        own = {int(c) for c in next(iter(sample.labels.values()))}
        if len(own) != 1:
            raise PassError(
                f"adapt: sample {index} has labels of {len(own)} classes; a memory is chosen by "
                "class: give one row a sample, or set remember to 0"
            )
        classes.setdefault(own.pop(), []).append(index)
    last = label(head.layer.node)
    source = next(node for node in model.graph if label(node) == last).inputs[0]
    assert source is not None
    name = str(source.name)
    seen = run_values(model, [name], (s.feeds for s in samples), optimized=True)
    features = np.stack([values[name].reshape(-1) for values in seen]).astype(np.float64)
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return {
        own: [samples[members[i]] for i in herd(features[members], each)]
        for own, members in sorted(classes.items())
    }


def herd(features: Array, count: int) -> list[int]:
    """Rows whose mean comes nearest to the mean of all, chosen one after the other.

    features: float64 [n, width]. Returns at most ``count`` indices, each once.
    Rebuffi et al. 2017, algorithm 4.
    """
    goal, total = features.mean(axis=0), np.zeros(features.shape[1])
    chosen: list[int] = []
    free = np.ones(len(features), bool)
    for size in range(1, min(count, len(features)) + 1):
        distances = np.linalg.norm(goal - (total + features) / size, axis=1)
        best = int(np.argmin(np.where(free, distances, np.inf)))
        chosen.append(best)
        free[best] = False
        total += features[best]
    return chosen


def known_classes(memory: Sequence[Example]) -> tuple[int, ...]:
    """The classes that a memory has samples of, sorted."""
    return tuple(sorted({int(c) for sample in memory for c in next(iter(sample.labels.values()))}))


def fisher(
    twin: TorchGraph,
    learned: Sequence[str],
    scores: Scores,
    memory: Sequence[Example],
    seed: int,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of the memory's samples, by initializer name.

    The mean over samples of the squared gradient of log p(y), y drawn from the model's own
    answer (not the label, which would give the empirical one; Kunstner et al. 2019,
    arXiv:1905.12558).
    """
    import torch

    step = -(-len(memory) // _FISHER_SAMPLES)
    chosen = memory[::step]
    random = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros_like(twin.initializer(name)) for name in learned}
    for sample in chosen:
        feeds = {n: torch.from_numpy(np.array(a)) for n, a in sample.feeds.items()}
        log = scores(twin(feeds)).log_softmax(-1)
        drawn = torch.multinomial(log.detach().exp(), 1, generator=random)
        own = [twin.initializer(name) for name in learned]
        found = torch.autograd.grad(log.gather(-1, drawn).sum(), own, allow_unused=True)
        for name, gradient in zip(learned, found, strict=True):
            if gradient is not None:
                total[name] += gradient.square() / len(chosen)
    return total
