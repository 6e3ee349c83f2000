"""Teaches a float graph the user's own labels: a new head, all weights, or low-rank branches.

The graph learns as its differentiable twin, from class labels (cross-entropy). Method "head"
trains the last layer, "full" every weight, "lora" small matrices beside the layers (Hu et
al. 2021, arXiv:2106.09685) that are then added to the weights, or kept apart as an adapter
(`edgec.adaptation`). A second round keeps what the first one learned with a memory of its
samples, learning without forgetting or consolidated weights (`edgec.passes.course`).

Adapting makes another reference, so it comes before a build and stands in no recipe: passes
of a recipe are held against the reference that they start from. `edgec adapt` runs it.

Left out: regression, several heads, and data without labels (which `recover` learns from).
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import onnx_ir as ir

from edgec.passes.continual import Memory, fisher, known_classes, read_memory, remembered
from edgec.passes.contract import Context, PassError, Result, Samples, Skip, Stage
from edgec.passes.course import Lore, Ties, scores, train
from edgec.passes.curriculum import LABEL, Example, examples
from edgec.passes.head import Growth, Head, find_head, replace_head
from edgec.passes.lora import Branch, add_branches, branches
from edgec.passes.training_loop import Outcome, fixed_threads
from edgec.passes.training_settings import TrainingSettings
from edgec.passes.weights import Array
from edgec_runtime.errors import suggestion

if TYPE_CHECKING:
    from edgec.passes.torch_graph import TorchGraph

Method = Literal["head", "full", "lora"]

# inputs that are weights, whatever their size; others are constants of the calculation
_WEIGHT_INPUTS: Mapping[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "GRU": (1, 2, 3),
    "Gather": (0,),
    "Gemm": (1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (1, 2, 3),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
    "RNN": (1, 2, 3),
}
_ROWS = frozenset({"Add", "Mul"})  # a bias or a scale where it has more than one number


@dataclass(frozen=True)
class Adapted:
    """What a training gave.

    matrices: of the branches, ``down`` and ``up`` by layer, alpha / rank inside; for method
    "lora". memory: of this round and of earlier ones, for the next.
    """

    model: ir.Model
    outcome: Outcome
    head: Head
    branches: tuple[Branch, ...] = ()
    matrices: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Adapt(TrainingSettings):
    """Train on class labels, the calibration data's; ``context.reference`` is what it was.

    A step sees ``batch`` samples; with a memory, ``replay`` is the share of them that come
    from it.
    """

    name: ClassVar[str] = "adapt"
    stage: ClassVar[Stage] = Stage.TRAIN
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 3

    method: Method = "full"
    classes: int = 0  # of a head of another size; 0: the head stays
    head: Growth = "new"  # with classes: forget the classes there were, or grow beside them
    steps: int = 400  # optimizer steps
    batch: int = 32  # samples a step
    rate: float = 1e-3  # Adam's, at the peak
    rank: int = 4  # of the branches
    alpha: float = 8.0  # alpha / rank scales the branches' steps
    layers: tuple[str, ...] = ()  # nodes that get a branch; all by default
    memory: str = ""  # .npz of labelled samples of earlier rounds
    replay: float = 0.5  # share of a step's samples that come from the memory
    keep_weight: float = 0.0  # of the distance to the answers from before
    temperature: float = 2.0  # that softens those answers
    ewc_weight: float = 0.0  # of the distance to the weights from before
    remember: int = 0  # samples of each class to keep for the next round

    def __post_init__(self) -> None:
        """Check the parameters."""
        for name, known in (("method", get_args(Method)), ("head", get_args(Growth))):
            value = getattr(self, name)
            if value not in known:
                raise PassError(
                    f"adapt: no {name} '{value}'{suggestion(value, known)}; the choices are "
                    f"{', '.join(known)}"
                )
        self.check()
        for name in ("rate", "rank", "alpha", "temperature"):
            if not getattr(self, name) > 0:
                raise PassError(f"adapt: {name} is {getattr(self, name)}, expected above 0")
        for name in ("classes", "keep_weight", "ewc_weight", "remember"):
            if not getattr(self, name) >= 0:
                raise PassError(f"adapt: {name} is {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.replay < 1:
            raise PassError(f"adapt: replay is {self.replay}, expected from 0 to below 1")
        if self.memory and self.replay and not 0 < round(self.replay * self.batch) < self.batch:
            raise PassError(
                f"adapt: replay {self.replay} of a batch of {self.batch} leaves no room for new or "
                "for remembered samples; raise batch"
            )
        if self.layers and self.method != "lora":
            raise PassError("adapt: layers are for method 'lora'; leave them out, or take lora")
        if self.ewc_weight and not self.memory:
            raise PassError(
                "adapt: ewc_weight needs a memory, whose samples say which weights matter; give "
                "the file that an earlier round wrote (memory)"
            )
        if self.head == "grow" and not self.classes:
            raise PassError("adapt: head='grow' needs classes, how many there are to be in all")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Train; the branches of method "lora" are merged into the weights."""
        before = {n: v.const_value for n, v in model.graph.initializers.items()}
        adapted = self.train(model, context)
        for branch in adapted.branches:
            branch.merge(model, *adapted.matrices[branch.layer])
        after = model.graph.initializers
        changed = sum(n not in before or v.const_value is not before[n] for n, v in after.items())
        finding = (
            f"held-out cross-entropy {adapted.outcome.before:.4g} before, "
            f"{adapted.outcome.after:.4g} after {adapted.outcome.step} of {adapted.outcome.steps} "
            "steps"
        )
        return Result(
            model, changed, adapted.skipped, findings=(finding, *adapted.outcome.findings)
        )

    def train(self, model: ir.Model, context: Context) -> Adapted:
        """Train, and put into the model all but the branches, which come apart.

        Raises PassError without labels, for labels that are no classes of the model, for a
        graph without head, and for one that the twin cannot run, with the node's name.
        """
        from edgec.passes.torch_graph import to_torch

        if self.classes:
            head = replace_head(model, self.classes, self.head, context.seed)
        else:
            head = find_head(model)
        lore = self._lore(model, context, head)
        found: tuple[Branch, ...] = ()
        skipped: tuple[Skip, ...] = ()
        work, rates = model, dict[str, float]()
        if self.method == "lora":
            found, skipped = branches(model, self.rank, self.layers)
            if self.classes:  # a head without past is trained whole
                found = tuple(b for b in found if b.result != head.layer.output.name)
                rates = dict.fromkeys(head.names(), self.rate)
            work, names = self._with_branches(model, found, context.seed)
            for down, up in names.values():
                # Adam's step does not depend on the gradient's size: scaling a branch by
                # alpha / rank is scaling the steps of ``up``, and needs no node
                rates |= {down: self.rate, up: self.rate * self.alpha / self.rank}
        with fixed_threads(self.threads):
            twin = to_torch(work)
            if self.method != "lora":
                chosen = head.names() if self.method == "head" else weights(work, twin.trained())
                rates = dict.fromkeys(chosen, self.rate)
            if not rates:
                raise PassError("adapt: nothing to train: no weight of the head is an initializer")
            ties = self._ties(twin, tuple(rates), head, lore, context)
            outcome = train(twin, work, head, lore, ties, rates, self, context)
        matrices = {}
        if self.method == "lora":
            matrices = {
                layer: (_numbers(twin, down), _numbers(twin, up))
                for layer, (down, up) in names.items()
            }
        twin.write_back(work)
        if work is not model:
            _take(model, work, head.names())
        memory = Memory(tuple(lore.memory), tuple(lore.held_memory))
        if self.remember:
            sides = lore.samples, lore.held_out
            memory = memory.joined(remembered(work, head, *sides, self.remember))
        return Adapted(model, outcome, head, found, matrices, memory, skipped)

    def _lore(self, model: ir.Model, context: Context, head: Head) -> Lore:
        """Data of this round and memory of earlier ones, checked."""
        samples = _labelled(context.calibration, context.calibration_labels, head)
        held_out: list[Example] = []
        if context.validation is not None and len(context.validation):
            held_out = _labelled(context.validation, context.validation_labels, head)
        memory = read_memory(pathlib.Path(self.memory), model) if self.memory else Memory()
        _check_classes(memory.all(), head.classes, f"memory {self.memory}")
        return Lore(samples, memory.learned, held_out, memory.held_out)

    def _with_branches(
        self, model: ir.Model, found: Sequence[Branch], seed: int
    ) -> tuple[ir.Model, dict[str, tuple[str, str]]]:
        """A clone with branches that change nothing yet, and the names of their matrices."""
        work, random = model.clone(), np.random.default_rng(seed)
        names = {b.layer: (f"{b.result}.down", f"{b.result}.up") for b in found}
        matrices = {b.layer: b.start(random) for b in found}
        add_branches(work, found, names, matrices)
        return work, names

    def _ties(
        self, twin: TorchGraph, learned: Sequence[str], head: Head, lore: Lore, context: Context
    ) -> Ties:
        """What holds the model to what it was."""
        if not (self.keep_weight or self.ewc_weight):
            return Ties()
        past = find_head(context.reference).classes
        if self.classes and self.head == "new":
            raise PassError(
                "adapt: keep_weight and ewc_weight hold on to the classes there were, which "
                "head='new' forgets; take head='grow'"
            )
        memory = (*lore.memory, *lore.held_memory)
        classes = known_classes(memory) if memory else tuple(range(past))
        if self.keep_weight and max(classes) >= past:
            raise PassError(
                f"adapt: the memory has class {max(classes)}, the model from before tells {past} "
                "apart; give the model that the memory was made with"
            )
        importance = {}
        if self.ewc_weight:
            columns = list(classes)
            importance = fisher(
                twin, learned, lambda v: scores(head, v)[:, columns], lore.memory, context.seed
            )
        return Ties(self.keep_weight > 0, classes, importance)


def check_used(settings: Adapt, given: Sequence[str]) -> None:
    """Raise PassError for a setting that was given and has no effect beside the others.

    given: names of the settings that are the user's, not defaults.
    """
    lora = settings.method == "lora", "method 'lora'", f"method is '{settings.method}'"
    needs = {  # setting -> is it used, what uses it, how it is now
        "rank": lora,
        "alpha": lora,
        "head": (settings.classes > 0, "a head of another size", "classes is not set"),
        "replay": (bool(settings.memory), "a memory", "memory is not set"),
        "temperature": (settings.keep_weight > 0, "keep_weight above 0", "keep_weight is 0"),
    }
    for name in given:
        used, what, now = needs.get(name, (True, "", ""))
        if not used:
            raise PassError(
                f"adapt: {name} is {getattr(settings, name)!r}, which only {what} uses, and {now}; "
                f"leave {name} out, or set {now.split()[0]}"
            )


def weights(model: ir.Model, trainable: Sequence[str]) -> tuple[str, ...]:
    """Initializers that a fine-tuning moves: weights and biases, no other constants.

    trainable: names of those that the twin can move.
    """
    chosen = []
    for name in trainable:
        value = model.graph.initializers[name]
        size = 0 if value.const_value is None else value.const_value.size
        if any(
            use.idx in _WEIGHT_INPUTS.get(use.node.op_type, ())
            or (use.node.op_type in _ROWS and size > 1)
            for use in value.uses()
        ):
            chosen.append(name)
    return tuple(chosen)


def _labelled(samples: Samples | None, labels: Samples | None, head: Head) -> list[Example]:
    """The samples with their class labels, int64 [rows]. Raises PassError without."""
    if samples is None or not len(samples):
        raise PassError("adapt needs data to learn from: samples with an array named 'label'")
    found = []
    for index, sample in enumerate(examples(samples, labels)):
        if LABEL not in sample.labels:
            given = {} if labels is None else next(itertools.islice(labels, index, None))
            what = f"labels of {given[LABEL].dtype}" if LABEL in given else "no class labels"
            does = "convert them to" if LABEL in given else "add an array of"
            raise PassError(f"adapt: sample {index} has {what}; {does} integers, named '{LABEL}'")
        classes = sample.labels[LABEL].reshape(-1).astype(np.int64)
        found.append(Example(sample.feeds, {LABEL: classes}))
    _check_classes(found, head.classes, "the data")
    return found


def _check_classes(samples: Sequence[Example], classes: int, where: str) -> None:
    for index, sample in enumerate(samples):
        for label in sample.labels[LABEL]:
            if not 0 <= label < classes:
                larger = f", or set classes to {int(label) + 1} or more (a bundle keeps its own)"
                raise PassError(
                    f"adapt: {where}, sample {index}: label {label} is no class: the model tells "
                    f"{classes} apart, 0 to {classes - 1}; mend the label"
                    f"{larger if label >= classes else ''}"
                )


def _numbers(twin: TorchGraph, name: str) -> Array:
    array: Array = twin.initializer(name).detach().numpy().copy()
    return array


def _take(model: ir.Model, work: ir.Model, names: Sequence[str]) -> None:
    """Give initializers of a model the numbers that they have in its clone."""
    for name in names:
        model.graph.initializers[name].const_value = work.graph.initializers[name].const_value
